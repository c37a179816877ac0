"""What the registry holds, as the verifying child tells the daemon: one JSON document.

Does: its types, writing it, reading it.
Leaves out: how it came about (store.registry, store.verify). Imports no tuf: the daemon reads this.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

from skerry import errors
from skerry.manifest import Manifest  # noqa: TC001 - msgspec resolves it when it decodes
from skerry.terms import MIB

MAX_LISTING_BYTES = 64 * MIB  # four times the largest signed targets file


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who made a model, as it was verified when it was admitted.

    Attributes:
        method: "key" or "certificate".
        signer: the key's fingerprint, sha256:<hex>, or the subject of the certificate.
        bundle: digest of the file with the signature.
        files: how many files were signed together.
        model: the model's digest as it was signed, with its algorithm; empty if it was signed in pieces.
    """

    method: str
    signer: str
    bundle: str
    files: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    model: str = ""


class SideFile(msgspec.Struct, frozen=True):
    """A file beside a model that holds values of it (ONNX: external data), named by the same signed metadata."""

    name: str
    digest: str
    size_bytes: int


class Entry(msgspec.Struct, frozen=True):
    """One version of a model that signed metadata names.

    `digest` and `size_bytes` are those of the model file, `files` what lies beside it, by name. `installed`: blobs of
    the right names and lengths are there; their bytes are checked when they are loaded. `fault`: why it is not
    installed, as store.blobs has it: MISSING or TAMPERED; empty if it is. `release` counts what was signed under this
    name. `role` is who signed it.
    """

    name: str
    version: int
    digest: str
    size_bytes: int
    manifest: Manifest
    installed: bool
    files: tuple[SideFile, ...] = ()
    fault: str = ""
    release: int = 1
    role: str = ""
    provenance: Provenance | None = None

    @property
    def contents(self) -> tuple[tuple[str, int], ...]:
        """Digest and length of every blob of it, each once; the model's own comes first."""
        files = ((file.digest, file.size_bytes) for file in self.files)
        return tuple(dict.fromkeys([(self.digest, self.size_bytes), *files]))

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return self.size_bytes + sum(file.size_bytes for file in self.files)

    @property
    def content_digest(self) -> str:
        """What stands for all bytes of the version: two models may differ in a file beside them alone."""
        if not self.files:
            return self.digest
        named = [[file.name, file.digest] for file in self.files]
        return f"sha256:{hashlib.sha256(msgspec.json.encode([self.digest, named])).hexdigest()}"

    def is_as(self, other: Entry) -> bool:
        """Whether both are the same model, whatever lies on the disk, and whoever signed it for which time."""
        return (self.name, self.version, self.content_digest, self.manifest) == (
            other.name,
            other.version,
            other.content_digest,
            other.manifest,
        )


class Listing(msgspec.Struct, frozen=True):
    """A verified look at the registry.

    `revision` is the version of the signed timestamp, 0 for an empty registry. `owner`: this node holds
    the key that signs. `problems` are sentences about what was left out, and why. `expires_unix`: when the first of the
    signed files is no longer fresh, 0 for an empty registry. `pinned` is the digest of the root that is trusted.
    """

    revision: int
    owner: bool
    expires_unix: float = 0
    entries: tuple[Entry, ...] = ()
    problems: tuple[str, ...] = ()
    pinned: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """Why there is no listing: the text, the hint and the class name of a SkerryError."""

    error: str
    hint: str = ""
    kind: str = "InternalError"


def encode(document: Listing | Refusal) -> bytes:
    """The document as JSON."""
    if isinstance(document, Listing):
        document = msgspec.structs.replace(document, problems=tuple(map(_text, document.problems)))
    return msgspec.json.encode(document)


def refusal(error: errors.SkerryError) -> Refusal:
    """The document that stands for `error`, under the name of its nearest public class."""
    public = next(kind for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind)
    return Refusal(_text(error.message), _text(error.hint), public.__name__)


def parse(data: bytes) -> Listing:
    """Read what `python -m store.verify` printed.

    Raises:
        SkerryError: the refusal it printed, as the class that it was.
        InternalError: it printed anything else.
    """
    if len(data) > MAX_LISTING_BYTES:
        raise errors.InternalError(
            f"registry listing: expected at most {MAX_LISTING_BYTES} bytes, got {len(data)}"
        )
    try:
        if b'"error"' in data[:16]:
            raise _error(msgspec.json.decode(data, type=Refusal))
        return msgspec.json.decode(data, type=Listing)
    except (msgspec.DecodeError, RecursionError) as error:
        raise errors.InternalError(f"registry listing: expected JSON, got {data[:200]!r}") from error


def _text(message: str) -> str:
    """`message` as JSON can carry it: the name of a file or of a target need not be UTF-8."""
    return message.encode("utf-8", "backslashreplace").decode()


def _error(document: Refusal) -> errors.SkerryError:
    kind = getattr(errors, document.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.SkerryError)):
        kind = errors.InternalError
    return kind(document.error, document.hint)
