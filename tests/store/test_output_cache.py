"""Answers survive restarts and damage, and a wrong one is never given."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
import tracemalloc

import pytest

from skerry.errors import StorageFailed
from skerry.terms import KIB, MIB, TensorView
from store import migrate
from store.cache import MAX_TOUCHED, OutputCache
from store.cachekey import digest, prefix

MODEL, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
HOUR = 3600.0


class Clock:
    """A wall clock that a test moves."""

    now = 1_700_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    migrate.migrate("cache", str(tmp_path / "cache.db"))
    return tmp_path / "cache.db"


@pytest.fixture
def open_cache(path, clock):
    caches = []

    def opener(*, max_bytes=16 * MIB, memory_bytes=1 * MIB):
        cache = OutputCache(path, max_bytes=max_bytes, memory_bytes=memory_bytes, wall_clock=clock)
        caches.append(cache)
        return cache

    yield opener
    for cache in caches:
        cache.close()


@pytest.fixture
def cache(open_cache):
    """With nothing in memory: each hit comes from the file."""
    return open_cache(memory_bytes=0)


def key_of(number):
    return random.Random(number).randbytes(32)


def payload_of(number, size=40):
    return random.Random(-1 - number).randbytes(size)


def layout_of(size):
    half = size // 2
    return (
        TensorView("y", "UINT8", (half,), 0, half),
        TensorView("z", "UINT8", (1, size - half), half, size - half),
    )


def put(cache, number, *, model=MODEL, size=40, ttl_s=HOUR):
    cache.put(key_of(number), model, layout_of(size), payload_of(number, size), ttl_s)


def settle(cache):
    """Wait until everything that was put or dropped so far has reached the file."""
    cache._database.submit(lambda _connection: None).result(30)


def held_numbers(cache, numbers, size=40):
    """Which are answered; each answer must be the right one."""
    found = set()
    for number in numbers:
        answer = cache.get(key_of(number))
        if answer is not None:
            assert (answer.layout, answer.payload) == (layout_of(size), payload_of(number, size))
            found.add(number)
    return found


# -- hits and misses


def test_answer_is_given_from_memory_at_once_and_from_the_file_after_a_restart(open_cache):
    cache = open_cache()
    assert cache.get(key_of(1)) is None
    put(cache, 1)
    put(cache, 2)
    assert held_numbers(cache, [1, 2, 3]) == {1, 2}
    assert cache.stats()[2:5] == (2, 2, 2)  # hits, of which in memory, misses
    cache.close()
    cache = open_cache()
    assert held_numbers(cache, [1, 2, 3]) == {1, 2}
    assert held_numbers(cache, [1, 2]) == {1, 2}
    stats = cache.stats()
    assert (stats.hits, stats.memory_hits, stats.misses, stats.set_aside) == (4, 2, 1, 0)


def test_first_start_makes_the_file(tmp_path, clock):
    cache = OutputCache(tmp_path / "cache.db", max_bytes=MIB, memory_bytes=MIB, wall_clock=clock)
    put(cache, 1)
    cache.close()
    assert [file.name for file in tmp_path.iterdir()] == ["cache.db"]


def test_two_models_with_equal_inputs_keep_their_own_answers(cache):
    inputs, body = (TensorView("x", "FP32", (1, 4), 0, 16),), memoryview(bytes(16))
    keys = [digest(prefix(model, inputs, (), {}, "uid:1"), inputs, body) for model in (MODEL, OTHER)]
    for number, (key, model) in enumerate(zip(keys, (MODEL, OTHER), strict=True)):
        cache.put(key, model, layout_of(40), payload_of(number), HOUR)
    settle(cache)
    assert [cache.get(key).payload for key in keys] == [payload_of(0), payload_of(1)]


def test_newer_answer_replaces_the_older(open_cache):
    cache = open_cache()
    put(cache, 1)
    cache.put(key_of(1), MODEL, (), b"newer", HOUR)
    assert cache.get(key_of(1)).payload == b"newer"
    cache.close()
    cache = open_cache()
    assert (cache.get(key_of(1)).layout, cache.get(key_of(1)).payload) == ((), b"newer")
    settle(cache)
    assert cache.stats().entries == 1


def test_keys_that_share_a_row_are_not_mistaken(cache):
    one, two = b"\1" * 8 + b"\2" * 24, b"\1" * 8 + b"\3" * 24
    cache.put(one, MODEL, (), b"one", HOUR)
    settle(cache)
    assert cache.get(two) is None
    settle(cache)
    cache.put(two, MODEL, (), b"two", HOUR)
    settle(cache)
    assert cache.get(two).payload == b"two"
    assert cache.get(one) is None


def test_forgotten_model_is_gone_and_the_other_stays(open_cache):
    for memory_bytes in (0, MIB):
        cache = open_cache(memory_bytes=memory_bytes)
        for number in range(20):
            put(cache, number, model=MODEL if number % 2 else OTHER)
        cache.forget(MODEL)
        settle(cache)
        assert held_numbers(cache, range(20)) == set(range(0, 20, 2))
        assert cache.stats().entries == 10
        cache.close()


def test_closed_cache_only_misses(open_cache):
    cache = open_cache(memory_bytes=0)
    put(cache, 1)
    cache.close()
    cache.close()
    put(cache, 2)
    cache.forget(MODEL)
    assert held_numbers(cache, [1, 2]) == set()
    assert cache.stats().dropped_writes == 1


# -- time


@pytest.mark.parametrize("memory_bytes", [0, MIB], ids=["file", "memory"])
def test_answer_is_valid_from_when_it_was_stored_until_its_ttl_ends(open_cache, clock, memory_bytes):
    cache = open_cache(memory_bytes=memory_bytes)
    put(cache, 1, ttl_s=10.0)
    put(cache, 2, ttl_s=20.0)
    settle(cache)
    stored_at = clock.now
    for elapsed, expected in [(0, {1, 2}), (9.9, {1, 2}), (10, {2}), (20, set()), (-0.1, set()), (0, {1, 2})]:
        clock.now = stored_at + elapsed
        assert held_numbers(cache, [1, 2]) == expected, elapsed


def test_ttl_goes_on_over_a_restart(open_cache, clock):
    cache = open_cache()
    put(cache, 1, ttl_s=10.0)
    put(cache, 2, ttl_s=100.0)
    cache.close()
    clock.now += 50
    assert held_numbers(open_cache(), [1, 2]) == {2}


def test_boot_without_a_clock_loses_nothing(open_cache, clock):
    cache = open_cache()
    put(cache, 1)
    cache.close()
    real, clock.now = clock.now, 0.0
    cache = open_cache()
    assert held_numbers(cache, [1]) == set()
    put(cache, 2)
    clock.now = real
    assert held_numbers(cache, [1, 2]) == {1}  # what was stored in 1970 has expired since


def test_expired_answer_is_replaced(cache, clock):
    put(cache, 1, ttl_s=1.0)
    settle(cache)
    clock.now += 5
    assert held_numbers(cache, [1]) == set()
    put(cache, 1, ttl_s=1.0)
    settle(cache)
    assert held_numbers(cache, [1]) == {1}


@pytest.mark.parametrize("ttl_s", [0.0, -1.0])
def test_without_a_ttl_nothing_is_stored(cache, ttl_s):
    put(cache, 1, ttl_s=ttl_s)
    settle(cache)
    assert cache.stats().entries == 0


# -- caps


def test_file_stays_below_its_cap(open_cache, path):
    cache = open_cache(max_bytes=MIB, memory_bytes=0)
    sizes = random.Random(7)
    for number in range(3000):
        put(cache, number, size=sizes.choice([10, 300, 3000, 9000]))
        if number % 200 == 0:
            settle(cache)
    settle(cache)
    stats = cache.stats()
    assert stats.dropped_writes == 0
    assert stats.evicted > 2000
    assert stats.evicted + stats.entries == 3000
    assert 0.9 * MIB < stats.bytes <= MIB
    cache.close()
    # Pages of the largest transactions may have been in use before eviction freed them.
    assert path.stat().st_size < 1.1 * MIB


def test_least_recently_used_is_evicted_first(open_cache):
    size = 20 * KIB
    cache = open_cache(max_bytes=MIB, memory_bytes=0)
    for number in range(46):
        put(cache, number, size=size)
    settle(cache)
    assert cache.stats().evicted == 0
    used = set(range(0, 20, 2))
    assert held_numbers(cache, sorted(used), size) == used
    for number in range(100, 120):
        put(cache, number, size=size)
    settle(cache)
    evicted = cache.stats().evicted
    kept = held_numbers(cache, range(46), size)
    assert 10 <= evicted == 46 - len(kept)
    unused = [number for number in range(46) if number not in used]
    assert kept == used | set(unused[evicted:])


def test_order_of_use_survives_a_restart(open_cache):
    size = 20 * KIB
    cache = open_cache(max_bytes=MIB)
    for number in range(30):
        put(cache, number, size=size)
    held_numbers(cache, range(10), size)
    cache.close()
    cache = open_cache(max_bytes=MIB // 2)
    settle(cache)
    kept = held_numbers(cache, range(30), size)
    assert set(range(10)) <= kept
    assert 10 not in kept


def test_hits_alone_write_rarely_but_are_remembered_within_bounds(open_cache):
    cache = open_cache()
    for number in range(MAX_TOUCHED + 10):
        cache._touch(number)
        assert len(cache._touched) <= MAX_TOUCHED
    assert cache.stats().dropped_writes == 0


def test_answer_larger_than_its_share_is_not_stored(open_cache):
    cache = open_cache(max_bytes=MIB, memory_bytes=8 * MIB)
    put(cache, 1, size=MIB // 8)
    put(cache, 2, size=MIB // 8 + 1)
    settle(cache)
    assert held_numbers(cache, [1], MIB // 8) == {1}
    assert cache.get(key_of(2)) is None


def test_memory_has_its_own_cap_and_order(open_cache):
    cache = open_cache(memory_bytes=100 * KIB)
    for number in range(9):
        put(cache, number, size=10 * KIB)
    held_numbers(cache, [0], 10 * KIB)
    put(cache, 9, size=10 * KIB)
    settle(cache)
    before = cache.stats().memory_hits
    assert held_numbers(cache, [0, 9], 10 * KIB) == {0, 9}
    assert cache.stats().memory_hits == before + 2
    assert held_numbers(cache, [1], 10 * KIB) == {1}
    assert cache.stats().memory_hits == before + 2  # 1 was used longest ago: it came from the file


def test_small_answers_take_no_more_memory_than_the_cap_says(open_cache):
    cache = open_cache(memory_bytes=2 * MIB)
    layout = layout_of(40)  # one for all answers to requests of one kind
    tracemalloc.start()
    try:
        for number in range(8_000):
            cache.put(key_of(number), MODEL, layout, payload_of(number, 40), HOUR)
            if number % 500 == 499:
                settle(cache)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert MIB < taken < 2 * MIB


def test_smaller_cap_gives_space_back_and_a_larger_one_takes_it(open_cache, path):
    cache = open_cache(max_bytes=8 * MIB)
    for number in range(300):
        put(cache, number, size=20 * KIB)
    settle(cache)
    assert cache.stats().bytes > 6 * MIB
    cache.resize(MIB, 0)
    settle(cache)
    assert cache.stats().bytes <= MIB
    assert max(held_numbers(cache, range(300), 20 * KIB)) == 299
    cache.close()
    assert path.stat().st_size <= MIB
    cache = open_cache(max_bytes=MIB)
    cache.resize(8 * MIB, MIB)
    for number in range(100):
        put(cache, number, size=20 * KIB)
    settle(cache)
    assert cache.stats().bytes > 2 * MIB


def test_no_cap_at_all_stores_nothing(open_cache):
    cache = open_cache(max_bytes=0, memory_bytes=0)
    put(cache, 1)
    settle(cache)
    assert held_numbers(cache, [1]) == set()
    assert cache.stats().entries == 0


def test_writes_beyond_the_queue_are_dropped_and_counted(open_cache):
    cache = open_cache(memory_bytes=0)
    entered, release = threading.Event(), threading.Event()
    cache._database.post(lambda _connection: (entered.set(), release.wait(30)))
    assert entered.wait(30)
    for number in range(20):
        put(cache, number, size=MIB)
    release.set()
    settle(cache)
    stats = cache.stats()
    assert stats.dropped_writes == 12  # eight of a MiB may wait
    assert held_numbers(cache, range(20), MIB) == set(range(8))


# -- damage


def corrupt(path, start, seed=5):
    """Overwrite pages from `start` on with noise."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(start)
        file.write(random.Random(seed).randbytes(size - start))


