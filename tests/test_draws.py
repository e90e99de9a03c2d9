"""attribution_core.second_order.draws: gradients drawn for outputs have the covariance of the loss's Hessian."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attribution_core import Problem, causal_lm_loss, cross_entropy, squared_error
from attribution_core.layerwise import opened
from attribution_core.layerwise.opened import open_output
from attribution_core.second_order.draws import default_draws, draw
from attribution_core.second_order.ekfac import fit_ekfac
from tests import menagerie

# float64 rounding of a root that is formed by eigenvectors
EXACT = {"rtol": 1e-9, "atol": 1e-11}
COPIES = 2000  # rows that are all alike, each with a random stream of its own
WEIGHTS = torch.tensor([0.5, 1.0, 4.0, 0.1]).double()


def token_mean(z, counted=3):
    """Mean over tokens of a softmax loss; of 5 tokens the last are padding. z [b, 5, 4]."""
    nats = F.cross_entropy(z.mT, torch.ones(z.shape[:2], dtype=int), reduction="none")
    return nats[:, :counted].sum(1) / counted


def segmentation(z):
    """Softmax over dim 1 of [b, 4, 2, 3], summed over places."""
    y = torch.arange(6).reshape(1, 2, 3).expand(len(z), 2, 3) % 4
    return F.cross_entropy(z, y, reduction="none").sum((1, 2))


def classes(z, **settings):
    return F.cross_entropy(z, torch.full((len(z),), 2), reduction="none", **settings)


def binary(z):
    """Logistic losses of every output, label 1."""
    return F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="none").flatten(1).sum(1)  # fmt: skip


def coupled(z):
    """½ (Σ z)²: a Hessian of ones."""
    return 0.5 * z.sum(1) ** 2


LOSSES = {
    "softmax": (classes, (4,)),
    "softmax of many": (classes, (100,)),
    "class weights": (lambda z: classes(z, weight=WEIGHTS), (4,)),
    "label smoothing": (lambda z: classes(z, label_smoothing=0.2), (4,)),
    "token mean": (token_mean, (5, 4)),
    "segmentation": (segmentation, (4, 2, 3)),
    "one logit": (binary, (1,)),
    "several logits": (binary, (5,)),
    "many logits": (binary, (100,)),
    "squared error of many": (lambda z: 0.5 * 3.0 * z.square().sum(1), (100,)),
    "coupled": (coupled, (6,)),
}


def output_of(name):
    """One row of outputs, [1, *shape]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn((1, *LOSSES[name][1]), generator=generator).double()


def hessian_of(name, z):
    """D [q, q] at one row, by double backward."""
    loss, shape = LOSSES[name]
    flat = z[0].flatten()
    return torch.autograd.functional.hessian(lambda x: loss(x.reshape(1, *shape))[0], flat)


def drawn(name, z, draws, rows=None, seed=0):
    """[draws, b, q]."""
    loss = LOSSES[name][0]
    rows = np.arange(len(z)) if rows is None else np.asarray(rows)
    found = draw(lambda output: loss(output[0]), [z], rows, draws, seed)
    return torch.stack([d[0].flatten(1) for d in found])


@pytest.mark.parametrize("name", LOSSES)
def test_as_many_draws_as_outputs_are_exact(name):
    z = output_of(name)
    for more in (0, 100):
        d = drawn(name, z, z.numel() + more)
        assert len(d) == z.numel()
        torch.testing.assert_close(d[:, 0].T @ d[:, 0] / len(d), hessian_of(name, z), **EXACT)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "one logit"])
