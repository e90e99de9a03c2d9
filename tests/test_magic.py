"""attribution_core.magic: exact against finite differences of real retraining, whatever the way there."""

import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    Adam,
    AdamW,
    LinearDatamodel,
    MetagradientWarning,
    Outputs,
    Problem,
    Recipe,
    causal_lm_loss,
    cross_entropy,
    magic,
    margin,
    train,
)
from attribution_core.metagradients.walk import told_operation
from attribution_core.safeguards.smoothness import describe
from tests import menagerie

pytestmark = pytest.mark.filterwarnings("ignore::attribution_core.MetagradientWarning")
N = 6
# four-point differences err by h⁴ times a fifth derivative plus 1e-16 / h: below 1e-9 at the best h
EXACT = 1e-8
STEPS = (1e-3, 3e-4, 3e-3, 1e-4, 1e-2, 3e-5)


# --- problems: five models, five ways to train -------------------------------------------------------


@menagerie.seeded
def images(norm):
    """A small convolutional net without kinks; `norm` makes the layer after the first convolution."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm(), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()  # fmt: skip
    x, y = torch.randn(N, 1, 4, 4).double(), torch.randint(0, 3, (N,))
    return Problem(model, cross_entropy, (x, y))


@menagerie.seeded
def language():
    """GPT-2 whose rows also hold a shift of the embeddings, to differentiate by."""
    problem = menagerie.gpt2(N)
    ids = problem.train.columns["input_ids"]
    shift = 0.1 * torch.randn(N, ids.shape[1], 8).double()
    return replace(problem, train={"input_ids": ids, "embedding_shift": shift})


@menagerie.seeded
def dropped():
    """An MLP with dropout in training mode."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    return Problem(model, cross_entropy, (torch.randn(N, 4).double(), torch.randint(0, 3, (N,))))


MODELS = {
    "mlp": menagerie.mlp,
    "conv, group norm": lambda: images(lambda: nn.GroupNorm(2, 4)),
    "conv, batch norm": lambda: images(lambda: nn.BatchNorm2d(4)),
    "gpt2": language,
    "dropout": dropped,
    "weight norm": menagerie.weight_normed,
}
ROOT = 1e-5  # inside Adam's root: the fifth derivative stays small enough for finite differences
RECIPES = {
    "momentum": Recipe(SGD(0.1, 0.9), 3, 5),
    "nesterov": Recipe(SGD(0.1, 0.9, nesterov=True, weight_decay=0.1), 3, 5),
    "adam": Recipe(Adam(0.01, eps_root=ROOT, weight_decay=0.05), 3, 5),
    "adamw": Recipe(AdamW(0.01, eps_root=ROOT, weight_decay=0.3), 3, 5),
    "schedule": Recipe(AdamW(0.02, eps_root=ROOT), 3, 5, schedule="cosine"),
    "clipping": Recipe(SGD(0.1, 0.9), 3, 5, clip=0.4),
}


def setting(model, recipe):
    problem = MODELS[model]()
    return problem, replace(RECIPES[recipe], masks=3 if model == "dropout" else None)


def targets(problem):
    """Outputs on rows that are not the training's own."""
    batch = problem.train[list(range(4))]
    if isinstance(batch, dict):
        moved = {"input_ids": batch["input_ids"].flip(1)}
    else:
        moved = (batch[0] + 0.3, batch[1])
    return Outputs(problem.loss, moved)


def assert_slope(predicted, f):
    """df/dh at 0 by four-point differences equals the prediction, to EXACT of the largest, at one step."""
    size = np.abs(predicted).max()
    assert size > 1e-6
    errors = []
    for h in STEPS:
        found = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
        errors.append(np.abs(found - predicted).max() / size)
        if errors[-1] < EXACT:
            return
    raise AssertionError(f"relative errors {errors} at steps {STEPS}")


