"""A training walked backwards: which states are kept, and how the others are computed again.

With c states held at a time, a stretch of l steps is walked backwards while no step is taken more than r
times again where l ≤ C(c + r, r) (Griewank & Walther 2000, "revolve"). Keeping all states and √T-many of
them are the cases r = 0 and r = 1 of one rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from numpy.typing import NDArray

from attribution_core.calling import Params
from attribution_core.stepwise.steps import Steps, TrainingState

States = Literal["auto", "all", "sqrt"] | int
SAME = 1e-3  # of the parameters' norm, by which a run without digests may end elsewhere: other kernels, not other steps
MEMORY = 2**28  # bytes of states that a run holds by default


def states_held(states: States, steps: int, size: int, memory: int = MEMORY) -> int:
    """How many states may be held at a time: all, 2⌈√T⌉, a number, or ("auto") what fits into memory.

    >>> states_held("sqrt", 100, 0), states_held("sqrt", 1600, 0), states_held("auto", 100, 10, 500)
    (20, 80, 50)
    """
    if states == "all":
        return steps
    if states == "sqrt":
        return min(steps, 2 * math.isqrt(max(steps - 1, 0)) + 2)
    if states == "auto":
        return min(steps, memory // max(size, 1))
    if isinstance(states, bool) or not isinstance(states, int) or states < 0:
        raise ValueError(f"expected states 'auto', 'all', 'sqrt' or a number, got {states!r}")
    return min(steps, states)


def reach(free: int, again: int) -> int:
    """The longest stretch walked backwards from its first state with so many free places, no step being
    taken more than `again` times: C(free + 1 + again, again)."""
    return math.comb(free + 1 + again, again) if again >= 0 else 0


def split(length: int, free: int) -> int:
    """How far to go before the next state is kept, in a stretch of which the first state is held.

    The left part is then walked with as many free places but one pass fewer, the right part with one
    place fewer; the fewest steps in all where both stay within reach (Griewank & Walther 2000, sec. 4).

    >>> split(10, 9), split(10, 0)          # all states fit; none does
    (1, 9)
    """
    if free == 0:
        return length - 1
    again = 0
    while reach(free, again) < length:
        again += 1
    low = max(1, length - reach(free - 1, again))
    return max(low, min(reach(free, again - 2), length - reach(free - 1, again - 1)))


def first_pass(steps: int, held: int) -> list[int]:
    """The states that are kept while a training goes forward for the first time, with `held` places."""
    found, at = [], 0
    if held < 1 or steps < 1:
        return []
    found.append(0)
    while len(found) < held and steps - at > 1:
        at += split(steps - at, held - len(found))
        found.append(at)
    return found


def backwards(
    steps: Steps,
    held: int,
    kept: Mapping[int, TrainingState] | None = None,
    digests: NDArray | None = None,
    since: int = 0,
    noted: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, TrainingState]]:
    """(k, the state that step k started from) for k = last, ..., since.

    Args:
        held: how many states may be held at a time, those in `kept` included.
        kept: states of the first pass; the others are computed again.
        digests: [steps + 1] of the states; every state computed again is compared with its own.
        noted: called with the number of states held, each time one is added.

    Raises:
        ValueError: a state computed again that differs from the training's.
    """
    kept = kept or {}
    end = len(steps)
    stack: list[tuple[int, TrainingState | None]] = [(k, None) for k in sorted(kept) if k < end]
    if not stack or stack[0][0] != 0:
        stack.insert(0, (0, None))
    while end > since:
        at, state = stack[-1]
        if at >= end:
            stack.pop()
            continue
        if state is None:
            state = kept[at] if at in kept else steps.start()
        if at == end - 1:
            yield at, state
            end -= 1
            continue
        free = held - len(stack)
        ahead = split(end - at, free) if free > 0 else end - 1 - at
        for k in range(at, at + ahead):
            state, _ = steps.step(state, k)
            check(state, k + 1, digests)
        at += ahead
        if free > 0:
            stack.append((at, state))
            noted(len(stack))
        else:
            yield at, state
            end -= 1


def check(state: TrainingState, step: int, digests: NDArray | None) -> None:
    """Raise where a state is not, bit by bit, the one that the training had before this step."""
    if digests is not None and state.digest() != int(digests[step]):
        raise ValueError(
            f"the training cannot be repeated: computed again, the state before step {step} differs from the "
            "one that the run had. The model, the loss or the data have changed since, they draw random "
            "numbers of their own, or the device's kernels are not deterministic "
            "(torch.use_deterministic_algorithms); expected bit-equal states"
        )


def refuse_another_end(params: Params, again: Params) -> None:
    """Raise where the steps, taken again, do not lead to a run's parameters, where its states have no digests."""
    for name, there in params.items():
        off, size = (again[name] - there).norm(), there.norm()
        if not off <= SAME * size:
            raise ValueError(
                f"the training cannot be repeated: taken again, its steps end {float(off / size):.1%} of their norm away from "
                "the run's parameters. The initial model, the loss or the data have changed since"
            )
