"""Unlearning: give back models, or only their outputs, that behave as if they had never seen the forget set.

    f_z(1 − 1_F)  for z in forget, retain, validation        what training without F would have made of z

is predicted and then matched; how near it came is measured against models retrained without F, beside the
distance between two sets of such models (`evaluate`). No oracle is needed to unlearn, only to judge.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from applied.forgetting.counting import FORWARD, counted
from applied.forgetting.matching import KINDS, Goal
from applied.forgetting.rehearsing import ROUNDING, Told, UnlearningWarning, rehearsed
from applied.unlearners import Steps, Unlearner, to_unseen
from applied.yardstick import Evaluation, attack, evaluate, gaussian_klom, klom
from attribution_core.data import Data, Progress, Rows, as_data, sample
from attribution_core.problem import Outputs
from attribution_core.rehearsal import Pace

__all__ = [
    "Evaluation", "Pace", "Unlearned", "UnlearningWarning", "attack", "evaluate", "gaussian_klom", "klom", "unlearn",
]  # fmt: skip

BUDGET, BY_HEART = 0.2, 1 / 3  # of a training's steps; the latter with counterparts
LEFT_ALONE = (
    "the models are left as they were and have forgotten nothing: what was rehearsed is no more than its noise, or nothing brought "
    "the first models nearer to it (see .meta['trust']); give more runs, a larger budget, or counterparts that were never seen (`like=`)"
)


@dataclass(frozen=True, eq=False)
class Unlearned:
    """Models without a forget set, what their outputs were predicted to be, and what it cost.

    Args:
        forget: rows that were forgotten.
        models: one for each run; empty where only outputs were asked for.
        predicted: name -> outputs [runs, z] that training without F is predicted to give.
        steps: training steps for each model: all passes with gradients, rehearsals and what is tried included. Logits
            that "auto" reads beside (rows of both sets, a few times a model; up to fifty of either for each damping
            that the first five models try) are not; of unlearners they are.
        share: those steps in trainings.
        meta: how it was done.
    """

    forget: NDArray[np.intp]
    models: list[nn.Module]
    predicted: Mapping[str, NDArray[np.float64]]
    steps: float
    share: float
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """A line: a generated one prints every output."""
        many, said = len(self.models), ", ".join(self.predicted) or "nothing"
        return (
            f"Unlearned({len(self.forget)} rows, {many} model{'s'[: many != 1]}, predicted {said}, "
            f"{self.share:.2g} of a training each)"
        )

    @property
    def model(self) -> nn.Module:
        """The only model.

        Raises:
            ValueError: there are several, or none.
        """
        if len(self.models) != 1:
            raise ValueError(f"expected one model, got {len(self.models)}; see `.models`")
        return self.models[0]

    def outputs(self, outputs: Outputs | Mapping[str, Outputs]) -> dict[str, NDArray[np.float64]]:
        """Outputs [runs, z] of the unlearned models, by name."""
        return read_all(self.models, outputs)


def read_all(
    models: Any, outputs: Outputs | Mapping[str, Outputs]
) -> dict[str, NDArray[np.float64]]:
    """Outputs [models, z] of models or runs, or of a single one, by name ("outputs" for a single kind)."""
    module = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    if module or hasattr(models, "problem"):  # a module may be a sequence, of its layers
        models = [models]
    named = outputs if isinstance(outputs, Mapping) else {"outputs": outputs}
    several = [
        getattr(model, "model", model) if not isinstance(model, nn.Module) else model
        for model in models
    ]
    return {
        name: np.stack([some.evaluate(model).numpy() for model in several])
        for name, some in named.items()
    }


def unlearn(
    runs: Any,
    forget: Iterable[int],
    outputs: Outputs | Mapping[str, Outputs] | None = None,
    *,
    method: Literal["auto", "outputs"] | Unlearner = "auto",
    datamodel: Any = None,
    like: Any = None,
    change: tuple[Tensor, Tensor] | None = None,
    budget: float | None = None,
    pace: Pace | None = None,
    retain_rows: int = 2000,
    seed: int = 0,
    progress: Progress = iter,
) -> Unlearned:
    """Models, or their outputs, as if the forget set had never been trained on.

        outputs:  f_z + trust · (f̂_z(w − w_F) − f̂_z(w))     models:  matched to logits that moved alike

    w: what the runs were trained at. "auto" predicts by rehearsals (`rehearse`): pairs of trainings with and
    without F, on half of a batch's rows or on as many as the budget of all runs allows for two of them, and then as
    many pairs as it allows; never the whole training without F. Changes are averaged over runs, corrected by what
    trainings learn of F beyond rehearsals (`Rehearsal.corrected`) and shrunk by their noise (`Rehearsal.trust`),
    each kind of output by itself. Seven tenths of the budget go into rehearsals, the rest into matching each model:
    by Gauss–Newton steps where it is a classifier of few classes, else by gradient steps.

    Args:
        runs: a trained `Run`, or several of the same problem (the more, the less noise). For "auto" its model takes
            all columns but the labels, the last of a tuple or `labels` of a dict, and returns logits or outputs.
        forget: rows of the problem's training data.
        outputs: what to predict, a name for each kind ("forget", "retain", "validation").
        method: "auto"; "outputs" for predicted outputs alone, no models; or an unlearner
            `(model, forget, retain) -> new model` of your own or of `applied.unlearners`.
        datamodel: predicts outputs in the place of rehearsals: anything with `.predict(weights)`, by the names
            of `outputs` where those have names.
        like: counterparts of the forget rows, on which no run was trained: for each row as listed one with the same
            answer about somebody never seen, or several rounds of them. With them "auto" rehearses and predicts
            nothing: it brings what is said of the forget set to what is said of these rows (`to_unseen`). For what
            is learned by heart, late in training, as facts are: rehearsals learn too little of that.
        change: predicted changes of the logits to match, from any datamodel, in the place of rehearsals:
            (of the forget rows [F, ..., c], of the rows `retained(run, forget)` [R, ..., c]).
        budget: training steps for each model, in those of its training; by default a fifth, and a third with `like`:
            fewer steps leave the models further from what they said elsewhere.
        pace: how rehearsals are taken; by default on batches as large as the budget allows.
        retain_rows: how many retained rows are matched at most.
        seed: of batches and of the sample of retained rows.
        progress: wraps the loops over runs (tqdm).

    Raises:
        ValueError: rows that are none of the training data, twice, all of it, or already without weight; a
            budget outside (0, 1] or too small for a step; outputs missing where only outputs are asked for.
        UnlearningWarning: (a warning) models that are left as they were, since nothing is predicted beyond its noise;
            rehearsals that come less than half as far as the runs; a single run.

    Source: Georgiev et al. 2024 (arXiv 2410.23232) for predicting, then matching.
    """
    several = [runs] if hasattr(runs, "problem") else list(runs)
    named, listed = _named(outputs), list(forget)
    budget = (BUDGET if like is None else BY_HEART) if budget is None else budget
    rows = _checked(several, listed, budget)
    if like is not None:
        if method != "auto" or datamodel is not None or change is not None:
            raise ValueError(
                "expected `like` by itself, with method='auto'; it replaces rehearsals, datamodels and changes"
            )
        method = _towards(several[0], _in_order(like, listed), budget, seed)
    if callable(method):
        return _by_unlearner(several, rows, method, progress)
    if method == "outputs" and not named:
        raise ValueError("expected outputs to predict, got none; pass e.g. Outputs(margin, data)")
    if method not in ("auto", "outputs"):
        raise ValueError(f"expected 'auto', 'outputs' or an unlearner, got {method!r}")
    train, length = several[0].problem.train, len(several[0].order)
    rest = retained(several[0], rows, retain_rows, seed) if method == "auto" else rows[:0]

    # rewrite: outputs and logits at the weights that leave the forget set out
    without = np.array(several[0].weights, dtype=float)
    without[rows] = 0.0
    goal = Goal(Rows(train, rows), Rows(train, rest)) if method == "auto" else None

    # plug in: a datamodel, or rehearsals, for f(without) − f(the runs' own weights)
    told, wanted = Told(), {} if datamodel is not None else named
    if wanted or (change is None and goal is not None):
        told = rehearsed(
            several, without, wanted, goal if change is None else None,
            of_models=goal is not None, budget=budget, pace=pace, progress=progress,
        )  # fmt: skip
    moved, spent, meta = told.moved, told.steps, dict(told.meta)
    if datamodel is not None:
        moved = {**moved, **_from_datamodel(datamodel, named, several[0], without)}
    before = read_all(several, named)
    predicted = {name: values + moved[name] for name, values in before.items()}

    # optimize: parameters whose logits moved alike
    models: list[nn.Module] = []
    if goal is not None:
        to = change if change is not None else tuple(torch.as_tensor(moved[k]) for k in KINDS)
        left = budget * length - spent
        meta["rehearsed"] = spent / length
        models, how, matching = goal.matched(several, to, left, seed, progress)
        spent += matching
        meta["matching"] = how
        meta["missed"] = goal.share_missed(several[0].model, models[0], to)
        if how is None and change is None:
            warnings.warn(LEFT_ALONE, UnlearningWarning, stacklevel=2)
    meta = {"method": method, "budget": budget, **meta}
    return Unlearned(rows, models, predicted, spent, spent / length, meta)


def retained(run: Any, forget: ArrayLike, most: int = 2000, seed: int = 0) -> NDArray[np.intp]:
    """The retained rows that matching sees: those of weight that are not forgotten, a sample beyond `most`."""
    rows = np.setdiff1d(np.flatnonzero(np.asarray(run.weights) > 0), np.asarray(forget))
    return rows[sample(len(rows), most, seed)]


def _named(outputs: Outputs | Mapping[str, Outputs] | None) -> Mapping[str, Outputs]:
    if outputs is None:
        return {}
    if isinstance(outputs, Outputs):
        return {"outputs": outputs}
    taken = sorted(set(outputs) & set(KINDS))
    if taken:
        raise ValueError(
            f"expected other names of outputs than {taken}; they stand for logits here"
        )
    return outputs


def _checked(runs: list[Any], forget: Iterable[int], budget: float) -> NDArray[np.intp]:
    """The forget set's rows, in order."""
    if not runs:
        raise ValueError("expected at least one run to unlearn from, got none")
    others = [type(run).__name__ for run in runs if not hasattr(run, "problem")]
    if others:
        raise ValueError(
            f"expected runs of `train`, which know their data and recipe, got {others[0]}; models that were trained elsewhere "
            "take an unlearner of their own, see applied.unlearners"
        )
    n, listed = runs[0].problem.n, np.asarray(list(forget))
    rows = np.unique(listed)
    whole = listed.dtype.kind in "iu" and listed.ndim == 1 and len(listed) > 0
    if not whole or rows[0] < 0 or rows[-1] >= n or len(rows) < len(listed) or len(rows) == n:
        raise ValueError(
            f"expected some, not all, of the rows 0 .. {n - 1}, each once, got {listed[:5].tolist()} "
            f"({len(listed)} in all); pass row numbers of the training data"
        )
    first = runs[0]
    for k, run in enumerate(runs[1:], 1):
        same = len(run.order) == len(first.order) and np.array_equal(run.weights, first.weights)
        if not same:
            raise ValueError(
                f"expected runs of one training by different seeds, got run {k} at other weights or of {len(run.order)} "
                f"steps beside {len(first.order)}; unlearn those by themselves"
            )
    for run in runs:
        gone = rows[np.asarray(run.weights)[rows] == 0]
        if len(gone):
            raise ValueError(
                f"expected runs that were trained on the forget set, got weight 0 for rows {gone[:5].tolist()}; "
                "these runs never saw them"
            )
    if not 0 < budget <= 1:
        raise ValueError(f"expected a budget in (0, 1] of a training's steps, got {budget}")
    return rows


