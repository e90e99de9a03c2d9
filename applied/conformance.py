"""Is it an unlearner at all? Checks that any `(model, forget, retain) -> new model` must pass.

Published code has failed each of them: an optimizer built on the parameters of another model, so that
nothing was learnt; a caller's model changed in place; oracles that had seen the forget set.

    found = conformance(unlearner, model, forget, retain, batch_size=50, training_steps=200, limit=40)
    print(found.table())
    found.check()  # in a test
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from applied.forgetting.counting import counted
from applied.unlearners import of_classes
from applied.yardstick import Evaluation
from attribution_core.calling import in_eval_mode
from attribution_core.data import as_data, take
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.outputs import logits_of

SAME = 1e-6  # of the outputs' spread, besides rounding: what outputs of one function differ by
TRIED = 256  # forget rows on which two functions are compared
BATCH = 4  # of them at a time
KEPT = 2**22  # numbers of a model's outputs on them that are held
MASKED = 1e5  # below the largest logit: masked out

ADVICE = {
    "no-op": "build the optimizer on the parameters of the copy that you return, and step it",
    "edits its input": "copy.deepcopy the model first and change the copy alone",
    "not finite": "lower the learning rate or bound the loss",
    "oracle saw the forget set": "train oracles with weight 0 on every forget row",
    "over-forgets": "stop earlier, or aim at the oracles' outputs and not at high loss",
    "too expensive": "take fewer steps, or smaller batches",
}


@dataclass(frozen=True)
class Conformance:
    """What one run of an unlearner showed.

    Args:
        model: the one it returned.
        reasons: name of a failed check -> what was seen.
        checked: names of the checks that were made.
        rows: passed forward with gradients enabled.
        rows_read: passed forward without gradients.
        steps: the cost in training steps: (rows + rows_read / 3) / batch size.
        training_steps: of a retraining.
    """

    model: nn.Module
    reasons: Mapping[str, str]
    checked: tuple[str, ...]
    rows: int
    rows_read: int
    steps: float
    training_steps: float

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks that failed, of those in `ADVICE`."""
        return tuple(self.reasons)

    @property
    def ok(self) -> bool:
        """Did every check that was made pass?"""
        return not self.reasons

    @property
    def share(self) -> float:
        """The cost as a share of a retraining's steps."""
        return self.steps / self.training_steps

    def table(self) -> str:
        """A line a check: ok, FAILS with the reason, or not checked; then the cost."""
        width = max(map(len, ADVICE))
        lines = []
        for name in ADVICE:
            seen = f"FAILS: {self.reasons[name]}" if name in self.reasons else "ok"
            lines.append(f"{name:{width}}  {seen if name in self.checked else 'not checked'}")
        cost = f"{self.steps:.4g} steps, {100 * self.share:.3g} % of a retraining"
        passes = f"{self.rows:,} rows with gradients, {self.rows_read:,} without"
        return "\n".join([*lines, f"{'cost':{width}}  {cost} ({passes})"])

    def check(self) -> None:
        """Raise if anything failed.

        Raises:
            AssertionError: names every failed check, what was seen, and what to do.
        """
        if self.failures:
            lines = [f"- {name}: {seen}; {ADVICE[name]}" for name, seen in self.reasons.items()]
            raise AssertionError("\n".join(["the unlearner does not conform:", *lines]))


