"""The benchmark's Python half: what it sends, how it sums up, and what it calls met."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from people import memory_folder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# --- Requests


def parts(content):
    head, _, body = content.partition(b"\r\n\r\n")
    lengths = dict(line.split(b": ") for line in head.split(b"\r\n")[1:])
    assert int(lengths[b"Content-Length"]) == len(body)
    json_size = int(lengths.get(b"Inference-Header-Content-Length", len(body)))
    return json.loads(body[:json_size]), body[json_size:]


def test_an_infer_request_says_how_long_its_parts_are_and_where_it_varies(harness):
    requests, models = harness("bench_requests"), harness("bench_models")
    request = requests.infer_request("m", models.sentence_input())
    header, tensors = parts(request.content)
    assert [each["parameters"]["binary_data_size"] for each in header["inputs"]] == [256] * 3
    assert len(tensors) == 3 * 256
    assert header["id"] == "bench-00000000"
    digits_at, bytes_at, stride, _ = request.variation
    assert request.content[digits_at : digits_at + 8] == requests.SEQUENCE
    assert request.content[bytes_at:] == tensors
    assert stride == 8


def test_varied_tokens_and_floats_stay_what_a_model_takes(harness):
    requests, models = harness("bench_requests"), harness("bench_models")
    for inputs, most in ((models.sentence_input(), 30522), (models.magika_input(), 256)):
        request = requests.infer_request("m", inputs)
        content = bytearray(request.content)
        for index in range(4):
            content[request.variation.bytes_at + index * request.variation.stride] = 0xFF
        _, tensors = parts(bytes(content))
        first = inputs[0].values
        varied = np.frombuffer(tensors[: first.nbytes], first.dtype)
        assert (varied[:4] != first.ravel()[:4]).any()
        assert varied.max() <= most
    (row,) = models.mlp_input()
    request = requests.infer_request("m", [row], new_id=False)
    assert request.variation.digits_at is None
    content = bytearray(request.content)
    content[request.variation.bytes_at] ^= 0xFF
    varied = np.frombuffer(bytes(content)[-row.values.nbytes :], np.float32)
    assert varied == pytest.approx(row.values.ravel(), rel=1e-4)
    assert varied[0] != row.values[0, 0]


def test_a_request_for_shared_memory_names_its_region_and_carries_no_tensor(harness):
    requests, models = harness("bench_requests"), harness("bench_models")
    (row,) = models.row_input(1000)
    request = requests.region_request("m", row, "r")
    header, tensors = parts(request.content)
    assert header["inputs"][0]["parameters"] == {
        "shared_memory_region": "r",
        "shared_memory_byte_size": 4000,
    }
    assert tensors == b""
    assert request.variation[1:3] == (0, 4)


def test_other_forms_carry_the_same_values(harness):
    requests, models = harness("bench_requests"), harness("bench_models")
    inputs = models.mlp_input()
    values = inputs[0].values
    as_json, _ = parts(requests.json_request("m", inputs).content)
    assert np.array(as_json["inputs"][0]["data"], np.float32).tobytes() == values.tobytes()
    raw = requests.raw_request("/raw", inputs)
    assert raw.content[raw.variation.bytes_at :] == values.tobytes()
    encoded = requests.base64_request("/predict", inputs)
    document, _ = parts(encoded.content)
    assert document["id"].encode() == requests.SEQUENCE
    assert encoded.content[encoded.variation.digits_at :].startswith(requests.SEQUENCE)


# --- Models


def test_built_models_take_their_inputs_in_batches(harness, tmp_path):
    models, limit = harness("bench_models"), harness("harness.limit")
    for model in (models.CNN, models.FIRST, models.MLP):
        file = tmp_path / f"{model.name}.onnx"
        file.write_bytes(model.build())
        one, four = limit.InProcess.of(model, file, tmp_path).measure(
            [limit.ONE_THREAD, limit.Setting(1, 1, batch=4)], 0.02
        )
        assert 0 < one.p50_us <= one.p99_us
        assert four.rps > 0


def test_the_encoder_is_a_real_ones_size(harness):
    onnx = pytest.importorskip("onnx")
    models = harness("bench_models")
    model = onnx.load_from_string(models.encoder())
    weights = sum(math.prod(constant.dims) for constant in model.graph.initializer)
    assert 22e6 < weights < 23e6  # all-MiniLM-L6-v2 has 22.7 million
    shape = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["N", models.ENCODER.width]


# --- Figures


def sample(tools, **fields):
    usual = {"requests": 9, "errors": 0, "rps": 100.0, "mean_us": 1.0, "p50_us": 1.0, "p90_us": 1.0}
    return tools.Sample(**(usual | {"p99_us": 1.0, "max_us": 1.0} | fields))


def test_a_row_has_the_medians_and_the_range_of_the_rounds(harness):
    load, tools = harness("harness.load"), harness("harness.tools")
    rounds = [
        sample(tools, errors=e, rps=r, p50_us=p, p99_us=2 * p)
        for e, r, p in ((0, 100.0, 30.0), (1, 300.0, 10.0), (2, 200.0, 20.0))
    ]
    row = load.row_of("x", 16, rounds)
    assert (row.p50_us, row.p50_low_us, row.p50_high_us) == (20.0, 10.0, 30.0)
    assert (row.p99_us, row.rps, row.errors) == (40.0, 200.0, 3)


def test_rows_are_compared_with_the_first_at_as_many_connections(harness):
    load, tools = harness("harness.load"), harness("harness.tools")
    rows = [
        load.row_of(name, connections, [sample(tools, p50_us=p50)])
        for name, connections, p50 in (("c", 1, 10.0), ("us", 1, 25.0), ("c", 16, 100.0), ("us", 16, 150.0))
    ]
    table = load.load_table("t", rows)
    assert [(row[0], row[1], row[4]) for row in table.rows] == [
        ("c", "1", "1.00"), ("us", "1", "2.50"), ("c", "16", "1.00"), ("us", "16", "1.50"),
    ]  # fmt: skip
    assert load.find(rows, "us", 16).p50_us == 150.0
    assert load.find(rows, "us", 64) is None


def test_no_answer_at_all_is_no_latency_of_zero(harness):
    tools = harness("harness.tools")
    zero = dict.fromkeys(tools.Sample.__dataclass_fields__, 0)
    found = tools._sample(tools.Load("unix:s", Path("r")), 0, json.dumps(zero), "")
    assert found.p99_us == math.inf
    assert found.errors == 1


def test_targets_are_judged_by_their_bound(harness):
    targets, figures = harness("harness.targets"), harness("harness.figures")
    found = {
        verdict.target: verdict
        for verdict in targets.judge(
            {
                "pinned": figures.Figure(2.3, "beside"),
                "rate_16": figures.Figure(100_000.0),
                "swap_failed": figures.Figure(0),
                "daemon_rss": figures.Figure(29.0, errors=3),
                "region_600k": figures.Figure(None, "not served"),
            }
        )
    }
    by_start = {key: next(v for text, v in found.items() if text.startswith(key)) for key in (
        "tiny MLP, one client", "tiny MLP, 16", "hot swap under load: failed", "daemon RSS", "600 KB", "cold",
    )}  # fmt: skip
    measured = {key: (verdict.measured, verdict.met) for key, verdict in by_start.items()}
    assert measured == {
        "tiny MLP, one client": ("2.3 x (beside)", False),
        "tiny MLP, 16": ("100,000 requests/s", True),
        "hot swap under load: failed": ("0", True),
        "daemon RSS": ("29 MB, 3 errors", False),
        "600 KB": ("not served", None),
        "cold": ("not measured", None),
    }


def test_every_target_is_measured_by_a_suite(harness):
    targets = harness("harness.targets")
    sources = "".join(file.read_text() for file in (BENCHMARKS / "harness" / "suites").glob("*.py"))
    families = ("rate_", "busy_", "lone_", "flood_", "chain_")  # keys that are made of a model or a number
    for target in targets.TARGETS:
        written = next((family for family in families if target.key.startswith(family)), target.key)
        assert f'"{written}' in sources, target.key


def test_the_results_show_a_partial_run_and_keep_a_cell_in_its_row(harness):
    report, figures = harness("harness.report"), harness("harness.figures")
    findings = figures.Findings("T", "Notes.", [figures.Table("t", ("a", "b"), [("x|y\nz", "1.5")])])
    text = report.render(report.Run([findings], {"CPU": "one"}, 1.0, quick=True, left_out=["swap"]))
    assert "A partial run, without swap." in text
    assert "| x\\|y z | 1.5 |" in text
    assert "| --- | ---: |" in text
    assert "met |" not in text


# --- Shared memory


class _Registering(http.server.BaseHTTPRequestHandler):
    """As much of Triton's shared-memory extension as the benchmark uses; the answer is the row's first values."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(b'{"extensions": ["system_shared_memory"]}')

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        regions, name = self.server.regions, self.path.split("/")[-2]
        if self.path.endswith("/register"):
            regions[name] = self.server.shared_memory / json.loads(body)["key"][1:]
        elif self.path.endswith("/unregister"):
            del regions[name]
        elif "Inference-Header-Content-Length" in self.headers:
            row = body[int(self.headers["Inference-Header-Content-Length"]) :]
            return self._answer(row[:32])
        else:
            region = json.loads(body)["inputs"][0]["parameters"]["shared_memory_region"]
            with regions[region].open("rb") as file:
                return self._answer(file.read(32))
        return self._answer(b"{}")

    def _answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.answers.append(body)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_tensor_in_shared_memory_is_registered_varied_and_given_back(harness, tmp_path):
    large, regions = harness("harness.suites.large"), harness("harness.regions")
    stages, tools = harness("harness.stage"), harness("harness.tools")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Registering) as server:
        server.regions, server.answers, server.daemon_threads = {}, [], True
        server.shared_memory = regions.SHARED_MEMORY
        threading.Thread(target=server.serve_forever).start()
        daemon = SimpleNamespace(
            address=f"tcp:127.0.0.1:{server.server_port}",
            serves=lambda extension: extension == regions.EXTENSION,
        )
        programs = tools.build_tools(BENCHMARKS, tmp_path / "tools")
        stage = stages.Stage(Path("skerry"), programs, stages.QUICK, tmp_path, lambda _: None)
        try:
            rows, refusal = large._compare(stage, daemon, "600k", 1000)
        finally:
            server.shutdown()
    assert refusal == ""
    assert [(row.candidate, row.errors) for row in rows] == [
        (name, 0) for name in (large.FLOOR, large._SOCKET, large._BORN, large._COPIED)
    ]
    assert len(set(server.answers)) > 10
    assert server.regions == {}
    assert large._figures("600k", rows, refusal)["region_600k"].value > 0
    refusing = SimpleNamespace(address="tcp:127.0.0.1:1", serves=lambda _: False)
    with (
        pytest.raises(harness("harness.wire").BenchError, match="not served"),
        regions.registered(refusing, b"x"),
    ):
        pass


