"""Build and run one ONNX Runtime session. For worker processes only.

Does: session options with their reasons, the three routes to a provider, and what was really placed where.
Leaves out: bytes and arrays (providers.arrays), which device to use (providers.ranking), whether it computes
right (providers.probe), limits and requests (providers.worker).

Rules
 * onnxruntime is imported when a session is built, by which time its telemetry is off.
 * A provider that quietly gave way to the CPU is an error: what was asked for, or nothing.
 * `Session.run` is ONNX Runtime's own method, not a wrapper, unless the model has BF16, which numpy has not.
 * BF16 is a uint16 array of the same bits, everywhere on our side.

Source: https://onnxruntime.ai/docs/api/python/api_summary.html
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from providers import catalog
from providers.arrays import dtype_of, numpy_dtype, raw_size, to_array, write_raw
from providers.sidefiles import NOTHING, Beside
from skerry.errors import ExecutionFailed, Unsupported
from skerry.terms import TensorSpec, element_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from providers.arrays import Array
    from providers.ranking import EpDevice

# A worker needs the conversions wherever it needs a session.
__all__ = ["Run", "Session", "numpy_dtype", "raw_size", "to_array", "write_raw"]

_Ort = Any  # the onnxruntime module and its objects, which have no types

_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}
_NO_MEMORY = re.compile(r"[Ff]ailed to allocate memory|bad_alloc|bad allocation")
_TENSOR = re.compile(r"tensor\((\w+)\)")

#: Plugins that this process has; a quick model's session is built a second time, with one thread.
_registered: set[str] = set()

# TensorProto.DataType -> numpy; what is not here (BFLOAT16, FLOAT8*, INT4, …) numpy does not have.
_ELEMENTS = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8", 12: "<u4",
    13: "<u8",
}  # fmt: skip
_ONNX_BF16 = 16  # TensorProto.BFLOAT16
_LOG_FATAL = 4  # whatever is worth knowing is raised as well; the log would only repeat it in colours
_LOG_ERROR = 3

#: How long a thread of a session that spins waits for the next node before it sleeps. Most nodes follow within this,
#: and waking a thread costs more; a neighbour that needs the core loses no more. Five times as much gained nothing.
SPIN_US = 20
#: Cores of which this is known to be obeyed; older ones ignore it, and would spin for milliseconds.
_SPIN_DURATION_SINCE = (1, 27)


class Run(Protocol):
    """How a session is run."""

    def __call__(
        self, names: Sequence[str], feeds: Mapping[str, Array], run_options: object | None, /
    ) -> list[Array]:
        """Run once.

        Args:
            names: outputs to compute, at least one.
            feeds: every input -> array, as `to_array` makes them. Borrowed until this returns. A missing
                one reaches a kernel as no data, so the caller checks that all are there.
            run_options: onnxruntime.RunOptions, or None.

        Returns: arrays in the order of `names`, owned by the caller. BYTES are arrays of str.
        """


class Session:
    """A model on a device.

    Args:
        model_path: the file; may be /proc/self/fd/N. Read while this is built and not needed afterwards.
        device: where it shall run.
        threads: threads of one run, at least 1.
        spin: they wait a moment for work inside a run before they sleep (SPIN_US), never between runs. Where several
            runs go on at once, each would take cores from the others.
        beside: what lies beside the model file, for the values that it does not have itself. Read while this is built
            and not needed afterwards.

    Attributes:
        inputs, outputs: as the model declares them; -1 for a dimension it leaves open.
        nodes_total: nodes after the optimisations that come before placement; None if the core cannot say.
        nodes_placed: those of them on the device's provider; None likewise.
        placement: provider -> nodes; empty if the core cannot say.
        run: see `Run`. What it raises is ONNX Runtime's, and derives from Exception only.

    Raises:
        ExecutionFailed: the provider cannot take the model, or is not there.
        Unsupported: an input or output is something the protocol has no datatype for, or this core does not take files
            beside a model.
    """

    __slots__ = ("_session", "inputs", "nodes_placed", "nodes_total", "outputs", "placement", "run")

    def __init__(
        self,
        model_path: str,
        device: EpDevice,
        threads: int,
        *,
        spin: bool = False,
        beside: Beside = NOTHING,
    ) -> None:
        session = self._session = _create(model_path, device, threads, spin=spin, beside=beside)
        self.inputs = tuple(_spec("input", declared) for declared in session.get_inputs())
        self.outputs = tuple(_spec("output", declared) for declared in session.get_outputs())
        placement = _placement(session)
        self.placement = placement or {}
        self.nodes_total = None if placement is None else sum(placement.values())
        self.nodes_placed = None if placement is None else placement.get(device.ep_name, 0)
        datatypes = {spec.datatype for spec in (*self.inputs, *self.outputs)}
        if "BF16" not in datatypes:
            # InferenceSession.run only adds checks that the daemon has done already; they take a third of the
            # time of a small model. Being bound to the inner session, this keeps it alive as well.
            self.run: Run = session._sess.run  # noqa: SLF001 - there is no public way past the checks
        elif any(spec.datatype == "BYTES" for spec in self.inputs):
            raise Unsupported(
                "model: expected inputs of BYTES or of tensors with BF16, got both",
                "ONNX Runtime's Python cannot pass strings beside BF16; cast one of them inside the model",
            )
        else:
            self.run = _Bf16Run(
                session, frozenset(spec.name for spec in self.inputs if spec.datatype == "BF16")
            )

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Callable[[object | None], None]:
        """A run that reads and writes the same memory every time, which saves a third of a tiny model's run.

        Args:
            inputs: every input -> array of the CPU's memory, C order; not BYTES, not BF16.
            outputs: wanted outputs -> arrays to be filled, likewise; their shapes must be what the run yields.
                The memory behind all of them must stay for as long as the run is used; the arrays need not.

        Returns: takes onnxruntime.RunOptions or None; raises what ONNX Runtime raises.
        """
        from onnxruntime import OrtValue  # noqa: PLC0415 - see the module's rules

        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        # Past the public wrapper for the same reason as in `run`.
        return functools.partial(self._session._sess.run_with_iobinding, binding._iobinding)  # noqa: SLF001


def is_out_of_memory(error: Exception) -> bool:
    """Whether ONNX Runtime, or numpy, says that an allocation failed: it has no error of its own for that."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


