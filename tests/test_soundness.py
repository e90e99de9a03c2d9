"""attribution_core.safeguards.soundness: losses that are no functions of parameters and own row are refused by every method."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attribution_core import (
    SGD,
    MetagradientWarning,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    influence,
    leave_one_out,
    magic,
    margin,
    newton,
    representation_similarity,
    retrain,
    source,
    tracin,
    train,
    trak,
)
from attribution_core.curvature import DiagonalWarning
from attribution_core.data import as_data
from attribution_core.gradients import directional
from attribution_core.groups import group_directional
from attribution_core.safeguards import soundness
from attribution_core.safeguards.soundness import _kind, refuse_mixed_outputs, stopped
from tests import menagerie
from tests.test_swapping import HandTied

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
OUTPUTS = Outputs(cross_entropy, (X, Y))


def by(method, **settings):
    return lambda problem, outputs: method(problem, outputs, **settings).scores


METHODS = {
    "influence": by(influence, damping=0.1),
    "ekfac": by(influence, curvature="ekfac", damping=0.1),
    "groups": by(influence, damping=0.1, groups=[0, 1] * 6),
    "trak": by(trak, ridge=1.0),
    "leave_one_out": by(leave_one_out, damping=5.0),
    "newton": lambda problem, outputs: newton(problem, outputs, damping=5.0).predict(np.ones(12)),
    "similarity": by(representation_similarity),
    "tracin": lambda problem, outputs: (
        tracin(problem, outputs, checkpoints=[problem.params], lr=0.1, steps=2).scores
    ),
    "source": lambda problem, outputs: (
        source(problem, outputs, checkpoints=[problem.params], lr=0.1, steps=2, segments=1).scores
    ),
}


class Noisy(nn.Module):
    """Dropout that no list of layers shows."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.o(F.dropout(torch.tanh(self.a(x)), 0.5, training=self.training))


@pytest.mark.parametrize("method", METHODS)
def test_noise_in_a_forward_pass(method):
    problem = Problem(Noisy(), cross_entropy, (X, Y), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"without random numbers.*call model.eval"):
        METHODS[method](problem, OUTPUTS)
    problem.model.eval()
    assert np.isfinite(METHODS[method](problem, OUTPUTS)).all()


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_see_one_another(method):
    def token_mean(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2]
        return losses * len(losses) / batch[2].sum()

    tokens = torch.arange(12) + 1.0
    problem = Problem(nn.Linear(4, 3), token_mean, (X, Y, tokens), weight_decay=0.1)
    with pytest.raises(ValueError, match="does not depend on the other rows"):
        METHODS[method](problem, OUTPUTS)
    train(problem, Recipe(SGD(0.1), 4, 1))  # a batch may be one


def test_statistics_of_a_batch_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match="batch norm without running statistics in '0'"):
        influence(Problem(model, cross_entropy, (X, Y), weight_decay=0.1), OUTPUTS)


def test_buffers_that_change_are_put_back():
    model = nn.Sequential(
        nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(), nn.Linear(12, 3)
    )
    before = model[0].running_var.clone()
    x = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(0))
    problem = Problem(model, cross_entropy, (x, Y), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"leaves buffers alone.*0.running_var"):
        influence(problem, Outputs(cross_entropy, (x, Y)))
    assert torch.equal(model[0].running_var, before)


def test_embeddings_that_count_their_batch():
    model = nn.Sequential(
        nn.Embedding(3, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3)
    )
    problem = Problem(model, cross_entropy, (torch.arange(24).reshape(12, 2) % 3, Y))
    for act in (
        lambda: influence(problem, OUTPUTS),
        lambda: train(problem, Recipe(SGD(0.1), 4, 1)),
    ):
        with pytest.raises(ValueError, match="scale_grad_by_freq=True in '0'"):
            act()


@pytest.mark.parametrize("kind", ["mlp", "gpt2", "llama"])
def test_sound_models_pass_in_any_precision(kind):
    problem = getattr(menagerie, kind)()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = problem.model.to(dtype)
        columns = problem.train[range(problem.n)]
        if isinstance(columns, tuple):
            columns = (columns[0].to(dtype), columns[1])
        found = directional(Problem(model, problem.loss, columns), _ones(model))
        assert torch.isfinite(found).all()


