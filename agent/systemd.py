"""What a service manager and its service say to each other: readiness, watchdog, inherited sockets.

Does: sd_notify's datagrams and socket activation, without libsystemd.
Leaves out: deciding when we are ready or alive (agent.daemon).

Rules
 * Outside systemd everything here is a no-op that costs nothing.
 * The variables are taken out of the environment when they are read: a child must never speak for us.

Source: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3), systemd 252.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from skerry.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

FIRST_FD = 3  # SD_LISTEN_FDS_START
MAX_LISTEN_FDS = 16  # ours are at most four: HTTP, gRPC, admin, TCP
MAX_STATUS_CHARS = 512
_SEND_TIMEOUT_S = 1.0  # the manager's queue is full only if the manager hangs


class Activated(NamedTuple):
    """A listening socket that systemd opened for us, and the FileDescriptorName= of its unit."""

    name: str
    sock: socket.socket


class Notifier:
    """Tells the service manager how we are.

    Args:
        address: NOTIFY_SOCKET's value: an absolute path, or '@' and an abstract name. Empty: say nothing.
        watchdog_s: within this time the manager wants to hear from us; None: it does not watch.
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        # vsock addresses (a manager outside a virtual machine) are not for us: nothing to say to it
        self._address = address if address.startswith(("/", "@")) else ""
        self.watchdog_s = watchdog_s

    @classmethod
    def from_env(cls, env: MutableMapping[str, str], pid: int) -> Notifier:
        """Take what systemd left in `env`, which is `os.environ`, for the process `pid`, which is ours."""
        address = env.pop("NOTIFY_SOCKET", "")
        usec = env.pop("WATCHDOG_USEC", "")
        for_pid = env.pop("WATCHDOG_PID", str(pid))
        watched = usec.isascii() and usec.isdigit() and int(usec) > 0 and for_pid == str(pid)
        return cls(address, int(usec) / 1e6 if watched else None)

    @property
    def ping_interval_s(self) -> float | None:
        """How often `ping` is due: half the watchdog's time, as sd_watchdog_enabled(3) recommends."""
        return None if self.watchdog_s is None else self.watchdog_s / 2

    def ready(self, status: str) -> bool:
        """We serve. Also ends what `reloading` began."""
        return self._send(f"READY=1\nSTATUS={_one_line(status)}\nMAINPID={os.getpid()}")

    def status(self, status: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(f"STATUS={_one_line(status)}")

    def reloading(self) -> bool:
        """The configuration is being read again; `ready` must follow."""
        # Type=notify-reload (systemd 253) tells this reload from an earlier one by the stamp.
        return self._send(
            f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
        )

    def stopping(self) -> bool:
        """The drain has begun."""
        return self._send("STOPPING=1\nSTATUS=stopping")

    def ping(self) -> bool:
        """We are alive. To be sent by what must make progress, never by a timer of its own."""
        return self._send("WATCHDOG=1")

    def _send(self, message: str) -> bool:
        """Whether the message was delivered. A manager that is gone is no reason to fail."""
        if not self._address:
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(_SEND_TIMEOUT_S)
            with contextlib.suppress(OSError):
                sender.sendto(message.encode(), address)
                return True
        return False


def take_sockets(env: MutableMapping[str, str], pid: int, first_fd: int = FIRST_FD) -> list[Activated]:
    """The sockets that systemd passed to us; empty if it did not. The caller owns them.

    Args:
        env: `os.environ`; LISTEN_* are removed from it.
        pid: ours. Descriptors meant for another process are left alone.
        first_fd: where they begin.

    Raises:
        ConfigError: more than MAX_LISTEN_FDS, or a descriptor that is no listening stream socket.
    """
    count_text, names_text = env.pop("LISTEN_FDS", ""), env.pop("LISTEN_FDNAMES", "")
    if env.pop("LISTEN_PID", "") != str(pid) or not (count_text.isascii() and count_text.isdigit()):
        return []
    count = int(count_text)
    if count > MAX_LISTEN_FDS:
        raise ConfigError(f"LISTEN_FDS: expected at most {MAX_LISTEN_FDS} sockets, got {count}")
    names = names_text.split(":") if names_text else []
    names += ["unknown"] * (count - len(names))  # what sd_listen_fds_with_names(3) calls them
    return [Activated(names[index], _adopt(first_fd + index)) for index in range(count)]


def _adopt(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)  # noqa: FBT003 - positional only; systemd passes them inheritable
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"descriptor {fd} from systemd: expected a socket, got {error.strerror}") from error
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise ConfigError(
            f"descriptor {fd} from systemd: expected a listening stream socket, got another kind",
            "use ListenStream= and Accept=no in the socket unit",
        )
    return sock


def _one_line(text: str) -> str:
    # A line feed would start a new assignment.
    return " ".join(text.split())[:MAX_STATUS_CHARS]