class _Bf16Run:
    """Runs a model with BF16 through OrtValues, which know the type that numpy lacks."""

    __slots__ = ("_bf16_inputs", "_session", "_value")

    def __init__(self, session: _Ort, bf16_inputs: frozenset[str]) -> None:
        from onnxruntime import OrtValue  # noqa: PLC0415 - see the module's rules

        self._session = session
        self._bf16_inputs = bf16_inputs
        self._value = OrtValue

    def __call__(
        self, names: Sequence[str], feeds: Mapping[str, Array], run_options: object | None, /
    ) -> list[Array]:
        values = {name: self._wrap(name, array) for name, array in feeds.items()}
        outputs = self._session.run_with_ort_values(list(names), values, run_options)
        return [_unwrap(value) for value in outputs]

    def _wrap(self, name: str, array: Array) -> _Ort:
        # No copy is made, so the value must not outlive the array: `values` above does not.
        array = np.asarray(array, order="C")
        if name in self._bf16_inputs:
            return self._value.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BF16)
        return self._value.ortvalue_from_numpy(array)


def _unwrap(value: _Ort) -> Array:
    if value.element_type() != _ONNX_BF16:
        array: Array = value.numpy()
        return array
    # numpy() and DLPack both refuse BF16. Outputs of a run are in the CPU's memory, so their address will do;
    # string_at copies, so the array owns its bytes when the value goes.
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.ndarray(tuple(value.shape()), dtype_of("BF16"), raw)


# --- building ----------------------------------------------------------------------------------------------


