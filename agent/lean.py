"""What the daemon's process does without, because it would stay in memory for good.

Does: import asyncio, uvloop, hashlib and msgspec without what they bring along and the daemon never uses; forget
modules that were needed once; have the C library keep little.
Leaves out: when that is (agent.start), what the daemon imports itself.

Rules
 * Whoever imports `ssl` or `typing_extensions` later gets the real one. What asyncio and uvloop know of TLS, and the
   digests that only OpenSSL has, are not there for the rest of this process.
 * What is left out here is optional in the library that is imported, or, where that is not so, replaced by a name.
 * Only the daemon's own process calls this.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Iterator

#: None makes an import fail, which is documented.
_ABSENT = None

# mallopt(3). glibc gives each thread an arena of its own, in which what is free is of no use to the others; the threads
# here write to databases and copy files, and wait for the interpreter's lock between two allocations anyway.
_M_ARENA_MAX, _ARENAS = -8, 1
# Otherwise the size from which memory is mapped, and so goes back when freed, grows with each that was: to 32 MiB,
# and what is kept for reuse to twice as much.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _THRESHOLD_BYTES = -3, -1, 256 * KIB


class _Names(ModuleType):
    """A module of which only names are asked: constants are 0, everything else is an exception that nobody raises."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - see above
        if name.startswith("__"):
            raise AttributeError(name)
        return 0 if name.isupper() else type(name, (Exception,), {})


def tune_allocator() -> None:
    """Have malloc keep little that is free. Before the first thread; without glibc nothing happens."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # other C libraries have no such call, and no such arenas
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)


def _has_own_digests() -> bool:
    """Whether this Python was built with digests of its own: some distributions leave all to OpenSSL."""
    found = {
        name for name in ("_md5", "_sha1", "_sha256", "_sha512", "_sha2") if importlib.util.find_spec(name)
    }
    return {"_md5", "_sha1"} <= found and ("_sha2" in found or {"_sha256", "_sha512"} <= found)


def import_libraries() -> None:
    """Import what would otherwise bring more than it needs."""
    # OpenSSL costs 5 MB, for TLS that the daemon does not speak and for digests that it computes elsewhere when they
    # are long (store.sealer). asyncio and hashlib can do without, as in a Python that was built without it; uvloop
    # only looks names up.
    absent: dict[str, ModuleType | None] = {"ssl": _ABSENT}
    if _has_own_digests():
        absent["_hashlib"] = _ABSENT
    with _standing_in(absent):
        import asyncio  # noqa: F401, PLC0415 - that is what this is for
        import hashlib  # noqa: F401, PLC0415 - likewise
    with _standing_in({"ssl": _Names("ssl")}), contextlib.suppress(ImportError):  # not on every system
        import uvloop  # noqa: F401, PLC0415 - likewise
    # msgspec imports typing_extensions where some other package has brought it, and needs nothing of it that the
    # standard library has not: 3 MB and 10 ms.
    with _standing_in({"typing_extensions": _ABSENT}):
        import msgspec  # noqa: F401, PLC0415 - likewise


def import_watchdog() -> None:
    """Import what watches directories, without the archives that `shutil`, deep below it, could read: 0.3 MB."""
    with _standing_in({"bz2": _ABSENT, "lzma": _ABSENT}):
        import sync.watch  # noqa: F401, PLC0415 - that is what this is for


@contextlib.contextmanager
def reading_yaml() -> Iterator[None]:
    """Have PyYAML for the length of this block, in which a configuration is read. It costs 1 MB.

    Nothing of agent.yamltree may be kept: the next block imports it anew.
    """
    try:
        with _standing_in({"yaml._yaml": _ABSENT}):  # libyaml, which agent.yamltree does not use
            yield
    finally:
        _forget("yaml", "agent.yamltree")


def _forget(*names: str) -> None:
    """Drop these modules and those below them, so that what is allocated next gets their memory."""
    for loaded in list(sys.modules):
        if loaded in names or loaded.startswith(tuple(f"{name}." for name in names)):
            del sys.modules[loaded]
            package, _, name = loaded.rpartition(".")
            if package in sys.modules:
                vars(sys.modules[package]).pop(name, None)
    gc.collect()  # a module and its classes hold each other


@contextlib.contextmanager
def _standing_in(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """Have these modules in place of the real ones, but for those that are there already."""
    new = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(new)  # type: ignore[arg-type] # None is not among the types, though it has its meaning
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]
