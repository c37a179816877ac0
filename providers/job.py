"""One request on its way through an instance, and what requests of one kind have in common.

Leaves out: the queue and the worker (providers.instance), what the bytes mean (skerry.oip).
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from providers import wire
from skerry.terms import ITEM_SIZES, element_count

if TYPE_CHECKING:
    from skerry.errors import SkerryError
    from skerry.terms import TensorView


class ResultLayout:
    """Where the outputs of an answer lie, relative to its beginning. Compare by identity: it is interned."""

    __slots__ = ("size_bytes", "tensors")

    def __init__(self, tensors: tuple[TensorView, ...]) -> None:
        # A worker says so, and vendor code runs in workers: what lies outside is never looked at.
        for view in tensors:
            if view.offset < 0 or view.size_bytes < 0:
                raise wire.FrameError("a layout with negative offsets or sizes")
            if view.datatype not in ITEM_SIZES:
                raise wire.FrameError(f"a layout with the datatype {view.datatype!r}")
            if view.datatype != "BYTES" and view.size_bytes != (
                element_count(view.shape) * ITEM_SIZES[view.datatype]
            ):
                raise wire.FrameError("a layout with a tensor that does not fit its shape")
        self.tensors = tensors
        self.size_bytes = wire.layout_size(tensors)


class RequestLayout:
    """What requests of one kind have in common. Compare by identity: whoever makes requests keeps it.

    Attributes:
        tensors: the inputs, offsets relative to a job's `begin`.
        outputs: the outputs wanted, in order; empty: all.
    """

    __slots__ = ("_known_to", "_number", "outputs", "tensors")

    def __init__(self, tensors: tuple[TensorView, ...], outputs: tuple[str, ...]) -> None:
        self.tensors = tensors
        self.outputs = outputs
        self._known_to: object = None  # the worker that was told, and the number it was told
        self._number = 0


class Job(abc.ABC):
    """One request on its way through an instance. Its owner subclasses it and says what happens at the end.

    Attributes:
        begin: offset of the tensors in the area.
        room, room_bytes: where the outputs may go.
        deadline: on the loop's clock.
        stopped: its run was told to stop.
    """

    __slots__ = ("begin", "deadline", "layout", "room", "room_bytes", "seq", "stopped")

    layout: RequestLayout
    begin: int
    room: int
    room_bytes: int
    deadline: float
    seq: int
    stopped: bool

    @abc.abstractmethod
    def on_result(self, memory: memoryview, at: int, layout: ResultLayout, run_ns: int) -> None:
        """The outputs begin at `memory[at]`, until the block is given back. `run_ns`: time in ONNX Runtime."""

    @abc.abstractmethod
    def on_error(self, error: SkerryError) -> None:
        """There will be no outputs."""

    def on_late(self, error: SkerryError) -> None:  # noqa: B027 - most have nobody to tell
        """Its time ran out behind another one's run: whoever waits can be told. The end, and the memory, come later."""
