"""attribution_core.curvature: products and solves against dense float64 references."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution_core import Outputs, Problem, cross_entropy, influence, leave_one_out
from attribution_core import curvature as core
from attribution_core.curvature import fisher_diagonal, fit_curvature, products, spectrum
from attribution_core.second_order.conjugate import conjugate_gradients
from attribution_core.second_order.ekfac import fit_ekfac
from tests import menagerie

# float64 sums of some hundred terms of size near 1
EXACT = {"rtol": 1e-9, "atol": 1e-10}
NETS = {name: menagerie.ARCHITECTURES[name] for name in ("mlp", "conv")}
SMALL = {**menagerie.CONVEX, **NETS}
ODD = {name: menagerie.ODD[name] for name in ("hand tied", "padding", "frozen", "encoder")}


def some_weights(problem):
    """Weights between 0 and 2, one of them 0."""
    return np.linspace(0, 2, problem.n)


def dense_hessian(problem, weights):
    """(1/n) Σ w_i ∇²ℓ_i by torch.autograd.functional, [p, p]."""
    value = menagerie.objective(replace(problem, weight_decay=0.0), weights)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return torch.autograd.functional.hessian(value, menagerie.flat_params(problem))


def dense_gauss_newton(problem, weights):
    """(1/n) Σ w_i J_iᵀ D_i J_i, one row at a time; the loss must take (model output, label)."""
    flat, total = menagerie.flat_params(problem), 0.0
    for row, w in enumerate(weights):
        batch = problem.train[[row]]

        def output(theta, batch=batch):
            return menagerie.losses_at(
                problem, theta, lambda model, _: model(*batch[:-1])[0], problem.train
            )

        class Constant(nn.Module):
            def __init__(self, value):
                super().__init__()
                self.value = value

            def forward(self, *args):
                return self.value[None]

        def loss(z, batch=batch):
            return problem.loss(Constant(z), batch)[0]

        z = output(flat)
        jacobian = torch.autograd.functional.jacobian(output, flat)
        curved = torch.autograd.functional.hessian(loss, z.detach())
        total = total + w * jacobian.T @ curved @ jacobian
    return total / problem.n


DENSE = {"hessian": dense_hessian, "gauss_newton": dense_gauss_newton}


def identity(problem):
    return torch.eye(len(menagerie.flat_params(problem)), dtype=torch.float64)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("name", [*SMALL, *ODD])
def test_products_equal_a_dense_reference(name, kind):
    problem = {**SMALL, **ODD}[name]()
    w = some_weights(problem)
    expected = DENSE[kind](problem, w)
    for size in (1, 4, 256):
        found = products(problem, kind, identity(problem), w, batch_size=size)
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hessian_products_of_transformers(name):
    """Two directions against a double backward pass over the plain model."""
    problem = menagerie.ARCHITECTURES[name]()
    w = some_weights(problem)
    value = menagerie.objective(problem, w)
    flat = menagerie.flat_params(problem)
    v = torch.randn(2, len(flat), generator=torch.Generator().manual_seed(0)).double()

    with sdpa_kernel(SDPBackend.MATH):
        expected = [torch.autograd.functional.hvp(value, flat, one)[1] for one in v]
    torch.testing.assert_close(products(problem, "hessian", v, w), torch.stack(expected), **EXACT)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gauss_newton_products_of_transformers(name):
    """⟨v, G v⟩ is Σ w_i Var_p(J_i v), summed over tokens, for softmax outputs: D = diag(p) − p pᵀ."""
    problem = menagerie.ARCHITECTURES[name]()
    w = some_weights(problem)
    flat = menagerie.flat_params(problem)
    v = torch.randn(1, len(flat), generator=torch.Generator().manual_seed(0)).double()
    batch = problem.train[list(range(problem.n))]

    def logits(model, batch):
        return model(**batch).logits[:, :-1]

    def at(step):
        return menagerie.losses_at(problem, flat + step * v[0], logits)

    h = 1e-5  # central differences err by h² z'''/6 ~ 1e-9 and by rounding 1e-16 / h = 1e-11
    slope, p = (at(h) - at(-h)) / (2 * h), at(0.0).softmax(-1)
    variance = (p * slope**2).sum(-1) - (p * slope).sum(-1) ** 2
    predicted = batch.get("attention_mask", torch.ones(problem.n, p.shape[1] + 1))[:, 1:].double()
    per_row = (variance * predicted).sum(1) / predicted.sum(1)
    expected = (torch.from_numpy(w) * per_row).sum() / problem.n
    found = (v * products(problem, "gauss_newton", v, w)).sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", menagerie.CONVEX)
def test_gauss_newton_is_the_hessian_of_a_linear_model(name):
    problem = menagerie.CONVEX[name]()
    v, w = identity(problem), some_weights(problem)
    torch.testing.assert_close(
        products(problem, "gauss_newton", v, w), products(problem, "hessian", v, w), **EXACT
    )


@pytest.mark.parametrize("name", [*SMALL, "gpt2"])
def test_diagonal_is_the_mean_squared_gradient(name):
    problem = {**SMALL, **menagerie.ARCHITECTURES}[name]()
    w = some_weights(problem)
    expected = torch.from_numpy(w) @ menagerie.row_gradients(problem).square() / problem.n
    for size in (1, 4, 256):
        torch.testing.assert_close(fisher_diagonal(problem, w, size), expected, **EXACT)


# --- solves ----------------------------------------------------------------------------------


def scaled(problem, weight_decay):
    return replace(problem, weight_decay=weight_decay)


@pytest.mark.parametrize("damping", [0.2, "per parameter"])
@pytest.mark.parametrize("form", ["dense", "cg"])
@pytest.mark.parametrize("name", SMALL)
def test_solves_equal_a_dense_inverse(name, form, damping):
    problem = scaled(SMALL[name](), 0.05)
    w, v = some_weights(problem), identity(problem)
    if damping == "per parameter":
        damping = torch.linspace(0.1, 0.5, len(v), dtype=torch.float64)
    added = torch.as_tensor(damping, dtype=torch.float64).expand(len(v))
    shifted = dense_gauss_newton(problem, w) + torch.diag(0.05 + added)
    fitted = fit_curvature(problem, weights=w, damping=damping, form=form, tolerance=1e-13)
    assert fitted.meta["form"] == form
    assert fitted.damping == pytest.approx(float(added.mean()), rel=1e-12)
    # cg leaves a residual of 1e-12, the inverse makes at most 1 / (damping + decay) < 10 of it
    torch.testing.assert_close(fitted.solve(v), torch.linalg.inv(shifted), **EXACT)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", ["diagonal", "hessian", "gauss_newton"])
def test_batch_size_changes_no_solve(kind, size):
    problem = scaled(menagerie.softmax(), 0.05)
    v = identity(problem)
    whole, small = (fit_curvature(problem, kind, batch_size=b).solve(v) for b in (256, size))
    torch.testing.assert_close(small, whole, rtol=1e-10, atol=1e-10)


def test_diagonal_solve():
    problem = scaled(menagerie.mlp(), 0.05)
    v = identity(problem)
    expected = 1 / (fisher_diagonal(problem, np.ones(problem.n)) + 0.05 + 0.3)
    solved = fit_curvature(problem, "diagonal", damping=0.3).solve(v)
    torch.testing.assert_close(solved, torch.diag(expected), **EXACT)


@pytest.mark.parametrize(("decay", "damping"), [(0.05, 0.3), (0.0, 0.3), (0.05, None)])
def test_identity_solve_divides_by_decay_and_damping(decay, damping):
    problem = scaled(menagerie.mlp(), decay)
    v = identity(problem)
    solved = fit_curvature(problem, "identity", damping=damping).solve(v)
    torch.testing.assert_close(solved, v / (decay + (damping or 0.0)), **EXACT)


def test_identity_solve_without_either_is_the_identity():
    v = identity(menagerie.mlp())
    assert torch.equal(fit_curvature(menagerie.mlp(), "identity").solve(v), v)


@pytest.mark.parametrize("kind", ["identity", "diagonal"])
def test_nothing_to_divide_by(kind):
    """Damping 0 where the curvature has a zero on its diagonal: a parameter no example moves."""
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).double()
    problem = Problem(model, menagerie.squared_error, (x, x[:, :1]))
    with pytest.raises(
        ValueError, match="got a smallest eigenvalue of 0 with weight decay and damp"
    ):
        fit_curvature(problem, kind, damping=0.0)


@pytest.mark.parametrize("kind", ["diagonal", "gauss_newton"])
def test_default_damping_is_a_tenth_of_the_mean_eigenvalue(kind):
    problem = menagerie.mlp()
    w = some_weights(problem)
    mean = {
        "diagonal": lambda: fisher_diagonal(problem, w).mean(),
        "gauss_newton": lambda: dense_gauss_newton(problem, w).trace() / len(identity(problem)),
    }[kind]()
    fitted = fit_curvature(problem, kind, weights=w)
    assert fitted.damping == pytest.approx(0.1 * float(mean), rel=1e-9)


def test_default_damping_without_a_matrix_is_near():
    """Random signs estimate the trace; its standard error is √(2 Σ_{i≠j} H_ij² / probes) / p."""
    problem = menagerie.mlp()
    h = dense_gauss_newton(problem, np.ones(problem.n))
    p = len(h)
    error = 0.1 * float((2 * (h - h.diag().diag()).square().sum() / core.PROBES).sqrt()) / p
    fitted = fit_curvature(problem, form="cg")
    assert abs(fitted.damping - 0.1 * float(h.trace()) / p) < 4 * error


@pytest.mark.parametrize("kind", ["diagonal", "hessian", "gauss_newton"])
def test_no_default_damping_beside_a_weight_decay(kind):
    assert fit_curvature(menagerie.softmax(), kind).damping == pytest.approx(0.0, abs=1e-15)


def test_the_exact_hessian_is_never_damped_by_itself():
    problem = menagerie.ridge()
    v = identity(problem)
    solved = fit_curvature(scaled(problem, 0.0), "hessian").solve(v)
    expected = torch.linalg.inv(dense_hessian(problem, np.ones(problem.n)))
    torch.testing.assert_close(solved, expected, **EXACT)


def test_auto_is_dense_for_few_parameters_and_ekfac_for_many(monkeypatch):
    """A kind that is asked for stays what it is, and is only multiplied with."""
    problem = menagerie.softmax()
    kinds = ("auto", "gauss_newton", "hessian")
    for count, auto in ((len(identity(problem)), "gauss_newton"), (14, "ekfac")):
        monkeypatch.setattr(core, "DENSE", count)
        form = "dense" if auto == "gauss_newton" else "cg"
        metas = [fit_curvature(problem, kind).meta for kind in kinds]
        assert [meta["curvature"] for meta in metas] == [auto, "gauss_newton", "hessian"]
        assert [meta.get("form") for meta in metas[1:]] == [form, form]
        assert metas[0].get("form") == (None if auto == "ekfac" else "dense")


def test_cg_tolerance_by_default_follows_the_precision():
    problem = menagerie.softmax()
    assert fit_curvature(problem, form="cg").meta["tolerance"] == 1e-12
    x, y = problem.train.columns
    single = Problem(problem.model.float(), problem.loss, (x.float(), y), weight_decay=0.05)
    fitted = fit_curvature(single, form="cg")
    assert fitted.meta["tolerance"] == 1e-4
    v = identity(single)
    exact = torch.linalg.inv(
        dense_gauss_newton(menagerie.softmax(), np.ones(single.n)) + 0.05 * torch.eye(len(v))
    )
    # the residual is 1e-4 of v (here 10 times that is allowed), the inverse at most 1/0.05
    assert (fitted.solve(v) - exact).norm(dim=1).max() < 10 * 1e-4 / 0.05


def test_conjugate_gradients_with_a_zero_direction_and_uneven_scales():
    a = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)) + 0.5
    v = torch.tensor([[0.0, 0.0, 0.0], [1e-9, 0, 0], [1e9, 1.0, 1e-3]], dtype=torch.float64)
    x = conjugate_gradients(lambda rows: rows @ a, v, 1e-12, 50)
    assert ((x @ a - v).norm(dim=1) <= 1e-11 * v.norm(dim=1)).all()


# --- between EK-FAC and the exact solve -------------------------------------------------------


def uneven(p, span=4):
    """Dampings that differ by 10^span between parameters, in no order."""
    order = torch.randperm(p, generator=torch.Generator().manual_seed(0))
    return torch.logspace(-span / 2, span / 2, p, dtype=torch.float64)[order]


@pytest.mark.parametrize("name", NETS)
def test_cg_measured_in_dampings_that_differ_by_ten_thousand(name):
    problem = NETS[name]()
    v = identity(problem)
    damping = uneven(len(v))
    shifted = dense_gauss_newton(problem, np.ones(problem.n)) + damping.diag()
    # a residual of 1e-13 |v| is at most 1e-13 / 1e-2 in the solution, whose entries reach 100
    solved = fit_curvature(problem, damping=damping, form="cg", tolerance=1e-13).solve(v)
    torch.testing.assert_close(solved, torch.linalg.inv(shifted), rtol=1e-8, atol=1e-10)


def test_cg_needs_fewer_steps_when_measured_in_the_dampings():
    """H has a rank of 12 here (6 rows, 3 classes), so 13 steps are enough; without, it takes more."""
    problem = menagerie.mlp()
    v = identity(problem)[:5]
    damping = uneven(v.shape[1])
    steps = []

    def counted(items):
        for item in items:
            steps.append(item)
            yield item

    fit_curvature(problem, damping=damping, form="cg", progress=counted).solve(v)
    # 12 + 1 in exact arithmetic, a few more by rounding
    assert len(steps) < 20
    plain = dense_gauss_newton(problem, np.ones(problem.n)) + damping.diag()
    with pytest.raises(ValueError, match="did not converge"):
        conjugate_gradients(lambda rows: rows @ plain, v, 1e-12, 20)


def energy_error(x, exact, shifted):
    """‖x − exact‖ / ‖exact‖ of every row, in the norm of H + damping, which CG makes smaller."""
    off = x - exact
    return ((off @ shifted * off).sum(1) / (exact @ shifted * exact).sum(1)).sqrt()


@pytest.mark.parametrize("damping", [0.05, "per parameter"])
@pytest.mark.parametrize("name", NETS)
def test_refined_ekfac_tends_to_the_exact_solve(name, damping):
    """Each step of conjugate gradients makes the error in energy norm smaller, down to rounding."""
    problem = NETS[name]()
    w, v = some_weights(problem), identity(problem)[::7]
    damping = uneven(v.shape[1], span=2) if damping == "per parameter" else damping
    added = torch.as_tensor(damping, dtype=torch.float64).expand(v.shape[1])
    shifted = dense_gauss_newton(problem, w) + added.diag()
    exact = v @ torch.linalg.inv(shifted)
    counts = (1, 4, 12, 120)
    fits = [fit_curvature(problem, "ekfac", weights=w, damping=damping, refine=k) for k in counts]
    assert tuple(fit.meta["refined"] for fit in fits) == counts
    errors = torch.stack([energy_error(fit.solve(v), exact, shifted) for fit in fits])
    assert (errors[1:] <= errors[:-1] + 1e-12).all()
    # after 4 steps a fraction of what EK-FAC itself errs by; 120 leave rounding
    alone = fit_curvature(problem, "ekfac", weights=w, damping=damping)
    start = energy_error(alone.solve(v), exact, shifted)
    assert errors[1].mean() < 0.5 * start.mean()
    assert errors[-1].max() < 1e-10


def test_refine_0_is_ekfac_alone():
    problem = menagerie.mlp()
    v = identity(problem)
    plain = fit_curvature(problem, "ekfac", damping=0.1)
    assert "refined" not in plain.meta
    h = fit_ekfac([problem], batch_size=256)
    expected = h.solve(v, torch.full((len(v),), 0.1, dtype=torch.float64))
    assert torch.equal(fit_curvature(problem, "ekfac", damping=0.1, refine=0).solve(v), expected)
    assert torch.equal(plain.solve(v), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_refining_for_ever_ends_where_rounding_does(dtype):
    """More steps than there are directions: neither NaN nor an error, in either precision."""
    problem = menagerie.softmax()
    x, y = problem.train.columns
    narrow = Problem(problem.model.to(dtype), problem.loss, (x.to(dtype), y))
    v = identity(problem).to(dtype)
    fit = fit_curvature(narrow, "ekfac", damping=0.1, refine=300)
    exact = torch.linalg.inv(dense_gauss_newton(menagerie.softmax(), np.ones(20)) + 0.1 * identity(problem))  # fmt: skip
    # rounding, times the condition number: eigenvalues reach 1 or so, the damping is .1
    close = {torch.float64: 1e-12, torch.float32: 1e-3}[dtype]
    assert (fit.solve(v).double() - exact).abs().max() < close * exact.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_refine_size_is_one_multiple_of_ekfac(name):
    """An eighth of the damping, times the multiple nearest the exact solve in energy norm."""
    problem = NETS[name]()
    w, v = some_weights(problem), identity(problem)[::5]
    shifted = dense_gauss_newton(problem, w) + 0.05 * identity(problem)
    sized = fit_curvature(problem, "ekfac", weights=w, damping=0.05, refine="size").solve(v)
    rough = fit_curvature(problem, "ekfac", weights=w, damping=core.ALONE * 0.05).solve(v)
    multiple = float((sized * rough).sum() / rough.square().sum())
    torch.testing.assert_close(sized, multiple * rough, **EXACT)
    # the best multiple for all rows by itself; the one found is that of 8 random mixtures of them
    best = float((v * rough).sum() / (rough * (rough @ shifted)).sum())
    assert multiple == pytest.approx(best, rel=0.3)
    assert abs(multiple - 1) > 0.1
    exact = v @ torch.linalg.inv(shifted)
    errors = [energy_error(x, exact, shifted).mean() for x in (sized, rough)]
    assert errors[0] < errors[1]


def test_nothing_to_size():
    v = torch.zeros(2, len(identity(menagerie.mlp())), dtype=torch.float64)
    fit = fit_curvature(menagerie.mlp(), "ekfac", damping=0.1, refine="size")
    assert torch.equal(fit.solve(v), v)


@pytest.mark.parametrize("kind", ["gauss_newton", "diagonal", "identity", "ekfac"])
def test_a_spectrum_is_what_is_solved_with(kind):
    """Of several problems it is the mean, for EK-FAC but for its basis: the traces'."""
    problem = scaled(menagerie.mlp(), 0.0)
    v, w = identity(problem), some_weights(problem)
    h = spectrum(problem, kind, weights=w)
    fit = fit_curvature(problem, kind, weights=w, damping=0.2)
    shift = torch.full((len(v),), 0.2, dtype=torch.float64)
    torch.testing.assert_close(fit.solve(v), h.solve(v, shift), **EXACT)
    torch.testing.assert_close(fit.solve(v), h.apply(v, lambda x: 1 / (x + 0.2)), **EXACT)
    assert fit.spectrum.trace == h.trace == pytest.approx(float(h.apply(v, lambda x: x).trace()), rel=1e-10)  # fmt: skip
    both = spectrum([problem, problem], kind, weights=w)
    torch.testing.assert_close(both.apply(v, lambda x: x), h.apply(v, lambda x: x), **EXACT)


