"""EK-FAC (ekfac, kronecker, spectrum) against Kronecker factors formed by hand, one row at a time."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    causal_lm_loss,
    cross_entropy,
    influence,
    margin,
    train,
    unrolling,
)
from attribution_core.curvature import DiagonalWarning, fit_curvature, spectrum
from attribution_core.data import Rows
from attribution_core.layerwise.coverage import coverage_of
from attribution_core.precision import precision_of
from attribution_core.second_order import ekfac as core
from attribution_core.second_order import kronecker
from attribution_core.second_order.ekfac import fit_ekfac
from tests import menagerie
from tests.menagerie import seeded

# float64 sums of some hundred terms of size near 1, rotated by eigenvectors of condition 1
EXACT = {"rtol": 1e-9, "atol": 1e-11}


# --- more models -----------------------------------------------------------------------------


class Convs(nn.Module):
    """Every setting of a convolution that `ConvNet` has not."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(2, 2, (3, 2), padding="same", dilation=(1, 2))
        self.dilated = nn.Conv2d(2, 2, 2, dilation=2, padding=1, padding_mode="reflect", bias=False)
        self.line = nn.Conv1d(2, 4, 3, stride=2, padding=2, padding_mode="circular", groups=2)

    def forward(self, x):
        x = self.dilated(self.same(x).tanh()).tanh()
        return self.line(x.flatten(2)).tanh().sum(2)[:, :3]


class Tied(nn.Module):
    """Two layers with one weight, biases of their own; and a bias that two other layers share."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.a.weight
        self.d.bias = self.c.bias

    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x).tanh()
        return x


class OwnBias(nn.Module):
    """A bias that also acts outside its layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * self.layer.bias.sum()


class FoldedNorm(nn.Module):
    """A norm whose batch is folded into another dimension."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.norm(x.reshape(-1, 2)).reshape(len(x), 4).tanh())


class Scaled(nn.Module):
    """A parametrised weight, and a module without inputs whose output is one number."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.out = nn.Linear(4, 3)
        self.scale = Scale()

    def forward(self, x):
        return self.out(self.first(x).tanh()) * self.scale()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1))

    def forward(self):
        return self.log.exp().sum()


@seeded
def own(model, *shape, n=6):
    x, y = torch.randn(n, *(shape or (4,))).double(), torch.randint(0, 3, (n,))
    return Problem(model().double(), cross_entropy, (x, y))


# name -> (problem, weight -> bias of every matrix that has Kronecker factors)
CASES = {
    "softmax": (menagerie.softmax, {"weight": "bias"}),
    "mlp": (menagerie.mlp, {"0.weight": "0.bias", "3.weight": None, "5.weight": "5.bias"}),
    "conv": (
        menagerie.conv,
        {
            "first.weight": "first.bias", "second.weight": None, "line.weight": "line.bias",
            "out.weight": "out.bias",
        },
    ),
    "convs": (
        lambda: own(Convs, 2, 3, 4),
        {"same.weight": "same.bias", "dilated.weight": None, "line.weight": "line.bias"},
    ),
    "gpt2": (
        lambda: menagerie.gpt2(3),
        {
            "transformer.wte.weight": None, "transformer.wpe.weight": None,
            **{
                f"transformer.h.{k}.{name}.weight": f"transformer.h.{k}.{name}.bias"
                for k in range(2)
                for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            },
        },
    ),
    "llama": (
        lambda: menagerie.llama(3),
        {
            "model.embed_tokens.weight": None, "lm_head.weight": None,
            **{
                f"model.layers.{k}.{name}_proj.weight": None
                for k in range(2)
                for name in (
                    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                    "mlp.gate", "mlp.up", "mlp.down",
                )
            },
        },
    ),
    "twice": (menagerie.ODD["twice"], {"layer.weight": "layer.bias"}),
    "padding": (menagerie.ODD["padding"], {"emb.weight": None, "out.weight": "out.bias"}),
    "frozen": (menagerie.ODD["frozen"], {"2.weight": None, "4.weight": "4.bias"}),
    "tied": (lambda: own(Tied), {"a.weight": None, "c.weight": None, "d.weight": None}),
    "outside": (menagerie.ODD["outside"], {}),
    "hand tied": (menagerie.ODD["hand tied"], {}),
    "folded": (menagerie.ODD["folded"], {}),
    "positions": (menagerie.ODD["positions"], {"out.weight": "out.bias"}),
    "attention": (menagerie.ODD["attention"], {}),
    "encoder": (
        menagerie.ODD["encoder"],
        {"layer.linear1.weight": "layer.linear1.bias", "layer.linear2.weight": "layer.linear2.bias"},
    ),
    "own norm": (menagerie.ODD["own norm"], {"1.weight": "1.bias"}),
    "own bias": (lambda: own(OwnBias), {"layer.weight": None}),
    "folded norm": (lambda: own(FoldedNorm), {"out.weight": "out.bias"}),
    "scaled": (lambda: own(Scaled), {"out.weight": "out.bias"}),
}  # fmt: skip
TRANSFORMERS = ("gpt2", "llama")


def case(name):
    """(problem, blocks, weights: one of them 0)."""
    build, blocks = CASES[name]
    problem = build()
    return problem, blocks, np.linspace(0, 2, problem.n)


def fitted(problem, w, labels, **settings):
    """With as many draws as outputs: the expectation over labels itself."""
    draws = 77 if isinstance(problem.train[[0]], dict) else None
    return fit_ekfac([problem], weights=w, labels=labels, draws=draws, **settings)


# --- by hand ---------------------------------------------------------------------------------