@pytest.mark.filterwarnings("ignore::attribution_core.AnchorWarning")  # random weights in domains
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_are_derivatives_of_retraining(model, recipe):
    """By weights, inputs, domains, learning rate and weight decay."""
    problem, how = setting(model, recipe)
    outputs = targets(problem)
    rng = np.random.default_rng(1)
    w = rng.uniform(0.5, 1.5, N)
    run = train(problem, how, w)

    v = rng.standard_normal(N)
    scores = magic(run, outputs).scores
    assert_slope(v @ scores, lambda h: run.again(w + h * v).outputs(outputs).numpy())

    labels = np.array([0, 1, 0, 1, 1, 0])
    by_domain = magic(run, outputs, wrt="domains", groups=labels, mode="forward").scores
    u = np.array([1.0, -0.5])[labels]
    assert_slope(
        np.array([1.0, -0.5]) @ by_domain,
        lambda h: run.again(w + h * u).outputs(outputs).numpy(),
    )

    column = "embedding_shift" if model == "gpt2" else 0
    rows = [4, 1]
    found = magic(run, outputs, wrt="inputs", rows=rows)
    moved = rng.standard_normal(found.anchor.shape)

    def with_inputs(h):
        batch = problem.train[list(range(N))]
        columns = dict(batch) if isinstance(batch, dict) else list(batch)
        columns[column] = columns[column].clone()
        columns[column][rows] += torch.from_numpy(h * moved).reshape(found.meta["shape"])
        other = replace(problem, train=columns if isinstance(columns, dict) else tuple(columns))
        return train(other, how, w).outputs(outputs).numpy()

    assert_slope(moved @ found.scores, with_inputs)

    lr, decay = how.optimizer.lr, how.optimizer.weight_decay or 0.0

    def with_optimizer(h, **changes):
        changed = replace(how, optimizer=replace(how.optimizer, **changes))
        return train(problem, changed, w).outputs(outputs).numpy()

    for mode in ("forward", "reverse"):
        found = magic(run, outputs, wrt="lr", mode=mode)
        assert found.anchor == [lr]
        assert_slope(lr * found.scores[0], lambda h: with_optimizer(h, lr=lr * (1 + h)))
        if decay:
            found = magic(run, outputs, wrt="weight_decay", mode=mode)
            assert_slope(
                decay * found.scores[0], lambda h: with_optimizer(h, weight_decay=decay * (1 + h))
            )


# --- all ways agree ------------------------------------------------------------------------------------

SAME = {"rtol": 1e-10, "atol": 1e-14}  # sums in another order: rounding of 1e-16, grown by training


@cache
def reference(model="mlp", recipe="adamw"):
    problem, how = setting(model, recipe)
    run = train(problem, replace(how, epochs=12))
    outputs = targets(problem)
    return run, outputs, magic(run, outputs).scores


@pytest.mark.parametrize("states", ["all", "sqrt", "auto", 1, 2, 3, 5, 23])
@pytest.mark.parametrize("kept", [0, "all", 4])
def test_schedules_are_equal_bit_by_bit(states, kept):
    run, outputs, scores = reference()
    again = train(run.problem, run.recipe, states=kept)
    np.testing.assert_array_equal(magic(again, outputs, states=states).scores, scores)