def conformance(
    unlearner: Callable[[nn.Module, Any, Any], nn.Module],
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    batch_size: int,
    training_steps: float,
    oracle_weights: Any = None,
    forget_rows: Any = None,
    evaluation: Evaluation | None = None,
    method: str | None = None,
    limit: float | None = None,
) -> Conformance:
    """Run an unlearner once, check what it did to the models, and count what it cost.

    Cost is counted by a hook on the model and its copies: the rows of each call's first tensor. Passes
    through parts of the model, by its `forward` itself, or through a model built anew, are not seen; where no row was,
    the cost counts as not checked.

    Parameters that all stay are a no-op, unless the outputs on the forget rows differ (pruning by masks, a gate, batch
    norm's statistics taken anew). Statistics that moved while rows passed with gradients do not excuse them: that is
    what training leaves behind whose optimizer holds another model's parameters.

    Args:
        unlearner: (model, forget, retain) -> new model.
        model: to unlearn; it must come out as it went in.
        forget, retain: handed to the unlearner as they are.
        batch_size: rows of one training step.
        training_steps: of a retraining, for the share.
        oracle_weights: [m, n] training weights of the oracles; or runs with `.weights` and `.order`.
        forget_rows: indices or [n] bools of the forget set among the n training rows.
        evaluation: of the unlearner, for over-forgetting.
        method: which of its methods this is; not needed where there is one.
        limit: the most steps it may cost.

    Raises:
        TypeError: no module came back.
        ValueError: sizes that are not positive, oracles without forget rows, rows that do not exist, an
            evaluation of several methods and none named.
    """
    if batch_size < 1 or not training_steps > 0:
        raise ValueError(
            f"expected batch_size >= 1 and training_steps > 0, got {batch_size} and {training_steps}"
        )
    reasons: dict[str, str] = {}
    checked = ["no-op", "edits its input", "not finite"]
    if oracle_weights is not None:
        checked.append("oracle saw the forget set")
        reasons["oracle saw the forget set"] = _leak(oracle_weights, forget_rows)
    if evaluation is not None:
        checked.append("over-forgets")
        reasons["over-forgets"] = _over(evaluation, method)
    said = _Said.by(model, forget)
    before, data = _Snapshot(model), _print(forget, retain)
    with counted(model) as count:
        made = unlearner(model, forget, retain)
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"expected the unlearner to return a torch.nn.Module, got {type(made).__name__}; "
                "return the new model"
            )
        count.made.append(made)
    now, again = _Said.by(made, forget), _Said.by(model, forget)
    moved = _moved(said, now, again) and not (count.rows and _statistics_moved(before, made))
    reasons["no-op"] = _no_op(before, model, made, moved) or _same_function(said, now)
    changed = data is not None and _print(forget, retain) != data
    edited = "the rows to forget or retain changed" if changed else ""
    reasons["edits its input"] = (
        before.edits(model)
        or _shares(model, made)
        or edited
        or (_says_else(said, again) if data is not None else "")
    )
    reasons["not finite"] = _not_finite(made)
    steps = count.steps(batch_size)
    if limit is not None and steps:  # a model that no row was seen to pass was made somewhere else
        checked.append("too expensive")
        reasons["too expensive"] = f"{steps:.4g} steps, at most {limit:g}" if steps > limit else ""
    failed = {name: reasons[name] for name in ADVICE if reasons.get(name)}
    passes = (count.rows, count.rows_read)
    return Conformance(made, failed, tuple(checked), *passes, steps, float(training_steps))


# --- what happened to the models ----------------------------------------------------------------------


class _Snapshot:
    """A model as it was: every tensor's bits, gradients, flags, modes and hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {name: _bits(x) for name, x in _tensors(model)}
        self.grads = {name: _bits(p.grad) for name, p in model.named_parameters()}
        self.trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.hooks = {name: _hooks(module) for name, module in model.named_modules()}

    def edits(self, model: nn.Module) -> str:
        """What is different now, in words; empty if nothing is."""
        now = _Snapshot(model)
        for what, old, new in (
            ("parameters or buffers", self.state, now.state),
            ("requires_grad", self.trainable, now.trainable),
            ("training mode", self.modes, now.modes),
            (".grad", self.grads, now.grads),
            ("hooks", self.hooks, now.hooks),
        ):
            names = [name for name in {**old, **new} if not _same(old.get(name), new.get(name))]
            if names or list(old) != list(new):
                return f"{what} of the input changed: {_some(names)}"
        return ""


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, also those that a state_dict leaves out."""
    yield from (*model.named_parameters(), *model.named_buffers())


def _print(*data: Any) -> str | None:
    """What data hold, if that can be read and is the same each time."""
    try:
        once, twice = fingerprint(*data), fingerprint(*data)
    except Exception:  # data of another kind, which the unlearner knows how to read
        return None
    return once if once == twice else None


