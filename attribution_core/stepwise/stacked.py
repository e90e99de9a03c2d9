"""Small models trained side by side as one: every tensor gets a first dimension, one slice a training.

A training of a small model spends its time in calls, not in arithmetic. Here the k trainings of a stack
take each step together, under torch's vmap: k matrix products become one batched product. Batches, seeds,
initial models, numbers of steps and schedules may differ between them; what a slice computes is what
`train` computes, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from attribution_core.calling import Params, call, trainable
from attribution_core.data import Batch, Rows, batches, checked_weights, rows_in, take, tensors_in
from attribution_core.disk.behaviour import settings
from attribution_core.disk.fingerprint import fingerprint
from attribution_core.problem import Outputs, Problem
from attribution_core.safeguards.purity import first_gradient
from attribution_core.safeguards.refusals import batch_norms
from attribution_core.stepwise.batches import Drop, drawn_order
from attribution_core.stepwise.optimizers import clipped
from attribution_core.training import Recipe, steps_of

Cell = tuple[NDArray[np.float64], int]  # (weights [n], seed)

LARGEST = 2**15  # parameters of a model on the CPU; beyond, arithmetic outweighs the calls
MOST = 128  # trainings of a stack; a model may be so many times larger on a GPU
DATA = 2**30  # bytes of training data that are held as one batch
MEMORY = 2**30  # bytes that a stack's step may keep for its backward pass; 8 times on a GPU
FIRST = np.zeros(1, dtype=int)  # the row on which an output is tried before the training
ROUNDING = 1e-4  # of a loss, by which a row's may differ in a batch and alone
FEW = 4  # trainings from which stacking is worth a trial step


def stack_size(problem: Problem, recipe: Recipe, trainings: int) -> tuple[int, str]:
    """How many trainings to stack, and why no more: by the problem alone, so that a resumed table is cut
    as the killed one was."""
    cuda = problem.device.type == "cuda"
    p = sum(value.numel() for value in problem.model.parameters())  # frozen ones are work as well
    room = LARGEST * (MOST if cuda else 1)
    row = sum(value.nbytes for value in tensors_in(take(problem.train, [0])))
    reasons = {
        f"fewer than {FEW} trainings": trainings < FEW,
        f"a model of {p:,} parameters, more than {room:,}": p > room,
        f"training data of more than {DATA / 2**30:g} GiB": row * problem.n > DATA,
        "batch norm in training mode": any(True for _ in batch_norms(problem.model)),
        "dropout masks": recipe.masks is not None,
        "augmentation": recipe.augment is not None,
        "batches in parts": recipe.accumulate > 1,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        return 1, found[0]
    held = saved_bytes(problem, min(recipe.batch_size, problem.n))
    size = int(min(MOST, MEMORY * (8 if cuda else 1) // max(held, 1)))
    return max(1, size), f"{held / 2**20:.1f} MiB a step"


def saved_bytes(problem: Problem, batch_size: int) -> int:
    """Bytes that one training's step keeps for its backward pass, counted on the first rows."""
    total = 0

    def count(value: Tensor) -> Tensor:
        nonlocal total
        total += value.nbytes
        return value

    leaf = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    batch = take(problem.train, np.arange(batch_size), problem.device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        call(problem.model, problem.loss, leaf, batch)
    return total


@dataclass(frozen=True, eq=False)
class Stack:
    """k trainings, longest first; slices that are through drop out at the end.

    Args:
        problem, recipe: what all of them share.
        cells: (weights [n], seed) of each.
        drop: see `train`.
    """

    problem: Problem
    recipe: Recipe
    cells: Sequence[Cell]
    drop: Drop

    @cached_property
    def orders(self) -> list[list[NDArray[np.intp]]]:
        """The batches of each training; none where every row is gone."""
        found = []
        for w, seed in self.cells:
            checked_weights(w, self.problem.n)
            gone = self.drop == "row" and not w.any()
            found.append([] if gone else drawn_order(replace(self.recipe, seed=seed), w, self.drop))
        return found

    @cached_property
    def initial(self) -> list[nn.Module]:
        """The initial model of each."""
        init = self.recipe.init
        if init is None:
            return [self.problem.model] * len(self.cells)
        made: dict[int, nn.Module] = {}
        for _, seed in self.cells:
            if seed not in made:
                made[seed] = init(seed).to(self.problem.device)
        return [made[seed] for _, seed in self.cells]

    def outputs(self, outputs: Outputs) -> NDArray[np.float64]:
        """Outputs [k, t] of the trained models.

        Raises:
            ValueError: weights that `train` refuses; augmentation; initial models that differ in more than their trainable
                parameters; a loss or an output that vmap cannot stack, or computes differently from a training by
                itself; losses that are not finite (names the training and the step).
        """
        length = np.array([len(order) for order in self.orders])
        if (np.diff(length) > 0).any():
            raise ValueError("expected the longest trainings first; sort the cells by kept rows")
        if self.recipe.augment is not None:
            raise ValueError("augmentation, which a stack takes no batches for")
        self._check_initial()
        data = take(self.problem.train, np.arange(self.problem.n), self.problem.device)
        with (
            one_thread(self.problem.device),
            _no_fallback(),
            sdpa_kernel(SDPBackend.MATH),  # fused attention cannot be stacked
        ):
            start = {
                name: torch.stack([trainable(m)[name] for m in self.initial])
                for name in trainable(self.initial[0])
            }
            self._row_by_row()
            self._evaluated(start, replace(outputs, data=Rows(outputs.data, FIRST), matrix=None))
            return self._evaluated(self._trained(start, data, length), outputs)

    def _check_initial(self) -> None:
        """Raise where a slice's model is more than its trainable parameters in the first one's place."""
        first = self.initial[0]
        free, fixed = trainable(first).keys(), _fixed(first)
        for model in {id(m): m for m in self.initial[1:]}.values():
            other = _fixed(model)
            same = other.keys() == fixed.keys() and trainable(model).keys() == free
            if not same or not all(torch.equal(other[k], v) for k, v in fixed.items()):
                raise ValueError("initial models whose frozen parameters or buffers differ")
            if _made_of(model) != _made_of(first):
                raise ValueError("initial models whose layers or settings differ")

    def _row_by_row(self) -> None:
        """Raise where short batches are filled up with other rows, and a row's loss depends on its batch."""
        model, loss = self.initial[0], self.problem.loss
        beside = zip_longest(*([len(rows) for rows in order] for order in self.orders))
        even = all(len({*sizes} - {None}) == 1 for sizes in beside)
        if even or any(True for _ in batch_norms(model)):
            return
        batch = take(self.problem.train, self.orders[0][0], self.problem.device)
        try:
            with torch.no_grad():
                whole = call(model, loss, trainable(model), batch)
                alone = call(model, loss, trainable(model), tree_map(lambda x: x[:1], batch))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"losses that cannot be had of one row: {error}") from error
        if whole.shape[:1] != (rows_in(batch),) or alone.shape != (1,):
            return  # an error further on says so
        if not (whole[0] - alone[0]).abs() <= ROUNDING * (1 + whole.abs().max()):
            raise ValueError("losses that depend on the other rows of a batch")

    def _trained(self, params: Params, data: Batch, length: NDArray[np.intp]) -> Params:
        """The trained parameters, name -> [k, *shape]."""
        device = self.problem.device
        model = self.initial[0]
        finished = {name: value.clone() for name, value in params.items()}
        factors = [self.recipe.factors(n) for n in length]
        weights = torch.from_numpy(np.stack([w for w, _ in self.cells])).to(device)
        steps = steps_of(replace(self.problem, model=model), self.recipe, [], self.cells[0][0])
        state = {
            name: {key: value.expand(len(length), *value.shape) for key, value in held.items()}
            for name, held in steps.optimizer.init(trainable(model)).items()
        }

        def one(slice_: Params, batch: Batch) -> Tensor:
            return call(model, self.problem.loss, slice_, batch)

        losses_of = vmap(one, randomness="error")
        for step in range(max(length, default=0)):
            alive = int((length > step).sum())
            params = {name: value[:alive] for name, value in params.items()}
            state = {key: {n: v[:alive] for n, v in held.items()} for key, held in state.items()}
            rows, w = self._batch(step, alive, weights)
            batch = tree_map(lambda column, rows=rows: column[rows], data)
            leaf = {name: value.detach().requires_grad_() for name, value in params.items()}
            losses = losses_of(leaf, batch)
            self._check(losses.detach(), w, step)
            # slices do not touch each other: the gradient of their sum is that of each
            total = (losses * w.to(losses)).sum()
            found = torch.autograd.grad(total, list(leaf.values()), materialize_grads=True)
            grads = dict(zip(leaf, found, strict=True))
            if step == 0:
                self._agrees({name: g[0] for name, g in grads.items()})
            params, state = self._updated(
                steps.optimizer, params, state, grads, step, [f[step] for f in factors[:alive]]
            )
            through = int((length > step + 1).sum())  # slices before it go on
            for name, value in params.items():
                finished[name][through:alive] = value[through:]
        return finished

    def _batch(self, step: int, alive: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [a, B] of a step and their weights over the batch size; shorter batches end in weight 0."""
        lists = [order[step] for order in self.orders[:alive]]
        width = max(len(rows) for rows in lists)
        padded = np.stack([np.resize(rows, width) for rows in lists])
        sizes = np.array([len(rows) for rows in lists])[:, None]
        share = torch.from_numpy((np.arange(width) < sizes) / sizes).to(weights)
        rows = torch.from_numpy(padded).to(weights.device)
        return rows, weights[:alive].gather(1, rows) * share

    def _updated(
        self, optimizer: Any, params: Params, state: Any, grads: Params, step: int, lr: list[float]
    ) -> tuple[Params, Any]:
        """One update of all slices, clipped each by itself."""
        clip = self.recipe.clip

        def one(params: Params, state: Any, grads: Params, factor: Any) -> Any:
            grads = grads if clip is None else clipped(grads, clip)
            return optimizer.update(params, state, grads, step, factor)

        with torch.no_grad():
            if len(set(lr)) == 1 and clip is None and getattr(optimizer, "elementwise", False):
                return optimizer.update(params, state, grads, step, lr[0])
            if len(set(lr)) == 1:  # a number, as optimizers expect
                return vmap(one, in_dims=(0, 0, 0, None))(params, state, grads, lr[0])
            some = next(iter(params.values()))
            return vmap(one)(params, state, grads, torch.tensor(lr, dtype=torch.float64).to(some))

    def _check(self, losses: Tensor, w: Tensor, step: int) -> None:
        if losses.shape != w.shape:
            raise ValueError(
                f"expected one loss per row, shape ({w.shape[1]},), got {tuple(losses.shape[1:])}"
            )
        bad = ~torch.isfinite(losses).all(1)
        if bad.any():
            k = int(bad.nonzero()[0, 0])
            rows = np.asarray(self.orders[k][step])
            places = torch.isfinite(losses[k])[: len(rows)].cpu().numpy()
            raise Diverged(
                f"training stopped at step {step} of {len(self.orders[k])} (seed {self.cells[k][1]}): "
                f"expected finite loss values, got NaN or infinity in rows {rows[~places][:10].tolist()}; "
                "look at these examples, or at the learning rate that led here",
                k,
            )

    def _agrees(self, stacked: Params) -> None:
        """Raise unless the first training's first gradient, taken by itself, is the stacked one."""
        w, seed = self.cells[0]
        problem = replace(self.problem, model=self.initial[0])
        recipe = replace(self.recipe, seed=seed)
        alone = first_gradient(steps_of(problem, recipe, self.orders[0], w))
        for name, g in alone.items():
            # rounding stays far below 1e-3 of the norm, a missing term far above
            close = max(1e-3, 8 * torch.finfo(g.dtype).eps) * g.norm()
            if not (stacked[name] - g).norm() <= close.clamp(min=1e-12):
                raise ValueError(f"a gradient of {name!r} that differs when stacked")

    def _evaluated(self, params: Params, outputs: Outputs) -> NDArray[np.float64]:
        """Outputs [k, t] in eval mode, float64."""
        import copy

        model = copy.deepcopy(self.initial[0]).eval()

        def one(slice_: Params, batch: Batch) -> Tensor:
            return call(model, outputs.function, slice_, batch)

        found = []
        with torch.no_grad():
            for rows in batches(len(outputs.data), 256):
                batch = take(outputs.data, rows, self.problem.device)
                values = vmap(one, in_dims=(0, None))(params, batch)
                if values.shape[1:] != (rows_in(batch),):
                    raise ValueError(
                        f"expected one output per row, shape ({rows_in(batch)},), got "
                        f"{tuple(values.shape[1:])}; return per-example values"
                    )
                bad = ~torch.isfinite(values).all(1)
                if bad.any():
                    k = int(bad.nonzero()[0, 0])
                    raise Diverged(
                        f"expected finite output values, got NaN or infinity (seed {self.cells[k][1]}); "
                        "look at the learning rate",
                        k,
                    )
                found.append(values)
        whole = torch.cat(found, dim=1).double().cpu()
        return (whole if outputs.matrix is None else whole @ outputs.matrix).numpy()


class Diverged(ValueError):
    """A training of a stack that left the finite numbers; `.slice` says which."""

    def __init__(self, message: str, slice_: int):
        super().__init__(message)
        self.slice = slice_


def _fixed(model: nn.Module) -> Params:
    """Frozen parameters and buffers by name; tied ones once."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def _made_of(model: nn.Module) -> str:
    """A print of a model's layers and of what they hold beside parameters, buffers and one another."""
    own = {id(x) for x in (*model.parameters(), *model.buffers())}
    parts = []
    for module in model.modules():
        beside = settings(module).items()
        held = {k: v for k, v in beside if id(v) not in own and not isinstance(v, nn.Module)}
        parts.append([type(module), held])
    return fingerprint(parts)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One thread on the CPU: the tensors are small, and threads that wait for each other cost more than
    they bring; other cores take other stacks (`jobs`)."""
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_fallback() -> Iterator[None]:
    """vmap raises where it would loop over slices: that is no faster than one training by itself."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
