"""Read a signature as OpenSSF Model Signing (OMS) writes it: a Sigstore bundle around a list of files and digests.

Does: the bundle's JSON, the envelope's bytes that were signed, the statement in it, the files that it lists.
Leaves out: whether the signature holds and the files are those (store.provenance); the deprecated statement of
version 0.2.0.

Rules
 * Sans-IO. Any bytes give a Bundle or a SkerryError; every count and length has a ceiling.
 * A statement is read only from bytes whose signature was verified: `statement` is for after that.
 * What the formats leave open (unknown keys of certificates, of resources) is stepped over; where they say
   what may be there, anything else is refused.

Source: https://github.com/ossf/model-signing-spec/blob/main/spec/v1.0.md,
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
"""

from __future__ import annotations

import binascii
import re
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec

from skerry.errors import InvalidRequest, TooLarge, Unsupported, Untrusted
from skerry.terms import MIB

MAX_BUNDLE_BYTES = 4 * MIB  # as many files as may be, in base64
MAX_RESOURCES = 10_000  # a model's files, or pieces of them; large ones have some hundred
MAX_NAME_BYTES = 1024
MAX_CERTIFICATES = 16  # a chain has two or three
MAX_IGNORED = 1000

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

#: Algorithm -> hex digits of a digest.
ALGORITHMS = {"sha256": 64, "blake2b": 128, "blake3": 64}
#: What a signer leaves out at the top of a model, whether it says so or not.
ALWAYS_IGNORED = (".git", ".gitignore", ".gitattributes", ".github")

_MEDIA_TYPE = re.compile(
    r"application/vnd\.dev\.sigstore\.bundle(?:\.v0\.3(?:\.[0-9]+)?\+json|\+json;version=0\.[123])"
)
_HEX = re.compile(r"[0-9a-f]+")
_SHARD = re.compile(r"(.+):([0-9]{1,18}):([0-9]{1,18})", re.DOTALL)
_URL_SAFE = str.maketrans("-_", "+/")

_Document = TypeVar("_Document")


class _Signature(msgspec.Struct, forbid_unknown_fields=True):
    sig: str
    keyid: str | None = None