def refilled(cache):
    """The cache takes and gives answers again; returns its counts."""
    for number in range(1000, 1010):
        put(cache, number)
    settle_anyway(cache)
    for number in range(1000, 1010):
        put(cache, number)
    settle(cache)
    assert held_numbers(cache, range(1000, 1010)) == set(range(1000, 1010))
    return cache.stats()


def settle_anyway(cache):
    """As `settle`, while the disk is full or the file is replaced: this undoes all of a transaction."""
    try:
        settle(cache)
    except StorageFailed:
        settle(cache)


@pytest.mark.parametrize("start", [0, 50], ids=["header", "within the header"])
def test_damaged_header_costs_the_answers_and_nothing_else(open_cache, path, start):
    cache = open_cache()
    put(cache, 1)
    cache.close()
    corrupt(path, start)
    cache = open_cache()
    assert held_numbers(cache, [1]) == set()
    assert refilled(cache).set_aside == 1
    assert path.with_name("cache.db.corrupt-1").exists()


@pytest.mark.parametrize("cut", ["truncated", "empty"])
def test_shortened_file_costs_the_answers_and_nothing_else(open_cache, path, cut):
    cache = open_cache()
    for number in range(200):
        put(cache, number, size=3000)
    cache.close()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] if cut == "truncated" else b"")
    cache = open_cache()
    held_numbers(cache, range(200), 3000)
    assert refilled(cache).set_aside == (cut == "truncated")


