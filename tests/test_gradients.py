"""attribution_core.gradients: three engines against plain autograd, sums and gradients of outputs."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attribution_core import Outputs, Problem, causal_lm_loss, cross_entropy, margin
from attribution_core import gradients as core
from attribution_core.gradients import directional, mean_gradient, output_gradients
from attribution_core.layerwise import coverage, ghost
from attribution_core.layerwise.vectors import flatten, unflatten
from tests import menagerie

# float64 rounding is 1e-16 a term; sums here have at most a few thousand terms of size near 1
EXACT = {"rtol": 1e-10, "atol": 1e-10}
PROBLEMS = {**menagerie.ARCHITECTURES, **menagerie.ODD}
ENGINES = ("ghost", "jvp", "rows")


def directions(problem, k):
    """k random directions [k, p], float64."""
    p = len(menagerie.flat_params(problem))
    return torch.randn(k, p, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(scope="module", params=PROBLEMS)
def case(request):
    """(name, problem, its per-example gradients by plain autograd)."""
    problem = PROBLEMS[request.param]()
    return request.param, problem, menagerie.row_gradients(problem)


def test_the_reference_is_the_slope_of_the_loss():
    """Central differences of the losses themselves, on the model with the most float32 casts."""
    problem = menagerie.llama()
    v, flat, h = directions(problem, 1)[0], menagerie.flat_params(problem), 1e-5
    up, down = (menagerie.losses_at(problem, flat + s * h * v) for s in (1, -1))
    # differences err by h² f'''/6 ~ 1e-10 |v|³ and by rounding 1e-16 / h = 1e-11; a float32 step
    # anywhere would err by 1e-7 / h = 1e-2
    torch.testing.assert_close(
        (up - down) / (2 * h), menagerie.row_gradients(problem) @ v, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("k", [1, 3])
def test_engines_equal_plain_autograd(case, engine, k):
    name, problem, rows = case
    v = directions(problem, k)
    if engine == "ghost" and name in menagerie.NOT_BY_LAYERS:
        with pytest.raises(ValueError, match="use engine='jvp' or 'rows'"):
            directional(problem, v, engine=engine)
        return
    torch.testing.assert_close(directional(problem, v, engine=engine), rows @ v.T, **EXACT)


def test_auto_takes_ghost_where_it_covers_and_else_an_engine_by_count(case):
    name, problem, _ = case
    rows = np.arange(problem.n)
    if name in menagerie.NOT_BY_LAYERS:
        assert core.choose_engine(problem, core.FEW, rows, "auto")[0] == "jvp"
        assert core.choose_engine(problem, core.FEW + 1, rows, "auto")[0] == "rows"
    else:
        assert core.choose_engine(problem, 1, rows, "auto")[0] == "ghost"


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2"])
def test_ghost_products_cut_into_pieces(name, monkeypatch):
    """One row's product of one layer at a time gives the same."""
    problem = PROBLEMS[name]()
    v = directions(problem, 3)
    whole = directional(problem, v, engine="ghost")
    monkeypatch.setattr(ghost, "LAYER_ELEMENTS", 1)
    torch.testing.assert_close(directional(problem, v, engine="ghost"), whole, **EXACT)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", menagerie.ARCHITECTURES)