@pytest.mark.parametrize("form", ["double", "vmap"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_chunks_of_targets_and_forms_agree(form, size):
    run, outputs, scores = reference()
    found = magic(run, outputs, batch_targets=size, form=form)
    np.testing.assert_allclose(found.scores, scores, **SAME)


@pytest.mark.parametrize("model", ["mlp", "conv, group norm", "gpt2"])
@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_is_one_batch(model, parts):
    run, outputs, scores = reference(model)
    again = train(run.problem, replace(run.recipe, accumulate=parts))
    np.testing.assert_allclose(again.losses, run.losses, **SAME)
    found = magic(again, outputs)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-10, atol=1e-12 * abs(scores).max())
    groups = np.arange(N) % 2
    forward = magic(again, outputs, groups=groups, mode="forward").scores
    expected = np.stack([scores[groups == g].sum(0) for g in (0, 1)])
    np.testing.assert_allclose(forward, expected, rtol=1e-10, atol=1e-12 * abs(scores).max())


@pytest.mark.parametrize("model", MODELS)
def test_forward_equals_reverse(model):
    run, outputs, scores = reference(model)
    groups = np.arange(N) % 3
    one, other = (
        magic(run, outputs, wrt="domains", groups=groups, mode=mode)
        for mode in ("forward", "reverse")
    )
    assert (one.meta["mode"], other.meta["mode"]) == ("forward", "reverse")
    bound = {"rtol": 1e-10, "atol": 1e-12 * abs(scores).max()}
    np.testing.assert_allclose(one.scores, other.scores, **bound)
    np.testing.assert_allclose(
        other.scores, np.stack([scores[groups == g].sum(0) for g in range(3)]), **bound
    )
    np.testing.assert_array_equal(one.ids, [0, 1, 2])
    np.testing.assert_array_equal(one.anchor, np.ones(3))


def test_rows_of_no_domain_are_refused():
    run, outputs, _ = reference("mlp")
    with pytest.raises(ValueError, match=r"label for every example, got none for \[1\]"):
        magic(run, outputs, wrt="domains", groups=["a", float("nan"), *"abab"])


def test_ten_domains_and_a_thousand_targets():
    """Forward mode for all at once, and as many walks back as chunks: the same to 1e-10."""
    x, y = menagerie.digits_arrays()
    x = torch.from_numpy(x).double()
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    problem = Problem(menagerie.seeded(lambda: model)(), cross_entropy, (x[:100], y[:100]))
    run = train(problem, Recipe(AdamW(0.01), 20, 2))
    outputs = Outputs(margin, (x[100:1100], y[100:1100]))
    groups = np.arange(100) % 10
    forward = magic(run, outputs, wrt="domains", groups=groups)
    reverse = magic(run, outputs, wrt="domains", groups=groups, mode="reverse", batch_targets=500)
    assert (forward.meta["mode"], forward.scores.shape) == ("forward", (10, 1000))
    bound = 1e-10 * np.abs(reverse.scores).max()
    np.testing.assert_allclose(forward.scores, reverse.scores, rtol=1e-10, atol=bound)


def test_forward_mode_is_chosen_where_it_is_cheaper():
    run, outputs, _ = reference()
    labels = np.arange(N)
    assert magic(run, outputs, groups=labels % 3).meta["mode"] == "forward"
    assert magic(run, outputs, groups=labels).meta["mode"] == "reverse"
    assert magic(run, outputs.mean(), groups=labels % 2).meta["mode"] == "reverse"


def test_averages_are_averages_of_targets():
    run, outputs, scores = reference()
    found = magic(run, outputs.mean())
    np.testing.assert_allclose(found.scores[:, 0], scores.mean(1), **SAME)
    assert found.targets.tolist() == ["mean"]


# --- units, anchors, windows, segments -----------------------------------------------------------------


def test_the_datamodel_is_the_run_and_its_exposure():
    """At exposure α an example carries its weight α as often: scores are D / α, at the anchor α w."""
    problem, recipe = menagerie.mlp(), Recipe(SGD(0.1, 0.9), 2, 4)
    w = np.array([1, 0.5, 0, 2, 1, 1.0])
    run = train(problem, recipe, w, exposure=0.5)
    outputs = targets(problem)
    f = magic(run, outputs)
    assert isinstance(f, LinearDatamodel)
    np.testing.assert_array_equal(f.anchor, 0.5 * w)
    np.testing.assert_array_equal(f.base, run.outputs(outputs))
    v = np.array([1, -1, 0.5, 0, 2, 1.0])
    assert_slope(0.5 * v @ f.scores, lambda h: _outputs_at(run, w + h * v, outputs))


def _outputs_at(run, w, outputs):
    """Also for weights below 0, which `again` refuses."""
    from attribution_core.training import _descend, steps_of

    steps = steps_of(run.problem, run.recipe, run.order, w)
    return _descend(replace(run, weights=w), steps, 0, 0, iter).outputs(outputs).numpy()


def test_a_window_counts_weights_from_its_step_on():
    run, outputs, scores = reference()
    since = 7
    found = magic(run, outputs, since=since)
    v = np.random.default_rng(2).standard_normal(N)
    assert_slope(
        v @ found.scores, lambda h: run.again(1 + h * v, since=since).outputs(outputs).numpy()
    )
    moved = train(run.problem, run.recipe, 1 + 0.01 * v, since=since)
    np.testing.assert_array_equal(
        moved.outputs(outputs), run.again(1 + 0.01 * v, since=since).outputs(outputs)
    )
    own = magic(train(run.problem, run.recipe, since=since), outputs)
    np.testing.assert_array_equal(own.scores, found.scores)
    assert np.abs(found.scores - scores).max() > 1e-3 * np.abs(scores).max()
    groups = np.arange(N) % 2
    forward = magic(run, outputs, groups=groups, since=since, mode="forward").scores
    np.testing.assert_allclose(
        forward, found.grouped(groups).scores, rtol=1e-10, atol=1e-12 * abs(scores).max()
    )


def test_segments_add_up_and_the_last_is_the_window():
    run, outputs, scores = reference()
    f = magic(run, outputs, segments=4)
    assert f.parts.shape == (4, *scores.shape)
    np.testing.assert_allclose(f.parts.sum(0), scores, **SAME)
    window = magic(run, outputs, since=18).scores
    np.testing.assert_allclose(f.part(3).scores, window, **SAME)
    by_class = f.combine(np.eye(4)[:, :2])
    np.testing.assert_allclose(by_class.parts, f.parts[:, :, :2])
    np.testing.assert_allclose(
        f.grouped(np.arange(N) % 2).parts.sum(0), f.grouped(np.arange(N) % 2).scores
    )


def test_rows_that_were_removed_ride_along_as_shadows():
    """Their scores are derivatives by the weight at which they would join the batches that they ride in."""
    problem = menagerie.mlp()
    w = np.array([1, 1, 0, 1, 1, 0.0])
    run = train(problem, Recipe(SGD(0.1), 2, 4), w, drop="row")
    outputs = targets(problem)
    f = magic(run, outputs)
    assert (f.scores[[2, 5]] != 0).all()
    from attribution_core.metagradients.walk import _shadows

    riding = _shadows(run)
    counts = np.bincount(np.concatenate(riding), minlength=N)
    assert counts.tolist() == [0, 0, 4, 0, 0, 4]  # as often as the others: 4 epochs
    # the same training with the shadows in their batches, the denominator still that of the others
    joined = [np.concatenate(pair) for pair in zip(run.order, riding, strict=True)]

    def loss(model, batch):
        x, y, scale = batch
        return scale * cross_entropy(model, (x, y))

    def at(h):
        # a batch of k rows is divided by k, not by 2: scaled back, which needs the batch's size
        sizes = {len(batch) for batch in joined}
        assert sizes == {3}
        x, y = problem.train.columns
        scaled = Problem(problem.model, loss, (x, y, torch.full((N,), 3 / 2).double()))
        weights = w + h * np.array([0, 0, 1, 0, 0, -0.5])
        recipe = replace(run.recipe, order=joined)
        return _outputs_at(train(scaled, recipe), weights, Outputs(cross_entropy, outputs.data))

    assert_slope(f.scores[2] - 0.5 * f.scores[5], at)


def test_several_runs_are_averaged_with_their_spread():
    problem, recipe = menagerie.mlp(), Recipe(SGD(0.1), 2, 4)
    outputs = targets(problem)
    runs = [train(problem, replace(recipe, seed=s), exposure=0.5) for s in range(3)]
    each = [magic(run, outputs, segments=2) for run in runs]
    f = magic(runs, outputs, segments=2)
    np.testing.assert_array_equal(f.scores, np.mean([g.scores for g in each], axis=0))
    np.testing.assert_array_equal(f.spread, np.std([g.scores for g in each], axis=0, ddof=1))
    np.testing.assert_array_equal(f.parts, np.mean([g.parts for g in each], axis=0))
    assert f.meta["averaged"] == 3
    assert len(f.meta["reproduces"]) == 2
    halves = [
        train(problem, replace(recipe, seed=s), w, drop="row")
        for s, w in enumerate(([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]))
    ]
    mean = magic(halves, outputs)
    np.testing.assert_array_equal(mean.anchor, np.full(N, 0.5))
    x = np.random.default_rng(0).uniform(size=N)
    np.testing.assert_allclose(
        mean.predict(x), np.mean([magic(run, outputs).predict(x) for run in halves], axis=0), **SAME
    )


def test_token_weights_are_inputs():
    """The derivative by a token's weight; over a sequence they sum to the sequence's own."""
    problem = menagerie.gpt2(N)
    ids = problem.train.columns["input_ids"]
    columns = {"input_ids": ids, "token_weights": torch.ones(ids.shape).double()}
    run = train(replace(problem, train=columns), Recipe(AdamW(0.01), 2, 3))
    outputs = Outputs(causal_lm_loss, {"input_ids": ids[:2].flip(1)})
    tokens = magic(run, outputs, wrt="inputs", rows=range(N), column="token_weights")
    whole = magic(run, outputs).scores
    per_row = tokens.scores.reshape(N, ids.shape[1], 2)
    np.testing.assert_allclose(per_row.sum(1), whole, rtol=1e-9, atol=1e-14)
    assert (per_row[:, 0] == 0).all()  # nothing predicts the first token


# --- other carriers of a training: disk, augmentation, sharing ------------------------------------------


def test_runs_and_scores_on_disk(tmp_path):
    run, outputs, scores = reference()
    kept = train(run.problem, run.recipe, states=3, folder=tmp_path / "run")
    assert sorted(kept.states) == sorted(train(run.problem, run.recipe, states=3).states)
    walked = []

    def progress(items):
        walked.append(len(items))
        return items

    for _ in range(2):
        f = magic(
            kept, outputs, states=3, batch_targets=2, folder=tmp_path / "f", progress=progress
        )
        np.testing.assert_array_equal(f.scores, magic(run, outputs, batch_targets=2).scores)
    assert walked == [24, 24]  # two chunks, once
    with pytest.raises(ValueError, match="holds scores of another run"):
        magic(kept, outputs.mean(), folder=tmp_path / "f")
    with pytest.raises(ValueError, match="holds another training"):
        train(run.problem, run.recipe, states=4, folder=tmp_path / "run")
    np.testing.assert_allclose(scores, f.scores, **SAME)


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("attribution_core.disk.run_folder.EVERY", 0.0)
    run, _, _ = reference()

    def killed(steps):
        for step in steps:
            if step == 11:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        train(run.problem, run.recipe, states=5, folder=tmp_path, progress=killed)
    seen = []
    again = train(
        run.problem, run.recipe, states=5, folder=tmp_path,
        progress=lambda steps: [seen.append(s) or s for s in steps],
    )  # fmt: skip
    assert seen == list(range(11, 24))
    assert all(torch.equal(again.params[k], v) for k, v in run.params.items())
    np.testing.assert_array_equal(again.losses, run.losses)
    np.testing.assert_array_equal(again.digests, run.digests)
    assert sorted(again.states) == sorted(train(run.problem, run.recipe, states=5).states)
    assert not list(tmp_path.glob("resume*"))
    with pytest.raises(KeyboardInterrupt):
        train(run.problem, run.recipe, states=5, folder=tmp_path / "b", progress=killed)
    with pytest.raises(ValueError, match="another training under way"):
        train(run.problem, replace(run.recipe, seed=9), states=5, folder=tmp_path / "b")


def test_augmentation_is_part_of_the_step():
    problem = menagerie.mlp()

    def jitter(batch, rows, step):
        x, y = batch
        noise = [np.random.default_rng([row, step]).standard_normal(4) for row in rows]
        return x + 0.1 * torch.from_numpy(np.stack(noise)), y

    run = train(problem, Recipe(SGD(0.1, 0.9), 3, 4, augment=jitter))
    outputs = targets(problem)
    v = np.random.default_rng(0).standard_normal(N)
    assert_slope(
        v @ magic(run, outputs).scores, lambda h: run.again(1 + h * v).outputs(outputs).numpy()
    )
    random = Recipe(
        SGD(0.1), 3, 4, augment=lambda b, r, s: (b[0] + np.random.default_rng().random(), b[1])
    )
    with pytest.raises(ValueError, match="to be a function of its arguments alone"):
        train(problem, random)


# --- refusals and warnings -----------------------------------------------------------------------------


def net(activation, dtype=torch.float64):
    """On 40 points in 4 dimensions."""

    @menagerie.seeded
    def make():
        model = nn.Sequential(nn.Linear(4, 16), activation, nn.Linear(16, 3)).to(dtype)
        x, y = torch.randn(40, 4, dtype=dtype), torch.randint(0, 3, (40,))
        return Problem(model, cross_entropy, (x, y))

    return make()


def test_half_precision_is_refused():
    problem = net(nn.Tanh(), torch.bfloat16)
    run = train(problem, Recipe(SGD(0.1), 10, 2))
    with pytest.raises(
        ValueError, match=r"float32 or float64 throughout, got parameters in .*bfloat16"
    ):
        magic(run, targets(problem))
    problem = net(nn.Tanh(), torch.float32)
    run = train(problem, Recipe(SGD(0.1), 10, 2))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="got autocast"),
    ):
        magic(run, targets(problem))

    def inside(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(model, batch)

    run = train(replace(problem, loss=inside), Recipe(SGD(0.1), 10, 2))
    with pytest.raises(ValueError, match=r"got \w+ in torch.bfloat16"):
        magic(run, targets(problem))


def test_kinks_are_counted_and_told():
    problem = net(nn.ReLU())
    run = train(problem, Recipe(SGD(0.1), 10, 2))
    with pytest.warns(MetagradientWarning, match="100% of the activations .* with kinks"):
        f = magic(run, targets(problem))
    assert f.meta["kinked"] == 1.0
    assert "check" in f.meta
    smooth = net(nn.GELU())
    run = train(smooth, Recipe(SGD(0.1), 10, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MetagradientWarning)
        assert magic(run, targets(smooth)).meta["kinked"] == 0.0


def test_an_unsmooth_recipe_is_told():
    problem = net(nn.Tanh())
    run = train(problem, Recipe(SGD(8.0, 0.9), 10, 20))
    with pytest.warns(MetagradientWarning) as told:
        f = magic(run, targets(problem))
    text = " ".join(str(one.message) for one in told)
    assert "adjoint grew" in text
    assert "do not believe" in text
    assert "it does not hold" in describe(f)


def test_rows_that_no_batch_holds_are_told():
    problem = net(nn.Tanh())
    run = train(problem, Recipe(SGD(0.1), 10, 1), exposure=0.5)
    with pytest.warns(MetagradientWarning, match="20 of 40 rows are in no batch"):
        f = magic(run, targets(problem))
    assert int((f.scores == 0).all(1).sum()) == 20


def test_a_run_hands_out_its_model_with_tied_weights_and_statistics():
    for name in ("gpt2", "conv, batch norm"):
        problem, how = setting(name, "momentum")
        run = train(problem, how)
        held = dict(run.model.state_dict())
        for key, value in {**run.params, **run.buffers}.items():
            assert torch.equal(held[key], value)
        if name == "gpt2":
            assert torch.equal(held["lm_head.weight"], held["transformer.wte.weight"])


def test_masks_are_told():
    problem, how = setting("dropout", "momentum")
    with pytest.warns(MetagradientWarning, match="dropout masks are held fixed"):
        magic(train(problem, how), targets(problem))


def test_a_training_that_cannot_be_repeated_is_refused():
    run, outputs, _ = reference()
    other = replace(run, problem=replace(run.problem, model=menagerie.mlp().model))
    with torch.no_grad():
        next(other.problem.model.parameters()).add_(1e-12)
    with pytest.raises(
        ValueError, match="cannot be repeated: computed again, the state before step 1"
    ):
        magic(replace(other, states={}), outputs)


class Noise(nn.Module):
    def forward(self, x):
        return x + 1e-3 * torch.randn_like(x)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Noise(), "a forward pass without random numbers"), (Counter(), r"changed \['1.calls'\]")],
)
def test_hidden_state_is_refused(layer, message):
    problem = menagerie.mlp()
    model = nn.Sequential(problem.model, layer).double()
    with pytest.raises(ValueError, match=message):
        train(replace(problem, model=model), Recipe(SGD(0.1), 2, 1))


