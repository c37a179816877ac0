"""When a client sends a request again, and how long it waits before.

Does: the rule for both clients, as a function of what went wrong.
Leaves out: sleeping and sending (skerry.client, skerry.asyncclient).

Rules, in the order in which they are tried. "May repeat" is a GET, or a POST that only reads.

 | what went wrong                                      | may repeat           | inference, other POSTs |
 |------------------------------------------------------|----------------------|------------------------|
 | an idle connection was closed before a byte went out | at once, once        | at once, once          |
 | an idle connection closed without a byte of answer   | at once, once        | never                  |
 | nobody listens (the daemon restarts)                 | up to `retries`      | up to `retries`        |
 | full: 503 with Retry-After, nothing ran              | up to `retries`      | up to `retries`        |
 | the connection broke otherwise                       | up to `retries`      | never                  |
 | any other refusal, or out of time                    | never                | never                  |

 * An inference is sent again only if it provably did not run.
 * Pauses have full jitter, so that a thousand clients do not come back at once; after 503 they begin when the
   server said. A pause that would outlast the request's time is not begun: the error is raised at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skerry.errors import ConnectionLost, NotRunning, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from skerry.errors import SkerryError

#: The first pause is up to this long, each further one up to twice the last.
BASE_S = 0.05
LONGEST_S = 5.0
MAX_RETRIES = 100


class Retries:
    """The retries of one request.

    Args:
        allowed: how many the caller allows beyond those that are free.
        repeatable: whether the request may be sent again although it may have been carried out.
        uniform: (low, high) -> a random number between them.
    """

    __slots__ = ("_allowed", "_free", "_made", "_repeatable", "_uniform")

    def __init__(self, allowed: int, *, repeatable: bool, uniform: Callable[[float, float], float]) -> None:
        self._allowed = allowed
        self._repeatable = repeatable
        self._uniform = uniform
        self._made = 0
        self._free = True

    def pause_s(self, error: SkerryError, *, kept_alive: bool, left_s: float) -> float | None:
        """Seconds to wait before the request is sent again; None if it must not be.

        Args:
            error: what went wrong.
            kept_alive: whether the connection had served a request before.
            left_s: how much of the request's time is left.
        """
        lost = isinstance(error, ConnectionLost)
        unsent = isinstance(error, ConnectionLost) and not error.sent
        unanswered = isinstance(error, ConnectionLost) and not error.answered
        if self._free and kept_alive and (unsent or (unanswered and self._repeatable)):
            self._free = False
            return 0.0
        if self._made >= self._allowed:
            return None
        if not (isinstance(error, NotRunning | Overloaded) or unsent or (lost and self._repeatable)):
            return None
        pause = self._uniform(0.0, min(LONGEST_S, BASE_S * 2**self._made))
        if isinstance(error, Overloaded):
            pause += error.retry_after_s
        self._made += 1
        return pause if pause < left_s else None
