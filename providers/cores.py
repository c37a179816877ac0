"""Which distribution provides `onnxruntime`, without importing it.

Does: find the installed cores and insist on exactly one.
Leaves out: what the core can do (providers.discovery).

Rules
 * Two cores in one environment overwrite each other's files, and `pip check` finds that fine: refuse it.
 * The names of the folders that pip leaves beside the modules are enough. importlib.metadata would say the same
   and costs the daemon 2.5 MB of memory for good.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

from providers.catalog import CORES
from skerry.errors import ConfigError

MODULE = "onnxruntime"

# PEP 427: a distribution installed as NAME-VERSION.dist-info
_DIST_INFO = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info")


class Core(NamedTuple):
    """The one distribution that provides onnxruntime."""

    distribution: str
    version: str


def installed_cores() -> list[Core]:
    """Installed distributions that ship the `onnxruntime` module, in the catalogue's order."""
    found: dict[str, Core] = {}
    for entry in sys.path:
        for folder in _folders(entry):
            match = _DIST_INFO.fullmatch(folder)
            name = match["name"].lower().replace("_", "-").replace(".", "-") if match else ""
            if match and name in CORES and name not in found and _ships_module(Path(entry, folder)):
                found[name] = Core(name, match["version"])
    return [found[name] for name in CORES if name in found]


def check_core() -> Core:
    """The installed core.

    Raises:
        ConfigError: none, several, or one whose files are gone; the hint is the command that repairs it.
    """
    cores = installed_cores()
    if len(cores) > 1:
        names = [core.distribution for core in cores]
        raise ConfigError(
            f"ONNX Runtime: expected one distribution of it, got {len(cores)}: {', '.join(names)}, "
            "which overwrite each other's files",
            f"pip uninstall -y {' '.join(names)} && pip install --force-reinstall 'skerry[{_extra(names)}]'",
        )
    if not cores:
        raise ConfigError(
            "ONNX Runtime: expected one distribution of it, got none",
            "pip install 'skerry[cpu]'",
        )
    # After one of two cores was uninstalled, the folder is left behind as a namespace without code.
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        name = cores[0].distribution
        raise ConfigError(
            f"ONNX Runtime: expected the files of {name} {cores[0].version}, got none of them",
            f"pip uninstall -y {name} && pip install --force-reinstall 'skerry[{_extra([name])}]'",
        )
    return cores[0]


def _folders(entry: str) -> list[str]:
    try:
        return [path.name for path in Path(entry).iterdir()]
    except OSError:  # archives and folders that are not there are on the path as well
        return []


def _ships_module(folder: Path) -> bool:
    # onnxruntime-qnn was a core before 2.0 and is a plugin without the module since. A record that is
    # missing altogether (Debian's, for one) proves nothing, so the name decides.
    try:
        record = (folder / "RECORD").read_text(encoding="utf-8")
    except OSError:
        return True
    return any(line.startswith(f"{MODULE}/__init__.py,") for line in record.splitlines())


def _extra(names: list[str]) -> str:
    # Whoever installed an accelerated core wanted it; the plain one usually came along as a dependency.
    extras = [CORES[name] for name in names if CORES[name]]
    return next((extra for extra in extras if extra != "cpu"), "cpu")
