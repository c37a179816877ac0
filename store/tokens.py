"""Keys that never leave where they are: hardware tokens, cloud key services.

Does: hand URIs through to securesystemslib's signers, and turn what goes wrong there into our errors.
Leaves out: files (store.keyfiles), which key is wanted (store.keyring).

Rules
 * Nobody is asked for a PIN before the token is found.
 * A wrong PIN ends the command at once: tokens lock themselves after a few.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlparse

from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (  # type: ignore[attr-defined]  # public there, without __all__
    SIGNER_FOR_URI_SCHEME,
    HSMSigner,
    Signer,
)

from skerry.errors import ConfigError, Denied, InvalidRequest, NotFound, SkerryError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from securesystemslib.signer import Key, Signature  # type: ignore[attr-defined]  # likewise

HSM = "hsm"
#: Not GnuPG's: who verifies its signatures needs gpg. Not file2: store.keyfiles checks who can read a file.
SCHEMES = frozenset(SIGNER_FOR_URI_SCHEME) - {"file2", "gnupg"}

#: Scheme -> the extra of securesystemslib that brings what it needs.
_EXTRAS = {
    HSM: "hsm",
    "awskms": "awskms",
    "azurekms": "azurekms",
    "gcpkms": "gcpkms",
    "hv": "vault",
    "tkey": "tkey",
}
_LIBRARY_VARIABLE = "PYKCS11LIB"
_WRONG_PIN = {"PinIncorrect", "PinInvalid", "PinLenRange", "PinExpired"}


class Guarded(Signer):
    """A signer whose failures are ours."""

    def __init__(self, inner: Signer, uri: str) -> None:
        self._inner = inner
        self._uri = uri

    @property
    def public_key(self) -> Key:
        """The signer's."""
        return self._inner.public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: Callable[[str], str] | None = None
    ) -> Signer:
        """Not to be used."""
        raise NotImplementedError  # it is made from a signer, never from a URI

    def sign(self, payload: bytes) -> Signature:
        """As the signer does, or a SkerryError."""
        with speaking(self._uri):
            return self._inner.sign(payload)


class speaking:  # noqa: N801 - used like a function
    """Turns whatever a signer raises, its libraries' errors included, into ours."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, SkerryError) or not isinstance(error, Exception):
            return
        scheme = self._uri.partition(":")[0]
        name = type(error).__name__
        if isinstance(error, UnsupportedLibraryError | ImportError):
            extra = _EXTRAS.get(scheme)
            hint = (
                f"pip install 'securesystemslib[{extra}]'"
                if extra
                else f"{scheme}: needs a program of its own"
            )
            raise Unsupported(
                f"{self._uri}: expected the packages for {scheme}: keys, found none", hint
            ) from error
        if name in _WRONG_PIN:
            hint = "give the right one in SKERRY_HSM_PIN or when asked; a token locks itself after a few wrong ones"
            raise Denied(f"{self._uri}: the PIN is wrong", hint) from error
        if name == "PinLocked":
            raise Denied(f"{self._uri}: the PIN is locked", "unlock the token with its PUK") from error
        raise InvalidRequest(f"{self._uri}: {str(error) or name}") from error


def find_token(uri: str) -> None:
    """Say what is missing before anybody is asked for a PIN."""
    with speaking(uri):
        import pkcs11  # noqa: PLC0415 - an extra

        library = os.environ.get(_LIBRARY_VARIABLE)
        if not library:
            raise ConfigError(
                f"{uri}: expected {_LIBRARY_VARIABLE} to name the token's PKCS#11 library, got nothing",
                f"export {_LIBRARY_VARIABLE}=/usr/lib/softhsm/libsofthsm2.so, libykcs11.so or opensc-pkcs11.so",
            )
        try:
            HSMSigner._find_token(_hsm_parts(uri)[1])  # noqa: SLF001 - there is no public way to ask
        except ValueError as error:
            raise NotFound(f"{uri}: {error}") from error
        except pkcs11.exceptions.PKCS11Error as error:
            raise ConfigError(
                f"{uri}: {library}: cannot be used: {str(error) or type(error).__name__}"
            ) from error


def _hsm_parts(uri: str) -> tuple[int | None, str | None]:
    parts = urlparse(uri)
    if parts.path and not parts.path.isdigit():
        raise InvalidRequest(f"key: expected hsm:[NUMBER][?label=TOKEN], got {uri!r}")
    return (int(parts.path) if parts.path else None), dict(parse_qsl(parts.query)).get("label")


def fetch(scheme: str, rest: str, uri: str, ask: Callable[[str], str]) -> tuple[str, Key]:
    """Ask the holder of a key for its public half, and for the URI under which it wants to be asked to sign."""
    kind: Any = SIGNER_FOR_URI_SCHEME[scheme]
    if scheme == HSM:
        find_token(uri)
        number, label = _hsm_parts(uri)
        with speaking(uri):
            found = kind.import_(number, label, ask)
    elif scheme == "azurekms":  # azurekms://VAULT.vault.azure.net/keys/NAME/VERSION
        vault, _, path = rest.removeprefix("//").partition("/")
        with speaking(uri):
            found = kind.import_(vault.partition(".")[0], path.split("/")[1] if "/" in path else path)
    elif scheme == "tkey":
        with speaking(uri):
            found = kind.import_(device_path=rest or None)
    elif scheme == "hv":  # the newest version of that name, which the URI it gives back says
        with speaking(uri):
            found = kind.import_(rest.partition("/")[0])
    else:
        with speaking(uri):
            found = kind.import_(rest)
    canonical, key = found
    return canonical, key
