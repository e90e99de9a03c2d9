"""Gradients of the output drawn at random, so that their covariance is the loss's curvature there.

For a loss ℓ(z) with Hessian D in the model's output z, vectors d with E[d dᵀ] = D make
E[(Jᵀd)(Jᵀd)ᵀ] = Jᵀ D J, the Gauss–Newton curvature of the example. Where ℓ is a negative
log-likelihood they are the gradients for labels sampled from the model (Martens 2020, sec. 9). Drawing
d directly asks nothing of the user and keeps the units of any loss: a mean over tokens, class weights.

    softmax   D = c (diag p − p pᵀ) at every place, found by trial: d = √c (p − e_y), y drawn from p
    small     up to 64 outputs a row: d = D^½ ξ, D formed
    diagonal  D is diagonal (regression): d = D^½ ξ

Each example has a random stream of its own, so no draw depends on batches or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution_core.layerwise.opened import Losses
from attribution_core.precision import widened

SMALL = 64  # outputs a row up to which D is formed
EXACT = 16  # outputs a row up to which all of them are taken instead of draws, by default
GRADIENTS = 4096  # drawn over all places of all rows where the number of draws is left open


def default_draws(n: int, output: list[Tensor]) -> int:
    """As many as a row has outputs, up to 16: the expectation. Else about 4,096 over all places of all rows."""
    z = max(output, key=Tensor.numel)
    q = z[0].numel()
    return q if q <= EXACT else max(1, round(GRADIENTS * z.shape[-1] / (n * q)))


def draw(
    losses: Losses, output: list[Tensor], rows: NDArray[np.intp], draws: int, seed: int = 0
) -> list[list[Tensor]]:
    """Lists d of tensors like the output's whose mean of d dᵀ is, in expectation, D for every row.

    There are `draws` of them; or as many as the output has numbers, if that is no more: then their mean
    is D exactly.

    Args:
        losses: the losses [b] as a function of the output (see `open_output`).
        rows: [b] names of the examples; with the seed they fix the random stream of each.

    Raises:
        ValueError: D is neither small nor diagonal nor that of a softmax.
    """
    at = [widened(z).detach().contiguous() for z in output]
    streams = [np.random.Generator(np.random.Philox(key=[seed, int(row)])) for row in rows]
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randn(z.shape[1:], generator=generator).to(z).expand_as(z) for z in at]
    curved = _product(losses, at, probes)
    active = [k for k, c in enumerate(curved) if c.abs().max() > 0]
    if not active:
        return [[torch.zeros_like(z) for z in output]]
    if len(active) > 1:
        raise ValueError(
            f"expected a loss of one output tensor, got one of {len(active)}; "
            "use labels='data' or curvature='hessian'"
        )
    k = active[0]

    def product(z: Tensor, v: Tensor) -> Tensor:
        still = [torch.zeros_like(x) for x in at]
        return _product(losses, [*at[:k], z, *at[k + 1 :]], [*still[:k], v, *still[k + 1 :]])[k]

    drawn = _draw_one(product, at[k], probes[k], curved[k], streams, draws)
    rest = [torch.zeros_like(z) for z in output]
    return [[*rest[:k], d.to(output[k]), *rest[k + 1 :]] for d in drawn]


def _draw_one(
    product: Callable[..., Tensor], z: Tensor, probe: Tensor, curved: Tensor,
    streams: list[np.random.Generator], draws: int,
) -> list[Tensor]:  # fmt: skip
    along = partial(product, z)
    if z[0].numel() <= draws:
        return _small(along, z, streams, z[0].numel())
    close = (
        1e-8 if z.dtype == torch.float64 else 1e-3
    )  # rounding of the products, far below a misfit
    for dim in dict.fromkeys((-1, 1)):
        if z.ndim < 2 or z.shape[dim] < 2:
            continue
        p, v, hv = (x.movedim(dim, -1) for x in (z.softmax(dim), probe, curved))
        base = _softmax(p, v)
        for scale in _scales(partial(product, v=probe), z, dim, v, hv, base):
            misfit = (hv - scale[..., None] * base).norm()
            rounding = 8 * torch.finfo(z.dtype).eps * (scale[..., None] * p * v).norm()
            if misfit <= close * hv.norm() + rounding:
                return [_labels(p, scale, streams).movedim(-1, dim) for _ in range(draws)]
    if z[0].numel() <= SMALL:
        return _small(along, z, streams, draws)
    diagonal = along(torch.ones_like(z))
    if (curved - diagonal * probe).norm() <= close * curved.norm():
        root = diagonal.clamp(min=0).sqrt()
        return [root * torch.from_numpy(_stacked(streams, "normal", z)).to(z) for _ in range(draws)]
    raise ValueError(
        f"expected a loss whose Hessian in the output {tuple(z.shape[1:])} is that of a softmax or "
        f"diagonal, or an output of at most {SMALL} numbers, got another; use labels='data'"
    )


def _softmax(p: Tensor, v: Tensor) -> Tensor:
    """(diag p − p pᵀ) v at every place."""
    return p * (v - (p * v).sum(-1, keepdim=True))


def _scales(
    product: Callable[[Tensor], Tensor], z: Tensor, dim: int, v: Tensor, hv: Tensor, base: Tensor
) -> Iterator[Tensor]:
    """Candidates for c: measured at z = 0, for where the model is sure of itself D is all rounding; then at z."""
    flat = product(torch.zeros_like(z)).movedim(dim, -1)
    yield _scale(_softmax(v.new_full((), 1 / v.shape[-1]), v), flat)
    yield _scale(base, hv)


def _scale(base: Tensor, hv: Tensor) -> Tensor:
    """c at every place, should hv be c base, base = (diag p − p pᵀ) v."""
    size = base.square().sum(-1).clamp(min=torch.finfo(base.dtype).tiny)
    return ((hv * base).sum(-1) / size).clamp(min=0)


def _labels(p: Tensor, scale: Tensor, streams: list[np.random.Generator]) -> Tensor:
    """√scale (p − e_y), y drawn from p [b, ..., classes] by each row's own uniform numbers."""
    uniform = torch.from_numpy(_stacked(streams, "random", p[..., 0])).to(p)
    cumulative = p.cumsum(-1)
    y = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:])
    d = p.scatter_add(-1, y.clamp(max=p.shape[-1] - 1), torch.full_like(p[..., :1], -1.0))
    return scale.sqrt()[..., None] * d


