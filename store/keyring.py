"""Keys by URI: files, hardware tokens, and whatever else securesystemslib can sign with.

Does: find the key that a person names, open signers, remember in keys.json which URI signs for which key.
Leaves out: the keys themselves (store.keyfiles, store.tokens), which role a key signs for (store.roles), asking for a
PIN (who calls says how).

Rules
 * keys.json holds URIs and public keys, never a secret. It is not signed: a wrong entry costs a signature that
   does not count.
 * What is remembered and not at hand (another machine's key file, a token in a drawer) is no error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from securesystemslib.signer import (  # type: ignore[attr-defined]  # public there, without __all__
    CryptoSigner,
    Key,
    Signer,
    SSlibKey,
)

from skerry.errors import ConfigError, InvalidRequest, NotFound, StorageFailed, Unsupported
from skerry.terms import MIB
from store import durable, keyfiles, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILE = "file"
KEYS_JSON = "keys.json"
MAX_KEYS_JSON_BYTES = MIB

_ID = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True, slots=True)
class Named:
    """A public key, the URI that signs with it ("" where only others can), and what people call it."""

    key: Key
    uri: str = ""
    label: str = ""


class _Known(msgspec.Struct):
    public: dict[str, Any]
    uri: str = ""
    label: str = ""


class _KeysFile(msgspec.Struct):
    keys: dict[str, _Known]
    format: int = 1


class Keyring:
    """The keys that can sign here: those that keys.json remembers, and those named for this command.

    Args:
        folder: the repository's; relative file URIs in keys.json start there. None: nothing is remembered.
        secrets: asked for PINs, once each.
    """

    def __init__(self, folder: Path | None, secrets: Callable[[str], str]) -> None:
        self._folder = folder
        self._known: dict[str, Named] = {}
        self._given: set[str] = set()
        self._open: dict[str, Signer | None] = {}
        self._secrets = secrets
        self._answers: dict[str, str] = {}
        #: Sentences about remembered keys that are not at hand.
        self.absent: dict[str, str] = {}
        if folder is not None:
            self._known = _read_known(folder / KEYS_JSON)

    def give(self, text: str) -> Named:
        """Use the key that `text` names (a URI or a file) in this command; see `identify`."""
        named = identify(text, self.ask)
        if named.uri:
            self._known[named.key.keyid] = named
            self._given.add(named.key.keyid)
            self._open.pop(named.key.keyid, None)
        return named

    def remember(self, named: Named) -> None:
        """Write down which URI signs for this key, and what it is called.

        Raises:
            StorageFailed: the disk refused.
        """
        if self._folder is None:
            return
        had = self._known.get(named.key.keyid)
        if had is not None and not named.uri:  # its public half says nothing new
            return
        known = _read_known(self._folder / KEYS_JSON) | {named.key.keyid: named}
        self._known[named.key.keyid] = named
        document = _KeysFile(
            {
                keyid: _Known(item.key.to_dict(), _relative(item.uri, self._folder), item.label)
                for keyid, item in sorted(known.items())
            }
        )
        data = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
        durable.make_dir(self._folder)
        durable.write(self._folder / KEYS_JSON, data)

    def id_of(self, text: str) -> str:
        """The id, or its beginning, that `text` stands for: an id, a label, or a key's file or URI."""
        labelled = [keyid for keyid, named in self._known.items() if named.label == text]
        if len(labelled) == 1:
            return labelled[0]
        if _ID.fullmatch(text) and not Path(text).exists():
            return text
        return identify(text, self.ask).key.keyid

    def named(self, keyid: str) -> Named | None:
        """What is remembered of a key."""
        return self._known.get(keyid)

    def signers(self, keyids: tuple[str, ...]) -> Iterator[Signer]:
        """Signers of those of these keys that are at hand."""
        for keyid in keyids:
            signer = self.signer(keyid)
            if signer is not None:
                yield signer

    def signer(self, keyid: str) -> Signer | None:
        """The signer of a key; None if nobody here has it.

        Raises:
            Denied: others can read its file.
            SkerryError: a key named for this command cannot be opened.
        """
        if keyid not in self._open:
            named = self._known.get(keyid)
            self._open[keyid] = self._opened(named) if named and named.uri else None
        return self._open[keyid]

    def _opened(self, named: Named) -> Signer | None:
        try:
            return open_signer(named, self.ask)
        except (NotFound, Unsupported, ConfigError) as error:
            if named.key.keyid in self._given:
                raise
            self.absent[named.key.keyid] = error.message
            return None

    def ask(self, secret: str) -> str:
        """A secret, asked for once."""
        if secret not in self._answers:
            self._answers[secret] = self._secrets(secret)
        return self._answers[secret]


