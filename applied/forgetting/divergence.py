"""How far outputs of unlearned models lie from those of oracles, point by point, and whether an attacker sees it.

An oracle is a model that never saw the forget set. Samples are [models, points].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

EDGE = 1e-5  # of a bin: outputs so little below an edge lie on it, but for rounding, in float32 too
NARROW = 1e-3  # a normal fit is no narrower than this share of both samples' common spread


def klom(
    unlearned: ArrayLike,
    oracle: ArrayLike,
    *,
    bins: int = 20,
    clip: float = 100.0,
    epsilon: float = 1e-5,
) -> NDArray[np.float64]:
    """Divergence of the outputs of unlearned models from oracles', from histograms, nats per output.

    KL(unlearned ‖ oracle) = Σ_b p_b log(p_b / q_b) over equal bins between the least and the greatest
    value of both samples, that value included, and an edge belongs to the bin above it;
    p_b is (count_b / N + ε) / (1 + bins · ε), q_b likewise.
    0 for equal samples, log(1/ε) = 11.5 for point masses apart. For two samples of one distribution it is
    not 0: .35 in the mean for 100 models of each, .89 for 50, 3.0 for 20; compare with other oracles.

    Args:
        unlearned: [N, z] outputs of N models at z points.
        oracle: [M, z] outputs of M models that never saw the forget set.
        bins: how many; with 10 the floor of 100 models is .14.
        clip: outputs count as ±clip at most.
        epsilon: ε, what an empty bin holds.

    Returns:
        [z], nats.

    Raises:
        ValueError: samples that are no two matrices over the same points, hold fewer than two models, or
            values that are not finite; fewer than two bins, a clip or an epsilon that is not positive.

    Source: Georgiev et al. 2024 (arXiv 2410.23232). Both published codes lose the samples at the greatest
    value, and call a point mass there perfect (0) or undefined.

    >>> print(klom([[0.0, 1.0], [0.0, 2.0]], [[5.0, 1.0], [5.0, 2.0]]).round(1))
    [11.5  0. ]
    """
    u, o = _pair(unlearned, oracle)
    if bins < 2 or not clip > 0 or not epsilon > 0:
        raise ValueError(
            f"expected bins >= 2 and a positive clip and epsilon, got {bins}, {clip} and {epsilon}"
        )
    u, o = (x if np.abs(x).max(initial=0.0) <= clip else x.clip(-clip, clip) for x in (u, o))
    low, high = np.minimum(u.min(0), o.min(0)), np.maximum(u.max(0), o.max(0))
    wide = np.where(high > low, high - low, 1.0)
    p, q = (_shares(x, low, wide, int(bins), epsilon) for x in (u, o))
    return (p * np.log(p / q)).sum(1)


def _shares(
    x: NDArray[Any], low: NDArray[Any], wide: NDArray[Any], bins: int, epsilon: float
) -> NDArray[np.float64]:
    """Shares [z, bins] of the samples x [N, z] in each bin, none of them empty."""
    z = x.shape[1]
    place = (x - low) / wide
    place *= bins
    place += EDGE
    flat = place.astype(np.intp)
    np.minimum(flat, bins - 1, out=flat)  # the greatest value belongs to the last bin
    flat += bins * np.arange(z)
    counts = np.bincount(flat.ravel(), minlength=bins * z).reshape(z, bins)
    return (counts / len(x) + epsilon) / (1 + bins * epsilon)


def gaussian_klom(unlearned: ArrayLike, oracle: ArrayLike) -> NDArray[np.float64]:
    """Divergence of the outputs of unlearned models from oracles', from normal fits, nats per output.

    KL = log(s_o / s_u) + (s_u² + (m_u − m_o)²) / (2 s_o²) − ½, with means m and standard deviations s
    (ddof 1) of the models. For few models (5 to 20). For two samples of N models of one normal
    distribution it is not 0 but (2N − 1) / (N (N − 3)) in the mean: .020 for 100, .11 for 20, .27 for 10,
    .9 for 5, and without bound for 3; compare with other oracles. It sees means and spreads only. No spread counts as
    less than 1e-3 of that of both samples together, so outputs that never vary stay finite (≤ 2e6).

    Args:
        unlearned: [N, z] outputs of N models at z points.
        oracle: [M, z] outputs of M models that never saw the forget set.

    Returns:
        [z], nats.

    Raises:
        ValueError: samples that are no two matrices over the same points, hold fewer than two models, or
            values that are not finite.

    >>> print(gaussian_klom([[0.0], [2.0]], [[1.0], [3.0]]))  # means 1 apart, both variances 2
    [0.25]
    """
    u, o = _pair(unlearned, oracle)
    (m_u, s_u), (m_o, s_o) = _normals(u, o)
    ratio, apart = s_u / s_o, (m_u - m_o) / s_o
    return (ratio**2 + apart**2 - 1) / 2 - np.log(ratio)


def _normals(*samples: NDArray[Any]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(mean [z], standard deviation [z]) of each sample [N, z], no deviation vanishingly small."""
    both = np.concatenate(samples)
    size = np.abs(both).max(0, initial=0.0)
    # the second part is rounding: equal numbers have a deviation of 1e-17 of them, not 0
    least = NARROW * both.std(0) + 1e-12 * size + np.finfo(float).tiny
    return [(x.mean(0), np.maximum(x.std(0, ddof=1), least)) for x in samples]


