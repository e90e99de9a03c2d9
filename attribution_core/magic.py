"""Exact metagradients: how a trained model's outputs move with anything that its training was made of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from attribution_core.data import (
    Column,
    Progress,
    floating_column,
    named,
    numbers_of,
    row_numbers,
    summed,
)
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.gradients import has_forward_mode
from attribution_core.groups import mean_anchor
from attribution_core.metagradients.adjoint import Form, Wanted
from attribution_core.metagradients.tangent import Tangents, pushed_outputs
from attribution_core.metagradients.walk import Walk, told_operation, walk_back
from attribution_core.problem import Outputs
from attribution_core.processes import world
from attribution_core.safeguards.smoothness import (
    MetagradientWarning,
    finite_difference,
    look,
    refuse_low_precision,
)
from attribution_core.safeguards.soundness import stopped
from attribution_core.stepwise.replay import States, states_held
from attribution_core.stepwise.trained import each_run
from attribution_core.training import Run

Wrt = Literal["weights", "domains", "inputs", "lr", "weight_decay"]
GROWN = 5.0  # adjoint growth beyond which first order was worthless in every run that was looked at
KINKED = 0.01  # share of activations with a kink from which a warning is given


def magic(
    source: Run | Sequence[Run],
    outputs: Outputs,
    *,
    wrt: Wrt = "weights",
    groups: ArrayLike | None = None,
    rows: ArrayLike | None = None,
    column: Column | None = None,
    since: int | None = None,
    segments: int = 1,
    mode: Literal["auto", "reverse", "forward"] = "auto",
    form: Form = "auto",
    batch_targets: int | None = None,
    states: States = "auto",
    memory: int = 2**30,
    check: bool | Literal["auto"] = "auto",
    folder: str | Path | None = None,
    progress: Progress = iter,
) -> LinearDatamodel:
    """The datamodel of exact derivatives through training: scores[i, j] = ∂ output_j(θ_T(w)) / ∂ weight_i.

    The run's steps are differentiated one after the other, last to first, all outputs together:

        scores_i = (1/α) Σ_{steps k with i in batch} ⟨∇ℓ_i(θ_k), ḡ_k⟩ / B,     ḡ_k = ∂ output / ∂ g_k

    with every term of the optimizer, the clipping, the schedule and batch norm's running statistics. So the
    prediction is exact to first order for the same initial weights and the same order of the data; for
    fresh seeds, train at the exposure that will be judged (`train(..., exposure=keep)`) and pass several
    runs. Rows that a run was trained without (`drop="row"`) ride along at weight 0 ("shadows") in random
    batches, as often as the others were drawn, and get scores too.

    Args:
        source: a run of `train`; or several, whose datamodels are averaged (around their mean anchor),
            with the standard deviation over runs in `.spread`.
        outputs: what to differentiate; taken in eval mode.
        wrt: by what.
            "weights": [n, t], per unit of training weight, anchor α · weights.
            "domains": [g, t], per unit of a weight that all rows of a domain share; needs `groups`. Anchor: the
                mean of its rows'; where these differ, weight 0 is not its removal (`AnchorWarning`).
            "inputs": [rows · numbers, t], by every number in a float column of chosen rows: pixels; a
                column of zeros that the loss adds to embeddings ("embedding_shift" of `causal_lm_loss`); the
                weight of every token ("token_weights"). Anchor: the values; ids: row · numbers + place.
            "lr", "weight_decay": [1, t] (one row for each name of a decay by name).
        groups: [n] labels of domains; with "weights" it means "domains".
        rows: of "inputs": which training rows.
        column: of "inputs": the data's column, by default its first floating one.
        since: differentiate by what acts from this step on; by default the step from which the run's
            weights acted. A window is the cure for long trainings from scratch.
        segments: keep the contributions of so many equal segments of the training in `.parts`.
        mode: "reverse" walks back once for all outputs; "forward" pushes one tangent for each domain or
            hyperparameter, and costs the same for any number of outputs; "auto" takes the fewer.
        form: of the second-order pass in reverse: "double", one backward pass per output through one
            trace; "vmap", forward derivatives of the gradient along all outputs at once; "auto" by
            their number and the layers. They agree to rounding.
        batch_targets: outputs that share a walk back; 32, fewer for large models.
        states: how many states of the training are held at a time, see `train`; those that the run
            kept are used, the others computed again and compared bit by bit with the run's own.
        memory: bytes for them with states="auto".
        check: one more training, at weights moved by .1 in a random direction, beside its prediction;
            "auto": where something looks amiss (growth, kinks, Adam without eps_root).
        folder: keep finished chunks of outputs there; the same call resumes.
        progress: wraps the loops over steps (tqdm).

    Returns:
        A datamodel with `.meta`: growth of the adjoint (‖∂ output/∂θ_first‖ / ‖∂ output/∂θ_last‖, the
        largest over outputs), the share of activations with kinks, states held, and what the check found.
        `smoothness.describe(datamodel)` says it in a paragraph.

    Raises:
        ValueError: a model in half precision or under autocast; a run that cannot be repeated bit by bit;
            arguments that do not fit each other.

    Warns:
        MetagradientWarning: kinked activations; an adjoint that grew; a check that failed; rows that no batch
            held; dropout masks held fixed; padding rows that moved.

    Source: Ilyas & Engstrom 2025 (MAGIC, arXiv 2504.16430); Engstrom et al. 2025 (arXiv 2503.13751); the
    exposure anchor and shadow rows are this project's, measured in benchmarks/RESULTS.md.
    """
    settings: dict[str, Any] = {
        "wrt": wrt, "groups": groups, "rows": rows, "column": column, "since": since,
        "segments": segments, "mode": mode, "form": form, "batch_targets": batch_targets,
        "states": states, "memory": memory, "check": check, "progress": progress,
    }  # fmt: skip
    if not isinstance(source, Run):
        return _mean(source, partial(magic, outputs=outputs, **settings), folder)
    asked = _asked(source, outputs, wrt, groups, rows, column, since, segments, mode)
    refuse_low_precision(source.problem)
    seen = look(source.steps)
    seen.refuse()
    if source.shards not in (1, world()[1]):
        raise ValueError(
            f"expected {source.shards} processes, as the run was trained with, got {world()[1]}; its sums "
            "round otherwise in another number"
        )
    if asked.forward:
        scores, meta = _forward(source, outputs, asked, progress)
    else:
        held = states_held(states, len(source.order), source.last.bytes, memory)
        held = max(held, len(source.states))
        how = Walk(asked.since, segments, form, batch_targets, held, folder, progress)
        walked = walk_back(source, outputs, asked.wanted, how)
        scores, grown = walked.owed, float(walked.growth.max())
        meta = {"mode": "reverse", "growth": grown, "states_held": walked.held}
    found = _datamodel(source, outputs, asked, scores, {**meta, **asdict(seen)})
    return _judged(found, source, outputs, asked, check)


# --- what is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the outputs are differentiated by, checked."""

    wrt: Wrt
    labels: NDArray[Any] | None  # of domains
    rows: NDArray[np.intp] | None
    column: Column | None
    hyper: dict[str, float]
    since: int
    segments: int
    forward: bool

    @property
    def wanted(self) -> Wanted:
        return Wanted(
            self.wrt in ("weights", "domains"), self.column, self.rows, self.hyper or None
        )


