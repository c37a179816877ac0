"""What one user may take of the node at once: connections, requests, memory for bodies, requests per second.

Does: count per uid, and say when something is full.
Leaves out: who is who (agent.ipc.peer), the queue and who comes first in it (providers), sockets.

Rules
 * Full is Overloaded at once, with the time after which trying again makes sense. Nothing waits here.
 * What is counted in is counted out by whoever counted it in.
 * A lone request always passes the quota on memory: a ceiling for a single body is `ipc.max_body`.
 * Time is an argument.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from skerry.errors import Overloaded

#: Users remembered. Beyond that those without connections are forgotten, and with them how fast they asked.
MAX_USERS = 1024
#: Models per user whose rate is remembered; likewise.
MAX_MODELS = 256
_NO_LIMIT = 1 << 62


class Limits(NamedTuple):
    """The ceilings in force; 0 is none."""

    connections: int = 0
    connections_per_uid: int = 0
    requests_per_uid: int = 0
    bytes_per_uid: int = 0
    rate_per_uid: float = 0


class Bucket:
    """So many tokens a second, and at most those of one second (but one at least) at once."""

    __slots__ = ("_at_s", "_level")

    def __init__(self) -> None:
        self._level = math.inf
        self._at_s = 0.0

    def take(self, rate: float, now_s: float) -> float:
        """Take a token; returns 0, or the seconds until there is one."""
        level = min(max(rate, 1.0), self._level + (now_s - self._at_s) * rate)
        self._at_s = now_s
        if level < 1:
            self._level = level
            return (1 - level) / rate
        self._level = level - 1
        return 0.0


class Usage:
    """What one uid uses now.

    Attributes:
        connections: open.
        requests: being received, waiting or running.
        held_bytes: of memory for the bodies of large ones.
        free_below: a request passes without a closer look while `requests` is below this.
    """

    __slots__ = ("bucket", "connections", "free_below", "held_bytes", "models", "requests", "uid")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.connections = 0
        self.requests = 0
        self.held_bytes = 0
        self.free_below = 0
        self.bucket = Bucket()
        self.models: dict[str, Bucket] = {}


class Quotas:
    """The usage of everybody.

    Attributes:
        connections: open, of all users.
        refused: what was full -> how often that was said.
    """

    def __init__(self, limits: Limits) -> None:
        self.connections = 0
        self.refused = dict.fromkeys(("connections", "requests", "memory", "rate"), 0)
        self._users: dict[int, Usage] = {}
        self.limits = limits

    @property
    def limits(self) -> Limits:
        """The ceilings in force; may be replaced at any time."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        for usage in self._users.values():
            self._set_free(usage)

    def of(self, uid: int) -> Usage:
        """The usage of a user."""
        usage = self._users.get(uid)
        if usage is None:
            if len(self._users) >= MAX_USERS:
                self._users = {uid: usage for uid, usage in self._users.items() if usage.connections}
            usage = self._users[uid] = Usage(uid)
            self._set_free(usage)
        return usage

    def connect(self, usage: Usage) -> None:
        """Count one more connection.

        Raises:
            Overloaded: this user has enough of them, or all together have.
        """
        most, most_per_uid = self._limits.connections, self._limits.connections_per_uid
        if most and self.connections >= most:
            raise self.full(
                "connections",
                f"connections: expected at most {most}, got one more",
                "raise ipc.max_connections",
            )
        if most_per_uid and usage.connections >= most_per_uid:
            raise self.full(
                "connections",
                f"connections of uid {usage.uid}: expected at most {most_per_uid}, got one more",
                "close some, or raise ipc.connections_per_uid",
            )
        self.connections += 1
        usage.connections += 1

    def disconnect(self, usage: Usage) -> None:
        """Count a connection out."""
        self.connections -= 1
        usage.connections -= 1

    def check(self, usage: Usage, model: str, model_rate: float, now_s: float) -> None:
        """Whether a request may begin; whoever begins it counts it in.

        Args:
            usage: of the user who asks.
            model: which is asked.
            model_rate: requests per second that its owner allows each user; 0: no limit.
            now_s: seconds of a monotonic clock.

        Raises:
            Overloaded: too many at once, or too fast.
        """
        most, rate = self._limits.requests_per_uid, self._limits.rate_per_uid
        if most and usage.requests >= most:
            raise self.full(
                "requests",
                f"requests of uid {usage.uid}: expected at most {most} at once, got one more",
                "wait for answers, or raise ipc.requests_per_uid",
            )
        if model_rate:
            if model not in usage.models and len(usage.models) >= MAX_MODELS:
                usage.models.clear()
            wait_s = usage.models.setdefault(model, Bucket()).take(model_rate, now_s)
            self._require_now(
                wait_s,
                f"model {model}: expected at most {model_rate:g} requests per second of uid {usage.uid}",
                "the model's manifest says so: limits.rate",
            )
        if rate:
            self._require_now(
                usage.bucket.take(rate, now_s),
                f"requests of uid {usage.uid}: expected at most {rate:g} per second",
                "raise ipc.rate_per_uid",
            )

    def hold(self, usage: Usage, size_bytes: int) -> int:
        """Count in the memory for a body of this size; returns how many bytes to count out of `usage.held_bytes` later.

        Raises:
            Overloaded: this user's other requests have it.
        """
        # Shared memory is handed out in powers of two, answer included, so this is what such a body takes.
        taken_bytes = 1 << size_bytes.bit_length()
        most = self._limits.bytes_per_uid
        if most and usage.held_bytes and usage.held_bytes + taken_bytes > most:
            raise self.full(
                "memory",
                f"large requests of uid {usage.uid}: expected at most {most} bytes of memory at once,"
                f" got {usage.held_bytes + taken_bytes}",
                "wait for answers, or raise ipc.memory_per_uid",
            )
        usage.held_bytes += taken_bytes
        return taken_bytes

    def full(self, what: str, message: str, hint: str, retry_after_s: int = 1) -> Overloaded:
        """Count a refusal, and return the error that says it."""
        self.refused[what] += 1
        return Overloaded(message, hint, retry_after_s=retry_after_s)

    def _require_now(self, wait_s: float, expected: str, hint: str) -> None:
        if wait_s:
            raise self.full("rate", f"{expected}, got more", hint, math.ceil(wait_s))

    def _set_free(self, usage: Usage) -> None:
        """Where there is nothing to count but requests, the usual case costs one comparison."""
        metered = self._limits.rate_per_uid > 0
        usage.free_below = 0 if metered else (self._limits.requests_per_uid or _NO_LIMIT)