def test_fewer_draws_have_the_hessian_as_their_covariance(name):
    """uᵀ D u for 20 random u: the mean of (d·u)² over 4,000 draws is within four standard errors.

    The draws are fixed by their seed; that 20 of them would all be within four by chance has
    probability .999, and a factor of 3 (a sum over 3 tokens for their mean) is 50 standard errors.
    """
    z = output_of(name)
    d = drawn(name, z.expand(COPIES, *z.shape[1:]), 2).reshape(2 * COPIES, -1)
    u = torch.randn(d.shape[1], 20, generator=torch.Generator().manual_seed(2)).double()
    squares = (d @ u).square()
    error = squares.std(0) / len(d) ** 0.5
    expected = torch.einsum("pk,pq,qk->k", u, hessian_of(name, z), u)
    assert ((squares.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.1 * expected).all()  # so that the bound above is a bound


@pytest.mark.parametrize("name", ["softmax of many", "token mean", "segmentation"])
def test_a_softmax_draws_labels(name):
    """d = √c (p − e_y): in every place all numbers but one are √c p."""
    z = output_of(name)
    p = z.softmax(1 if name == "segmentation" else -1)
    d = drawn(name, z, 1).reshape(z.shape)
    c = 1 / 3 if name == "token mean" else 1.0
    e = (p - d / c**0.5)[0]
    if name == "token mean":
        assert (d[0, 3:] == 0).all()  # padding
        e = e[:3]
    picked = e.movedim(0, -1) if name == "segmentation" else e
    one_hot = F.one_hot(picked.argmax(-1), picked.shape[-1]).double()
    torch.testing.assert_close(picked, one_hot, rtol=0, atol=1e-9)  # rounding of c


def test_a_tensor_without_curvature_draws_nothing():
    z = torch.randn(3, 4).double()
    (only,) = draw(lambda output: output[0].sum(1), [z], np.arange(3), 2)
    assert torch.equal(only[0], torch.zeros_like(z))


def test_the_tensor_that_the_loss_looks_at_is_found_among_others():
    """Others get zeros, whatever their shapes: hidden states, a loss that is one number."""
    z = [torch.tensor(3.0).double(), torch.randn(2, 4).double(), torch.randn(2, 7, 3).double()]
    found = draw(lambda output: classes(output[1]), z, np.arange(2), 4)
    assert [d.shape for d in found[0]] == [x.shape for x in z]
    assert all(not d[0].any() and d[1].any() and not d[2].any() for d in found)


@pytest.mark.parametrize("size", [1, 300])
def test_a_model_that_is_sure_of_itself(size):
    """Float32 at probabilities 1 − 1e-7: D is rounding, yet it is still seen to be a softmax's."""
    z = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    z[:, 3] += 20
    for rows in torch.arange(300).split(size):
        (d,) = draw(lambda output: classes(output[0]), [z[rows]], rows.numpy(), 1)
        p = z[rows].softmax(-1)
        # the label is drawn as 3 in every row, and d = p − e₃; float32 rounds 1 by 6e-8
        expected = p - F.one_hot(torch.full((len(rows),), 3), 100)
        torch.testing.assert_close(d[0], expected, rtol=1e-3, atol=2e-7)


# --- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "token mean", "segmentation", "several logits"])
def test_draws_of_a_row_do_not_depend_on_its_batch(name):
    z = torch.randn((6, *LOSSES[name][1]), generator=torch.Generator().manual_seed(3)).double()
    whole = drawn(name, z, 2)
    for rows in ([4], [5, 0], [1, 2, 3]):
        torch.testing.assert_close(drawn(name, z[rows], 2, rows), whole[:, rows], **EXACT)


def test_rows_seeds_and_draws_differ():
    z = output_of("several logits").expand(3, 5)
    d = drawn("several logits", z, 2)
    everything = [*d.reshape(6, 5), *drawn("several logits", z, 2, seed=1).reshape(6, 5)]
    for k, one in enumerate(everything):
        assert not any(torch.equal(one, other) for other in everything[:k])
    assert torch.equal(d, drawn("several logits", z, 2))
    assert torch.equal(d[:1], drawn("several logits", z, 1))  # more draws go on where fewer ended


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    drawn("softmax", output_of("softmax"), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_number_of_draws_by_default():
    """All outputs up to 16; else 4,096 over all places of all rows, and one at least."""
    assert default_draws(10**6, [torch.zeros(2, 16)]) == 16
    assert default_draws(100, [torch.zeros(2, 17)]) == 41
    assert default_draws(100, [torch.zeros(2, 5, 17)]) == 8
    assert default_draws(10**6, [torch.zeros(2, 100)]) == 1
    assert default_draws(1000, [torch.zeros(()), torch.zeros(2, 20)]) == 4


# --- whole models ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_mean_over_tokens_keeps_its_units(name):
    """E ‖d‖² is the trace of D: T times less for a mean over T tokens than for their sum.

    For the mean D is (diag p − p pᵀ)/T at every token, so its trace is (1/T) Σ_t (1 − Σ p²); 76 draws
    a row are within 4 standard errors of it.
    """
    problem = menagerie.ARCHITECTURES[name]()
    batch = problem.train[list(range(problem.n))]
    output, losses = open_output(problem.model, causal_lm_loss, problem.params, batch)
    z = output[0].detach()
    draws = z[0].numel() - 1  # one more would be exact
    d = torch.stack([one[0] for one in draw(losses, output, np.arange(problem.n), draws)])
    squares = d.square().flatten(2).sum(2)  # [draws, b]
    counted = batch.get("attention_mask", torch.ones(z.shape[:2]))[:, 1:].double()
    spread = 1 - z[:, :-1].softmax(-1).square().sum(-1)
    trace = (spread * counted).sum(1) / counted.sum(1)
    error = squares.std(0) / draws**0.5
    assert ((squares.mean(0) - trace).abs() < 4 * error).all()
    assert (error < 0.05 * trace).all()


def test_ekfac_of_a_token_mean_has_the_trace_of_its_gauss_newton():
    """With draws, not exact; a sum over the 6 tokens for their mean would be 6 times as much."""
    problem = menagerie.gpt2(3)
    exact = fit_ekfac([problem], draws=77).trace
    sampled = fit_ekfac([problem], draws=40).trace
    # 120 draws of a sum over 6 tokens; single draws' squares vary by their own size, so by 10 %
    assert sampled == pytest.approx(exact, rel=0.3)
    assert sampled != exact
    summed = Problem(problem.model, lambda m, b: causal_lm_loss(m, b, tokens=1), problem.train)
    assert fit_ekfac([summed], draws=77).trace == pytest.approx(6 * exact, rel=1e-9)


def test_a_loss_that_calls_the_model_twice_or_never():
    problem = menagerie.mlp()
    for times in (0, 2):

        def loss(model, batch, times=times):
            value = model[0](batch[0]).sum(1)
            return value + sum(model(batch[0]).square().sum(1) for _ in range(times))

        twice = Problem(problem.model, loss, problem.train)
        with pytest.raises(ValueError, match=rf"calls the model once, got {times} calls"):
            fit_ekfac([twice])
        assert fit_ekfac([twice], labels="data").trace > 0  # they need no single output


def test_losses_that_cannot_be_drawn_from():
    z = torch.randn(2, 100).double()
    with pytest.raises(ValueError, match=r"Hessian in the output \(100,\) is .* use labels='data'"):
        draw(lambda output: coupled(output[0]), [z], np.arange(2), 3)
    with pytest.raises(ValueError, match="one output tensor, got one of 2"):
        draw(lambda output: (output[0] * output[1]).sum(1), [z, z], np.arange(2), 3)


@pytest.mark.parametrize("loss", [cross_entropy, squared_error])
def test_models_of_narrow_floats_draw_in_float32(loss):
    """The Hessian is taken in float32; only d itself is rounded to bf16."""
    problem = menagerie.mlp()
    x, y = problem.train.columns
    y = y if loss is cross_entropy else torch.randn(6, 3)
    model = problem.model.bfloat16()
    batch = (x.bfloat16(), y)
    params = dict(model.named_parameters())
    output, losses = open_output(model, loss, params, batch)
    assert output[0].dtype == torch.bfloat16
    found = draw(losses, output, np.arange(6), 3)
    assert {d[0].dtype for d in found} == {torch.bfloat16}
    z = output[0].detach().double()
    p = z.softmax(-1)
    exact = {
        cross_entropy: torch.diag_embed(p) - p[:, :, None] * p[:, None],
        squared_error: torch.eye(3).double().expand(6, 3, 3),
    }[loss]
    d = torch.stack([one[0].double() for one in found], dim=2)
    # bf16 rounds d by 2⁻⁹ of itself, and two of them make the product
    torch.testing.assert_close(d @ d.mT / 3, exact, rtol=0, atol=2 * 2**-9 * 3)


class Weighing(nn.Linear):
    """Holds its classes' weights, and a criterion that holds them; exact in any dtype."""

    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("by", torch.tensor([0.5, 1.0, 4.0]))
        self.criterion = nn.CrossEntropyLoss(weight=self.by.clone(), reduction="none")


def by_buffer(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", weight=model.by)


def by_criterion(model, batch):
    return model.criterion(model(batch[0]), batch[1])


def by_column(model, batch):
    """Of labels that are floats, which are to be of the dtype of the probabilities."""
    nats = F.binary_cross_entropy(model(batch[0]).sigmoid(), batch[2], reduction="none")
    return nats.sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [by_buffer, by_criterion, by_column])
def test_narrow_class_weights_and_labels_meet_outputs_in_float32(loss, dtype):
    """Buffers, of the model or of a part of it, and columns, of which torch asks the output's own dtype."""
    x, y = menagerie.softmax().train.columns
    model, batch = Weighing().to(dtype), (x[:6].to(dtype), y[:6], F.one_hot(y[:6], 3).to(dtype))
    output, losses = open_output(model, loss, dict(model.named_parameters()), batch)
    found = draw(losses, output, np.arange(6), 3)

    z = output[0].detach().double()
    p = z.softmax(-1)
    by = model.by.double()[y[:6], None, None]
    exact = by * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    if loss is by_column:
        exact = torch.diag_embed(z.sigmoid() * (-z).sigmoid())
    d = torch.stack([one[0].double() for one in found], dim=2)
    # bf16 rounds d by 2⁻⁹ of itself, and two of them make the product, of numbers up to 4
    torch.testing.assert_close(d @ d.mT / 3, exact, rtol=0, atol=2 * 2**-9 * 4)
    assert {value.dtype for value in model.buffers()} == {dtype}  # as they were
    assert losses(output).dtype == dtype


def test_what_stands_in_for_the_model_passes_for_it():
    """A loss may read the model's attributes."""
    model = nn.Linear(3, 2)
    model.temperature = 2.0
    given = opened._Given(model, "output")
    assert given.temperature == 2.0
    assert given(1, key=2) == "output"
