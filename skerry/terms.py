"""Skerry's vocabulary: datatypes, tensors on the wire, kinds of device, names of models.

Leaves out: JSON and HTTP (skerry.oip), signed manifests (skerry.manifest).

Datatypes are those of the Open Inference Protocol v2 and Triton's BF16.
Source: https://github.com/kserve/open-inference-protocol, inference_rest.md, "Tensor Data Types".
"""

from __future__ import annotations

import enum
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from skerry.errors import InvalidRequest, TooLarge

if TYPE_CHECKING:
    from collections.abc import Collection

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

#: Bytes per element. BYTES has none: each element carries its own length.
ITEM_SIZES: dict[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": 0,
}

#: Deeper tensors than this are refused; numpy stops at 64, real models at 6.
MAX_RANK = 16

# The name is a path segment on disk, in URLs and in signed metadata: no separators, no leading dot,
# lower and upper case both allowed but never two names that differ only in case (store.registry).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

#: What to do about a model whose values lie in files that cannot be taken.
RESAVE = (
    "save it again with one file beside it: onnx.save(model, path, save_as_external_data=True, "
    'all_tensors_to_one_file=True, location="weights.bin")'
)
#: Files beside a model that hold its values (ONNX calls them external data). Exporters write one, or one per tensor.
MAX_SIDE_FILES = 64

#: Versions are positive; the ceiling keeps them inside SQLite's and JSON's exact integers.
MAX_VERSION = 2**53 - 1


class DeviceKind(enum.StrEnum):
    """What executes: the three kinds that ONNX Runtime tells apart."""

    NPU = "npu"
    GPU = "gpu"
    CPU = "cpu"


class TensorSpec(NamedTuple):
    """What a model declares of one input or output.

    `shape` has -1 for a dimension that the request may choose.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


class TensorView(NamedTuple):
    """Where one tensor lies inside a block of bytes: little endian, C order, from `offset` on.

    For BYTES each element is a four-byte little-endian length and that many bytes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def element_count(shape: tuple[int, ...]) -> int:
    """Elements of a concrete shape; 1 for a scalar."""
    return math.prod(shape)


def check_model_name(name: str) -> str:
    """Return `name`, or raise InvalidRequest that says which characters a model name may have."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"model name: expected 1 to 128 of A-Z a-z 0-9 _ . - and no leading dot, got {name!r}",
        )
    return name


def check_file_names(names: Collection[str]) -> None:
    """Refuse names that files beside a model may not have: one path segment each, as signed metadata will say it.

    Raises:
        InvalidRequest: a name with other characters than a model's may have, or two that differ only in case.
        TooLarge: more than MAX_SIDE_FILES.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                "side file: expected a plain name beside the model, 1 to 128 of A-Z a-z 0-9 _ . - and no leading dot,"
                f" got {name!r}",
                RESAVE,
            )
    if len(names) > MAX_SIDE_FILES:
        raise TooLarge(f"side files: expected at most {MAX_SIDE_FILES}, got {len(names)}", RESAVE)
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise InvalidRequest(
                f"side file: expected {other!r} or a different word, got {name!r}, which differs in case only",
                RESAVE,
            )


def parse_version(text: str) -> int:
    """A version as it stands in a path or on a command line -> a positive integer."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_VERSION))) or not (
        0 < int(text) <= MAX_VERSION
    ):
        raise InvalidRequest(f"model version: expected an integer from 1 to {MAX_VERSION}, got {text!r}")
    return int(text)