# --- refusals --------------------------------------------------------------------------------


def test_cg_that_has_not_converged():
    fitted = fit_curvature(menagerie.mlp(), form="cg", max_iterations=2)
    with pytest.raises(ValueError, match=r"did not converge: relative residual .* after 2 iter"):
        fitted.solve(identity(menagerie.mlp()))


def test_cg_checks_the_true_residual():
    """A product that drifts by 1e-6 a call fools the recursion, not the check."""
    calls = []

    def drifting(rows):
        calls.append(rows)
        return rows * torch.tensor([1.0, 5.0, 9.0]).double() * (1 + 1e-6 * len(calls))

    with pytest.raises(ValueError, match="did not converge: relative residual"):
        conjugate_gradients(drifting, torch.ones(1, 3).double(), 1e-10, 200)
    assert len(calls) < 200  # the recursion believed itself done


@pytest.mark.parametrize("form", ["dense", "cg"])
def test_a_curvature_that_is_not_positive_definite(form):
    """A concave loss: −½ (x·θ)²."""

    def concave(model, batch):
        return -0.5 * model(batch[0])[:, 0] ** 2

    model = nn.Linear(2, 1, bias=False).double()
    problem = Problem(model, concave, (torch.eye(2).double(),))
    with pytest.raises(ValueError, match=r"expected a positive definite curvature.*gauss_newton"):
        fit_curvature(problem, "hessian", form=form).solve(identity(problem))
    # eigenvalues are −½: half a unit of damping is the border, more of it is definite
    solved = fit_curvature(problem, "hessian", form=form, damping=1.0).solve(identity(problem))
    torch.testing.assert_close(solved, 2 * identity(problem))


