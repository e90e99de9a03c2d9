"""When not to believe a metagradient: precision, kinks, metasmoothness, and one training against its prediction.

A derivative may be exact and yet say nothing about the next training. In every prototype one more training,
at weights moved a little, showed whether it does; the rest are hints that cost less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attribution_core.problem import Outputs, Problem
from attribution_core.stepwise.steps import Steps

if TYPE_CHECKING:
    from attribution_core.datamodel import LinearDatamodel
    from attribution_core.training import Run

H = 0.1  # how far weights are moved, in standard deviations of 1 (Engstrom et al. 2025)
HOLDS = 0.25  # relative error of the prediction up to which first order is called true
HALF = (torch.float16, torch.bfloat16)
KINKS = {
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "rrelu", "threshold", "hardtanh", "hardtanh_"),
    *(
        "hardswish",
        "hardsigmoid",
        "_prelu_kernel",
        "abs",
        "clamp",
        "clamp_",
        "clamp_min",
        "clamp_max",
    ),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "maximum"),
    *("minimum", "amax", "amin", "max", "min", "sort", "topk"),
}
CURVES = {
    *("gelu", "tanh", "tanh_", "sigmoid", "sigmoid_", "silu", "silu_", "softplus", "elu", "elu_"),
    *("celu", "mish", "log_sigmoid_forward", "glu", "sin", "cos", "erf"),
}


class MetagradientWarning(UserWarning):
    """Scores that are exact derivatives, and yet should not be believed as they stand."""


# --- precision and kinks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What one forward pass shows."""

    precision: str  # of the parameters
    half: str | None  # an operation in half precision, if any
    kinked: float  # share of activations that come from functions with kinks

    def refuse(self) -> None:
        """Raise where half precision is used.

        Raises:
            ValueError: it is.
        """
        if self.half:
            raise ValueError(_noise(self.half))


def _noise(what: str) -> str:
    return (
        f"expected float32 or float64 throughout, got {what}: in half precision metagradients are noise; "
        "call model.float() before training and keep autocast and casts out of the loss"
    )


def refuse_low_precision(problem: Problem) -> None:
    """Raise for parameters in half precision, and under autocast.

    Raises:
        ValueError: either.
    """
    low = {name: v.dtype for name, v in problem.params.items() if v.dtype in HALF}
    if low:
        raise ValueError(_noise(f"parameters in {next(iter(low.values()))} ({list(low)[:3]} ...)"))
    if torch.is_autocast_enabled(problem.device.type):
        raise ValueError(_noise("autocast"))