def _ones(model):
    return torch.ones(1, sum(p.numel() for p in model.parameters() if p.requires_grad))


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # of torch's vmap, before it fails
def test_packed_sequences_have_gradients():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.r, self.o = (
                nn.Embedding(9, 4),
                nn.GRU(4, 5, batch_first=True),
                nn.Linear(5, 3),
            )

        def forward(self, t):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.e(t), (t != 0).sum(1), batch_first=True, enforce_sorted=False
            )
            return self.o(self.r(packed)[1][0])

    words = torch.randint(1, 9, (12, 5), generator=torch.Generator().manual_seed(0))
    words[3, 3:] = 0
    problem = Problem(Recurrent().double(), cross_entropy, (words, Y), weight_decay=0.1)
    v = torch.randn(_ones(problem.model).shape, generator=torch.Generator().manual_seed(1)).double()
    found = directional(problem, v)
    for i in range(12):
        loss = cross_entropy(problem.model, (words[i : i + 1], Y[i : i + 1])).sum()
        gradient = torch.autograd.grad(loss, list(problem.model.parameters()))
        expected = torch.cat([g.flatten() for g in gradient]) @ v[0]
        torch.testing.assert_close(found[i, 0], expected, rtol=1e-12, atol=1e-12)
    outputs = Outputs(cross_entropy, (words, Y)).mean()
    assert np.isfinite(influence(problem, outputs, curvature="diagonal").scores).all()
    with pytest.warns(DiagonalWarning, match="weight_hh_l0"):
        assert np.isfinite(influence(problem, outputs, curvature="ekfac", refine=0).scores).all()
    assert np.isfinite(trak(problem, outputs, ridge=1.0).scores).all()


def test_layers_that_need_more_than_their_input():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x, cond=None):
            return x * self.weight + cond.sum(-1, keepdim=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.o = Conditioned(), nn.Linear(4, 3)

        def forward(self, x):
            return self.o(self.l(x, cond=x))

    problem = Problem(Model(), cross_entropy, (X, Y))
    auto, rows = (directional(problem, torch.eye(19), engine=e) for e in ("auto", "rows"))
    torch.testing.assert_close(auto, rows)


def test_outputs_that_lose_their_rows_are_named():
    def squeezed(model, batch):
        return model(batch[0]).squeeze()

    problem = Problem(nn.Linear(4, 1), lambda m, b: m(b[0])[:, 0] ** 2, (X, Y), weight_decay=0.1)
    many = Outputs(squeezed, (torch.randn(40, 4, generator=torch.Generator().manual_seed(0)),))
    with pytest.raises(ValueError, match=r"expected one (value|output) (for each|per) row"):
        influence(problem, many)


def test_groups_of_a_bfloat16_model():
    model = nn.Linear(4, 3).bfloat16()
    outputs = Outputs(cross_entropy, (X.bfloat16(), Y))
    problem = Problem(model, cross_entropy, (X.bfloat16(), Y), weight_decay=0.1)
    by_group = influence(problem, outputs, groups=[0, 1] * 6).scores
    rows = influence(problem, outputs).scores
    sums = np.stack([rows[::2].sum(0), rows[1::2].sum(0)])
    np.testing.assert_allclose(by_group, sums, atol=0.05 * np.abs(sums).max())  # 8 bits a product
    assert group_directional(problem, torch.ones(1, 15), [0, 1] * 6)[1].dtype == torch.float32


def test_a_run_at_weights_of_zero():
    problem = Problem(nn.Linear(4, 3), cross_entropy, (X, Y), weight_decay=0.1)
    run = train(problem, Recipe(SGD(0.1), 4, 1), np.zeros(12))
    f = influence(run, OUTPUTS, damping=0.0)
    # no curvature but the decay's: scores are −⟨∇f, ∇ℓ⟩ / (n decay)
    straight = influence(run, OUTPUTS, curvature="identity", damping=0.0)
    np.testing.assert_allclose(f.scores, straight.scores, rtol=1e-4)


def test_weights_of_nan_are_named():
    problem = Problem(nn.Linear(4, 3), cross_entropy, (X, Y), weight_decay=0.1)
    w = np.ones(12)
    w[3] = np.nan
    for method in (influence, leave_one_out, trak):
        with pytest.raises(ValueError, match=r"finite weights >= 0, got \[nan\] for rows \[3\]"):
            method(problem, OUTPUTS, weights=w)


def test_a_model_of_two_precisions_casts_for_itself():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(4, 4).double(), nn.Linear(4, 3)

        def forward(self, x):
            return self.o(self.a(x).float())

    problem = Problem(Both(), cross_entropy, (X.double(), Y), weight_decay=0.1)
    outputs = Outputs(cross_entropy, (X.double(), Y)).mean()
    assert np.isfinite(influence(problem, outputs).scores).all()
    assert np.isfinite(magic(train(problem, Recipe(SGD(0.1), 4, 1)), outputs).scores).all()


def test_the_last_layer_is_none_that_holds_others():
    class Placed(nn.Module):
        """Positions of its own around its layers, as in a ViT."""

        def __init__(self):
            super().__init__()
            self.pos, self.a, self.o = (
                nn.Parameter(torch.zeros(6)),
                nn.Linear(4, 6),
                nn.Linear(6, 3),
            )

        def forward(self, x):
            return self.o(torch.tanh(self.a(x) + self.pos))

    problem = Problem(Placed(), cross_entropy, (X, Y))
    found, named = (representation_similarity(problem, OUTPUTS, layer=at) for at in (None, "o"))
    np.testing.assert_array_equal(found.scores, named.scores)


def test_modes_that_change_after_the_first_call():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    for problem in (
        Problem(model, cross_entropy, (X, Y)), Problem(Noisy().eval(), cross_entropy, (X, Y)),
    ):  # fmt: skip
        group_directional(problem, _ones(problem.model), [0, 1] * 6)
        problem.model.train()
        with pytest.raises(ValueError, match="dropout"):
            group_directional(problem, _ones(problem.model), [0, 1] * 6)


def test_tables_that_a_first_pass_makes_are_no_change():
    class Cached(nn.Module):
        def __init__(self, grows):
            super().__init__()
            self.o, self.grows = nn.Linear(4, 3), grows
            self.register_buffer("unknown", torch.tensor([torch.nan]))
            if grows:
                self.register_buffer("table", torch.zeros(0))

        def forward(self, x):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.ones(4))
            if len(self.table) < 4:
                self.table = torch.ones(4)
            return self.o(x * self.table)

    for grows in (False, True):
        problem = Problem(Cached(grows), cross_entropy, (X, Y))
        assert torch.isfinite(directional(problem, _ones(problem.model))).all()


