from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from providers import probe
from providers.probe import compare, golden, make_inputs, time_runs
from skerry.errors import InvalidRequest, TooLarge
from skerry.manifest import Sample
from skerry.terms import ITEM_SIZES, TensorSpec

IMAGE = TensorSpec("image", "FP32", (-1, 3))
COUNT = TensorSpec("count", "INT64", ())


# --- inputs


@pytest.mark.parametrize("datatype", ITEM_SIZES)
def test_every_datatype_gets_an_input_of_its_shape(datatype):
    array = make_inputs([TensorSpec("x", datatype, (-1, 4))], seed=0)["x"]
    assert array.shape == (1, 4)
    assert array.itemsize == (ITEM_SIZES[datatype] or 8)


def test_values_are_harmless():
    specs = [IMAGE, COUNT, TensorSpec("flag", "BOOL", (2,)), TensorSpec("text", "BYTES", (2,))]
    feeds = make_inputs(specs, seed=1)
    assert ((feeds["image"] >= 0) & (feeds["image"] < 1)).all()
    assert feeds["count"].shape == ()
    assert feeds["count"] == 1
    assert feeds["flag"].tolist() == [True, True]
    assert feeds["text"].tolist() == ["skerry", "skerry"]


def test_equal_seeds_give_equal_inputs_and_others_do_not():
    specs = [IMAGE, TensorSpec("half", "FP16", (5,))]
    one, same, other = (make_inputs(specs, seed) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["image"] != other["image"]).any()


def test_a_sample_replaces_its_own_inputs_only():
    plain = make_inputs([IMAGE, TensorSpec("other", "FP32", (2,))], seed=1)
    sample = Sample(inputs={"image": [[1, 2, 3], [4, 5, 6]]})
    feeds = make_inputs([IMAGE, TensorSpec("other", "FP32", (2,))], 1, sample)
    assert feeds["image"].dtype == np.float32
    assert feeds["image"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert feeds["other"].tolist() == plain["other"].tolist()


def test_bf16_is_rounded_to_nearest():
    values = [[1.0, -2.7182818, 3.1415927]]
    feeds = make_inputs([TensorSpec("x", "BF16", (-1, 3))], 0, Sample(inputs={"x": values}))
    assert feeds["x"].dtype == np.uint16
    assert feeds["x"].view(ml_dtypes.bfloat16).tolist() == np.array(values, ml_dtypes.bfloat16).tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], r"expected shape \[-1, 3\], got \[1, 2\]"),
        ([1, 2, 3], r"expected shape \[-1, 3\], got \[3\]"),
        ([[1, 2, 3], [4]], "expected nested lists of FP32"),
        ([["a", "b", "c"]], "expected nested lists of FP32"),
        ({"a": 1}, "expected nested lists of FP32"),
    ],
)
def test_a_sample_that_does_not_fit_says_what_was_expected(values, message):
    with pytest.raises(InvalidRequest, match=f"sample input 'image': {message}"):
        make_inputs([IMAGE], 0, Sample(inputs={"image": values}))


def test_samples_of_other_datatypes_that_do_not_fit():
    for spec, value in ((COUNT, 1 << 70), (TensorSpec("count", "BYTES", (1,)), [5])):
        with pytest.raises(InvalidRequest, match="sample input 'count': expected nested lists of"):
            make_inputs([spec], 0, Sample(inputs={"count": value}))
    with pytest.raises(InvalidRequest, match="sample: expected inputs image, count, got 'imgae'"):
        make_inputs([IMAGE, COUNT], 0, Sample(inputs={"imgae": [[1, 2, 3]]}))


def test_an_input_of_absurd_size_is_refused_before_it_is_made():
    with pytest.raises(TooLarge, match="input 'x': expected at most 536870912 bytes"):
        make_inputs([TensorSpec("x", "FP32", (1 << 40,))], 0)


def test_golden_outputs_become_arrays_of_the_models_datatypes():
    specs = [TensorSpec("score", "FP32", (-1,)), TensorSpec("label", "BYTES", (-1,))]
    expected = golden(specs, Sample(inputs={}, outputs={"label": ["cat"]}))
    assert list(expected) == ["label"]
    assert expected["label"].tolist() == ["cat"]
    assert golden(specs, Sample(inputs={}, outputs={"score": [0.5]}))["score"].dtype == np.float32
    assert golden(specs, Sample(inputs={})) == {}
    with pytest.raises(InvalidRequest, match="expected outputs score, label, got 'lable'"):
        golden(specs, Sample(inputs={}, outputs={"lable": ["cat"]}))


# --- agreement

RANDOM = np.random.default_rng(7)
PLAIN = RANDOM.standard_normal(1000).astype(np.float32)


def parity(expected, got, tolerance=1e-3, **more):
    return compare({"y": np.asarray(expected)}, {"y": np.asarray(got)}, tolerance, **more)


def test_equal_and_nearly_equal_outputs_agree():
    assert parity(PLAIN, PLAIN) == probe.Parity(
        ok=True, max_abs=0.0, max_rel=0.0, worst_output="y", reason=""
    )
    near = parity(PLAIN, PLAIN * np.float32(1 + 1e-6))
    assert near.ok
    assert 0 < near.max_rel < 1e-5


def test_bf16s_error_of_one_percent_does_not_agree():
    rounded = PLAIN.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert not parity(PLAIN, rounded).ok
    assert parity(PLAIN, rounded, tolerance=1e-2).ok


