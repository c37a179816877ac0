"""A model in a Triton repository: a directory with config.pbtxt, 1/model.onnx, 2/model.onnx and so on.

Does: find the versions, read the configuration and the files it names.
Leaves out: what the configuration means (agent.triton.mapping), the models themselves (agent.cli.admit).

Rules
 * Links are followed: who types the path may read what it leads to. But a file that config.pbtxt names has to lie
   in the directory, links followed: its content is signed and served, and a configuration may be a stranger's.
 * Everything that is read has a ceiling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.triton import fields, mapping, pbtxt, warmup
from agent.triton.keys import ModelConfig
from skerry.errors import ConfigError, InvalidRequest, NotFound, StorageFailed, Unsupported
from skerry.manifest import Manifest
from skerry.terms import MAX_VERSION, MIB
from store import durable

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from agent.triton.keys import Warmup
    from skerry.manifest import Sample
    from skerry.terms import TensorSpec

CONFIG = "config.pbtxt"
MODEL_FILE = "model.onnx"
MAX_VERSIONS = 1000
MAX_LABELS_BYTES = MIB // 2  # as much again fits into a manifest; ImageNet's have 20 KB

_VERSION = re.compile(
    r"[1-9][0-9]{0,15}"
)  # as Triton: other folders, and numbers with a leading 0, are no versions
_NAMED = 5  # how many things a message lists before it stops


@dataclass(frozen=True, slots=True)
class TritonModel:
    """What a directory says.

    Attributes:
        directory: as it was given.
        name: what Triton serves it by: the directory's name.
        config: its configuration; empty where there is no config.pbtxt.
        manifest: what that means here, without name and version.
        outcomes: what became of each key.
        versions: number -> the folder's file, ascending; the files need not be there.
    """

    directory: Path
    name: str
    config: ModelConfig
    manifest: Manifest
    outcomes: tuple[mapping.Outcome, ...]
    versions: dict[int, Path]

    def check_name(self) -> str:
        """The directory's name, which the configuration may not contradict; raises ConfigError."""
        if self.config.name not in {"", self.name}:
            raise ConfigError(
                f"{self.directory / CONFIG}: name: expected {self.name!r}, the directory's, got {self.config.name!r}",
                f"say which: --name {self.config.name}, or --name {self.name}",
            )
        return self.name

    def file(self, number: int) -> Path:
        """The model file of a version.

        Raises:
            NotFound: no such version, or no such file in its folder.
            Unsupported: it is a folder without a model in it.
        """
        path = self.versions.get(number)
        if path is None:
            raise NotFound(
                f"{self.directory}: expected version {number}, got {', '.join(map(str, self.versions))}"
            )
        with durable.reporting(f"{path}: cannot read"):
            if (path / MODEL_FILE).is_file():  # how Triton takes models with external data
                path /= MODEL_FILE
            is_folder, exists = path.is_dir(), path.exists()
            there = [] if exists else sorted(entry.name for entry in path.parent.iterdir())[:_NAMED]
        if is_folder:
            raise Unsupported(
                f"{path}: expected a file, or a folder with {MODEL_FILE} and the files beside it, got a folder without",
                f"Triton, too, looks for {path / MODEL_FILE}",
            )
        if not exists:
            raise NotFound(
                f"{path}: no such file",
                f"the folder has {', '.join(there)}; default_model_filename in {CONFIG} can name another"
                if there
                else "the folder is empty",
            )
        return path

    def check_file(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], unranked: Collection[str]
    ) -> None:
        """See agent.triton.mapping.check_file."""
        mapping.check_file(self.config, inputs, outputs, unranked)


def read(directory: Path) -> TritonModel:
    """What the directory says; the models in it are not opened.

    Raises:
        InvalidRequest: it is no model of a Triton repository.
        ConfigError: its config.pbtxt is wrong.
        Unsupported: it needs something of Triton that is not here.
        NotFound: a file that the configuration names is not there.
        StorageFailed: something cannot be read.
    """
    # A link's own name is what Triton goes by; "." and ".." have none.
    name = directory.name if directory.name not in {"", ".."} else directory.resolve().name
    path = directory / CONFIG
    files = _Files(directory)
    config, manifest = ModelConfig(), Manifest()
    outcomes: list[mapping.Outcome] = []
    with durable.reporting(f"{path}: cannot read"):
        configured = path.exists() or path.is_symlink()
    if configured:
        message = pbtxt.parse(files.read(path, pbtxt.MAX_BYTES), str(path))
        config, written = fields.read(message, ModelConfig, str(path))
        manifest, outcomes = mapping.manifest(config, written, files, str(path))
    file_name = config.default_model_filename or MODEL_FILE
    if "/" in file_name or file_name in {".", ".."}:
        raise ConfigError(f"{path}: default_model_filename: expected a file's name, got {file_name!r}")
    versions = {number: directory / str(number) / file_name for number in _version_numbers(directory)}
    return TritonModel(directory, name, config, manifest, tuple(outcomes), versions)


def _version_numbers(directory: Path) -> list[int]:
    with durable.reporting(f"{directory}: cannot read"):
        folders = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
        models = [name for name in folders if (directory / name / CONFIG).exists()]
    numbers = sorted(int(name) for name in folders if _VERSION.fullmatch(name) and int(name) <= MAX_VERSION)
    if not numbers:
        hint = f"a folder for each version, as in {directory / '1' / MODEL_FILE}"
        if models:
            hint = f"give one model of the repository, such as {directory / models[0]}"
        raise InvalidRequest(
            f"{directory}: expected numbered folders, as Triton's models have, got none", hint
        )
    if len(numbers) > MAX_VERSIONS:
        raise InvalidRequest(f"{directory}: expected at most {MAX_VERSIONS} versions, got {len(numbers)}")
    return numbers


class _Files:
    """The files beside the versions, for agent.triton.mapping."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def labels(self, name: str) -> tuple[str, ...]:
        path = self._directory / name
        data = self.read(self._inside(path), MAX_LABELS_BYTES)
        try:
            return tuple(line.strip() for line in data.decode("utf-8").splitlines())
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: expected labels in UTF-8, one to a line, got other bytes") from None

    def samples(self, entries: tuple[Warmup, ...]) -> tuple[list[Sample], list[str]]:
        folder = self._directory / "warmup"
        return warmup.samples(
            entries, lambda name: self.read(self._inside(folder / name), warmup.MAX_FILE_BYTES)
        )

    def read(self, path: Path, limit_bytes: int) -> bytes:
        """The whole of a file, links followed; a larger one is StorageFailed."""
        data = durable.read(_follow(path), limit_bytes)
        if data is None:
            raise NotFound(
                f"{path}: no such file" + ("" if path.name == CONFIG else f", and {CONFIG} names it")
            )
        return data

    def _inside(self, path: Path) -> Path:
        """`path`, if it lies in the directory when all links are followed."""
        found = _follow(path)
        if not found.is_relative_to(self._directory.resolve()):
            raise ConfigError(
                f"{path}: expected a file in {self._directory}, got one at {found}",
                "copy it there: what is in it becomes part of the manifest",
            )
        return path


def _follow(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise StorageFailed(f"{path}: cannot follow: {error}") from error
    except ValueError as error:  # a zero byte
        raise ConfigError(f"{str(path)!r}: expected the name of a file, got none: {error}") from None
