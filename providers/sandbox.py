"""What a worker gives up before it touches a model, and some of it the gRPC gateway before it meets clients.

Does: close what was inherited, tie the process to its parent's life, take away core dumps, new privileges
and the surroundings that external data could be read from, cap the address space.
Leaves out: when (providers.worker, providers.zygote).

Rules
 * Linux where it matters; on other systems what exists there is done, and the rest is left out.
 * Nothing here can be undone by the process itself, but its priority, which is given up for a while only, and the cap
   of memory where models that come and go share it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_NO_NEW_PRIVS = 38

_CAP_SYS_NICE = 1 << 23  # linux/capability.h
_LEAST_PRIORITY = 19
#: How much a worker that loads steps back behind those that serve: a tenth of a core where they want all of it.
#: Further back, a load on a busy machine would not end in time.
BACKGROUND_NICE = 10

#: Descriptors a worker may open: its few sockets, the model, what an execution provider's driver wants.
MAX_DESCRIPTORS = 256


def keep_only(descriptors: Iterable[int]) -> None:
    """Close every descriptor but standard error and `descriptors`; stdin becomes empty, stdout goes to stderr."""
    keep = {2, *descriptors}
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    # ONNX Runtime prints some complaints on stdout, which may be somebody's pipe.
    os.dup2(2, 1)
    low = 3
    for fd in sorted(fd for fd in keep if fd >= low):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def die_with_parent(parent: int) -> None:
    """Be killed when the parent is, also if that has already happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def ignore_stop_signals() -> None:
    """A terminal or a service manager signals the whole group; the daemon alone decides when its children end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def harden() -> None:
    """No core dumps, no new privileges, files for this user alone."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop(working_directory: str, descriptors: int = MAX_DESCRIPTORS) -> None:
    """What `harden` says, and few descriptors, and nothing to read beside the process."""
    harden()
    # A model loaded with external data reads files below the working directory: let there be none.
    os.chdir(working_directory)
    limit = _at_most_hard(resource.RLIMIT_NOFILE, descriptors)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def cap_memory(extra_bytes: int) -> None:
    """Allow `extra_bytes` of address space beyond what the process has now."""
    with contextlib.suppress(FileNotFoundError):  # no /proc: not Linux, and no meaningful RLIMIT_AS either
        limit = _at_most_hard(resource.RLIMIT_AS, address_space_bytes() + extra_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def lower_memory(less_bytes: int) -> None:
    """Take so much back of what `cap_memory` has allowed, for good."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (soft - less_bytes, soft - less_bytes))


def address_space_bytes() -> int:
    """What this process has mapped. Raises FileNotFoundError where there is no /proc."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def adjust_memory(total_bytes: int) -> None:
    """Set the cap of the address space for a process whose needs change: the one limit it could lift itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_at_most_hard(resource.RLIMIT_AS, total_bytes), hard))


def _at_most_hard(kind: int, limit: int) -> int:
    _, hard = resource.getrlimit(kind)
    return limit if hard == resource.RLIM_INFINITY else min(hard, limit)


@contextlib.contextmanager
def in_the_background() -> Iterator[None]:
    """Inside the block this process lets others go first; afterwards it, and every thread it has made, does not.

    Nothing happens where the way back is barred: it takes RLIMIT_NICE (`LimitNICE=+0` in a unit) or CAP_SYS_NICE.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if not _may_return_to(before):
        yield
        return
    os.setpriority(os.PRIO_PROCESS, 0, min(before + BACKGROUND_NICE, _LEAST_PRIORITY))
    try:
        yield
    finally:
        # The system counts priorities by thread, and threads begin with that of their maker.
        for thread in Path("/proc/self/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), before)


def give_memory_back() -> None:
    """Return to the system the pages in which malloc has nothing; of a session that is gone it keeps half otherwise."""
    with contextlib.suppress(AttributeError):  # not every C library has it; those that have not keep less
        ctypes.CDLL(None).malloc_trim(0)


def step_back(process: int) -> None:
    """Let everybody else go before a process that is about to be killed.

    To take its memory back costs the system milliseconds, on the core of whoever happens to be there.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):  # it has ended
        for thread in Path(f"/proc/{process}/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def _may_return_to(priority: int) -> bool:
    if sys.platform != "linux":
        return False
    if resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20 - priority:
        return True
    lines = Path("/proc/self/status").read_bytes().splitlines()
    effective = next((line for line in lines if line.startswith(b"CapEff:")), b"CapEff: 0")
    return bool(int(effective.split()[1], 16) & _CAP_SYS_NICE)
