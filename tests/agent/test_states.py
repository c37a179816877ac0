"""Every cell of the table of states."""

import itertools

import pytest

from agent.states import Event, State, after
from skerry.errors import InternalError

STEPS = {
    ("UNAVAILABLE", "load"): "LOADING",
    ("LOADING", "loaded"): "READY",
    ("LOADING", "failed"): "UNAVAILABLE",
    ("LOADING", "unload"): "UNLOADING",
    ("READY", "lost"): "LOADING",
    ("READY", "unload"): "UNLOADING",
    ("UNLOADING", "drained"): "UNAVAILABLE",
}
CELLS = list(itertools.product(State, Event))
LEGAL = [cell for cell in CELLS if cell in STEPS]
ILLEGAL = [cell for cell in CELLS if cell not in STEPS]


@pytest.mark.parametrize(("state", "event"), LEGAL)
def test_a_step_of_the_table_leads_where_the_table_says(state, event):
    assert after(state, event) is State(STEPS[state, event])


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_what_is_no_step_is_refused_with_both_names(state, event):
    with pytest.raises(InternalError, match=f"{event} is no step from {state}"):
        after(state, event)


def test_the_table_has_no_cell_that_is_not_looked_at():
    assert (len(LEGAL), len(CELLS)) == (len(STEPS), 4 * 6)


def test_every_state_is_reached_and_left():
    assert {state for state, _ in STEPS} == set(STEPS.values()) == set(State)
