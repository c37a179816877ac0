"""Find the devices that could run a model, in a child process that a driver may crash.

Does: the child (forked from the zygote, or `python -m providers.discovery`), which registers the installed plugins
and prints one JSON document; the parent's `discover`, which runs it and believes it only if all is in order.
Leaves out: the order of devices (providers.ranking) and whether they work (providers.placement).

Rules
 * The parent never imports onnxruntime.
 * The CPU provider is always in the answer, whatever happened to the child.
 * What could not be registered or used is in the answer as well, with the reason.
 * Every field of a device is copied at once: a device object that outlives its plugin is a dangling pointer.
 * Providers compiled into the core say nothing of the hardware, and without it run on the CPU in silence; so
   such a target counts as found when a session of one node on it did start.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from providers import catalog
from providers.ranking import CPU, EpDevice, Excluded, screen
from skerry.errors import ExecutionFailed
from skerry.terms import KIB, MIB, DeviceKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from providers.catalog import Provider
    from providers.launcher import Launcher

_Ort = Any  # the onnxruntime module, which has no types

MAX_ANSWER_BYTES = 1 * MIB  # a device takes about 1 KiB, most of it the provider's metadata
MAX_NOISE_BYTES = 4 * KIB  # of stderr, for the reason; drivers can be talkative
_KINDS = frozenset(kind.value for kind in DeviceKind)

MAX_METADATA = 64  # entries of one device, each at most MAX_VALUE_CHARS
MAX_VALUE_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Discovery:
    """What is there.

    Attributes:
        devices: candidates, in no order; the CPU provider is always among them.
        excluded: what was found and is no candidate.
        onnxruntime: the core's version; "" if the child failed.
        providers: the core's own list of providers, for the record: being on it proves nothing.
        problem: why this answer is the CPU alone; "" if the child did its work.
    """

    devices: tuple[EpDevice, ...]
    excluded: tuple[Excluded, ...] = ()
    onnxruntime: str = ""
    providers: tuple[str, ...] = ()
    problem: str = ""


# --- the parent ------------------------------------------------------------------------------------------


class _Child(NamedTuple):
    """A process that answers on one stream and complains on the other."""

    pid: int
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader
    wait: Callable[[], Awaitable[int]]
    close: Callable[[], None]


async def discover(
    timeout_s: float,
    plugins: Sequence[str] = (),
    *,
    launcher: Launcher | None = None,
    command: Sequence[str] = (),
) -> Discovery:
    """Run the child and return what it found. Never raises for what the child does.

    Args:
        timeout_s: seconds until the child is killed.
        plugins: distributions that may be used; empty: all installed ones but the catalogue's explicit ones.
        launcher: whose zygote the child is forked from, which saves importing onnxruntime again. None: a fresh
            interpreter.
        command: what to run instead of this module, for tests.
    """
    try:
        child = await (_fork(launcher, plugins) if launcher else _spawn(command, plugins))
    except (OSError, ExecutionFailed) as error:
        return _cpu_alone(f"discovery: expected a child process, got {error}")
    try:
        answer, noise = await asyncio.wait_for(_finish(child), timeout_s)
    except TimeoutError:
        return _cpu_alone(f"discovery: expected an answer within {timeout_s:g} s, got none; child killed")
    finally:
        _kill(child.pid)
        returncode = await child.wait()
        child.close()
    return _believe(returncode, answer, noise)


async def _spawn(command: Sequence[str], plugins: Sequence[str]) -> _Child:
    # -P: whoever can write to the daemon's working directory must not be able to plant a module there.
    argv = [*(command or (sys.executable, "-P", "-m", "providers.discovery")), *plugins]
    # OpenBLAS would otherwise start a thread per core for numpy, which is not used here.
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
        start_new_session=True,  # so that a driver's own helper processes can be killed with it
    )
    assert child.stdout is not None and child.stderr is not None  # noqa: S101, PT018 - both were asked for above
    return _Child(child.pid, child.stdout, child.stderr, child.wait, lambda: None)


async def _fork(launcher: Launcher, plugins: Sequence[str]) -> _Child:
    # Not pipes: uvloop closes the descriptor of a pipe twice, and by then it may be a model's.
    with contextlib.ExitStack() as undo:
        with contextlib.ExitStack() as theirs:
            ours, ends = [], []
            for _ in range(2):
                reading, writing = socket.socketpair()
                ours.append(undo.enter_context(reading))
                ends.append(theirs.enter_context(writing).fileno())
            process = await launcher.look((ends[0], ends[1]), plugins)
        streams = [await asyncio.open_connection(sock=sock) for sock in ours]
        undo.pop_all()

    def close() -> None:
        for _, writer in streams:
            writer.close()

    stdout, stderr = [reader for reader, _ in streams]
    return _Child(process.pid, stdout, stderr, lambda: asyncio.shield(process.exited), close)


async def _finish(child: _Child) -> tuple[bytes, str]:
    answer, noise = await asyncio.gather(
        _read_head(child.stdout, MAX_ANSWER_BYTES + 1),
        _read_head(child.stderr, MAX_NOISE_BYTES),
    )
    await child.wait()
    return answer, noise.decode(errors="replace").strip()


async def _read_head(stream: asyncio.StreamReader, limit: int) -> bytes:
    """The first `limit` bytes. The rest is read as well, or the child would block on a full pipe."""
    head = bytearray()
    while chunk := await stream.read(64 * KIB):
        head += chunk[: limit - len(head)]
    return bytes(head)


def _kill(pid: int) -> None:
    # A group that is gone is what we want. A number is used again only after all others had their turn, so
    # this one is still ours or nobody's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _believe(returncode: int, answer: bytes, noise: str) -> Discovery:
    import msgspec  # noqa: PLC0415 - the child shares this module and must not need it before its first line

    last = f"; it said: {noise.splitlines()[-1][:300]}" if noise else ""
    if returncode < 0:
        return _cpu_alone(
            f"discovery: expected an answer, got a child that died of {_signal_name(-returncode)}{last}"
        )
    if returncode > 0:
        return _cpu_alone(f"discovery: expected an answer, got a child that exited with {returncode}{last}")
    if len(answer) > MAX_ANSWER_BYTES:
        return _cpu_alone(f"discovery: expected at most {MAX_ANSWER_BYTES} bytes from the child, got more")
    try:
        found = msgspec.json.decode(answer, type=Discovery)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _cpu_alone(
            f"discovery: expected a JSON document from the child, got {answer[:80]!r} ({error})"
        )
    return (
        found
        if any(d.route == "builtin" for d in found.devices)
        else replace(found, devices=(*found.devices, CPU))
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cpu_alone(problem: str) -> Discovery:
    return Discovery(devices=(CPU,), problem=problem)


# --- the child -------------------------------------------------------------------------------------------


def look(plugins: Sequence[str] = ()) -> Discovery:
    """Import onnxruntime, register plugins and describe every device. For a process that ends soon after.

    Args:
        plugins: as for `discover`.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import; afterwards its files exist already
    import onnxruntime as ort  # noqa: PLC0415 - only the child may

    in_wheel: tuple[str, ...] = tuple(ort.get_available_providers())
    libraries, excluded = _register_plugins(ort, plugins)
    listed, strange = _describe(ort, libraries)
    classic, absent = _classic_devices(ort, in_wheel)
    devices, screened = screen([*listed, *classic])
    if not any(device.route == "builtin" for device in devices):
        devices.append(CPU)
    return Discovery(
        devices=tuple(devices),
        excluded=(*excluded, *strange, *absent, *screened),
        onnxruntime=ort.__version__,
        providers=in_wheel,
    )


