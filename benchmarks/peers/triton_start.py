"""Start Triton's own binary, out of nvidia-pytriton's wheel, with its Python backend.

Arguments: a folder for its model repository, the HTTP port, the gRPC port, the number of instances.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import model
import pytriton

HERE = Path(__file__).resolve().parent
PACKAGE = Path(pytriton.__file__).parent
_TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32", "int64": "TYPE_INT64"}


def main() -> None:
    """Lay out a repository and become the server."""
    folder, http_port, grpc_port, instances = Path(sys.argv[1]), *sys.argv[2:5]
    shutil.rmtree(folder, ignore_errors=True)
    version = folder / "models" / "m" / "1"
    version.mkdir(parents=True)
    shutil.copy(HERE / "triton_model.py", version / "model.py")
    # Under its own name it would be what the backend imports as "model".
    shutil.copy(HERE / "model.py", folder / "peer_model.py")
    (version.parent / "config.pbtxt").write_text(_config(instances))
    os.environ["BENCH_PATH"] = os.pathsep.join(
        [str(folder), *(path for path in sys.path if "site-packages" in path)]
    )
    libraries = str(PACKAGE.parent / "nvidia_pytriton.libs")
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([libraries, os.environ.get("LD_LIBRARY_PATH", "")])
    triton = PACKAGE / "tritonserver"
    program = triton / "bin" / "tritonserver"
    options = {
        "model-repository": folder / "models",
        "backend-directory": _backend(triton, folder),
        "http-address": "127.0.0.1",
        "http-port": http_port,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc_port,
        "allow-metrics": "false",
        "log-info": "false",
    }
    os.execv(  # noqa: S606 - becoming the server is the point
        program, [program.name, *(f"--{name}={value}" for name, value in options.items())]
    )


def _backend(triton: Path, folder: Path) -> Path:
    """The Python backend with the stub for this interpreter: the wheel keeps the two apart."""
    backends = folder / "backends"
    shutil.copytree(triton / "backends" / "python", backends / "python")
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / release / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    return backends


def _config(instances: str) -> str:
    inputs = ", ".join(_tensor(name, shape, _TYPES[dtype.name]) for name, shape, dtype in model.INPUTS)
    output = _tensor(model.OUTPUT_NAME, model.OUTPUT_SHAPE, "TYPE_FP32")
    batching = "dynamic_batching {}\n" if model.MAX_BATCH > 1 else ""
    return (
        f'name: "m"\nbackend: "python"\nmax_batch_size: {model.MAX_BATCH}\n'
        f"input [{inputs}]\noutput [{output}]\n{batching}"
        f"instance_group [{{count: {instances} kind: KIND_CPU}}]\n"
    )


def _tensor(name: str, shape: tuple[int, ...] | list[int], datatype: str) -> str:
    return f'{{name: "{name}" data_type: {datatype} dims: [{", ".join(map(str, shape))}]}}'


if __name__ == "__main__":
    main()
