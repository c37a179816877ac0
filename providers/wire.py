"""What a worker and the daemon say to each other, byte for byte.

Does: the frames of the two pipes and the packets of the socket that join a worker to the daemon.
Leaves out: descriptors and shared memory (providers.worker on one side, providers.instance on the other).

Tensors never travel here: they lie in shared memory, and frames say where. A request and its answer are a
few integers each, because what repeats (names, datatypes, shapes) is said once as a numbered *layout*.

Two pipes, because writing and reading one costs a third of what a socket costs:

    daemon -> worker   LAYOUT    number, tensors, wanted outputs; valid until the number is used again
    daemon -> worker   RUN       any number of (seq, where, layout), each a run of its own
    daemon -> worker   ALONE     one such: nothing else waits or runs, so it may have all cores
    daemon -> worker   BATCH     several such that are one run
    worker -> daemon   LAYOUT    the same for outputs
    worker -> daemon   DONE      any number of (seq, layout, what the run took)
    worker -> daemon   ERROR     one request failed; the worker lives on
    daemon -> worker   LEND      a client's connection, whose descriptor comes through the control socket
    daemon -> worker   RECALL    give every lent connection back
    daemon -> worker   MAP       a client's shared memory, whose descriptor comes through the control socket
    daemon -> worker   UNMAP     it is not used any more
    worker -> daemon   RETURN    one lent connection, with what was read of it and not answered

A frame is a kind, its length and its content, and is never larger than the pipe, so that one write takes all
of it. A dead peer reads as the end of the file.

The control socket (SOCK_SEQPACKET) carries what comes before, must not wait, or brings a descriptor along:

    daemon -> worker   spec      once, first
    worker -> daemon   READY or FAILED
    daemon -> worker   CANCEL    read by a thread of its own while a run is in progress; a descriptor that
                                 comes along instead is that of the next LEND or MAP
    worker -> daemon   OVERSIZE  the outputs did not fit; a descriptor that holds them comes along
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from skerry.manifest import Sample  # noqa: TC001 - msgspec resolves the types of fields
from skerry.terms import ITEM_SIZES, KIB, MAX_SIDE_FILES, TensorSpec, TensorView

READY = b"+"
FAILED = b"-"

LAYOUT = 1
RUN = 2
DONE = 3
ERROR = 4
ALONE = 5
BATCH = 6
LEND = 7
RECALL = 8
RETURN = 9
MAP = 10
UNMAP = 11

#: kind, bytes that follow
FRAME = struct.Struct("<II")

#: seq, offset of the tensors, offset of the room for outputs, bytes of that room, layout
RUN_RECORD = struct.Struct("<QQQQI")
#: seq, layout, rows of the run, nanoseconds before, in and after ONNX Runtime. Of requests that were one run, the
#: first to be told has the rows; the others have 0, so that a run is counted once.
DONE_RECORD = struct.Struct("<QIIQQQ")
Done = tuple[int, int, int, int, int, int]
#: seq
CANCEL_RECORD = struct.Struct("<Q")
#: What a descriptor comes along with.
DESCRIPTOR = b"d"
#: number, bytes that may be used
MAP_RECORD = struct.Struct("<IQ")
#: number
UNMAP_RECORD = struct.Struct("<I")
#: Regions are numbered from 1; this one was given up before the worker heard of it.
NO_REGION = 0
#: Offset of a tensor that lies in a client's shared memory and not with its request or answer.
ELSEWHERE = -1
#: The seq that stands for the run on a lent connection; requests are numbered from 1.
CANCEL_LENT = 0

#: Packets stay well below the kernel's default socket buffer (208 KiB).
MAX_PACKET_BYTES = 128 * KIB
#: What a pipe is asked to hold: two RUN frames, and a layout of hundreds of tensors with long names.
PIPE_BYTES = 256 * KIB
#: What is read at once: enough for all that usually waits, and too little for malloc to ask the kernel each time.
READ_BYTES = 4 * KIB
#: Requests in one RUN frame. More only lengthens the wait for the first answer.
MAX_RUNS_PER_FRAME = 64
#: Runs at the same time in one worker; the numbers for layouts are divided among them.
MAX_RUNNERS = 64
#: Rows of one run, as in the manifest.
MAX_BATCH_ROWS = 4096
#: Numbers a side uses for layouts before it uses the oldest one again.
MAX_LAYOUTS = 512

#: daemon -> zygote: a token or a process id follows as eight bytes, little endian; with LOOK, names of plugin
#: packages follow, separated by spaces, and the descriptors are those of the answer and of what it says else
FORK = b"F"
HOST = b"H"
LOOK = b"L"
KILL = b"K"
#: that go with FORK and JOIN: control, requests, answers, area, model, and then the files beside the model; with HOST
#: goes the door
DESCRIPTORS = 5
MAX_DESCRIPTORS = DESCRIPTORS + MAX_SIDE_FILES
#: daemon -> a worker that models share, through its door: another model
JOIN = b"J"


class Started(msgspec.Struct, tag="started", frozen=True):
    """The worker that `token` asked for runs; a negative `pid` is the errno of the fork that failed."""

    token: int
    pid: int


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """A worker is gone; `status` is as in subprocess: an exit status, or a signal's negative number."""

    pid: int
    status: int