def test_a_loss_that_calls_the_model_twice_has_no_gauss_newton():
    def twice(model, batch):
        return (model(batch[0]) - model(-batch[0])).square().sum(1)

    problem = Problem(menagerie.mlp().model, twice, menagerie.mlp().train)
    with pytest.raises(ValueError, match="calls the model once, got 2 calls"):
        fit_curvature(problem)


def test_unknown_curvature_and_negative_damping():
    problem = menagerie.ridge()
    with pytest.raises(ValueError, match="unknown curvature 'fisher'; auto, identity, diagonal"):
        fit_curvature(problem, "fisher")
    with pytest.raises(ValueError, match="expected damping of at least 0, got -1"):
        fit_curvature(problem, damping=-1)
    with pytest.raises(ValueError, match="expected damping"):
        fit_curvature(problem, damping=torch.ones(3))


@pytest.mark.parametrize("kind", ["diagonal", "hessian", "gauss_newton"])
def test_rows_of_nan_loss_are_named(kind):
    problem = menagerie.softmax()
    problem.train.columns[0][7, 1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[7\]"):
        fit_curvature(problem, kind, batch_size=3)


@pytest.mark.parametrize("kind", ["diagonal", "hessian", "gauss_newton"])
def test_a_loss_that_is_one_number_for_the_batch(kind):
    def mean(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    problem = Problem(menagerie.softmax().model, mean, menagerie.softmax().train)
    with pytest.raises(ValueError, match=r"expected one loss per row.*reduction='none'"):
        fit_curvature(problem, kind)


def test_layers_without_forward_mode_are_told_what_to_do(monkeypatch):
    """As transformers' grouped experts are."""
    problem = menagerie.mlp(6)
    outputs = Outputs(problem.loss, problem.train)

    def none(*_, **__):
        raise NotImplementedError("Trying to use forward AD with _grouped_mm")

    monkeypatch.setattr("attribution_core.curvature.jvp", none)
    with pytest.raises(NotImplementedError, match=r"ekfac.*refine=0"):
        influence(problem, outputs, curvature="gauss_newton", form="cg", damping=0.1)


def one_sided(loss):
    """Linear regression by a loss that torch differentiates twice in reverse alone; labels ±1, or numbers."""

    def losses(model, batch):
        return loss(model(batch[0])[:, 0], batch[1], reduction="none")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, y = torch.randn(20, 4).double(), 2 * torch.randn(20).double()
        model = nn.Linear(4, 1).double()
    return Problem(model, losses, (x, y.sign() if loss is F.soft_margin_loss else y), 0.1)


def bends(loss, z, y):
    """∂²ℓ/∂z², by hand."""
    if loss is F.soft_margin_loss:
        return (z.sigmoid() * (-z).sigmoid()).numpy()
    return ((z - y).abs() < 1).double().numpy()  # Huber's is quadratic within 1


# torch's, of soft margin under vmap
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("loss", [F.huber_loss, F.soft_margin_loss])
def test_losses_without_forward_mode(loss):
    """Products, solves, leverages of a linear model against the formulas: H = (1/n) Σ w_i D_i x_i x_iᵀ."""
    problem = one_sided(loss)
    outputs = Outputs(lambda model, batch: model(batch[0])[:, 0], (problem.train.columns[0][:3],))
    x, y = problem.train.columns
    z = problem.model(x)[:, 0].detach().requires_grad_()
    slope = torch.autograd.grad(loss(z, y, reduction="sum"), z)[0].numpy()
    one, d = np.hstack([x.numpy(), np.ones((20, 1))]), bends(loss, z.detach(), y)
    assert d.min() < 0.5 < d.max() or loss is F.soft_margin_loss  # both pieces of Huber's

    w = some_weights(problem)
    h = one.T @ ((w * d)[:, None] * one) / 20
    for kind in DENSE:
        found = products(problem, kind, identity(problem), w)
        torch.testing.assert_close(found, torch.from_numpy(h), **EXACT)

    h = one.T @ (d[:, None] * one) / 20 + 0.1 * np.eye(5)
    expected = -(slope[:, None] * one) @ np.linalg.solve(h, one[:3].T) / 20
    settings = {"damping": 0.0, "tolerance": 1e-12}
    for form in ("dense", "cg"):
        for kind in DENSE:
            found = influence(problem, outputs, curvature=kind, form=form, **settings).scores
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)  # as EXACT
    leverage = d * np.einsum("ip,pq,iq->i", one, np.linalg.inv(h), one) / 20
    found = leave_one_out(problem, outputs).scores
    np.testing.assert_allclose(found, expected / (1 - leverage)[:, None], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conjugate_gradients_of_half_precision_models(dtype):
    """Of more than 6,000 parameters, all by default: as the same numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 64, generator=generator).to(dtype)
    y = torch.randint(0, 100, (30,), generator=generator)
    narrow = nn.Linear(64, 100).to(dtype)
    wide = nn.Linear(64, 100).double()
    wide.load_state_dict(narrow.state_dict())

    def datamodel(model, x):
        outputs = Outputs(cross_entropy, (x[:4], y[:4]))
        return influence(Problem(model, cross_entropy, (x, y)), outputs, curvature="gauss_newton")

    found, exact = datamodel(narrow, x), datamodel(wide, x.double())
    eps = torch.finfo(dtype).eps
    assert found.meta["tolerance"] == eps
    assert exact.meta["tolerance"] == 1e-12
    # gradients, outputs' and rows', and solves are each off by about eps; together they were by one
    assert np.linalg.norm(found.scores - exact.scores) < 4 * eps * np.linalg.norm(exact.scores)


def test_conjugate_steps_end_where_rounding_begins():
    """Beyond it squares underflow, and a direction of nothing looks like one without curvature."""
    from attribution_core.second_order.conjugate import conjugate_steps

    generator = torch.Generator().manual_seed(3)
    root = torch.randn(16, 16, generator=generator).double()
    a = root @ root.T + 0.3 * torch.eye(16).double()
    v = torch.randn(2, 16, generator=generator).double()
    x = conjugate_steps(lambda rows: rows @ a, v, 4000)
    torch.testing.assert_close(x @ a, v, rtol=0, atol=1e-9)
