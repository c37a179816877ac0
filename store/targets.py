"""What a signed target says: which model and version it is, which bytes, which manifest.

Does: translate between TUF targets and entries of the registry, both ways, with ceilings.
Leaves out: who signed (store.trust) and where the bytes are (store.blobs).

A target's path is `models/NAME/VERSION.onnx`; files beside the model have targets of their own (store.sidefiles). Its
custom part holds the manifest as JSON text: TUF signs canonical JSON, which has no fractions, and samples and
tolerances are made of them. It also holds the release, a counter per name that never repeats: what a role revokes, it
revokes below a release, so that a version can come back. It may hold the record of a verified provenance
(store.provenance).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import InvalidRequest, NotFound, SkerryError, TooLarge, Unsupported
from skerry.manifest import Manifest
from skerry.terms import MAX_VERSION, MIB, check_model_name, parse_version
from store import delegations, sidefiles
from store.blobs import MAX_BLOB_BYTES, TAMPERED, BlobStore, Content
from store.listing import Entry, Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # likewise

    from store.trust import Trusted

MAX_MANIFEST_BYTES = MIB
MAX_MANIFEST_DEPTH = (
    64  # a sample's tensor has eight dimensions at most; who reads the listing needs stack for each
)

#: In a signed role: model -> the lowest of its releases that is not revoked.
LOWEST_RELEASES = "x-skerry-min-release"

_CHANNELS = "channels/"
# What a target of a newer kind, or of a hostile signer, may raise. ValueError: text that UTF-8 cannot carry, which
# JSON can; RecursionError: values nested deeper than a thousand.
_NOT_UNDERSTOOD = (SkerryError, msgspec.MsgspecError, KeyError, TypeError, ValueError, RecursionError)

_BRACKET = re.compile(r"[\[\]{}]")
_PATH = re.compile(r"models/([^/]+)/([0-9]+)\.onnx")


def path_of(name: str, version: int) -> str:
    """The target path of a model's version."""
    return f"models/{name}/{version}.onnx"


class Reading(NamedTuple):
    """What verified targets come to: entries by name and version, and sentences about what is left out."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


def read_all(trusted: Trusted | None, blobs: BlobStore, releases: Mapping[str, int] | None = None) -> Reading:
    """The models that a verified chain names.

    Args:
        trusted: the chain, None if there is none.
        blobs: where their bytes are, if they are there.
        releases: model -> the lowest release that is not revoked, as far as this node has learned.
    """
    if trusted is None:
        return Reading((), ())
    entries: list[Entry] = []
    problems = list(trusted.problems)
    learned, said = releases or {}, lowest_releases(trusted)
    everything = delegations.everything(trusted.roles)
    signed = by_role(everything)
    for path, (target, role) in everything.items():
        if path.startswith(_CHANNELS):
            continue
        try:
            if sidefiles.is_path(path):
                sidefiles.check_named(path, signed[role])
                continue
            entry = read(path, target, role, signed[role], blobs)
        except _NOT_UNDERSTOOD as error:
            problems.append(f"{path}: signed, but not understood: {error}")
            continue
        floor = max(learned.get(entry.name, 0), said.get(entry.name, 0))
        if entry.release < floor:
            problems.append(f"{path}: revoked: expected release {floor} or later, got {entry.release}")
        else:
            entries.append(entry)
    kept = _one_of_each_case(entries, problems)
    return Reading(
        tuple(sorted(kept, key=lambda entry: (entry.name, entry.version))), tuple(sorted(problems))
    )


def by_role(everything: Mapping[str, delegations.Found]) -> dict[str, dict[str, TargetFile]]:
    """Role -> what of it counts: target path -> target."""
    signed: dict[str, dict[str, TargetFile]] = {}
    for path, (target, role) in everything.items():
        signed.setdefault(role, {})[path] = target
    return signed


def lowest_releases(trusted: Trusted) -> dict[str, int]:
    """Model -> the lowest release that is not revoked, as the roles say that may: those on the way to its signer."""
    declared = {name: _declared(role) for name, role in trusted.roles.items()}
    names = {
        name: {path.split("/")[1] for path in role.targets if path.count("/") > 1}
        for name, role in trusted.roles.items()
    }
    lowest: dict[str, int] = {}
    for model in {model for releases in declared.values() for model in releases}:
        for name, _ in delegations.visit(path_of(model, 1), delegations.among(trusted.roles)):
            lowest[model] = max(lowest.get(model, 0), declared[name].get(model, 0))
            if model in names[name]:
                break
    return {model: release for model, release in lowest.items() if release}


def _declared(role: Targets) -> dict[str, int]:
    """What a role says of releases; what it says wrongly is not said."""
    value = role.unrecognized_fields.get(LOWEST_RELEASES)
    pairs = value.items() if isinstance(value, dict) else ()
    return {model: release for model, release in pairs if _is_floor(model, release)}


def _is_floor(model: object, release: object) -> bool:
    try:
        check_model_name(str(model))
    except InvalidRequest:
        return False
    return type(release) is int and 0 < release <= MAX_VERSION


def _one_of_each_case(entries: list[Entry], problems: list[str]) -> list[Entry]:
    """Without names that differ from an earlier one only in upper and lower case: the first role's name counts."""
    spelling: dict[str, str] = {}
    kept = []
    for entry in entries:
        known = spelling.setdefault(entry.name.lower(), entry.name)
        if known == entry.name:
            kept.append(entry)
        else:
            problems.append(
                f"{path_of(entry.name, entry.version)}: expected the name {known!r} or a different word"
            )
    return kept