class _Watcher(TorchDispatchMode):
    """Notes half precision and counts numbers that kinked and smooth activations give."""

    def __init__(self) -> None:
        super().__init__()
        self.half: str | None = None  # an operation in half precision
        self.counts = {"kinked": 0, "smooth": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            name = func.overloadpacket.__name__
            if first.dtype in HALF:
                self.half = self.half or f"{name} in {first.dtype}"
            kind = "kinked" if name in KINKS else "smooth" if name in CURVES else None
            if kind is not None and _on_activations(args):
                self.counts[kind] += first.numel()
        return out


def _on_activations(args: Any) -> bool:
    """Whether an operation takes numbers of examples, not a constant or counts."""
    return any(isinstance(a, torch.Tensor) and a.ndim > 1 and a.is_floating_point() for a in args)


def look(steps: Steps) -> Look:
    """One forward pass of the first batch, watched."""
    state, watcher = steps.start(), _Watcher()
    batch = steps.batch(0, steps.order[0])
    with torch.no_grad(), watcher:
        steps.losses(state.params, state.buffers, batch, 0)
    total = sum(watcher.counts.values())
    own = next(iter(steps.problem.params.values())).dtype
    return Look(str(own), watcher.half, watcher.counts["kinked"] / total if total else 0.0)


# --- one training against its prediction -------------------------------------------------------------


@dataclass(frozen=True)
class FiniteDifference:
    """Outputs of a training at weights w + h v, v standard normal, beside what the scores predicted.

    Args:
        error: ‖predicted − actual‖ / ‖actual‖ of the changes, over targets.
        agreement: their cosine.
        slope: least-squares slope of actual on predicted; 1 is the right size.
        h: how far the weights were moved.
        targets: how many outputs were compared.
    """

    error: float
    agreement: float
    slope: float
    h: float
    targets: int

    @property
    def holds(self) -> bool:
        """Whether the prediction was right to HOLDS of its size."""
        return bool(self.error <= HOLDS)

    def __str__(self) -> str:
        return (
            f"one training at weights moved by {self.h:g} · N(0, 1) changed {self.targets} outputs by what was "
            f"predicted up to an error of {self.error:.0%} (cosine {self.agreement:.2f}, slope {self.slope:.2f})"
        )


def moved_weights(run: Run, h: float = H, seed: int = 0) -> np.ndarray:
    """The run's weights plus h · N(0, 1); weights of 0 stay, and none falls below 0."""
    v = np.random.default_rng(seed).standard_normal(len(run.weights))
    return np.where(run.weights == 0, 0.0, np.maximum(run.weights + h * v, 0.0))


def finite_difference(
    run: Run,
    datamodel: LinearDatamodel,
    outputs: Outputs,
    *,
    h: float = H,
    seed: int = 0,
    since: int | None = None,
) -> FiniteDifference:
    """Train once more, at moved weights and otherwise the same, and compare with the datamodel's prediction."""
    weights = moved_weights(run, h, seed)
    actual = (run.again(weights, since=since).outputs(outputs) - run.outputs(outputs)).numpy()
    predicted = run.exposure * (weights - run.weights) @ datamodel.scores
    return compared(predicted, actual, h)


def compared(predicted: np.ndarray, actual: np.ndarray, h: float) -> FiniteDifference:
    """Predicted beside actual changes of outputs [t]."""
    tiny = np.finfo(float).tiny
    size = max(float(np.linalg.norm(actual)), tiny)
    own = max(float(np.linalg.norm(predicted)), tiny)
    product = float(predicted @ actual)
    return FiniteDifference(
        error=float(np.linalg.norm(predicted - actual)) / size,
        agreement=product / (size * own),
        slope=product / own**2,
        h=h,
        targets=len(actual),
    )


@dataclass(frozen=True)
class Metasmoothness:
    """How straight the way of a training is when its weights move by h v and 2 h v (v standard normal).

    Args:
        curvature: |f(w + 2hv) − 2 f(w + hv) + f(w)| / h², mean over outputs; lower is smoother (def. 1).
        signs: Σ_j d_j sign(θ_h − θ_0)_j sign(θ_2h − θ_h)_j / Σ_j d_j with d = |θ_2h − θ_0|, in [−1, 1]; 1 is
            smooth (def. 2).

    Source: Engstrom et al. 2025 (arXiv 2503.13751), definitions 1 and 2.
    """

    curvature: float
    signs: float


def metasmoothness(
    run: Run, outputs: Outputs, *, h: float = H, seed: int = 0, near: Run | None = None
) -> Metasmoothness:
    """Two more trainings, at weights moved by h v and by 2 h v.

    Args:
        near: the one at h v, if it is at hand.
    """
    one = run.again(moved_weights(run, h, seed)) if near is None else near
    two = run.again(moved_weights(run, 2 * h, seed))
    f0, f1, f2 = (each.outputs(outputs).numpy() for each in (run, one, two))
    p0, p1, p2 = (
        torch.cat([v.flatten().double() for v in each.params.values()]) for each in (run, one, two)
    )
    far = (p2 - p0).abs()
    signs = (far * torch.sign(p1 - p0) * torch.sign(p2 - p1)).sum() / far.sum()
    return Metasmoothness(float(np.abs(f2 - 2 * f1 + f0).mean() / h**2), float(signs))


def describe(datamodel: LinearDatamodel) -> str:
    """One paragraph on how far a datamodel of `magic` can be believed."""
    m = datamodel.meta
    words = [
        f"Exact derivatives through {m['steps'] - m['since']} of {m['steps']} steps, by {m['wrt']}, at exposure "
        f"{m['exposure']:g}, in {m['mode']} mode, computed in {m['precision'].removeprefix('torch.')}."
    ]
    if "growth" in m:
        words.append(f"The adjoint changed {m['growth']:.2g}-fold from the last step to the first.")
    words.append(
        f"{m['kinked']:.0%} of the activations have kinks."
        if m["kinked"]
        else "No activation has kinks."
    )
    for found in [m["check"]] if "check" in m else m.get("checks", []):
        verdict = FiniteDifference(**found)
        words.append(
            f"{str(verdict)[0].upper()}{str(verdict)[1:]}: {'it holds' if verdict.holds else 'it does not hold'}."
        )
    if "averaged" in m:
        words.append(f"Mean of {m['averaged']} runs.")
    return " ".join(words)