def pulls(problem, row, labels):
    """Functions of the model whose gradients g have Σ g gᵀ as the row's curvature.

    The row's loss for labels of the "data"; for labels of the "model" −√(p_y) log p_y for every label
    y (at every token, over the number of tokens).
    """
    batch = problem.train[[row]]
    if labels == "data":
        return [lambda model: problem.loss(model, batch)[0]]

    def log_p(model):
        if not isinstance(batch, dict):
            return model(batch[0]).log_softmax(-1)
        counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[0, 1:] == 1
        return model(**batch).logits[0, :-1][counted].log_softmax(-1)

    def pull(t, y):
        def value(model):
            found = log_p(model)
            return -found[t, y] * (found[t, y].detach().exp() / len(found)).sqrt()

        return value

    with precision_of(problem.params):
        places, classes = log_p(problem.model).shape
    return [pull(t, y) for t in range(places) for y in range(classes)]


def vectors(module, source, back, bias, seen):
    """left [g, T, r] and right [g, T, c] of one row with ∇W ∝ Σ_t left rightᵀ, place by place.

    Inputs are the same whichever label is pulled: of as many as are `seen`, they count as one.
    """
    if isinstance(module, nn.Embedding):
        source = source.expand(back.shape[:-1])
        return F.one_hot(source.flatten(), module.num_embeddings)[None].double(), back.reshape(1, -1, back.shape[-1])  # fmt: skip
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        inputs, back = patches(module, source, back)
    else:
        inputs, back = (x.reshape(1, -1, x.shape[-1]) for x in (source, back))
    if bias:
        inputs = torch.cat([inputs, torch.ones(*inputs.shape[:2], 1)], dim=2)
    inputs = inputs / seen**0.5
    return (inputs, back) if type(module).__name__ == "Conv1D" else (back, inputs)