# --- Peers


def test_a_peer_that_is_not_there_or_does_not_start_is_left_out_with_its_reason(harness, tmp_path):
    models, peer, peers = harness("bench_models"), harness("harness.peer"), harness("harness.suites.peers")
    missing, failed, broken = (each.name for each in peer.PEERS[:3])
    (tmp_path / f"{failed}.failed").write_text("ERROR: no wheel for this platform")
    interpreter = tmp_path / broken / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text("#!/bin/sh\necho nothing works >&2\nexit 3\n")
    interpreter.chmod(0o755)
    stage = SimpleNamespace(say=lambda _: None, folder=tmp_path, file=lambda _: tmp_path / "m.onnx")
    table = peers._Table(stage, tmp_path, models.MLP, [])
    with contextlib.ExitStack() as stack:
        for each in peer.PEERS[:3]:
            table.add(stack, each)
    reasons = dict(zip((missing, failed, broken), table._left_out, strict=True))
    assert "not installed" in reasons[missing]
    assert "no wheel for this platform" in reasons[failed]
    assert "ended with status 3: nothing works" in reasons[broken]


def test_what_a_peer_started_ends_with_it(harness, tmp_path, monkeypatch):
    models, peer, psutil = harness("bench_models"), harness("harness.peer"), harness("psutil")
    script = tmp_path / "server.py"
    script.write_text(
        "import http.server, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        self.rfile.read(int(self.headers['Content-Length']))\n"
        "        self.send_response(200); self.send_header('Content-Length', '0'); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[2])), Handler).serve_forever()\n"
    )
    monkeypatch.setattr(peer, "_SCRIPTS", tmp_path)
    link = tmp_path / "envs" / "fastapi" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    server = dataclasses.replace(peer.PEERS[0], script="server.py")
    with peer.serving(server, tmp_path / "envs", models.MLP, tmp_path / "m", tmp_path / "f") as served:
        (child,) = served.process.children()
        assert served.label.endswith("(1 thread)")
    assert not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE


