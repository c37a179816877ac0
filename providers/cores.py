"""Which distribution provides `onnxruntime`, without importing it.

Does: find the installed cores and insist on exactly one.
Leaves out: what the core can do (providers.discovery).

Rules
 * Two cores in one environment overwrite each other's files, and `pip check` finds that fine: refuse it.
 * Only the cores of the catalogue are asked for: one lookup each, where scanning the metadata of every
   installed distribution takes 50 ms of a start that has 600.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import NamedTuple

from providers.catalog import CORES
from skerry.errors import ConfigError

MODULE = "onnxruntime"


class Core(NamedTuple):
    """The one distribution that provides onnxruntime."""

    distribution: str
    version: str


def installed_cores() -> list[Core]:
    """Installed distributions that ship the `onnxruntime` module, in the catalogue's order."""
    found = []
    for name in CORES:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _ships_module(distribution):
            found.append(Core(name, distribution.version))
    return found


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


def _ships_module(distribution: importlib.metadata.Distribution) -> bool:
    # onnxruntime-qnn was a core before 2.0 and is a plugin without the module since. A record that is
    # missing altogether (Debian's, for one) proves nothing, so the name decides.
    record = distribution.read_text("RECORD")
    if record is None:
        return True
    return any(line.startswith(f"{MODULE}/__init__.py,") for line in record.splitlines())


def _extra(names: list[str]) -> str:
    # Whoever installed an accelerated core wanted it; the plain one usually came along as a dependency.
    extras = [CORES[name] for name in names if CORES[name]]
    return next((extra for extra in extras if extra != "cpu"), "cpu")
