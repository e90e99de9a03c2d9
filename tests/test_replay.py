"""attribution_core.stepwise.replay: schedules against the optimum by brute force, memory, damage."""

from functools import cache

import numpy as np
import pytest

from attribution_core import SGD, AdamW, Recipe, magic, train
from attribution_core.stepwise.replay import backwards, first_pass, split, states_held
from attribution_core.stepwise.steps import Steps
from tests import menagerie


@cache
def cheapest(length, free):
    """The fewest steps that walk a stretch backwards from its first state, over all ways to split."""
    if length == 1:
        return 0
    if free == 0:
        return length * (length - 1) // 2
    return min(m + cheapest(m, free) + cheapest(length - m, free - 1) for m in range(1, length))


@cache
def ours(length, free):
    if length == 1:
        return 0
    if free == 0:
        return length * (length - 1) // 2
    m = split(length, free)
    assert 1 <= m < length
    return m + ours(m, free) + ours(length - m, free - 1)


@pytest.mark.parametrize("free", range(7))
def test_no_schedule_takes_fewer_steps(free):
    for length in range(1, 60):
        assert ours(length, free) == cheapest(length, free), (length, free)


class Walked:
    """Steps that only count: a state is its number."""

    def __init__(self, count):
        self.count, self.taken = count, 0

    def __len__(self):
        return self.count

    def start(self):
        return 0

    def step(self, state, k):
        assert state == k
        self.taken += 1
        return k + 1, 0.0


@pytest.mark.parametrize("held", [1, 2, 3, 5, 9, 40])
@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_every_state_comes_once_last_first_within_memory(held, count):
    steps, most = Walked(count), [1]
    kept = {k: k for k in first_pass(count, held)}
    assert len(kept) == min(held, count)
    seen = [k for k, state in backwards(steps, held, kept, noted=most.append) if state == k]
    assert seen == list(range(count))[::-1]
    assert max(most) <= held
    assert steps.taken == cheapest(count, min(held, count) - 1) - sum_of_first_pass(kept)
    again = Walked(count)
    assert [k for k, _ in backwards(again, held)] == seen
    assert again.taken == cheapest(count, min(held, count) - 1)


def sum_of_first_pass(kept):
    """The steps that the training itself took to the states it kept."""
    return max(kept)


def test_states_held_grow_as_promised():
    """100 to 1,600 steps: the square root's fourfold, a bound not at all."""
    small, large = (states_held("sqrt", t, 10) for t in (100, 1600))
    assert large / small <= 4.1
    for steps in (100, 1600):
        most = [1]
        assert len(list(backwards(Walked(steps), 20, noted=most.append))) == steps
        assert max(most) <= 20
    assert states_held("auto", 100, 10, memory=55) == 5
    assert states_held("all", 7, 10) == 7
    assert states_held(12, 7, 10) == 7


@pytest.mark.parametrize("states", ["sqrt", 6])
def test_memory_of_real_runs(states):
    """What magic reports, on real trainings of 40 and of 640 steps."""
    problem = menagerie.softmax(20)
    outputs = menagerie.unseen(problem).mean()
    held = []
    for epochs in (4, 64):
        run = train(problem, Recipe(SGD(0.05), 2, epochs), states=states)
        f = magic(run, outputs, states=states, check=False)
        assert f.meta["states_held"] <= states_held(states, len(run.order), 0)
        held.append(f.meta["states_held"])
    assert held[1] <= (4.1 * held[0] if states == "sqrt" else held[0] + 5)


def test_a_state_that_differs_is_found():
    problem = menagerie.mlp()
    run = train(problem, Recipe(AdamW(0.01), 2, 4), states=2)
    digests = run.digests.copy()
    digests[5] += 1
    with pytest.raises(ValueError, match="computed again, the state before step 5 differs"):
        list(backwards(run.steps, 3, {}, digests))
    assert isinstance(run.steps, Steps)
    assert len(np.unique(run.digests)) == len(run.digests)


@pytest.mark.parametrize("states", [-1, 1.5, True, "most"])
def test_states_that_make_no_sense(states):
    with pytest.raises(ValueError, match="expected states 'auto', 'all', 'sqrt' or a number"):
        train(menagerie.mlp(), Recipe(SGD(0.1), 2, 1), states=states)