def patches(module, source, back):
    """What every output place of a convolution saw, by numpy's padding and slices."""
    size, step, reach = module.kernel_size, module.stride, module.dilation
    if module.padding == "same":
        whole = [d * (k - 1) for d, k in zip(reach, size, strict=True)]
        pads = [(w // 2, w - w // 2) for w in whole]
    else:
        pads = [(p, p) for p in module.padding]
    modes = {"zeros": "constant", "circular": "wrap", "reflect": "reflect"}
    padded = np.pad(source[0].numpy(), [(0, 0), *pads], mode=modes[module.padding_mode])
    groups = np.split(padded, module.groups)
    seen = [
        [
            group[(slice(None), *(slice(at * s, at * s + d * (k - 1) + 1, d)
             for at, s, d, k in zip(place, step, reach, size, strict=True)))].flatten()
            for place in np.ndindex(*back.shape[2:])
        ]
        for group in groups
    ]  # fmt: skip
    back = back[0].flatten(1).reshape(module.groups, -1, back[0, 0].numel()).mT
    return torch.from_numpy(np.array(seen)), back


def index_of(problem, module, weight, bias):
    """Places of a weight's matrix (and its bias's) in the parameter vector, [g, r, c]."""
    sizes = [value.numel() for value in problem.params.values()]
    at = dict(zip(problem.params, np.cumsum([0, *sizes[:-1]]), strict=True))
    shape = problem.params[weight].shape
    g = getattr(module, "groups", 1)
    index = at[weight] + torch.arange(shape.numel()).reshape(g, shape[0] // g, -1)
    if bias is None:
        return index
    own = at[bias] + torch.arange(len(problem.params[bias])).reshape(g, -1, 1)
    return torch.cat([index, own.mT], 1) if type(module).__name__ == "Conv1D" else torch.cat([index, own], 2)  # fmt: skip


@cache
def by_hand(name, labels, widest=10**9):
    """[(index [d], basis [d, d], eigenvalues [d])] of every block, and of all other parameters."""
    problem, blocks, w = case(name)
    model = copy.deepcopy(problem.model)
    params = dict(model.named_parameters())
    trained = [params[k] for k in problem.params]
    holders = {k: [m for m in model.modules() if m._parameters.get("weight") is params[k]] for k in blocks}  # fmt: skip
    sums = dict.fromkeys(blocks, (0.0, 0.0))
    gradients, weights = [], []
    for row in np.flatnonzero(w):
        mask = problem.train[[row]]["attention_mask"][0] if name == "llama" else None
        several = pulls(problem, row, labels)
        for pull in several:
            uses, handles = [], []
            for k, modules in holders.items():

                def hook(module, args, output, k=k, uses=uses):
                    uses.append((k, module, args[0].detach(), output))
                    return output.clone()

                handles += [module.register_forward_hook(hook) for module in modules]
            with precision_of(problem.params):
                value = pull(model)
            for handle in handles:
                handle.remove()
            found = torch.autograd.grad(
                value, [*trained, *(output for *_, output in uses)], allow_unused=True
            )
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=False)]  # fmt: skip
            gradients.append(torch.cat([g.flatten() for g in flat]))
            weights.append(w[row])
            for (k, module, source, _), back in zip(uses, found[len(trained) :], strict=True):
                if getattr(module, "padding_idx", None) is not None:  # torch gives it no gradient
                    back = back * (source != module.padding_idx)[..., None]
                left, right = vectors(module, source, back, blocks[k] is not None, len(several))
                if mask is not None and not isinstance(module, nn.Embedding):
                    left, right = left[:, mask == 1], right[:, mask == 1]
                sums[k] = tuple(
                    total + w[row] * side.mT @ side
                    for total, side in zip(sums[k], (left, right), strict=True)
                )
    gradients, weights = torch.stack(gradients), torch.tensor(weights).double()
    parts, inside = [], []
    for k, bias in blocks.items():
        index = index_of(problem, holders[k][0], k, bias)
        tokens = any(isinstance(module, nn.Embedding) for module in holders[k])
        for places, *pair in zip(index, *sums[k], strict=True):
            own = (tokens or len(pair[0]) > widest, len(pair[1]) > widest)
            eye = (torch.eye(len(x)).double() for x in pair)
            basis = torch.kron(*(
                one if kept else torch.linalg.eigh(x)[1].contiguous()
                for x, kept, one in zip(pair, own, eye, strict=True)
            ))  # fmt: skip
            places = places.flatten()
            values = weights @ (gradients[:, places] @ basis).square() / problem.n
            parts.append((places, basis, values))
            inside += places.tolist()
    rest = torch.tensor(sorted(set(range(gradients.shape[1])) - set(inside)), dtype=int)
    values = weights @ gradients[:, rest].square() / problem.n
    return [*parts, (rest, torch.eye(len(rest)).double(), values)]


def matrix(parts, phi=lambda x: x):
    """φ(H) [p, p]."""
    p = sum(len(index) for index, *_ in parts)
    whole = torch.zeros(p, p, dtype=torch.float64)
    for index, basis, values in parts:
        whole[index[:, None], index] = basis * phi(values) @ basis.T
    return whole


def full(p, value):
    """A shift [p] by one number, float64."""
    return torch.full((p,), value, dtype=torch.float64)


def eye_of(problem):
    return torch.eye(len(menagerie.flat_params(problem)), dtype=torch.float64)


# --- H itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("name", CASES)
def test_the_curvature_is_the_one_made_by_hand(name, labels):
    """H, exp(−H), (H + .1)⁻¹ and the trace, as [p, p] matrices; every block that there should be."""
    problem, blocks, w = case(name)
    h = fitted(problem, w, labels)
    assert {block.place.weight: block.place.bias for block in h.blocks} == blocks
    parts, eye = by_hand(name, labels), eye_of(problem)
    for phi in (lambda x: x, lambda x: torch.exp(-x)):
        torch.testing.assert_close(h.apply(eye, phi), matrix(parts, phi), **EXACT)
    solved = h.solve(eye, full(len(eye), 0.1))
    torch.testing.assert_close(solved, matrix(parts, lambda x: 1 / (x + 0.1)), **EXACT)
    trace = sum(float(values.sum()) for *_, values in parts)
    assert h.trace == pytest.approx(trace, rel=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_the_trace_is_that_of_the_exact_curvature(name):
    """Of the empirical Fisher, mean ‖∇ℓ_i‖², by gradients alone: a rotation loses nothing."""
    problem, _, w = case(name)
    g = menagerie.row_gradients(problem)
    exact = float((torch.from_numpy(w) @ g.square()).sum()) / problem.n
    assert fitted(problem, w, "data").trace == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("name", ["mlp", "conv", "llama"])
def test_sides_too_wide_for_eigenvectors_keep_their_coordinates(name, monkeypatch):
    problem, _, w = case(name)
    monkeypatch.setattr(kronecker, "WIDEST", 5)
    h = fitted(problem, w, "data")
    assert any(block.left is None or block.right is None for block in h.blocks)
    expected = matrix(by_hand(name, "data", widest=5))
    torch.testing.assert_close(h.apply(eye_of(problem), lambda x: x), expected, **EXACT)


def test_matrices_summed_a_few_rows_at_a_time(monkeypatch):
    """Where one batch's ∇W do not fit, they are formed and squared in pieces."""
    monkeypatch.setattr(kronecker, "LAYER_ELEMENTS", 1)
    for name in ("conv", "gpt2", "twice"):
        problem, _, w = case(name)
        found = fitted(problem, w, "data").apply(eye_of(problem), lambda x: x)
        torch.testing.assert_close(found, matrix(by_hand(name, "data")), **EXACT)


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("name", ["mlp", "conv", "llama", "twice", "attention"])
def test_batch_size_changes_nothing_even_where_labels_are_drawn(name, labels):
    """Every row has its own stream, so its draws are the same in any batch."""
    problem, _, w = case(name)
    eye = eye_of(problem)
    # fewer than outputs, so that they are drawn; more than the widest side, so that no eigenvectors
    # are left to rounding (the eigenvalues' draws are others than the basis's)
    draws = 20 if name == "llama" else 2
    sizes = [
        fit_ekfac([problem], weights=w, labels=labels, draws=draws, batch_size=b)
        for b in (256, 1, 4)
    ]
    whole, *small = (h.apply(eye, lambda x: x) for h in sizes)
    for other in small:
        torch.testing.assert_close(other, whole, **EXACT)


def test_draws_by_seed():
    """Another seed draws others; their mean over seeds nears the expectation."""
    problem = menagerie.mlp()
    exact = fit_ekfac([problem]).trace
    traces = [fit_ekfac([problem], draws=1, seed=seed).trace for seed in range(50)]
    assert len(set(traces)) > 25  # six labels of three classes: some seeds draw the same
    assert fit_ekfac([problem], draws=1, seed=3).trace == traces[3]
    error = np.std(traces, ddof=1) / 50**0.5
    assert abs(np.mean(traces) - exact) < 4 * error
    assert error < 0.1 * exact


def test_basis_and_eigenvalues_are_drawn_independently():
    """One draw of one row makes a basis of one direction; another draw is seldom along it."""
    problem = menagerie.softmax(1)
    found = [fit_ekfac([problem], draws=1, seed=seed).blocks[0].values for seed in range(20)]
    used = [int((values > 1e-12 * values.max()).sum()) for values in found]
    assert max(used) > 1


def test_draws_belong_to_the_rows_of_the_whole_data():
    """A curvature on some rows draws for them what it would draw among all."""
    problem = menagerie.mlp(12)
    w = np.arange(12.0) % 2
    among = fit_ekfac([problem], weights=w, draws=2)
    part = replace(problem, train=Rows(problem.train, np.arange(1, 12, 2)))
    alone = fit_ekfac([part], draws=2)
    eye = eye_of(problem)
    torch.testing.assert_close(
        alone.apply(eye, lambda x: x), 2 * among.apply(eye, lambda x: x), **EXACT
    )


def test_several_models_share_one_basis():
    """Covariances are summed over models, and so are the squares in the basis that they give."""
    problems = [menagerie.mlp(), menagerie.mlp()]
    with torch.no_grad():
        for value in problems[1].model.parameters():
            value.mul_(1.5)
    pooled = fit_ekfac(problems, labels="data")
    block = next(b for b in pooled.blocks if b.place.weight == "5.weight")
    covariance, squares = 0.0, 0.0
    for problem in problems:
        h = fit_ekfac([problem], labels="data")
        assert pooled.trace != pytest.approx(h.trace, rel=1e-3)
        g = menagerie.row_gradients(problem)[:, -18:]
        # of the last layer: ∇W = d [a, 1]ᵀ, so d dᵀ is told by its bias's gradient
        covariance = covariance + g[:, -3:].T @ g[:, -3:]
        held = {"5.weight": g[:, :15].reshape(-1, 3, 5), "5.bias": g[:, 15:]}
        squares = squares + block.rotated(block.place.gather(held)).square().mean(0) / 2
    rotated = block.left[0].T @ covariance @ block.left[0]
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-12 * rotated.max()
    torch.testing.assert_close(block.values, squares, **EXACT)
    parts = [fit_ekfac([problem], labels="data").trace for problem in problems]
    assert pooled.trace == pytest.approx(sum(parts) / 2, rel=1e-12)


def test_one_example():
    """Its own Fisher is ∇ℓ ∇ℓᵀ; for a linear layer without tokens that is a Kronecker product."""
    problem = menagerie.softmax(1)
    g = menagerie.row_gradients(problem)[0]
    eye = eye_of(problem)
    found = fit_ekfac([problem], labels="data").apply(eye, lambda x: x)
    torch.testing.assert_close(found, torch.outer(g, g), **EXACT)
    assert influence(problem, menagerie.unseen(problem, rows=1), curvature="ekfac").scores.shape == (1, 1)  # fmt: skip


# --- solves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "positions"])
def test_a_shift_by_parameter_enters_as_its_diagonal_in_the_basis(name):
    """(Q (Λ + diag(Qᵀ S Q)) Qᵀ)⁻¹ with Q a Kronecker product of the block's own eigenvectors."""
    problem, _, w = case(name)
    h = fitted(problem, w, "data")
    eye = eye_of(problem)
    shift = torch.logspace(-2, 2, len(eye), dtype=torch.float64)
    shift = shift[torch.randperm(len(eye), generator=torch.Generator().manual_seed(0))]
    modules = dict(problem.model.named_modules())
    expected, inside = torch.zeros_like(eye), torch.zeros(len(eye), dtype=bool)
    for block in h.blocks:
        place = block.place
        module = modules[place.weight.removesuffix("weight").rstrip(".")]
        for g, places in enumerate(index_of(problem, module, place.weight, place.bias)):
            r, c = places.shape
            left = torch.eye(r).double() if block.left is None else block.left[g]
            right = torch.eye(c).double() if block.right is None else block.right[g]
            basis, at = torch.kron(left.contiguous(), right.contiguous()), places.flatten()
            values = block.values[g].flatten() + (basis.T * shift[at] @ basis).diagonal()
            expected[at[:, None], at] = basis / values @ basis.T
            inside[at] = True
    values = torch.cat([h.diagonal.get(k, torch.zeros_like(v)).flatten() for k, v in h.params.items()])  # fmt: skip
    alone = (~inside).nonzero()[:, 0]
    expected[alone, alone] = 1 / (values + shift)[alone]
    torch.testing.assert_close(h.solve(eye, shift), expected, **EXACT)


def test_a_scalar_shift_solves_what_apply_multiplies():
    problem, _, w = case("conv")
    h = fitted(problem, w, "model")
    v = torch.randn(3, len(eye_of(problem)), generator=torch.Generator().manual_seed(0)).double()
    solved = h.solve(v, full(v.shape[1], 0.3))
    torch.testing.assert_close(h.apply(solved, lambda x: x + 0.3), v, **EXACT)


def test_nothing_to_divide_by():
    """An Embedding's unseen tokens have no curvature, and without a damping no inverse."""
    problem, _, w = case("padding")
    h = fitted(problem, w, "data")
    with pytest.raises(ValueError, match=r"got a smallest eigenvalue of .* with weight decay"):
        h.solve(eye_of(problem), full(len(eye_of(problem)), 0.0))


def test_default_damping_is_a_tenth_of_each_matrix_s_mean_eigenvalue():
    """A layer that the loss never reaches has none of its own: it takes the mean of all."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused, self.norm = nn.Linear(8, 3), nn.Linear(8, 5), nn.LayerNorm(8)

        def forward(self, x):
            return self.layer(self.norm(x))

    problem = own(Unused, 8)
    h = fit_curvature(problem, "ekfac").spectrum
    p = len(eye_of(problem))
    g = menagerie.row_gradients(problem)  # of the data's labels: only to see what is reached
    assert (g[:, 27:72] == 0).all()
    blocks = {block.place.weight: float(block.values.mean()) for block in h.blocks}
    wanted = {
        "layer": blocks["layer.weight"], "unused": h.trace / p,
        "norm.weight": float(h.diagonal["norm.weight"].mean()),
        "norm.bias": float(h.diagonal["norm.bias"].mean()),
    }  # fmt: skip
    found = dict(zip(h.params, h.means.split([v.numel() for v in h.params.values()]), strict=True))
    for name, value in found.items():
        expected = wanted.get(name, wanted.get(name.split(".")[0]))
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=1e-12, atol=0)
    fit = fit_curvature(problem, "ekfac")
    assert fit.damping == pytest.approx(0.1 * float(h.means.mean()), rel=1e-12)


# --- precision -------------------------------------------------------------------------------


def in_dtype(problem, dtype):
    model = copy.deepcopy(problem.model).to(dtype)
    data = problem.train.columns
    if not isinstance(data, dict):
        data = (data[0].to(dtype) if data[0].is_floating_point() else data[0], data[1])
    return Problem(model, problem.loss, data)


def difference(found, exact, v):
    """‖(H' − H) V‖ / ‖H V‖ in the norm of solves with a damping of the mean eigenvalue."""
    shift = full(v.shape[1], exact.trace / v.shape[1])
    a, b = (h.solve(v, shift) for h in (found, exact))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "padding", "encoder"])
def test_float32_models_are_near_float64_ones(name):
    problem, _, w = case(name)
    v = torch.randn(5, len(eye_of(problem)), generator=torch.Generator().manual_seed(0)).double()
    exact = fitted(problem, w, "model")
    found = fitted(in_dtype(problem, torch.float32), w, "model")
    assert all(b.values.dtype == torch.float64 for b in found.blocks)
    # float32 rounds by 6e-8; gradients of some layers lose three digits by cancellation
    assert difference(found, exact, v) < 1e-4


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2"])
def test_bfloat16_models_are_fitted_in_float32(name):
    problem, _, w = case(name)
    v = torch.randn(5, len(eye_of(problem)), generator=torch.Generator().manual_seed(0)).double()
    narrow = in_dtype(problem, torch.bfloat16)
    rounded = in_dtype(narrow, torch.float64)  # the same weights and data
    exact, found = (fitted(some, w, "model") for some in (rounded, narrow))
    sides = [q for b in found.blocks for q in (b.left, b.right) if q is not None]
    assert {q.dtype for q in sides} == {torch.float32}
    assert torch.isfinite(found.solve(v, full(v.shape[1], 1e-3))).all()
    # bf16 rounds by 2⁻⁹ = .2 %; some ten operations' worth of it, in gradients that are squared
    # (5 % for the convolutions); a sum over all tokens and rows in bf16 would be noise
    assert difference(found, exact, v) < 0.1
    assert found.trace == pytest.approx(exact.trace, rel=0.1)


# --- what must not happen silently -----------------------------------------------------------


class TwoPrecisions(nn.Module):
    """Layers of two types; activations are cast between them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        z = self.first(x.to(self.first.weight.dtype)).tanh()
        return self.last(z.to(self.last.weight.dtype))


@pytest.mark.parametrize("types", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_layers_of_two_precisions(types):
    def scores(*types):
        problem = own(TwoPrecisions, n=10)
        problem.model.first.to(types[0])
        problem.model.last.to(types[1])
        outputs = menagerie.unseen(problem)
        return influence(problem, outputs, curvature="ekfac", damping=0.3).scores

    np.testing.assert_allclose(scores(*types), scores(torch.float64, torch.float64), rtol=1e-4)


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("size", [1, 4, 256])
def test_rows_of_nan_loss_are_named(labels, size):
    problem = menagerie.mlp()
    problem.train.columns[0][4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"finite loss.*NaN or infinity in rows \[4\]"):
        fit_ekfac([problem], labels=labels, batch_size=size)
    part = replace(problem, train=Rows(problem.train, np.array([0, 1, 3, 4])))
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[4\]"):
        fit_ekfac([part], labels=labels, batch_size=size)
    first = replace(problem, train=Rows(problem.train, np.array([4, 1, 3])))
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[4\]"):
        fit_curvature(first, "ekfac", damping=1.0)


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize("labels", ["data", "model"])
def test_finite_losses_with_infinite_gradients(labels, trained):
    """√|z| at 0, inside the model; in a Kronecker block, and in the diagonal."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)
            nn.init.zeros_(self.layer.bias)
            for name, value in self.layer.named_parameters():
                value.requires_grad_(name == trained)

        def forward(self, x):
            return self.layer(x).abs().sqrt()

    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]]).double()
    problem = Problem(Root().double(), cross_entropy, (x, torch.arange(3)))
    with pytest.raises(ValueError, match=r"expected finite gradients.* from rows \[2\], whose"):
        fit_ekfac([problem], labels=labels, batch_size=2)


