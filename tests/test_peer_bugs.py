"""What went wrong in other libraries, or for their users: one test each, named after it.

Numbers are the issue threads of the library named. Bugs of EK-FAC alone stand in tests/test_ekfac.py.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attribution_core import (
    SGD,
    LinearDatamodel,
    Outputs,
    Problem,
    Recipe,
    causal_lm_loss,
    cross_entropy,
    influence,
    margin,
    source,
    tracin,
    train,
    trak,
)
from attribution_core.curvature import DiagonalWarning
from attribution_core.data import Rows
from tests import menagerie

RECIPE = Recipe(SGD(0.1), batch_size=4, epochs=2)


def run(problem):
    return train(problem, RECIPE, checkpoints=2)


def few(problem, function=None):
    """The first rows of the training data as targets."""
    return Outputs(function or problem.loss, problem.train[list(range(3))])


METHODS = {
    "gauss_newton": lambda r, o: influence(r, o, curvature="gauss_newton"),
    "ekfac": lambda r, o: influence(r, o, curvature="ekfac"),
    "diagonal": lambda r, o: influence(r, o, curvature="diagonal"),
    "identity": lambda r, o: influence(r, o, curvature="identity"),
    "trak": lambda r, o: trak(r, o),
    "tracin": lambda r, o: tracin(r, o),
    "source": lambda r, o: source(r, o, segments=2),
}


# --- silent NaN and zeros --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [4, 20, 40])
def test_trak_71_more_dimensions_than_rows_give_finite_scores(dim):
    problem = menagerie.mlp(20)
    f = trak(run(problem), few(problem), projection_dim=dim)
    assert np.isfinite(f.scores).all()
    assert np.abs(f.scores).max() > 0


def test_trak_41_a_singular_kernel_without_a_ridge_is_refused():
    problem = menagerie.mlp(6)
    with pytest.raises(ValueError, match="rank"):
        trak(problem, few(problem), projection_dim=40, ridge=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_trak_24_rows_of_nan_are_named(method):
    problem = menagerie.mlp(12)
    trained = run(problem)
    broken = problem.train[list(range(12))]
    broken[0][7, 1] = float("nan")
    again = replace(trained, problem=replace(problem, train=broken))
    with pytest.raises(ValueError, match=r"NaN or infinity .*rows \[7"):
        METHODS[method](again, few(problem))


def test_trak_82_no_projection_is_zero():
    from attribution_core.projection import project

    problem = menagerie.mlp(6)
    for kind in ("factored", "rademacher", "gaussian"):
        assert (project(problem, problem.loss, 5, kind=kind).norm(dim=1) > 0).all()


def test_traker_one_checkpoint_serves_twice():
    """There finalize_features frees the only checkpoint's projection before it is used."""
    problem = menagerie.mlp(12)
    trained = run(problem)
    first, second = (trak(trained, few(problem)).scores for _ in range(2))
    np.testing.assert_array_equal(first, second)


# --- units -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_kronfluence_36_scores_are_in_the_outputs_units(method):
    """Twice the output, twice the scores: nothing rescales them (traker divides by the mean inverse)."""
    problem = menagerie.mlp(12)
    trained = run(problem)

    def twice(model, batch):
        return 2 * margin(model, batch)

    one = METHODS[method](trained, few(problem, margin)).scores
    two = METHODS[method](trained, few(problem, twice)).scores
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)  # CG and sizes stop at other roundings


def test_kronfluence_9_a_copied_example_counts_twice_and_its_scores_do_not_change():
    """Objective (1/n) Σ w_i ℓ_i: two copies at weight 1 are one example at weight 2 of half the n."""
    problem = menagerie.softmax(10)
    x, y = problem.train[list(range(10))]
    doubled = menagerie.refit(replace(problem, train=(torch.cat([x, x]), torch.cat([y, y]))))
    once = menagerie.refit(problem)
    targets = menagerie.unseen(once)
    single, double = (influence(p, targets).scores for p in (once, doubled))
    # of both copies together; 1e-12 optima, and curvatures of at least the weight decay .03
    np.testing.assert_allclose(double[:10] + double[10:], single, rtol=1e-8, atol=1e-10)