def test_small_differences_of_large_numbers_are_no_mixing():
    x = 300 * X
    with torch.no_grad():
        model = nn.Linear(4, 1)
        model.weight.mul_(1e3)
        y = (model.double()(x.double()) + 1).float()
    model = model.float()

    def off(model, batch):
        return 0.5 * (model(batch[0]) - batch[1])[:, 0] ** 2

    assert torch.isfinite(directional(Problem(model, off, (x, y)), _ones(model))).all()


def test_models_without_trained_parameters_are_evaluated_in_their_own_precision():
    model = nn.Linear(4, 3).requires_grad_(False)

    def cast(model, batch):
        return F.cross_entropy(model(batch[0].float()), batch[1], reduction="none")

    found = Outputs(cast, (X.double(), Y)).evaluate(model)
    torch.testing.assert_close(found, OUTPUTS.evaluate(model))


def test_weights_in_a_list_are_seen_where_data_are_cast():
    def cast(model, batch):
        return F.cross_entropy(model(batch[0].float()), batch[1], reduction="none")

    problem = Problem(HandTied(), cast, (X.double(), Y))
    with pytest.raises(ValueError, match=r"another gradient for 'e.weight'"):
        directional(problem, _ones(problem.model))


def test_data_that_draw_are_not_taken_for_a_model_that_does():
    class Drawing:
        def __len__(self):
            return 12

        def __getitem__(self, rows):
            torch.rand(1)
            return X[rows], Y[rows]

    problem = Problem(nn.Linear(4, 3), cross_entropy, Drawing())
    assert torch.isfinite(directional(problem, _ones(problem.model))).all()


def test_a_problem_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(soundness, "refuse_hidden_parameters", lambda *_, **__: tried.append(1))
    problem = Problem(nn.Linear(4, 3), cross_entropy, (X, Y))
    for _ in range(3):
        directional(problem, _ones(problem.model))
    assert tried == [1]


