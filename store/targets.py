"""What a signed target says: which model and version it is, which bytes, which manifest.

Does: translate between TUF targets and entries of the registry, both ways, with ceilings.
Leaves out: who signed (store.trust) and where the bytes are (store.blobs).

A target's path is `models/NAME/VERSION.onnx`; files beside the model have targets of their own (store.sidefiles). Its
custom part holds the manifest as JSON text: TUF signs canonical JSON, which has no fractions, and samples and
tolerances are made of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import InvalidRequest, NotFound, SkerryError, TooLarge, Unsupported
from skerry.manifest import Manifest
from skerry.terms import MIB, check_model_name, parse_version
from store import sidefiles
from store.blobs import MAX_BLOB_BYTES, BlobStore, Content
from store.listing import Entry

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_MANIFEST_BYTES = MIB

_PATH = re.compile(r"models/([^/]+)/([0-9]+)\.onnx")


def path_of(name: str, version: int) -> str:
    """The target path of a model's version."""
    return f"models/{name}/{version}.onnx"


def read_all(targets: Mapping[str, TargetFile], blobs: BlobStore) -> tuple[list[Entry], list[str]]:
    """What verified targets say: entries by name and version, and sentences about what is not understood."""
    entries: list[Entry] = []
    problems: list[str] = []
    for path, target in targets.items():
        try:
            if sidefiles.is_path(path):
                sidefiles.check_named(path, targets, sidefiles.model_path_of(path))
            else:
                entries.append(read(path, target, targets, blobs))
        except (SkerryError, msgspec.MsgspecError, KeyError, TypeError) as error:
            problems.append(f"{path}: signed, but not understood: {error}")
    return sorted(entries, key=lambda entry: (entry.name, entry.version)), sorted(problems)


def read(path: str, target: TargetFile, signed: Mapping[str, TargetFile], blobs: BlobStore) -> Entry:
    """One verified target as an entry; `signed` is what its role has signed, itself among it.

    Raises:
        SkerryError, msgspec.MsgspecError, KeyError, TypeError: it is not one of ours, or a newer kind.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise InvalidRequest("expected a path models/NAME/VERSION.onnx")
    name, version = check_model_name(match[1]), parse_version(match[2])
    if not 0 < target.length <= MAX_BLOB_BYTES:
        raise TooLarge(f"expected 1 to {MAX_BLOB_BYTES} bytes, got {target.length}")
    digest = f"sha256:{target.hashes['sha256']}"
    blobs.path(digest)  # raises if it is no digest
    manifest = msgspec.json.decode(target.custom["manifest"], type=Manifest)
    manifest.check()
    files = sidefiles.read(name, version, target, signed)
    for file in files:
        blobs.path(file.digest)
    installed = blobs.has(digest, target.length) and all(blobs.has(f.digest, f.size_bytes) for f in files)
    return Entry(name, version, digest, target.length, manifest, installed, files)


def make(content: Content, manifest: Manifest, files: Mapping[str, Content] | None = None) -> TargetFile:
    """The target that stands for `content` as the manifest's name and version; it names the `files` beside it."""
    custom = {"manifest": msgspec.json.encode(manifest).decode(), **sidefiles.custom(files or {})}
    hashes = {"sha256": content.digest.removeprefix("sha256:")}
    path = path_of(manifest.name, manifest.version)
    return TargetFile(content.size_bytes, hashes, path, {"custom": custom})


def complete(manifest: Manifest, name: str, version: int | None) -> Manifest:
    """The manifest with its name and, where that is known, its version.

    Raises:
        InvalidRequest: it contradicts them, or holds values that JSON cannot carry.
        Unsupported: it has variants.
    """
    check_model_name(name)
    if manifest.name not in {"", name}:
        raise InvalidRequest(f"manifest: expected the name {name!r}, got {manifest.name!r}")
    if version is not None and manifest.version not in {0, version}:
        raise InvalidRequest(f"manifest: expected version {version}, got {manifest.version}")
    if version is not None:
        parse_version(str(version))
    if manifest.variants:
        raise Unsupported(
            "manifest: expected no variants, got some", "add each file as a model of its own name"
        )
    full = msgspec.structs.replace(manifest, name=name, version=version or manifest.version)
    data = msgspec.json.encode(full)
    if len(data) > MAX_MANIFEST_BYTES:
        raise TooLarge(f"manifest: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
    if msgspec.json.decode(data, type=Manifest) != full:
        raise InvalidRequest(
            "manifest: expected values that JSON can carry, got others", "NaN and inf it cannot"
        )
    return full


def require_same(signed: TargetFile, offered: TargetFile) -> None:
    """Refuse to give a signed version other bytes or another manifest.

    Raises:
        InvalidRequest: they differ.
    """
    for what, expected, got in (
        ("file", _digest(signed), _digest(offered)),
        ("side files", sidefiles.named_by(signed), sidefiles.named_by(offered)),
        ("manifest", signed.custom, offered.custom),
    ):
        if expected != got:
            raise InvalidRequest(
                f"{signed.path} exists: expected the {what} {expected}, got {got}",
                "a version never changes; add it as the next version",
            )


def _digest(target: TargetFile) -> str:
    return f"sha256:{target.hashes.get('sha256')}"


def refuse_other_case(entries: list[Entry], name: str) -> None:
    """Refuse a name that differs from one in `entries` only in upper and lower case.

    Raises:
        InvalidRequest: it does.
    """
    for entry in entries:
        if entry.name != name and entry.name.lower() == name.lower():
            raise InvalidRequest(
                f"model name: expected {entry.name!r}, which exists, or a different word, got {name!r}",
                "names that differ only in upper and lower case are too easily mistaken",
            )


def matching(entries: list[Entry], name: str, version: int | None) -> list[Entry]:
    """Entries of this name and version (None: all of them), oldest first, at least one.

    Raises:
        NotFound: there is none.
    """
    found = [e for e in entries if e.name == name and version in {None, e.version}]
    if not found:
        what = f"model {name}" + (f", version {version}" if version is not None else "")
        known = ", ".join(sorted({f"{e.name}/{e.version}" for e in entries})[:20]) or "none"
        raise NotFound(f"{what}: not in the registry", f"there are: {known}")
    return found
