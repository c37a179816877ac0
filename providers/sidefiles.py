"""The files beside a model that hold its values (ONNX: external data), on their way to ONNX Runtime.

Does: say which descriptor is which file, map them while sessions are built.
Leaves out: which names a model may use (providers.modelfile), whether the bytes are the signed ones (store.blobs).

Rules
 * ONNX Runtime is given memory, never a path: what it reads are the sealed bytes whose digest was checked, and a
   session that was loaded from a descriptor finds no other file.
 * A session copies what it needs while it is built, as ONNX Runtime promises for both ways below. So the maps end when
   the last session of a worker is there, and with them the sealed copies: a model takes then what it would take as one
   file.
 * Initializers are given as arrays over the maps, which are copied once. What numpy has no type for, and constants of
   nodes, ONNX Runtime looks up in the files by itself; through that alone all would be copied twice, in three times
   the time (8 to 10 s instead of 3 for 2.5 GB).

Source: https://onnxruntime.ai/docs/api/c/struct_ort_api.html (AddExternalInitializers,
AddExternalInitializersFromFilesInMemory).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, NamedTuple

from skerry.errors import ExecutionFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from providers.modeltensor import Outside

#: Name -> content, for as long as `mapped` says.
Maps = dict[str, mmap.mmap]


class Beside(NamedTuple):
    """What lies beside a model: the files, and which initializers are where in them."""

    files: Maps
    tensors: tuple[Outside, ...]


NOTHING = Beside({}, ())


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
    maps: Maps = {}
    try:
        for name, fd in zip(names, descriptors, strict=True):
            maps[name] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        yield maps
    finally:
        for content in maps.values():
            with contextlib.suppress(BufferError):  # an exception on its way still has arrays over it
                content.close()


def size_bytes(descriptors: Sequence[int]) -> int:
    """Of all these files together."""
    return sum(os.fstat(fd).st_size for fd in descriptors)
