"""model_warmup -> samples for the probe.

Leaves out: running them (providers.probe); reading the files, which the caller does.

Rules
 * The same configuration gives the same samples: they are signed, and a version's manifest never changes.
 * A sample too large to be signed, or that JSON cannot carry, is left out with a reason: the probe makes inputs
   of its own, so that a model is warmed up in any case.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.arrays import DTYPES, unpack_bytes
from skerry.errors import InvalidRequest, NotFound, SkerryError
from skerry.manifest import Sample
from skerry.terms import MAX_RANK

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.triton.keys import Warmup, WarmupInput
    from skerry.arrays import Array

#: Of one sample, all inputs together; as JSON about 150 KB, and a manifest has room for 1 MiB.
MAX_ELEMENTS = 16_384
MAX_SAMPLES = 16
#: Longest file a sample may lie in: MAX_ELEMENTS of the widest number, or of strings of 24 bytes.
MAX_FILE_BYTES = 32 * MAX_ELEMENTS

_SEED = 0
_FLOATS = {"FP16", "BF16", "FP32", "FP64"}


def samples(entries: tuple[Warmup, ...], read: Callable[[str], bytes]) -> tuple[list[Sample], list[str]]:
    """What can be kept of the entries, and a sentence about each that cannot.

    Args:
        entries: as they stand in the configuration.
        read: the bytes of a file in `warmup/`, at most MAX_FILE_BYTES; raises SkerryError.
    """
    kept: list[Sample] = []
    left_out: list[str] = []
    for number, entry in enumerate(entries, 1):
        try:
            if len(kept) == MAX_SAMPLES:
                raise InvalidRequest(f"expected at most {MAX_SAMPLES} samples")
            kept.append(_sample(entry, read))
        except NotFound:
            raise  # a name in the file that leads nowhere is a mistake, not a limit of ours
        except SkerryError as error:
            left_out.append(f"sample {number} left out: {error.message}")
    return kept, left_out


def _sample(entry: Warmup, read: Callable[[str], bytes]) -> Sample:
    batch = (entry.batch_size,) if entry.batch_size > 0 else ()
    shapes = {name: (*batch, *wanted.dims) for name, wanted in entry.inputs.items()}
    for name, shape in shapes.items():
        if len(shape) > MAX_RANK or any(not 0 <= size <= MAX_ELEMENTS for size in shape):
            raise InvalidRequest(
                f"input {name!r}: expected at most {MAX_RANK} sizes up to {MAX_ELEMENTS}, got {list(shape)}"
            )
    elements = sum(math.prod(shape) for shape in shapes.values())
    if elements > MAX_ELEMENTS:
        raise InvalidRequest(f"expected at most {MAX_ELEMENTS} elements, got {elements}")
    random = np.random.default_rng(_SEED)
    return Sample(
        inputs={
            name: _values(name, wanted, shapes[name], random, read) for name, wanted in entry.inputs.items()
        }
    )


def _values(
    name: str,
    wanted: WarmupInput,
    shape: tuple[int, ...],
    random: np.random.Generator,
    read: Callable[[str], bytes],
) -> Any:  # noqa: ANN401 - nested lists, as deep as the shape
    if wanted.data_type is None:
        raise InvalidRequest(f"input {name!r}: expected a data_type, got none")
    datatype = wanted.data_type.removeprefix("TYPE_")
    if wanted.input_data_file:
        return _from_file(name, datatype, shape, read(wanted.input_data_file))
    if datatype == "STRING":
        return np.full(shape, "", dtype=object).tolist()
    if wanted.random_data and datatype in _FLOATS:
        return random.random(shape).round(3).tolist()
    numbers = random.integers(0, 2, shape) if wanted.random_data else np.zeros(shape, np.int64)
    return (numbers != 0).tolist() if datatype == "BOOL" else numbers.tolist()


def _from_file(name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> Any:  # noqa: ANN401 - likewise
    if datatype == "STRING":
        try:
            texts = [element.decode() for element in unpack_bytes(name, shape, data).flat]
        except UnicodeDecodeError:
            raise InvalidRequest(f"input {name!r}: expected UTF-8 strings, got other bytes") from None
        return np.array(texts, dtype=object).reshape(shape).tolist()
    dtype = DTYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidRequest(
            f"input {name!r}: expected {expected} bytes of {datatype}{list(shape)}, got {len(data)}"
        )
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    if datatype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    if datatype in _FLOATS and not np.isfinite(array).all():
        raise InvalidRequest(f"input {name!r}: expected finite numbers, which JSON can carry, got others")
    return array.tolist()