def test_garbage_in_the_wal_costs_nothing(open_cache, path):
    cache = open_cache()
    put(cache, 1)
    cache.close()
    path.with_name("cache.db-wal").write_bytes(random.Random(3).randbytes(50_000))
    cache = open_cache(memory_bytes=0)
    assert held_numbers(cache, [1]) == {1}
    assert cache.stats().set_aside == 0


def test_flipped_bits_that_sqlite_cannot_see_never_give_a_wrong_answer(open_cache, path):
    cache = open_cache()
    for number in range(50):
        put(cache, number, size=3000)
    cache.close()
    content = bytearray(path.read_bytes())
    for number in range(0, 50, 2):
        content[content.find(payload_of(number, 3000)[:64]) + 17] ^= 1
    path.write_bytes(content)
    cache = open_cache(memory_bytes=0)
    settle(cache)
    assert cache.stats()[:8:7] == (50, 0)  # entries, set aside: quick_check found nothing
    assert held_numbers(cache, range(50), 3000) == set(range(1, 50, 2))
    settle(cache)
    assert cache.stats().entries == 25


@pytest.mark.parametrize(
    "change",
    [
        "payload = substr(payload, 1, 20)",
        "payload = NULL",
        "payload = 'text'",
        "payload = zeroblob(40)",
        "layout = x'c1'",
        "layout = NULL",
        "layout = 7",
        "expires_at = expires_at + 86400",
        "expires_at = NULL",
        "stored_at = 'yesterday'",
        "seal = NULL",
    ],
)
def test_row_that_is_not_what_was_written_is_a_miss_and_is_deleted(open_cache, path, change):
    cache = open_cache()
    put(cache, 1)
    put(cache, 2)
    cache.close()
    connection = sqlite3.connect(path)
    row_id = int.from_bytes(key_of(1)[:8], "little", signed=True)
    statement = f"UPDATE answer SET {change} WHERE id = ?"  # noqa: S608 - the changes stand above
    assert connection.execute(statement, (row_id,)).rowcount == 1
    connection.commit()
    cache = open_cache(memory_bytes=0)
    assert held_numbers(cache, [1, 2]) == {2}
    settle(cache)
    assert connection.execute("SELECT count(*) FROM answer").fetchone() == (1,)
    connection.close()
    assert cache.stats().entries == 1