# -- one key ----------------------------------------------------------------------------------------------


def identify(text: str, ask: Callable[[str], str]) -> Named:
    """The key that a person named: a URI, a private key file (for short), or a public key file.

    Raises:
        NotFound: no such file, token or key.
        Denied: others can read the private key, or the PIN is wrong.
        Unsupported: a package for this kind of URI is missing.
        InvalidRequest: it is no key.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme in {FILE, *tokens.SCHEMES}:
        if scheme != FILE:
            uri, key = tokens.fetch(scheme, rest, text, ask)
            return Named(key, uri, uri)
        text = rest
    elif colon and "/" not in scheme and not Path(text).exists():
        schemes = ", ".join(sorted({FILE, *tokens.SCHEMES}))
        raise InvalidRequest(f"key: expected a file, or a URI that begins with {schemes}; got {text!r}")
    path = Path(text).expanduser().absolute()
    data = keyfiles.read_bytes(path)
    if b"PRIVATE KEY" not in data:
        if colon and scheme == FILE:
            raise InvalidRequest(f"{path}: expected a private key in PKCS8 PEM form, got something else")
        return Named(keyfiles.parse_public(data, str(path)), label=_label(path))
    return Named(keyfiles.load(path).public_key, f"{FILE}:{path}", _label(path))


def exists(text: str) -> bool:
    """Whether `text` names something that may be a key: a URI, or a file that is there."""
    scheme, colon, _ = text.partition(":")
    return bool(colon and scheme in {FILE, *tokens.SCHEMES}) or Path(text).expanduser().exists()


def _label(path: Path) -> str:
    """bob.pem, bob.pub and bob.pem.pub are bob's; key.pem in a folder bob is bob's, too."""
    name = path.name
    while (shorter := name.removesuffix(".pub").removesuffix(".pem").removesuffix(".json")) != name:
        name = shorter
    return f"{path.parent.name}/{name}" if name in {"key", "id", "private", "public"} else name


def open_signer(named: Named, ask: Callable[[str], str]) -> Signer:
    """Who signs with this key.

    Raises:
        NotFound: the file or token is not here.
        Denied: others can read the file.
        InvalidRequest: it holds another key.
        ConfigError: no library for tokens is named.
        Unsupported: a package for this kind of URI is missing.
    """
    scheme, _, rest = named.uri.partition(":")
    if scheme == FILE:
        signer = keyfiles.load(Path(rest))
        if signer.public_key.keyval != named.key.keyval:
            raise InvalidRequest(
                f"{rest}: expected the key {named.key.keyid[:12]}, got {signer.public_key.keyid[:12]}",
                "the file was replaced; give the right one with --key",
            )
        if isinstance(named.key, SSlibKey):
            return CryptoSigner(signer._private_key, named.key)  # noqa: SLF001 - keeps the id that metadata uses
        return signer
    if scheme == tokens.HSM:
        tokens.find_token(named.uri)
    with tokens.speaking(named.uri):
        return tokens.Guarded(Signer.from_priv_key_uri(named.uri, named.key, ask), named.uri)


# -- keys.json --------------------------------------------------------------------------------------------


def _read_known(path: Path) -> dict[str, Named]:
    data = durable.read(path, MAX_KEYS_JSON_BYTES)
    if data is None:
        return {}
    try:
        document = msgspec.json.decode(data, type=_KeysFile)
        if document.format != 1:
            raise Unsupported(f"{path}: expected format 1, got {document.format}", "use a newer skerry")
        return {
            keyid: Named(
                Key.from_dict(keyid, dict(known.public)), _absolute(known.uri, path.parent), known.label
            )
            for keyid, known in document.keys.items()
        }
    except (ValueError, TypeError, KeyError, msgspec.MsgspecError) as error:
        raise StorageFailed(
            f"{path}: expected the repository's list of keys, got something else: {error}",
            "remove it, and name keys with --key; what they sign is not lost",
        ) from error


def _absolute(uri: str, folder: Path) -> str:
    scheme, _, rest = uri.partition(":")
    return f"{FILE}:{folder.absolute() / rest}" if scheme == FILE else uri


def _relative(uri: str, folder: Path) -> str:
    scheme, _, rest = uri.partition(":")
    if scheme == FILE and Path(rest).is_relative_to(folder.absolute()):
        return f"{FILE}:{Path(rest).relative_to(folder.absolute())}"
    return uri
