"""Small problems with known answers, all in float64, and the plain ways to find those answers.

    CONVEX         name -> Problem with one optimum; `refit` finds it exactly, as a function of weights
    ARCHITECTURES  name -> Problem on an MLP, a convolutional net, a GPT-2 and a Llama
    ODD            name -> Problem on a model that trips methods working layer by layer

Everything below `Problem` is plain autograd, one row at a time: slow, short, and independent of the
package's own ways.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from attribution_core import Outputs, Problem, causal_lm_loss, cross_entropy, squared_error
from attribution_core.data import take
from attribution_core.precision import precision_of

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # tensors here are tiny, and pytest-xdist has both cores busy


def seeded(build):
    """Build with torch's generator at 0, and leave the global one as it was."""

    def built(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(*args, **kwargs)

    built.__doc__ = build.__doc__
    return built


# --- convex problems -------------------------------------------------------------------------


def softplus_loss(model, batch):
    """Binary logistic loss for labels ±1, [b]."""
    x, y = batch
    return F.softplus(-y * model(x)[:, 0])


def prediction(model, batch):
    """The model's first output, [b]."""
    return model(batch[0])[:, 0]


@seeded
def ridge(n=20):
    """Linear least squares with weight decay."""
    x = torch.randn(n, 4).double()
    y = x @ torch.randn(4, 1).double() + 0.5 * torch.randn(n, 1).double()
    model = nn.Linear(4, 1).double()
    return Problem(model, squared_error, (x, y), weight_decay=0.03)


@seeded
def logistic(n=20):
    """Binary logistic regression with weight decay; classes overlap."""
    x = torch.randn(n, 4).double()
    y = torch.sign(x[:, 0] + torch.randn(n).double())
    return Problem(nn.Linear(4, 1).double(), softplus_loss, (x, y), weight_decay=0.03)


@seeded
def softmax(n=20):
    """Softmax regression on three overlapping classes, with weight decay."""
    x = torch.randn(n, 4).double()
    y = (x @ torch.randn(4, 3).double() + torch.randn(n, 3).double()).argmax(1)
    return Problem(nn.Linear(4, 3).double(), cross_entropy, (x, y), weight_decay=0.03)


CONVEX = {"ridge": ridge, "logistic": logistic, "softmax": softmax}


# --- architectures ---------------------------------------------------------------------------


@seeded
def mlp(n=6):
    """Two hidden layers, a LayerNorm between them."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5, bias=False), nn.GELU(),
        nn.Linear(5, 3),
    ).double()  # fmt: skip
    return Problem(model, cross_entropy, (torch.randn(n, 4).double(), torch.randint(0, 3, (n,))))


class PlainNorm(nn.Module):
    """Weight norm as it is written on paper, for `parametrize.register_parametrization`."""

    def __init__(self, dim=0):
        super().__init__()
        self.dim = dim

    def forward(self, g, v):
        other = [d for d in range(v.ndim) if d != self.dim]
        return v * (g / v.square().sum(other, keepdim=self.dim is not None).sqrt())

    def right_inverse(self, w):
        other = [d for d in range(w.ndim) if d != self.dim]
        return w.square().sum(other, keepdim=self.dim is not None).sqrt(), w


@seeded
def weight_normed(n=6, own=False):
    """Weight norm by rows, by columns and over all; `own` in plain operations instead of torch's."""
    layers = [nn.Linear(4, 5).double(), nn.Linear(5, 4).double(), nn.Linear(4, 3).double()]
    for layer, dim in zip(layers, (0, 1, None), strict=True):
        if own:
            parametrize.register_parametrization(layer, "weight", PlainNorm(dim))
        else:
            nn.utils.parametrizations.weight_norm(layer, dim=dim)
    model = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.Tanh(), layers[2])
    return Problem(model, cross_entropy, (torch.randn(n, 4).double(), torch.randint(0, 3, (n,))))


