"""Blocking connections to one daemon: a few of them, kept alive, shared by threads.

Does: send a call, receive its answer where it belongs, within the call's time.
Leaves out: what bytes mean (skerry.receiver), whether a call may be sent again (skerry.retries).

Rules
 * A connection serves one thread at a time; the pool hands out the one used last, and opens no more than it may.
 * After anything but a complete answer the connection is closed, so that no half-read answer meets the next call.
 * A child process never touches its parent's connections: it finds the pool empty, with a lock of its own.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
import weakref
from typing import TYPE_CHECKING, TypeVar

from skerry.address import explain
from skerry.errors import DeadlineExceeded
from skerry.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skerry.address import Address
    from skerry.calls import Call

T = TypeVar("T")

#: Pieces per sendmsg; the kernel takes 1024 (IOV_MAX).
_MAX_PIECES = 64
#: A timeout is set anew when it is off by more than this part of itself: a busy connection never has to.
_TOLERANCE = 1e-3


class Connection:
    """One connection, opened when it is needed and after each failure anew.

    Attributes:
        kept_alive: whether it has served a call and is still open.
        epoch: the pool's when it was taken; an older one is closed when it comes back.
    """

    __slots__ = ("_address", "_poll", "_receiver", "_sent", "_sock", "_timeout_s", "epoch", "kept_alive")

    def __init__(self, address: Address) -> None:
        self._address = address
        self._sock: socket.socket | None = None
        self._poll = select.poll()
        self._receiver = Receiver()
        self._timeout_s = 0.0
        self._sent = False
        self.kept_alive = False
        self.epoch = 0

    def close(self) -> None:
        """Close; the next exchange opens another."""
        sock, self._sock = self._sock, None
        self.kept_alive = False
        if sock is not None:
            sock.close()

    def exchange(self, call: Call[T], deadline: float, late_s: float) -> T:
        """Send `call` and return what its answer means.

        Args:
            call: begun anew by this, if it was carried out before.
            deadline: on the monotonic clock, for all of it.
            late_s: of the call's time, already spent.

        Raises:
            SkerryError: what the server refused, or that there was no answer; see skerry.address.explain.
        """
        parts = call.request(late_s)
        receiver = self._receiver
        receiver.begin(call.take_lead)
        self._sent = False
        try:
            sock = self._ready(deadline)
            try:
                self._send(sock, parts, deadline)
            except ConnectionError:
                # A server that refuses a long body may have said why before it closed.
                if not self._sent:
                    raise
            self._arm(sock, deadline)
            while not receiver.feed(_receive(sock, receiver.space())):
                self._arm(sock, deadline)
        except OSError as error:
            self.close()
            raise explain(error, self._address.target, sent=self._sent, answered=receiver.started) from error
        except BaseException:
            self.close()
            raise
        finally:
            refusal = receiver.end()
        if receiver.reusable:
            self.kept_alive = True
        else:
            self.close()
        if refusal is not None:
            raise refusal
        return call.result()

    def _ready(self, deadline: float) -> socket.socket:
        """An open socket that nothing is known against."""
        sock = self._sock
        if sock is not None and self._poll.poll(0):
            # The server closed it while it was idle, or said something nobody asked for. Nothing was sent.
            self.close()
            sock = None
        if sock is None:
            sock = self._sock = self._connect(deadline)
            self._poll = select.poll()
            self._poll.register(sock, select.POLLIN)
            self._timeout_s = 0.0
        self._arm(sock, deadline)
        return sock

    def _connect(self, deadline: float) -> socket.socket:
        address = self._address
        left_s = max(1e-3, deadline - time.monotonic())
        if not address.is_unix:
            sock = socket.create_connection((address.place, address.port), left_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Only a blocking connect waits for room in the server's queue; the kernel's own timeout ends it.
            seconds, rest = divmod(left_s, 1.0)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(rest * 1e6) + 1)
            )
            sock.connect(address.place)
        except BlockingIOError:
            sock.close()
            raise TimeoutError from None
        except BaseException:
            sock.close()
            raise
        return sock

    def _arm(self, sock: socket.socket, deadline: float) -> None:
        """Let the next operation wait until `deadline`, about."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        set_s = self._timeout_s
        if not set_s * (1 - _TOLERANCE) <= left_s <= set_s:
            sock.settimeout(left_s)
            self._timeout_s = left_s

    def _send(self, sock: socket.socket, parts: Sequence[bytes | memoryview], deadline: float) -> None:
        if len(parts) == 1:
            count = sock.send(parts[0])
            self._sent = True
            if count == len(parts[0]):
                return
        else:
            count = 0
        pieces = [memoryview(part) for part in parts if len(part)]
        while True:
            while pieces and count >= len(pieces[0]):
                count -= len(pieces.pop(0))
            if not pieces:
                return
            pieces[0] = pieces[0][count:]
            self._arm(sock, deadline)
            count = sock.sendmsg(pieces[:_MAX_PIECES])
            self._sent = True


def _receive(sock: socket.socket, space: memoryview) -> int:
    count = sock.recv_into(space)
    if not count:
        raise ConnectionResetError("it was closed")
    return count


class Pool:
    """Up to `size` connections to one daemon.

    Args:
        address: of the daemon.
        size: how many at once; a thread that finds all of them busy waits for one.
    """

    def __init__(self, address: Address, size: int) -> None:
        self._address = address
        self._size = size
        self._renew()
        _pools.add(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._waiting = 0
        self._all: list[Connection] = []
        self._idle: list[Connection] = []
        self._epoch = 0

    def take(self, deadline: float) -> Connection:
        """A connection for the calling thread, to be given back.

        Raises:
            DeadlineExceeded: all of them were busy until `deadline`.
        """
        with self._lock:
            while not self._idle:
                if len(self._all) < self._size:
                    connection = Connection(self._address)
                    self._all.append(connection)
                    break
                self._waiting += 1
                try:
                    in_time = self._freed.wait(max(0.0, deadline - time.monotonic()))
                finally:
                    self._waiting -= 1
                if not in_time:
                    raise DeadlineExceeded(
                        f"daemon at {self._address.target}: all {self._size} connections were busy until the end",
                        "raise max_connections of the client",
                    )
            else:
                connection = self._idle.pop()
            connection.epoch = self._epoch
            return connection

    def give(self, connection: Connection) -> None:
        """Give back what `take` gave."""
        with self._lock:
            if connection.epoch != self._epoch:
                connection.close()
            self._idle.append(connection)
            if self._waiting:
                self._freed.notify()

    def close(self) -> None:
        """Close what is idle now, and what is busy as soon as it is not."""
        with self._lock:
            self._epoch += 1
            for connection in self._idle:
                connection.close()

    def leave_behind(self) -> None:
        """In a child process: let go of the parent's connections, without a word to the server.

        Those that other threads of the parent were using are closed as well, or the server could not tell that
        the parent hung up.
        """
        inherited = self._all
        self._renew()
        for connection in inherited:
            connection.close()


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool.leave_behind()


os.register_at_fork(after_in_child=_after_fork)
