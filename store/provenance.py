"""Where a model comes from: a signature that its maker put on its files (OpenSSF Model Signing), checked offline.

Does: verify a bundle with a public key, or with certificates against a CA; compare what it lists with the bytes
at hand; put what was verified into one record.
Leaves out: the bundle's format (store.oms); who may sign for this registry (store.trust): that a maker signed
a file makes it no model of this node's.

Rules
 * Nothing of a statement is used before its signature holds.
 * The key or the CA comes from the operator; what a bundle says about its signer only helps an error message.
 * The record says what was verified when the model was admitted. Nodes trust it because the registry's owner
   signed it with the target; they do not verify it again.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

import blake3
import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from skerry.errors import InvalidRequest, NotFound, StorageFailed, TooLarge, Untrusted
from skerry.terms import KIB, MIB
from store import durable, oms, timekeeping
from store.listing import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from pathlib import Path, PurePosixPath

MAX_PEM_BYTES = 256 * KIB
MAX_SIGNER_CHARACTERS = 400
MAX_CHAIN_DEPTH = 8
CHUNK_BYTES = MIB

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
_KEYS = "an ECDSA key on P-256, P-384 or P-521"
_CODE_SIGNING = {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
#: What cryptography lets out of a damaged certificate.
_DAMAGED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    CryptographyDeprecationWarning,
)


class Anchor(NamedTuple):
    """Whom the operator trusts: PEM text of one public key, or of CA certificates."""

    name: str  # of the file, for errors
    pem: bytes
    is_ca: bool


def read_anchor(path: Path, *, is_ca: bool) -> Anchor:
    """The file that holds a public key or CA certificates.

    Raises:
        NotFound, StorageFailed: it cannot be read, or is too large to be one.
    """
    return Anchor(str(path), _read(path, MAX_PEM_BYTES), is_ca)


def read(path: Path) -> bytes:
    """The bytes of a bundle.

    Raises:
        NotFound, StorageFailed: it cannot be read, or is too large to be one.
    """
    return _read(path, oms.MAX_BUNDLE_BYTES)


class Verified:
    """A bundle whose signature holds, and the files that it speaks of."""

    def __init__(self, source: str, record: Provenance, statement: oms.Statement) -> None:
        self.source = source
        self.record = record
        self.statement = statement

    def model(self, fd: int, path: PurePosixPath) -> Provenance:
        """The record of the model whose bytes are in `fd`, if they are those that were signed as `path`.

        Args:
            fd: the whole file, best a sealed copy. Borrowed.
            path: below the root that was signed: a file's name, or 1/model.onnx in a directory.

        Raises:
            Untrusted: the bundle lists no such file, or other bytes.
        """
        pieces = self.check(fd, path)
        whole = f"{self.statement.algorithm}:{pieces[0].digest}" if pieces[0].stop is None else ""
        return msgspec.structs.replace(self.record, model=whole)

    def check(self, fd: int, path: PurePosixPath) -> tuple[oms.Piece, ...]:
        """Refuse a file whose bytes are not those that were signed as `path`; as `model`, without a record."""
        pieces = self.statement.files.get(str(path))
        if pieces is None:
            known = ", ".join(repr(name[:80]) for name in list(self.statement.files)[:10])
            raise Untrusted(
                f"{self.source}: expected a signed file {str(path)!r}, got {known}",
                "each of the model's files has to have the name under which it was signed",
            )
        self._check(fd, str(path), pieces)
        return pieces

    def directory(self, root: Path, bundle: Path | None = None) -> None:
        """Check that the files below `root` are those that were signed: all of them, and no others.

        Args:
            root: what was signed.
            bundle: the file with the signature, which is not part of it.

        Raises:
            Untrusted: a file is missing, has other bytes, or was not signed.
            StorageFailed: something cannot be read.
        """
        present = set(self._present(root, bundle))
        if unsigned := sorted(present - self.statement.files.keys()):
            raise Untrusted(
                f"{root}: expected only files that were signed, got {', '.join(map(repr, unsigned[:10]))}",
                "take them away, or have the model signed again with them",
            )
        for name, pieces in self.statement.files.items():
            path = root / name
            try:
                # Links were looked at by `_present`; a file that an ignored one leads to is followed as well.
                fd = durable.open_regular(path.resolve() if self.statement.symlinks else path)
            except FileNotFoundError:
                raise Untrusted(f"{root}: expected the signed file {name!r}, found none") from None
            try:
                self._check(fd, name, pieces)
            finally:
                os.close(fd)

    def _present(self, root: Path, bundle: Path | None) -> Iterator[str]:
        """Paths of the files below `root` that a signer has to list."""
        own = bundle.resolve() if bundle else None
        ignored = {*oms.ALWAYS_IGNORED, *(path.rstrip("/") for path in self.statement.ignored)}
        count = 0

        def unreadable(error: OSError) -> None:
            raise StorageFailed(f"{error.filename}: cannot read: {error.strerror}") from error

        for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=self.statement.symlinks):
            place = os.path.relpath(folder, root)
            below = "" if place == "." else f"{place}/"
            links = [
                name for name in folders if not self.statement.symlinks and (root / below / name).is_symlink()
            ]
            folders[:] = [name for name in folders if below + name not in ignored and name not in links]
            for name in [*names, *links]:
                path = root / below / name
                if below + name in ignored or (own and path.resolve() == own):
                    continue
                count += 1
                if count > oms.MAX_RESOURCES:
                    raise TooLarge(f"{root}: expected at most {oms.MAX_RESOURCES} files, got more")
                if path.is_symlink() and not self.statement.symlinks:
                    raise Untrusted(f"{root}: expected no symbolic links, as signed, got {below + name!r}")
                if below + name in self.statement.files or not self._may_be_left_out(path):
                    yield below + name

    def _may_be_left_out(self, path: Path) -> bool:
        """Whether this is an empty file of a model that was signed in shards: it has none."""
        sharded = any(piece.stop for pieces in self.statement.files.values() for piece in pieces[:1])
        return sharded and path.stat().st_size == 0

    def _check(self, fd: int, name: str, pieces: tuple[oms.Piece, ...]) -> None:
        size_bytes = os.fstat(fd).st_size
        end = pieces[-1].stop
        if end is not None and end != size_bytes:
            raise Untrusted(f"{name}: expected {end} bytes, as signed, got {size_bytes}")
        for piece in pieces:
            found = _digest(fd, self.statement.algorithm, piece.start, piece.stop)
            if found != piece.digest:
                raise Untrusted(
                    f"{name}: expected {self.statement.algorithm}:{piece.digest}, as signed, got {found}",
                    "this is not the file that its maker signed",
                )


def verify(
    data: bytes, source: str, anchor: Anchor, now: Callable[[], datetime] = timekeeping.utc_now
) -> Verified:
    """Verify a bundle's signature and read what it says.

    Args:
        data: the bundle, a whole file.
        source: its name, for errors.
        anchor: whom to trust.
        now: the clock that judges certificates.

    Raises:
        InvalidRequest: not a bundle, or the anchor is no key or certificate of a kind that signs models.
        Unsupported: a keyless signature, or digests of an unknown kind.
        Untrusted: the signature is not the anchor's, or the statement is not about a model.
    """
    bundle = oms.parse(data, source)
    if anchor.is_ca:
        key, signer = _certified(bundle, source, anchor, now())
    else:
        key, signer = _pinned(bundle, source, anchor)
    try:
        algorithm = ec.ECDSA(_HASHES[key.curve.name])
        key.verify(bundle.signature, oms.signed_bytes(bundle.payload), algorithm)
    except InvalidSignature:
        named = f", made by the key {bundle.hint[:80]!r} as it says" if bundle.hint else ""
        raise Untrusted(
            f"{source}: expected a signature by {signer}, got one that is not{named}",
            "the bundle was changed, or signed by somebody else",
        ) from None
    statement = oms.statement(bundle.payload, source)
    method = "certificate" if anchor.is_ca else "key"
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Verified(source, Provenance(method, signer, digest, len(statement.files)), statement)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """'sha256:<hex>' over the key's PEM form, which is what bundles name their keys by."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(pem).hexdigest()}"


