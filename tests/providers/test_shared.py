"""The worker's side of clients' shared memory: laid over, copied, written to, let go."""

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest

from providers import wire
from providers.shared import Inputs, Outputs, Regions
from skerry.errors import ExecutionFailed, InvalidRequest
from skerry.terms import TensorView

PAGE = 4096
FLOATS = TensorView("x", "FP32", (2, 2), 64, 16)
INDICES = TensorView("i", "INT64", (2,), 128, 16)
WORDS = TensorView("w", "BYTES", (1,), 256, 7)
DATATYPES = {"x": "FP32", "i": "INT64"}


class File:
    """Memory as a client has it: a file whose descriptor is handed out."""

    def __init__(self, path):
        self.path = path
        path.write_bytes(bytes(PAGE))

    def descriptor(self):
        return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def put(self, offset, values):
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(values if isinstance(values, bytes) else values.tobytes())

    def get(self, offset, count, dtype=np.float32):
        return np.frombuffer(self.path.read_bytes(), dtype, count, offset).tolist()

    def is_mapped(self):
        gc.collect()
        return str(self.path) in Path("/proc/self/maps").read_text()


@pytest.fixture
def files(tmp_path):
    return [File(tmp_path / "one"), File(tmp_path / "two")]


@pytest.fixture
def regions(files):
    regions = Regions()
    for number, file in enumerate(files, 1):
        regions.add(number, PAGE, file.descriptor())
    yield regions
    for number in (1, 2):
        regions.forget(number)


def fed(inputs):
    feeds = {}
    inputs.add_to(feeds)
    return feeds


def test_inputs_are_read_from_the_region_and_place_they_are_said_to_be_in(files, regions):
    other = FLOATS._replace(name="y")
    files[0].put(64, np.arange(4, dtype=np.float32))
    files[1].put(64, np.arange(4, dtype=np.float32) + 10)
    inputs = Inputs((FLOATS, TensorView("here", "FP32", (1,), 0, 4), other), (2, -1, 1), regions)
    feeds = fed(inputs)
    assert feeds.keys() == {"x", "y"}
    assert feeds["x"].tolist() == [[10, 11], [12, 13]]
    assert feeds["y"].tolist() == [[0, 1], [2, 3]]


def test_each_run_sees_what_the_client_has_written_by_then(files, regions):
    inputs = Inputs((FLOATS, INDICES), (1, 1), regions)
    for value in (3, 4):
        files[0].put(64, np.full(4, value, np.float32))
        files[0].put(128, np.full(2, value, np.int64))
        feeds = fed(inputs)
        assert feeds["x"].tolist() == [[value] * 2] * 2
        assert feeds["i"].tolist() == [value] * 2


def test_what_kernels_check_before_they_use_it_cannot_change_during_a_run(files, regions):
    files[0].put(128, np.array([1, 2]))
    files[0].put(256, b"\x03\0\0\0abc")
    feeds = fed(Inputs((INDICES, WORDS), (1, 1), regions))
    files[0].put(128, np.array([1 << 40, -1]))
    files[0].put(256, b"\xff\xff\xff\xff")
    assert feeds["i"].tolist() == [1, 2]
    assert feeds["w"].tolist() == ["abc"]


def test_outputs_go_to_their_places_and_the_others_stay(files, regions):
    outputs = Outputs({"x": wire.Target(2, 512, 16)}, regions)
    assert "x" in outputs
    assert "i" not in outputs
    arrays = [np.array([7, 8], np.int64), np.array([1, 2], np.float32)]
    left = outputs.take(("i", "x"), arrays, DATATYPES)
    assert left[0] is arrays[0]
    assert left[1].size == 0
    assert files[1].get(512, 4) == [1, 2, 0, 0]
    assert not any(files[0].path.read_bytes())


def test_an_output_without_room_is_the_requests_fault_and_nothing_is_written(files, regions):
    outputs = Outputs({"x": wire.Target(1, 0, 4)}, regions)
    with pytest.raises(InvalidRequest, match="at most 4 bytes, the room in shared memory, got 8"):
        outputs.take(("x",), [np.array([1, 2], np.float32)], DATATYPES)
    assert not any(files[0].path.read_bytes())


def test_memory_that_was_taken_back_is_refused_and_unmapped(files, regions):
    inputs = Inputs((FLOATS, INDICES), (1, 1), regions)
    outputs = Outputs({"x": wire.Target(1, 0, 16)}, regions)
    others = Inputs((FLOATS,), (2,), regions)
    assert files[0].is_mapped()
    regions.forget(1)
    for use in (lambda: fed(inputs), lambda: outputs.take(("x",), [np.zeros(4, np.float32)], DATATYPES)):
        with pytest.raises(InvalidRequest, match="taken back"):
            use()
    assert not files[0].is_mapped()
    assert "x" in outputs, "its answers are still described as before"
    assert fed(others).keys() == {"x"}


def test_a_run_under_way_keeps_the_memory_until_it_ends(files, regions):
    files[0].put(64, np.ones(4, np.float32))
    feeds = fed(Inputs((FLOATS,), (1,), regions))
    regions.forget(1)
    assert feeds["x"].tolist() == [[1, 1], [1, 1]]
    assert files[0].is_mapped()
    feeds.clear()
    assert not files[0].is_mapped()


def test_inputs_are_all_there_or_none_when_the_memory_goes_at_that_moment(regions):
    inputs = Inputs((FLOATS, INDICES), (1, 1), regions)

    class Feeds(dict):
        def update(self, found):
            regions.forget(1)  # as another thread may
            super().update(found)

    feeds = Feeds()
    inputs.add_to(feeds)
    assert feeds.keys() == {"x", "i"}


@pytest.mark.parametrize("number", [wire.NO_REGION, 3])
def test_a_region_that_nobody_has_told_of_was_taken_back(regions, number):
    with pytest.raises(InvalidRequest, match="taken back"):
        Inputs((FLOATS,), (number,), regions)
    with pytest.raises(InvalidRequest, match="taken back"):
        Outputs({"x": wire.Target(number, 0, 4)}, regions)


def test_what_cannot_be_mapped_is_said_when_it_is_used(files, regions):
    regions.add(3, PAGE, -1)
    with pytest.raises(ExecutionFailed, match="no descriptor is left"):
        Inputs((FLOATS,), (3,), regions)
    regions.add(4, 2 * PAGE, files[0].descriptor())
    with pytest.raises(ExecutionFailed, match="could not map"):
        Inputs((FLOATS,), (4,), regions)
    regions.forget(4)
    with pytest.raises(InvalidRequest, match="taken back"):
        Inputs((FLOATS,), (4,), regions)


def test_descriptors_that_come_are_closed(files):
    regions = Regions()
    for size in (PAGE, 2 * PAGE):
        descriptor = files[0].descriptor()
        regions.add(1, size, descriptor)
        regions.forget(1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_layouts_that_are_replaced_do_not_stay_with_their_region(regions):
    made = [
        weakref.ref(user)
        for user in (Inputs((FLOATS,), (1,), regions), Outputs({"x": wire.Target(1, 0, 16)}, regions))
    ]
    gc.collect()
    assert [user() for user in made] == [None, None]
    regions.forget(1)