def _hooks(module: nn.Module) -> int:
    """How many hooks it has."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


def _bits(x: Tensor | None) -> Tensor | None:
    """A copy of a tensor, off its device and graph."""
    return None if x is None else x.detach().cpu().clone()


def _same(a: Any, b: Any) -> bool:
    """Equal to the bit: −0 is not 0, and a NaN equals itself."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a is b or (type(a) is type(b) and a == b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    one, two = (x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b))
    return torch.equal(one, two)


def _no_op(before: _Snapshot, model: nn.Module, made: nn.Module, moved: bool) -> str:
    """Why nothing was unlearnt; empty if something was. Outputs that moved need no parameter that did."""
    if made is model:
        return "the input itself came back, not a new model"
    now = [p.detach().cpu() for p in made.parameters()]
    moves = [name for name, free in before.trainable.items() if free]
    # where all are frozen, any may be unlearned
    kept: list[Any] = [before.state[name] for name in moves or before.trainable]
    wrapped = len(now) > len(before.trainable)  # such as adapters around parameters that stay
    if (
        not moved
        and not wrapped
        and all(any(_same_values(old, new) for new in now) for old in kept)
    ):
        return f"none of {len(kept)} trainable parameters differs from the input's"
    return ""


def _statistics_moved(before: _Snapshot, made: nn.Module) -> bool:
    """Whether a buffer of the input is among the model's under no name, be there more of them (masks, say) or not."""
    old = [x for name, x in before.state.items() if name not in before.trainable and x is not None]
    new = [x.detach().cpu() for x in made.buffers()]
    return not all(any(_same_values(x, y) for y in new) for x in old)


@dataclass(frozen=True)
class _Said:
    """Outputs on the first forget rows, as they came."""

    z: Tensor
    classes: bool  # logits of one softmax

    @classmethod
    def by(cls, model: nn.Module, forget: Any) -> _Said | None:
        """As many rows as `KEPT` numbers allow; None where outputs cannot be had."""
        device = next((p.device for p in model.parameters()), None)
        try:
            data = as_data(forget)
            parts, rows = [], np.arange(min(TRIED, len(data)))
            first = take(data, rows[:BATCH], device)
            with torch.no_grad(), in_eval_mode(model):
                while len(rows):
                    parts.append(logits_of(model, take(data, rows[:BATCH], device)).cpu())
                    room = KEPT // max(1, parts[0][0].numel()) - sum(map(len, parts))
                    rows = rows[BATCH:][: max(0, room)]
            z = torch.cat(parts)
            return cls(z, z.ndim > 1 and of_classes(parts[0], first))
        except Exception:  # data of another kind, or a model that is called in another way
            return None

    def same(self, other: _Said, eps: float | None = None) -> bool:
        """Whether differences are rounding (of these outputs' dtype unless given), or a shift that softmax does not see."""
        if self.z.shape != other.z.shape or not self.z.is_floating_point():
            return False
        one, two = self.z.double(), other.z.double()
        masked = one < one.max() - MASKED  # logits that a mask took out
        if not torch.equal(masked, two < two.max() - MASKED):
            return False
        eps = torch.finfo(self.z.dtype).eps if eps is None else eps
        rounding = 64 * eps * float(one[~masked].abs().max())
        one, two = (x.masked_fill(masked, torch.nan) for x in (one, two))
        if self.classes:
            one, two = (x - x.nanmean(-1, keepdim=True) for x in (one, two))
        spread = float((one - one.nanmean()).square().nanmean().sqrt())
        return float((two - one)[~masked].abs().max()) <= SAME * spread + rounding


def _says_else(was: _Said | None, now: _Said | None) -> str:
    """Why an input with its tensors as they were is another function now (a rate, its forward); empty if it is not."""
    if was is None or (now is not None and was.same(now)):
        return ""
    return "its parameters are unchanged, but its outputs on the forget rows are not"


def _moved(was: _Said | None, now: _Said | None, again: _Said | None) -> bool:
    """Whether outputs on the forget rows are others than the input's, which itself says the same once more."""
    if was is None or now is None or again is None:
        return False
    if not now.z.is_floating_point() or not was.same(again):
        return False
    # a copy in half precision rounds by that precision
    eps = max(torch.finfo(said.z.dtype).eps for said in (was, now))
    return not was.same(now, eps)


