"""attribution_core.layerwise.layers: what is seen from outside a layer, against plain autograd row by row."""

import pytest
import torch
from torch import nn

from attribution_core.layerwise.layers import (
    factors,
    matrix_shape,
    owners,
    plain_gradients,
    watched,
)
from attribution_core.precision import precision_of
from tests.menagerie import seeded

# float64 rounding is 1e-16 a term; sums here have at most some hundred terms of size near 1
EXACT = {"rtol": 1e-11, "atol": 1e-12}
B = 3
# torch warns that padding="same" of even kernels, which is not symmetric, costs a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def gpt2_conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 4)


def llama_norm():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(4)


def image():
    return torch.randn(B, 4, 6, 5)


def line():
    return torch.randn(B, 4, 9)


def tokens():
    return torch.randn(B, 3, 4)


def numbers():
    return torch.randint(0, 7, (B, 5))


MATRICES = {
    "linear": (lambda: nn.Linear(4, 5), lambda: torch.randn(B, 4)),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), lambda: torch.randn(B, 4)),
    "linear over tokens": (lambda: nn.Linear(4, 5), tokens),
    "linear over a grid": (lambda: nn.Linear(4, 5), lambda: torch.randn(B, 2, 3, 4)),
    "Conv1D": (gpt2_conv1d, tokens),
    "Conv1D of vectors": (gpt2_conv1d, lambda: torch.randn(B, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), image),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), image),
    "conv2d by channel": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), image),
    "conv2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=(1, 2)), image),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 2, dilation=(2, 3), padding=1), image),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", groups=2), image
    ),
    "conv2d reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), image),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), image),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), line),
    "conv1d of everything": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=3, groups=2), line
    ),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), line),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", bias=False), line),
    "embedding": (lambda: nn.Embedding(7, 4), numbers),
    "embedding of one token a row": (lambda: nn.Embedding(7, 4), lambda: torch.randint(0, 7, (B,))),
    "embedding of a grid": (lambda: nn.Embedding(7, 4), lambda: torch.randint(0, 7, (B, 2, 3))),
}  # fmt: skip
NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), tokens),
    "LayerNorm of vectors": (lambda: nn.LayerNorm(4), lambda: torch.randn(B, 4)),
    "LayerNorm over two dimensions": (lambda: nn.LayerNorm((3, 4)), tokens),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), tokens),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), image),
    "RMSNorm": (lambda: nn.RMSNorm(4), tokens),
    "LlamaRMSNorm": (llama_norm, tokens),
}


@seeded
def made(table, name):
    """The layer in float64 with random parameters, its input, its output's gradient."""
    layer, source = (build() for build in table[name])
    layer = layer.double()
    for value in layer.parameters():
        nn.init.normal_(value)
    source = source.double() if source.is_floating_point() else source
    return layer, source, torch.randn_like(layer(source))


