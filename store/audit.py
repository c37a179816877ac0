"""What happened to this node's trust, as a chain of events in state.db that nobody edits unseen.

Does: append events inside a transaction of the caller's, let the oldest go, read them back, check the chain.
Leaves out: deciding what is an event (whoever admits, refuses, loads), showing them (agent.cli), connections
(store.trail).

Rules
 * An event is never changed. Each carries a hash over itself and over the hash of the one before it.
 * The oldest go only here, and an event says which was the last of them: what is left verifies without them.
 * The chain shows that events were changed, taken out or put in. Cutting off its end, or making all of it anew, it
   cannot show by itself: whoever has to rule that out keeps the last hash somewhere else, and has it looked for.
 * Several processes append. Each looks for the last event inside its write transaction (BEGIN IMMEDIATE), so no two
   of them follow the same one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from skerry.terms import KIB

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Mapping

MAX_DETAIL_BYTES = 16 * KIB
MAX_SUBJECT_CHARS = 512
MAX_EVENTS = 100_000  # some 25 MB; years of a node that is left alone
PRUNED_AT_ONCE = 10_000  # so that not every event of a full table deletes one

#: The kind of the event that says that the oldest went: through which seq, how many, and the last one's hash.
PRUNED = "audit.pruned"

# As bytes, because a text that somebody edited need not be UTF-8; and by the key, which is the order of the chain.
_COLUMNS = "seq, at_us, CAST(kind AS BLOB), CAST(subject AS BLOB), CAST(detail AS BLOB)"
_CHAIN = f"SELECT {_COLUMNS}, CAST(previous AS BLOB), CAST(hash AS BLOB) FROM audit ORDER BY seq"  # noqa: S608 - ours
_LATEST = (
    f"SELECT {_COLUMNS}, CAST(hash AS BLOB) FROM audit"  # noqa: S608 - ours
    " WHERE (?1 IS NULL OR kind = ?1 OR substr(kind, 1, length(?1) + 1) = ?1 || '.')"
    " AND (?2 IS NULL OR at_us >= ?2) ORDER BY seq DESC LIMIT ?3"
)


class Event(NamedTuple):
    """Something that happened: its kind, what it happened to, and plain JSON that says more."""

    kind: str
    subject: str
    detail: Mapping[str, Any] = {}


class Record(NamedTuple):
    """An event as it was kept. `at_unix`: wall clock, seconds since the epoch, as the node believed then."""

    seq: int
    at_unix: float
    kind: str
    subject: str
    detail: dict[str, Any]
    hash: str


class Report(NamedTuple):
    """What a look at the whole chain found.

    Attributes:
        events: how many there are.
        first_seq: of the oldest; 0 if there is none. More than 1: older ones went.
        last_seq: of the newest; 0 if there is none.
        last_hash: of the newest; empty if there is none. To be kept elsewhere.
        broken_seq: where the chain first does not hold; None if it does.
        problem: what is wrong there.
        found: whether the hash that was looked for is the one of an event in it, or of the last that went. None if
            none was looked for.
    """

    events: int
    first_seq: int
    last_seq: int
    last_hash: str
    broken_seq: int | None = None
    problem: str = ""
    found: bool | None = None


def append(connection: sqlite3.Connection, events: Iterable[Event], at_unix: float) -> None:
    """Add events, in their order, to the transaction that is open; raises sqlite3.Error.

    Args:
        connection: to state.db, with a write transaction, so that nobody appends in between.
        events: longer subjects and details than the ceilings are cut.
        at_unix: wall clock, seconds since the epoch.
    """
    last = connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = last or (0, "")
    for event in (*events, *_pruned(connection)):
        seq += 1
        detail = msgspec.json.encode(_printable_all(event.detail))
        if len(detail) > MAX_DETAIL_BYTES:
            detail = msgspec.json.encode({"cut": detail[:MAX_DETAIL_BYTES].decode("utf-8", "replace")})
        record = (
            seq,
            round(at_unix * 1e6),
            event.kind,
            _printable(event.subject[:MAX_SUBJECT_CHARS]),
            detail.decode(),
        )
        digest = link(record, previous)
        connection.execute(
            "INSERT INTO audit (seq, at_us, kind, subject, detail, previous, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*record, previous, digest),
        )
        previous = digest


def _printable_all(value: Any) -> Any:  # noqa: ANN401 - plain JSON
    """Plain JSON with every text printable."""
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, dict):
        return {_printable(str(key)): _printable_all(item) for key, item in value.items()}
    return [_printable_all(item) for item in value] if isinstance(value, list | tuple) else value


def _printable(text: str) -> str:
    """`text` as a database can carry it: the name of a file need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _pruned(connection: sqlite3.Connection) -> Iterator[Event]:
    """Let the oldest events go if there are too many, and say so in an event of its own.

    Rows are counted, because a row with a large seq that somebody put in must not drive the others out. What goes is
    checked for the last time.
    """
    first, last = connection.execute("SELECT min(seq), max(seq) FROM audit").fetchone()
    if first is None or last - first + 1 < MAX_EVENTS:  # the usual case, without counting
        return
    if connection.execute("SELECT count(*) FROM audit").fetchone()[0] < MAX_EVENTS:
        return
    walk = _Walk()
    for (detail,) in connection.execute("SELECT CAST(detail AS BLOB) FROM audit WHERE kind = ?", (PRUNED,)):
        walk.note_gone(_detail(_text(detail)))
    for row in connection.execute(f"{_CHAIN} LIMIT ?", (PRUNED_AT_ONCE,)):
        walk.take(row)
    connection.execute("DELETE FROM audit WHERE seq <= ?", (walk.last_seq,))
    broken_seq, problem = walk.verdict()
    broken = {} if broken_seq is None else {"broken": broken_seq, "problem": problem}
    yield Event(
        PRUNED, "", {"through": walk.last_seq, "hash": walk.last_hash, "count": walk.events, **broken}
    )