def _create(model_path: str, device: EpDevice, threads: int, *, spin: bool, beside: Beside) -> _Ort:
    os.environ["ORT_DISABLE_TELEMETRY"] = (
        "1"  # before the first import; files and a thread would come with it
    )
    import onnxruntime as ort  # noqa: PLC0415 - see the module's rules

    ort.set_default_logger_severity(_LOG_ERROR)
    options = _options(ort, threads, spin=spin)
    if beside.files:
        _lay_beside(ort, options, beside)
    providers = _providers(ort, options, device, threads)
    try:
        # enable_fallback=0: by default a provider that fails is replaced by the CPU, with a line on stdout.
        session = ort.InferenceSession(model_path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ORT's errors share no base class, and plugins raise others
        raise ExecutionFailed(f"{device.label} cannot load the model: {_text(error)}") from error
    if device.ep_name not in session.get_providers():
        got = ", ".join(session.get_providers())
        raise ExecutionFailed(
            f"{device.label}: expected a session on it, got one on {got}",
            "no such device, or its driver does not work; the worker's log has the provider's own words",
        )
    return session


def _options(ort: _Ort, threads: int, *, spin: bool) -> _Ort:
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = (
        1  # one run at a time, node after node: a second pool would only cost memory
    )
    if spin and tuple(map(int, ort.__version__.split(".")[:2])) >= _SPIN_DURATION_SINCE:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        options.add_session_config_entry("session.force_spinning_stop", "1")  # when a run ends
    else:
        # Threads that spin without such bounds cost four times the CPU time at 20 requests a second.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The list of providers is no evidence of where nodes are; this is. Cores that lack it ignore the entry.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _lay_beside(ort: _Ort, options: _Ort, beside: Beside) -> None:
    """Have the session find the model's external data in memory (providers.sidefiles has the reasons).

    Nothing here keeps that memory: it has to stay until the session is built.
    """
    files = beside.files
    take = getattr(options, "add_external_initializers_from_files_in_memory", None)
    if take is None:
        raise Unsupported(
            f"model: expected an onnxruntime that takes files beside a model from memory, got {ort.__version__}",
            "update the core, or save the model as one file",
        )
    take(list(files), list(files.values()), [len(content) for content in files.values()])
    arrays = {}
    for tensor in beside.tensors:
        dtype = _ELEMENTS.get(tensor.data_type)
        count = element_count(tensor.shape)
        with contextlib.suppress(UnicodeDecodeError):
            if dtype and count:
                values = np.frombuffer(files[tensor.file], dtype, count, tensor.offset).reshape(tensor.shape)
                arrays[tensor.name.decode()] = ort.OrtValue.ortvalue_from_numpy(values)
    options.add_external_initializers(list(arrays), list(arrays.values()))


def _providers(ort: _Ort, options: _Ort, device: EpDevice, threads: int) -> list[Any] | None:
    """Put the device into `options`, or return the list of providers that names it."""
    wanted = {
        **catalog.session_options(device.ep_name, device.route, device.kind, threads),
        **device.options,
    }
    if device.route == "plugin":
        options.add_provider_for_devices([_find(ort, device)], wanted)
        return None
    if device.ep_name not in ort.get_available_providers():
        raise ExecutionFailed(
            f"{device.label}: expected a core with it, got {', '.join(ort.get_available_providers())}",
        )
    return [(device.ep_name, wanted)]


def _find(ort: _Ort, device: EpDevice) -> _Ort:
    """Register the plugin in this process, which can be done once, and find the same device again."""
    if device.ep_name not in _registered:
        try:
            ort.register_execution_provider_library(device.ep_name, device.library)
        except Exception as error:
            raise ExecutionFailed(f"{device.label}: its library does not load: {_text(error)}") from error
        _registered.add(device.ep_name)
    same = [
        found
        for found in ort.get_ep_devices()
        if (found.ep_name, found.device.vendor_id, found.device.device_id)
        == (device.ep_name, device.vendor_id, device.device_id)
        and found.device.type.name.lower() == device.kind
    ]
    if device.index >= len(same):
        raise ExecutionFailed(
            f"{device.label}: expected at least {device.index + 1} such devices, got {len(same)}",
            "it was there when devices were discovered",
        )
    return same[device.index]


def _placement(session: _Ort) -> dict[str, int] | None:
    # New in 1.24; a core without it leaves the question open, and placement says so.
    get = getattr(session, "get_provider_graph_assignment_info", None)
    if get is None:
        return None
    counts: dict[str, int] = {}
    for part in get():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def _spec(what: str, declared: _Ort) -> TensorSpec:
    match = _TENSOR.fullmatch(declared.type)
    datatype = _DATATYPES.get(match[1]) if match else None
    if datatype is None:
        raise Unsupported(
            f"{what} {declared.name!r}: expected a tensor of {', '.join(_DATATYPES)}, got {declared.type}",
            "sequences, maps and optionals have no form in the Open Inference Protocol; "
            "for scikit-learn classifiers, export with the option zipmap=False",
        )
    # Names, None and '?' all mean that the request chooses.
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in declared.shape)
    return TensorSpec(declared.name, datatype, shape)


def _text(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__)[:2000]