def test_settings_that_make_no_sense():
    problem = menagerie.mlp()
    with pytest.raises(ValueError, match="unknown labels 'true'; 'model' draws them, 'data' takes"):
        fit_ekfac([problem], labels="true")
    for draws in (0, -1):
        with pytest.raises(ValueError, match=f"expected at least 1 draw, got {draws}"):
            fit_ekfac([problem], draws=draws)
    with pytest.raises(ValueError, match="active dropout"):
        fit_ekfac([own(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)))])


def test_much_left_to_a_diagonal_is_told():
    """MultiheadAttention uses its weights by hand: no Kronecker block, a warning, and the share."""
    problem = menagerie.ODD["attention"]()
    with pytest.warns(DiagonalWarning, match=r"treats 100% of the parameters.*attend\.in_proj_w"):
        fit = fit_curvature(problem, "ekfac", damping=1.0)
    assert fit.meta["diagonal"] == 1.0
    problem = menagerie.mlp()
    fit = fit_curvature(problem, "ekfac", damping=1.0)  # warnings are errors here
    assert fit.meta["diagonal"] == pytest.approx(12 / len(eye_of(problem)))  # the LayerNorm's


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "folded", "tied"])
def test_bitfit_with_everything_frozen_but_biases_is_the_diagonal(name):
    problem, _, w = case(name)
    for key, value in problem.model.named_parameters():
        value.requires_grad_("bias" in key)
    for labels in ("data", "model"):
        h = fitted(problem, w, labels)
        assert h.blocks == ()
        assert set(h.diagonal) == {k for k, _ in problem.model.named_parameters() if "bias" in k}
    expected = torch.from_numpy(w) @ menagerie.row_gradients(problem).square() / problem.n
    found = fitted(problem, w, "data").apply(eye_of(problem), lambda x: x)
    torch.testing.assert_close(found, expected.diag(), **EXACT)