def test_one_wrong_element_in_a_million_does_not_agree():
    expected = np.ones(1_000_000, np.float32)
    got = expected.copy()
    got[123_456] = 1.5
    found = parity(expected, got)
    assert found.max_rel < 1e-3
    assert not found.ok
    assert "expected every element within 0.01, got one off by 0.5" in found.reason


def test_noise_around_zero_agrees_and_a_small_signal_must_be_right():
    zeros = np.zeros(100, np.float32)
    assert parity(zeros, zeros + np.float32(1e-7)).ok
    assert not parity(zeros, zeros + np.float32(1e-4)).ok
    small = PLAIN * np.float32(0.01)
    assert parity(small, small * np.float32(1 + 1e-5)).ok
    assert not parity(small, small[::-1]).ok


def test_nan_and_infinity_must_stand_in_the_same_places():
    special = np.array([1, np.nan, np.inf, -np.inf], np.float32)
    assert parity(special, special).ok
    for other in ([1, 2, np.inf, -np.inf], [np.nan, 1, np.inf, -np.inf], [1, np.nan, np.inf, np.inf]):
        assert not parity(special, np.array(other, np.float32)).ok
    assert not parity(np.array([1, 2], np.float32), np.array([1, np.inf], np.float32)).ok
    assert parity(np.full(3, np.nan, np.float32), np.full(3, np.nan, np.float32)).ok


def test_shape_and_datatype_must_be_the_same():
    found = parity(PLAIN.reshape(10, 100), PLAIN)
    assert found.reason == "output 'y': expected shape [10, 100], got [1000]"
    assert found.max_abs == float("inf")
    assert "expected float32, got float64" in parity(PLAIN, PLAIN.astype(np.float64)).reason
    assert parity(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)).ok


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint16])
def test_labels_and_indices_are_exact(dtype):
    labels = np.arange(1000, dtype=dtype)
    assert parity(labels, labels).ok
    other = labels.copy()
    other[5] += 1
    assert "got 1 of 1000 different" in parity(labels, other).reason


def test_quantised_outputs_may_be_a_step_off_in_few_places():
    image = RANDOM.integers(0, 255, 1000, dtype=np.uint8)
    near, far, many = image.copy(), image.copy(), image.copy()
    near[:10] += 1
    far[0] += 2 if far[0] < 200 else -2 % 256
    many[:11] += 1
    assert parity(image, near).ok
    assert parity(image, near).max_abs == 1.0
    assert not parity(image, far).ok
    assert not parity(image, many).ok
    assert not parity(image[:10], near[:10]).ok


def test_strings_and_booleans_are_exact():
    words = np.array(["a", "b"], object)
    assert parity(words, words.copy()).ok
    assert not parity(words, words[::-1]).ok
    assert not parity(np.array([True, False]), np.array([True, True])).ok


def test_bf16_outputs_are_compared_as_numbers_when_named():
    bits = PLAIN.astype(ml_dtypes.bfloat16).view(np.uint16)
    neighbour = bits.copy()
    neighbour[0] += 1
    assert not parity(bits, neighbour).ok
    assert parity(bits, neighbour, bf16={"y"}).ok
    assert not parity(bits, bits[::-1], bf16={"y"}).ok


def test_the_worst_of_two_outputs_is_named():
    expected = {"a": PLAIN, "b": PLAIN}
    found = compare(expected, {"a": PLAIN, "b": PLAIN * np.float32(1.0001)}, 1e-3)
    assert (found.ok, found.worst_output) == (True, "b")
    swapped = compare(expected, {"a": PLAIN * np.float32(1.0001), "b": PLAIN}, 1e-3)
    assert (swapped.worst_output, swapped.max_abs) == ("a", found.max_abs)
    failed = compare(expected, {"a": PLAIN, "b": -PLAIN}, 1e-3)
    assert (failed.ok, failed.worst_output) == (False, "b")
    assert failed.reason.startswith("output 'b': expected a relative error of at most 0.001, got 2")


def test_nothing_to_compare_is_no_agreement():
    assert not compare({}, {"a": PLAIN}, 1e-3).ok
    assert "expected it among the outputs" in compare({"a": PLAIN}, {"b": PLAIN}, 1e-3).reason


# --- time


def test_runs_stop_at_the_number_or_the_budget(monkeypatch):
    now = iter(range(0, 10**9, 1000))  # each look at the clock is a microsecond later
    monkeypatch.setattr(probe.time, "perf_counter_ns", lambda: next(now))
    calls = []
    timing = time_runs(lambda: calls.append(1), budget_s=1.0, max_runs=7)
    assert (timing.runs, len(calls)) == (7, 7)
    assert (timing.median_us, timing.p90_us) == (1.0, 1.0)
    assert time_runs(lambda: None, budget_s=30e-6, max_runs=1000).runs == 10
    assert time_runs(lambda: None, budget_s=0.0, max_runs=5).runs == 1
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        time_runs(lambda: None, budget_s=1.0, max_runs=0)


def test_percentiles_are_those_of_the_runs(monkeypatch):
    times = [5, 1, 2, 3, 4, 10, 6, 7, 8, 9]
    clock = [0]  # for the end of the budget; then before and after each run, and a look at the budget
    for each in times:
        clock += [0, each * 1000, 0]
    values = iter(clock)
    monkeypatch.setattr(probe.time, "perf_counter_ns", lambda: next(values))
    timing = time_runs(lambda: None, budget_s=1.0, max_runs=10)
    assert timing.p90_us == 10.0
    assert timing.median_us == 6.0
