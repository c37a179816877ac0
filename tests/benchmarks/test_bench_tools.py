"""The C programs of the benchmark: a load generator that miscounts is worse than none."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
REQUEST = b"GET /00000000 HTTP/1.1\r\n\r\n"
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]

#: Prints quantiles of the numbers on its input, and the first arrivals of a seed.
PROBE = r"""
#include "arrivals.h"
#include "latencies.h"
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv)
{
    static struct latencies latencies;
    if (argc == 4) {
        struct arrivals arrivals = arrive(strtoull(argv[1], NULL, 10), strtod(argv[2], NULL), 0);
        for (long i = strtol(argv[3], NULL, 10); i > 0; i--, advance(&arrivals))
            printf("%.3f\n", arrivals.next_ns);
        return 0;
    }
    for (unsigned long long ns; scanf("%llu", &ns) == 1;)
        record_latency(&latencies, ns);
    printf("%f %f %f %f\n", mean_us(&latencies), latency_us(&latencies, 0.5), latency_us(&latencies, 0.99),
           (double)latencies.max_ns / 1000);
    return 0;
}
"""


@pytest.fixture(scope="session")
def compiler():
    return shutil.which("cc") or pytest.skip("no C compiler")


@pytest.fixture(scope="session")
def programs(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "probe.c").write_text(PROBE)
    for source in (BENCHMARKS / "loadgen.c", BENCHMARKS / "pingpong.c", folder / "probe.c"):
        command = [compiler, *FLAGS, f"-I{BENCHMARKS}", "-o", folder / source.stem, source, "-lm"]
        subprocess.run(command, check=True)
    return folder


def probe(programs, *arguments, lines=()):
    text = "\n".join(map(str, lines))
    command = [programs / "probe", *map(str, arguments)]
    printed = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return [float(word) for word in printed.split()]


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


def test_requests_vary_byte_by_byte_inside_a_tensor_and_begin_again(programs, tmp_path, request_file):
    # Four bytes, two apart, from offset 5: "GET /" stays, and so does what lies between them.
    options = ("-n", 600, "-w", 0, "-v", "5,2", "-y", 300)
    with scripted_server(tmp_path / "s", lambda _: ANSWER) as seen:
        loadgen(programs, f"unix:{tmp_path / 's'}", request_file, *options)
    assert [seen[number][5:12:2] for number in (0, 1, 299)] == [
        number.to_bytes(4, "little") for number in (0, 1, 299)
    ]
    assert seen[299][6:13:2] == REQUEST[6:13:2]
    assert len(set(seen)) == 300
    assert seen[300:600] == seen[:300]


def test_the_number_is_written_into_the_region_that_a_request_refers_to(programs, tmp_path, request_file):
    region = tmp_path / "region"
    region.write_bytes(b"abcdefgh")
    found = []

    def reply(_):
        found.append(region.read_bytes())
        # What a client copies anew for each request, nothing else can spoil.
        region.write_bytes(b"12345678")
        return ANSWER

    with scripted_server(tmp_path / "s", reply) as seen:
        address = f"unix:{tmp_path / 's'}"
        loadgen(programs, address, request_file, "-n", 3, "-w", 0, "-v", "0,1", "-m", region, "-k")
    assert found[:2] == [b"\0\0\0\0efgh", b"\1\0\0\0efgh"]
    assert set(seen) == {REQUEST}


def test_an_open_loop_asks_as_often_as_its_seed_says(programs, tmp_path, request_file):
    options = ("-d", 0.2, "-w", 0.1, "-r", 500, "-c", 4)
    with scripted_server(tmp_path / "s", lambda _: ANSWER) as seen:
        _, first = loadgen(programs, f"unix:{tmp_path / 's'}", request_file, *options[:-1], 1)
    arrivals = [ns / 1e9 for ns in probe(programs, 1, 500, 1000)]
    assert len(seen) == sum(at < 0.3 for at in arrivals)
    assert first["requests"] == sum(0.1 <= at < 0.3 for at in arrivals)
    assert first["errors"] == 0


def test_a_server_that_stops_is_charged_for_every_request_that_was_due(programs, tmp_path, request_file):
    def reply(count):
        if count == 20:
            time.sleep(0.4)
        return ANSWER

    with scripted_server(tmp_path / "s", reply):
        address = f"unix:{tmp_path / 's'}"
        _, printed = loadgen(programs, address, request_file, "-d", 1, "-w", 0, "-r", 200)
    # In a closed loop one request of many would have been slow. Here some eighty of two hundred waited.
    assert printed["p90_us"] > 150_000
    assert printed["late_p99_us"] < printed["p90_us"]


def test_what_was_due_and_never_answered_is_an_error(programs, tmp_path, request_file):
    with scripted_server(tmp_path / "s", lambda count: ANSWER if count <= 10 else b""):
        address = f"unix:{tmp_path / 's'}"
        _, printed = loadgen(programs, address, request_file, "-d", 0.3, "-w", 0, "-r", 200)
    due = sum(ns < 0.3e9 for ns in probe(programs, 1, 200, 1000))
    assert printed["requests"] == 10
    assert printed["requests"] + printed["errors"] == due


def test_sigterm_ends_a_run_with_its_figures(programs, tmp_path, request_file):
    with scripted_server(tmp_path / "s", lambda _: ANSWER) as seen:
        command = [programs / "loadgen", f"unix:{tmp_path / 's'}", request_file, "-d", "60", "-w", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while len(seen) < 10:
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            printed = json.loads(process.communicate(timeout=30)[0])
    assert 9 <= printed["requests"] <= len(seen)
    assert printed["seconds"] < 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_client_may_be_another_user(programs, request_file):
    # Another user may not pass through pytest's folders.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        Path(folder).chmod(0o755)
        path = Path(folder) / "s"
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        command = [
            programs / "loadgen",
            f"unix:{path}",
            request_file,
            "-n",
            "1",
            "-w",
            "0",
            "-u",
            "65534:65534",
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            connection, _ = listener.accept()
            with connection:
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                connection.recv(len(REQUEST), socket.MSG_WAITALL)
                connection.sendall(ANSWER)
                process.wait(30)
    assert memoryview(credentials).cast("i")[1:].tolist() == [65534, 65534]


def test_quantiles_are_within_half_a_percent(programs):
    values = np.random.default_rng(0).lognormal(11, 1.5, 20_000).astype(np.int64)
    mean, p50, p99, most = probe(programs, lines=values)
    assert mean == pytest.approx(values.mean() / 1000)
    assert most == pytest.approx(values.max() / 1000)
    for quantile, found in ((0.5, p50), (0.99, p99)):
        assert found == pytest.approx(np.quantile(values, quantile) / 1000, rel=0.005)


def test_the_shortest_and_the_longest_times_are_told_apart(programs):
    assert probe(programs, lines=[0] * 99 + [255]) == [0.00255, 0.0, 0.255, 0.255]
    _, _, p99, most = probe(programs, lines=[1] * 9 + [2**63])
    assert p99 == most == pytest.approx(2**63 / 1000)


def test_arrivals_are_a_poisson_process_that_its_seed_repeats(programs):
    times = probe(programs, 7, 5000, 50_000)
    assert times == probe(programs, 7, 5000, 50_000)
    assert times != probe(programs, 8, 5000, 50_000)
    gaps = [later - sooner for sooner, later in itertools.pairwise([0, *times])]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1e9 / 5000, rel=0.02)
    # Of exponential gaps, 1/e are longer than their mean, and the mean is as long as their deviation.
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(mean, rel=0.03)