def masked(model, batch):
    return cross_entropy(model, (batch["x"], batch["y"]))


class Pooled(nn.Module):
    """A layer over 5 tokens, and their mean, whatever a mask says."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).tanh().mean(1)


def test_a_mask_that_the_model_does_not_heed_takes_nothing_from_its_gradients():
    """Padding counts in no basis; the eigenvalues are the squares of the gradients as they are."""
    x, y = own(Pooled, 5, 4).train.columns
    data = {"x": x, "y": y, "attention_mask": (x[..., 0] > 0).long()}
    problem = Problem(own(Pooled).model, masked, data)
    assert 0 < data["attention_mask"].double().mean() < 1
    h = fit_ekfac([problem], labels="data")
    g = menagerie.row_gradients(problem)
    assert h.trace == pytest.approx(float(g.square().sum(1).mean()), rel=1e-12)


def test_padding_counts_in_no_covariance():
    """What stands in padded places, however large, moves nothing."""
    problem = menagerie.llama()
    other = {k: v.clone() for k, v in problem.train.columns.items()}
    padding = other["attention_mask"] == 0
    assert padding.any()
    other["input_ids"][padding] = 10 - other["input_ids"][padding]
    eye = eye_of(problem)
    one, two = (
        fit_ekfac([replace(problem, train=data)], labels="data").apply(eye, lambda x: x)
        for data in (problem.train, other)
    )
    torch.testing.assert_close(one, two, **EXACT)


def test_outputs_that_hold_more_than_the_logits():
    """transformers' dicts with hidden states and a loss of one number, and parameters without a block."""
    problem = menagerie.gpt2(3)
    model, ids = problem.model, problem.train.columns["input_ids"]
    extra = nn.Parameter(torch.tensor(1.0).double())

    class More(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.extra = model, extra

        def forward(self, input_ids):
            out = self.inner(input_ids, labels=input_ids, output_hidden_states=True)
            out.logits = out.logits * self.extra
            return out

    def loss(model, batch):
        z, y = model(batch["input_ids"]).logits[:, :-1], batch["input_ids"][:, 1:]
        return F.cross_entropy(z.mT, y, reduction="none").mean(1)

    more = Problem(More(), loss, {"input_ids": ids})
    h = fit_ekfac([more], draws=77)
    plain = fit_ekfac([problem], draws=77)
    inner = h.trace - float(h.diagonal["extra"])
    assert inner == pytest.approx(plain.trace, rel=1e-9)
    # ∂z/∂extra = z, so its curvature is the variance of z under p, a mean over tokens
    z = model(ids).logits[:, :-1].detach()
    p = z.softmax(-1)
    variance = (p * z**2).sum(-1) - (p * z).sum(-1) ** 2
    assert float(h.diagonal["extra"]) == pytest.approx(float(variance.mean()), rel=1e-9)


def test_the_model_is_left_as_it_was():
    problem = menagerie.gpt2(3)
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    fit_ekfac([problem], draws=2)
    assert not any(module._forward_hooks for module in problem.model.modules())
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in problem.model.parameters())