def link(record: tuple[Any, ...], previous: str) -> str:
    """The hash of an event (seq, at_us, kind, subject, detail) that follows the one with the hash `previous`."""
    return hashlib.sha256(msgspec.json.encode([*record, previous])).hexdigest()


def latest(
    connection: sqlite3.Connection,
    *,
    kind: str | None = None,
    since_unix: float | None = None,
    limit: int,
) -> list[Record]:
    """Events, the newest first; raises sqlite3.Error.

    Args:
        connection: to state.db.
        kind: this one, or all that begin with it and a dot: "daemon" is daemon.started and daemon.stopped.
        since_unix: wall clock; clocks jump, so older events may stand between newer ones.
        limit: at most so many.
    """
    since_us = None if since_unix is None else round(since_unix * 1e6)
    rows = connection.execute(_LATEST, (kind, since_us, limit)).fetchall()
    return [_record(row) for row in rows]


def _record(row: tuple[Any, ...]) -> Record:
    seq, at_us, kind, subject, detail, digest = row
    return Record(
        seq,
        at_us / 1e6 if isinstance(at_us, int | float) else 0.0,
        _text(kind),
        _text(subject),
        _detail(_text(detail)),
        _text(digest),
    )


def _text(value: Any) -> str:  # noqa: ANN401 - whatever a hand put into the column
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _detail(text: str) -> dict[str, Any]:
    """The detail as it was given; of one that somebody edited, its text."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {"unreadable": text}


def verify(connection: sqlite3.Connection, expected: str | None = None) -> Report:
    """Walk the whole chain, oldest first; raises sqlite3.Error. 100,000 events take a second or two.

    Args:
        connection: to state.db.
        expected: a hash that was printed once; it is looked for.
    """
    walk = _Walk()
    found = False
    for row in connection.execute(_CHAIN):
        walk.take(row)
        found = found or walk.last_hash == expected
    broken_seq, problem = walk.verdict()
    return Report(
        walk.events,
        walk.first_seq,
        walk.last_seq,
        walk.last_hash,
        broken_seq,
        problem,
        None if expected is None else found or expected == walk.gone_hash,
    )


class _Walk:
    """What is known of the chain so far. Only the first fault counts: what comes after one says nothing."""

    def __init__(self) -> None:
        self.events = 0
        self.first_seq = 0
        self.last_seq = 0
        self.last_hash = ""
        self.gone_hash = ""  # of the last event that went, as the oldest one that is left knows it
        self._gone: dict[int, str] = {}  # from the events that say so: seq -> hash
        self._fault: tuple[int, str] | None = None

    def take(self, row: tuple[Any, ...]) -> None:
        """The next event."""
        seq, at_us = row[:2]
        kind, subject, detail, previous, digest = map(_text, row[2:])
        if not self.events:
            self.first_seq, self.gone_hash = seq, previous
        elif seq != self.last_seq + 1:
            self._blame(self.last_seq + 1, f"expected an event, got none before {seq}")
        elif previous != self.last_hash:
            self._blame(
                seq, f"expected it to follow {self.last_hash or 'nothing'}, got {previous or 'nothing'}"
            )
        made = link((seq, at_us, kind, subject, detail), previous)
        if made != digest:
            self._blame(seq, f"expected the hash {made} of what it says, got {digest}")
        self.events += 1
        self.last_seq, self.last_hash = seq, digest
        if kind == PRUNED:
            self.note_gone(_detail(detail))

    def note_gone(self, said: dict[str, Any]) -> None:
        """What an event says of those that went."""
        through, broken = said.get("through"), said.get("broken")
        if isinstance(through, int):
            self._gone[through] = str(said.get("hash"))
        if isinstance(broken, int):
            self._blame(broken, f"{said.get('problem')}; it has gone since")

    def _blame(self, seq: int, problem: str) -> None:
        self._fault = self._fault or (seq, problem)

    def verdict(self) -> tuple[int | None, str]:
        """Where the chain first does not hold, and why; None if it does."""
        if self.events and self.first_seq > 1 and self._gone.get(self.first_seq - 1) != self.gone_hash:
            return self.first_seq - 1, f"expected an event, got none before {self.first_seq}"
        if self.events and self.first_seq == 1 and self.gone_hash:
            return 1, f"expected it to follow nothing, got {self.gone_hash}"
        return self._fault or (None, "")