def _small(
    along: Callable[[Tensor], Tensor], z: Tensor, streams: list[np.random.Generator], draws: int
) -> list[Tensor]:
    """D^½ ξ with D formed; as many draws as outputs are the columns of √q D^½ themselves."""
    b, q = len(z), z[0].numel()  # outputs may be [b], without a dimension to flatten
    eye = torch.eye(q, dtype=z.dtype, device=z.device)
    columns = [along(e.expand(b, q).reshape(z.shape)).reshape(b, q) for e in eye]
    hessian = torch.stack(columns, dim=2)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT
    if draws == q:
        return [(root[:, :, s] * q**0.5).reshape(z.shape) for s in range(q)]
    noise = (torch.from_numpy(_stacked(streams, "normal", z)).to(z) for _ in range(draws))
    return [(root @ xi.reshape(b, q, 1)).reshape(z.shape) for xi in noise]


def _stacked(streams: list[np.random.Generator], kind: str, like: Tensor) -> NDArray[np.float64]:
    return np.stack([getattr(stream, kind)(size=tuple(like.shape[1:])) for stream in streams])


def _product(losses: Losses, at: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """D v for every row, by differentiating twice in reverse: torch's forward mode loads for a second."""
    with torch.enable_grad():
        leaves = [z.detach().requires_grad_() for z in at]
        first = torch.autograd.grad(
            losses(leaves).sum(), leaves, create_graph=True, materialize_grads=True
        )
        curved = [(g, x) for g, x in zip(first, v, strict=True) if g.requires_grad]
        if not curved:  # a loss that is linear in the output
            return [torch.zeros_like(z) for z in at]
        heads, pulls = ([pair[i] for pair in curved] for i in (0, 1))
        second = torch.autograd.grad(heads, leaves, pulls, materialize_grads=True)
    return [x.detach() for x in second]
