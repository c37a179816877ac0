"""Large tensors: 600 KB and 6 MB through the socket beside C, and in registered shared memory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import bench_requests
from bench_models import FIRST, LARGE_VALUES, PICTURE_VALUES, row_input

from harness.figures import Figure, Findings
from harness.load import FLOOR, Candidate, Row, find, floor_for, load_table
from harness.regions import registered
from harness.stage import expect_ok
from harness.tools import Load
from harness.wire import BenchError

if TYPE_CHECKING:
    from pathlib import Path

    from bench_requests import InputTensor

    from harness.daemon import Daemon
    from harness.stage import Stage

_SOCKET = "skerry, over the socket"
_BORN = "skerry, born in registered shared memory"
_COPIED = "skerry, copied there by the client"

_NOTES = """\
The model gives back the first eight values, so what is measured is the way of the tensor. C reads the same bytes and
answers with the same. A tensor is *born* in shared memory where a decoder or camera writes there itself; else the
client copies it there for each request."""


def measure(stage: Stage) -> Findings:
    """Both sizes, with one client and both ways."""
    findings = Findings("Large tensors", _NOTES)
    with stage.serving(FIRST) as daemon:
        for name, title, values in (("600k", "600 KB", PICTURE_VALUES), ("6m", "6 MB", LARGE_VALUES)):
            rows, refusal = _compare(stage, daemon, name, values)
            findings.tables.append(
                load_table(f"{title}, one connection", rows, refusal and f"Shared memory: {refusal}.")
            )
            findings.figures |= _figures(name, rows, refusal)
    return findings


def _compare(stage: Stage, daemon: Daemon, name: str, values: int) -> tuple[list[Row], str]:
    """The rows, and why shared memory has none."""
    tensor = row_input(values)[0]
    request = bench_requests.infer_request(FIRST.name, [tensor])
    over_socket = Load(daemon.address, stage.request(f"large-{name}", request), request.variation)
    _expect_first(daemon, over_socket.request, tensor)
    with contextlib.ExitStack() as stack:
        floor, _ = stack.enter_context(floor_for(stage.tools, daemon.address, over_socket.request))
        candidates = [Candidate(FLOOR, floor), Candidate(_SOCKET, over_socket)]
        refusal = ""
        try:
            region = stack.enter_context(registered(daemon, tensor.values.tobytes()))
        except (BenchError, OSError) as error:
            refusal = str(error)
        else:
            referring = bench_requests.region_request(FIRST.name, tensor, region.name)
            file = stage.request(f"region-{name}", referring)
            _expect_first(daemon, file, tensor)
            for label, copied in ((_BORN, False), (_COPIED, True)):
                load = Load(daemon.address, file, referring.variation, region=region, copied=copied)
                candidates.append(Candidate(label, load))
        return stage.series.compare(candidates, (1,)), refusal


def _expect_first(daemon: Daemon, request: Path, tensor: InputTensor) -> None:
    """The answer ends in the row's first values, or what is measured is not the way of this tensor."""
    expected = tensor.values[0, : FIRST.width].tobytes()
    answer = expect_ok(daemon.address, request)
    if not answer.endswith(expected):
        raise BenchError(f"{request.name}: expected the first values of its row, got {answer[-100:]!r}")


def _figures(name: str, rows: list[Row], refusal: str) -> dict[str, Figure]:
    floor, ours = find(rows, FLOOR), find(rows, _SOCKET)
    if name == "6m" and floor and ours:
        return {"socket_6m": Figure(ours.p50_us / floor.p50_us, "", ours.errors + floor.errors)}
    if name != "600k":
        return {}
    born, copied = find(rows, _BORN), find(rows, _COPIED)
    if born is None or copied is None:
        return {"region_600k": Figure(None, refusal)}
    note = f"copied by the client: {copied.p50_us:.0f} µs"
    if ours:
        note += f", over the socket: {ours.p50_us:.0f} µs"
    return {"region_600k": Figure(born.p50_us, note, born.errors)}
