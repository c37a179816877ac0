"""The files beside a model that hold its values (ONNX: external data), on their way to ONNX Runtime.

Does: say which descriptor is which file, map them while sessions are built.
Leaves out: which names a model may use (providers.modelfile), whether the bytes are the signed ones (store.blobs).

Rules
 * ONNX Runtime is given memory, never a path: what it reads are the sealed bytes whose digest was checked, and a
   session that was loaded from a descriptor finds no other file.
 * A session copies what it needs while it is built. So the maps end when the last session of a worker is there, and
   with them the sealed copies: a model takes then what it would take as one file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, NamedTuple

from skerry.errors import ExecutionFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Name -> content, for as long as `mapped` says.
Maps = dict[str, mmap.mmap]


class SideFile(NamedTuple):
    """A sealed copy of a file beside a model; whoever has it closes `fd`."""

    name: str
    fd: int


@contextlib.contextmanager
def mapped(names: Sequence[str], descriptors: Sequence[int]) -> Iterator[Maps]:
    """The files' content for the time of the block; the descriptors are borrowed.

    Raises:
        ExecutionFailed: some descriptors are missing: this process has no room for them.
        OSError: no memory, or an empty file.
    """
    if len(names) != len(descriptors):
        raise ExecutionFailed(
            f"side files: expected {len(names)} descriptors, got {len(descriptors)}",
            "the process may not open more; raise the limit of open files",
        )
    with contextlib.ExitStack() as maps:
        yield {
            name: maps.enter_context(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
            for name, fd in zip(names, descriptors, strict=True)
        }


def size_bytes(descriptors: Sequence[int]) -> int:
    """Of all these files together."""
    return sum(os.fstat(fd).st_size for fd in descriptors)