def test_rows_of_a_function_of_the_old_kind_that_are_constant():
    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    def masked(model, batch):
        if (batch[1] == 0).all():
            return torch.zeros(len(batch[1]))
        return torch.where(batch[1] == 0, 0.0, Old.apply(model(batch[0]))[:, 0])

    model = nn.Linear(4, 1)
    found = directional(Problem(model, masked, (X, Y)), torch.eye(5), engine="rows")
    expected = torch.where((Y == 0)[:, None], 0.0, 2 * torch.cat([X, torch.ones(12, 1)], 1))
    torch.testing.assert_close(found, expected)


class Detached(nn.Module):
    """A norm that is detached, as DoRA's are."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h / h.norm(dim=1, keepdim=True).detach())


class Through(nn.Module):
    """Rounded straight through."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        z = self.body(x)
        return z + (torch.round(4 * z) / 4 - z).detach()


@pytest.mark.parametrize("model", [Detached, Through])
@pytest.mark.parametrize("double", [False, True])
def test_metagradients_of_a_loss_whose_slopes_are_others(model, double):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model().double() if double else model()
    problem = Problem(made, cross_entropy, (X.double() if double else X, Y))
    run = train(problem, Recipe(SGD(0.1), 4, 2))
    outputs = Outputs(cross_entropy, problem.train.columns).mean()
    with pytest.warns(MetagradientWarning, match="other slopes than autograd says"):
        magic(run, outputs)


@pytest.mark.parametrize("name", [*menagerie.ARCHITECTURES, *menagerie.ODD])
def test_slopes_of_other_models_are_their_own(name):
    assert not stopped({**menagerie.ARCHITECTURES, **menagerie.ODD}[name]())


def test_embeddings_that_change_as_they_are_looked_up():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 3))
    before = model[0].weight.clone()
    problem = Problem(model, cross_entropy, (torch.arange(24).reshape(12, 2) % 9, Y))
    for act in (
        lambda: directional(problem, _ones(model)),
        lambda: train(problem, Recipe(SGD(0.1), 4, 1)),
    ):
        with pytest.raises(ValueError, match="max_norm=1 in '0'; renormalise"):
            act()
    assert torch.equal(model[0].weight, before)


def centred(model, batch):
    z = model(batch[0])[:, 0]
    return z - z.mean()


def test_outputs_that_depend_on_the_other_rows_of_a_batch_are_refused():
    """Stacked they were others than one by one: batches of 256 rows, or of 32."""
    problem = menagerie.softmax(12)
    run = train(problem, Recipe(SGD(0.1), 4, 1))
    told = "an output for each row that does not depend on the other rows"
    for outputs in (Outputs(centred, problem.train), Outputs(centred, problem.train).mean()):
        for stack in ("auto", 1):
            with pytest.raises(ValueError, match=told):
                retrain(problem, run.recipe, outputs, np.ones((6, 12)), seeds=1, stack=stack)
        for method in (influence, magic):
            with pytest.raises(ValueError, match=told):
                method(run, outputs)
        with pytest.raises(ValueError, match=told):
            magic(run, outputs, groups=[0, 1] * 6, mode="forward")


class Centring(nn.Linear):
    """Takes the mean over the batch away, if told to."""

    def __init__(self, on):
        super().__init__(4, 3)
        self.on = on
        nn.init.eye_(self.weight)

    def forward(self, x):
        z = super().forward(x)
        return z - z.mean(0) if self.on else z


@pytest.mark.parametrize("other", [lambda: nn.Linear(4, 3), lambda: Centring(on=False)])
def test_outputs_are_tried_with_every_kind_of_model(other):
    """Of a kind that was found to keep rows apart, once: a run's model is a new copy at each call."""
    seen = []

    def counted(model, batch):
        seen.append(len(batch[0]))
        return margin(model, batch)

    data, recipe = (10 * X, Y), Recipe(SGD(0.1), 4, 1)
    outputs = Outputs(counted, data)
    sound, mixing = (Problem(m, cross_entropy, data) for m in (other(), Centring(on=True)))
    run = train(sound, recipe)
    for _ in range(2):
        passed = len(seen)
        refuse_mixed_outputs(run.model, outputs)
    assert passed
    assert len(seen) == passed
    for act in (
        lambda: retrain(mixing, recipe, outputs, np.ones((1, 12)), seeds=1),
        lambda: magic(train(mixing, recipe), outputs),
    ):
        with pytest.raises(ValueError, match="does not depend on the other rows"):
            act()


