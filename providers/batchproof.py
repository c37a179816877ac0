"""Find out whether a model gives several requests in one run what it gives each of them alone. For workers only.

Does: different rows, one by one and together, compared.
Leaves out: whether batches are quicker (providers.costs), how requests become one run (providers.runner).

Rules
 * An open first dimension is no promise: models normalise over it, quantise by what else is in the batch, or mean
   something else by it. So it is tried, with rows that differ from each other, in two sizes and another order.
 * What cannot be tried is not done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from providers import probe
from skerry.errors import SkerryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from providers.arrays import Array
    from providers.session import Session
    from skerry.manifest import Sample
    from skerry.terms import TensorSpec

Feeds = dict[str, "Array"]

#: Relative, as probe.compare takes it. Other sizes take other kernels, which add in another order, and no more.
TOLERANCE = 1e-4
#: For types whose last bit is more than that.
COARSE = {"FP16": 2e-3, "BF16": 1e-2}
#: What is run together, by number of the row.
_BATCHES = ((0, 1), (2, 0, 1))
_ROWS = 3


def refusal(session: Session, samples: Sequence[Sample]) -> str:
    """Why this model's requests must not be run together; "" if they may.

    Args:
        session: of the model; it is run some eight rows' worth.
        samples: the manifest's; where there are none, or too few, rows are made up.
    """
    for what, specs in (("input", session.inputs), ("output", session.outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != -1:
                return f"{what} {spec.name!r} has no open first dimension: {spec.datatype} {list(spec.shape)}"
    names = tuple(spec.name for spec in session.outputs)
    try:
        rows = _rows(session.inputs, samples)
        singles = [session.run(names, row, None) for row in rows]
    except Exception as error:  # noqa: BLE001 - SkerryError or what ONNX Runtime likes to raise
        return f"rows to try it with do not suit the model ({_text(error)}); the manifest can give samples"
    try:
        for order in _BATCHES:
            together = {
                spec.name: np.concatenate([rows[i][spec.name] for i in order]) for spec in session.inputs
            }
            why = _compare(session.outputs, session.run(names, together, None), [singles[i] for i in order])
            if why:
                return f"{len(order)} rows together: {why}"
    except Exception as error:  # noqa: BLE001 - likewise
        return f"{len(order)} rows together: {_text(error)}"
    return ""


def _compare(specs: Sequence[TensorSpec], together: list[Array], singles: list[list[Array]]) -> str:
    for index, spec in enumerate(specs):
        if any(len(single[index]) != 1 for single in singles) or len(together[index]) != len(singles):
            return f"output {spec.name!r}: expected one row for each, got {len(together[index])}"
        for at, single in enumerate(singles):
            parity = probe.compare(
                {spec.name: single[index]},
                {spec.name: together[index][at : at + 1]},
                COARSE.get(spec.datatype, TOLERANCE),
                bf16={spec.name} if spec.datatype == "BF16" else (),
            )
            if not parity.ok:
                return f"expected what each gives alone; {parity.reason}"
    return ""


def _rows(specs: Sequence[TensorSpec], samples: Sequence[Sample]) -> list[Feeds]:
    """Feeds of one row each that differ from one another as far as that is possible."""
    rows: list[Feeds] = []
    for seed, sample in enumerate(samples):
        feeds = probe.make_inputs(specs, seed, sample)
        count = min(len(array) for array in feeds.values())
        rows += [{name: array[i : i + 1] for name, array in feeds.items()} for i in range(count)]
    rows = [row for row in rows if _shapes(row) == _shapes(rows[0])][:_ROWS]
    if not rows:
        return [
            {name: _vary(array, seed) for name, array in probe.make_inputs(specs, seed).items()}
            for seed in range(_ROWS)
        ]
    for step in range(1, _ROWS):
        if len(rows) < _ROWS:
            rows.append({name: _turn(array, step) for name, array in rows[0].items()})
    return rows


def _shapes(row: Feeds) -> list[tuple[int, ...]]:
    return [array.shape for array in row.values()]


def _vary(array: Array, seed: int) -> Array:
    """Generated floats differ by their seed; what is constant is made to differ: 0 is as good an index as 1."""
    if array.dtype.kind == "f":
        return array
    if array.dtype.kind == "O":
        return np.full(array.shape, "skerry"[: 6 - 2 * seed], dtype=object)
    # Not a pattern: what repeats has no variance, and models that divide by it give noise.
    ones = np.random.default_rng(seed).random(array.shape) < 0.5
    return np.asarray(ones, array.dtype)


def _turn(array: Array, step: int) -> Array:
    """A sample's row with its values in other places, which leaves them what the model can bear."""
    turned: Array = np.roll(array, step)
    if array.dtype.kind == "f":
        turned *= array.dtype.type(1 - step / 8)
    return turned


def _text(error: Exception) -> str:
    return (
        error.message
        if isinstance(error, SkerryError)
        else (str(error).strip() or type(error).__name__)[:500]
    )