# --- errors of peers -------------------------------------------------------------------------


def linear_block(problem, labels="data"):
    h = fit_ekfac([problem], labels=labels)
    (block,) = h.blocks
    return h, block


def test_eigenvectors_are_the_columns():
    """dattri 0.3.0 takes eigh's rows: Q Λ Qᵀ stands, Qᵀ Λ Q does not."""
    problem = menagerie.softmax()
    _, block = linear_block(problem)
    x, _ = problem.train.columns
    a = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    d = menagerie.row_gradients(problem)[:, -3:]  # the bias's gradient is d
    for q, side in ((block.left[0], d), (block.right[0], a)):
        covariance = side.T @ side
        for basis, is_diagonal in ((q, True), (q.T, False)):
            rotated = basis.T @ covariance @ basis
            off = (rotated - rotated.diag().diag()).abs().max() / rotated.abs().max()
            assert (off < 1e-12) == is_diagonal  # rounding


def test_the_bias_is_a_column_and_no_part_of_the_weight():
    """dattri 0.3.0 reshapes [W.flatten | b] to [out, in + 1]."""
    problem = menagerie.softmax()
    _, block = linear_block(problem)
    held = {
        "weight": torch.arange(12.0).reshape(1, 3, 4),
        "bias": torch.tensor([[100.0, 101.0, 102.0]]),
    }
    expected = [[0, 1, 2, 3, 100], [4, 5, 6, 7, 101], [8, 9, 10, 11, 102]]
    gathered = block.place.gather(held)
    assert gathered[0, 0].tolist() == expected
    back = block.place.scatter(gathered, held)
    assert all(torch.equal(back[k], held[k]) for k in held)


def test_no_inverse_is_taken_of_a_batch():
    """dattri averages the inverses of batches, so that its scores depend on their size."""
    problem = menagerie.mlp()
    outputs = Outputs(margin, problem.train)
    scores = [
        influence(problem, outputs, curvature="ekfac", damping=0.1, batch_size=size).scores
        for size in (256, 1, 4)
    ]
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], **EXACT)


def test_tokens_are_summed_before_they_are_squared():
    """Two tokens that pull one layer in opposite ways: the example's gradient is 0, and so is Λ."""

    class Opposite(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            h = self.layer(torch.stack([x, x], dim=1))
            return x + h[:, 0] - h[:, 1]

    problem = own(Opposite, 3)
    assert fit_ekfac([problem], labels="data").trace < 1e-28  # rounding, squared
    assert fit_ekfac([problem], labels="model").trace < 1e-28


def test_a_loss_by_another_factor_scales_the_curvature():
    """c ℓ: c times with labels of the model, as the Gauss–Newton; c² with those of the data."""
    for name, c in (("mlp", 3.0), ("conv", 0.2)):
        problem = menagerie.ARCHITECTURES[name]()
        scaled = replace(problem, loss=lambda m, b, c=c: c * cross_entropy(m, b))
        eye = eye_of(problem)
        for labels, factor in (("model", c), ("data", c * c)):
            one, two = (
                fit_ekfac([some], labels=labels).apply(eye, lambda x: x)
                for some in (problem, scaled)
            )
            torch.testing.assert_close(two, factor * one, **EXACT)


@pytest.mark.parametrize("kind", ["gauss_newton", "ekfac"])
def test_the_trace_is_the_gauss_newton_s_whatever_the_units(kind):
    """A mean over tokens, not their sum."""
    problem = menagerie.gpt2(3)
    variance = 0.0
    for row in range(problem.n):
        for pull in pulls(problem, row, "model"):
            value = pull(model := copy.deepcopy(problem.model))
            grads = torch.autograd.grad(value, list(model.parameters()))
            variance += sum(float(g.square().sum()) for g in grads) / problem.n
    found = spectrum(problem, kind, draws=77).trace
    assert found == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "twice", "tied"])