class Spec(msgspec.Struct, frozen=True):
    """What a new worker is to be."""

    model: str
    device: dict[str, Any]
    threads: int
    keep_threads: bool  # the owner chose the number; otherwise the probe decides
    memory_bytes: int
    working_directory: str
    kind: str = (
        "serve"  # or "reference": run the probe, leave its outputs in the area; or "inspect": load only
    )
    samples: tuple[Sample, ...] = ()
    reference: tuple[tuple[TensorView, ...], ...] = ()  # per sample: where the CPU provider's outputs lie
    tolerance: float = 1e-3
    runners: int = 1  # runs at the same time, at most
    max_batch: int = 1  # rows of one run at most; 1: never more; 0: as the worker thinks right
    files: tuple[str, ...] = ()  # names of the files beside the model, in the order of their descriptors


class Proof(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker found out about itself while it loaded; the raw material of the placement trail."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    threads: int = 0
    created_ms: float = 0.0
    nodes_total: int | None = None
    nodes_placed: int | None = None
    parity: dict[str, Any] | None = None
    probe_error: str = ""
    median_us: float | None = None
    p90_us: float | None = None
    runs: int = 0
    reference: tuple[tuple[TensorView, ...], ...] = ()
    runners: int = 1  # runs at the same time
    wide_threads: int = 0  # of the session for a run that is alone; 0: there is none
    wide_us: float | None = None  # what such a run takes, if that was measured
    wide_disturbed: bool = False  # while it was measured, other work had the cores
    wide_why: str = ""  # why it was not
    max_batch: int = 1  # rows of one run at most; more than 1 is proven
    batch_why: str = ""  # why not more than 1

    def __post_init__(self) -> None:
        """What the daemon relies on; msgspec makes a ValidationError of it."""
        if self.parity is not None and not {"ok", "reason"} <= self.parity.keys():
            raise ValueError("a comparison without its outcome")
        if any(spec.datatype not in ITEM_SIZES for spec in (*self.inputs, *self.outputs)):
            raise ValueError("an unknown datatype")
        if not (1 <= self.runners <= MAX_RUNNERS and 1 <= self.max_batch <= MAX_BATCH_ROWS):
            raise ValueError("runners or rows beyond all reason")
        if not 0 <= (self.median_us or 0.0) < float("inf"):
            raise ValueError("a time that is none")


class Failure(msgspec.Struct, frozen=True):
    """Why a worker could not load the model, or why one request failed."""

    message: str
    hint: str = ""
    seq: int = 0
    kind: str = "execution"  # execution | invalid | deadline


class Target(msgspec.Struct, frozen=True, array_like=True):
    """Where in a mapped region an output goes."""

    region: int
    offset: int
    size_bytes: int


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """A numbered arrangement of tensors, offsets relative to where a record says they begin.

    A request's `regions` says for each tensor in which mapped region its offset counts, -1 being none; empty: none of
    them. Its `targets` has the outputs that go to such regions. Of an answer, such outputs have the offset ELSEWHERE.
    """

    number: int
    tensors: tuple[TensorView, ...]
    outputs: tuple[str, ...] = ()  # requested outputs in order; empty: all
    regions: tuple[int, ...] = ()
    targets: dict[str, Target] = {}


class Loan(msgspec.Struct, frozen=True, array_like=True):
    """A connection that the worker is lent, and the one form of request that it may answer there.

    A request is `head`, an id of `id_bytes` printable characters, `tail` and then `inputs`; its answer is
    `answer[0]`, the same id, `answer[1]` and then `outputs`. Offsets count from the end of the tail, and of
    `answer[1]`. `board` is where in the area the worker keeps account (providers.board), `rows` what
    a request counts there.
    """

    board: int
    slot: int
    rows: int
    head: bytes
    id_bytes: int
    tail: bytes
    inputs: tuple[TensorView, ...]
    answer: tuple[bytes, bytes]
    outputs: tuple[TensorView, ...]
    regions: tuple[int, ...] = ()  # these two as in Layout
    targets: dict[str, Target] = {}


class Returned(msgspec.Struct, frozen=True, array_like=True):
    """A lent connection comes back.

    `unread` was received and not answered; `unsent` is the rest of an answer that the client does not take.
    `failed` says that a request of this form could not be run there, so that it is not lent again.
    """

    slot: int
    unread: bytes = b""
    unsent: bytes = b""
    failed: bool = False


class Oversize(msgspec.Struct, frozen=True, array_like=True):
    """An answer that outgrew its room: the descriptor sent along holds it from offset 0.

    `done` is its DONE record, whose layout means nothing.
    """

    seq: int
    tensors: tuple[TensorView, ...]
    done: Done


encode = msgspec.msgpack.Encoder().encode
decode_zygote = msgspec.msgpack.Decoder(Started | Ended).decode
decode_spec = msgspec.msgpack.Decoder(Spec).decode
decode_proof = msgspec.msgpack.Decoder(Proof).decode
decode_failure = msgspec.msgpack.Decoder(Failure).decode
decode_layout = msgspec.msgpack.Decoder(Layout).decode
decode_loan = msgspec.msgpack.Decoder(Loan).decode
decode_returned = msgspec.msgpack.Decoder(Returned).decode
decode_oversize = msgspec.msgpack.Decoder(Oversize).decode


class FrameError(Exception):
    """The other side does not keep to what stands above."""


#: What comes of reading bytes that are not what they should be.
NONSENSE = (FrameError, struct.error, msgspec.DecodeError)


def frame(kind: int, content: bytes | bytearray) -> bytes:
    """One frame."""
    return FRAME.pack(kind, len(content)) + content


class FrameReader:
    """Bytes as they come -> whole frames. What is left of an unfinished one is kept."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def split(self, data: bytes) -> list[tuple[int, memoryview]]:
        """The (kind, content) of every frame that is whole now.

        Raises:
            FrameError: one would be larger than any may be.
        """
        if self._rest:
            data = self._rest + data
        view = memoryview(data)
        kind, length = FRAME.unpack_from(data) if len(data) >= FRAME.size else (0, len(data))
        if FRAME.size + length == len(data):  # nearly always
            self._rest = b""
            return [(kind, view[FRAME.size :])]
        frames = []
        at = 0
        size = len(data)
        while size - at >= FRAME.size:
            kind, length = FRAME.unpack_from(data, at)
            end = at + FRAME.size + length
            if end > size:
                if length > PIPE_BYTES:
                    raise FrameError(f"a frame of {length} bytes, where a pipe holds {PIPE_BYTES}")
                break
            frames.append((kind, view[at + FRAME.size : end]))
            at = end
        self._rest = data[at:] if at < size else b""
        return frames


def layout_size(tensors: tuple[TensorView, ...]) -> int:
    """Bytes from the beginning of a layout to the end of its last tensor."""
    return max((view.offset + view.size_bytes for view in tensors if view.offset != ELSEWHERE), default=0)
