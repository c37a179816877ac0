"""A manifest as its author writes it, in YAML -> skerry.manifest.Manifest.

Rules
 * An unknown key is an error that names file, line and the nearest real key.
 * Everything that a node would only find out when it loads the model is checked here, before it is signed.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

import msgspec

from agent import yamltree
from skerry.errors import ConfigError, SkerryError
from skerry.manifest import Batching, Cache, Limits, Manifest, Sample, Variant
from skerry.terms import check_model_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.yamltree import Node

#: Key of a nested block -> its shape, to name the nearest key.
_BLOCKS: dict[str, type[msgspec.Struct]] = {
    "": Manifest,
    "batching": Batching,
    "cache": Cache,
    "limits": Limits,
    "variants": Variant,
    "warmup": Sample,
    "golden": Sample,
}
_UNKNOWN_FIELD = re.compile(r"unknown field `(.+?)`")
_PLACE = re.compile(r" - at `(?:key in )?\$(.*)`$")


def read(path: Path, base: Manifest | None = None) -> Manifest:
    """The manifest in `path`; what it does not say is as in `base`.

    Raises:
        ConfigError: unreadable, not YAML, an unknown key, a wrong type or a value that no node accepts.
    """
    if not path.exists():
        raise ConfigError(f"{path}: expected a manifest, got no such file")
    root = yamltree.read(path)
    if root is None:
        return base or Manifest()
    written = root.plain()
    if base is not None and isinstance(written, dict):
        written = msgspec.to_builtins(base) | written
    try:
        manifest = msgspec.convert(written, Manifest)
    except msgspec.ValidationError as error:
        raise _explain(str(error), root, path) from None
    _check_values(manifest, root, path)
    return manifest


def _explain(text: str, root: Node, path: Path) -> ConfigError:
    """What msgspec says, 'Expected `int`, got `str` - at `$.cache.ttl`' -> file, line, key."""
    place = _PLACE.search(text)
    keys = re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", place[1]) if place else []
    names = [name for name, _ in keys if name]
    unknown = _UNKNOWN_FIELD.search(text)
    if unknown:
        known = _BLOCKS[names[-1] if names else ""].__struct_fields__
        near = difflib.get_close_matches(unknown[1], known, n=1)
        dotted = ".".join([*names, unknown[1]])
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return ConfigError(f"{path}:{_line(root, [*names, unknown[1]])}: unknown key '{dotted}'", hint)
    message = text.partition(" - at ")[0].replace("`", "")
    return ConfigError(f"{path}:{_line(root, names)}: {'.'.join(names) or 'manifest'}: {message}")


def _line(node: Node, names: list[str]) -> int:
    """The line of a key; inside lists, of the first item that has it."""
    for name in names:
        candidates = node.value if isinstance(node.value, list) else [node]
        found = [
            item.value[name] for item in candidates if isinstance(item.value, dict) and name in item.value
        ]
        if not found:
            break
        node = found[0]
    return node.line


def _check_values(manifest: Manifest, root: Node, path: Path) -> None:
    from providers.ranking import check_policy  # noqa: PLC0415 - only where a manifest names one

    checks: dict[str, Callable[[], object]] = {
        "cache.ttl": lambda: manifest.cache.ttl_s,
        "limits.memory": lambda: manifest.limits.memory_bytes,
        "limits.timeout": lambda: manifest.limits.timeout_s,
        "keep_alive": lambda: manifest.keep_alive_s,
        "versions": lambda: manifest.served,
        "fallback": lambda: check_model_name(manifest.fallback) if manifest.fallback else None,
        "group": lambda: check_model_name(manifest.group) if manifest.group else None,
        "policy": lambda: check_policy(manifest.policy) if manifest.policy else None,
    }
    for key, check in checks.items():
        try:
            check()
        except SkerryError as error:
            where = f"{path}:{_line(root, key.split('.'))}: {key}: "
            raise ConfigError(where + error.message.removeprefix(f"{key}: "), error.hint) from None
