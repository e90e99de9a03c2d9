"""Datamodels fitted on retrainings: how good by how many, and how fast the lasso is.

    OMP_NUM_THREADS=1 python benchmarks/regression.py
    python benchmarks/regression.py --rows 50 500 --targets 50

Truth: logistic regression on digits (is it 5 or more?), 1,000 examples, 128 random features and a bias, trained to the
optimum on random halves by batched Newton steps. Outputs: margins of held-out images. LDS is taken on
halves that no fit has seen. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from time import process_time

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from attribution_core import LinearDatamodel, RetrainingTable, random_subsets
from attribution_core.evaluation import spearman
from attribution_core.fits import lasso
from attribution_core.regression import fit_datamodel

Array = NDArray[np.float64]


class Logistic:
    """Binary logistic regression: (1/n) Σ w_i log(1 + exp(−y_i x_i·θ)) + ½ decay ‖θ‖², solved exactly."""

    def __init__(self, n: int, targets: int, features: int = 128, decay: float = 1e-2) -> None:
        from recipes.embedded import digits

        table = digits()
        x, y = np.concatenate([table.x, table.test_x]), np.concatenate([table.y, table.test_y])
        rng = np.random.default_rng(0)
        x = np.maximum(
            x @ rng.normal(size=(x.shape[1], features)) / 4 + rng.normal(size=features), 0
        )
        x = (x - x.mean(0)) / (x.std(0) + 1e-9)
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1) * np.where(y >= 5, 1.0, -1.0)[:, None]
        order = rng.permutation(len(x))
        self.x, self.test = x[order[:n]], x[order[n : n + targets]]  # rows already times ±1
        self.decay = decay

    def _newton(self, theta: Array, w: Array) -> tuple[Array, Array]:
        """(gradient [p], Hessian [p, p]) of the mean objective."""
        n, p = self.x.shape
        q = 1 / (1 + np.exp(self.x @ theta))
        curvature = (self.x * (w * q * (1 - q))[:, None]).T @ self.x / n + self.decay * np.eye(p)
        return -(w * q) @ self.x / n + self.decay * theta, curvature

    def optimum(self, w: Array, start: Array | None = None) -> Array:
        """θ [p] for weights [n]."""
        theta = np.zeros(self.x.shape[1]) if start is None else start
        for _ in range(30):
            gradient, curvature = self._newton(theta, w)
            if np.abs(gradient).max() < 1e-9:
                return theta
            theta = theta - np.linalg.solve(curvature, gradient)
        raise RuntimeError("Newton's method did not converge")

    def table(self, weights: Array) -> RetrainingTable:
        """Margins of the test images at the optimum of every row of weights."""
        start = self.optimum(np.full(len(self.x), 0.5))
        rows = [self.test @ self.optimum(w, start) for w in weights]
        return RetrainingTable(weights, np.stack(rows)[:, None], (0,))

    def influence(self, curvature: str = "gauss_newton") -> LinearDatamodel:
        """Influence at weight 1 with the exact Hessian, the empirical Fisher, or none (grad-dot)."""
        n, p = self.x.shape
        ones = np.ones(n)
        theta = self.optimum(ones)
        q = 1 / (1 + np.exp(self.x @ theta))
        rows = -q[:, None] * self.x
        matrix = {
            "gauss_newton": lambda: self._newton(theta, ones)[1],
            "fisher": lambda: rows.T @ rows / n + self.decay * np.eye(p),
            "identity": lambda: np.eye(p),
        }[curvature]()
        scores = -rows @ np.linalg.solve(matrix, self.test.T) / n
        return LinearDatamodel(scores, self.test @ theta, 1.0, meta={"method": curvature})


@dataclass(frozen=True)
class Flags:
    """How good and how fast."""

    rows: tuple[int, ...] = (50, 200, 500, 1000, 2000)
    """Retrainings that are fitted on."""
    targets: int = 200
    """Held-out images whose margins are predicted."""
    held: int = 300
    """Subsets on which LDS is taken."""
    timed: tuple[int, ...] = (50, 200, 500, 2000)
    """Retrainings of the lasso's timing."""
    peers: int = 10
    """Targets that scikit-learn is timed on."""


def first(table: RetrainingTable, m: int) -> RetrainingTable:
    """The first m rows."""
    return RetrainingTable(table.weights[:m], table.per_seed[:m], table.seeds)


def score(datamodel: LinearDatamodel, table: RetrainingTable) -> float:
    """LDS, where a target whose prediction never varies counts 0 (a lasso without effects)."""
    predicted, actual = datamodel.predict(table.weights), table.outputs
    varies = np.ptp(predicted, axis=0) > 0
    return float(spearman(predicted[:, varies], actual[:, varies]).sum() / len(varies))


