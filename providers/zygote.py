"""The process that workers are forked from.

Does: import numpy and onnxruntime once, then fork a worker whenever the daemon sends a worker's descriptors,
report how each of them ended, and kill the ones that the daemon names.
Leaves out: what a worker does (providers.worker), which ones there should be (providers.launcher).

Forking costs milliseconds where a fresh interpreter costs a quarter of a second and 40 MB, because every
worker shares the imported pages. It is safe because this process stays as it was after the imports: one
thread, no session, no plugin library, no tensor.

Rules
 * One thread, always: numpy's BLAS is told so by the environment, ONNX Runtime makes none without a session.
 * A child is reaped here and nowhere else, so that its process id stays its own until its end was reported.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import traceback

from providers import sandbox, wire, worker

_MAX_MESSAGE = 256


class Zygote:
    """The loop: the daemon's socket on one side, the children's pidfds on the other."""

    def __init__(self, daemon: socket.socket) -> None:
        self._daemon = daemon
        self._poll = select.poll()
        self._poll.register(daemon, select.POLLIN)
        self._children: dict[int, int] = {}  # pidfd -> pid

    def serve(self) -> None:
        """Run until the daemon closes its end; then nobody is left behind."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._children:
                    self._reap(descriptor)
                elif not self._obey():
                    for pid in self._children.values():
                        os.kill(pid, signal.SIGKILL)
                    return

    def _obey(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self._daemon, _MAX_MESSAGE, wire.DESCRIPTORS)
        if not message:
            return False
        argument = int.from_bytes(message[1:9], "little")
        if message[:1] == wire.FORK:
            self._fork(argument, descriptors)
        elif argument in self._children.values():
            os.kill(argument, signal.SIGKILL)
        return True

    def _fork(self, token: int, descriptors: list[int]) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # no memory, no process ids left: the daemon decides whether to try again
            self._daemon.send(wire.encode(wire.Started(token, -(error.errno or 1))))
            return
        finally:
            if os.getpid() == parent:
                for descriptor in descriptors:
                    os.close(descriptor)
        if pid == 0:
            try:
                sandbox.die_with_parent(parent)
                sandbox.keep_only(descriptors)
                worker.main(*descriptors)
            except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
                traceback.print_exc()
            finally:
                os._exit(1)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._daemon.send(wire.encode(wire.Started(token, pid)))

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        self._daemon.send(wire.encode(wire.Ended(pid, os.waitstatus_to_exitcode(status))))


def main() -> None:
    """`python -m providers.zygote FD PARENT`."""
    daemon = socket.socket(fileno=int(sys.argv[1]))
    sandbox.die_with_parent(int(sys.argv[2]))
    sandbox.ignore_stop_signals()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime  # noqa: PLC0415 - only now is its telemetry off

    onnxruntime.set_default_logger_severity(4)
    # What exists now lives for ever; the collector of a child must not touch, and so copy, its pages.
    gc.collect()
    gc.freeze()
    daemon.send(wire.encode(wire.Started(0, os.getpid())))
    Zygote(daemon).serve()


if __name__ == "__main__":
    main()