# --- Processes


def test_system_calls_are_read_out_of_straces_summary(harness):
    summary = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.003000           1      2001           read
 40.00    0.002000           1      2000        17 epoll_pwait
------ ----------- ----------- --------- --------- ----------------
100.00    0.005000           1      4001        17 total
"""
    found = harness("harness.processtime").parse_summary(summary)
    assert found == {"read": 2001, "epoll_pwait": 2000}


def test_what_a_process_spends_is_counted_with_threads_that_ended(harness):
    psutil, processtime = harness("psutil"), harness("harness.processtime")
    program = (
        "import sys, threading, time; print(flush=True)\n"
        "for _ in sys.stdin:\n"
        "    thread = threading.Thread(target=lambda: sum(range(2_000_000)))\n"
        "    thread.start(); thread.join(); time.sleep(0.2); print(flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        with processtime.spending({"p": psutil.Process(process.pid)}) as spent:
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
        process.stdin.close()
    assert spent["p"].cpu_ns > 5_000_000
    assert spent["p"].switches is None


# --- Trust


@pytest.fixture
def in_memory():
    with memory_folder() as place:
        yield place


def test_what_is_signed_is_verified_by_nodes_that_hold_and_lack_it(harness, in_memory):
    signed, trust, work = (
        harness(name) for name in ("harness.signed", "harness.suites.trust", "harness.trustwork")
    )
    model = in_memory / "m.onnx"
    model.write_bytes(b"a model")
    owner = signed.owner(in_memory / "owner", model, 2)
    teams = signed.teams(in_memory / "teams", model, 1)
    found = trust._job(work.chain, folders={"owner": str(owner), "teams": str(teams.node)}, rounds=2, calls=1)
    assert (found["owner_files"], found["owner_signatures"]) == (6, 6)
    assert (found["teams_files"], found["teams_signatures"]) == (9, 11)
    assert min(*found["owner_s"], *found["teams_floor_s"]) > 0
    scratch = {"scratch": str(in_memory / "copies"), "rounds": 1}
    many = signed.many(in_memory / "many", 12)
    assert trust._job(work.refresh, node=str(many.node), offer=str(many.offer), **scratch)["entries"] == 12
    rotated = signed.rotated(in_memory / "rotated", 4)
    assert trust._job(work.roots, node=str(rotated.node), offer=str(rotated.offer), **scratch)["version"] == 5
    added = trust._job(work.add, node=str(owner), model=str(model), **scratch)
    assert added["ours_s"][0] > added["fsync_s"][0] > 0
    assert added["records"] == 1
    with pytest.raises(harness("harness.wire").BenchError, match="chain: exit status 1"):
        trust._job(work.chain, folders={"nobody": str(in_memory / "nobody")}, rounds=1, calls=1)


def test_sealing_is_measured_beside_hashing_the_same_bytes(harness, tmp_path):
    signed, trust, work = (
        harness(name) for name in ("harness.signed", "harness.suites.trust", "harness.trustwork")
    )
    store, content = signed.blob(tmp_path / "blobs", 5_000_000)
    found = trust._job(work.seal, blobs=str(store), digest=content.digest, size_bytes=5_000_000, rounds=1)
    assert found["ours_s"][0] > 0 < found["floor_s"][0]
    assert 0 < found["self_mb"] < 50
    path = next(store.rglob("*/??/*"))
    path.chmod(0o600)
    path.write_bytes(bytes(5_000_000))
    with pytest.raises(harness("harness.wire").BenchError, match="Tampered"):
        trust._job(work.seal, blobs=str(store), digest=content.digest, size_bytes=5_000_000, rounds=1)


# --- From end to end


def run(*options, timeout):
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", *options]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, env=environment
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_one_suite_runs_from_end_to_end(tmp_path):
    output = tmp_path / "RESULTS.md"
    result = run("--only", "open", "--output", output, timeout=110)
    assert result.returncode == 0, result.stdout + result.stderr
    text = output.read_text()
    assert "A quick run" in text
    assert "## Open loop" in text
    assert "A partial run, without latency, heavy," in text
    assert "| C ping-pong |" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_every_suite_runs_from_end_to_end(tmp_path):
    output = tmp_path / "RESULTS.md"
    result = run("--output", output, timeout=590)
    assert result.returncode == 0, result.stdout + result.stderr
    text = output.read_text()
    for title in (
        "## Targets",
        "## Heavier models",
        "## Hot swap under load",
        "## Trust",
        "## Where the time",
        "## Memory",
    ):
        assert title in text
