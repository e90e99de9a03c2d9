"""What two processes compute, for tests/test_processes.py to hold beside one process.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py FOLDER

Every process writes FOLDER/<rank>.npz and the blocks or trainings that it did itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution_core import (
    SGD,
    AdamW,
    Outputs,
    Problem,
    Recipe,
    aumann_shapley,
    influence,
    leave_one_out,
    magic,
    margin,
    random_subsets,
    representation_similarity,
    retrain,
    source,
    tracin,
    train,
    trak,
)
from attribution_core.disk import run_folder
from attribution_core.processes import (
    collect,
    from_first,
    my_rows,
    sum_all,
    sum_over_processes,
    wait,
    world,
)
from attribution_core.second_order.ekfac import fit_ekfac
from tests import menagerie

ROWS = 256 * 5 + 7  # six blocks of a store, the last one short


def gone_on(problem: Problem, recipe: Recipe, folder: Path) -> np.ndarray:
    """Losses and a checkpoint of a shared training that was killed after two of its three steps."""
    run_folder.EVERY, usual = 0.0, run_folder.EVERY
    how: dict[str, Any] = {"shard": True, "checkpoints": 2, "folder": folder}

    def killed(steps: range) -> Iterator[int]:
        yield from steps[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(problem, recipe, progress=killed, **how)
    wait()
    left: list[int] = []
    run = train(problem, recipe, progress=lambda s: [left.append(k) or k for k in s], **how)
    assert left == [2]
    run_folder.EVERY = usual
    expected = train(problem, recipe, shard=True, checkpoints=2)
    np.testing.assert_array_equal(run.losses, expected.losses)
    pairs = zip(run.checkpoints, expected.checkpoints, strict=True)
    assert all(torch.equal(a.params[k], b.params[k]) for a, b in pairs for k in a.params)
    return np.concatenate([run.losses, run.checkpoints[0].params["0.weight"].flatten().numpy()])


def stopped(problem: Problem, recipe: Recipe) -> np.ndarray:
    """Where a shared training stops for a row of NaN, which one process alone sees."""
    x, y = problem.train[range(problem.n)]
    bad = replace(problem, train=(torch.where(torch.arange(problem.n) == 3, np.nan, x.mT).mT, y))
    with pytest.raises(ValueError, match=r"training stopped at step (\d)") as error:
        train(bad, recipe, shard=True)
    return np.array([int(str(error.value).split("step ")[1][0])])


def everything(folder: Path) -> dict[str, np.ndarray]:
    """Scores and tables by name, the same on every process; and what this one did."""
    found: dict[str, np.ndarray] = {}
    problem = menagerie.softmax(ROWS)
    outputs = menagerie.unseen(problem)
    for curvature in ("hessian", "gauss_newton", "diagonal", "identity"):
        found[curvature] = influence(problem, outputs, curvature=curvature).scores
    found["cg"] = influence(problem, outputs, curvature="hessian", form="cg").scores
    for labels in ("data", "model"):
        found[f"ekfac {labels}"] = influence(
            problem, outputs, curvature="ekfac", labels=labels
        ).scores
    net = menagerie.mlp(7)
    few = Outputs(margin, net.train)
    for refine in (0, 3, "size"):
        found[f"ekfac refine {refine}"] = influence(
            net, few, curvature="ekfac", damping=0.1, refine=refine
        ).scores
    drawn = fit_ekfac([menagerie.mlp(41)], draws=2)  # drawn by each process for its own rows
    found["ekfac drawn"] = drawn.apply(torch.eye(90).double(), torch.sqrt).numpy()
    lm = menagerie.gpt2(3)
    weights = np.array([1.0, 0.0, 2.0])
    found["ekfac gpt2"] = influence(
        lm, Outputs(lm.loss, lm.train), curvature="ekfac", damping=0.1, weights=weights
    ).scores
    found["odd number of rows"] = influence(net, few, damping=0.5).scores
    single = menagerie.mlp(1)
    found["fewer rows than processes"] = influence(
        single, Outputs(margin, single.train), damping=0.5
    ).scores
    found["ekfac of fewer rows than processes"] = influence(
        single, Outputs(margin, single.train), curvature="ekfac", damping=0.5
    ).scores

    done: list[int] = []

    def progress(items):
        for item in items:
            done.append(int(item[0]))
            yield item

    for curvature in ("hessian", "identity"):
        stored = influence(
            problem, outputs, curvature=curvature, folder=folder / f"store-{curvature}",
            progress=progress,
        )  # fmt: skip
        found[f"store {curvature}"] = np.array(stored.scores)
    found["own: blocks"] = np.array(done)

    small = menagerie.softmax(20)
    recipe = Recipe(SGD(0.1), batch_size=4, epochs=2)
    weights = random_subsets(20, 5, keep=0.5)
    run = train(small, recipe, checkpoints=2)
    targets = menagerie.unseen(small)
    found["tracin"] = tracin(run, targets).scores
    found["source"] = source(run, targets, segments=2).scores
    found["magic"] = magic(run, targets).scores
    found["magic by lr"] = magic(run, targets, wrt="lr", mode="reverse").scores
    adam = Recipe(AdamW(0.01, weight_decay=0.1), batch_size=5, epochs=2, clip=0.5, accumulate=2)
    shared = train(net, adam, shard=True, states=3)
    found["shared run"] = shared.losses
    found["own: rows of a batch"] = np.concatenate(shared.steps.parts(0))
    for mode in ("reverse", "forward"):
        by_domain = magic(shared, few, wrt="domains", groups=np.arange(7) % 2, mode=mode)
        found[f"magic of a shared run, {mode}"] = by_domain.scores
    by_inputs = magic(shared, few, wrt="inputs", rows=[5, 0, 3])
    found["magic of a shared run by inputs"] = by_inputs.scores
    one_row = train(net, Recipe(SGD(0.1), batch_size=1, epochs=1), shard=True)
    found["fewer rows a batch than processes"] = magic(one_row, few).scores
    gone = train(small, recipe, [1.0] * 15 + [0.0] * 5, drop="row")
    found["shadows"] = magic(gone, targets).scores
    found["magic in a folder"] = magic(run, targets, folder=folder / "magic").scores
    kept = train(net, adam, shard=True, states=3, folder=folder / "shared")
    found["magic of a shared run on disk"] = magic(kept, few, states=2).scores
    found["killed and gone on"] = gone_on(net, adam, folder / "killed")
    found["one process fails"] = stopped(net, adam)
    short = replace(recipe, epochs=1)
    found["aumann shapley"] = aumann_shapley(
        small, short, targets, points=2, folder=folder / "aumann"
    ).scores
    found["trak"] = trak(run, targets, projection_dim=8).scores
    found["trak of fewer rows than processes"] = trak(
        single, Outputs(margin, single.train), ridge=1.0
    ).scores
    many = menagerie.softmax(519)
    kept = trak(many, menagerie.unseen(many), projection_dim=8, folder=folder / "trak")
    found["store trak"] = kept.scores
    found["leave one out"] = leave_one_out(run, targets).scores
    found["groups"] = influence(run, targets, groups=np.arange(20) % 3).scores
    found["neighbours"] = representation_similarity(small, targets).scores
    for name, where in (("table", None), ("table in a folder", folder / "table")):
        done.clear()
        table = retrain(
            small,
            recipe,
            menagerie.unseen(small),
            weights,
            seeds=3,
            folder=where,
            progress=progress,
        )
        found[name] = table.per_seed
        found[f"own: {name}"] = np.array(done)
    too_much = np.stack([np.ones(20), np.full(20, 1.7e308)])  # for the second process alone
    try:
        retrain(small, recipe, targets, too_much, seeds=1, stack=1)
    except ValueError as error:
        assert "finite" in str(error)  # noqa: PT017
        found["stopped by another process"] = np.ones(1)
    x, y = small.train[list(range(20))]
    gone = x.clone()
    gone[19] = torch.nan  # a row of the second process alone
    for where in (None, folder / "spoilt"):
        try:
            influence(
                replace(small, train=(gone, y)),
                targets,
                curvature="identity",
                damping=1.0,
                folder=where,
            )
        except ValueError as error:
            assert "row" in str(error)  # noqa: PT017
            found[f"scores stopped, in {'a folder' if where else 'memory'}"] = np.ones(1)
    found["and after it"] = retrain(small, recipe, targets, np.ones((1, 20)), seeds=1).per_seed
    return found


if __name__ == "__main__":
    rank, size = world()
    assert size == 2, f"expected 2 processes, got {size}; launch by torchrun"
    assert from_first(rank) == 0
    ranks = torch.tensor([float(rank)])
    assert sum_over_processes(ranks + 1).item() == 3
    total, named = sum_all((ranks.double(), {"a": ranks.expand(2, 3), "none": ranks[:0]}))
    assert (total.dtype, total.item()) == (torch.float64, 1)
    assert (named["a"] == torch.ones(2, 3)).all()
    assert (named["a"].dtype, named["none"].shape) == (torch.float32, (0,))
    rows = np.arange(5)
    assert collect(torch.from_numpy(my_rows(rows))[:, None])[:, 0].tolist() == rows.tolist()
    out = Path(sys.argv[1])
    np.savez(out / f"{rank}.npz", **everything(out))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads at times abort an interpreter that takes its leave at leisure
