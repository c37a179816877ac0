"""Start MLServer on the model.

Arguments: a folder for its settings, the HTTP port, the gRPC port, and one that is not used.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import model

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write the settings and become the server."""
    folder, http_port, grpc_port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "host": "127.0.0.1",
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_endpoint": None,
        "parallel_workers": 0,  # a worker process halves what MLServer does with quick models
        "access_log": False,
    }
    about = {"name": "m", "implementation": "mlserver_runtime.Runtime"}
    if model.MAX_BATCH > 1:
        about |= {"max_batch_size": model.MAX_BATCH, "max_batch_time": 0.001}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(about))
    os.environ["PYTHONPATH"] = str(HERE)
    program = Path(sys.executable).with_name("mlserver")
    os.execv(program, [str(program), "start", str(folder)])  # noqa: S606 - becoming the server is the point


if __name__ == "__main__":
    main()