def _same_function(was: _Said | None, now: _Said | None) -> str:
    """That outputs on the forget rows are equal though parameters differ; empty if they are not, or cannot be compared."""
    if was is None or now is None or not was.same(now):
        return ""
    return f"parameters differ, but the outputs on {len(was.z)} forget rows do not"


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, also under another name or in another precision; −0 is not 0."""
    if a.shape != b.shape:
        return False
    low = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
    return _same(a.to(low), b.to(low))


def _shares(model: nn.Module, made: nn.Module) -> str:
    """Which tensors of the new model lie in the memory of the old; empty where both are one model."""
    if made is model:
        return ""
    held = {x.untyped_storage().data_ptr() for _, x in _tensors(model) if x.numel()}
    names = [name for name, x in _tensors(made) if x.untyped_storage().data_ptr() in held]
    return f"the new model shares memory with the input: {_some(names)}" if names else ""


def _not_finite(made: nn.Module) -> str:
    """Which tensors hold what no training leaves behind; empty if none do."""
    names = [name for name, x in _tensors(made) if not bool(torch.isfinite(x).all())]
    return f"NaN or infinity in {_some(names)}" if names else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name or "the model" for name in names[:3]) + more


# --- oracles and evaluations --------------------------------------------------------------------------


def _leak(oracles: Any, forget_rows: Any) -> str:
    """Which oracle trained on which forget row; empty if none did."""
    seen = _seen(oracles)
    if forget_rows is None:
        raise ValueError("expected forget_rows beside oracle_weights, got none; pass their indices")
    rows, n = np.asarray(forget_rows), seen.shape[1]
    rows = np.flatnonzero(rows) if rows.dtype == bool and rows.shape == (n,) else rows
    whole = rows.ndim == 1 and len(rows) and rows.dtype.kind in "iu"
    if not whole or not ((rows >= 0) & (rows < n)).all() or len(np.unique(rows)) < len(rows):
        raise ValueError(
            f"expected forget_rows as different indices below n={n} or [n] bools, got {forget_rows!r:.60}"
        )
    found = np.argwhere(seen[:, rows])
    if not len(found):
        return ""
    models, (first, at) = len(np.unique(found[:, 0])), found[0]
    which = f"oracle {first} on row {rows[at]}"
    return f"{models} of {len(seen)} oracles trained on forget rows, {which}"


def _seen(oracles: Any) -> NDArray[np.bool_]:
    """[m, n] which oracle trained on which row, from weights or from runs."""
    if hasattr(oracles, "weights"):
        oracles = [oracles]
    if isinstance(oracles, Sequence) and all(hasattr(one, "weights") for one in oracles):
        parts = [_seen_by(one) for one in oracles]
        sizes = sorted({part.shape[1] for part in parts})
        if len(sizes) == 1:
            return np.concatenate(parts)
        raise ValueError(
            f"expected runs over the same n rows, got {sizes}; pass runs of one problem"
        )
    weights = np.asarray(oracles, dtype=float)
    if weights.ndim != 2 or not weights.size:
        raise ValueError(f"expected oracle_weights [m, n] or runs, got shape {weights.shape}")
    return weights != 0


def _seen_by(run: Any) -> NDArray[np.bool_]:
    """[m, n] of one run (m = 1) or of a table of retrainings: rows of weight that were drawn."""
    seen = np.atleast_2d(np.asarray(run.weights, dtype=float)) != 0
    order = getattr(run, "order", None)
    if order is not None:
        drawn = [np.asarray(batch, dtype=int).ravel() for batch in order]
        seen = seen & np.isin(np.arange(seen.shape[1]), np.concatenate([*drawn, []]))
    return seen


def _over(evaluation: Evaluation, method: str | None) -> str:
    """How far a method went beyond the oracles; empty if not too far."""
    if method is None and len(evaluation.methods) != 1:
        raise ValueError(
            f"expected method, one of {list(evaluation.methods)}, got none; name the unlearner's"
        )
    name = evaluation.methods[0] if method is None else method
    if not evaluation.over(name):
        return ""
    if evaluation.beyond(name):
        share = evaluation.over_forgotten(name)
        return f"{100 * share:.0f} % of the forget points lie beyond the oracles' outputs"
    far = evaluation.scatter(name)
    return f"models scatter, half of them {far:.3g} times as far about their mean as from before to the oracles"