def by_autograd(layer, source, back):
    """The gradient of every parameter for every row, one backward pass a row: name -> [b, *shape]."""
    with precision_of(dict(layer.named_parameters())):  # Llama's norm casts to float32
        sums = [(layer(source[[i]]) * back[[i]]).sum() for i in range(len(source))]
    rows = [torch.autograd.grad(value, list(layer.parameters())) for value in sums]
    names = [name for name, _ in layer.named_parameters()]
    return {
        name: torch.stack(column)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


@pytest.mark.parametrize("name", MATRICES)
def test_outer_products_sum_to_the_gradient_of_the_weight(name):
    layer, source, back = made(MATRICES, name)
    expected = by_autograd(layer, source, back)
    g, r, c = matrix_shape(layer)
    left, right = factors(layer, source, back, bias=False)
    if not left.is_floating_point():
        left = nn.functional.one_hot(left, r)[None].to(right)
    found = left.mT @ right  # [g, b, r, c]
    assert found.shape == (g, B, r, c)
    shape = (B, g, r, c)
    torch.testing.assert_close(found.transpose(0, 1), expected["weight"].reshape(shape), **EXACT)


@pytest.mark.parametrize("name", [name for name in MATRICES if "embedding" not in name])
def test_a_bias_is_one_more_column_of_the_inputs_side(name):
    layer, source, back = made(MATRICES, name)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(back.shape[1 if "conv" in name else -1]).double())
    expected = by_autograd(layer, source, back)["bias"]
    left, right = factors(layer, source, back, bias=True)
    found = left.mT @ right
    last = found[..., -1, :] if name.startswith("Conv1D") else found[..., -1]  # [g, b, out/g]
    torch.testing.assert_close(last.transpose(0, 1).reshape(B, -1), expected, **EXACT)
    plain = plain_gradients(layer, source, back, {"bias"})
    torch.testing.assert_close(plain["bias"], expected, **EXACT)


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_norms(name):
    layer, source, back = made(NORMS, name)
    expected = by_autograd(layer, source, back)
    found = plain_gradients(layer, source, back, set(expected))
    assert found.keys() == expected.keys()
    for local, value in expected.items():
        torch.testing.assert_close(found[local], value, **EXACT)
    assert plain_gradients(layer, source, back, {"weight"}).keys() == {"weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_are_widened_before_they_are_summed(dtype):
    """Products of bf16 numbers are exact in float32; in bf16 their sum would err by 2⁻⁹."""
    layer, source, back = made(MATRICES, "linear over tokens")
    source, back = source.to(dtype), back.to(dtype)
    left, right = factors(layer.to(dtype), source, back, bias=True)
    assert left.dtype == right.dtype == torch.float32
    exact = torch.einsum("btr,btc->brc", back.double(), source.double())
    # rounding of float32, 6e-8, of sums of 3 terms of size near 1
    torch.testing.assert_close((left.mT @ right)[0, ..., :-1].double(), exact, rtol=1e-6, atol=1e-6)


def test_layers_that_have_no_matrix():
    class Linear(nn.Module):
        """Of another library, with its weight [in, out]."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    for layer in (Linear(), nn.LayerNorm(4), nn.Conv3d(1, 1, 1), nn.Bilinear(2, 2, 2), nn.Tanh()):
        assert matrix_shape(layer) is None
        assert plain_gradients(layer, torch.ones(1), torch.ones(1), []) == {}


# --- watched ---------------------------------------------------------------------------------


class Model(nn.Module):
    """Everything that is seen twice, in place, or not at all."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.pos = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.relu = nn.ReLU(inplace=True)
        self.scale = Scale()
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        h = self.emb(x) + self.pos(torch.arange(5)[None])
        h = self.relu(self.first(h))
        h = self.relu(self.first(h))
        return self.out(self.lstm(h)[0].sum(1)) * self.scale()


class Scale(nn.Module):
    """A layer without inputs whose output is one number."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self):
        return self.log.exp()


@seeded
def watching():
    return Model().double(), torch.randint(0, 7, (B, 5))


def names_of(model):
    return {name for name, _ in model.named_parameters()}


def collected(model, x, names, pulls):
    """name of module -> list of (input, gradient of its output), in the order they arrive; and outputs."""
    called = {module: name for name, module in model.named_modules()}
    arrived, passed = [], []

    def arrive(module, own, source, back):
        arrived.append((called[module], own, source, back))

    def forwards(module, own, source, output):
        passed.append((called[module], source.shape, output.shape))

    frozen = {name: value.detach() for name, value in model.named_parameters()}
    with watched(model, names, len(x), arrive, forwards) as leaves:
        output = torch.func.functional_call(model, frozen, (x,))
    for pull in pulls:
        torch.autograd.grad(output, leaves, pull, retain_graph=True, allow_unused=True)
    return arrived, passed, leaves


def test_every_use_arrives_once_for_each_backward_pass():
    """Two pulls give twice the arrivals, each with its own gradients; what was called came by once."""
    model, x = watching()
    pulls = [torch.randn(B, 2).double(), torch.randn(B, 2).double()]
    arrived, passed, _ = collected(model, x, names_of(model), pulls)
    uses = ["out", "first", "first", "emb", "pos"]
    assert sorted(name for name, *_ in arrived) == sorted(2 * uses)
    assert sorted(name for name, *_ in passed) == sorted(uses)
    for k, pull in enumerate(pulls):
        alone, _, _ = collected(model, x, names_of(model), [pull])
        half = arrived[k * len(uses) : (k + 1) * len(uses)]
        for (name, _, _, back), (same, _, _, expected) in zip(half, alone, strict=True):
            assert name == same
            assert torch.equal(back, expected)


def test_arrivals_make_the_gradients_of_the_weights():
    """In-place activations, a layer called twice, and positions that are the same for all rows."""
    model, x = watching()
    pull = torch.randn(B, 2, generator=torch.Generator().manual_seed(1)).double()
    found = {}
    for name, own, source, back in collected(model, x, names_of(model), [pull])[0]:
        left, right = factors(model.get_submodule(name), source, back, "bias" in own)
        if not left.is_floating_point():
            left = nn.functional.one_hot(left, model.get_submodule(name).num_embeddings)[None]
        assert len(back) == B
        found[name] = found.get(name, 0) + (left.to(right).mT @ right)[0]
    expected = by_autograd(model, x, pull)
    for name, value in found.items():
        whole = expected[f"{name}.weight"]
        if f"{name}.bias" in expected:
            whole = torch.cat([whole, expected[f"{name}.bias"][..., None]], dim=-1)
        torch.testing.assert_close(value, whole, **EXACT)


def test_modules_that_give_tuples_or_take_nothing_are_passed_over():
    model, x = watching()
    arrived, _, _ = collected(model, x, names_of(model), [torch.ones(B, 2).double()])
    assert not {"lstm", "scale"} & {name for name, *_ in arrived}
    assert {own["weight"] for _, own, _, _ in arrived} == {
        "emb.weight", "pos.weight", "first.weight", "out.weight"
    }  # fmt: skip


def test_only_named_parameters_are_watched():
    model, x = watching()
    arrived, _, leaves = collected(model, x, {"first.bias"}, [torch.ones(B, 2).double()])
    assert [own for _, own, _, _ in arrived] == 2 * [{"bias": "first.bias"}]
    assert len(leaves) == 1  # the first use; what stands before it is not in the graph
    assert collected(model, x, set(), [])[0] == []


def test_no_hook_stays_behind():
    model, x = watching()
    collected(model, x, names_of(model), [torch.ones(B, 2).double()])
    with pytest.raises(IndexError), watched(model, names_of(model), B, lambda *_: None):
        model(x + 100)  # no such tokens
    assert not any(module._forward_hooks for module in model.modules())


def test_a_tied_parameter_stands_under_each_of_its_holders():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    held = owners(model, names_of(model))
    assert held[model[0]] == {"weight": "0.weight"}
    assert held[model[1]] == {"weight": "0.weight", "bias": "1.bias"}
    assert owners(model, {"1.bias"}) == {model[1]: {"bias": "1.bias"}}
