"""Key files: private ones in PKCS8 PEM form, public ones in PEM or JSON.

Does: make, load, read, write.
Leaves out: other places where keys live (store.tokens), which key is wanted (store.keyring).

Rules
 * A private key that others can read is refused, and one that we make is 0600 in a 0700 directory from its
   first byte on.
 * We sign with Ed25519 and ECDSA P-256. Of public keys we take whatever clients can verify.
 * The id of a key is made from the key, so that no file can claim another's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.exceptions import Error as SecuresystemslibError
from securesystemslib.signer import (  # type: ignore[attr-defined]  # public there, without __all__
    CryptoSigner,
    SSlibKey,
)

from skerry.errors import Denied, InvalidRequest, NotFound, Unsupported
from store import durable

if TYPE_CHECKING:
    from pathlib import Path

    from securesystemslib.signer import Key  # type: ignore[attr-defined]  # likewise

MAX_KEY_BYTES = 16_384  # a PKCS8 Ed25519 key has 119, a P-256 one 241


def make(path: Path) -> CryptoSigner:
    """Make an Ed25519 key in `path`, which must not exist, and its public half in `path`.pub.

    Raises:
        InvalidRequest: the file exists.
        StorageFailed: the disk refused.
    """
    if path.exists() or path.is_symlink():
        raise InvalidRequest(f"{path}: expected a name that is free, got an existing file")
    signer = CryptoSigner.generate_ed25519()
    durable.make_dir(path.parent, 0o700)
    durable.write(path, signer.private_bytes, 0o600)
    public = path.with_name(f"{path.name}.pub")
    durable.write(public, public_pem(signer.public_key))
    return signer


def public_pem(key: Key) -> bytes:
    """The public half as others read it.

    Raises:
        Unsupported: the key has no such form.
    """
    if not isinstance(key, SSlibKey):
        raise Unsupported(
            f"key {key.keyid[:12]}: expected one with a public half in PEM form, got {key.keytype}"
        )
    public: bytes = key._crypto_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)  # noqa: SLF001
    return public


def public_json(key: Key) -> bytes:
    """The public half as metadata has it, with its id."""
    return msgspec.json.encode({"keyid": key.keyid, **key.to_dict()}) + b"\n"


def read_public(path: Path) -> Key:
    """Somebody's public key, from PEM or from JSON as `public_json` writes it.

    Raises:
        NotFound: no such file.
        InvalidRequest: it is neither, or an id does not fit its key.
    """
    return parse_public(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A key file's bytes; NotFound if there is none."""
    data = durable.read(path.resolve(), MAX_KEY_BYTES)
    if data is None:
        raise NotFound(f"{path}: expected a key file, found none")
    return data


def load(path: Path) -> CryptoSigner:
    """Who signs with a private key file.

    Raises:
        NotFound: no such file.
        Denied: others can read it.
        InvalidRequest: it is no key that we sign with.
    """
    data = read_bytes(path)
    mode = path.stat().st_mode
    if mode & 0o077:
        raise Denied(
            f"{path}: expected mode 0600, got {mode & 0o777:04o}",
            f"others can read this key: chmod 600 {path}",
        )
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):  # TypeError: it wants a password
        key = None
    if isinstance(key, Ed25519PrivateKey) or (
        isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP256R1)
    ):
        return CryptoSigner(key)
    raise InvalidRequest(
        f"{path}: expected an Ed25519 or ECDSA P-256 private key in PKCS8 PEM form without a password, "
        "got something else",
        "`skerry repo key FILE` makes one",
    )


def parse_public(data: bytes, where: str) -> SSlibKey:
    """A public key from the bytes of its file; `where` is what messages call it."""
    try:
        if data.lstrip().startswith(b"{"):
            fields = msgspec.json.decode(data, type=dict[str, Any])
            stated = fields.pop("keyid", None)
            read = SSlibKey.from_dict("", fields)
            # Ids are made here, so that no file can claim another key's.
            key = SSlibKey.from_crypto(read._crypto_key(), scheme=read.scheme)  # noqa: SLF001
            if stated not in {None, key.keyid}:
                raise InvalidRequest(f"{where}: expected the key id {key.keyid}, got {stated!r}")
            return key
        return SSlibKey.from_crypto(load_pem_public_key(data))
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        msgspec.MsgspecError,
        SecuresystemslibError,
    ) as error:
        raise InvalidRequest(
            f"{where}: expected a public key as PEM or JSON, got something else: {error}"
        ) from error
