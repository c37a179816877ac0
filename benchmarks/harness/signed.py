"""What the trust suite verifies: an owner's registry, repositories and nodes that follow them.

Does: make them with Skerry's own code, and keep what is published at a moment.
Leaves out: timing (harness.trustwork).
"""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING, NamedTuple

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # public there, without __all__

from harness.wire import BenchError
from skerry.manifest import Manifest
from store import durable, keyfiles, offices, roles, stock, targets, trust
from store.blobs import BlobStore, Content
from store.places import Places
from store.registry import Registry
from store.repository import Plan, Repository

if TYPE_CHECKING:
    from pathlib import Path

    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # likewise

TEAMS = ("audio", "text", "vision")
_ROOT_KEYS, _ROOT_THRESHOLD = 3, 2
_VERSIONS = 10  # of each name, where there are many targets


class Followed(NamedTuple):
    """A node that follows a repository, and a folder of metadata that is offered to it."""

    node: Path
    offer: Path


def registry_at(folder: Path) -> Registry:
    """A registry with everything below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Registry(Places(folder / "registry", folder / "keys", folder / "state.db", folder / "root.json"))


def owner(folder: Path, model: Path, count: int) -> Path:
    """A node that signs for itself, with `count` models; `model` begins each of them."""
    registry = registry_at(folder)
    for number in range(count):
        registry.add(_variant(folder.parent, model, number), f"model{number}")
    return folder


def teams(folder: Path, model: Path, models_each: int) -> Followed:
    """A repository with a root of two of three keys and a team per name, each with a key of its own."""
    repository = _repository(folder)
    for place, team in enumerate(TEAMS):
        _out(offices.delegate(repository, team, [f"{team}-*"], _holders(repository, [team])))
        for number in range(models_each):
            file = _variant(folder, model, place * models_each + number)
            _out(stock.add(repository, file, f"{team}-{number}")[2])
    stock.set_channel(repository, "shop", {f"{team}-0": [1] for team in TEAMS})
    return Followed(_follower(folder, repository), repository.metadata)


def many(folder: Path, count: int) -> Followed:
    """A node that has `count` targets of one role, and the next revision, in which one of them is another."""
    repository = _repository(folder)
    with repository.changing() as change:
        signed = change.edit("models").targets
        for number in range(count):
            target = _target(number)
            signed[target.path] = target
        _out(repository.settle(change))
    node = _follower(folder, repository)
    with repository.changing() as change:
        signed = change.edit("models").targets
        del signed[_target(0).path]
        signed[_target(count).path] = _target(count)
        _out(repository.settle(change))
    return Followed(node, repository.metadata)


def rotated(folder: Path, count: int) -> Followed:
    """A node that has the first root of a repository, and the metadata after `count` changes of one of its keys."""
    repository = _repository(folder)
    signers = [repository.keyring.give(str(folder / f"root{number}.pem")) for number in range(_ROOT_KEYS)]
    current = [repository.keyring.signer(named.key.keyid) for named in signers]
    chain = repository.published()
    if chain is None or None in current:
        raise BenchError(f"{folder}: expected a published repository with its keys, found none")
    node = _follower(folder, repository)
    root = chain.root
    for _ in range(count):
        new = CryptoSigner.generate_ed25519()
        following = [*current[1:], new]
        holders = roles.Holders(tuple(signer.public_key for signer in following), _ROOT_THRESHOLD)
        root = roles.next_root(root, {roles.ROOT: holders}, root.expires)
        durable.write(
            repository.metadata / f"{root.version}.root.json", roles.signed_by(root, [*current, new])
        )
        current = following
    return Followed(node, repository.metadata)


def blob(folder: Path, size_bytes: int) -> tuple[Path, Content]:
    """A store with one blob of this size."""
    seed = hashlib.shake_128(b"bench").digest(1 << 20)
    whole, rest = divmod(size_bytes, len(seed))
    content = BlobStore(folder).ingest([*[seed] * whole, seed[:rest]])
    return folder, content


def _repository(folder: Path) -> Repository:
    repository = Repository(folder / "repository")
    root = _holders(repository, [f"root{number}" for number in range(_ROOT_KEYS)], _ROOT_THRESHOLD)
    others = [_holders(repository, [name]) for name in ("targets", "online", "models", "channels")]
    _out(repository.init(Plan(root, *others)))
    return repository


def _holders(repository: Repository, names: list[str], threshold: int = 1) -> roles.Holders:
    keys = []
    for name in names:
        file = repository.folder.parent / f"{name}.pem"
        keyfiles.make(file)
        keys.append(repository.keyring.give(str(file)).key)
    return roles.Holders(tuple(keys), threshold)


def _out(outcome: object) -> None:
    waiting = getattr(outcome, "waiting", None)
    if waiting:
        raise BenchError(f"repository: expected every signature at hand, got {waiting}")


def _follower(folder: Path, repository: Repository) -> Path:
    """A node that has admitted what is published."""
    node = folder / "node"
    registry = registry_at(node)
    root = durable.read(repository.metadata / "1.root.json", trust.MAX_ROOT_BYTES)
    registry.init_follower(root or b"")
    source = trust.Source("repository", lambda name, limit: durable.read(repository.metadata / name, limit))
    offer = registry.metadata.judge(source)
    registry.metadata.admit(offer, targets.lowest_releases(offer.trusted), [])
    return node


def _target(number: int) -> TargetFile:
    name, version = f"model-{number // _VERSIONS:04}", 1 + number % _VERSIONS
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return targets.make(Content(f"sha256:{digest}", 1_000_000), Manifest(name=name, version=version), version)


def _variant(folder: Path, model: Path, number: int) -> Path:
    """Other bytes, so that no two models share a blob; only signatures are looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "variant.onnx"
    shutil.copyfile(model, file)
    with file.open("ab") as end:
        end.write(number.to_bytes(16, "little"))
    return file