def less_mean(z, off):
    return z - off * z.mean(0)


class Told(nn.Linear):
    """Does to its outputs what a function, a number in a dict or one in a tensor tells."""

    def __init__(self, how):
        super().__init__(4, 3)
        self.how = how
        nn.init.eye_(self.weight)

    def forward(self, x):
        z, how = super().forward(x), self.how
        how = how[0] if isinstance(how, list) else how
        if callable(how):
            return how(z)
        return less_mean(z, float(how["off"] if isinstance(how, dict) else how))


@pytest.mark.parametrize(
    ("keeping", "mixing"),
    [
        (lambda z: z, lambda z: z - z.mean(0)),
        (partial(less_mean, off=0.0), partial(less_mean, off=1.0)),
        ({"off": 0.0}, {"off": 1.0}),
        (torch.tensor(0.0), torch.tensor(1.0)),
        ([{"off": torch.zeros(1)}], [{"off": torch.ones(1)}]),
    ],
)
def test_models_that_differ_in_an_attribute_are_of_two_kinds(keeping, mixing):
    """Those that mix rows were accepted after the others; copies of one model are of one kind."""
    one, other = Told(keeping), Told(mixing)
    assert _kind(one) != _kind(other)
    assert _kind(one) == _kind(copy.deepcopy(one)) == _kind(Told(keeping).eval())
    outputs = Outputs(margin, (10 * X, Y))
    refuse_mixed_outputs(Told(keeping), outputs)
    with pytest.raises(ValueError, match="does not depend on the other rows"):
        refuse_mixed_outputs(Told(mixing), outputs)


def test_a_model_that_holds_an_attribute_in_itself_has_a_kind():
    model = Told({})
    model.how["again"] = model.how
    assert _kind(model) == _kind(copy.deepcopy(model))


