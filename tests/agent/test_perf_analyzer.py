"""Triton's perf_analyzer, unmodified, measures a daemon over TCP. `packaging/perf-analyzer.sh` fetches the program."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import zoo
from node import free_port, temporary_node

PROGRAM = Path(
    os.environ.get("SKERRY_PERF_ANALYZER") or Path(__file__).parents[2] / ".venv-perf/bin/perf_analyzer"
).absolute()
pytestmark = pytest.mark.skipif(
    not PROGRAM.exists(), reason=f"{PROGRAM} is not there; make test-perf fetches it"
)


@pytest.fixture(scope="module")
def node():
    port = free_port()
    with temporary_node() as node:
        node.port = port
        node.configure(f"ipc:\n  tcp: 127.0.0.1:{port}\n")
        node.add(zoo.mlp(), "whole")
        node.add(zoo.mlp(), "batched", batching={"max_batch_size": 8})
        yield node.start()
        assert node.stop() == 0


def measure(node, model, *arguments):
    """What the program says: requests sent, and how many of them the server counted."""
    quick = [
        "--measurement-mode",
        "count_windows",
        "--measurement-request-count",
        "20",
        "-s",
        "999",
        "-p",
        "50",
    ]
    command = [str(PROGRAM), "-m", model, "-u", f"127.0.0.1:{node.port}", *quick, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    sent = re.search(r"Request count: (\d+)", run.stdout)
    counted = re.search(r"Successful request count: (\d+)", run.stdout)
    assert sent, run.stdout
    assert counted, run.stdout
    return int(sent[1]), int(counted[1])


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("whole", ["--shape", "input:3,64", "-a", "--concurrency-range", "2:2"]),
        ("batched", ["-b", "4"]),
        (
            "whole",
            ["--shape", "input:3,64", "--shared-memory", "system", "--output-shared-memory-size", "4096"],
        ),
    ],
)
def test_it_measures_the_daemon_and_reads_its_statistics(node, model, arguments):
    sent, counted = measure(node, model, *arguments)
    assert sent >= 20
    # The two do not begin and end at the same moment.
    assert counted >= sent * 0.9
