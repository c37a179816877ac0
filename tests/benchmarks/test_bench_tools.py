"""The C programs of the benchmark, and the verdicts: a figure that is computed wrongly is worse than none."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
REQUEST = b"GET /00000000 HTTP/1.1\r\n\r\n"


@pytest.fixture(scope="session")
def compiler():
    return shutil.which("cc") or pytest.skip("no C compiler")


@pytest.fixture(scope="session")
def programs(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    for name in ("loadgen", "pingpong"):
        flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run([compiler, *flags, "-o", folder / name, BENCHMARKS / f"{name}.c"], check=True)
    return folder


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def loadgen(programs, address, request, *options):
    command = [programs / "loadgen", address, request, *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return result, json.loads(result.stdout or "{}")


@contextlib.contextmanager
def scripted_server(path, reply):
    """One connection at a time; `reply(n)` answers request n, None hangs up. Yields the requests."""
    seen: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                while request := connection.recv(len(REQUEST), socket.MSG_WAITALL):
                    seen.append(request)
                    answer = reply(len(seen))
                    if answer is None:
                        break
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        # shutdown wakes the accept; close alone would leave it waiting.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture
def request_file(tmp_path):
    file = tmp_path / "request"
    file.write_bytes(REQUEST)
    return file


def test_the_floor_answers_every_connection(programs, tmp_path, request_file):
    answer = tmp_path / "answer"
    answer.write_bytes(ANSWER)
    address = f"unix:{tmp_path / 'p.sock'}"
    command = [programs / "pingpong", address, str(len(REQUEST)), answer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as floor:
        assert floor.stdout.readline() == "listening\n"
        _, one = loadgen(programs, address, request_file, "-n", 50, "-w", 0)
        _, many = loadgen(programs, address, request_file, "-n", 500, "-w", 0, "-c", 16)
        floor.terminate()
    for printed, least in ((one, 50), (many, 500)):
        assert printed["requests"] >= least
        assert printed["errors"] == 0
        assert 0 < printed["p50_us"] <= printed["p90_us"] <= printed["p99_us"] <= printed["max_us"]


def test_refused_requests_are_errors_and_have_no_latency(programs, tmp_path, request_file):
    with scripted_server(tmp_path / "s", lambda count: ANSWER if count % 2 else REFUSAL):
        _, printed = loadgen(programs, f"unix:{tmp_path / 's'}", request_file, "-n", 20, "-w", 0)
    assert (printed["requests"], printed["errors"]) == (10, 10)


def test_a_connection_that_ends_early_is_an_error_and_is_opened_again(programs, tmp_path, request_file):
    with scripted_server(tmp_path / "s", lambda count: None if count == 3 else ANSWER):
        _, printed = loadgen(programs, f"unix:{tmp_path / 's'}", request_file, "-n", 10, "-w", 0)
    assert (printed["requests"], printed["errors"]) == (9, 1)


def test_an_answer_in_pieces_is_one_answer(programs, tmp_path, request_file):
    big = b"HTTP/1.1 200 OK\r\nContent-Length: 700000\r\n\r\n" + bytes(700_000)
    with scripted_server(tmp_path / "s", lambda _: big):
        _, printed = loadgen(programs, f"unix:{tmp_path / 's'}", request_file, "-n", 5, "-w", 0)
    assert (printed["requests"], printed["errors"]) == (5, 0)


def test_sequence_numbers_make_every_request_different(programs, tmp_path, request_file):
    options = ("-n", 12, "-w", 0, "-s", REQUEST.index(b"00000000"))
    with scripted_server(tmp_path / "s", lambda _: ANSWER) as seen:
        loadgen(programs, f"unix:{tmp_path / 's'}", request_file, *options)
    assert len(set(seen)) == len(seen) >= 12
    assert seen[11] == b"GET /00000011 HTTP/1.1\r\n\r\n"


def test_no_answer_at_all_is_a_failure(programs, tmp_path, request_file):
    result, _ = loadgen(programs, f"unix:{tmp_path / 'nobody'}", request_file)
    assert result.returncode == 1
    assert "cannot connect to" in result.stderr


def test_a_table_shows_medians_and_the_range_of_the_rounds(harness):
    load, tools = harness("harness.load"), harness("harness.tools")
    rounds = [
        tools.Sample(requests=9, errors=e, rps=r, p50_us=p, p90_us=p, p99_us=2 * p, max_us=9e9)
        for e, r, p in ((0, 100.0, 30.0), (1, 300.0, 10.0), (2, 200.0, 20.0))
    ]
    row = load._row("x", 16, rounds)
    assert (row.p50_us, row.p50_low_us, row.p50_high_us) == (20.0, 10.0, 30.0)
    assert (row.p99_us, row.rps, row.errors) == (40.0, 200.0, 3)


def test_targets_are_judged_by_the_mlp_and_its_own_floor(harness):
    report, suites, load = harness("harness.report"), harness("harness.suites"), harness("harness.load")

    def row(name, connections, p50_us, rps=0.0):
        return load.Row(name, connections, p50_us, p50_us, p50_us, p50_us, rps, 0)

    results = suites.Results()
    results.pinned = {
        "tiny": [row(suites.FLOOR, 1, 10.0), row(suites.TINY, 1, 41.0)],
        "real": [row(suites.FLOOR, 1, 20.0), row(suites.REAL, 1, 4000.0)],
    }
    results.load = {"tiny": [row(suites.TINY, 16, 99.0, rps=25_000.0), row(suites.TINY, 64, 99.0, rps=1.0)]}
    ratio, rate, *unmeasured = report.verdicts(results)
    assert (ratio.measured, ratio.met) == ("4.1 x", False)
    assert (rate.measured, rate.met) == ("25,000 requests/s", True)
    assert [each.met for each in unmeasured] == [None, None, None]


def test_a_rate_with_errors_meets_no_target(harness):
    report, suites, load = harness("harness.report"), harness("harness.suites"), harness("harness.load")
    results = suites.Results()
    results.load = {"tiny": [load.Row(suites.TINY, 16, 1.0, 1.0, 1.0, 1.0, 1e6, 3)]}
    rate = report.verdicts(results)[1]
    assert (rate.measured, rate.met) == ("1,000,000 requests/s, 3 errors", False)


def test_an_infer_request_says_how_long_its_parts_are(harness):
    requests = harness("bench_requests")
    whole = requests.numbered_infer_request("m", [requests.mlp_input()])
    head, _, body = whole.partition(b"\r\n\r\n")
    lengths = dict(line.split(b": ") for line in head.split(b"\r\n")[1:])
    json_size = int(lengths[b"Inference-Header-Content-Length"])
    assert int(lengths[b"Content-Length"]) == len(body) == json_size + 64 * 4
    assert json.loads(body[:json_size])["inputs"][0]["parameters"]["binary_data_size"] == 64 * 4
    assert whole.count(requests.SEQUENCE) == 1


@pytest.mark.slow
def test_the_benchmark_runs_from_end_to_end(compiler, tmp_path):
    output = tmp_path / "RESULTS.md"
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert result.returncode == 0, result.stdout + result.stderr
    text = output.read_text()
    assert "A quick run" in text
    for title in ("## Targets", "## Memory", "## Waiting times", "### Magika"):
        assert title in text