def _register_plugins(ort: _Ort, allowed: Sequence[str]) -> tuple[dict[str, str], list[Excluded]]:
    """Register the installed plugins. Returns provider name -> library, and the failures."""
    libraries: dict[str, str] = {}
    excluded = [
        Excluded(name, f"expected one of {', '.join(catalog.PLUGIN_NAMES)}")
        for name in allowed
        if name not in catalog.PLUGIN_NAMES
    ]
    for entry in catalog.PROVIDERS:
        if entry.route != "plugin":
            continue
        named = entry.distribution in allowed
        if importlib.util.find_spec(entry.module) is None:
            if named:
                excluded.append(
                    Excluded(entry.distribution, f"not installed; pip install {entry.distribution}")
                )
        elif allowed and not named:
            excluded.append(Excluded(entry.distribution, "providers.plugins does not name it"))
        elif entry.explicit and not named:
            excluded.append(Excluded(entry.distribution, "used only when providers.plugins names it"))
        else:
            try:
                libraries[entry.ep_name] = _register(ort, entry)
            except Exception as error:  # noqa: BLE001 - a vendor's package may raise anything, and it is only a reason
                excluded.append(Excluded(entry.distribution, f"registration failed: {_first_line(error)}"))
    return libraries, excluded


def _register(ort: _Ort, entry: Provider) -> str:
    module = importlib.import_module(entry.module)
    name = module.get_ep_name()
    if name != entry.ep_name:
        msg = f"expected a provider named {entry.ep_name}, got {name!r}"
        raise ValueError(msg)
    library = str(module.get_library_path())
    # Some plugins call their devices by the name of the registration, so it must be the provider's.
    ort.register_execution_provider_library(name, library)
    return library