def test_a_weight_of_several_uses_is_one_whose_gradient_is_their_sum(name):
    """The squares of the sum, not the sum of the squares of each use."""
    problem, blocks, _ = case(name)
    h = fit_ekfac([problem], labels="data")
    weight = next(iter(blocks))
    block = next(b for b in h.blocks if b.place.weight == weight)
    assert len(h.blocks) == len(blocks)  # one block, however many hold it
    places = index_of(problem, None, weight, None).flatten()
    g = menagerie.row_gradients(problem)[:, places]
    inside = float(block.values.sum())
    if blocks[weight] is not None:
        inside -= float(menagerie.row_gradients(problem)[:, -4:].square().sum(1).mean())
    assert inside == pytest.approx(float(g.square().sum(1).mean()), rel=1e-10)


# --- adapters --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft of transformers
def test_lora_of_peft():
    """Only adapters are trained; all their matrices are blocks, and scores are those of plain rows."""
    peft = pytest.importorskip("peft")
    problem = menagerie.llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(problem.model, config).double()
    adapted = Problem(model, causal_lm_loss, problem.train)
    assert len(adapted.params) == 2 * 2 * 2
    h = fit_ekfac([adapted], draws=77)
    assert {block.place.weight for block in h.blocks} == set(adapted.params)
    outputs = Outputs(causal_lm_loss, problem.train)
    g, a = menagerie.row_gradients(adapted), menagerie.row_gradients(adapted, causal_lm_loss)
    expected = (-g @ h.solve(a, full(g.shape[1], 0.1)).T / adapted.n).numpy()
    for engine in ("auto", "rows"):
        f = influence(adapted, outputs, curvature="ekfac", damping=0.1, engine=engine)
        # draws by default are fewer than all labels: the same draws, other expectations
        np.testing.assert_allclose(f.scores, expected, rtol=0.2, atol=0.05 * np.abs(expected).max())
    same = fit_curvature(adapted, "ekfac", damping=0.1, draws=77)
    np.testing.assert_allclose(-g @ same.solve(a).T / adapted.n, expected, **EXACT)


def test_a_plan_is_the_same_with_what_is_outside_already_known():
    problem = menagerie.ODD["positions"]()
    assert core.plan(problem) == core.plan(problem, {"position.weight"})
    assert core.plan(problem, {"out.weight"})[0].weight == "position.weight"


class Seldom(nn.Module):
    """A head that sees one row in 400, which a few rows do not show."""

    def __init__(self):
        super().__init__()
        self.body, self.own, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        seldom = torch.nonzero(x[:, 0] > 50)[:, 0]
        return self.head(h.index_add(0, seldom, self.own(h[seldom])) if len(seldom) else h)


def seldom(rows):
    """The problem of `Seldom` whose head sees these rows."""
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[rows, 0] = 60.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Problem(Seldom().double(), cross_entropy, (x, torch.arange(400) % 3))


@pytest.mark.filterwarnings("ignore::attribution_core.curvature.DiagonalWarning")
@pytest.mark.parametrize("rows", [[7], [399], [*range(399)]])
def test_a_layer_that_does_not_see_some_rows_is_diagonal(rows):
    """Whatever the batches, those of one row too, to the rounding of sums: that it sees few rows, or misses one."""
    problem = seldom(rows)
    x, y = problem.train[list(range(9))]
    outputs = Outputs(cross_entropy, (x, y)).mean()
    found = [
        influence(problem, outputs, curvature="ekfac", damping=0.1, batch_size=size).scores
        for size in (1, 7, 57, 400)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-9, atol=1e-14)
    assert set(fit_ekfac([problem]).diagonal) == {"own.weight", "own.bias"}