def attack(unlearned: ArrayLike, oracle: ArrayLike) -> NDArray[np.float64]:
    """How well an attacker distinguishes unlearned models from oracles by one output: AUC per output.

    The likelihood ratio of two normal fits, made on every second model and judged on the others, and the
    other way round; the mean AUC of both. .5: chance, 1: always. Each point is attacked by itself, as
    U-LiRA does; below .5 is noise.

    Args:
        unlearned: [N, z] outputs of N models at z points.
        oracle: [M, z] outputs of M models that never saw the forget set.

    Raises:
        ValueError: fewer than four models of either; else as `klom`.

    Source: Hayes et al. 2024 (arXiv 2403.01218).
    """
    from scipy.stats import rankdata

    u, o = _pair(unlearned, oracle, least=4)
    found = []
    for fold in (0, 1):
        (m_u, s_u), (m_o, s_o) = _normals(u[fold::2], o[fold::2])
        judged = np.concatenate([u[1 - fold :: 2], o[1 - fold :: 2]])
        ratio = ((judged - m_o) / s_o) ** 2 / 2 - ((judged - m_u) / s_u) ** 2 / 2
        k = len(u[1 - fold :: 2])
        above = rankdata(ratio, axis=0)[:k].sum(0) - k * (k + 1) / 2
        found.append(above / (k * (len(judged) - k)))  # folds apart: their ratios have two scales
    return np.mean(found, axis=0)


def _pair(unlearned: Any, oracle: Any, least: int = 2) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both samples as float arrays over the same points."""
    u, o = sample("unlearned", unlearned, least), sample("oracle", oracle, least)
    if u.shape[1] != o.shape[1]:
        raise ValueError(
            f"expected outputs at the same points, got unlearned {u.shape} and oracle {o.shape}"
        )
    return u, o


def sample(name: str, given: Any, least: int = 2) -> NDArray[np.float64]:
    """Outputs [models, points] from an array, a tensor or lists.

    Raises:
        ValueError: no matrix, fewer models than `least`, no points, values that are not finite.
    """
    tensor = hasattr(given, "detach")
    x = np.asarray(given.detach().cpu().double() if tensor else given, dtype=float)
    if x.ndim != 2 or len(x) < least or not x.shape[1]:
        raise ValueError(
            f"expected {name} [models, points] with {least} models or more, got {x.shape}; "
            "train more models, or pass one row per model"
        )
    finite = np.isfinite(x)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(
            f"expected finite outputs, got {x[row, column]} of {name} model {row} (row) at point "
            f"{column} (column); look at that model"
        )
    return x