def read(
    path: str, target: TargetFile, role: str, signed: Mapping[str, TargetFile], blobs: BlobStore
) -> Entry:
    """One verified target as an entry, with the files beside it.

    Args:
        path: the target's.
        target: the model's.
        role: who signed it.
        signed: what counts of what this role has signed, the files beside the model among it: path -> target.
        blobs: where their bytes are, if they are there.

    Raises:
        one of _NOT_UNDERSTOOD: it is not one of ours, or a newer kind.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise InvalidRequest("expected a path models/NAME/VERSION.onnx")
    name, version = check_model_name(match[1]), parse_version(match[2])
    if path != path_of(name, version):  # 07.onnx would be another path of version 7
        raise InvalidRequest(f"expected the path {path_of(name, version)}")
    if not 0 < target.length <= MAX_BLOB_BYTES:
        raise TooLarge(f"expected 1 to {MAX_BLOB_BYTES} bytes, got {target.length}")
    digest = f"sha256:{target.hashes['sha256']}"
    blobs.path(digest)  # raises if it is no digest
    custom = _custom(target)
    text = custom["manifest"]
    if len(text) > MAX_MANIFEST_BYTES:
        raise TooLarge(f"manifest: expected at most {MAX_MANIFEST_BYTES} characters, got {len(text)}")
    if _depth(text) > MAX_MANIFEST_DEPTH:
        raise TooLarge(f"manifest: expected at most {MAX_MANIFEST_DEPTH} levels of brackets, got more")
    manifest = msgspec.json.decode(text, type=Manifest)
    manifest.check()
    release = custom.get("release", version)
    if type(release) is not int or not 0 < release <= MAX_VERSION:
        raise InvalidRequest(f"release: expected an integer from 1 to {MAX_VERSION}, got {release!r}")
    record = custom.get("provenance")
    # By way of JSON, so that what cannot be listed is refused here and costs no other entry its listing.
    provenance = None if record is None else msgspec.json.decode(msgspec.json.encode(record), type=Provenance)
    files = sidefiles.read(name, version, target, signed)
    faults = {blobs.fault(digest, target.length)}
    faults |= {blobs.fault(file.digest, file.size_bytes) for file in files}
    # Of a version with one file lost and one changed, the latter is what to be told of.
    fault = TAMPERED if TAMPERED in faults else max(faults)
    return Entry(
        name,
        version,
        digest,
        target.length,
        manifest,
        not fault,
        files=files,
        fault=fault,
        release=release,
        role=role,
        provenance=provenance,
    )


def _depth(text: str) -> int:
    """The most brackets that are open at a time, those in strings counted, too: at least the depth of the JSON."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def make(
    content: Content,
    manifest: Manifest,
    release: int,
    provenance: Provenance | None = None,
    files: Mapping[str, Content] | None = None,
) -> TargetFile:
    """The target that stands for `content` as the manifest's name and version; it names the `files` beside it."""
    custom: dict[str, Any] = {"manifest": msgspec.json.encode(manifest).decode(), "release": release}
    custom |= sidefiles.custom(files or {})
    if provenance is not None:
        custom["provenance"] = msgspec.to_builtins(provenance)
    hashes = {"sha256": content.digest.removeprefix("sha256:")}
    path = path_of(manifest.name, manifest.version)
    return TargetFile(content.size_bytes, hashes, path, {"custom": custom})


def with_release(target: TargetFile, release: int) -> TargetFile:
    """The same target, signed for another time."""
    custom = {**_custom(target), "release": release}
    return TargetFile(target.length, target.hashes, target.path, {"custom": custom})


def digest_of(target: TargetFile) -> str:
    """The target's sha256 as the registry writes it; "sha256:None" for one that has none."""
    return f"sha256:{target.hashes.get('sha256')}"


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
    was, now = _custom(signed), _custom(offered)
    for what, expected, got in (
        ("file", digest_of(signed), digest_of(offered)),
        ("side files", sidefiles.named_by(signed), sidefiles.named_by(offered)),
        ("provenance", was.get("provenance"), now.get("provenance")),
        ("manifest", was.get("manifest"), now.get("manifest")),
    ):
        if expected != got:
            raise InvalidRequest(
                f"{signed.path} exists: expected the {what} {expected}, got {got}",
                "a version never changes; add it as the next version",
            )


def _custom(target: TargetFile) -> dict[str, Any]:
    return target.custom if isinstance(target.custom, dict) else {}


def refuse_other_case(entries: Iterable[Entry], name: str) -> None:
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


def matching(entries: Sequence[Entry], name: str, version: int | None) -> list[Entry]:
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
