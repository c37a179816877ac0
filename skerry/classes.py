"""The classification extension: an output's numbers -> its largest ones, with their indices and labels.

Does: the words "value:index[:label]" for the best N of each row.
Leaves out: where numbers and labels come from (skerry.oip, skerry.manifest).

Rules
 * Along the first dimension of two or more are the rows, as batches have them; one dimension is one row.
 * Values are written as Triton writes them: integers plainly, others with six decimals.
 * Equal values keep the order of their indices, so an answer can be repeated. NaN comes after everything.

Source: extension_classification.md of triton-inference-server, and TopkClassifications in its http_server.cc.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Number = int | float

#: Elements of one output, and words about it, at most. The daemon's one loop makes them: so many take up to 40 ms.
MAX_ELEMENTS = 1 << 18
MAX_WORDS = 1 << 12
#: Of a label so much is written: it may stand in every row.
MAX_LABEL_CHARACTERS = 256


class Rows(NamedTuple):
    """How a shape divides into rows."""

    number: int
    length: int


def rows_of(shape: Sequence[int]) -> Rows:
    """The rows of an output of this shape; a scalar is one row of one."""
    if len(shape) < 2:
        return Rows(1, math.prod(shape))
    return Rows(shape[0], math.prod(shape[1:]))


def shape_of(shape: Sequence[int], wanted: int) -> tuple[int, ...]:
    """The shape of the classes of an output of this shape: a row's, or one per row."""
    rows = rows_of(shape)
    best = min(wanted, rows.length)
    return (best,) if len(shape) < 2 else (rows.number, best)


def best(
    values: Sequence[Number], shape: Sequence[int], wanted: int, labels: Sequence[str] = ()
) -> list[str]:
    """The `wanted` largest values of each row, row after row.

    Args:
        values: flat, row-major, as many as `shape` has; at most MAX_ELEMENTS, for at most MAX_WORDS.
        shape: of the output.
        wanted: 1 or more; a row that has fewer gives all.
        labels: of the indices from 0 on; the rest have none.
    """
    rows = rows_of(shape)
    found: list[str] = []
    for begin in range(0, rows.number * rows.length, max(1, rows.length)):
        row = values[begin : begin + rows.length]
        found.extend(_word(row[index], index, labels) for index in _largest(row, wanted))
    return found


def _largest(row: Sequence[Number], wanted: int) -> Iterator[int]:
    # NaN compares with nothing, and would make the order of the others a matter of chance.
    keys = [-math.inf if value != value else value for value in row]  # noqa: PLR0124 - that is what NaN is
    return iter(heapq.nlargest(wanted, range(len(keys)), key=keys.__getitem__))


def _word(value: Number, index: int, labels: Sequence[str]) -> str:
    text = f"{value:f}" if isinstance(value, float) else str(value)
    if index >= len(labels):
        return f"{text}:{index}"
    return f"{text}:{index}:{labels[index][:MAX_LABEL_CHARACTERS]}"
