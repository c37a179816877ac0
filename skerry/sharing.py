"""Which tensors of a request travel through shared memory, and which through the socket.

Does: find or make room for large inputs, offer room for the outputs that the last answer had, and take the answer's
arrays from there.
Leaves out: the memory itself (skerry.regions), telling the daemon (the clients).

Rules
 * Only tensors from SHARE_BYTES on: for smaller ones the socket is quicker.
 * An input that already lies in a region (`Client.array`, or an answer) is used where it lies.
 * Room for outputs is offered once their sizes are known, that is from the second request of a kind on. BYTES
   outputs go through the socket. If outputs outgrow their room, the request is put again without any, once:
   the answer was refused, so nobody has it.
 * A daemon that takes no regions costs one attempt; from then on everything goes through the socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from skerry.errors import Denied, InvalidRequest, NotFound, Overloaded, Unsupported
from skerry.plans import Place, Places
from skerry.regions import Regions
from skerry.terms import KIB, element_count

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from skerry.arrays import Array
    from skerry.plans import Plan, Question
    from skerry.regions import Lease, Region
    from skerry.results import Result

SHARE_BYTES = 64 * KIB
#: Where a tensor may begin; what vector instructions and the daemon's workers like.
ALIGNMENT = 64

#: After these the daemon certainly does not write into what it was lent.
_HARMLESS = (InvalidRequest, NotFound, Denied, Unsupported, Overloaded)


class Sharing:
    """The shared memory of one client.

    Args:
        reader_uid: says which user the daemon runs as, None if not known; asked when memory is made.

    Attributes:
        active: whether it is used.
        reason: why not.
        renewed: how often the daemon had forgotten regions and was told again.
        regions: the memory.
    """

    def __init__(self, reader_uid: Callable[[], int | None]) -> None:
        self.active = True
        self.reason = ""
        self.renewed = 0
        self.regions = Regions(reader_uid)

    def give_up(self, reason: str) -> list[str]:
        """The daemon takes no regions: use the socket from now on. Returns those that it did take."""
        self.active = False
        self.reason = reason
        return self.regions.close()

    def array(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Zeros in shared memory; in ordinary memory where there is no room for them.

        Raises:
            InvalidRequest: a dtype whose elements lie elsewhere.
        """
        wanted = np.dtype(dtype)
        if wanted.hasobject:
            raise InvalidRequest(f"array: expected a dtype of fixed size, got {wanted}")
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        size_bytes = element_count(sizes) * wanted.itemsize
        lease = self.regions.take(size_bytes) if self.active and size_bytes else None
        if lease is None:
            return np.zeros(sizes, wanted)
        memory = np.asarray(lease)[:size_bytes]
        memory.fill(0)
        return memory.view(wanted).reshape(sizes)

    def arrange(self, asked: Question, plan: Plan) -> Arrangement | None:
        """Room for the large tensors of `asked`; None if it has none, or there is none."""
        outputs = plan.learned or ()
        if max(plan.sizes, default=0) < SHARE_BYTES and not any(size >= SHARE_BYTES for _, size in outputs):
            return None
        arrangement = Arrangement(self.regions, asked, plan)
        return arrangement if arrangement.regions else None

    def learn(self, plan: Plan, result: Result) -> None:
        """Remember how large the outputs of an answer through the socket were."""
        if plan.learned is None:
            plan.learned = tuple(
                (name, 0 if result.datatypes[name] == "BYTES" else array.nbytes)
                for name, array in result.outputs.items()
            )


class Arrangement:
    """Where the tensors of one request lie while it is carried out. A context: leaving it settles the memory.

    Attributes:
        places: for the plan.
        regions: those that the daemon has to know.
    """

    def __init__(self, regions: Regions, asked: Question, plan: Plan) -> None:
        self.regions: list[Region] = []
        self._plan = plan
        self._scratch: Lease | None = None  # copies of inputs; given back when this object goes
        self._outputs: Lease | None = None
        inputs = self._place_inputs(regions, asked, plan)
        self.places = Places(inputs, self._place_outputs(regions, plan.learned or ()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._outputs is not None and not issubclass(kind, _HARMLESS):
            self._outputs.region.retired = True
        self._scratch = self._outputs = None

    def locate(self, output: str, size_bytes: int) -> Array | None:
        """The memory of an output, if some was offered and is large enough."""
        lease = self._outputs
        place = dict(self.places.outputs).get(output)
        if lease is None or place is None or size_bytes > place.size_bytes:
            return None
        return np.asarray(lease)[place.offset : place.offset + size_bytes]

    def without_outputs(self) -> bool:
        """Ask for the outputs through the socket, now and in future; False if that is so already."""
        if self._outputs is None:
            return False
        self._plan.learned = ()
        self.places = Places(self.places.inputs, ())
        self.regions = [region for region in self.regions if region is not self._outputs.region]
        self._outputs = None
        return True

    def _place_inputs(self, regions: Regions, asked: Question, plan: Plan) -> tuple[Place | None, ...]:
        places: list[Place | None] = [None] * len(asked.raws)
        copied: list[int] = []
        for index, size_bytes in enumerate(plan.sizes):
            raw = asked.raws[index]
            if size_bytes < SHARE_BYTES or isinstance(raw, bytes):
                continue
            found = regions.find(raw) if raw.dtype.isnative else None
            if found is None:
                copied.append(index)
            else:
                region, offset = found
                places[index] = Place(region.name, offset, size_bytes)
                self._use(region)
        lease = regions.take(sum(_aligned(plan.sizes[index]) for index in copied)) if copied else None
        if lease is not None:
            self._scratch = lease
            self._use(lease.region)
            memory, at = np.asarray(lease), 0
            for index in copied:
                size_bytes = plan.sizes[index]
                memory[at : at + size_bytes] = np.frombuffer(plan.pack(asked, index), np.uint8)
                places[index] = Place(lease.region.name, at, size_bytes)
                at += _aligned(size_bytes)
        return tuple(places) if any(places) else ()

    def _place_outputs(
        self, regions: Regions, learned: tuple[tuple[str, int], ...]
    ) -> tuple[tuple[str, Place | None], ...]:
        wanted = sum(_aligned(size_bytes) for _, size_bytes in learned if size_bytes >= SHARE_BYTES)
        lease = regions.take(wanted) if wanted else None
        if lease is None:
            return ()
        self._outputs = lease
        self._use(lease.region)
        places: list[tuple[str, Place | None]] = []
        at = 0
        for name, size_bytes in learned:
            if size_bytes < SHARE_BYTES:
                places.append((name, None))
                continue
            places.append((name, Place(lease.region.name, at, size_bytes)))
            at += _aligned(size_bytes)
        return tuple(places)

    def _use(self, region: Region) -> None:
        if region not in self.regions:
            self.regions.append(region)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
