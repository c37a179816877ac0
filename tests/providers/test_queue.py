"""Who is next, on a clock that the test turns."""

from hypothesis import given, settings
from hypothesis import strategies as st

from providers.job import Job, RequestLayout
from providers.queue import DEFAULT_LEVEL, LEVELS, LOOK_AHEAD, MOST_IDLE_LANES, STARVED_TURNS, Queue
from skerry.terms import TensorView

FAR = 1000.0
NOW = 100.0


def layout(rows=1, width=4):
    return RequestLayout((TensorView("input", "FP32", (rows, width), 0, 4 * rows * width),), ())


PLAIN = layout()
OTHER = layout(width=8)


class Request(Job):
    def __init__(self, owner=1, priority=DEFAULT_LEVEL, kind=PLAIN, deadline=FAR):
        self.owner, self.priority, self.layout, self.deadline = owner, priority, kind, deadline

    def on_result(self, *_):
        raise AssertionError

    def on_error(self, _):
        raise AssertionError


def filled(*jobs):
    queue = Queue()
    for job in jobs:
        queue.put(job)
    return queue


def drained(queue):
    found = []
    while (job := queue.pop(NOW)) is not None:
        found.append(job)
    assert queue.late == []
    assert len(queue) == 0
    return found


def many(count, **fields):
    return [Request(**fields) for _ in range(count)]


# --- order


def test_one_owners_requests_keep_their_order():
    jobs = many(50)
    assert drained(filled(*jobs)) == jobs


def test_a_lower_number_goes_first():
    late, normal, urgent = (Request(priority=priority) for priority in (LEVELS, DEFAULT_LEVEL, 1))
    assert drained(filled(late, normal, urgent)) == [urgent, normal, late]


def test_what_waits_below_others_gets_a_turn_now_and_then():
    queue = filled(*many(100, priority=1))
    low, lowest = Request(priority=3), Request(priority=9)
    queue.put(low)
    queue.put(lowest)
    order = drained(queue)
    assert order.index(low) == STARVED_TURNS
    assert order.index(lowest) == STARVED_TURNS + 1  # passed over as often
    more = many(2, priority=3)
    order = drained(filled(*many(3 * STARVED_TURNS, priority=1), *more))
    assert [order.index(job) for job in more] == [STARVED_TURNS, 2 * STARVED_TURNS + 1]


def test_an_empty_queue_has_nobody():
    queue = Queue()
    assert queue.pop(NOW) is None
    assert queue.company(Request(), 5, NOW) == []
    assert queue.expire(NOW) == ([], float("inf"))
    assert queue.displace(1) is None
    assert not queue.remove(Request())


# --- fair shares


def test_a_flood_delays_another_owners_first_request_by_one():
    queue = filled(*many(1000, owner=1))
    for _ in range(10):
        queue.pop(NOW)
    victim = Request(owner=2)
    queue.put(victim)
    assert victim in [queue.pop(NOW), queue.pop(NOW)]


def test_owners_who_all_have_much_waiting_take_turns():
    queue = filled(*many(30, owner=1), *many(20, owner=2), *many(10, owner=3))
    owners = [job.owner for job in drained(queue)]
    assert sorted(owners[:30]) == sorted([1, 2, 3] * 10)
    assert all(set(owners[i : i + 3]) == {1, 2, 3} for i in range(0, 30, 3))
    assert owners[50:] == [1] * 10


def test_shares_are_counted_in_rows():
    queue = filled(*many(100, owner=1, kind=layout(rows=8)), *many(100, owner=2))
    first = [queue.pop(NOW).owner for _ in range(90)]
    assert first.count(1) == 10


def test_leaving_does_not_pay_off_what_an_owner_had():
    """Who asks for 32 rows at a time, one request after another, gets no more than who asks for single ones."""
    big = layout(rows=32)
    queue = filled(*many(200, owner=2))
    rows = {1: 0, 2: 0}
    queue.put(Request(owner=1, kind=big))
    for _ in range(100):
        job = queue.pop(NOW)
        rows[job.owner] += job.layout.rows
        if job.owner == 1:
            queue.put(Request(owner=1, kind=big))
    assert rows[1] <= rows[2] + 64


def test_owners_that_come_and_go_are_forgotten():
    queue = Queue()
    for owner in range(5 * MOST_IDLE_LANES):
        queue.put(Request(owner=owner))
        queue.pop(NOW)
    assert len(queue._levels[DEFAULT_LEVEL]._lanes) <= MOST_IDLE_LANES + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.booleans()), max_size=60), st.data())