def _describe(ort: _Ort, libraries: dict[str, str]) -> tuple[list[EpDevice], list[Excluded]]:
    """Every device that the core lists, as plain data."""
    if not hasattr(ort, "get_ep_devices"):  # before 1.22
        return [], []
    devices: list[EpDevice] = []
    excluded: list[Excluded] = []
    seen: dict[tuple[str, str, int, int], int] = {}
    for found in ort.get_ep_devices():
        kind = found.device.type.name.lower()
        key = (found.ep_name, kind, found.device.vendor_id, found.device.device_id)
        index = seen.get(key, 0)
        seen[key] = index + 1
        if kind not in _KINDS:
            excluded.append(Excluded(found.ep_name, f"expected a device of kind npu, gpu or cpu, got {kind}"))
            continue
        metadata = _short({**dict(found.device.metadata), **dict(found.ep_metadata)})
        library = libraries.get(found.ep_name.split(".")[0], "")
        devices.append(
            EpDevice(
                ep_name=found.ep_name,
                kind=DeviceKind(kind),
                route="plugin" if library else "builtin",
                ep_vendor=found.ep_vendor,
                ep_version=metadata.get("version", ""),
                vendor=found.device.vendor,
                vendor_id=found.device.vendor_id,
                device_id=found.device.device_id,
                integrated=kind == DeviceKind.GPU and _is_integrated(found.device.vendor_id, metadata),
                library=library,
                options=dict(found.ep_options),
                metadata=metadata,
                index=index,
            )
        )
    return devices, excluded


def _is_integrated(vendor_id: int, metadata: dict[str, str]) -> bool:
    if "DEVICE_TYPE" in metadata:  # OpenVINO asked the driver
        return metadata["DEVICE_TYPE"] == "integrated"
    if "Discrete" in metadata:  # the core's own guess
        return metadata["Discrete"] != "1"
    # Nobody knows: NVIDIA and AMD sell cards in the first place, all others put the GPU beside the CPU.
    return vendor_id not in {catalog.VENDOR_NVIDIA, catalog.VENDOR_AMD}


def _short(metadata: dict[str, str]) -> dict[str, str]:
    return {
        key[:MAX_VALUE_CHARS]: value[:MAX_VALUE_CHARS] for key, value in list(metadata.items())[:MAX_METADATA]
    }


def _classic_devices(ort: _Ort, in_wheel: Sequence[str]) -> tuple[list[EpDevice], list[Excluded]]:
    """Targets of the providers inside the core on which a session of one node did start."""
    devices: list[EpDevice] = []
    excluded: list[Excluded] = []
    for name in in_wheel:
        entry = catalog.find(name, "classic")
        if name == catalog.CPU_PROVIDER:
            continue
        if entry is None:
            excluded.append(
                Excluded(name, catalog.REFUSED.get(name, "this provider is not in the catalogue"))
            )
            continue
        for target in entry.targets:
            problem = _start(ort, name, target.options)
            if problem:
                excluded.append(Excluded(f"{name} on {target.kind.upper()}", problem))
            else:
                devices.append(
                    EpDevice(ep_name=name, kind=target.kind, route="classic", ep_version=ort.__version__)
                )
    return devices, excluded


def _start(ort: _Ort, name: str, options: dict[str, str]) -> str:
    try:
        session = ort.InferenceSession(catalog.ONE_NODE, providers=[(name, options)], enable_fallback=0)
    except Exception as error:  # noqa: BLE001 - a driver may raise anything, and it is only a reason
        return f"a session of one node failed: {_first_line(error)}"
    if name not in session.get_providers():
        return "a session of one node ran on the CPU instead: no such device, or its driver does not work"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def run_forked(answer: int, noise: int, arguments: Sequence[str]) -> None:
    """The child, forked: like a spawned one, it leads a session of its own and has these two descriptors only."""
    os.setsid()
    os.dup2(answer, 1)
    os.dup2(noise, 2)
    main(arguments)


def main(arguments: Sequence[str]) -> None:
    """The child: print one JSON document on what was stdout, and send everything else to stderr."""
    import msgspec  # noqa: PLC0415 - see _believe

    answer = os.dup(1)
    os.dup2(2, 1)  # onnxruntime and the drivers print where they like
    document = msgspec.json.encode(look(arguments))
    with os.fdopen(answer, "wb") as out:
        out.write(document)


if __name__ == "__main__":
    main(sys.argv[1:])