def _pinned(bundle: oms.Bundle, source: str, anchor: Anchor) -> tuple[ec.EllipticCurvePublicKey, str]:
    if bundle.chain:
        raise InvalidRequest(
            f"{source}: expected a signature by a key, got one by a certificate",
            "name the certificate authority instead: --provenance-ca PEM",
        )
    try:
        key = serialization.load_pem_public_key(anchor.pem)
    except _DAMAGED as error:
        raise InvalidRequest(
            f"{anchor.name}: expected {_KEYS} as PEM, got something else: {error}"
        ) from error
    known = _of_known_kind(key)
    if known is None:
        raise InvalidRequest(f"{anchor.name}: expected {_KEYS}, got {_describe(key)}")
    return known, fingerprint(known)


def _certified(
    bundle: oms.Bundle, source: str, anchor: Anchor, now: datetime
) -> tuple[ec.EllipticCurvePublicKey, str]:
    if not bundle.chain:
        raise InvalidRequest(
            f"{source}: expected a signature by a certificate, got one by a key",
            "name the key instead: --provenance-key PEM",
        )
    try:
        store = verification.Store(x509.load_pem_x509_certificates(anchor.pem))
    except _DAMAGED as error:
        raise InvalidRequest(
            f"{anchor.name}: expected CA certificates as PEM, got something else: {error}"
        ) from error
    try:
        leaf, *between = _certificates(bundle.chain)
        key, subject = leaf.public_key(), leaf.subject.rfc4514_string()
        _policy(store, now).verify(leaf, between)
    except verification.VerificationError as error:
        raise Untrusted(
            f"{source}: expected a certificate of {anchor.name} that may sign, got one that is refused: {error}",
            "the signer's certificate ended, is for something else, or was issued by another authority",
        ) from error
    except _DAMAGED as error:
        raise InvalidRequest(f"{source}: expected certificates, got something else: {error}") from error
    known = _of_known_kind(key)
    if known is None:
        raise Untrusted(f"{source}: expected {_KEYS} in the signer's certificate, got {_describe(key)}")
    # A name is text of the signer's choice, and people will read it on their terminals.
    name = "".join(character if character.isprintable() else "?" for character in subject)
    return known, name[:MAX_SIGNER_CHARACTERS] or f"sha256:{leaf.fingerprint(hashes.SHA256()).hex()}"