class ConvNet(nn.Module):
    """Grouped, strided and circular convolutions in two and one dimensions, GroupNorm, in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="circular", bias=False)
        self.line = nn.Conv1d(4, 3, 2)
        self.out = nn.Linear(9, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        x = self.relu(self.second(x))
        return self.out(self.line(x.flatten(2)).flatten(1))


@seeded
def conv(n=6):
    """See `ConvNet`; images of 2 channels, 4 × 4."""
    x, y = torch.randn(n, 2, 4, 4).double(), torch.randint(0, 3, (n,))
    return Problem(ConvNet().double(), cross_entropy, (x, y))


@seeded
def gpt2(n=6, length=7):
    """Two layers of GPT-2: transformers' Conv1D, learned positions, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 11, (n, length))
    return Problem(GPT2LMHeadModel(config).double(), causal_lm_loss, {"input_ids": ids})


@seeded
def llama(n=6, length=7):
    """Two layers of Llama: RMSNorm, rotary positions, grouped queries; padded on the right."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 11, (n, length))
    mask = (torch.arange(length) < torch.randint(3, length + 1, (n, 1))).long()
    data = {"input_ids": ids, "attention_mask": mask}
    return Problem(LlamaForCausalLM(config).double(), causal_lm_loss, data)


ARCHITECTURES = {"mlp": mlp, "conv": conv, "gpt2": gpt2, "llama": llama}


# --- odd models ------------------------------------------------------------------------------


class Outside(nn.Module):
    """A parameter that acts outside every module's own forward: the head's, scaled by hand."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x) + x[:, :3] * self.body.weight.sum()


class HandTied(nn.Module):
    """An embedding whose weight is the output layer too, by F.linear."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 4)

    def forward(self, x):
        return F.linear(self.emb(x).tanh().mean(1), self.emb.weight)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


class Padded(nn.Module):
    """An embedding whose row 0 is padding and gets no gradient."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 4, padding_idx=0)
        self.out = nn.Linear(4, 7)

    def forward(self, x):
        return self.out(self.emb(x).sum(1).tanh())


class Folded(nn.Module):
    """The batch folded into another dimension before the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x.reshape(-1, 2)).reshape(len(x), 2, 3).sum(1).tanh()


class Positions(nn.Module):
    """Learned positions looked up without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        return (
            self.out(x[..., None] * self.position(torch.arange(4, device=x.device))).tanh().mean(1)
        )


class Attention(nn.Module):
    """nn.MultiheadAttention: a module that returns a tuple and uses its out_proj's weight by hand."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0].mean(1)


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer in eval mode, with its fused path for inference."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


class HalfNorm(nn.Module):
    """A layer no rule knows, which casts to float32 on the way, as transformers' norms do."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = x.to(torch.float32)
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def _vectors(n):
    return torch.randn(n, 4).double(), torch.randint(0, 3, (n,))


def _tokens(n):
    return torch.randint(0, 4, (n, 5)), torch.randint(0, 7, (n,))


def _sequences(n):
    return torch.randn(n, 5, 4).double(), torch.randint(0, 4, (n,))


@seeded
def _odd(model, data, n=6):
    return Problem(model().double().eval(), cross_entropy, data(n))


ODD = {
    "outside": lambda: _odd(Outside, _vectors),
    "hand tied": lambda: _odd(HandTied, _tokens),
    "twice": lambda: _odd(Twice, _vectors),
    "padding": lambda: _odd(Padded, _tokens),
    "frozen": lambda: _odd(_frozen, _vectors),
    "folded": lambda: _odd(Folded, _vectors),
    "positions": lambda: _odd(Positions, _vectors),
    "attention": lambda: _odd(Attention, _sequences),
    "encoder": lambda: _odd(Encoder, _sequences),
    "own norm": lambda: _odd(lambda: nn.Sequential(HalfNorm(), nn.Linear(4, 3)), _vectors),
}
NOT_BY_LAYERS = {"outside", "hand tied", "folded", "positions", "attention", "encoder"}


