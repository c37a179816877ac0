"""What a node has admitted, and what may not fall."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta

import pytest
from store_world import NOON

from skerry.errors import StorageFailed
from store.audit import Event
from store.ledger import Admission, Floor, Ledger, Standing
from store.timekeeping import Reading

ADMISSION = Admission({"1.timestamp.json": "ab"}, NOON, NOON.timestamp(), "synchronised", "a.tar")


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "state.db")


def record(ledger, **given):
    ledger.record(at_unix=NOON.timestamp(), **given)


def rows(ledger, statement):
    with sqlite3.connect(ledger.path) as connection:
        return connection.execute(statement).fetchall()


def test_a_node_without_a_file_stands_nowhere_and_looking_makes_none(ledger):
    assert ledger.read() == Standing()
    assert not ledger.path.exists()


def test_what_is_recorded_is_read(ledger):
    record(
        ledger,
        admission=ADMISSION,
        floors={"timestamp": Floor("keys", 3, "ab"), "models-é": Floor("keys", 2)},
        releases={"det": 4},
        time_floor=NOON,
        pinned="cd",
        events=[Event("admitted", "revision 3")],
    )
    standing = ledger.read()
    assert standing.admission == ADMISSION
    assert standing.floors == {"timestamp": Floor("keys", 3, "ab"), "models-é": Floor("keys", 2)}
    assert (standing.releases, standing.time_floor, standing.pinned) == ({"det": 4}, NOON, "cd")
    assert rows(ledger, "SELECT kind, subject FROM audit") == [("admitted", "revision 3")]


def test_floors_rise_and_never_fall_under_the_same_keys(ledger):
    record(ledger, floors={"timestamp": Floor("a", 5, "x"), "targets": Floor("b", 2)}, releases={"det": 3})
    record(ledger, floors={"timestamp": Floor("a", 4, "y"), "targets": Floor("b", 7)}, releases={"det": 2})
    standing = ledger.read()
    assert standing.floors == {"timestamp": Floor("a", 5, "x"), "targets": Floor("b", 7)}
    assert standing.releases == {"det": 3}


def test_new_keys_begin_a_floor_of_their_own(ledger):
    record(ledger, floors={"timestamp": Floor("stolen", 10**6)})
    record(ledger, floors={"timestamp": Floor("new", 6, "z")})
    assert ledger.read().floors == {"timestamp": Floor("new", 6, "z")}


def test_what_is_not_given_stays(ledger):
    record(ledger, admission=ADMISSION, time_floor=NOON, pinned="cd")
    record(ledger, events=[Event("refused", "b.tar")])
    standing = ledger.read()
    assert (standing.admission, standing.time_floor, standing.pinned) == (ADMISSION, NOON, "cd")


def test_another_root_begins_anew_and_leaves_the_events(ledger):
    record(ledger, admission=ADMISSION, floors={"root": Floor("", 2)}, pinned="cd", events=[Event("a", "b")])
    record(ledger, forget=True, pinned="ef", events=[Event("trust.changed", "c")])
    assert ledger.read() == Standing(pinned="ef")
    assert len(rows(ledger, "SELECT * FROM audit")) == 2


def test_a_transaction_that_fails_leaves_nothing_of_itself(ledger):
    record(ledger, floors={"timestamp": Floor("a", 1)})
    with pytest.raises(OverflowError):
        record(ledger, admission=ADMISSION, floors={"timestamp": Floor("a", 2**70)})
    standing = ledger.read()
    assert standing.admission is None
    assert standing.floors == {"timestamp": Floor("a", 1)}


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE admission SET files = '{'",
        "UPDATE admission SET judged_at = 'noon'",
        "UPDATE fact SET value = 'noon' WHERE name = 'time_floor'",
    ],
)
def test_rows_that_nobody_wrote_are_an_error_that_says_so(ledger, harm):
    record(ledger, admission=ADMISSION, time_floor=NOON)
    rows(ledger, harm)
    with pytest.raises(StorageFailed, match="damaged: expected rows as they were written"):
        ledger.read()


def test_a_damaged_file_is_never_replaced_here(ledger):
    record(ledger, admission=ADMISSION)
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(b"x" * 100 + data[100:])
    for work in (ledger.read, lambda: record(ledger, pinned="cd")):
        with pytest.raises(StorageFailed):
            work()
    assert len(ledger.path.read_bytes()) == len(data)


@pytest.mark.parametrize("synchronised", [True, False])
def test_time_counts_only_where_it_can_be_trusted_and_never_below_the_floor(synchronised):
    early, late = datetime(1970, 1, 1, tzinfo=UTC), datetime(2099, 1, 1, tzinfo=UTC)
    assert Reading(early, synchronised).reference(NOON) == NOON
    assert Reading(late, synchronised).reference(NOON) == (late if synchronised else NOON)


def test_a_signer_whose_clock_runs_ahead_does_not_push_a_good_clock():
    ahead = NOON + timedelta(days=900)
    assert Reading(NOON, synchronised=True).bounded(ahead) == NOON
    assert Reading(NOON, synchronised=False).bounded(ahead) == ahead
