"""One HTTP connection to a daemon, over its Unix socket or TCP: requests out, answers or SkerryErrors back.

Leaves out: what a request means (skerry.client).

Rules
 * A request is repeated only if nothing can have happened: it is a GET, the connection had been kept
   alive, and the server closed it before it answered a byte.
 * After any failure the connection is closed, so that no half-read answer meets the next request.
"""

from __future__ import annotations

import http.client
import json
import socket
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from skerry.errors import (
    DeadlineExceeded,
    Denied,
    ExecutionFailed,
    InternalError,
    InvalidRequest,
    NotFound,
    NotRunning,
    Overloaded,
    SkerryError,
    TooLarge,
    Unavailable,
    Unsupported,
)
from skerry.terms import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")
Response = http.client.HTTPResponse

MAX_ERROR_BYTES = MIB

_ERRORS: dict[int, type[SkerryError]] = {
    400: InvalidRequest,
    401: Denied,
    403: Denied,
    404: NotFound,
    405: InvalidRequest,
    408: InvalidRequest,
    413: TooLarge,
    431: TooLarge,
    500: ExecutionFailed,  # or a bug of the daemon's; its message says, its log has the rest
    501: Unsupported,
    503: Unavailable,
    504: DeadlineExceeded,
}


class Transport:
    """A kept-alive connection, opened by the first request; for one thread at a time.

    Args:
        target: the path of a Unix socket, or "http://host:port".
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._connection = _connection(target)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()

    def ask(  # noqa: PLR0913 - the parts of one HTTP exchange
        self,
        method: str,
        path: str,
        *,
        read: Callable[[Response], T],
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Send one request and return what `read` makes of the answer.

        Args:
            method: GET or POST.
            path: from the first slash on, quoted.
            read: takes a response below 400 and consumes its body. KeyError, TypeError and ValueError
                out of it mean that the server does not speak the protocol.
            timeout_s: the longest silence of the server.
            body: None sends none; b"" says that it is empty.
            headers: beside Host and Content-Length.

        Raises:
            NotRunning: nothing listens at the target; Denied: the socket is not for this user.
            DeadlineExceeded: nothing came in time; Unavailable: the connection broke.
            InternalError: the answer does not follow the protocol.
            SkerryError: what the server refused, by its status code.
        """
        try:
            response = self._send(method, path, body, headers or {}, timeout_s)
            if response.status < 400:
                return read(response)
            refusal = _refusal(response)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise _explain(error, self.target) from error
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise InternalError(f"response: expected the protocol's fields, got {error!r}") from error
        except BaseException:
            self.close()
            raise
        if not response.isclosed():  # a refusal longer than anybody reads
            self.close()
        raise refusal

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Response:
        connection = self._connection
        if connection.sock is not None and _hung_up(connection.sock):
            connection.close()  # an idle server closed it, and this request has not been sent yet
        kept_alive = connection.sock is not None
        try:
            return self._exchange(method, path, body, headers, timeout_s)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            if not (kept_alive and method == "GET"):
                raise
        connection.close()
        return self._exchange(method, path, body, headers, timeout_s)

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Response:
        connection = self._connection
        connection.timeout = timeout_s
        if connection.sock is None:
            connection.connect()
        connection.sock.settimeout(timeout_s)
        connection.request(method, path, body, headers)
        return connection.getresponse()


def read_exactly(response: Response, size_bytes: int, limit_bytes: int) -> bytearray:
    """The next `size_bytes` of a body, at most `limit_bytes`."""
    if not 0 <= size_bytes <= limit_bytes:
        raise InternalError(f"response: expected at most {limit_bytes} bytes, got {size_bytes}")
    buffer = bytearray(size_bytes)
    fill(response, memoryview(buffer))
    return buffer


def fill(response: Response, view: memoryview) -> None:
    """Receive the next bytes of a body straight into `view`, all of it."""
    while view:
        count = response.readinto(view)
        if count == 0:
            raise http.client.IncompleteRead(b"", len(view))
        view = view[count:]


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket; the Host header says localhost, as curl does."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout)
            connection.connect(self._path)
        except BaseException:
            connection.close()
            raise
        self.sock = connection


def _connection(target: str) -> http.client.HTTPConnection:
    if not target.startswith("http://"):
        return _UnixConnection(target)
    url = urlsplit(target)
    if not url.hostname or url.path.strip("/") or url.query:
        raise InvalidRequest(f"daemon: expected a socket path or http://host:port, got {target!r}")
    return http.client.HTTPConnection(url.hostname, url.port or 8000)


def _hung_up(connection: socket.socket) -> bool:
    """Whether the server closed a connection that was kept alive (or sent what nobody asked for)."""
    connection.settimeout(0)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _refusal(response: Response) -> SkerryError:
    body = response.read(MAX_ERROR_BYTES)
    try:
        told = json.loads(body)
        message, hint = str(told["error"]), str(told.get("hint", ""))
    except (ValueError, TypeError, KeyError):
        message, hint = f"HTTP {response.status}: {body[:200].decode(errors='replace').strip()}", ""
    retry_after = response.getheader("Retry-After", "")
    if response.status == 503 and retry_after.isdigit():
        return Overloaded(message, hint, retry_after_s=int(retry_after))
    fallback = InvalidRequest if response.status < 500 else InternalError
    return _ERRORS.get(response.status, fallback)(message, hint)


def _explain(error: Exception, target: str) -> SkerryError:
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"daemon at {target}: no answer in time")
    if isinstance(error, PermissionError):
        return Denied(
            f"daemon at {target}: permission denied",
            "only the socket's owner and its group may connect; `ls -l` on the socket names the group",
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError | ConnectionRefusedError):
        return NotRunning(f"no daemon answers at {target}", "start one with `skerry run`")
    # The request may have run or not; only its caller knows whether it may be sent again.
    return Unavailable(f"daemon at {target}: the connection broke before the answer was complete ({error})")