def test_outputs_of_batch_norm_without_statistics_are_refused():
    """Of a row alone they may not exist, and beside other rows differ little."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    problem = Problem(nn.Sequential(norm, nn.Linear(4, 3)), cross_entropy, (X, Y))
    run = train(problem, Recipe(SGD(0.1), 4, 1))  # of its own batches it is one
    batch = problem.train[list(range(4))]
    four, three = (run.outputs(Outputs(margin, tuple(c[:k] for c in batch))) for k in (4, 3))
    assert abs(four[0] - three[0]) > 1e-2
    for act in (
        lambda: magic(run, OUTPUTS),
        lambda: magic(run, OUTPUTS, groups=[0, 1] * 6, mode="forward"),
        lambda: retrain(problem, run.recipe, OUTPUTS, np.ones((2, 12)), seeds=1),
    ):
        with pytest.raises(ValueError, match=r"without running statistics in '0'.*of outputs"):
            act()
    assert norm.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True])
def test_rounding_by_batch_size_is_no_dependence(dtype, inside):
    """Deep nets whose rows are rounded anew in batches of other sizes, as other kernels do: 2 % of the output."""
    generator = torch.Generator().manual_seed(0)

    def rounded(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            z = model(batch[0])
        noise = torch.finfo(torch.bfloat16).eps * torch.randn(z.shape, generator=generator)
        return (z * (1 + (noise if inside else 0))).sum(1)

    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 5)).to(dtype)
    for seed in range(5):
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        refuse_mixed_outputs(model, Outputs(rounded, (x,)))


class Restless(torch.utils.data.Dataset):
    """Data that answer the same rows in another way each time."""

    def __init__(self, kind):
        self.kind, self.generator = kind, torch.Generator().manual_seed(0)

    def __len__(self):
        return len(X)

    def __getitem__(self, rows):
        rows = torch.as_tensor(rows)
        if self.kind == "shuffled":
            rows = rows[torch.randperm(len(rows), generator=self.generator)]
            return X[rows], Y[rows]
        return X[rows] + 0.1 * torch.randn(len(rows), 4, generator=self.generator), Y[rows]


@pytest.mark.parametrize("kind", ["shuffled", "jittered"])
def test_data_that_give_other_rows_each_time_are_refused(kind):
    """By methods as training data, by trainings, and as targets: scores would be those of other rows."""
    model, recipe = nn.Linear(4, 3), Recipe(SGD(0.1), 4, 1)
    sound, restless = (Problem(model, cross_entropy, data) for data in ((X, Y), Restless(kind)))
    targets = Outputs(cross_entropy, Restless(kind))
    for act in (
        lambda: influence(restless, OUTPUTS, damping=0.1),
        lambda: train(restless, recipe),
        lambda: influence(sound, targets, damping=0.1),
        lambda: retrain(sound, recipe, targets, np.ones((1, 12)), seeds=1),
    ):
        with pytest.raises(ValueError, match="the same rows every time"):
            act()


def test_rows_padded_to_the_longest_of_their_batch_are_the_same_rows():
    class Padded(torch.utils.data.Dataset):
        def __init__(self, by_batch):
            self.by_batch = by_batch

        def __len__(self):
            return 6

        def __getitem__(self, rows):
            longest = max(rows) + 1
            x = torch.stack([torch.arange(longest) * (torch.arange(longest) <= i) for i in rows])
            return x.float() + self.by_batch * len(rows), torch.zeros(len(rows), dtype=torch.long)

    soundness.refuse_restless(Padded(0), np.array([1, 5, 2]))
    with pytest.raises(ValueError, match="row 5 alone other than beside 2 more in column 0"):
        soundness.refuse_restless(Padded(1), np.array([5, 1, 2]))
    soundness.refuse_restless(as_data((torch.tensor([[torch.nan], [1.0]]),)), np.array([0, 1]))


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_outputs_that_are_no_floating_numbers(dtype, stack):
    """Right or wrong by row: as the same in float64, digit by digit; and one that compares rows is refused."""

    def right(kind):
        return Outputs(lambda m, b: (m(b[0]).argmax(1) == b[1]).to(kind), (X, Y)).mean()

    model = menagerie.seeded(nn.Linear)(4, 3)
    problem, recipe = Problem(model, cross_entropy, (X, Y)), Recipe(SGD(0.5), 4, 2)
    weights = np.ones((2, 12))
    weights[1, :6] = 0
    found, expected = (
        retrain(problem, recipe, right(kind), weights, seeds=1, stack=stack).outputs
        for kind in (dtype, torch.float64)
    )
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.mean() < 1

    mixing = Outputs(lambda m, b: (m(b[0])[:, 0] > m(b[0])[:, 0].mean()).to(dtype), (X, Y))
    with pytest.raises(ValueError, match="does not depend on the other rows"):
        retrain(problem, recipe, mixing, weights, seeds=1, stack=stack)


def test_columns_that_are_no_rows_are_not_compared():
    """A temperature for the whole batch, and a sparse column."""

    class Warm(torch.utils.data.Dataset):
        def __init__(self, make):
            self.make = make

        def __len__(self):
            return len(X)

        def __getitem__(self, rows):
            return X[rows], self.make(rows), Y[rows]

    for make in (lambda rows: torch.tensor(2.0), lambda rows: X[rows].to_sparse()):
        soundness.refuse_restless(Warm(make), np.arange(4))
    for make in (lambda rows: torch.rand(()), lambda rows: torch.rand(3)):
        with pytest.raises(ValueError, match="the second time"):
            soundness.refuse_restless(Warm(make), np.arange(4))
    centred = Warm(lambda rows: X[rows] - X[rows].mean(0))
    with pytest.raises(ValueError, match="row 0 alone other than beside 3 more in column 1"):
        soundness.refuse_restless(centred, np.arange(4))


@pytest.mark.parametrize("method", ["influence", "trak"])
def test_inference_mode_changes_nothing(method):
    """More than 32 outputs, which are differentiated together."""
    generator = torch.Generator().manual_seed(0)
    outputs = Outputs(
        cross_entropy, (torch.randn(40, 4, generator=generator), torch.arange(40) % 3)
    )
    problem = Problem(menagerie.seeded(nn.Linear)(4, 3), cross_entropy, (X, Y))
    expected = METHODS[method](problem, outputs)
    with torch.inference_mode():
        found = METHODS[method](problem, outputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)  # float32
