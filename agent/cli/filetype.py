"""The demo's model: Magika, which tells the type of a file from its first and last bytes.

Does: get the model's files, turn a file into the model's input and its scores into a label.
Leaves out: running it; the daemon does that.

Magika (Google, Apache-2.0) is no dependency of ours: the demo takes the model out of the package if it
is installed, else out of the wheel on PyPI.

Source: https://github.com/google/magika, python/src/magika/magika.py and the model's config.min.json.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.errors import Unavailable, Untrusted
from skerry.terms import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from skerry.arrays import Array

RELEASE = "1.0.3"
MODEL = "magika/models/standard_v3_3/model.onnx"
CONFIG = "magika/models/standard_v3_3/config.min.json"
CONTENT_TYPES = "magika/config/content_types_kb.min.json"

#: What the files of this release are; anything else is refused.
DIGESTS = {
    MODEL: "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
    CONFIG: "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
    CONTENT_TYPES: "75208adba69bc0556403b62b32ef3ccf8b5ce494411780845852e52e6583a10d",
}
MAX_FILE_BYTES = 16 * MIB  # the model has 3 MB


@dataclass(frozen=True, slots=True)
class Magika:
    """The model's bytes and what its authors say of its inputs and outputs."""

    model: bytes
    config: dict[str, Any]
    text_labels: frozenset[str]

    def tokens(self, path: Path) -> Array | None:
        """A file as the model's input "bytes": int32 [1, 2048], each a byte's value or 256 for no byte.

        The first 1024 bytes after leading white space and the last 1024 before trailing white space.

        Returns: None for a file with too few bytes to tell anything.
        """
        block = self.config["block_size"]
        with path.open("rb") as file:
            head = file.read(block).lstrip()
            file.seek(max(0, path.stat().st_size - block))
            tail = file.read(block).rstrip()
        if len(head) < self.config["min_file_size_for_dl"]:
            return None
        begin_size, end_size = self.config["beg_size"], self.config["end_size"]
        tokens = np.full((1, begin_size + end_size), self.config["padding_token"], np.int32)
        head, tail = head[:begin_size], tail[-end_size:]
        tokens[0, : len(head)] = np.frombuffer(head, np.uint8)
        tokens[0, tokens.shape[1] - len(tail) :] = np.frombuffer(tail, np.uint8)
        return tokens

    def label(self, scores: Array) -> tuple[str, float]:
        """The label and its score from the model's output "target_label": float32 [1, 214].

        Below the label's own threshold only "txt" or "unknown" is said, as Magika itself does.
        """
        best = int(scores[0].argmax())
        guess, score = self.config["target_labels_space"][best], float(scores[0, best])
        label = self.config["overwrite_map"].get(guess, guess)
        if score >= self.config["thresholds"].get(guess, self.config["medium_confidence_threshold"]):
            return label, score
        return ("txt" if label in self.text_labels else "unknown"), score


def load(cache: Path, say: Callable[[str], None]) -> Magika:
    """The model from the installed package, else from PyPI.

    Args:
        cache: where a downloaded wheel is kept for the next time.
        say: is told what takes a while.

    Raises:
        Unavailable: neither is to be had.
        Untrusted: a file is not the one this release is known by.
    """
    package = importlib.util.find_spec("magika")
    if package is not None and package.origin is not None:
        site = Path(package.origin).parents[1]
        say(f"Magika's model from the installed package, {site / 'magika'}")
        files = {name: _read_file(site / name) for name in DIGESTS}
    else:
        wheel = _download(cache, say)
        with zipfile.ZipFile(wheel) as archive:
            files = {name: _read_member(archive, name) for name in DIGESTS}
    for name, data in files.items():
        _check(name, data)
    kinds = json.loads(files[CONTENT_TYPES])
    return Magika(
        model=files[MODEL],
        config=json.loads(files[CONFIG]),
        text_labels=frozenset(name for name, kind in kinds.items() if kind["is_text"]),
    )


def _download(cache: Path, say: Callable[[str], None]) -> Path:
    pattern = f"magika-{RELEASE}-*.whl"
    if not any(cache.glob(pattern)):
        say(f"Magika {RELEASE} from PyPI into {cache} (16 MB, once)")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--only-binary=:all:", f"magika=={RELEASE}", "-d", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise Unavailable(
                f"demo: expected pip to download magika {RELEASE}, got: {lines[-1]}",
                f"with a link: `{sys.executable} -m pip install magika=={RELEASE}`, then try again",
            )
    return next(cache.glob(pattern))


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Unavailable(
            f"demo: {path}: {error.strerror}",
            f"the demo knows magika {RELEASE}; another release is installed",
        ) from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        return member.read(MAX_FILE_BYTES + 1)


def _check(name: str, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != DIGESTS[name]:
        raise Untrusted(
            f"demo: {name}: expected sha256:{DIGESTS[name]}, got sha256:{found}",
            f"the demo knows magika {RELEASE}; another release is installed or the download is damaged",
        )
