"""The receiving half of a connection, fed by hand."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry import receiver as receiving
from skerry.errors import ExecutionFailed, InternalError
from skerry.receiver import Receiver

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nInference-Header-Content-Length: %d\r\n\r\n"


class Call:
    """Takes the lead and, for each size, a piece of what follows."""

    def __init__(self, *sizes):
        self.lead = None
        self.pieces = [bytearray(size) for size in sizes]

    def take_lead(self, lead):
        self.lead = bytes(lead)
        return [memoryview(piece) for piece in self.pieces]


def feed(receiver, data, step=1 << 30):
    """Give `data` as a socket would; returns what was left when the answer was complete, None if it is not."""
    while data:
        space = receiver.space()
        count = min(step, len(space), len(data))
        assert count
        space[:count] = data[:count]
        data = data[count:]
        if receiver.feed(count):
            return data
    return None


def answer(body=b"", status=200, json_bytes=None, **headers):
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if json_bytes is not None:
        lines.append(f"Inference-Header-Content-Length: {json_bytes}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@settings(max_examples=60, deadline=None)
@given(
    step=st.integers(1, 100_000),
    sizes=st.lists(st.integers(0, 100_000), max_size=4),
    lead=st.sampled_from([0, 1, 50, 70_000]),
    interim=st.integers(0, 2),
)
def test_every_piece_arrives_however_the_bytes_are_cut(step, sizes, lead, interim):
    step = max(step, (sum(sizes) + lead) // 2000 + 1)
    call, receiver = Call(*sizes), Receiver()
    tensors = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    for _ in range(2):  # the second answer finds a remembered head
        receiver.begin(call.take_lead)
        data = b"HTTP/1.1 100 Continue\r\n\r\n" * interim
        data += answer(b"j" * lead + b"".join(tensors), json_bytes=lead)
        assert feed(receiver, data, step) == b""
        assert receiver.end() is None
        assert receiver.reusable
        assert call.lead == b"j" * lead
        assert call.pieces == tensors


def test_large_pieces_are_received_in_place():
    call, receiver = Call(1 << 20), Receiver()
    receiver.begin(call.take_lead)
    feed(receiver, answer(b"{}" + bytes(1 << 20), json_bytes=2)[:100])
    assert receiver.space().obj is call.pieces[0]


def test_a_chunked_answer_is_split_like_any_other():
    call, receiver = Call(3, 2), Receiver()
    receiver.begin(call.take_lead)
    assert feed(receiver, CHUNKED_HEAD % 2 + b"4\r\n{}ab\r\n3\r\ncde\r\n0\r\n\r\n", 5) == b""
    assert (call.lead, call.pieces) == (b"{}", [b"abc", b"de"])
    assert receiver.reusable


def test_there_is_room_after_an_answer_that_filled_the_buffer():
    receiver = Receiver()
    receiver.begin(Call().take_lead)
    head = len(answer(b"x" * 60_000)) - 60_000
    assert feed(receiver, answer(b"x" * (receiving.BUFFER_BYTES - head))) == b""
    receiver.end()
    assert len(receiver.space())


def test_bytes_behind_an_answer_end_the_connection():
    receiver = Receiver()
    receiver.begin(Call().take_lead)
    assert feed(receiver, answer(b"{}") + b"HTTP/1.1 200 OK") == b""
    assert not receiver.reusable


def test_a_refusal_keeps_the_connection_unless_it_is_endless():
    receiver = Receiver()
    receiver.begin(Call().take_lead)
    feed(receiver, answer(json.dumps({"error": "no"}).encode(), status=500))
    refusal = receiver.end()
    assert isinstance(refusal, ExecutionFailed)
    assert refusal.message == "no"
    assert receiver.reusable
    receiver.begin(Call().take_lead)
    feed(receiver, answer(b"x" * (receiving.MAX_ERROR_BYTES + 1), status=500))
    assert receiver.end() is not None
    assert not receiver.reusable


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (answer(b"{}abc", json_bytes=2), (2,)),
        (answer(b"{}abc", json_bytes=2), (4,)),
        (answer(b"{}", json_bytes=3), ()),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", ()),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999\r\nInference-Header-Content-Length: 2\r\n\r\n",
            (),
        ),
        (b"HTTP/1.1 103 Hints\r\n\r\n" * 9, ()),
        (b"x" * 40_000, ()),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", ()),
        (
            CHUNKED_HEAD % 9 + b"2\r\n{}\r\n0\r\n\r\n",
            (),
        ),
        (
            CHUNKED_HEAD % 2 + b"2\r\n{}\r\n0\r\n\r\n",
            (5,),
        ),
    ],
)
def test_lengths_that_lie_are_the_servers_fault(data, sizes):
    receiver = Receiver()
    receiver.begin(Call(*sizes).take_lead)
    with pytest.raises(InternalError, match="expected"):
        feed(receiver, data)


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError(), ValueError(), RecursionError(), OverflowError()]
)
def test_json_that_breaks_the_protocol_is_the_servers_fault(error):
    def take_lead(_):
        raise error

    receiver = Receiver()
    receiver.begin(take_lead)
    with pytest.raises(InternalError, match="protocol's fields"):
        feed(receiver, answer(b"{}"))
