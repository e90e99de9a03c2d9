"""EK-FAC: the Gauss–Newton curvature, diagonal in a Kronecker-factored eigenbasis of each layer.

For a weight matrix W [r, c] whose example gradients are ∇W_i = Σ_t l_it r_itᵀ (see `layers`):

    L = Σ_i w_i Σ_t l lᵀ = Q_L · Q_Lᵀ,   R = Σ_i w_i Σ_t r rᵀ = Q_R · Q_Rᵀ     (eigenvectors, one a column)
    Λ = (1/n) Σ_i w_i (Q_Lᵀ ∇W_i Q_R)²                                          [r, c]
    φ(H) V = Q_L (φ(Λ) ⊙ (Q_Lᵀ V Q_R)) Q_Rᵀ

(George et al. 2018, eq. 9 and alg. 1.) A bias is a further column (the input is lengthened by a one).
∇W_i is summed over tokens before it is squared. Gradients are those of labels drawn from the model
(see `draws`), or the data's own. Sides that are one-hot (tokens) or wider than 4,096 keep their own
coordinates. Norms and whatever else holds parameters are diagonal, so that every parameter is covered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from attribution_core.calling import Params, PerExample, per_example
from attribution_core.data import Progress, Rows, batches, rows_in, take
from attribution_core.gradients import row_gradients
from attribution_core.layerwise.coverage import coverage_of, skipped
from attribution_core.layerwise.layers import (
    Arrive,
    Coverage,
    factors,
    matrix_shape,
    owners,
    plain_gradients,
    watched,
)
from attribution_core.layerwise.opened import is_real, open_output, outputs_in
from attribution_core.problem import Problem
from attribution_core.processes import from_first, my_rows, sum_all, union, world
from attribution_core.safeguards.refusals import refuse_random_layers
from attribution_core.second_order.draws import default_draws, draw
from attribution_core.second_order.kronecker import EKFAC, Block, Place, weighted_gram

Labels = Literal["model", "data"]


def fit_ekfac(
    problems: Sequence[Problem],
    *,
    weights: NDArray[np.float64] | None = None,
    labels: Labels = "model",
    draws: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress = iter,
) -> EKFAC:
    """Fit EK-FAC to a problem, or to the mean over several models of one training set (checkpoints).

    Two passes over the data: covariances pooled over models give one basis, in which the eigenvalues
    are then pooled (Bae et al. 2024, app. D.2). Sums over rows and processes come before anything else.

    Args:
        labels: "model" draws them from the model, so that H is the Gauss–Newton curvature (the true
            Fisher); "data" takes the training labels (the empirical Fisher).
        draws: how many an example; as many as a row has outputs give the expectation itself. By default
            that up to 16 outputs, else about 4,096 over all rows and tokens, at least one. The two
            passes draw independently, so that no basis is fitted to the noise in its eigenvalues.
        progress: wraps the loop over batches, once for each pass and model (tqdm).

    Raises:
        ValueError: labels of another name; random layers; losses or gradients that are not finite (names
            the rows); see `draw` for losses that cannot be drawn from.
    """
    if labels not in ("model", "data"):
        raise ValueError(f"unknown labels {labels!r}; 'model' draws them, 'data' takes the data's")
    first = problems[0]
    w = np.ones(first.n) if weights is None else weights
    if draws is not None and draws < 1:
        raise ValueError(f"expected at least 1 draw, got {draws}; labels='data' draws none")
    for problem in problems:
        refuse_random_layers(problem.model)
    rows = np.arange(first.n)
    coverage = coverage_of(first, rows)
    strays = skipped(first, rows)
    while True:  # until layers see whole batches, but for those that are left out
        coverage = replace(coverage, wrong=coverage.wrong | strays)
        found = _fitted(problems, w, coverage, labels, draws, seed, batch_size, progress)
        if isinstance(found, EKFAC):
            return found
        strays = found


def _fitted(
    problems: Sequence[Problem], w: NDArray[np.float64], coverage: Coverage, labels: Labels,
    draws: int | None, seed: int, batch_size: int, progress: Progress,
) -> EKFAC | set[str]:  # fmt: skip
    """Both passes, where parameters outside layers are diagonal; or the parameters whose layers turned out not to
    see whole batches.
    """
    first = problems[0]
    places = plan(first, coverage.wrong)
    strays: set[str] = set()

    def views(seed: int) -> Iterator[_View]:
        for problem in problems:
            rows_of = list(batches(my_rows(np.arange(problem.n)), batch_size))
            for rows in progress(rows_of):
                if w[rows].any():
                    yield _View(problem, places, coverage, strays, rows, w, labels, draws, seed)

    sums = {place: [_zeros(first, *shape) for shape in place.covariances()] for place in places}
    totals = [total for pair in sums.values() for total in pair]
    for view in views(2 * seed):
        view.add_covariances(sums)
        view.refuse_nan(totals)
    strays = union(strays)
    if strays:
        return strays
    blocks = _in_bases(first, sum_all(sums))
    inside = {name for place in places for name in (place.weight, place.bias)}
    diagonal = {k: _zeros(first, *v.shape) for k, v in first.params.items() if k not in inside}
    values = [block.values for block in blocks.values()] + list(diagonal.values())
    for view in views(2 * seed + 1):
        view.add_squares(blocks, diagonal)
        view.refuse_nan(values)
    for value, total in zip(values, sum_all(values), strict=True):
        value.copy_(total / (first.n * len(problems)))
    return EKFAC(first.params, tuple(blocks.values()), diagonal)


def _zeros(problem: Problem, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=problem.device)


def _in_bases(problem: Problem, sums: dict[Place, list[Tensor]]) -> dict[str, Block]:
    """Blocks in the eigenvectors of their covariances, with eigenvalues still to be found."""

    def vectors(place: Place, x: Tensor) -> Tensor | None:
        own = problem.params[place.weight].dtype  # layers may differ
        dtype = torch.promote_types(own, torch.float32)
        return torch.linalg.eigh(x).eigenvectors.to(dtype) if x.numel() else None

    bases = [[vectors(place, x) for x in pair] for place, pair in sums.items()]
    if world()[1] > 1:  # machines may differ in signs and within equal eigenvalues
        held = from_first([[None if q is None else q.cpu() for q in pair] for pair in bases])
        bases = [[None if q is None else q.to(problem.device) for q in pair] for pair in held]
    return {
        place.weight: Block(place, left, right, _zeros(problem, *place.shape))
        for place, (left, right) in zip(sums, bases, strict=True)
    }


def plan(problem: Problem, outside: Collection[str] | None = None) -> list[Place]:
    """The weight matrices of a model; left out are parameters that do not act in their own layer."""
    if outside is None:
        outside = coverage_of(problem, np.arange(problem.n)).wrong
    biases: Counter[str] = Counter()
    held: dict[str, list[tuple[nn.Module, dict[str, str]]]] = {}
    for module, names in owners(problem.model, set(problem.params)).items():
        biases.update([names["bias"]] if "bias" in names else [])
        if "weight" in names:
            held.setdefault(names["weight"], []).append((module, names))
    places = []
    for weight, holders in held.items():
        shapes = [matrix_shape(module) for module, _ in holders]
        kinds = [type(module).__name__ for module, _ in holders]
        if weight in outside or None in shapes or len(set(shapes)) > 1:
            continue
        if "Conv1D" in kinds and len(kinds) > 1:
            continue
        g, r, c = shapes[0]  # type: ignore[misc]
        bias = holders[0][1].get("bias") if len(holders) == 1 else None
        bias = None if bias in outside or (bias and biases[bias] > 1) else bias
        tall = bias is not None and kinds[0] == "Conv1D"
        shape = (g, r + tall, c + (bias is not None and not tall))
        places.append(Place(weight, bias, shape, tall, "Embedding" in kinds, len(holders)))
    return places


class _View:
    """Some rows at one model: what every layer sees, and the gradients that come back for drawn labels."""

    def __init__(
        self, problem: Problem, places: list[Place], coverage: Coverage, strays: set[str],
        rows: NDArray[np.intp], weights: NDArray[np.float64], labels: Labels, draws: int | None,
        seed: int,
    ):  # fmt: skip
        self.coverage = coverage
        self.watch = set(problem.params) - coverage.wrong  # parameters whose layers' rules hold
        self.strays = strays  # those whose layers did not see whole batches, found on the way
        self.problem, self.labels, self.draws, self.seed = problem, labels, draws, seed
        self.places = {place.weight: place for place in places}
        self.names = problem.train.rows[rows] if isinstance(problem.train, Rows) else rows
        self.batch = take(problem.train, rows, problem.device)
        self.weights = torch.from_numpy(weights[rows]).to(problem.device)
        self.uses: Counter[str] = Counter()

    def backward(self, arrive: Arrive) -> Iterator[list[Tensor] | None]:
        """Yields after each draw's arrivals: the gradients drawn for the output (None: the data's own)."""
        model, loss, params = self.problem.model, self.problem.loss, self.problem.params

        def called(module: nn.Module, names: dict[str, str], *_: Tensor) -> None:
            self.uses.update(names.values())

        self.uses.clear()
        b, shared = rows_in(self.batch), self.coverage.is_shared
        with watched(model, self.watch, b, arrive, called, shared=shared) as leaves:
            if self.labels == "data":
                value = per_example(model, loss, self.batch, params, self.names)
            else:
                output, losses = open_output(model, loss, params, self.batch)
        # layers that the trial's rows reached and these do not
        self.strays |= self.watch - self.coverage.unseen - self.uses.keys()
        if self.labels == "data":
            _pull([value], leaves, [torch.ones_like(value)])
            yield None
            return
        with torch.no_grad():  # one finite number per row?
            per_example(model, lambda *_: losses(output), self.batch, params, self.names)
        count = self.draws or default_draws(self.problem.n, output)
        drawn = draw(losses, output, self.names, count, self.seed)
        self.weights = self.weights / len(drawn)
        for d in drawn:
            _pull(output, leaves, d)
            yield d

    def sides(
        self, module: nn.Module, names: dict[str, str], source: Tensor, gradient: Tensor
    ) -> tuple[Place | None, tuple[Tensor, Tensor]]:
        """The matrix that a layer's weight belongs to, if any, and its left and right vectors."""
        if not self.coverage.holds(len(self.names), names, source, gradient):
            self.strays.update(names.values())
            return None, (source, gradient)
        place = self.places.get(names.get("weight", ""))
        if place is None:
            return None, (source, gradient)
        return place, factors(module, source, gradient, place.bias is not None)

    def refuse_nan(self, totals: list[Tensor]) -> None:
        """Raise where these rows have made a sum NaN or infinite."""
        if totals and not torch.isfinite(torch.stack([total.sum() for total in totals])).all():
            raise ValueError(
                f"expected finite gradients, got NaN or infinity from rows {self.names[:10].tolist()}, "
                "whose losses are finite; look at functions without a slope there, such as a root of 0"
            )

    def counts(self, module: nn.Module, source: Tensor, back: Tensor) -> Tensor | None:
        """[b, T], which places are no padding; None where nothing says so."""
        mask = self.batch.get("attention_mask") if isinstance(self.batch, dict) else None
        if mask is None or source.ndim != 3 or isinstance(module, _ConvNd):
            return None
        config = getattr(self.problem.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):  # the mask is the encoder's alone
            return back.ne(0).any(-1)
        return mask if source.shape[:2] == mask.shape else None

    def add_covariances(self, sums: dict[Place, list[Tensor]]) -> None:
        """Σ_i w_i Σ_t l lᵀ and Σ_i w_i Σ_t r rᵀ of every matrix, averaged over draws."""

        def arrive(module: nn.Module, names: dict[str, str], source: Tensor, back: Tensor) -> None:
            place, pair = self.sides(module, names, source, back)
            if place is None:
                return
            mask = self.counts(module, source, back)
            if mask is not None:
                # padding counts in no covariance (∇W_i is what it is: there it has no gradient)
                pair = tuple(side * mask[None, :, :, None].to(side) for side in pair)  # type: ignore[assignment]
            for total, side in zip(sums[place], pair, strict=True):
                if total.numel():
                    total += weighted_gram(side, self.weights)

        for _ in self.backward(arrive):
            pass

    def add_squares(self, blocks: dict[str, Block], diagonal: Params) -> None:
        """Σ_i w_i (Q_Lᵀ ∇W_i Q_R)² of every matrix and Σ_i w_i ∇θ_i² of the rest, averaged over draws."""
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        rows: Params = {}

        def arrive(module: nn.Module, names: dict[str, str], source: Tensor, back: Tensor) -> None:
            place, pair = self.sides(module, names, source, back)
            if place is not None:
                held = pairs.setdefault(place.weight, [])
                held.append(blocks[place.weight].sides(*pair))
                if len(held) == self.uses[place.weight]:  # ∇W_i is whole: all its uses have arrived
                    blocks[place.weight].add(pairs.pop(place.weight), self.weights)
            wanted = {local: name for local, name in names.items() if name in diagonal}
            for local, gradient in plain_gradients(module, source, back, wanted).items():
                rows[wanted[local]] = rows.get(wanted[local], 0) + gradient

        for drawn in self.backward(arrive):
            for name in list(pairs):  # a use whose output led nowhere
                blocks[name].add(pairs.pop(name), self.weights)
            rest = [name for name in diagonal if name not in rows]
            for name, gradient in {**rows, **self.row_by_row(rest, drawn)}.items():
                squares = gradient.double().square()
                diagonal[name] += torch.einsum("b,b...->...", self.weights, squares)
            rows.clear()

    def row_by_row(self, names: list[str], drawn: list[Tensor] | None) -> Params:
        """Per-example gradients [b, *shape] of parameters that no layer's rule covers."""
        if not names:
            return {}
        model, loss, params = self.problem.model, self.problem.loss, self.problem.params
        some = {name: params[name] for name in names}
        if drawn is None:
            return row_gradients(model, loss, some, self.batch)
        at = [k for k, d in enumerate(drawn) if d.any()]  # the output that the loss looks at
        if not at:
            return {k: v.new_zeros(len(self.names), *v.shape) for k, v in some.items()}
        if isinstance(self.batch, dict):
            pulls = {f"drawn {k}": drawn[k] for k in at}
            return row_gradients(model, _pulled(loss, at), some, {**self.batch, **pulls})
        pulled = (*self.batch, *(drawn[k] for k in at))
        return row_gradients(model, _pulled(loss, at), some, pulled)


def _pull(output: list[Tensor], leaves: list[Tensor], pulls: list[Tensor]) -> None:
    """A backward pass from the outputs to the leaves, where there are any."""
    some = [k for k, z in enumerate(output) if z.requires_grad]
    if leaves and some:
        heads, back = ([x[k] for k in some] for x in (output, pulls))
        torch.autograd.grad(heads, leaves, back, retain_graph=True, allow_unused=True)


def _pulled(loss: PerExample, at: list[int]) -> PerExample:
    """⟨output, d⟩ of each row, for batches with gradients d of some of the outputs as further columns."""

    def value(model: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            pulls = [batch[f"drawn {k}"] for k in at]
            batch = {k: v for k, v in batch.items() if not k.startswith("drawn ")}
        else:
            batch, pulls = batch[: -len(at)], batch[-len(at) :]
        seen = outputs_in(model, lambda: loss(model, batch))
        output = [z for z in tree_leaves(seen[0]) if is_real(z)]
        products = [
            (output[k] * d).reshape(len(d), -1).sum(1) for k, d in zip(at, pulls, strict=True)
        ]
        return torch.stack(products).sum(0)

    return value