def test_batch_size_changes_nothing(name, engine):
    problem = PROBLEMS[name]()
    v = directions(problem, 2)
    whole = directional(problem, v, engine=engine, batch_size=problem.n)
    for size in (1, 4):  # 6 rows in batches of 4 leave a last batch of 2
        torch.testing.assert_close(
            directional(problem, v, engine=engine, batch_size=size), whole, **EXACT
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_are_taken_in_the_order_asked_for(engine):
    problem = menagerie.conv()
    v = directions(problem, 2)
    asked = [4, 0, 4]
    torch.testing.assert_close(
        directional(problem, v, asked, engine),
        directional(problem, v, engine=engine)[asked],
        **EXACT,
    )
    assert directional(problem, v, [], engine).shape == (0, 2)


def test_directions_by_name_and_as_one_tensor():
    problem = menagerie.mlp()
    v = directions(problem, 2)
    named = unflatten(v, problem.params)
    assert torch.equal(flatten(named), v)
    shuffled = {name: named[name] for name in sorted(named, reverse=True)}
    assert torch.equal(directional(problem, shuffled), directional(problem, v))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gpt2", "conv", "encoder"])
def test_the_model_is_left_as_it_was(name, engine):
    problem = PROBLEMS[name]()
    model = problem.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    with suppress(ValueError):  # ghost on the encoder
        directional(problem, directions(problem, 2), engine=engine)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("engine", ["auto", "jvp", "rows"])
@pytest.mark.parametrize("name", ["encoder", "attention", "llama"])
def test_float32_models_whose_layers_have_fused_paths(name, engine):
    """In eval mode torch swaps in kernels without forward mode; float64 tests do not reach them."""
    problem = PROBLEMS[name]()
    v = directions(problem, 2)
    expected = menagerie.row_gradients(problem) @ v.T
    problem.model.float()
    data = problem.train.columns
    if not isinstance(data, dict):
        data = (data[0].float(), data[1])
    found = directional(Problem(problem.model, problem.loss, data), v, engine=engine)
    assert found.dtype == torch.float32
    # float32 rounding 1e-7, times the norm of the terms: some tens
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_dropout_of_probability_zero_in_training_mode(engine):
    """GPT-2 left in train() with all dropout at 0 is deterministic, and every engine takes it."""
    problem = menagerie.gpt2()
    v = directions(problem, 2)
    expected = directional(problem, v, engine="rows")
    problem.model.train()
    torch.testing.assert_close(directional(problem, v, engine=engine), expected, **EXACT)


def test_an_uncovered_parameter_hidden_from_the_first_rows():
    """The first two rows do not reach the parameter that acts outside its module; others do."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(2, 3)
            self.scale = nn.Linear(1, 1)

        def forward(self, x):
            return self.body(x) * (1 + x[:, :1].relu() * self.scale.weight.sum())

    x = torch.tensor([[-1.0, 1.0], [-2.0, 1.0], [1.0, 1.0], [2.0, -1.0]]).double()
    problem = Problem(Sometimes().double(), cross_entropy, (x, torch.tensor([0, 1, 2, 0])))
    v = directions(problem, 1)
    expected = menagerie.row_gradients(problem) @ v.T
    torch.testing.assert_close(directional(problem, v), expected, **EXACT)


# --- layers that do not see every row ----------------------------------------------------------


class TwoHeads(nn.Module):
    """Each head sees the rows of its own kind."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        kind, h = x[:, 0] > 0, torch.tanh(self.body(x))
        out = h.new_zeros(len(h), 3)
        out[kind], out[~kind] = self.one(h[kind]), self.other(h[~kind])
        return out


class Sorted(nn.Module):
    """Rows in the order of their first number on the way, as packed sequences by length."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort(descending=True, stable=True)
        return self.head(torch.tanh(self.body(x[order]))[order.argsort()])


class Late(nn.Module):
    """A parameter of the model's own that only rows of the second kind reach."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(5))
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        kind = (x[:, :1] > 0).to(x)
        return self.head(torch.tanh(self.body(x) + kind * torch.tanh(self.place * x[:, 1:2])))


class FromZero(Late):
    """A last layer at zero hides all that comes before."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) * self.place))


def of_kinds(model, kinds):
    """Rows whose first number has these signs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(kinds), 4, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() * torch.where(torch.as_tensor(kinds), 1.0, -1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model().double()
    return Problem(made, cross_entropy, (x, torch.arange(len(kinds)) % 3))


KINDS = {
    "in pairs": np.arange(40) // 2 % 2 == 0, "in halves": np.arange(40) >= 20,
    "in turns": np.arange(40) % 2 == 0, "one": np.arange(40) == 39,
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("model", [TwoHeads, Sorted, Late, FromZero])
def test_layers_that_do_not_see_every_row_in_order(model, kinds, size):
    problem = of_kinds(model, KINDS[kinds])
    v = directions(problem, 2)
    expected = menagerie.row_gradients(problem) @ v.T
    torch.testing.assert_close(directional(problem, v, batch_size=size), expected, **EXACT)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_rows_of_two_lengths_that_are_sorted_on_the_way(sign, seed):
    """Most are alike, as texts that are cut to one length: among few rows they may be in order already."""
    rng = np.random.default_rng(seed)
    problem = of_kinds(Sorted, np.ones(200, bool))
    problem.train.columns[0][:, 0] = torch.from_numpy(sign * np.where(rng.random(200) < 0.3, -1, 1))
    v = directions(problem, 2)
    expected = menagerie.row_gradients(problem) @ v.T
    torch.testing.assert_close(directional(problem, v), expected, **EXACT)


class RareTokens(nn.Module):
    """A layer that sees the large numbers of all rows as one list, as an expert its tokens."""

    def __init__(self):
        super().__init__()
        self.body, self.rare, self.head = nn.Linear(1, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h, rare = torch.tanh(self.body(x[..., None])), x > 50
        out = h.clone()
        if rare.any():
            out[rare] = torch.tanh(self.rare(h[rare]))
        return self.head(out.mean(1))


class RareRow(nn.Module):
    """A table that sees the rows of large numbers alone: one row is not one for all."""

    def __init__(self):
        super().__init__()
        self.body, self.rare, self.head = nn.Linear(4, 5), nn.Embedding(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h, rare = torch.tanh(self.body(x.clamp(max=50))), (x[:, 0] > 50).nonzero()[:, 0]
        kind = x[rare, 0].long() % 4
        return self.head(h.index_add(0, rare, self.rare(kind)) if len(rare) else h)


@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize(("model", "rows"), [(RareTokens, [9, 10, 11, 12]), (RareRow, [10])])
def test_layers_that_no_tried_row_reached_are_not_believed(model, rows, size):
    """Sixteen tokens of four rows would pass for a batch of sixteen rows."""
    problem = of_kinds(model, np.zeros(400, bool))
    problem.train.columns[0][rows] = 60.0 + torch.arange(4.0, dtype=torch.float64)
    found = coverage.coverage_of(problem, np.arange(400))
    assert not found.wrong
    assert {name.split(".")[0] for name in found.unseen} == {"rare"}
    v = directions(problem, 2)
    expected = menagerie.row_gradients(problem) @ v.T
    torch.testing.assert_close(directional(problem, v, batch_size=size), expected, **EXACT)


def test_one_row_that_a_trial_meets_costs_its_own_layer_alone():
    problem = of_kinds(RareRow, np.zeros(400, bool))
    tried = np.random.default_rng(0).choice(400, 32, replace=False)
    problem.train.columns[0][tried[3]] = 60.0
    assert coverage.coverage_of(problem, np.arange(400)).wrong == {"rare.weight"}


class Table(nn.Module):
    """One row of numbers for all rows, as prompts that are learned through a layer."""

    def __init__(self):
        super().__init__()
        self.body, self.prompt, self.head = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) + self.prompt(x.new_ones(1, 2))))


def test_one_row_for_all_is_covered():
    problem = of_kinds(Table, KINDS["in turns"])
    found = coverage.coverage_of(problem, np.arange(40))
    assert (found.wrong, found.shared) == (set(), {"prompt.weight", "prompt.bias"})
    v = directions(problem, 2)
    expected = menagerie.row_gradients(problem) @ v.T
    torch.testing.assert_close(directional(problem, v, engine="ghost"), expected, **EXACT)


class Positions(nn.Module):
    """Positions of one row for all, and beside them rows of the model's own that are put together to one."""

    def __init__(self):
        super().__init__()
        self.body, self.places, self.head = nn.Linear(1, 5), nn.Embedding(4, 5), nn.Linear(5, 3)
        self.prompts, self.alone = nn.Linear(2, 5), nn.Linear(5, 5)

    def forward(self, x):
        one = self.alone(self.prompts(x.new_ones(3, 2)).mean(0, keepdim=True)).reshape(5)
        h = torch.tanh(self.body(x[..., None]) + self.places(torch.arange(4)[None]) + one)
        return self.head(h.mean(1))


def test_positions_are_shared_where_another_layer_cannot_be():
    problem = of_kinds(Positions, KINDS["in turns"])
    found = coverage.coverage_of(problem, np.arange(40))
    assert found.shared == {"places.weight"}
    assert {name.split(".")[0] for name in found.wrong} == {"prompts", "alone"}


@pytest.mark.parametrize("n", [1, 2, 9, 71, 72, 79])
def test_positions_are_shared_whatever_the_number_of_rows(n):
    """Of 72 rows nine are tried; a row by itself would tell nothing."""
    problem = menagerie.gpt2(n=n)
    found = coverage.coverage_of(problem, np.arange(n))
    assert not found.wrong
    assert found.shared == ({"transformer.wpe.weight"} if n > 1 else set())


class Scaled(nn.Module):
    """Attention, whose joint weight acts outside any module, behind a small scale."""

    def __init__(self, scale):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(1, 64), nn.Linear(64, 3), scale
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x):
        h = self.body(x[..., None])
        return self.head((h + self.scale * self.attention(h, h, h)[0]).mean(1))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7])