def test_everybody_is_served_once_and_inside_a_level_no_owner_waits_for_more_than_the_others_turns(
    waiting, data
):
    jobs = [Request(owner, priority, PLAIN if plain else OTHER) for owner, priority, plain in waiting]
    queue = filled(*jobs)
    gone = data.draw(st.sets(st.sampled_from(range(len(jobs))))) if jobs else set()
    for index in gone:
        assert queue.remove(jobs[index])
        assert not queue.remove(jobs[index])
    left = [job for index, job in enumerate(jobs) if index not in gone]
    assert len(queue) == len(left)
    order = drained(queue)
    assert sorted(map(id, order)) == sorted(map(id, left))
    for priority in {job.priority for job in left}:
        level = [job for job in order if job.priority == priority]
        for owner in {job.owner for job in level}:
            mine = [job for job in left if job.priority == priority and job.owner == owner]
            assert [job for job in level if job.owner == owner] == mine
            others = len({job.owner for job in level})
            for turn, job in enumerate(mine):
                assert level.index(job) < (turn + 1) * others


# --- batches


def test_company_is_what_has_the_same_layout_in_order_and_the_rest_stays():
    jobs = [Request(kind=kind) for kind in (PLAIN, OTHER, PLAIN, PLAIN, OTHER, PLAIN)]
    queue = filled(*jobs)
    first = queue.pop(NOW)
    assert queue.company(first, 2, NOW) == [jobs[2], jobs[3]]
    assert drained(queue) == [jobs[1], jobs[4], jobs[5]]


def test_company_is_shared_among_owners():
    queue = filled(*many(50, owner=1), *many(3, owner=2), *many(3, owner=3))
    first = queue.pop(NOW)
    owners = [job.owner for job in queue.company(first, 8, NOW)]
    assert (owners.count(2), owners.count(3)) == (3, 3)


def test_a_batch_carries_nobody_past_a_more_important_request():
    urgent = Request(priority=1)
    other = Request(priority=2, kind=OTHER)
    low = many(3, priority=3)
    queue = filled(urgent, other, *low)
    assert queue.pop(NOW) is urgent
    assert queue.company(urgent, 8, NOW) == []
    assert queue.pop(NOW) is other
    queue.put(Request(priority=2))
    first = queue.pop(NOW)
    assert queue.company(first, 8, NOW) == low  # nobody else waits above them


def test_strings_of_other_lengths_fit_together():
    short, long = (RequestLayout((TensorView("input", "BYTES", (1, 1), 0, size),), ()) for size in (5, 500))
    two = RequestLayout((TensorView("input", "BYTES", (2, 1), 0, 10),), ())
    jobs = [Request(kind=kind) for kind in (short, two, long)]
    queue = filled(*jobs)
    assert queue.company(queue.pop(NOW), 8, NOW) == [jobs[2]]


def test_looking_for_company_ends_somewhere():
    queue = filled(Request(), *many(LOOK_AHEAD, kind=OTHER), Request())
    assert queue.company(queue.pop(NOW), 8, NOW) == []


# --- deadlines and leaving


def test_the_late_are_neither_served_nor_company():
    late_first, good, late_company, better = (
        Request(deadline=deadline) for deadline in (NOW, FAR, NOW - 1, FAR)
    )
    queue = filled(late_first, good, late_company, better)
    assert queue.pop(NOW) is good
    assert queue.company(good, 8, NOW) == [better]
    assert queue.late == [late_first, late_company]
    assert len(queue) == 0


def test_a_deadline_finds_everybody_who_is_late_and_says_when_to_look_again():
    jobs = [Request(owner=i % 3, priority=1 + i % 2, deadline=NOW + i) for i in range(-5, 5)]
    queue = filled(*jobs)
    late, earliest = queue.expire(NOW)
    assert sorted(job.deadline for job in late) == [NOW + i for i in range(-5, 1)]
    assert earliest == NOW + 1
    assert len(queue) == 4


def test_who_has_most_waiting_makes_room_for_who_has_less():
    important, other = Request(owner=1, priority=1), Request(owner=2)
    greedy = many(5, owner=1)
    queue = filled(important, *greedy, other)
    assert queue.displace(2) is greedy[-1]
    assert queue.displace(1) is None
    assert queue.displace(3) is greedy[-2]
    assert len(queue) == 5


def test_nobody_makes_room_for_an_equal():
    queue = filled(*many(3, owner=1), *many(2, owner=2))
    assert queue.displace(2) is None


def test_what_is_taken_out_altogether_is_everything():
    jobs = [Request(owner=owner, priority=priority) for owner in (1, 2) for priority in (1, 2)]
    queue = filled(*jobs)
    assert sorted(map(id, queue.clear())) == sorted(map(id, jobs))
    assert len(queue) == 0
    queue.put(jobs[0])
    assert drained(queue) == jobs[:1]


def test_what_is_put_back_is_its_owners_next_again():
    jobs = many(3)
    queue = filled(*jobs, Request(owner=2))
    queue.put_back(queue.pop(NOW))
    assert len(queue) == 4
    assert [job for job in drained(queue) if job.owner == 1] == jobs
    queue.put_back(jobs[1])
    assert drained(queue) == [jobs[1]]