@pytest.mark.parametrize("model", ["conv, batch norm", "dropout"])
def test_what_sees_the_whole_batch_cannot_be_cut(model):
    problem, how = setting(model, "momentum")
    with pytest.raises(ValueError, match="expected a batch that can be cut into parts"):
        train(problem, replace(how, accumulate=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wrt": "pixels"}, "unknown wrt 'pixels'"),
        ({"wrt": "domains"}, "belong to wrt='domains', which needs them"),
        ({"wrt": "lr", "groups": np.zeros(N)}, "belong to wrt='domains'"),
        ({"wrt": "inputs"}, "rows .* belong to wrt='inputs'"),
        ({"rows": [1]}, "rows .* belong to wrt='inputs'"),
        ({"wrt": "inputs", "rows": [1, 1]}, "different rows of 0 to 5"),
        ({"wrt": "inputs", "rows": [1], "column": 1}, r"floating numbers .* one of \[0\], got 1"),
        ({"since": 24}, "a step of 0 to 23"),
        ({"segments": 30}, "1 to 24 segments"),
        ({"mode": "backward"}, "unknown mode 'backward'"),
        ({"mode": "forward"}, "forward mode takes few directions"),
        ({"form": "hand"}, "unknown form 'hand'"),
        ({"states": "some"}, "states 'auto', 'all', 'sqrt' or a number, got 'some'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    run, outputs, _ = reference()
    with pytest.raises(ValueError, match=message):
        magic(run, outputs, **arguments)


class Bag(nn.Module):
    """A layer that torch differentiates once."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.EmbeddingBag(5, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, ids):
        return self.out(self.words(ids))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_an_operation_without_a_second_derivative_is_named(mode):
    ids, y = torch.arange(3 * N).reshape(N, 3) % 5, torch.arange(N) % 3
    run = train(Problem(Bag().double(), cross_entropy, (ids, y)), Recipe(SGD(0.1), 3, 1))
    told = "got _embedding_bag_backward, which has no second derivative; write that layer in plain"
    with pytest.raises(ValueError, match=told) as raised:
        magic(run, Outputs(margin, (ids, y)), groups=[0, 1] * 3, mode=mode)
    assert "attn_implementation" not in str(raised.value)


def test_attention_without_a_second_derivative_is_told_to_be_eager():
    told = r"got _flash_attention_backward, .*attn_implementation"
    with pytest.raises(ValueError, match=told), told_operation():
        raise RuntimeError("derivative for aten::_flash_attention_backward is not implemented")


def test_a_run_without_digests_is_taken_again_to_its_end(tmp_path):
    """Kept in a folder without states; then somebody loads the trained parameters into the initial model."""
    problem = menagerie.mlp(12)
    run = train(problem, Recipe(SGD(0.1), 4, 2), folder=tmp_path)
    outputs = menagerie.unseen(problem)
    magic(run, outputs, check=False)
    problem.model.load_state_dict(run.model.state_dict())
    with pytest.raises(ValueError, match=r"its steps end .* of their norm away"):
        magic(run, outputs, check=False)


def test_a_folder_tells_runs_apart_by_how_they_were_made(tmp_path):
    problem = menagerie.mlp(12)
    outputs, w = menagerie.unseen(problem), np.r_[0.0, np.ones(11)]
    recipe = Recipe(SGD(0.1), 4, 2)
    found = {}
    for drop in ("weight", "row"):
        run = train(problem, recipe, w, drop=drop, states=0)
        fresh = magic(run, outputs, check=False).scores
        try:
            found[drop] = magic(run, outputs, check=False, folder=tmp_path).scores
        except ValueError as error:
            assert "another" in str(error)  # noqa: PT017
        else:
            np.testing.assert_array_equal(found[drop], fresh)
    assert list(found) == ["weight"]


def test_removed_domains_ride_along_in_reverse():
    problem = menagerie.mlp(12)
    w, domains = np.ones(12), np.arange(12) // 4
    w[:4] = 0.0
    run = train(problem, Recipe(SGD(0.1), 4, 2), w, drop="row")
    outputs = menagerie.unseen(problem, rows=8)  # more than domains: forward mode would be quicker
    found = magic(run, outputs, groups=domains, check=False)
    assert found.meta["mode"] == "reverse"
    assert found.scores[0].any()
    with pytest.raises(ValueError, match="forward mode does not see"):
        magic(run, outputs, groups=domains, mode="forward", check=False)


@menagerie.seeded
def test_a_padding_row_that_the_head_moves_is_told():
    class Tied(nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.embed = nn.Embedding(5, 3, padding_idx=0)
            self.head = nn.Linear(3, 5, bias=False)
            if tie:
                self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x).mean(1))

    x, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 5, (6,))
    for tie in (False, True):
        problem = Problem(Tied(tie).double(), cross_entropy, (x, y))
        run = train(problem, Recipe(SGD(0.1), 3, 2))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            magic(run, Outputs(cross_entropy, (x[:2], y[:2])), check=False)
        assert any("padding row of 'embed'" in str(w.message) for w in told) == tie


def test_a_folder_tells_apart_from_when_weights_act(tmp_path):
    problem = menagerie.mlp(12)
    outputs, w = menagerie.unseen(problem), np.r_[0.0, np.ones(11)]
    one, other = (train(problem, Recipe(SGD(0.1), 4, 2), w, since=k, states=0) for k in (0, 3))
    magic(one, outputs, since=4, check=False, folder=tmp_path)
    with pytest.raises(ValueError, match="another"):
        magic(other, outputs, since=4, check=False, folder=tmp_path)


def test_another_end_is_seen_in_forward_mode_too():
    problem = menagerie.mlp(12)
    run = train(problem, Recipe(SGD(0.1), 4, 2), states=0)
    problem.model.load_state_dict(run.model.state_dict())
    with pytest.raises(ValueError, match=r"its steps end .* of their norm away"):
        magic(run, menagerie.unseen(problem), groups=np.arange(12) % 2, mode="forward", check=False)
