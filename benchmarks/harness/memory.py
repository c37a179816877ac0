"""What the daemon's processes weigh.

RSS counts shared pages in every process that maps them; PSS divides them among those, so PSS may be added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from harness.figures import Table
from harness.wire import get_json

DAEMON = "daemon"
_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Weight:
    """One process, or several together, in megabytes (10^6 bytes)."""

    what: str
    processes: int
    rss_mb: float
    pss_mb: float


def weigh(what: str, processes: list[psutil.Process]) -> Weight:
    """The sums over `processes`; one that has ended in between counts nothing."""
    rss = pss = count = 0
    for process in processes:
        try:
            memory = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        rss, pss, count = rss + memory.rss, pss + memory.pss, count + 1
    return Weight(what, count, rss / _MB, pss / _MB)


def weigh_tree(root: psutil.Process, address: str, when: str) -> list[Weight]:
    """The daemon, each model's worker, what else it keeps running (the zygote), and all together."""
    models = get_json(address, "/skerry/v1/models")["models"]
    names = {model["pid"]: model["name"] for model in models if model.get("pid")}
    children = root.children(recursive=True)
    others = [child for child in children if child.pid not in names]
    workers = sorted((child for child in children if child.pid in names), key=lambda child: names[child.pid])
    return [
        weigh(f"{DAEMON}, {when}", [root]),
        *(weigh(f"worker of {names[worker.pid]}, {when}", [worker]) for worker in workers),
        weigh(f"zygote and helpers, {when}", others),
        weigh(f"all, {when}", [root, *children]),
    ]


def weight_table(title: str, weights: list[Weight]) -> Table:
    """Weights for the reader."""
    rows = [(each.what, str(each.processes), f"{each.rss_mb:.1f}", f"{each.pss_mb:.1f}") for each in weights]
    return Table(title, ("what", "processes", "RSS MB", "PSS MB"), rows)
