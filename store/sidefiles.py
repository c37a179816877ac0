"""The files beside a model, as signed metadata names them.

Does: their target paths; read them with their model's target; make both.
Leaves out: the model itself (store.targets), which names a model may use (skerry.terms).

Each is a target of its own, at `models/NAME/VERSION/FILE`. The custom part of the model's target names them all, as
"files": {FILE: "sha256:<hex>"}.

Rules
 * A model's files are exactly those that its target names, each signed by the same role with the same digest. Where one
   is missing, or is another, the version is not there: half a model is none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import InvalidRequest, TooLarge, Untrusted
from skerry.terms import check_file_names
from store.blobs import MAX_BLOB_BYTES, Content
from store.listing import SideFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from store.listing import Entry

_PATH = re.compile(r"models/([^/]+)/([0-9]+)/([^/]+)")
_CUSTOM = "files"


def path_of(name: str, version: int, file: str) -> str:
    """The target path of a file beside a model's version."""
    return f"models/{name}/{version}/{file}"


def paths_of(entry: Entry) -> list[str]:
    """The target paths of all files beside this version."""
    return [path_of(entry.name, entry.version, file.name) for file in entry.files]


def is_path(path: str) -> bool:
    """Whether a target of this path is a file beside a model."""
    return _PATH.fullmatch(path) is not None


def check_named(path: str, signed: Mapping[str, TargetFile]) -> None:
    """Refuse a file that no model's target of the same role names.

    Args:
        path: of the file's target.
        signed: what the role has signed: target path -> target.

    Raises:
        InvalidRequest: it is one.
    """
    folder, _, file = path.rpartition("/")
    model = signed.get(f"{folder}.onnx")
    if model is None or file not in _named(model):
        raise InvalidRequest(f"expected {folder}.onnx, signed by the same role, to name it; it does not")


def read(
    name: str, version: int, model: TargetFile, signed: Mapping[str, TargetFile]
) -> tuple[SideFile, ...]:
    """The files that a model's verified target names.

    Args:
        name: the model's.
        version: likewise.
        model: its target.
        signed: what the same role has signed: target path -> target.

    Raises:
        InvalidRequest: names or digests that are none.
        TooLarge: too many files, or too large ones.
        Untrusted: one is not signed, or with another digest.
    """
    named = _named(model)
    check_file_names(named)
    files = tuple(_read_one(name, version, file, digest, signed) for file, digest in sorted(named.items()))
    check_total(file.size_bytes for file in files)
    return files


def check_total(sizes: Iterable[int]) -> None:
    """Refuse files that are too large together.

    Raises:
        TooLarge: they are.
    """
    total = sum(sizes)
    if total > MAX_BLOB_BYTES:
        raise TooLarge(f"side files: expected at most {MAX_BLOB_BYTES} bytes in all, got {total}")


def make(name: str, version: int, files: Mapping[str, Content]) -> dict[str, TargetFile]:
    """The targets that stand for `files` beside this version: target path -> target."""
    made = {}
    for file, content in files.items():
        path = path_of(name, version, file)
        made[path] = TargetFile(content.size_bytes, {"sha256": content.digest.removeprefix("sha256:")}, path)
    return made


def custom(files: Mapping[str, Content]) -> dict[str, dict[str, str]]:
    """What the custom part of the model's target has for these files."""
    return {_CUSTOM: {file: files[file].digest for file in sorted(files)}} if files else {}


def named_by(target: TargetFile) -> object:
    """What a model's target says of its files, to be compared; None: there are none."""
    custom = target.custom
    return custom.get(_CUSTOM) if isinstance(custom, dict) else None


def _named(model: TargetFile) -> dict[str, str]:
    named = named_by(model)
    if named is None:
        return {}
    if not isinstance(named, dict) or not all(isinstance(digest, str) for digest in named.values()):
        raise InvalidRequest(f"side files: expected names with digests, got {named!r}"[:200])
    return named


def _read_one(name: str, version: int, file: str, digest: str, signed: Mapping[str, TargetFile]) -> SideFile:
    target = signed.get(path_of(name, version, file))
    if target is None:
        raise Untrusted(
            f"side file {file!r}: expected it signed by the same role, as a target of its own, got none"
        )
    found = f"sha256:{target.hashes.get('sha256')}"
    if found != digest:
        raise Untrusted(f"side file {file!r}: expected {digest}, as its model says, got {found} signed")
    if not 0 < target.length <= MAX_BLOB_BYTES:
        raise TooLarge(f"side file {file!r}: expected 1 to {MAX_BLOB_BYTES} bytes, got {target.length}")
    return SideFile(file, digest, target.length)