class _Envelope(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    payload: str
    payload_type: str
    signatures: list[_Signature]


class _PublicKey(msgspec.Struct, rename="camel"):
    hint: str | None = None
    raw_bytes: str | None = None


class _Certificate(msgspec.Struct, rename="camel"):
    raw_bytes: str


class _Chain(msgspec.Struct):
    certificates: list[_Certificate]


class _Material(msgspec.Struct):
    public_key: _PublicKey | None = msgspec.field(name="publicKey", default=None)
    chain: _Chain | None = msgspec.field(name="x509CertificateChain", default=None)
    certificate: msgspec.Raw = msgspec.Raw()  # keyless; empty where it is not there


class _Bundle(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Resource(msgspec.Struct):
    name: str
    digest: str
    algorithm: str


class _Serialization(msgspec.Struct, forbid_unknown_fields=True):
    method: Literal["files", "shards"]
    hash_type: str
    allow_symlinks: bool
    shard_size: Annotated[int, msgspec.Meta(gt=0, le=1 << 53)] | None = None
    ignore_paths: list[str] = []


class _Predicate(msgspec.Struct, forbid_unknown_fields=True):
    resources: list[_Resource]
    serialization: _Serialization


class _Statement(msgspec.Struct, forbid_unknown_fields=True):
    type: str = msgspec.field(name="_type")
    subject: list[msgspec.Raw]  # informational, and one
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: msgspec.Raw


class Bundle(NamedTuple):
    """What a bundle carries; nothing of it is verified.

    Attributes:
        hint: what it says about the key that signed it, or "".
        chain: DER certificates, the signer's first; empty where a key signed.
        payload: the statement's bytes.
        signature: over `signed_bytes(payload)`.
    """

    hint: str
    chain: tuple[bytes, ...]
    payload: bytes
    signature: bytes


class Piece(NamedTuple):
    """Bytes [start, stop) of a file and their digest, in hex; `stop` None is the file's end."""

    start: int
    stop: int | None
    digest: str


class Statement(NamedTuple):
    """What the signer says.

    Attributes:
        algorithm: of all digests, a key of ALGORITHMS.
        files: path below the model's root -> its pieces, in order, one after the other; one for a whole file.
        ignored: paths that the signer left out, with all that is below them.
        symlinks: whether the signer followed links.
    """

    algorithm: str
    files: dict[str, tuple[Piece, ...]]
    ignored: tuple[str, ...]
    symlinks: bool


def parse(data: bytes, source: str) -> Bundle:
    """The bundle in `data`.

    Args:
        data: the whole file.
        source: its name, for errors.

    Raises:
        InvalidRequest: not a bundle with a model's signature; TooLarge over a ceiling.
        Unsupported: signed without a key of the signer's own (keyless).
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise TooLarge(f"{source}: expected at most {MAX_BUNDLE_BYTES} bytes, got {len(data)}")
    bundle = _decode(data, _Bundle, f"{source}: expected a signature bundle of OpenSSF Model Signing")
    if not _MEDIA_TYPE.fullmatch(bundle.media_type):
        raise InvalidRequest(
            f"{source}: mediaType: expected application/vnd.dev.sigstore.bundle.v0.3+json, "
            f"got {bundle.media_type[:80]!r}"
        )
    hint, chain = _signer(bundle.verification_material, source)
    envelope = bundle.dsse_envelope
    if envelope.payload_type != PAYLOAD_TYPE:
        raise InvalidRequest(
            f"{source}: payloadType: expected {PAYLOAD_TYPE}, got {envelope.payload_type[:80]!r}"
        )
    if len(envelope.signatures) != 1:
        raise InvalidRequest(f"{source}: expected one signature, got {len(envelope.signatures)}")
    payload = _base64(envelope.payload, f"{source}: payload")
    return Bundle(hint, chain, payload, _base64(envelope.signatures[0].sig, f"{source}: sig"))


def signed_bytes(payload: bytes) -> bytes:
    """What the signature is over: the envelope's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def statement(payload: bytes, source: str) -> Statement:
    """The statement in a payload whose signature was verified.

    Raises:
        Untrusted: signed, but not a statement about a model's files as version 1.0 has it.
        Unsupported: its digests are of a kind that is not known here.
        TooLarge: over a ceiling.
    """
    try:
        return _statement(payload, source)
    except TooLarge:
        raise
    except InvalidRequest as error:
        raise Untrusted(error.message, "the signature holds, but not for a model's files") from error


def _signer(material: _Material, source: str) -> tuple[str, tuple[bytes, ...]]:
    keyless = bytes(material.certificate) not in {b"", b"null"}
    kinds = (material.public_key is not None) + (material.chain is not None) + keyless
    if kinds != 1:
        raise InvalidRequest(
            f"{source}: verificationMaterial: expected one of publicKey and x509CertificateChain, got {kinds}"
        )
    if keyless:
        raise Unsupported(
            f"{source}: expected a signature by a key or a certificate, got a keyless one (Sigstore)",
            "a keyless signature is proved by services on the internet, which a node cannot ask; "
            "verify it where there is a network, and sign the model with a key",
        )
    if material.public_key is not None:
        hint = material.public_key.hint
        if hint is None and material.public_key.raw_bytes is None:
            raise InvalidRequest(f"{source}: publicKey: expected a hint, got none")
        return (hint or "")[:MAX_NAME_BYTES], ()
    certificates = material.chain.certificates if material.chain else []
    if not 0 < len(certificates) <= MAX_CERTIFICATES:
        raise InvalidRequest(
            f"{source}: expected 1 to {MAX_CERTIFICATES} certificates, got {len(certificates)}"
        )
    return "", tuple(_base64(each.raw_bytes, f"{source}: certificate") for each in certificates)


def _statement(payload: bytes, source: str) -> Statement:
    said = _decode(payload, _Statement, f"{source}: expected a statement about a model")
    for what, expected, got in (
        ("_type", STATEMENT_TYPE, said.type),
        ("predicateType", PREDICATE_TYPE, said.predicate_type),
    ):
        if got != expected:
            raise InvalidRequest(f"{source}: {what}: expected {expected}, got {got[:80]!r}")
    if len(said.subject) != 1:
        raise InvalidRequest(f"{source}: expected one subject, got {len(said.subject)}")
    return _listed(
        _decode(said.predicate, _Predicate, f"{source}: expected a list of a model's files"), source
    )


def _listed(predicate: _Predicate, source: str) -> Statement:
    form = predicate.serialization
    if (form.shard_size is not None) != (form.method == "shards"):
        raise InvalidRequest(f"{source}: expected shard_size with shards and only there, got otherwise")
    if form.hash_type not in ALGORITHMS:
        raise Unsupported(
            f"{source}: hash_type: expected one of {', '.join(ALGORITHMS)}, got {form.hash_type[:80]!r}"
        )
    if not 0 < len(predicate.resources) <= MAX_RESOURCES:
        raise TooLarge(f"{source}: expected 1 to {MAX_RESOURCES} files, got {len(predicate.resources)}")
    if len(form.ignore_paths) > MAX_IGNORED:
        raise TooLarge(f"{source}: expected at most {MAX_IGNORED} ignore_paths, got {len(form.ignore_paths)}")
    found: dict[str, list[Piece]] = {}
    for resource in predicate.resources:
        _check_digest(resource, form.hash_type, source)
        path, piece = _piece(resource, sharded=form.method == "shards", source=source)
        found.setdefault(path, []).append(piece)
    files = {path: tuple(sorted(pieces)) for path, pieces in found.items()}
    for path, pieces in files.items():
        _check_pieces(path, pieces, form.shard_size, source)
    return Statement(form.hash_type, files, tuple(form.ignore_paths), form.allow_symlinks)


def _check_digest(resource: _Resource, hash_type: str, source: str) -> None:
    if resource.algorithm != hash_type:
        raise InvalidRequest(
            f"{source}: {resource.name[:80]!r}: expected the algorithm {hash_type}, got {resource.algorithm[:80]!r}"
        )
    if len(resource.digest) != ALGORITHMS[hash_type] or not _HEX.fullmatch(resource.digest):
        raise InvalidRequest(
            f"{source}: {resource.name[:80]!r}: expected {ALGORITHMS[hash_type]} hex digits, "
            f"got {resource.digest[:80]!r}"
        )


def _piece(resource: _Resource, *, sharded: bool, source: str) -> tuple[str, Piece]:
    if not sharded:
        return _path(resource.name, source), Piece(0, None, resource.digest)
    match = _SHARD.fullmatch(resource.name)
    if match is None:
        raise InvalidRequest(f"{source}: expected PATH:START:STOP of a shard, got {resource.name[:80]!r}")
    return _path(match[1], source), Piece(int(match[2]), int(match[3]), resource.digest)


def _path(name: str, source: str) -> str:
    parts = name.split("/")
    if len(name.encode()) > MAX_NAME_BYTES or {"", ".", ".."} & set(parts) or "\0" in name:
        raise InvalidRequest(
            f"{source}: expected a path below the model's root, of at most {MAX_NAME_BYTES} bytes, "
            f"got {name[:80]!r}"
        )
    return name


def _check_pieces(path: str, pieces: tuple[Piece, ...], shard_bytes: int | None, source: str) -> None:
    """A file stands once; as shards, they follow each other, and all but the last have their full length."""
    if shard_bytes is None:
        if len(pieces) > 1:
            raise InvalidRequest(f"{source}: expected {path[:80]!r} once, got it {len(pieces)} times")
        return
    for number, piece in enumerate(pieces):
        length = (piece.stop or 0) - piece.start
        last = number == len(pieces) - 1
        if (
            piece.start != number * shard_bytes
            or not 0 < length <= shard_bytes
            or length < shard_bytes * (not last)
        ):
            raise InvalidRequest(
                f"{source}: expected {path[:80]!r} in shards of {shard_bytes} bytes, "
                f"got one from {piece.start} to {piece.stop}"
            )


def _decode(data: bytes | msgspec.Raw, kind: type[_Document], expected: str) -> _Document:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{expected}, got something else: {error}") from error
    except RecursionError as error:  # how deep it may nest is msgspec's ceiling
        raise InvalidRequest(f"{expected}, got something that nests too deep") from error


def _base64(text: str, what: str) -> bytes:
    try:
        return binascii.a2b_base64(text.translate(_URL_SAFE).encode("ascii"), strict_mode=True)
    except ValueError as error:  # binascii.Error is one
        raise InvalidRequest(f"{what}: expected base64, got {text[:20]!r}: {error}") from error
