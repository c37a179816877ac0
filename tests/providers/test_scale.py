"""How many runners there are, on a clock that the test turns."""

from providers.scale import DOWN_RUNS, Scale

RUN_S = 0.01


def test_it_grows_at_once_with_the_work_up_to_what_there_is():
    scale = Scale(4)
    assert scale.total == 1
    scale.grow(2)
    assert scale.total == 3  # 2 of 2 is over the mark, 2 of 3 is not
    scale.grow(100)
    assert scale.total == 4


def test_one_runner_is_all_that_some_have():
    scale = Scale(1)
    scale.grow(100)
    scale.shrink(0, 1000.0, RUN_S)
    assert scale.total == 1


def test_it_shrinks_by_one_after_twenty_quiet_runs():
    scale = Scale(3)
    scale.grow(100)
    step = DOWN_RUNS * RUN_S
    totals = []
    for turn in range(60):
        scale.shrink(0, turn * RUN_S, RUN_S)
        totals.append(scale.total)
    assert totals.index(2) == round(step / RUN_S)
    assert totals.index(1) == 2 * round(step / RUN_S)
    assert totals[-1] == 1


def test_work_in_between_keeps_what_there_is():
    scale = Scale(2)
    scale.grow(100)
    for turn in range(100):
        scale.shrink(0 if turn % 10 else 1, turn * RUN_S, RUN_S)
    assert scale.total == 2
    scale.shrink(0, 2.0, RUN_S)
    scale.grow(2)
    scale.shrink(0, 3.0, RUN_S)
    assert scale.total == 2