def test_small_gradients_are_tried_by_their_own_size(scale):
    """In float32, beside gradients a million times larger."""
    double = of_kinds(lambda: Scaled(scale), KINDS["in turns"])
    x, y = double.train.columns
    problem = Problem(copy.deepcopy(double.model).float(), cross_entropy, (x.float(), y))
    names = {name for name in problem.params if name.startswith("attention")}
    assert coverage.coverage_of(problem, np.arange(40)).wrong == names
    v = {k: torch.randn(1, *p.shape) * (k in names) for k, p in problem.params.items()}
    expected = directional(double, v, engine="rows").float()
    found = directional(problem, v)
    # float32's rounding of sums over 64 places, beside the largest
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


class Hidden(nn.Module):
    """A last layer at zero before which all is hidden: a body used outside its module, and a layer without a rule."""

    def __init__(self, twice=False, unused=False):
        super().__init__()
        self.body, self.scale, self.head = nn.Linear(4, 4), Exponential(), nn.Linear(4, 3)
        self.unused, self.twice = nn.Linear(2, 2) if unused else None, twice
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(self.scale(h @ self.body.weight if self.twice else h))


class Exponential(nn.Module):
    """Not linear in its parameter."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.size.exp()


class Silent(nn.Module):
    """A layer that is used without effect, wherever parameters stand."""

    def __init__(self):
        super().__init__()
        self.body, self.silent = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x) + 0 * self.silent(x)


@pytest.mark.parametrize(
    ("model", "uncovered"),
    [
        (lambda: Hidden(twice=True), {"body.weight"}),
        (lambda: Hidden(twice=True, unused=True), {"body.weight"}),
        (Silent, set()),
    ],
)
def test_what_no_row_reaches_is_tried_where_it_would_be(model, uncovered):
    found = set(coverage.coverage_of(of_kinds(model, KINDS["in turns"]), np.arange(40)).wrong)
    assert found & {"body.weight", "body.bias", "silent.weight", "silent.bias"} == uncovered


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
def test_a_small_penalty_inside_the_loss_is_no_rounding(size):
    """A row's penalty on the weights comes through no layer: ghost products would leave it out."""

    def penalised(model, batch):
        return cross_entropy(model, batch) + size * sum(p.square().sum() for p in model.parameters())  # fmt: skip

    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        rows = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
        problem = Problem(model, penalised, rows)
        along = {name: torch.ones_like(p)[None] for name, p in problem.params.items()}
        found = directional(problem, along)
        torch.testing.assert_close(
            found, directional(problem, along, engine="rows"), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_parameter_that_no_layer_shows_is_missed_in_no_precision(dtype):
    """Half precision's rounding is larger than some of the gradients that are missed (2 of these 60 in bfloat16)."""
    for seed in range(60):
        torch.manual_seed(seed)
        model = Scale().to(dtype)
        problem = Problem(model, cross_entropy, (torch.randn(40, 4).to(dtype), torch.randint(0, 3, (40,))))  # fmt: skip
        assert "scale" in coverage.coverage_of(problem, np.arange(40)).wrong, seed


class Scale(nn.Module):
    """A parameter of the model itself, between layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(0.7 * torch.ones(8))

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)) * self.scale)


@pytest.mark.parametrize("unused", [False, True])
def test_a_trial_takes_two_passes_a_batch(unused, monkeypatch):
    """Of 40 rows one batch is tried, and not again for a parameter that nothing uses."""
    problem, passes = of_kinds(lambda: Hidden(unused=unused), KINDS["in turns"]), []
    with torch.no_grad():
        problem.model.head.weight.normal_()
    real = coverage.call
    monkeypatch.setattr(coverage, "call", lambda *a: passes.append(0) or real(*a))
    assert not coverage.coverage_of(problem, np.arange(40)).wrong
    assert len(passes) == 2


def test_a_batch_that_a_layer_does_not_see_whole_is_named():
    problem = of_kinds(TwoHeads, np.ones(40, bool))
    mixed = of_kinds(TwoHeads, KINDS["in turns"])
    params = problem.params
    v = {name: value[None] for name, value in params.items()}
    with pytest.raises(
        ValueError, match=r"every row of a batch, got one that saw \(2, 5\) of 4 rows"
    ):
        core.ENGINES["ghost"](problem.model, problem.loss, params, v, mixed.train[[0, 1, 2, 3]])


def test_directions_of_a_float16_model_do_not_vanish():
    """float16 ends at 6e-8; directions are 1e-9 here. Rounding of ten bits in gradients and directions."""
    problem = of_kinds(lambda: nn.Linear(4, 3), KINDS["in turns"])
    half = Problem(copy.deepcopy(problem.model).half(), cross_entropy, tuple(
        c.half() if c.is_floating_point() else c for c in problem.train.columns
    ))  # fmt: skip
    v = 1e-9 * directions(problem, 2)
    expected = directional(problem, v)
    parts = (v[:, :12].reshape(2, 3, 4), v[:, 12:])
    for given in (v, dict(zip(problem.params, parts, strict=True))):
        found = directional(half, given).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * expected.abs().max().item())


@pytest.mark.parametrize("engine", ["ghost", "rows"])  # forward mode's tangents are float16
def test_directions_of_a_float16_model_of_all_sizes(engine):
    """Rows of an embedding that the batch does not use are ten thousand times larger: they must not scale the rest."""
    double = menagerie.gpt2()
    half = Problem(copy.deepcopy(double.model).half(), causal_lm_loss, double.train)
    v = {k: torch.randn(2, *p.shape, dtype=torch.float64) for k, p in double.params.items()}
    unused = np.setdiff1d(np.arange(11), double.train[list(range(double.n))]["input_ids"])
    v["transformer.wte.weight"][:, unused] *= 1e4
    expected = directional(double, v, engine="rows")
    found = directional(half, v, engine=engine).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llama_in_half_precision_takes_ghost(dtype):
    """Its norms compute in float32 whatever the model does."""
    double = menagerie.llama()
    half = Problem(copy.deepcopy(double.model).to(dtype), causal_lm_loss, double.train)
    assert core.choose_engine(half, 1, np.arange(half.n), "auto")[0] == "ghost"
    v = directions(double, 2)
    expected = directional(double, v, engine="rows")
    off = (directional(half, v).double() - expected).norm() / expected.norm()
    assert off < 4 * torch.finfo(dtype).eps  # a few roundings of every product


def test_large_gradients_of_a_float16_model_stay_in_range():
    """A million entries of equal size: the sum is 20, and 2e5 were directions scaled to 1."""
    model = nn.Linear(2000, 500, bias=False).half()
    problem = Problem(
        model, lambda m, b: 100 * m(b[0]).float().mean(1), (torch.ones(4, 2000).half(),)
    )
    found = directional(problem, torch.full((1, 1_000_000), 1e-4), engine="ghost")
    torch.testing.assert_close(found, torch.full((4, 1), 20.0), rtol=0.02, atol=0.0)


def test_biases_without_a_gradient_but_for_rounding():
    """Attention does not see a bias of its keys: both sides of the trial are rounding there."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for seed in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = BertModel(BertConfig(vocab_size=50, intermediate_size=64, **size)).eval()
            ids = torch.randint(1, 50, (12, 9))
        problem = Problem(
            model,
            lambda m, b: 1e6 * m(input_ids=b["ids"]).last_hidden_state[:, 0].square().sum(1),
            {"ids": ids},
        )  # rounding far above 1e-12
        assert not coverage.coverage_of(problem, np.arange(12)).wrong


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda v, named: v[0], r"expected directions \[k, p=.*\], got"),
        (lambda v, named: v[:, 1:], r"expected directions \[k, p=.*\], got"),
        (lambda v, named: dict(list(named.items())[1:]), "missing .'0.weight'.*unknown"),
        (lambda v, named: {**named, "new": v}, "unknown .'new'"),
        (lambda v, named: {**named, "0.bias": named["0.bias"][0]}, "one k for all"),
        (lambda v, named: {**named, "0.bias": named["0.bias"][:1]}, "one k for all"),
    ],
)
def test_directions_that_do_not_fit(wrong, message):
    problem = menagerie.mlp()
    v = directions(problem, 2)
    with pytest.raises(ValueError, match=message):
        directional(problem, wrong(v, unflatten(v, problem.params)))