def quality(problem: Logistic, flags: Flags, fit: RetrainingTable, held: RetrainingTable) -> None:
    """Print LDS by the number of retrainings."""
    names = {"gauss_newton": "GN", "fisher": "Fisher", "identity": "grad-dot"}
    priors = {label: problem.influence(name).scores for name, label in names.items()}
    priors["random"] = np.random.default_rng(0).normal(size=priors["GN"].shape)
    base = held.outputs.mean(0)
    alone = {k: score(LinearDatamodel(v, base, 0.5), held) for k, v in priors.items()}
    print("priors alone: " + ", ".join(f"{k} {v:.3f}" for k, v in alone.items()) + "\n")
    heads = ["m", "empirical", "ridge", "lasso", *(f"{k} + ridge" for k in priors), "GN + lasso",
             "grad-dot + lasso", "worst of ridge with prior"]  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for m in flags.rows:
        table = first(fit, m)
        found = [score(fit_datamodel(table, kind=k), held) for k in ("empirical", "ridge", "lasso")]  # type: ignore[arg-type]
        both = {k: score(fit_datamodel(table, prior=v), held) for k, v in priors.items()}
        margin = min(both[k] - max(alone[k], found[1]) for k in priors)
        sparse = [
            score(fit_datamodel(table, kind="lasso", prior=priors[k]), held)
            for k in ("GN", "grad-dot")
        ]
        cells = [f"{v:.3f}" for v in (*found, *both.values(), *sparse)] + [f"{margin:+.4f}"]
        print(f"| {m} | " + " | ".join(cells) + " |", flush=True)


def objective(x: Array, y: Array, b: Array, penalty: Array) -> Array:
    """The lasso's objective for coefficients [n, k] of one target at k penalties."""
    residual = y[:, None] - x @ b
    return (residual**2).sum(0) / (2 * len(x)) + penalty * np.abs(b).sum(0)


def own_seconds(w: Array, y: Array) -> tuple[Array, float, float, float]:
    """(penalties, seconds a target of the full path, of the whole fit; its KKT violation)."""
    scaled = (y - y.mean(0)) / y.std(0)
    lasso.PATIENCE, patience = len(lasso.RATIOS), lasso.PATIENCE  # as far as scikit-learn goes
    begun = process_time()
    lasso.validated(w, scaled, np.ones(len(w)), lasso.held_rows(w, y), iter)
    path = process_time() - begun
    lasso.PATIENCE = patience
    begun = process_time()
    _, meta = lasso.lasso(w, y, np.ones(len(w)), None)
    whole = process_time() - begun
    return (
        np.array(meta["penalty"]) / y.std(0),
        path / y.shape[1],
        whole / y.shape[1],
        meta["violation"],
    )


def speed(flags: Flags, fit: RetrainingTable) -> None:
    """Print CPU seconds a target of own lasso paths and fits, and of scikit-learn's path with a Gram.

    Own path: four fifths of the rows, the Gram included, validation included. Own fit: the same with its
    early stop, then the refit on all rows. lasso_path: all rows, the Gram given for nothing, at its default
    tolerance and at 1e-7, which is needed for the objective of our fit.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    print("\n| m | own path | own fit, KKT | lasso_path | lasso_path, tol 1e-7 | paths | paths, tol 1e-7 | "
          "objective own / sklearn − 1: mean, worst (default tol) | (1e-7) |")  # fmt: skip
    print("|" + "---|" * 9)
    warnings.simplefilter("ignore", ConvergenceWarning)
    for m in flags.timed:
        w, y = fit.weights[:m], fit.outputs[:m]
        chosen, path, whole, wrong = own_seconds(w, y)
        x, z = w - w.mean(0), (y - y.mean(0)) / y.std(0)
        ours, _ = lasso.solve(x, z, chosen)
        gram, x = x.T @ x, np.asfortranarray(x)
        seconds, gaps = {}, {}
        for tol in (1e-4, 1e-7):
            spent, found = 0.0, []
            for j in range(flags.peers):
                corr = x.T @ z[:, j]
                top = np.abs(corr).max() / m
                begun = process_time()
                lasso_path(x, z[:, j], alphas=top * lasso.RATIOS, precompute=gram, Xy=corr, tol=tol)
                spent += process_time() - begun
                grid = top * lasso.RATIOS  # then to the penalty that we chose, to compare there
                grid = np.append(grid[grid > chosen[j] * 1.001], chosen[j])
                _, b, _ = lasso_path(x, z[:, j], alphas=grid, precompute=gram, Xy=corr, tol=tol)
                both = np.stack([ours[:, j], b[:, -1]], axis=1)
                own, theirs = objective(x, z[:, j], both, chosen[[j, j]])
                found.append(own / theirs - 1)
            seconds[tol], gaps[tol] = (
                spent / flags.peers,
                f"{np.mean(found):+.0e}, {np.max(found):+.0e}",
            )
        print(
            f"| {m} | {path:.4f} | {whole:.4f}, {wrong:.0e} | {seconds[1e-4]:.4f} | {seconds[1e-7]:.4f} | "
            f"{seconds[1e-4] / path:.1f}x | {seconds[1e-7] / path:.1f}x | {gaps[1e-4]} | {gaps[1e-7]} |",
            flush=True,
        )


def main(flags: Flags) -> None:
    """Retrain, fit, print."""
    torch.set_num_threads(1)
    problem = Logistic(1000, flags.targets)
    n = len(problem.x)
    rows = max(*flags.rows, *flags.timed)
    fit = problem.table(random_subsets(n, rows, keep=0.5, seed=1))
    held = problem.table(random_subsets(n, flags.held, keep=0.5, seed=2))
    print(f"n {n}, {flags.targets} targets, halves; LDS on {flags.held} others; ", end="")
    quality(problem, flags, fit, held)
    print(
        f"\nlasso, 30 penalties to λ_max / 100, CPU seconds a target, {flags.peers} targets for sklearn"
    )
    speed(flags, fit)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