def _asked(
    run: Run,
    outputs: Outputs,
    wrt: Wrt,
    groups: ArrayLike | None,
    rows: ArrayLike | None,
    column: Column | None,
    since: int | None,
    segments: int,
    mode: str,
) -> _Asked:
    """The arguments, or an error that says which do not fit."""
    if wrt not in ("weights", "domains", "inputs", "lr", "weight_decay"):
        raise ValueError(f"unknown wrt {wrt!r}; one of weights, domains, inputs, lr, weight_decay")
    wrt = "domains" if groups is not None and wrt == "weights" else wrt
    if (groups is not None) != (wrt == "domains"):
        raise ValueError(
            f"groups=labels [n] belong to wrt='domains', which needs them; got wrt={wrt!r} and "
            f"{'no groups' if groups is None else 'groups'}"
        )
    if (rows is not None) != (wrt == "inputs") or (column is not None and wrt != "inputs"):
        raise ValueError(
            f"rows (and a column) belong to wrt='inputs', which needs them; got wrt={wrt!r} and rows={rows!r}"
        )
    start = run.since if since is None else since
    total = len(run.order)
    if not 0 <= start < total:
        raise ValueError(f"expected a step of 0 to {total - 1} to start from, got since={since}")
    if not 1 <= segments <= total - start:
        raise ValueError(f"expected 1 to {total - start} segments, got {segments}")
    labels = None if groups is None else np.asarray(groups)
    count = 0 if groups is None else len(named(groups, run.problem.n)[0])
    chosen = None
    if rows is not None:
        chosen = row_numbers(rows, run.problem.n, once=True)
        column = floating_column(run.problem.train, column)
    hyper = _hyper(run, wrt)
    if mode not in ("auto", "reverse", "forward"):
        raise ValueError(f"unknown mode {mode!r}; auto, reverse or forward")
    can = wrt in ("domains", "lr", "weight_decay")
    if mode == "forward" and not can:
        raise ValueError(f"forward mode takes few directions: domains, lr, weight_decay, not {wrt}")
    few = count + len(hyper) <= len(outputs) and segments == 1
    gone = count and len(run.removed) > 0  # rows that ride along do so in reverse mode alone
    if mode == "forward" and gone:
        raise ValueError(
            "expected a run that was drawn from every row, got removed ones, which forward mode does not see; use "
            "mode='reverse'"
        )
    quick = mode == "auto" and few and not gone
    forward = can and (
        mode == "forward"
        or (quick and has_forward_mode(run.problem, run.steps.batch(0, run.order[0][:2])))
    )
    return _Asked(wrt, labels, chosen, column, hyper, start, segments, forward)


