"""The command line with one promise of the disk left out: `python broken.py FLAW --home …`.

A harness that finds nothing wrong with these finds nothing.
"""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from store import durable

if TYPE_CHECKING:
    from pathlib import Path


class _Os:
    """Stands for `os` in store.durable."""

    def __init__(self, **instead: Any) -> None:
        self._instead = instead

    def __getattr__(self, name: str) -> Any:
        return self._instead.get(name) or getattr(os, name)


def _no_sync_of(kind: Any) -> _Os:
    def fsync(fd: int) -> None:
        if not kind(os.fstat(fd).st_mode):
            os.fsync(fd)

    return _Os(fsync=fsync)


def _write_in_place(path: Path, data: Any, mode: int = 0o644) -> None:
    """As simple as it gets: truncate, write, sync."""
    with open(path, "wb") as file:  # noqa: PTH123
        file.writelines((data,) if isinstance(data, bytes) else data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    durable._sync_dir(path.parent)


def _sync_after_rename(self: durable.Staged, path: Path) -> None:
    os.fchmod(self._fd, self._mode)
    os.replace(self._temp, path)  # noqa: PTH105
    self._committed = True
    os.fsync(self._fd)
    durable._sync_dir(path.parent)


def break_it(flaw: str) -> None:
    match flaw:
        case "no-file-sync":
            durable.os = _no_sync_of(stat.S_ISREG)
        case "no-directory-sync":
            durable.os = _no_sync_of(stat.S_ISDIR)
        case "in-place":
            durable.write = _write_in_place
        case "sync-after-rename":
            durable.Staged.commit = _sync_after_rename
        case _:
            raise SystemExit(f"no such flaw: {flaw}")


FLAWS = ("no-file-sync", "no-directory-sync", "in-place", "sync-after-rename")

if __name__ == "__main__":
    break_it(sys.argv.pop(1))
    from agent.cli import main

    main()