def test_layout_that_does_not_fit_its_payload_is_a_miss(cache):
    for number, view in enumerate(
        [TensorView("y", "UINT8", (9,), 1, 9), TensorView("y", "UINT8", (1,), -1, 1)]
    ):
        cache.put(key_of(number), MODEL, (view,), b"123456789", HOUR)
    settle(cache)
    assert held_numbers(cache, [0, 1]) == set()


@pytest.mark.parametrize("seed", [1, 2])
def test_damage_while_running_is_set_aside_and_requests_notice_nothing(open_cache, path, seed):
    cache = open_cache()
    for number in range(900):
        put(cache, number, size=3000)
        if number % 300 == 0:
            settle(cache)
    cache.close()
    cache = open_cache(memory_bytes=0)
    held_numbers(cache, range(5), 3000)
    corrupt(path, 4096 * 3, seed)
    found = held_numbers(cache, range(900), 3000)
    assert len(found) < 900
    assert refilled(cache).set_aside == 1
    corrupt(path, 0, seed)
    path.with_name("cache.db-wal").write_bytes(b"")
    held_numbers(cache, range(900), 3000)
    put(cache, 1)
    cache.close()
    refilled(open_cache())


def test_file_deleted_while_running_is_made_anew_by_the_next_start(open_cache, path):
    cache = open_cache(memory_bytes=0)
    put(cache, 1)
    settle(cache)
    for file in list(path.parent.iterdir()):
        file.unlink()
    put(cache, 2)
    settle(cache)
    assert held_numbers(cache, [1, 2]) == {1, 2}
    cache.close()
    cache = open_cache()
    assert held_numbers(cache, [1, 2]) == set()
    put(cache, 3)
    assert held_numbers(cache, [3]) == {3}