def _hyper(run: Run, wrt: Wrt) -> dict[str, float]:
    """The hyperparameters asked for, with their values."""
    optimizer = run.steps.optimizer
    if wrt == "lr":
        return {"lr": float(optimizer.lr)}
    if wrt == "weight_decay":
        decay = optimizer.weight_decay or 0.0
        if isinstance(decay, Mapping):
            return {f"weight_decay of {name}": float(value) for name, value in decay.items()}
        return {"weight_decay": float(decay)}
    return {}


# --- forward -----------------------------------------------------------------------------------------


def _forward(
    run: Run, outputs: Outputs, asked: _Asked, progress: Progress
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """(scores [segments, rows, t], meta): one tangent for each domain or hyperparameter, and segment."""
    if asked.segments > 1:
        raise ValueError("segments are kept in reverse; use mode='reverse'")
    weights = None
    if asked.labels is not None:
        domains, index = named(asked.labels, run.problem.n)
        weights = (index == np.arange(len(domains))[:, None]).astype(float)
    names = list(asked.hyper)
    along = Tangents(
        weights,
        {name: np.array([float(name == other) for other in names]) for name in names},
        asked.hyper,
    )
    with told_operation():
        found = pushed_outputs(run, outputs, along, asked.since, progress)
    return found[None], {"mode": "forward", "states_held": 1}


# --- the datamodel -----------------------------------------------------------------------------------


def _datamodel(
    run: Run, outputs: Outputs, asked: _Asked, scores: NDArray[np.float64], meta: dict[str, Any]
) -> LinearDatamodel:
    """Scores in their units, around their anchor."""
    ids: NDArray[Any] | None = None
    anchor = run.anchor
    if asked.wrt in ("weights", "domains"):
        scores = scores / run.exposure
    if asked.labels is not None:
        ids, index = named(asked.labels, run.problem.n)
        anchor = mean_anchor(anchor, asked.labels)
        if scores.shape[1] == run.problem.n and not asked.forward:
            scores = np.stack([summed(part, index, len(ids)) for part in scores])
    elif asked.rows is not None and asked.column is not None:
        ids, anchor, meta["shape"] = numbers_of(run.problem.train, asked.rows, asked.column)
    elif asked.hyper:
        ids, anchor = np.array(list(asked.hyper)), np.array(list(asked.hyper.values()))
    steps = run.steps
    meta = {
        "method": "magic", "wrt": asked.wrt, "exposure": run.exposure, "seed": run.recipe.seed,
        "steps": len(run.order), "since": asked.since, "covered": run.problem.covered,
        "masks": steps.masks, **meta,
    }  # fmt: skip
    return LinearDatamodel(
        scores.sum(0), run.outputs(outputs).numpy(), anchor, ids=ids, targets=outputs.targets, meta=meta,
        parts=scores if asked.segments > 1 else None,
    )  # fmt: skip


def _judged(
    found: LinearDatamodel,
    run: Run,
    outputs: Outputs,
    asked: _Asked,
    check: bool | Literal["auto"],
) -> LinearDatamodel:
    """The datamodel with what the check found, and warnings where it should not be believed."""
    meta = dict(found.meta)
    grown, kinked = meta.get("growth", 0.0), meta["kinked"]
    rootless = getattr(run.recipe.optimizer, "eps_root", 1.0) == 0
    amiss = grown > GROWN / 2 or kinked > KINKED or rootless
    holds = False
    if asked.wrt == "weights" and (check is True or (check == "auto" and amiss)):
        verdict = finite_difference(run, found, outputs, since=asked.since)
        meta["check"] = asdict(verdict)
        holds = verdict.holds
        if not holds:
            _warn(f"{verdict}; do not believe these scores beyond their sign, if that")
    if grown > GROWN and not holds:
        _warn(
            f"the adjoint grew {grown:.3g}-fold from the last step to the first; the training amplifies small "
            "changes, so first-order predictions fail: try a smaller learning rate, a larger eps_root or "
            "batch, or a window (since=...)"
        )
    if kinked > KINKED:
        _warn(
            f"{kinked:.0%} of the activations come from functions with kinks (ReLU, max pooling, ...): the "
            "derivatives are exact, but hold only until the first unit switches; GELU or average pooling "
            "predict further"
        )
    seen = np.bincount(np.concatenate(run.order), minlength=run.problem.n) > 0
    unseen = int((~seen & (run.weights > 0)).sum())
    if unseen and asked.wrt == "weights":
        _warn(
            f"{unseen} of {run.problem.n} rows are in no batch of the run, so their scores are 0: train for at "
            "least one pass over the rows (epochs · exposure ≥ 1), or average more runs"
        )
    if check is not False and stopped(replace(run.problem, model=run.model)):
        _warn(
            "the loss has other slopes than autograd says: something in the model is detached (the norms of peft's DoRA are) or rounded "
            "straight through, and derivatives of the training leave that out; compare with retrainings (check=True)"
        )
    padded = _moved_padding(run)
    if padded is not None:
        _warn(
            f"the padding row of {padded!r} was moved by another layer that shares its weights, or by weight decay, which derivatives do "
            "not follow: they are inexact where padding is read; untie the weights, or give padding a row of its own without padding_idx"
        )
    if run.steps.masks is not None:
        _warn(
            f"dropout masks are held fixed (seed {run.steps.masks}): scores are those of a training with exactly "
            "these masks, and predict others badly"
        )
    return replace(found, meta=meta)


def _moved_padding(run: Run) -> str | None:
    """An embedding whose padding row was moved all the same: by a layer that shares its weights, or by decay."""
    after = dict(run.model.named_modules())
    for name, module in run.problem.model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            there: Any = after[name]
            if not torch.equal(module.weight[module.padding_idx], there.weight[module.padding_idx]):
                return name
    return None


def _warn(text: str) -> None:
    warnings.warn(text, MetagradientWarning, stacklevel=4)


def _mean(runs: Sequence[Run], one: Any, folder: str | Path | None) -> LinearDatamodel:
    """The mean over runs, around their mean anchor, with the spread and how far segments reproduce."""
    if not runs:
        raise ValueError("expected at least one run, got none")
    found = each_run(one, runs, folder)
    anchor = np.mean([f.anchor for f in found], axis=0)
    if not all(np.array_equal(f.anchor, anchor) for f in found):
        found = [f.at(anchor) for f in found]
    mean = average(found)
    meta = {name: value for name, value in mean.meta.items() if name != "check"}
    for name in ("growth", "kinked", "states_held"):
        if name in meta:
            meta[name] = max(f.meta[name] for f in found)
    meta["seeds"] = [run.recipe.seed for run in runs]
    meta["checks"] = [f.meta["check"] for f in found if "check" in f.meta]
    parts = [f.parts for f in found if f.parts is not None]
    if len(parts) > 1:
        meta["reproduces"] = [_correlation(list(same)) for same in zip(*parts, strict=True)]
    return replace(mean, meta=meta)


def _correlation(arrays: list[NDArray[Any]]) -> float:
    """Mean correlation between runs of the scores of one target, over pairs and targets."""
    found = []
    for j in range(arrays[0].shape[1]):
        matrix = np.corrcoef([a[:, j] for a in arrays])
        found.append(matrix[np.triu_indices(len(arrays), 1)].mean())
    return float(np.mean(found))
