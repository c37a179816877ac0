"""`skerry infer`: one request, from files or from numbers typed on the command line.

Rules
 * The model's metadata says the datatype, so that `x=[[1,2]]` means what the model wants.
 * A .npy file is read without pickle: it is data, never code.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli import render
from agent.cli.session import AsJson, print_json, session_of
from skerry.errors import InvalidRequest, NotFound
from skerry.terms import GIB, MIB

if TYPE_CHECKING:
    from skerry.arrays import Array
    from skerry.client import Result

MAX_NPY_BYTES = 2 * GIB
MAX_JSON_BYTES = 64 * MIB

# What a line of the table shows of a tensor; --json prints all of it.
_SHOWN_VALUES = 8


def infer(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.", show_default=False)],
    *,
    inputs: Annotated[
        list[str],
        typer.Option("--input", "-i", metavar="NAME=VALUE", help="VALUE is @FILE.npy, @FILE.json or JSON."),
    ],
    outputs: Annotated[
        list[str] | None,
        typer.Option("--output", help="Only this output; may be repeated.", show_default=False),
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="The one served if not given.", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="SECONDS", help="Give up after this.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model for one prediction."""
    session = session_of(context)
    with session.client() as client:
        metadata = client.model_metadata(model, version)
        datatypes = {spec["name"]: spec["datatype"] for spec in metadata["inputs"]}
        arrays = _inputs(inputs, datatypes)
        asked = {name: datatypes[name] for name in arrays}
        result = client.infer(
            model, arrays, version=version, outputs=outputs or None, datatypes=asked, timeout_s=timeout
        )
    if as_json:
        print_json(_document(result))
        return
    cached = ", remembered" if result.cached else ""
    session.remarks.print(f"{result.model_name}/{result.model_version}{cached}", markup=False)
    rows = [
        [
            name,
            result.datatypes[name],
            str(list(array.shape)),
            _preview(_readable(array, result.datatypes[name])),
        ]
        for name, array in result.outputs.items()
    ]
    session.console.print(render.table(["OUTPUT", "DATATYPE", "SHAPE", "VALUES"], rows))


def _inputs(texts: list[str], datatypes: dict[str, str]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for text in texts:
        name, array = _input(text, datatypes)
        if name in arrays:
            raise InvalidRequest(f"--input: expected {name!r} once, got it again")
        arrays[name] = array
    return arrays


def _input(text: str, datatypes: dict[str, str]) -> tuple[str, Array]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidRequest(f"--input: expected NAME=VALUE, got {text[:80]!r}")
    if name not in datatypes:
        raise InvalidRequest(f"--input: expected one of {', '.join(datatypes)}, got {name!r}")
    if not value.startswith("@"):
        return name, _from_json(name, value, datatypes[name])
    path = Path(value[1:])
    limit_bytes = MAX_NPY_BYTES if path.suffix == ".npy" else MAX_JSON_BYTES
    try:
        status = path.stat()
    except OSError as error:
        raise NotFound(f"input {name!r}: {path}: {error.strerror}") from error
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):  # /dev/zero has no end
        raise InvalidRequest(f"input {name!r}: {path}: expected a file, got a device")
    if status.st_size > limit_bytes:
        raise InvalidRequest(f"input {name!r}: expected at most {limit_bytes} bytes, got {status.st_size}")
    if path.suffix == ".npy":
        return name, _from_npy(name, path, datatypes[name])
    try:
        written = path.read_text(errors="replace")
    except OSError as error:
        raise InvalidRequest(f"input {name!r}: {path}: {error.strerror}") from error
    return name, _from_json(name, written, datatypes[name])


def _from_npy(name: str, path: Path, datatype: str) -> Array:
    import numpy as np  # noqa: PLC0415 - with the client, not for `skerry version`

    from skerry.arrays import dtype_of  # noqa: PLC0415 - likewise

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InvalidRequest(
            f"input {name!r}: {path}: expected an .npy file without objects: {error}"
        ) from error
    if datatype == "BYTES":
        return _checked(name, np.asarray(array))
    try:
        return _checked(name, np.asarray(array).astype(dtype_of(datatype), casting="same_kind", copy=False))
    except TypeError:
        raise InvalidRequest(f"input {name!r}: expected {datatype}, got {path} with {array.dtype}") from None


def _from_json(name: str, text: str, datatype: str) -> Array:
    import numpy as np  # noqa: PLC0415 - with the client, not for `skerry version`

    from skerry.arrays import dtype_of  # noqa: PLC0415 - likewise

    try:
        value = json.loads(text)
        if datatype == "BF16":
            return _checked(name, _bfloat16_bits(np.array(value, np.float32)))
        array = np.array(value, dtype_of(datatype))
        if array.dtype.kind in "iu" and np.asarray(value).dtype.kind == "f" and array.size:
            raise ValueError("a number with a fraction or an exponent is no integer")  # noqa: TRY301 - as numpy's
        return _checked(name, array)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidRequest(
            f"input {name!r}: expected JSON that makes {datatype}, got {text[:60]!r} ({error})"
        ) from None


def _checked(name: str, array: Array) -> Array:
    """Refuse what is no tensor: the archive that np.load makes of a zip, ragged rows, a JSON object."""
    if array.dtype.kind == "O" and any(
        not isinstance(item, str | bytes) for item in array.reshape(-1).tolist()
    ):
        raise InvalidRequest(f"input {name!r}: expected text in equally long rows")
    return array


def _bfloat16_bits(array: Array) -> Array:
    """float32 -> the upper half of its bits, rounded to nearest even, as the hardware does."""
    import numpy as np  # noqa: PLC0415 - with the client, not for `skerry version`

    bits = array.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40  # rounding could carry a NaN over into infinity
    return np.where(np.isnan(array), quiet_nan, rounded).astype(np.uint16)


def _readable(array: Array, datatype: str) -> Array:
    """BF16 as numbers, bytes as text."""
    import numpy as np  # noqa: PLC0415 - with the client, not for `skerry version`

    if datatype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if datatype == "BYTES":
        text = np.empty(array.shape, object)
        text.reshape(-1)[:] = [item.decode(errors="backslashreplace") for item in array.reshape(-1)]
        return text
    return array


def _preview(array: Array) -> str:
    values = array.reshape(-1)[:_SHOWN_VALUES].tolist()
    shown = " ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
    return f"{shown} …" if array.size > _SHOWN_VALUES else shown


def _document(result: Result) -> dict[str, Any]:
    return {
        "model": result.model_name,
        "version": result.model_version,
        "cached": result.cached,
        "outputs": {
            name: {
                "datatype": result.datatypes[name],
                "shape": list(array.shape),
                "data": _readable(array, result.datatypes[name]).tolist(),
            }
            for name, array in result.outputs.items()
        },
    }
