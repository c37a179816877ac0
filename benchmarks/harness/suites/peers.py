"""Other servers beside Skerry: the same models, the same load generator, one run."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import bench_requests
from bench_models import CNN, ENCODER, MLP

from harness import peer
from harness.figures import Findings, Table
from harness.load import Candidate, load_table
from harness.memory import weigh
from harness.tools import Load
from harness.wire import BenchError

if TYPE_CHECKING:
    from pathlib import Path

    import psutil
    from bench_models import Model

    from harness.memory import Weight
    from harness.stage import Stage

_MOST_ROUNDS = 3

_NOTES = """\
All of a table's servers run at the same time and take turns under load. Each is asked in the quickest form that it
takes, which stands in its name, with another tensor or another id each time; each runs the same version of ONNX Runtime
and the number of threads, sessions and rows that suits it. Skerry is measured on its Unix socket and, for a fair
comparison, on TCP like the others, in binary and in JSON. PSS is that of all processes of a server before the load."""


def measure(stage: Stage) -> Findings:
    """The MLP, the encoder and the CNN, each through every server that starts."""
    if stage.peers is None:
        raise BenchError("peers: expected the folder of their environments")
    versions = ", ".join(f"{each.package} {peer.version_of(each, stage.peers)}" for each in peer.PEERS)
    findings = Findings("Peers", f"{_NOTES} Versions: {versions}.")
    weights: list[Weight] = []
    for model in (MLP, ENCODER, CNN):
        with contextlib.ExitStack() as stack:
            table = _Table(stage, stage.peers, model, weights)
            table.add_ourselves(stack)
            for each in peer.PEERS:
                table.add(stack, each)
            findings.tables.append(table.measure())
    cells = [(each.what, str(each.processes), f"{each.rss_mb:.0f}", f"{each.pss_mb:.0f}") for each in weights]
    findings.tables.append(Table("What they weigh", ("server", "processes", "RSS MB", "PSS MB"), cells))
    return findings


class _Table:
    """The candidates for one model, and those that did not start."""

    def __init__(self, stage: Stage, environments: Path, model: Model, weights: list[Weight]) -> None:
        self._stage = stage
        self._environments = environments
        self._model = model
        self._weights = weights
        self._candidates: list[Candidate] = []
        self._left_out: list[str] = []

    def add_ourselves(self, stack: contextlib.ExitStack) -> None:
        """Skerry on both transports."""
        model, (port,) = self._model, peer.free_ports(1)
        config = f"ipc: {{tcp: '127.0.0.1:{port}'}}\n"
        daemon = stack.enter_context(self._stage.serving(model, config=config))
        binary = self._stage.load(daemon.address, model)
        over_tcp = f"tcp:127.0.0.1:{port}"
        request = bench_requests.json_request(model.name, model.inputs())
        as_json = Load(over_tcp, self._stage.request(f"{model.name}-json", request), request.variation)
        self._candidates += [
            Candidate("Skerry, Unix socket, OIP binary", binary),
            Candidate("Skerry, TCP, OIP binary", replace(binary, address=over_tcp)),
            Candidate("Skerry, TCP, OIP JSON", as_json),
        ]
        self._weigh("Skerry", daemon.process)

    def add(self, stack: contextlib.ExitStack, each: peer.Peer) -> None:
        """One peer; if it does not start, the reason is kept."""
        stage, model = self._stage, self._model
        stage.say(f"{each.label} starts with {model.name}")
        folder = stage.folder / f"{each.name}-{model.name}"
        starting = peer.serving(each, self._environments, model, stage.file(model), folder)
        try:
            served = stack.enter_context(starting)
        except BenchError as error:
            self._left_out.append(f"{each.label}: {error}")
            return
        request = each.request(model)
        file = stage.request(f"{each.name}-{model.name}", request)
        self._candidates.append(Candidate(served.label, Load(served.address, file, request.variation)))
        self._weigh(each.label, served.process)

    def measure(self) -> Table:
        """All that started, taking turns."""
        stage = self._stage
        heavy = self._model is not MLP
        series = stage.heavy_series if heavy else stage.series
        series = replace(series, rounds=min(_MOST_ROUNDS, series.rounds))
        connections = [count for count in stage.plan.connections if not heavy or count <= 16]
        rows = series.compare(self._candidates, connections)
        notes = f"**Not measured.** {'; '.join(self._left_out)}." if self._left_out else ""
        return load_table(self._model.label, rows, notes)

    def _weigh(self, name: str, root: psutil.Process) -> None:
        processes = [root, *root.children(recursive=True)]
        self._weights.append(weigh(f"{name}, {self._model.name}", processes))