def _certificates(chain: tuple[bytes, ...]) -> list[x509.Certificate]:
    with warnings.catch_warnings():
        # What cryptography only warns of, such as a serial number of 0, it means to refuse soon.
        warnings.simplefilter("error", CryptographyDeprecationWarning)
        return [x509.load_der_x509_certificate(der) for der in chain]


def _policy(store: verification.Store, now: datetime) -> verification.ClientVerifier:
    """The usual rules for a chain, but for what only web servers and their clients have in a certificate."""
    agnostic = verification.Criticality.AGNOSTIC
    ca = verification.ExtensionPolicy.webpki_defaults_ca().may_be_present(
        x509.ExtendedKeyUsage, agnostic, _may_sign_code
    )
    signer = (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.KeyUsage, agnostic, _may_sign)
        .may_be_present(x509.ExtendedKeyUsage, agnostic, _may_sign_code)
    )
    builder = verification.PolicyBuilder().store(store).time(now).max_chain_depth(MAX_CHAIN_DEPTH)
    return builder.extension_policies(ca_policy=ca, ee_policy=signer).build_client_verifier()


def _may_sign(_policy: verification.Policy, _certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.digital_signature:
        raise ValueError("its key may not make digital signatures")


def _may_sign_code(
    _policy: verification.Policy, _certificate: x509.Certificate, usage: x509.ExtendedKeyUsage | None
) -> None:
    if usage is not None and not _CODE_SIGNING & set(usage):
        raise ValueError("its key may not sign code")


def _of_known_kind(key: object) -> ec.EllipticCurvePublicKey | None:
    return key if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES else None


def _describe(key: object) -> str:
    return f"one on {key.curve.name}" if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__


def _digest(fd: int, algorithm: str, start: int, stop: int | None) -> str:
    total = blake3.blake3() if algorithm == "blake3" else hashlib.new(algorithm)
    offset = start
    with durable.reporting("signed file: cannot read"):
        while stop is None or offset < stop:
            chunk = os.pread(fd, CHUNK_BYTES if stop is None else min(CHUNK_BYTES, stop - offset), offset)
            if not chunk:
                break
            total.update(chunk)
            offset += len(chunk)
    return str(total.hexdigest())


def _read(path: Path, limit_bytes: int) -> bytes:
    data = durable.read(path.resolve(), limit_bytes)
    if data is None:
        raise NotFound(f"{path}: no such file")
    return data
