"""The one error family that leaves any room of Skerry.

Does: name errors by what the caller should do, and carry what was expected, what was found, and a hint.
Leaves out: HTTP and gRPC status codes (agent.ipc) and exit codes (agent.cli).

Rules
 * The message says what failed, on what, then expected and got, in this order.
 * The hint says what to do, and is a sentence of its own.
"""

from __future__ import annotations


class SkerryError(Exception):
    """Anything Skerry refuses or fails at.

    Args:
        message: what failed, on what; "expected X, got Y" where that applies.
        hint: what the reader can do about it, without a final line feed.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InvalidRequest(SkerryError):
    """The request itself is wrong; sending it again unchanged cannot help."""


class TooLarge(InvalidRequest):
    """The request is over a ceiling, which the message names."""


class NotFound(SkerryError):
    """No such model, version or page."""


class Denied(SkerryError):
    """The peer is not allowed to do this."""


class Unsupported(SkerryError):
    """Asked for something Skerry knows of and does not do."""


class Unavailable(SkerryError):
    """The model exists and cannot answer now; the message has its state and the reason."""


class Overloaded(Unavailable):
    """The queue is full; nothing ran, so sending it again after `retry_after_s` is safe."""

    def __init__(self, message: str, hint: str = "", *, retry_after_s: int = 1) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Unavailable):
    """The request's time ran out, in the queue or in the run."""


class ConnectionLost(Unavailable):
    """The connection broke under the request.

    Args:
        message: as of every SkerryError.
        hint: likewise.
        sent: whether any byte of the request had gone out. If so it may have run; only its caller knows whether
            it may be sent again.
        answered: whether any byte of the answer had come.
    """

    def __init__(self, message: str, hint: str = "", *, sent: bool = True, answered: bool = False) -> None:
        super().__init__(message, hint)
        self.sent = sent
        self.answered = answered


class ExecutionFailed(SkerryError):
    """The model's run raised; the worker lives on."""


class WorkerCrashed(ExecutionFailed):
    """The worker process died under the request; the message names the signal."""


class Untrusted(SkerryError):
    """Bytes or metadata failed verification; nothing of them was used."""


class StorageFailed(SkerryError):
    """The disk refused; what was there before still is."""


class ConfigError(SkerryError):
    """The configuration is wrong; the message has file and line."""


class NotRunning(SkerryError):
    """No daemon answers on the socket."""


class InternalError(SkerryError):
    """A bug of ours; the message is safe to show, the log has the rest."""
