"""The process that workers are forked from.

Does: import numpy and onnxruntime once, then fork a worker, or the child that lists devices, whenever the daemon
sends the descriptors for one, report how each of them ended, and kill the ones that the daemon names.
Leaves out: what they do (providers.worker, providers.host, providers.discovery), which there should be
(providers.launcher).

Forking costs milliseconds where a fresh interpreter costs a quarter of a second and 40 MB, because every
child shares the imported pages. It is safe because this process stays as it was after the imports: one
thread, no session, no plugin library, no tensor.

Rules
 * One thread, always: numpy's BLAS is told so by the environment, and ONNX Runtime makes none for a session that
   runs on one.
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
from typing import TYPE_CHECKING

from providers import catalog, discovery, host, sandbox, wire, worker

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_MESSAGE = 16 * 1024


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
        message, descriptors, _, _ = socket.recv_fds(self._daemon, _MAX_MESSAGE, wire.MAX_DESCRIPTORS)
        if not message:
            return False
        argument = int.from_bytes(message[1:9], "little")
        if message[:1] == wire.FORK:
            self._fork(argument, descriptors, lambda: worker.main(*descriptors))
        elif message[:1] == wire.HOST:
            self._fork(argument, descriptors, lambda: host.main(*descriptors))
        elif message[:1] == wire.LOOK:
            names = message[9:].decode().split()
            self._fork(
                argument, descriptors, lambda: discovery.run_forked(descriptors[0], descriptors[1], names)
            )
        elif argument in self._children.values():
            os.kill(argument, signal.SIGKILL)
        return True

    def _fork(self, token: int, descriptors: list[int], run: Callable[[], None]) -> None:
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
                run()
            except BaseException:  # noqa: BLE001 - nothing may return into the zygote's loop
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
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


def _warm_up() -> None:
    """Do once what every worker would do and keep for itself: a quarter of its memory, and half of its start.

    The first session makes ONNX Runtime build its tables of kernels and operators. With one thread it starts none,
    so forking stays safe.
    """
    import numpy.random  # noqa: PLC0415 - the probe uses it
    import onnxruntime  # noqa: PLC0415 - only now is its telemetry off

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(catalog.ONE_NODE, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": numpy.zeros(1, numpy.float32)})


def main() -> None:
    """`python -m providers.zygote FD PARENT`."""
    daemon = socket.socket(fileno=int(sys.argv[1]))
    sandbox.die_with_parent(int(sys.argv[2]))
    sandbox.ignore_stop_signals()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    _warm_up()
    # What exists now lives for ever; the collector of a child must not touch, and so copy, its pages.
    gc.collect()
    gc.freeze()
    try:
        daemon.send(wire.encode(wire.Started(0, os.getpid())))
    except BrokenPipeError:  # the daemon could not start, and has said why
        return
    Zygote(daemon).serve()


if __name__ == "__main__":
    main()
