"""Ask a session for evidence: inputs to run it on, whether its outputs agree, how long it takes.

Does: make inputs, compare outputs, time runs. For worker processes only.
Leaves out: what follows from the evidence (providers.placement).

Rules
 * The same seed gives the same inputs everywhere, so that two providers in two processes see the same.
 * Providers are inaccurate in silence: some compute in bf16 unasked, some are plainly wrong. So outputs are
   compared as wholes and at their worst element, and NaN and infinity must stand in the same places.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from providers.arrays import dtype_of
from skerry.errors import InvalidRequest, TooLarge
from skerry.terms import ITEM_SIZES, MIB, element_count

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from providers.arrays import Array
    from skerry.manifest import Sample
    from skerry.terms import TensorSpec

MAX_INPUT_BYTES = 512 * MIB

# Sums of values around 1 carry rounding errors around 1e-7 each, however small the result. With the usual
# tolerance of 1e-3 this floor forgives 1e-6, which says nothing about accuracy.
SCALE_FLOOR = 1e-3
# How much worse than the whole a single element may be: rounding is uneven, a wrong element is not that near.
WORST_ELEMENT = 10.0
# Of the elements of 8-bit outputs, which requantising may move by one step. In a small output that is none.
STEPS_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Parity:
    """Whether outputs agree.

    Attributes:
        max_abs: largest absolute difference of any element of any output; infinite where there is none.
        max_rel: largest relative error of any output, as a whole (L2 norms).
        worst_output: where `max_rel` is, or the output that failed.
        reason: why not ok; "" if ok.
    """

    ok: bool
    max_abs: float
    max_rel: float
    worst_output: str
    reason: str


@dataclass(frozen=True, slots=True)
class Timing:
    """How long runs take, in microseconds."""

    median_us: float
    p90_us: float
    runs: int


# --- inputs -----------------------------------------------------------------------------------------------


def make_inputs(
    specs: Sequence[TensorSpec], seed: int, sample: Sample | None = None, *, open_size: int = 1
) -> dict[str, Array]:
    """Inputs to run a model on.

    Open dimensions become 1, or `open_size` where they are not the first. Floats are uniform in [0, 1), integers 1
    (an index that is valid nearly everywhere), BOOL True, BYTES "skerry". What the sample has goes over that.

    Raises:
        InvalidRequest: the sample names an input that the model has not, or does not fit.
        TooLarge: an input would take more than MAX_INPUT_BYTES.
    """
    given = {} if sample is None else sample.inputs
    _check_names("input", given, specs)
    random = np.random.default_rng(seed)
    feeds = {}
    for spec in specs:
        # Drawn in any case: the others' values must not depend on which inputs the sample has.
        generated = _generate(spec, random, open_size)
        feeds[spec.name] = _from_lists("input", spec, given[spec.name]) if spec.name in given else generated
    return feeds


def golden(specs: Sequence[TensorSpec], sample: Sample) -> dict[str, Array]:
    """The outputs that a sample says are right.

    Raises:
        InvalidRequest: the sample names an output that the model has not, or does not fit.
    """
    given = sample.outputs or {}
    _check_names("output", given, specs)
    return {spec.name: _from_lists("output", spec, given[spec.name]) for spec in specs if spec.name in given}


def _check_names(what: str, given: Mapping[str, Any], specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in given:
        if name not in names:
            raise InvalidRequest(f"sample: expected {what}s {', '.join(names)}, got {name!r}")


def _generate(spec: TensorSpec, random: np.random.Generator, open_size: int) -> Array:
    sizes = (1, *[open_size] * (len(spec.shape) - 1))
    shape = tuple(size if dim < 0 else dim for dim, size in zip(spec.shape, sizes, strict=False))
    size = element_count(shape) * (ITEM_SIZES[spec.datatype] or 8)
    if size > MAX_INPUT_BYTES:
        raise TooLarge(
            f"input {spec.name!r}: expected at most {MAX_INPUT_BYTES} bytes for a probe, got {list(shape)}"
        )
    if spec.datatype in {"FP16", "BF16", "FP32", "FP64"}:
        return _as(spec.datatype, random.random(shape, dtype=np.float32))
    if spec.datatype == "BYTES":
        return np.full(shape, "skerry", dtype=object)
    return np.ones(shape, dtype_of(spec.datatype))


def _from_lists(what: str, spec: TensorSpec, values: object) -> Array:
    label = f"sample {what} {spec.name!r}"
    try:
        if spec.datatype == "BYTES":
            array = np.array(values, dtype=object)
        elif spec.datatype in {"FP16", "BF16"}:
            array = _as(spec.datatype, np.array(values, dtype=np.float32))
        else:
            array = np.array(values, dtype=dtype_of(spec.datatype))
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"{label}: expected nested lists of {spec.datatype}, got {error}") from None
    if spec.datatype == "BYTES" and not all(isinstance(item, str) for item in array.flat):
        raise InvalidRequest(f"{label}: expected nested lists of strings, got other values among them")
    fits = array.ndim == len(spec.shape) and all(
        dim in {-1, got} for dim, got in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(f"{label}: expected shape {list(spec.shape)}, got {list(array.shape)}")
    return array


def _as(datatype: str, values: Array) -> Array:
    if datatype != "BF16":
        return values.astype(dtype_of(datatype))
    # The upper half of a float32, rounded to nearest; inputs are finite and far from overflow.
    bits = np.asarray(values, order="C").view(np.uint32)
    return ((bits.astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)


# --- agreement --------------------------------------------------------------------------------------------


def compare(
    reference: Mapping[str, Array],
    outputs: Mapping[str, Array],
    tolerance: float,
    *,
    bf16: Collection[str] = (),
) -> Parity:
    """Compare outputs with those of a trusted provider.

    Floats: the relative L2 error of each output is at most `tolerance`, so that noise in elements near zero
    does not count, and no element is off by more than WORST_ELEMENT x `tolerance` x the largest value, so
    that one wrong element in a million does. Integers, strings and booleans are equal, except that 8-bit
    outputs of quantised models may differ by one step in STEPS_SHARE of their elements.

    Args:
        reference: output -> array. Its names are the ones compared.
        outputs: output -> array, at least those of `reference`.
        tolerance: relative.
        bf16: names of outputs that hold the bits of BF16 in uint16; without it they are compared bit by bit.

    Returns: the first failure, or the worst agreement.
    """
    seen: list[Parity] = []
    for name, expected in reference.items():
        if name not in outputs:
            return _failed(name, "expected it among the outputs, got none of that name")
        pair = (expected, outputs[name])
        if name in bf16:
            pair = (_widen(pair[0]), _widen(pair[1]))
        parity = _compare_one(name, *pair, tolerance)
        if not parity.ok:
            return parity
        seen.append(parity)
    if not seen:
        return _failed("", "expected at least one output to compare, got none")
    worst = max(seen, key=lambda parity: parity.max_rel)
    return replace(worst, max_abs=max(parity.max_abs for parity in seen))


def _compare_one(name: str, expected: Array, got: Array, tolerance: float) -> Parity:
    if expected.shape != got.shape:
        return _failed(name, f"expected shape {list(expected.shape)}, got {list(got.shape)}")
    if expected.dtype != got.dtype:
        return _failed(name, f"expected {expected.dtype}, got {got.dtype}")
    if expected.dtype.kind == "f":
        return _compare_floats(name, expected.astype(np.float64), got.astype(np.float64), tolerance)
    different = int(np.count_nonzero(expected != got))
    if not different:
        return Parity(ok=True, max_abs=0.0, max_rel=0.0, worst_output=name, reason="")
    if expected.dtype.kind in "iu":
        # As floats: the difference of unsigned integers wraps.
        distance = float(np.max(np.abs(expected.astype(np.float64) - got.astype(np.float64))))
        if expected.itemsize == 1 and distance <= 1 and different <= STEPS_SHARE * expected.size:
            return Parity(ok=True, max_abs=distance, max_rel=0.0, worst_output=name, reason="")
    return _failed(name, f"expected equal values, got {different} of {expected.size} different")


def _compare_floats(name: str, expected: Array, got: Array, tolerance: float) -> Parity:
    if not np.array_equal(np.isnan(expected), np.isnan(got)):
        return _failed(
            name, f"expected {_count_nan(expected)} NaN, got {_count_nan(got)}, or in other places"
        )
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(got)):
        return _failed(name, "expected finite values and infinities in the same places, got others")
    infinite = np.isinf(expected)
    if not np.array_equal(expected[infinite], got[infinite]):
        return _failed(name, "expected infinities of the same sign, got others")
    expected, got = expected[finite], got[finite]
    if not expected.size:
        return Parity(ok=True, max_abs=0.0, max_rel=0.0, worst_output=name, reason="")
    difference = got - expected
    max_abs = float(np.max(np.abs(difference)))
    peak = max(float(np.max(np.abs(expected))), SCALE_FLOOR)
    floor = SCALE_FLOOR * expected.size**0.5
    max_rel = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected)), floor)
    reason = ""
    if max_rel > tolerance:
        reason = f"output {name!r}: expected a relative error of at most {tolerance:g}, got {max_rel:.2g}"
    elif max_abs > WORST_ELEMENT * tolerance * peak:
        limit = WORST_ELEMENT * tolerance * peak
        reason = f"output {name!r}: expected every element within {limit:.2g}, got one off by {max_abs:.2g}"
    return Parity(ok=not reason, max_abs=max_abs, max_rel=max_rel, worst_output=name, reason=reason)


def _count_nan(array: Array) -> int:
    return int(np.count_nonzero(np.isnan(array)))


def _widen(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _failed(name: str, reason: str) -> Parity:
    return Parity(
        ok=False,
        max_abs=float("inf"),
        max_rel=float("inf"),
        worst_output=name,
        reason=f"output {name!r}: {reason}",
    )


# --- time -------------------------------------------------------------------------------------------------


def time_runs(run: Callable[[], object], budget_s: float, max_runs: int) -> Timing:
    """Time `run` again and again until `budget_s` seconds or `max_runs` are used up; at least once.

    The caller has run it before: first runs allocate, and are not what a model costs.
    """
    if max_runs < 1:
        raise ValueError(f"max_runs: expected at least 1, got {max_runs}")
    taken: list[int] = []
    end = time.perf_counter_ns() + int(budget_s * 1e9)
    while not taken or (len(taken) < max_runs and time.perf_counter_ns() < end):
        begin = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - begin)
    taken.sort()
    return Timing(
        median_us=taken[len(taken) // 2] / 1000,
        p90_us=taken[min(len(taken) - 1, len(taken) * 9 // 10)] / 1000,
        runs=len(taken),
    )