def test_unknown_engine():
    problem = menagerie.mlp()
    with pytest.raises(ValueError, match="unknown engine 'fast'; one of auto, ghost, jvp, rows"):
        directional(problem, directions(problem, 1), engine="fast")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_of_nan_is_named(engine):
    problem = menagerie.mlp()
    problem.train.columns[0][4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[4\]"):
        directional(problem, directions(problem, 1), engine=engine)


def test_finite_losses_with_infinite_gradients():
    """√|x·θ| at 0 has a finite value and no finite slope."""
    x = torch.tensor([[1.0], [2.0], [0.0]]).double()

    def root(model, batch):
        return model(batch[0])[:, 0].abs().sqrt()

    problem = Problem(nn.Linear(1, 1, bias=False).double(), root, (x,))
    with pytest.raises(ValueError, match=r"expected finite gradients.*rows \[2\]"):
        directional(problem, directions(problem, 1))


def test_a_loss_that_is_one_number_for_the_batch():
    def mean(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    problem = Problem(menagerie.mlp().model, mean, menagerie.mlp().train)
    with pytest.raises(ValueError, match=r"expected one loss per row.*reduction='none'"):
        directional(problem, directions(problem, 1))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.1), "active dropout"),
        (nn.BatchNorm1d(4), "batch norm in training mode"),
    ],
)
def test_layers_that_are_random_or_mix_rows(layer, message):
    x, y = menagerie.mlp().train.columns
    problem = Problem(nn.Sequential(nn.Linear(4, 4), layer).double(), cross_entropy, (x, y))
    v = directions(problem, 1)
    with pytest.raises(ValueError, match=message):
        directional(problem, v)
    problem.model.eval()
    torch.testing.assert_close(
        directional(problem, v), menagerie.row_gradients(problem) @ v.T, **EXACT
    )


