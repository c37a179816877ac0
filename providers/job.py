"""One request on its way through an instance, and what requests of one kind have in common.

Leaves out: the queue and the worker (providers.instance), what the bytes mean (skerry.oip).
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, NamedTuple

from providers import wire
from skerry.terms import ITEM_SIZES, element_count

if TYPE_CHECKING:
    from providers.costs import Curve
    from providers.region import Region
    from skerry.errors import SkerryError
    from skerry.terms import TensorView


class ResultLayout:
    """Where the outputs of an answer lie, relative to its beginning. Compare by identity: it is interned."""

    __slots__ = ("size_bytes", "tensors")

    def __init__(self, tensors: tuple[TensorView, ...]) -> None:
        # A worker says so, and vendor code runs in workers: what lies outside is never looked at.
        for view in tensors:
            if view.offset < wire.ELSEWHERE or view.size_bytes < 0:
                raise wire.FrameError("a layout with negative offsets or sizes")
            if view.datatype not in ITEM_SIZES:
                raise wire.FrameError(f"a layout with the datatype {view.datatype!r}")
            if view.datatype != "BYTES" and view.size_bytes != (
                element_count(view.shape) * ITEM_SIZES[view.datatype]
            ):
                raise wire.FrameError("a layout with a tensor that does not fit its shape")
        self.tensors = tensors
        self.size_bytes = wire.layout_size(tensors)


class Target(NamedTuple):
    """Where in a client's shared memory an output goes."""

    region: Region
    offset: int
    size_bytes: int


class RequestLayout:
    """What requests of one kind have in common. Compare by identity: whoever makes requests keeps it.

    Attributes:
        tensors: the inputs, offsets relative to a job's `begin`.
        outputs: the outputs wanted, in order; empty: all.
        rows: the first dimension that all inputs share; 0: they share none, or it is empty.
        fits: equal for requests that can be one run: same names, datatypes, shapes and outputs.
        regions: where each input lies: with the request (None), or there, at its offset; empty: all with it.
        targets: output -> where in shared memory it goes.
        curve: what runs of such requests cost; set by the instance.
        known_to, number: the link that was told of it, and the number it was told (providers.link).
    """

    __slots__ = (
        "curve",
        "fits",
        "known_to",
        "number",
        "outputs",
        "regions",
        "rows",
        "targets",
        "tensors",
    )

    def __init__(
        self,
        tensors: tuple[TensorView, ...],
        outputs: tuple[str, ...],
        regions: tuple[Region | None, ...] = (),
        targets: tuple[tuple[str, Target], ...] = (),
    ) -> None:
        self.tensors = tensors
        self.outputs = outputs
        self.regions = regions
        self.targets = targets
        firsts = {view.shape[0] if view.shape else 0 for view in tensors}
        # What lies in shared memory runs by itself: two such requests may be about the same bytes.
        self.rows = firsts.pop() if len(firsts) == 1 and not regions and not targets else 0
        # Strings of other lengths make another layout, which says how many bytes they take, and fit all the same.
        self.fits: object = self
        if any(view.datatype == "BYTES" for view in tensors):
            self.fits = tuple((view.name, view.datatype, view.shape) for view in tensors), outputs
        self.curve: Curve | None = None
        self.known_to: object = None
        self.number = 0


class Job(abc.ABC):
    """One request on its way through an instance. Its owner subclasses it and says what happens at the end.

    Attributes:
        begin: offset of the tensors in the area.
        room, room_bytes: where the outputs may go.
        deadline: on the loop's clock.
        owner: the uid that asks; -1: unknown. Owners share fairly.
        priority: 1 (goes first) to 16.
        seq: its number in the worker, counted in the order in which jobs were sent; 0: it waits.
        queued_s: since when it waits, on the loop's clock; only for jobs that wait.
        stopped: its run was told to stop.
    """

    __slots__ = (
        "begin",
        "deadline",
        "layout",
        "owner",
        "priority",
        "queued_s",
        "room",
        "room_bytes",
        "seq",
        "stopped",
    )

    layout: RequestLayout
    begin: int
    room: int
    room_bytes: int
    deadline: float
    owner: int
    priority: int
    seq: int
    queued_s: float
    stopped: bool

    @abc.abstractmethod
    def on_result(self, memory: memoryview, at: int, layout: ResultLayout, done: wire.Done) -> None:
        """The outputs begin at `memory[at]`, until the block is given back. `done`: what the run took."""

    @abc.abstractmethod
    def on_error(self, error: SkerryError) -> None:
        """There will be no outputs."""

    def on_late(self, error: SkerryError) -> None:  # noqa: B027 - most have nobody to tell
        """Its time ran out behind or beside others in the worker: whoever waits can be told.

        The end, and the memory, come later.
        """
