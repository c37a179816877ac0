"""The table of skerry.retries, cell by cell."""

import pytest

from skerry.errors import (
    ConnectionLost,
    DeadlineExceeded,
    ExecutionFailed,
    NotRunning,
    Overloaded,
    Unavailable,
)
from skerry.retries import LONGEST_S, Retries

UNSENT = ConnectionLost("x", sent=False)
UNANSWERED = ConnectionLost("x", sent=True)
CUT = ConnectionLost("x", sent=True, answered=True)
FULL = Overloaded("x", retry_after_s=3)


def pauses(error, *, repeatable, kept_alive=False, allowed=2, left_s=1000.0, times=4):
    """What is waited before each further attempt, with the longest pauses that chance allows."""
    retries = Retries(allowed, repeatable=repeatable, uniform=lambda _, high: high)
    found = []
    for _ in range(times):
        pause = retries.pause_s(error, kept_alive=kept_alive, left_s=left_s)
        if pause is None:
            break
        found.append(pause)
    return found


@pytest.mark.parametrize(
    ("error", "kept_alive", "get", "infer"),
    [
        (UNSENT, True, 3, 3),
        (UNSENT, False, 2, 2),
        (UNANSWERED, True, 3, 0),
        (UNANSWERED, False, 2, 0),
        (CUT, True, 2, 0),
        (NotRunning("x"), False, 2, 2),
        (FULL, True, 2, 2),
        (Unavailable("x"), True, 0, 0),
        (DeadlineExceeded("x"), True, 0, 0),
        (ExecutionFailed("x"), True, 0, 0),
    ],
)
def test_what_is_sent_again_and_how_often(error, kept_alive, get, infer):
    assert len(pauses(error, repeatable=True, kept_alive=kept_alive)) == get
    assert len(pauses(error, repeatable=False, kept_alive=kept_alive)) == infer


def test_without_retries_only_the_free_one_is_made_and_at_once():
    assert pauses(UNSENT, repeatable=False, kept_alive=True, allowed=0) == [0.0]
    assert pauses(NotRunning("x"), repeatable=True, allowed=0) == []


def test_pauses_double_up_to_a_ceiling_and_begin_when_the_server_said():
    longest = pauses(NotRunning("x"), repeatable=True, allowed=9, times=9)
    assert longest[:3] == [0.05, 0.1, 0.2]
    assert longest[-1] == LONGEST_S
    assert pauses(FULL, repeatable=False) == [3.05, 3.1]


def test_a_pause_that_outlasts_the_request_is_not_begun():
    assert pauses(FULL, repeatable=False, left_s=3) == []