def test_dropout_that_is_no_module_of_its_own():
    """nn.MultiheadAttention keeps its dropout as a number."""
    model = menagerie.Attention().double()
    model.attend.dropout = 0.1
    x, y = menagerie.ODD["attention"]().train.columns
    problem = Problem(model, cross_entropy, (x, y))
    with pytest.raises(ValueError, match="active dropout"):
        directional(problem, directions(problem, 1))


# --- sums, and gradients of outputs ----------------------------------------------------------


@pytest.mark.parametrize("name", [*menagerie.ARCHITECTURES, "frozen", "hand tied"])
def test_mean_gradient_is_the_gradient_of_the_objective(name):
    problem = PROBLEMS[name]()
    problem = Problem(problem.model, problem.loss, problem.train, weight_decay=0.1)
    w = np.linspace(0, 2, problem.n)
    theta = menagerie.flat_params(problem)
    expected = torch.from_numpy(w) @ menagerie.row_gradients(problem) / problem.n + 0.1 * theta
    for size in (1, 4, 100):
        found = mean_gradient(problem, w, batch_size=size)
        assert list(found) == list(problem.params)
        torch.testing.assert_close(
            torch.cat([g.flatten() for g in found.values()]), expected, **EXACT
        )


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("name", [*menagerie.ARCHITECTURES, "frozen", "encoder"])
def test_output_gradients_equal_plain_autograd(name, size):
    problem = PROBLEMS[name]()
    function = problem.loss if name in ("gpt2", "llama") else margin
    outputs = Outputs(function, problem.train)
    labels = np.arange(problem.n) % 3
    rows = menagerie.row_gradients(problem, function)
    wanted = {
        "rows": (outputs, rows),
        "mean": (outputs.mean(), rows.mean(0, keepdim=True)),
        "by label": (
            outputs.mean(by=labels),
            torch.stack([rows[labels == j].mean(0) for j in range(3)]),
        ),
    }
    for some, expected in wanted.values():
        found = flatten(output_gradients(problem.model, some, batch_size=size))
        torch.testing.assert_close(found, expected, **EXACT)


