"""Where a daemon listens, and what it means when it does not.

Leaves out: connecting (skerry.transport, skerry.asynctransport).
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from skerry.errors import ConnectionLost, DeadlineExceeded, Denied, InvalidRequest, NotRunning, SkerryError

_DEFAULT_PORT = 8000  # Triton's


class Address(NamedTuple):
    """A parsed target. `port` is 0 for a Unix socket, whose path is `place`; else `place` is a host."""

    target: str
    place: str
    port: int
    host: str

    @property
    def is_unix(self) -> bool:
        """Whether it is a Unix socket."""
        return not self.port

    def owner_uid(self) -> int | None:
        """The user whose socket it is, and so the daemon's; None if that cannot be told."""
        try:
            return os.stat(self.place).st_uid if self.is_unix else None  # noqa: PTH116 - a Path for one stat
        except OSError:
            return None


def parse(target: str) -> Address:
    """The path of a Unix socket, or "http://host:port" -> Address."""
    if not target.startswith("http://"):
        return Address(target, target, 0, "localhost")  # the Host header says localhost, as curl does
    try:
        url = urlsplit(target)
        place, port = url.hostname, url.port or _DEFAULT_PORT
    except ValueError:
        place, port, url = None, 0, urlsplit("")
    if not place or url.path.strip("/") or url.query or url.username is not None:
        raise InvalidRequest(f"daemon: expected a socket path or http://host:port, got {target!r}")
    return Address(target, place, port, url.netloc)


def explain(error: Exception, target: str, *, sent: bool, answered: bool) -> SkerryError:
    """What an OSError on the way to or from `target` means for the request.

    Args:
        error: from connecting, sending or receiving.
        target: for the message.
        sent: whether any byte of the request had gone out.
        answered: whether any byte of the answer had come.
    """
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"daemon at {target}: no answer in time")
    if isinstance(error, PermissionError):
        return Denied(
            f"daemon at {target}: permission denied",
            "only the socket's owner and its group may connect; `ls -l` on the socket names the group",
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError | ConnectionRefusedError | socket.gaierror):
        return NotRunning(f"no daemon answers at {target}", "start one with `skerry run`")
    return ConnectionLost(
        f"daemon at {target}: the connection broke before the answer was complete ({error})",
        sent=sent,
        answered=answered,
    )
