"""A session with all threads, for one run at a time. For worker processes only.

Does: build the session, keep its threads off the core of the thread that runs it.
Leaves out: whether such a run is quicker (providers.lone), what else a worker has (providers.prove).

Rules
 * A run waits for its slowest thread, so two of its threads on one core are worse than one thread alone. Systems do
   that: on a virtual machine of two cores, a thread that was woken was seen to stay where its waker ran, for seconds,
   while the other core was idle. With 20 ms between runs, all threads took as long as one; kept apart they took 0.6
   times as long.
 * Only the session's own threads are moved, when the runner was seen on another core than before. Where the runner
   goes is the system's business: it knows which cores are free, and which are fast.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from providers.session import Session
from providers.sidefiles import NOTHING, Beside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from providers.arrays import Array
    from providers.ranking import EpDevice

# With the interpreter's lock held: the call takes a tenth of a microsecond, giving the lock away may take far more.
_current_core = ctypes.PyDLL(None).sched_getcpu


class Wide:
    """See the module. Arguments and errors are Session's; no other thread may be made meanwhile.

    Attributes:
        session: the session itself; what `run` runs.
        threads: system's numbers of the threads that it has beside the one that runs it.
    """

    __slots__ = ("_core", "session", "threads")

    def __init__(self, model_path: str, device: EpDevice, threads: int, beside: Beside = NOTHING) -> None:
        before = _threads()
        self.session = Session(model_path, device, threads, spin=True, beside=beside)
        self.threads = _threads() - before
        self._core = -1

    def run(
        self, names: Sequence[str], feeds: Mapping[str, Array], run_options: object | None, /
    ) -> list[Array]:
        """As providers.session.Run."""
        core = _current_core()
        if core != self._core:
            self._core = core if self._leave(core) else -1
        return self.session.run(names, feeds, run_options)

    def _leave(self, core: int) -> bool:
        """Move the session's threads to the cores that this thread may use but for this one; whether there are any."""
        others = os.sched_getaffinity(0) - {core}
        try:
            for thread in self.threads:
                os.sched_setaffinity(thread, others)
        except OSError:  # cores may also be taken away between the two calls; it only costs time
            return False
        return True


def _threads() -> frozenset[int]:
    return frozenset(map(int, os.listdir("/proc/self/task")))  # noqa: PTH208 - pathlib is not imported in a worker