class Skipped(nn.Module):
    """Heads by kind: each passes all rows of a batch, where there is one of its kind."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h, kind = torch.tanh(self.body(x)), x[:, :1] > 0
        out = h.new_zeros(len(h), 3)
        for head, rows in ((self.one, kind), (self.other, ~kind)):
            if rows.any():
                out = torch.where(rows, head(h), out)
        return out


@pytest.mark.filterwarnings("ignore::attribution_core.curvature.DiagonalWarning")
def test_a_layer_that_batches_may_skip_is_diagonal():
    """Whatever the batches: whether one skips it depends on who is in it. Ghost products hold all the same."""
    x = torch.randn(72, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = Problem(Skipped().double(), cross_entropy, (x, torch.arange(72) % 3))
    assert not coverage_of(problem, np.arange(72)).wrong
    outputs = Outputs(cross_entropy, (x[:9], torch.arange(9) % 3)).mean()
    found = [
        influence(problem, outputs, curvature="ekfac", damping=0.01, batch_size=size).scores
        for size in (1, 7, 8, 64)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-9, atol=1e-14)
    heads = {f"{head}.{part}" for head in ("one", "other") for part in ("weight", "bias")}
    assert set(fit_ekfac([problem]).diagonal) == heads


def test_a_model_that_takes_no_single_rows():
    """Its last line squeezes the batch away."""

    class Squeezed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).squeeze()

    def loss(model, batch):
        return -model(batch[0]).log_softmax(-1).gather(1, batch[1][:, None])[:, 0]

    x, y = menagerie.softmax().train.columns
    model = Squeezed(nn.Linear(x.shape[1], int(y.max()) + 1)).double()
    assert len(fit_ekfac([Problem(model, loss, (x, y))], labels="data").blocks) == 1


def test_layers_that_a_trial_did_not_show_cost_one_pass():
    passes = []
    problem = seldom([7])
    assert "own.weight" in coverage_of(problem, np.arange(400)).unseen
    fit_ekfac([problem], progress=lambda rows: passes.append(0) or rows)
    assert len(passes) == 3


def test_speech_with_a_mask_of_its_frames():
    """The mask is of frames, which convolutions see as [b, channels, T]: it is not theirs."""
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    wide = {f"{part}_ffn_dim": 8 for part in ("encoder", "decoder")}
    size = {"vocab_size": 12, "d_model": 8, "conv_channels": 6, "input_feat_per_channel": 4}
    config = Speech2TextConfig(**layers, **heads, **wide, **size, max_target_positions=8)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Speech2TextForConditionalGeneration(config).eval()
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[:, 9:] = 0
    ids = torch.randint(3, 12, (6, 4), generator=generator)
    data = {
        "input_features": torch.randn(6, 12, 4, generator=generator), "attention_mask": mask,
        "decoder_input_ids": ids, "labels": ids,
    }  # fmt: skip

    def loss(m, b):
        inputs = {name: value for name, value in b.items() if name != "labels"}
        return F.cross_entropy(m(**inputs).logits.mT, b["labels"], reduction="none").sum(1)

    blocks = {block.place.weight for block in fit_ekfac([Problem(model, loss, data)]).blocks}
    convolutions = {name for name in blocks if "conv_layers" in name}
    assert len(convolutions) == 2


def test_padding_of_a_decoder_counts_in_no_covariance():
    """An encoder's mask says nothing of it, though it may be as long; .3 % is left to what the first column moves."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
        config = T5Config(
            vocab_size=30, **size, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0
        )
        model = T5ForConditionalGeneration(config).double().eval()
        ids, labels = torch.randint(1, 30, (2, 12, 7))
    mask = torch.ones(12, 7, dtype=torch.long)
    mask[::2, 5:] = 0
    labels[::3, 5:] = -100

    def loss(model, batch):
        own = batch["labels"].clamp(min=0)
        z = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=own
        ).logits
        losses = nn.functional.cross_entropy(z.transpose(1, 2), batch["labels"], reduction="none")
        return losses.sum(1)

    def scores(more):
        padded = torch.cat([labels, torch.full((12, more), -100)], 1)
        data = {"input_ids": ids, "attention_mask": mask, "labels": padded}
        outputs = Outputs(loss, {name: value[:3] for name, value in data.items()}).mean()
        settings = {"curvature": "ekfac", "labels": "data", "damping": 1e-3}
        return influence(Problem(model, loss, data), outputs, **settings).scores[:, 0]

    none, one, two = map(scores, (0, 1, 2))
    np.testing.assert_allclose(two, one, rtol=1e-8)  # inverses magnify rounding of 1e-16
    assert (
        np.abs(one - none).max() < 0.01 * np.abs(none).max()
    )  # 15 % where the mask was the encoder's


class OneOutput(nn.Module):
    """A network whose output is [b, 1], or [b]; with a parameter that no layer's rule covers."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        return self.scale * self.body(x).reshape(len(x), *self.shape)


def logistic(model, batch):
    z = model(batch[0]).reshape(len(batch[0]))
    return F.binary_cross_entropy_with_logits(z, batch[1], reduction="none")


def huber(model, batch):
    z = model(batch[0]).reshape(len(batch[0]))
    return F.huber_loss(z, batch[1], reduction="none", delta=0.5)


@pytest.mark.parametrize("loss", [logistic, huber])
def test_outputs_without_a_dimension_of_their_own(loss):
    """A model that returns [b] is scored as its twin that returns [b, 1], from a problem and along a run."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator).double()
    data = (x, (x[:, 0] > 0).double())
    wide, flat = (seeded(OneOutput)(*shape).double() for shape in ((1,), ()))

    def scores(model):
        problem, outputs = Problem(model, loss, data, weight_decay=0.1), Outputs(loss, data)
        run = train(problem, Recipe(SGD(0.1), 5, 2), checkpoints=3)
        once = influence(problem, outputs, curvature="ekfac")
        return once.scores, unrolling.source(run, outputs, curvature="ekfac").scores

    for found, expected in zip(scores(flat), scores(wide), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)  # the same sums in another shape


def test_a_half_precision_model_beside_others_in_its_loss():
    """A teacher in bfloat16 takes rows of its own dtype, however wide the model's outputs are."""
    torch.manual_seed(0)
    model, teacher = (nn.Linear(6, 3).bfloat16() for _ in range(2))

    def distilled(model, batch):
        with torch.no_grad():
            wanted = teacher(batch[0]).float().softmax(1)
        return -(wanted * model(batch[0]).float().log_softmax(1)).sum(1)

    problem = Problem(model, distilled, (torch.randn(20, 6).bfloat16(),))
    found = influence(problem, Outputs(distilled, problem.train), curvature="ekfac", damping=0.1)
    wide = Problem(
        copy.deepcopy(model).float(),
        lambda model, batch: -(teacher(batch[0].bfloat16()).float().softmax(1).detach() * model(batch[0]).log_softmax(1)).sum(1),
        (problem.train.columns[0].float(),),
    )  # fmt: skip
    expected = influence(wide, Outputs(wide.loss, wide.train), curvature="ekfac", damping=0.1)
    size = np.abs(expected.scores).max()
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.05 * size)  # bfloat16's digits
