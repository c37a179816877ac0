"""What happened to this node's trust, as a chain of events in state.db that nobody edits unseen.

Does: append events inside a transaction of the caller's, read them back, check the chain.
Leaves out: deciding what is an event (whoever admits, refuses, loads), showing them (agent.cli).

Rules
 * An event is never changed. Each carries a hash over itself and over the hash of the one before it.
 * The chain shows that events were changed, taken out or put in. Cutting off its end, or making all of it anew, it
   cannot show by itself: whoever has to rule that out keeps the last hash somewhere else.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from skerry.terms import KIB

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

MAX_DETAIL_BYTES = 16 * KIB
MAX_SUBJECT_CHARS = 512


class Event(NamedTuple):
    """Something that happened: its kind, what it happened to, and plain JSON that says more."""

    kind: str
    subject: str
    detail: Mapping[str, Any] = {}


def append(connection: sqlite3.Connection, events: Iterable[Event], at_unix: float) -> None:
    """Add events, in their order, to the transaction that is open; raises sqlite3.Error.

    Args:
        connection: to state.db, with a write transaction, so that nobody appends in between.
        events: longer subjects and details than the ceilings are cut.
        at_unix: wall clock, seconds since the epoch.
    """
    last = connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = last or (0, "")
    for event in events:
        seq += 1
        detail = msgspec.json.encode(event.detail)
        if len(detail) > MAX_DETAIL_BYTES:
            detail = msgspec.json.encode({"cut": detail[:MAX_DETAIL_BYTES].decode("utf-8", "replace")})
        record = (seq, round(at_unix * 1e6), event.kind, event.subject[:MAX_SUBJECT_CHARS], detail.decode())
        digest = link(record, previous)
        connection.execute(
            "INSERT INTO audit (seq, at_us, kind, subject, detail, previous, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*record, previous, digest),
        )
        previous = digest


def link(record: tuple[int, int, str, str, str], previous: str) -> str:
    """The hash of an event (seq, at_us, kind, subject, detail) that follows the one with the hash `previous`."""
    return hashlib.sha256(msgspec.json.encode([*record, previous])).hexdigest()
