"""Unlearners, each `(model, forget, retain) -> new model`: matching to predicted outputs, and the usual baselines.

None touches its input; all take the same keywords. In formulas ℓ is the loss, F the forget set, R a batch of
retained rows, π the model, in the mode it came in, and π₀ the model as it came, in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from applied.forgetting.counterparts import Counterparts, say
from attribution_core.calling import PerExample
from attribution_core.data import Batch, Data, as_data, take
from attribution_core.outputs import IGNORED, cross_entropy, labels_in, logits_of, next_labels
from attribution_core.seeds import drawn_by

TINY = 1e-30  # a gradient that is 0 stays so
Unlearner = Callable[[nn.Module, Any, Any], nn.Module]


@dataclass(frozen=True)
class Steps:
    """How an unlearner moves: steps of SGD with momentum, or Adam, on batches of both sets.

    Args:
        steps: how many.
        lr: learning rate; with `decay` it is held for half of the steps and then falls to 0.
        momentum: of SGD; None takes Adam.
        batch_size: retained rows of a step; as many of the forget set, or all of it where it is smaller.
        clip: largest gradient norm; of `match`, in norms of the first gradient.
        seed: of the batches and of torch's draws, such as dropout masks, whose global state is left alone. Equal seeds
            give equal models.
    """

    steps: int = 40
    lr: float = 0.01
    momentum: float | None = None
    batch_size: int = 50
    decay: bool = False
    clip: float | None = None
    seed: int = 0


def fine_tune(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    loss: PerExample = cross_entropy,
    how: Steps = Steps(),
) -> nn.Module:
    """Train on with the retained rows alone: min E_R ℓ."""
    return _descend(model, forget, retain, how, lambda new, f, r: loss(new, r()).mean())


def gradient_ascent(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    loss: PerExample = cross_entropy,
    how: Steps = Steps(),
) -> nn.Module:
    """Climb the loss of the forget set: max E_F ℓ. Has no minimum: run long, it over-forgets."""
    return _descend(model, forget, retain, how, lambda new, f, r: -loss(new, f()).mean())


def gradient_difference(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    loss: PerExample = cross_entropy,
    weight: float = 1.0,
    how: Steps = Steps(),
) -> nn.Module:
    """Climb on one set while descending on the other: min E_R ℓ − weight · E_F ℓ (Liu et al. 2022)."""

    def goal(new: nn.Module, f: Any, r: Any) -> Tensor:
        return loss(new, r()).mean() - weight * loss(new, f()).mean()

    return _descend(model, forget, retain, how, goal)


def npo(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    loss: PerExample = cross_entropy,
    beta: float = 0.5,
    weight: float = 1.0,
    how: Steps = Steps(),
) -> nn.Module:
    """Negative preference optimisation: −(2/β) E_F log σ(−β log(π/π₀)) + weight · E_R ℓ (Zhang et al. 2024, eq. 3).

    log π of a row is −ℓ. Unlike ascent its gradient fades once a row is unlikely.
    """
    before = copy.deepcopy(model).eval()

    def goal(new: nn.Module, f: Any, r: Any) -> Tensor:
        batch = f()
        with torch.no_grad():
            reference = loss(before, batch)
        likelier = reference - loss(new, batch)  # log(π/π₀)
        return -(2 / beta) * F.logsigmoid(-beta * likelier).mean() + weight * loss(new, r()).mean()

    return _descend(model, forget, retain, how, goal)


def scrub(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    loss: PerExample = cross_entropy,
    away: float = 0.5,
    weight: float = 1.0,
    how: Steps = Steps(),
) -> nn.Module:
    """SCRUB: leave the teacher π₀ on F, stay with it on R, in turns (Kurmanji et al. 2023, eq. 3).

    The first share `away` of the steps alternates max E_F KL(π₀ ‖ π) with min E_R [KL(π₀ ‖ π) + weight · ℓ];
    the others descend only.
    """
    teacher, taken = copy.deepcopy(model).eval(), iter(range(how.steps))

    def apart(new: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            old, counts = centred_logits(teacher, batch)
        if not of_classes(old, batch):
            raise ValueError(
                f"expected labels of classes, whose probabilities SCRUB keeps apart, got outputs {tuple(old.shape)} without; "
                "take gradient_difference, or match"
            )
        old, now = (z.log_softmax(-1) for z in (old, centred_logits(new, batch)[0]))
        return ((old.exp() * (old - now)).sum(-1) * counts).sum() / counts.sum().clamp(min=1)

    def goal(new: nn.Module, f: Any, r: Any) -> Tensor:
        step = next(taken)
        if step < away * how.steps and step % 2 == 0:
            return -apart(new, f())
        batch = r()
        return apart(new, batch) + weight * loss(new, batch).mean()

    return _descend(model, forget, retain, how, goal)


def to_unseen(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    like: Any,
    weight: float = 0.15,
    share: float = 1 / 3,
    how: Steps = Steps(),
) -> nn.Module:
    """Answer the forget rows as the model answers unseen rows like them, and the other rows as before.

        min E_R KL(π₀(x) ‖ π(x)) + weight · E_{i in F} KL(π̄(c_i) ‖ π(x_i)),      c_i: the counterpart of row i

    π̄ is the current model, held fixed: what the forget set taught about its counterparts fades as it is forgotten.
    What was memorised is forgotten, and whole distributions are matched, not the true answer's probability alone. Only
    the retained rows keep the answers about the counterparts in place.

    Args:
        like: counterparts, one for each forget row or several rounds of them (see `Counterparts`): the same question
            about somebody else, with the same answer. Of several rounds the most typical is taken.
        weight: of the forget set; with more of it forgotten rows come nearer to their goal and the rest is moved
            further.
        share: of a batch that the forget set takes, at most; each of its rows comes equally often.

    Raises:
        ValueError: counterparts that do not fit the forget set; a share or batches that leave no room for retained
            rows; labels that are no classes; a goal that is not finite.

    Source: this project's; a model's words on generic rows as the goal: Eldan & Russinovich 2023 (arXiv 2310.02238).
    """
    same = Counterparts(as_data(forget), as_data(like))
    teacher = copy.deepcopy(model).eval()
    theirs = same.typical(teacher)
    device, rng = next(model.parameters()).device, np.random.default_rng(how.seed)
    few = _few(share, how.batch_size, len(theirs))
    draw = _draw(as_data(retain), how.batch_size - few, rng, device)
    turns = _turns(len(theirs), few, rng)

    def apart(teacher: nn.Module, shown: Batch, new: nn.Module, asked: Batch) -> Tensor:
        with torch.no_grad():
            wanted, _ = say(teacher, shown)
        now, _ = say(new, asked)
        if now.shape != wanted.shape:
            raise ValueError(
                f"expected as many predictions of the counterparts as of their forget rows, got {len(wanted)} and {len(now)}; an "
                "answer that follows padding is not predicted"
            )
        return (wanted.exp() * (wanted - now)).sum(1).mean()

    def goal(new: nn.Module, _f: Any, _r: Any) -> Tensor:
        rows, kept = next(turns), next(draw)
        mine, unseen = (take(some, rows, device) for some in (same.forget, theirs))
        return apart(teacher, kept, new, kept) + weight * apart(new, unseen, new, mine)

    return _descend(model, forget, retain, how, goal)


def match(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    forget_logits: Tensor | NDArray[Any],
    retain_logits: Tensor | NDArray[Any],
    share: float = 0.5,
    how: Steps = Steps(momentum=0.9, lr=0.03, decay=True),
) -> nn.Module:
    """Fine-tune until the logits are those wanted, on the forget set and on retained rows.

        min E_{x in F ∪ R} (1/c) ‖z(x) − z*(x)‖²,   z of classes less their mean (softmax does not see it)

    With z* from a datamodel this is datamodel matching, with z* of a model retrained without F oracle matching
    (Georgiev et al. 2024).

    Args:
        forget_logits, retain_logits: z*, [rows, ..., c], tensors or arrays, in the rows' order; positions whose label is −100
            do not count.
        share: of a batch that the forget set takes, at most.

    Raises:
        ValueError: targets that do not fit the rows or the model's logits; a share or batches that leave no room for
            retained rows; a loss that is not finite.
    """
    wanted_of = [torch.as_tensor(z) for z in (forget_logits, retain_logits)]
    sets = list(zip(map(as_data, (forget, retain)), wanted_of, strict=True))
    for name, (data, wanted) in zip(("forget", "retain"), sets, strict=True):
        if len(data) != len(wanted):
            raise ValueError(
                f"expected one row of {name}_logits for each of the {len(data)} {name} rows, got {len(wanted)}"
            )
    rng = np.random.default_rng(how.seed)
    few = _few(share, how.batch_size, len(sets[0][0]))

    def goal(new: nn.Module, _f: Any, _r: Any) -> Tensor:
        parts = []
        for (data, wanted), size in zip(sets, (few, how.batch_size - few), strict=True):
            rows = rng.choice(len(data), min(size, len(data)), replace=False)
            batch = take(data, rows, next(new.parameters()).device)
            now, mask = centred_logits(new, batch)
            want = wanted[torch.from_numpy(rows)].to(now)
            if want.shape != now.shape:
                raise ValueError(
                    f"expected logits of shape {tuple(now.shape)} to match, got {tuple(want.shape)}"
                )
            off = (now - centred(want, batch)).square().mean(-1)
            off, mask = (x.reshape(len(rows), -1) for x in (off * mask, mask))
            parts.append(off.sum(1) / mask.sum(1).clamp(min=1))
        return torch.cat(parts).mean()

    return _descend(model, forget, retain, how, goal, relative=True)


def centred_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits of `centred` [b, ..., c], which positions count [b, ...])."""
    z = logits_of(model, batch)
    z = z[:, None] if z.ndim == 1 else z
    ones = torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device)
    if is_sequence(batch, z.shape[:-1]):  # logits at a position predict the next
        ones[:, :-1] = (next_labels(batch) != IGNORED).to(z.dtype)
        ones[:, -1] = 0
    return centred(z, batch), ones