@menagerie.seeded
def odd_layers():
    """Layers without a batched form, or without forward mode."""
    data = (torch.randn(6, 5, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
    flat = (data[0].flatten(1), data[1])

    class Recurrent(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(15, 4))
    models = {
        "gru": (Recurrent(nn.GRU(3, 4, batch_first=True)), data),
        "lstm": (Recurrent(nn.LSTM(3, 4, batch_first=True)), data),
        "prelu": (nn.Sequential(nn.Linear(15, 4), nn.PReLU(), nn.Linear(4, 3)), flat),
        "weight norm": (nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 3)), flat),
    }
    return {
        k: Problem(m.double(), cross_entropy, (x.double(), y)) for k, (m, (x, y)) in models.items()
    }


@pytest.mark.parametrize("count", [2, 30])
@pytest.mark.parametrize("name", ["gru", "lstm", "prelu", "weight norm"])
def test_layers_that_torch_cannot_batch_or_push_forward(name, count):
    problem = odd_layers()[name]
    rows = menagerie.row_gradients(problem)
    along = directions(problem, count)
    found = directional(problem, unflatten(along, problem.params))
    np.testing.assert_allclose(found, rows.double() @ along.T, **EXACT)


@pytest.mark.parametrize("size", [5, 40])  # a pass for each, or all together
def test_gradients_of_outputs_are_those_of_what_is_read(size):
    """In eval mode, whatever mode a loop of one's own left the model in."""

    def by_mode(model, batch):
        return cross_entropy(model, batch) * (2 if model.training else 1)

    torch.manual_seed(0)
    model = nn.Linear(4, 3).double().train()
    outputs = Outputs(by_mode, (torch.randn(size, 4).double(), torch.arange(size) % 3))
    values, found = core.valued_gradients(model, outputs)
    assert model.training
    again, expected = core.valued_gradients(model.eval(), outputs)
    torch.testing.assert_close(values, outputs.evaluate(model), rtol=1e-12, atol=0)
    torch.testing.assert_close(again, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