# --- plain answers ---------------------------------------------------------------------------


def flat_params(problem):
    """The trainable parameters as one vector [p]."""
    return torch.cat([value.flatten() for value in problem.params.values()])


def losses_at(problem, flat, function=None, data=None):
    """Losses (or another function's values) of all rows with the parameter vector `flat`, [rows]."""

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = problem.model

        def forward(self, batch):
            return (function or problem.loss)(self.model, batch)

    sizes = [value.numel() for value in problem.params.values()]
    named = {
        f"model.{name}": part.reshape(value.shape)
        for (name, value), part in zip(problem.params.items(), flat.split(sizes), strict=True)
    }
    data = problem.train if data is None else data
    with precision_of(problem.params):
        return functional_call(Bound(), named, (take(data, np.arange(len(data)), flat.device),))


def row_gradients(problem, function=None, data=None):
    """Gradients of every row's loss (or another function), [rows, p], one backward pass a row."""
    model = copy.deepcopy(problem.model)
    params = [p for p in model.parameters() if p.requires_grad]
    data = problem.train if data is None else data
    found = []
    for row in range(len(data)):
        with precision_of(problem.params):
            value = (function or problem.loss)(model, take(data, [row], problem.device))[0]
        grads = torch.autograd.grad(value, params, allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)
        ]
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def objective(problem, weights):
    """θ [p] -> (1/n) Σ w_i ℓ_i(θ) + ½ weight_decay ‖θ‖²."""
    w = torch.as_tensor(weights)

    def value(flat):
        decay = 0.5 * problem.weight_decay * flat.square().sum()
        return (w * losses_at(problem, flat)).sum() / problem.n + decay

    return value


def with_params(problem, flat):
    """The problem with the parameter vector `flat` in a copy of its model."""
    model = copy.deepcopy(problem.model)
    nn.utils.vector_to_parameters(flat, [p for p in model.parameters() if p.requires_grad])
    return replace(problem, model=model)


def optima(problem, weights, tolerance=1e-12):
    """Exact optima [m, p] for weights [m, n]: Newton steps, to gradients of norm below tolerance."""

    def newton(flat, w):
        value = objective(problem, w)
        gradient = torch.func.grad(value)(flat)
        step = torch.linalg.solve(torch.func.hessian(value)(flat), gradient)
        return torch.where(gradient.norm() < tolerance, flat, flat - step), gradient.norm()

    weights = torch.as_tensor(weights)
    flats = flat_params(problem).expand(len(weights), -1)
    for _ in range(50):
        flats, norms = torch.func.vmap(newton)(flats, weights)
        if (norms < tolerance).all():
            return flats
    raise AssertionError(f"Newton did not reach gradients of {tolerance}, but {norms.max()}")


def refit(problem, weights=None):
    """The problem at its exact optimum for these weights [n]."""
    weights = np.ones(problem.n) if weights is None else weights
    return with_params(problem, optima(problem, weights[None])[0])


def outputs_of_refits(problem, outputs, weights):
    """Outputs [m, t] at the exact optima for weights [m, n]."""
    flats = optima(problem, weights)
    rows = [losses_at(problem, flat, outputs.function, outputs.data) for flat in flats]
    values = torch.stack(rows).detach().numpy()
    return values if outputs.matrix is None else values @ outputs.matrix.numpy()


def unseen(problem, function=None, rows=5):
    """Outputs on the first training rows, at shifted inputs: targets no method has seen."""
    x, y = problem.train[list(range(rows))]
    return Outputs(function or problem.loss, (x + 0.1, y))


# --- digits ----------------------------------------------------------------------------------


@cache
def digits_arrays():
    """scikit-learn's digits, scaled to [0, 1]: (x [1797, 64], y), shuffled once."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order] / 16).astype(np.float32), y[order]


def digits_model(seed, width=64):
    """An MLP with one hidden layer for digits, a function of its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
