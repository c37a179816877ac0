"""Skerry with one promise of the disk broken: `python broken.py FLAW`, and then the command line's arguments, or
`write FILE` to replace a file by what stands on stdin.

A harness that finds nothing wrong with these finds nothing.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

from store import dbfile, durable


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


def _write_in_place(path: Path, data: Any, mode: int = 0o644, **_options: Any) -> None:
    """As simple as it gets: truncate, write, sync."""
    with open(path, "wb") as file:  # noqa: PTH123
        file.writelines((data,) if isinstance(data, bytes) else data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    durable._sync_dir(path.parent)


def _sync_after_rename(self: durable.Staged, path: Path, **_options: Any) -> None:
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
        case "no-commit-sync":
            dbfile.STATE = dbfile.STATE._replace(synchronous="OFF")
        case "none":
            pass
        case _:
            raise SystemExit(f"no such flaw: {flaw}")


#: Of one file that is replaced.
FILE_FLAWS = ("no-file-sync", "no-directory-sync", "in-place", "sync-after-rename")
#: Of a registry. Files under names that nothing names yet may be written in any way, as long as they are synced.
FLAWS = ("no-file-sync", "no-directory-sync", "no-commit-sync")

if __name__ == "__main__":
    break_it(sys.argv.pop(1))
    if sys.argv[1] == "write":
        durable.write(Path(sys.argv[2]), sys.stdin.buffer.read())
        sys.stdout.write("written\n")
    else:
        from agent.cli import main

        main()