def test_full_disk_costs_hits_only_and_ends_when_there_is_room(open_cache):
    cache = open_cache(memory_bytes=0)
    put(cache, 1)
    settle(cache)

    def limit(pages):
        def job(connection):
            connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()

        cache._database.submit(job).result(30)

    limit(1)
    put(cache, 2, size=100 * KIB)
    settle_anyway(cache)
    assert held_numbers(cache, [1]) == {1}
    assert cache.get(key_of(2)) is None
    assert cache.stats().dropped_writes == 1
    limit(10_000)
    put(cache, 3)
    settle(cache)
    assert held_numbers(cache, [1, 3]) == {1, 3}
    assert cache.stats().entries == 2


# -- other processes


READER = """
import sqlite3, sys
connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, timeout=30)
last = 0
print("ready", flush=True)
while last < 300:
    answers, entries = connection.execute(
        "SELECT (SELECT count(*) FROM answer), (SELECT count(*) FROM entry)").fetchone()
    assert answers == entries >= last, (answers, entries, last)
    last = answers
print(connection.execute("PRAGMA quick_check").fetchone()[0])
"""


def test_another_process_reads_whole_transactions_while_we_write(open_cache, path):
    cache = open_cache(memory_bytes=0)
    settle(cache)
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for number in range(300):
        put(cache, number)
        assert held_numbers(cache, [number // 2]) <= {number // 2}
    settle(cache)
    for reader in readers:
        with reader, reader.stdout:
            assert reader.stdout.read() == "ok\n"
        assert reader.returncode == 0
    assert cache.stats().dropped_writes == 0


KILLED = """
import sys, time
from pathlib import Path
from skerry.terms import TensorView
from store.cache import OutputCache
cache = OutputCache(Path(sys.argv[1]), max_bytes=1 << 20, memory_bytes=0, wall_clock=lambda: 1.0)
number = 0
while True:
    number += 1
    cache.put(number.to_bytes(32, "little"), "sha256:a", (), number.to_bytes(2000, "little"), 1e9)
    if number % 100 == 0 and cache.stats().entries:
        print(number, flush=True)
        time.sleep(0.001)
"""


def test_sigkill_while_writing_leaves_a_sound_file(path, clock):
    with subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    ) as child:
        numbers = [int(child.stdout.readline()) for _ in range(10)]
        child.kill()
        child.stdout.read()
    cache = OutputCache(path, max_bytes=MIB, memory_bytes=0, wall_clock=lambda: 2.0)
    settle(cache)
    assert cache.stats().set_aside == 0
    assert cache.stats().entries > 0
    for number in range(numbers[-1]):
        answer = cache.get(number.to_bytes(32, "little"))
        assert answer is None or answer.payload == number.to_bytes(2000, "little")
    cache.close()
