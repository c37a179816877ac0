import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers import wire
from skerry.manifest import Sample
from skerry.terms import MIB, TensorSpec, TensorView

CONTENTS = st.lists(st.tuples(st.integers(1, 4), st.binary(max_size=60)), max_size=6)

VIEWS = st.lists(
    st.builds(
        TensorView,
        st.text(max_size=20),
        st.sampled_from(["FP32", "BF16", "BYTES"]),
        st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
        st.integers(0, 2**40),
        st.integers(0, 2**40),
    ),
    max_size=5,
).map(tuple)


def read(reader, data):
    return [(kind, bytes(content)) for kind, content in reader.split(data)]


def stream(frames):
    return b"".join(wire.frame(kind, content) for kind, content in frames)


@given(CONTENTS)
def test_several_frames_in_one_read_come_apart_in_order(frames):
    assert read(wire.FrameReader(), stream(frames)) == frames


@settings(max_examples=30)
@given(CONTENTS)
def test_frames_cut_at_every_byte_come_out_whole(frames):
    data = stream(frames)
    for cut in range(len(data) + 1):
        reader = wire.FrameReader()
        assert read(reader, data[:cut]) + read(reader, data[cut:]) == frames


@given(CONTENTS)
def test_frames_that_come_byte_by_byte_come_out_whole(frames):
    reader = wire.FrameReader()
    found = []
    for byte in stream(frames):
        found += read(reader, bytes([byte]))
    assert found == frames


def test_an_empty_frame_and_an_empty_read_are_fine():
    reader = wire.FrameReader()
    assert read(reader, b"") == []
    assert read(reader, wire.frame(wire.DONE, b"")) == [(wire.DONE, b"")]
    assert read(reader, wire.frame(wire.DONE, bytearray(b"x"))) == [(wire.DONE, b"x")]


def test_readers_keep_their_rests_apart():
    one, two = wire.FrameReader(), wire.FrameReader()
    frame = wire.frame(wire.RUN, b"0123")
    assert read(one, frame[:5]) == []
    assert read(two, frame) == [(wire.RUN, b"0123")]
    assert read(one, frame[5:]) == [(wire.RUN, b"0123")]


@given(st.integers(0, wire.MAX_LAYOUTS - 1), VIEWS, st.lists(st.text(max_size=10), max_size=3).map(tuple))
def test_layouts_come_back_as_they_were(number, tensors, outputs):
    layout = wire.Layout(number, tensors, outputs)
    assert wire.decode_layout(wire.encode(layout)) == layout


@given(VIEWS)
def test_oversize_answers_come_back_as_they_were(tensors):
    answer = wire.Oversize(7, tensors, (7, 0, 1, 2, 123, 4))
    assert wire.decode_oversize(wire.encode(answer)) == answer


@given(VIEWS)
def test_a_layout_ends_with_its_last_byte(tensors):
    assert wire.layout_size(tensors) == max([0, *(v.offset + v.size_bytes for v in tensors)])


def test_a_spec_and_what_a_worker_says_of_itself_come_back_as_they_were():
    view = TensorView("output", "FP32", (1, 10), 0, 40)
    spec = wire.Spec(
        model="m/1",
        device={"ep_name": "CPUExecutionProvider", "kind": "cpu", "route": "builtin"},
        threads=2,
        keep_threads=False,
        memory_bytes=MIB,
        working_directory="/nowhere",
        samples=(Sample({"input": [[1.0]]}, {"output": [[2.0]]}), Sample({"input": [["text"]]})),
        reference=((view,), (view, view)),
    )
    assert wire.decode_spec(wire.encode(spec)) == spec
    proof = wire.Proof(
        inputs=(TensorSpec("input", "FP32", (-1, 64)),),
        parity={"ok": True, "reason": ""},
        reference=((view,),),
        runs=3,
    )
    assert wire.decode_proof(wire.encode(proof)) == proof
    failure = wire.Failure("no", "do this", 9, "invalid")
    assert wire.decode_failure(wire.encode(failure)) == failure


def test_the_two_messages_of_the_zygote_are_told_apart():
    for event in (wire.Started(3, -11), wire.Ended(4711, -8)):
        assert wire.decode_zygote(wire.encode(event)) == event
    with pytest.raises(msgspec.ValidationError):
        wire.decode_zygote(wire.encode({"type": "begun", "pid": 1}))


def test_full_frames_of_both_directions_fit_the_pipe_twice():
    for record in (wire.RUN_RECORD, wire.DONE_RECORD):
        full = wire.FRAME.size + wire.MAX_RUNS_PER_FRAME * record.size
        assert 2 * full < 64 * 1024  # also in a pipe of the kernel's default size