def centred(z: Tensor, batch: Batch) -> Tensor:
    """Logits [b, ..., c] less their mean over classes, which softmax does not see; other outputs as they are."""
    return z - z.mean(-1, keepdim=True) if of_classes(z, batch) else z


def of_classes(z: Tensor, batch: Batch) -> bool:
    """Whether outputs [b, ..., c] are one softmax's logits: labels are whole numbers [b, ...] or c shares."""
    labels = labels_in(batch)
    if z.shape[-1] == 1:
        return False
    if labels is None or is_sequence(batch, z.shape[:-1]):
        return True
    if not labels.is_floating_point():
        return labels.shape == z.shape[:-1]
    shares = labels.shape == z.shape and bool((labels >= 0).all())
    return shares and torch.allclose(labels.sum(-1), labels.new_ones(()), atol=1e-3)


def is_sequence(batch: Batch, shape: Sequence[int]) -> bool:
    """Whether the places [b, ...] of a batch's logits predict the next token."""
    labels = labels_in(batch)
    if labels is None and isinstance(batch, dict):
        labels = batch.get("input_ids")
    return labels is not None and len(shape) > 1 and labels.shape == tuple(shape)


def _descend(
    model: nn.Module,
    forget: Any,
    retain: Any,
    how: Steps,
    goal: Callable[[nn.Module, Callable[[], Batch], Callable[[], Batch]], Tensor],
    relative: bool = False,
) -> nn.Module:
    """A copy of the model after the steps; `goal` gets (model, next forget batch, next retain batch).

    relative: clip in norms of the first gradient.
    """
    new = copy.deepcopy(model)
    device = next(new.parameters()).device
    rng = np.random.default_rng([how.seed, 1])
    draws = [_draw(as_data(data), how.batch_size, rng, device) for data in (forget, retain)]
    free = [p for p in new.parameters() if p.requires_grad]
    if not free:
        raise ValueError(
            "expected a model with parameters to train, got none that requires_grad; call .requires_grad_() on those that may move"
        )
    for p in free:
        p.grad = None
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(free, how.lr)
        if how.momentum is None
        else torch.optim.SGD(free, how.lr, momentum=how.momentum)
    )
    unit = 0.0  # of the clip
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = how.lr * (min(1.0, 2 * (1 - step / how.steps)) if how.decay else 1.0)
        with torch.enable_grad(), drawn_by([how.seed, 2, step], device), _precise(new):
            loss = goal(new, lambda: next(draws[0]), lambda: next(draws[1]))
            if not torch.isfinite(loss):
                raise ValueError(
                    f"expected a finite goal, got {loss.detach().item()} in step {step} of {how.steps}; take a smaller lr"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if how.clip is not None:
            seen = [p.grad for p in free if p.grad is not None]
            unit = unit or (float(nn.utils.get_total_norm(seen)) if relative else 1.0)
            nn.utils.clip_grad_norm_(free, max(how.clip * unit, TINY))
        optimizer.step()
    for p in free:
        p.grad = None
    return new


@contextmanager
def _precise(model: nn.Module) -> Iterator[None]:
    """Says which precision a model has that was given data of another."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("same dtype", "expected scalar type")):
            raise
        held = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        raise ValueError(
            f"expected data in the model's precision, {' and '.join(held)}, got {error}; convert either"
        ) from error


def _few(share: float, batch: int, rows: int) -> int:
    """Rows of the forget set in a batch, beside one retained row at least."""
    if not 0 < share <= 1 or batch < 2:
        raise ValueError(
            f"expected a share in (0, 1] of batches of two rows or more, got {share:g} of {batch}"
        )
    return min(max(1, round(share * batch)), rows, batch - 1)


def _draw(data: Data, size: int, rng: np.random.Generator, device: torch.device) -> Iterator[Batch]:
    """Batches of one permutation after another."""
    for rows in _turns(len(data), size, rng):
        yield take(data, rows, device)


def _turns(n: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """So many of n rows at a time, each as often as every other."""
    size, queue = min(size, n), np.empty(0, dtype=int)
    while True:
        if len(queue) < size:
            queue = np.concatenate([queue, rng.permutation(n)])
        yield queue[:size]
        queue = queue[size:]