def _by_unlearner(
    runs: list[Any], rows: NDArray[np.intp], unlearner: Unlearner, progress: Progress
) -> Unlearned:
    """Every run's model through somebody's unlearner."""
    train, length = runs[0].problem.train, len(runs[0].order)
    rest = np.setdiff1d(np.flatnonzero(np.asarray(runs[0].weights) > 0), rows)
    models, steps = [], 0.0
    for run in progress(runs):
        model = run.model
        with counted(model) as count:
            models.append(unlearner(model, Rows(train, rows), Rows(train, rest)))
            count.made.append(models[-1])
        steps += count.steps(len(run.order[0])) / len(runs)
    name = getattr(
        unlearner, "__name__", getattr(getattr(unlearner, "func", None), "__name__", "unlearner")
    )
    return Unlearned(rows, models, {}, steps, steps / length, {"method": name})


def _towards(run: Any, like: Any, budget: float, seed: int) -> Unlearner:
    """To what is said of counterparts, by the training's optimizer at half its learning rate, within the budget.

    All counterparts are read once, and each step reads a batch before it.
    """
    optimizer, batch = run.recipe.optimizer, len(run.order[0])
    reading = FORWARD * len(like) / batch
    how = Steps(
        steps=int((budget * len(run.order) - reading) / (1 + FORWARD) + ROUNDING), lr=optimizer.lr / 2,
        momentum=getattr(optimizer, "momentum", None), batch_size=batch, decay=True, seed=seed,
    )  # fmt: skip
    if how.steps < 1 or how.batch_size < 2:
        raise ValueError(
            f"expected a budget of a step or more beside reading {len(like)} counterparts ({reading:.1f} steps), on batches "
            f"of two rows or more, got {budget:g} of {len(run.order)} steps on {batch} rows"
        )
    return partial(to_unseen, like=like, how=how)


def _in_order(like: Any, listed: list[int]) -> Data:
    """Counterparts of rows as somebody listed them, in the order of the rows' numbers."""
    data, n = as_data(like), len(listed)
    if len(data) % n:
        return data  # not some for each row: refused where they meet the forget set
    return Rows(data, np.arange(len(data)).reshape(-1, n)[:, np.argsort(listed)].ravel())


def _from_datamodel(
    datamodel: Any, named: Mapping[str, Outputs], run: Any, without: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """What a datamodel predicts to change, by name, at the exposure of the run."""
    by_name = datamodel if isinstance(datamodel, Mapping) else {"outputs": datamodel}
    if set(by_name) != set(named):
        raise ValueError(
            f"expected a datamodel for each of the outputs {sorted(named)}, got {sorted(by_name)}"
        )
    moved = {
        name: np.asarray(f.predict(run.exposure * without)) - np.asarray(f.predict(run.anchor))
        for name, f in by_name.items()
    }
    for name, change in moved.items():
        if change.shape != (len(named[name]),):
            raise ValueError(
                f"expected a datamodel of the {len(named[name])} outputs of {name!r}, got one that predicts "
                f"{change.shape}; score the same outputs"
            )
    return moved