def test_kronfluence_44_a_loss_falls_where_its_own_twin_is_trained_on():
    problem = menagerie.refit(menagerie.softmax())
    f = influence(problem, few(problem))
    assert (np.diag(f.scores[:3]) < 0).all()
    assert (np.diag(influence(problem, few(problem, margin)).scores[:3]) > 0).all()


# --- batches and rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dattri_no_result_depends_on_the_batch_size(method):
    """There inverses of single batches are added up."""
    problem = menagerie.mlp(12)
    trained = run(problem)
    call = {
        "trak": lambda b: trak(trained, few(problem), batch_size=b),
        "tracin": lambda b: tracin(trained, few(problem), batch_size=b),
        "source": lambda b: source(trained, few(problem), segments=2, batch_size=b),
    }.get(method, lambda b: influence(trained, few(problem), curvature=method, batch_size=b))
    whole = call(64).scores
    for size in (1, 5):
        np.testing.assert_allclose(call(size).scores, whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", ["gauss_newton", "diagonal", "identity"])
def test_dattri_shuffled_rows_keep_their_scores(method):
    problem = menagerie.mlp(8)
    order = np.random.default_rng(0).permutation(8)
    shuffled = replace(problem, train=Rows(problem.train, order))
    kept = influence(problem, few(problem), curvature=method, damping=0.1).scores
    moved = influence(shuffled, few(problem), curvature=method, damping=0.1).scores
    np.testing.assert_allclose(moved, kept[order], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_dattri_a_loss_averaged_over_the_batch_is_refused(method):
    problem = menagerie.mlp(8)
    trained = run(problem)

    def mean(model, batch):
        return cross_entropy(model, batch).mean()

    with pytest.raises(ValueError, match="reduction='none'"):
        METHODS[method](replace(trained, problem=replace(problem, loss=mean)), few(problem))


def test_trak_53_checkpoints_of_another_model_are_refused():
    problem, other = menagerie.mlp(8), menagerie.softmax(8)
    with pytest.raises(ValueError, match="missing or of other shapes"):
        trak(problem, few(problem), checkpoints=[other.model.state_dict()])


def test_quickstart_of_trak_another_model_in_a_used_folder_is_refused(tmp_path):
    """There, wrong model ids "will silently fail"."""
    problem = menagerie.mlp(8)
    trak(problem, few(problem), folder=tmp_path)
    other = replace(problem, model=menagerie.mlp(8).model)
    with torch.no_grad():
        next(other.model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="another run"):
        trak(other, few(problem), folder=tmp_path)


def test_kronfluence_40_a_second_set_of_targets_takes_no_training_gradients(tmp_path):
    problem = menagerie.mlp(8)
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    trak(problem, few(problem), folder=tmp_path, progress=progress)
    assert seen
    seen.clear()
    other = Outputs(margin, problem.train[[5, 6]])
    again = trak(problem, other, folder=tmp_path, progress=progress)
    assert not seen
    np.testing.assert_allclose(again.scores, trak(problem, other).scores, rtol=1e-5, atol=1e-9)


# --- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dattri_165_every_method_takes_transformers_models(name, method):
    """Conv1D (bergson 254), tied embeddings, padding; causal language models (trak 66)."""
    problem = menagerie.ARCHITECTURES[name]()
    f = METHODS[method](run(problem), few(problem))
    assert f.scores.shape == (6, 3)
    assert f.meta["covered"] == 1.0
    assert (np.diag(f.scores[:3]) < 0).mean() >= 2 / 3  # a twin helps, but for curvature's mixing


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bergson_254_and_277_conv1d_and_biases_as_plain_autograd_sees_them(name):
    problem = menagerie.ARCHITECTURES[name]()
    f = influence(problem, few(problem), curvature="identity")
    g = menagerie.row_gradients(problem)
    expected = -(g @ g[:3].T) / problem.n
    np.testing.assert_allclose(f.scores, expected, rtol=1e-8, atol=1e-12)


class Experts(nn.Module):
    """Two experts fused into one parameter that no layer holds, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        return torch.einsum("be,bi,eio->bo", self.gate(x).softmax(-1), x, self.experts)


def test_bergson_318_fused_experts_are_not_skipped():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = Problem(Experts().double(), cross_entropy, menagerie._vectors(8))
    with pytest.warns(DiagonalWarning, match="'experts'"):
        f = influence(problem, few(problem), curvature="ekfac", damping=1e6)
    # under a large damping EK-FAC is grad-dot over all parameters
    g = menagerie.row_gradients(problem)
    np.testing.assert_allclose(f.scores, -(g @ g[:3].T) / 8 / 1e6, rtol=1e-4, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("method", METHODS)
def test_logix_110_adapters_of_peft(method):
    """LoRA on GPT-2: only the adapters are trained, so only they are attributed to."""
    peft = pytest.importorskip("peft")
    problem = menagerie.gpt2()
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(problem.model, config).double().eval()
    adapted = Problem(model, causal_lm_loss, problem.train)
    assert all("lora" in name for name in adapted.params)
    f = METHODS[method](run(adapted), few(adapted))
    assert np.isfinite(f.scores).all()
    assert 0 < f.meta["covered"] < 0.2
    if method == "identity":
        end = run(adapted)
        g = menagerie.row_gradients(end.trained())
        plain = -(g @ g[:3].T) / 6 / np.mean([v.mean() for v in end.damping.values()])
        np.testing.assert_allclose(f.scores, plain, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_bergson_235_bf16_models_are_near_their_float32_selves(method):
    """bf16 keeps 8 bits: gradients are off by percents, so scores correlate by .98 but not more."""
    problem = menagerie.mlp(12)
    x, y = problem.train[list(range(12))]
    single = Problem(problem.model.float(), cross_entropy, (x.float(), y))
    trained = run(single)
    half = replace(
        trained,
        problem=Problem(copy.deepcopy(single.model).bfloat16(), cross_entropy, (x.bfloat16(), y)),
        params={k: v.bfloat16() for k, v in trained.params.items()},
        checkpoints=tuple(
            replace(c, params={k: v.bfloat16() for k, v in c.params.items()})
            for c in trained.checkpoints
        ),
    )
    whole = METHODS[method](trained, few(single)).scores
    rough = METHODS[method](half, Outputs(cross_entropy, (x[:3].bfloat16(), y[:3]))).scores
    assert np.isfinite(rough).all()
    assert np.corrcoef(whole.ravel(), rough.ravel())[0, 1] > 0.98


def test_bergson_403_dropout_left_on_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    problem = Problem(model, cross_entropy, menagerie._vectors(6))
    with pytest.raises(ValueError, match="active dropout"):
        influence(problem, few(problem))
    model.eval()
    assert isinstance(influence(problem, few(problem), damping=0.1), LinearDatamodel)


def test_curvlinops_92_the_damping_that_was_used_is_told():
    problem = menagerie.mlp(8)
    given = influence(problem, few(problem), damping=0.25)
    assert given.meta["damping"] == pytest.approx(0.25)
    assert influence(problem, few(problem)).meta["damping"] > 0
    assert influence(run(problem), few(problem)).meta["damping"] == pytest.approx(
        np.mean(np.concatenate([v.flatten() for v in run(problem).damping.values()]))
    )


def test_dattri_192_the_same_call_gives_the_same_scores():
    problem = menagerie.mlp(12)
    for method in METHODS.values():
        np.testing.assert_array_equal(
            method(run(problem), few(problem)).scores, method(run(problem), few(problem)).scores
        )


class Scaled(nn.Module):
    """Logits times a learned number without dimensions, as in CLIP."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.layer(x) * self.scale


@pytest.mark.filterwarnings("ignore::attribution_core.curvature.DiagonalWarning")
@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_dimensions_are_attributed_to(method):
    problem = Problem(Scaled().double(), cross_entropy, menagerie._vectors(8))
    f = METHODS[method](run(problem), few(problem))
    assert f.meta["covered"] == 1.0
    assert np.isfinite(f.scores).all()


def test_a_fitted_curvature_is_not_told_its_damping_again():
    from attribution_core import fit_curvature

    problem = menagerie.mlp(8)
    fitted = fit_curvature(problem, "ekfac", damping=0.1)
    again = influence(problem, few(problem), curvature=fitted).scores
    np.testing.assert_array_equal(
        again, influence(problem, few(problem), curvature="ekfac", damping=0.1).scores
    )
    with pytest.raises(ValueError, match="do not give them again"):
        influence(problem, few(problem), curvature=fitted, damping=0.2)
