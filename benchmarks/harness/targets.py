"""What Skerry promises about its speed and size, and whether a run kept it.

Does: the one list of targets; verdicts out of the suites' figures. Leaves out: measuring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.figures import Figure


class Target(NamedTuple):
    """One promise: `limit` is the most that is allowed, or the least if `at_least`."""

    key: str
    what: str
    limit: float
    unit: str
    at_least: bool = False

    @property
    def text(self) -> str:
        """The promise in words."""
        bound = "at least" if self.at_least else "at most"
        return f"{self.what}: {bound} {self.limit:,g} {self.unit}".rstrip()

    def is_met_by(self, value: float) -> bool:
        """Whether `value` keeps the promise."""
        return value >= self.limit if self.at_least else value <= self.limit


TARGETS = (
    Target("pinned", "tiny MLP, one client, everything on one core: p50 / C ping-pong", 2.2, "x"),
    Target("rate_16", "tiny MLP, 16 connections", 100_000, "requests/s", at_least=True),
    Target("rate_64", "tiny MLP, 64 connections", 120_000, "requests/s", at_least=True),
    Target("busy_minilm", "encoder, 16 connections: items/s / best in-process", 0.95, "x", at_least=True),
    Target("busy_cnn", "CNN, 16 connections: items/s / best in-process", 0.95, "x", at_least=True),
    Target("open_mean", "open loop, 5,000 requests/s: mean added over the model's own time", 0.1, "ms"),
    Target("open_p99", "open loop, 5,000 requests/s: p99 added over the model's own time", 0.5, "ms"),
    Target("lone_minilm", "encoder, lone request: p50 / in-process with all cores' threads", 1.05, "x"),
    Target("lone_cnn", "CNN, lone request: p50 / in-process with all cores' threads", 1.05, "x"),
    Target("region_600k", "600 KB in registered shared memory: p50", 60, "µs"),
    Target("socket_6m", "6 MB over the socket: p50 / C ping-pong", 1.2, "x"),
    Target("cache_hit", "cache hit in the file, 10^6 rows: p50 / a request that does nothing", 1.2, "x"),
    Target("small_pss", "20 small models, PSS of all processes", 200, "MB"),
    Target("daemon_rss", "daemon RSS, after load", 30, "MB"),
    Target("cold_start", "cold start to the first answer", 0.35, "s"),
    Target("swap_failed", "hot swap under load: failed requests", 0, ""),
    Target("swap_p99", "hot swap under load: p99 / normal", 2, "x"),
    Target("flood_mlp", "tiny MLP flooded by another user: p99 / p99 alone", 2, "x"),
    Target("flood_cnn", "CNN flooded by another user: p99 / p99 alone", 2, "x"),
    Target("chain_owner", "the installed chain verified again, one owner", 10, "ms"),
    Target("chain_teams", "the installed chain verified again, a repository with three teams", 10, "ms"),
    Target("seal_time", "100 MB verified and sealed: time / hashing alone", 1.5, "x"),
    Target("seal_memory", "100 MB verified and sealed: peak RSS beside the sealed copy", 50, "MB"),
    Target("refresh_10k", "10,000 targets: a new revision judged and admitted", 1, "s"),
    Target("roots_200", "200 missed root rotations: CPU time to catch up", 5, "s"),
)


class Verdict(NamedTuple):
    """A target, what was measured, and whether it is met; None: this run cannot say."""

    target: str
    measured: str
    met: bool | None


def judge(figures: Mapping[str, Figure]) -> list[Verdict]:
    """Every target, judged by the figures of one run; those of suites that did not run are missing there."""
    return [_judge(target, figures.get(target.key)) for target in TARGETS]


def _judge(target: Target, figure: Figure | None) -> Verdict:
    if figure is None:
        return Verdict(target.text, "not measured", None)
    if figure.value is None:
        return Verdict(target.text, figure.note, None)
    measured = f"{_number(figure.value)} {target.unit}".rstrip()
    if figure.note:
        measured += f" ({figure.note})"
    if figure.errors:
        # A server that refuses is fast.
        return Verdict(target.text, f"{measured}, {figure.errors} errors", met=False)
    return Verdict(target.text, measured, target.is_met_by(figure.value))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
