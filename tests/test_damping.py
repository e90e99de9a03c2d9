"""attribution_core.second_order.damping: the multiple that is chosen is the one whose datamodel predicts retrainings."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attribution_core import SGD, Recipe, influence, lds, random_subsets, retrain, train
from attribution_core.curvature import fit_curvature
from attribution_core.layerwise.vectors import flatten
from attribution_core.second_order import damping as core
from attribution_core.second_order.damping import choose_damping
from tests import menagerie

RECIPE = Recipe(SGD(0.3, momentum=0.5), batch_size=4, epochs=6)


def small_run(exposure=1.0, recipe=RECIPE, weights=None):
    problem = menagerie.softmax()
    run = train(problem, recipe, weights, exposure=exposure)
    return run, menagerie.unseen(problem)


def damping_of(run):
    return flatten({k: v[None] for k, v in run.damping.items()})[0].double()


def by_hand(run, outputs, multiple, keep, drop="row", **settings):
    """LDS of the datamodel at c · run.damping on retrained random subsets."""
    subsets = random_subsets(run.problem.n, core.SUBSETS, keep=keep, seed=core.SEED)
    seeds = [run.recipe.seed + core.SEED]
    table = retrain(run.problem, run.recipe, outputs, run.weights * subsets, seeds=seeds, drop=drop)
    return lds(influence(run, outputs, damping=multiple * damping_of(run), **settings), table).mean


@pytest.mark.parametrize(
    "settings",
    [
        {"curvature": "gauss_newton"},
        {"curvature": "gauss_newton", "form": "cg"},
        {"curvature": "hessian"},
        {"curvature": "ekfac", "refine": 0},
        {"curvature": "ekfac", "refine": 3},
        {"curvature": "ekfac", "refine": "size", "labels": "data"},
    ],
)
def test_every_multiple_is_judged_by_its_own_datamodel(settings):
    """Whether the curvature is fitted once and shifted, or again for every multiple."""
    run, outputs = small_run()
    fit = choose_damping(run, outputs, **settings)
    found = fit.meta["damping_lds"]
    assert list(found) == [str(c) for c in core.MULTIPLES]
    for multiple in core.MULTIPLES:
        expected = by_hand(run, outputs, multiple, 0.5, **settings)
        # ranks are the same unless rounding orders two predictions that are equal
        assert found[str(multiple)] == pytest.approx(expected, abs=1e-9)


def test_the_best_is_picked():
    run, outputs = small_run()
    fit = choose_damping(run, outputs)
    found = fit.meta["damping_lds"]
    assert len(set(found.values())) > 1
    best = fit.meta["damping_multiple"]
    assert found[str(best)] == max(found.values())
    assert fit.damping == pytest.approx(best * float(damping_of(run).mean()), rel=1e-12)
    v = torch.eye(15, dtype=torch.float64)
    expected = fit_curvature(run.trained(), damping=best * damping_of(run)).solve(v)
    torch.testing.assert_close(fit.solve(v), expected, rtol=1e-10, atol=1e-12)


def test_multiples_of_your_own():
    run, outputs = small_run()
    fit = choose_damping(run, outputs, multiples=(2.0,), subsets=5)
    assert fit.meta["damping_multiple"] == 2.0
    assert list(fit.meta["damping_lds"]) == ["2.0"]
    assert fit.damping == pytest.approx(2 * float(damping_of(run).mean()), rel=1e-12)


def test_a_run_at_exposure_is_judged_on_subsets_of_that_size():
    run, outputs = small_run(exposure=0.3)
    found = choose_damping(run, outputs).meta["damping_lds"]
    for multiple in core.MULTIPLES:
        assert found[str(multiple)] == pytest.approx(by_hand(run, outputs, multiple, 0.3), abs=1e-9)


def test_a_run_with_an_explicit_order_keeps_its_batches():
    """Rows cannot be taken out of batches that were made elsewhere: they get weight 0."""
    order = [batch.tolist() for batch in RECIPE.draw(np.arange(20))]
    run, outputs = small_run(recipe=replace(RECIPE, order=order))
    found = choose_damping(run, outputs).meta["damping_lds"]
    expected = by_hand(run, outputs, 1.0, 0.5, drop="weight")
    assert found["1.0"] == pytest.approx(expected, abs=1e-9)


def test_a_run_with_weights_of_its_own_keeps_them():
    run, outputs = small_run(weights=np.linspace(0, 2, 20))
    found = choose_damping(run, outputs).meta["damping_lds"]
    assert found["1.0"] == pytest.approx(by_hand(run, outputs, 1.0, 0.5), abs=1e-9)


def test_a_curvature_from_some_rows():
    """The curvature is that of the rows; retrainings and scores are those of all."""
    run, outputs = small_run()
    rows = np.arange(0, 20, 2)
    fit = choose_damping(run, outputs, rows=rows)
    x, y = run.problem.train.columns
    some = replace(run.trained(), train=(x[rows], y[rows]))
    best = fit.meta["damping_multiple"]
    v = torch.eye(15, dtype=torch.float64)
    expected = fit_curvature(some, damping=best * damping_of(run)).solve(v)
    torch.testing.assert_close(fit.solve(v), expected, rtol=1e-10, atol=1e-12)


def test_progress_sees_every_retraining():
    run, outputs = small_run()
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    choose_damping(run, outputs, subsets=7, progress=progress)
    assert len(seen) == 7
