"""Tensors in memory that clients share: the worker's side.

Does: map regions that the daemon names, lay inputs over them, put outputs there.
Leaves out: who may use which memory (the daemon has checked that), requests (providers.runner).

Rules
 * Its owner may write there at any time, also during a run. What a kernel first checks and then uses, indices in the
   first place, is therefore copied before the run; other tensors are read where they lie, and a client that writes
   during a run spoils its own answer.
 * Its owner may cut the file under us, and then touching it is SIGBUS. The daemon knows whose doing that was.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from providers.arrays import numpy_dtype, raw_size, to_array, write_raw
from skerry.errors import ExecutionFailed, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from providers import wire
    from skerry.terms import TensorView

    Array = np.ndarray[Any, np.dtype[Any]]

_NOTHING = np.empty(0, np.uint8)
#: Kernels take these as indices, axes and shapes.
CHECKED_THEN_USED = frozenset({"INT32", "INT64"})


class Regions:
    """The regions that are mapped, by the daemon's number."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap | str] = {}
        # Weak: clients name new places again and again, and layouts come and go while a region stays.
        self._users: dict[int, weakref.WeakSet[Inputs | Outputs]] = {}

    def add(self, number: int, size_bytes: int, descriptor: int) -> None:
        """Map one; its descriptor, which is ours from here on, is -1 if it did not arrive. Never raises."""
        if descriptor < 0:
            self._maps[number] = "no descriptor is left for it"
            return
        try:
            self._maps[number] = mmap.mmap(descriptor, size_bytes)
        except (OSError, ValueError) as error:
            self._maps[number] = str(error)
        finally:
            os.close(descriptor)

    def forget(self, number: int) -> None:
        """Unmap one, once the last run over it has ended."""
        self._maps.pop(number, None)
        for user in list(self._users.pop(number, ())):
            user.release()

    def get(self, number: int, user: Inputs | Outputs | None = None) -> mmap.mmap:
        """The mapping; `user` is released when it is to be given up.

        Raises:
            InvalidRequest: it was given up.
            ExecutionFailed: it could not be mapped.
        """
        found = self._maps.get(number)
        if found is None:
            raise _gone()
        if isinstance(found, str):
            raise ExecutionFailed(
                f"shared memory: the worker could not map it: {found}",
                "what is mapped counts towards limits.memory in the model's manifest",
            )
        if user is not None:
            self._users.setdefault(number, weakref.WeakSet()).add(user)
        return found


class Inputs:
    """The inputs of one request layout that lie in regions.

    Args:
        tensors: all inputs.
        numbers: where each lies; -1: with the request.
        regions: as mapped now.
    """

    def __init__(self, tensors: Sequence[TensorView], numbers: Sequence[int], regions: Regions) -> None:
        laid: dict[str, Array] = {}
        copied: list[tuple[TensorView, mmap.mmap]] = []
        for view, number in zip(tensors, numbers, strict=True):
            if number < 0:
                continue
            memory = regions.get(number, self)
            dtype = numpy_dtype(view.datatype)
            if dtype is None or view.datatype in CHECKED_THEN_USED:
                copied.append((view, memory))
            else:
                laid[view.name] = np.ndarray(view.shape, dtype, memory, view.offset)
        # All or nothing: it may be released by one thread while another makes a run ready.
        self._held: tuple[dict[str, Array], list[tuple[TensorView, mmap.mmap]]] | None = (laid, copied)

    def add_to(self, feeds: dict[str, Array]) -> None:
        """Add them to what a run is fed with.

        Raises:
            InvalidRequest: the memory was given up.
        """
        held = self._held
        if held is None:
            raise _gone()
        laid, copied = held
        feeds.update(laid)
        for view, memory in copied:
            kept = memory[view.offset : view.offset + view.size_bytes]
            feeds[view.name] = to_array(view.datatype, view.shape, kept, 0, view.size_bytes)

    def release(self) -> None:
        """The memory is not ours any more."""
        self._held = None


class Outputs:
    """The outputs of one request layout that go to regions.

    Args:
        targets: output -> where it goes.
        regions: as mapped now.
    """

    def __init__(self, targets: Mapping[str, wire.Target], regions: Regions) -> None:
        self._names = frozenset(targets)
        self._places: dict[str, memoryview] | None = {
            name: memoryview(regions.get(target.region, self))[
                target.offset : target.offset + target.size_bytes
            ]
            for name, target in targets.items()
        }

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def take(
        self, names: Sequence[str], arrays: Sequence[Array], datatypes: Mapping[str, str]
    ) -> list[Array]:
        """Write the outputs that have a place to it; returns all of them, those replaced by empty ones.

        Raises:
            InvalidRequest: one does not fit, or the memory was given up.
        """
        places = self._places
        if places is None:
            raise _gone()
        left = []
        for name, values in zip(names, arrays, strict=True):
            place = places.get(name)
            if place is None:
                left.append(values)
                continue
            size = raw_size(values, datatypes[name])
            if size > len(place):
                raise InvalidRequest(
                    f"output {name!r}: expected at most {len(place)} bytes, the room in shared memory, got {size}"
                )
            write_raw(values, datatypes[name], place[:size])
            left.append(_NOTHING)
        return left

    def release(self) -> None:
        """The memory is not ours any more."""
        self._places = None


def _gone() -> InvalidRequest:
    return InvalidRequest(
        "shared memory: expected a region that is registered, got one that was taken back meanwhile"
    )
