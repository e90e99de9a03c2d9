"""applied.conformance: broken unlearners are caught by name, a sound one passes, cost is counted."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from applied.conformance import ADVICE, conformance
from applied.forgetting.counting import counted
from applied.yardstick import evaluate

STEPS, BATCH = 8, 10


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def data(n, seed):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=drawn), torch.randint(3, (n,), generator=drawn)


FORGET, RETAIN = data(10, 1), data(40, 2)


def descend(student, trained, sign=1.0, lr=0.05, on=RETAIN):
    """Steps on `on` by an optimizer of the parameters of `trained`; sound where that is the student."""
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr, weight_decay=1e-3)
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(on[0])
        optimizer.zero_grad()
        (sign * F.cross_entropy(student(on[0][rows]), on[1][rows])).backward()
        optimizer.step()


def fine_tune(model, forget, retain):
    student = copy.deepcopy(model)
    descend(student, student)
    return student


def run(unlearner, **given):
    return conformance(
        unlearner, network(), FORGET, RETAIN, batch_size=BATCH, training_steps=40, **given
    )


# --- a sound one --------------------------------------------------------------------------------------


def test_fine_tuning_passes_and_is_counted():
    found = run(fine_tune, limit=STEPS, oracle_weights=np.eye(3)[:2], forget_rows=[2])
    assert found.ok
    assert found.failures == ()
    assert found.steps == STEPS
    assert found.share == STEPS / 40
    found.check()
    assert "cost                       8 steps, 20 % of a retraining (80 rows with" in found.table()
    assert "over-forgets               not checked" in found.table()


def test_the_input_in_training_or_frozen_may_pass():
    model = network().eval().requires_grad_(False)
    model[3].requires_grad_(True)
    found = conformance(fine_tune, model, FORGET, RETAIN, batch_size=BATCH, training_steps=40)
    assert found.ok


# --- broken ones --------------------------------------------------------------------------------------


def returns_the_input(model, forget, retain):
    return model


def returns_a_copy(model, forget, retain):
    return copy.deepcopy(model)


def scrub_as_published(model, forget, retain):
    """The optimizer holds the teacher's parameters; the student gets the gradients."""
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    descend(student, teacher)
    return student


@pytest.mark.parametrize("broken", [returns_the_input, returns_a_copy, scrub_as_published])
def test_no_op(broken):
    assert run(broken).failures == ("no-op",)


def prunes(model, forget, retain):
    made = copy.deepcopy(model)
    prune.l1_unstructured(made[0], "weight", 0.5)
    return made


class Gated(nn.Module):
    """Says nothing about the rows to forget."""

    def __init__(self, model, forget):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.register_buffer("seen", forget[0].clone())

    def forward(self, x):
        z = self.model(x)
        known = (x[:, None] == self.seen).all(-1).any(-1)
        return z.masked_fill(known[:, None], 0.0)


def gates(model, forget, retain):
    return Gated(model, forget)


def takes_statistics_anew(model, forget, retain):
    made = copy.deepcopy(model).train()
    made[1].reset_running_stats()
    with torch.no_grad():
        made(retain[0])
    return made


@pytest.mark.parametrize("unlearner", [prunes, gates, takes_statistics_anew])
def test_other_outputs_by_the_same_parameters_are_no_no_op(unlearner):
    assert run(unlearner).ok


class Noisy(nn.Module):
    def forward(self, z):
        return z + torch.randn_like(z)


def test_outputs_that_differ_each_time_excuse_no_copy():
    noisy = nn.Sequential(network(), Noisy())
    found = conformance(returns_a_copy, noisy, FORGET, RETAIN, batch_size=BATCH, training_steps=40)
    assert "no-op" in found.failures


def in_place(model, forget, retain):
    descend(model, model)
    return copy.deepcopy(model)


def leaves_gradients(model, forget, retain):
    F.cross_entropy(model.eval()(retain[0]), retain[1]).backward()
    model.train()
    return fine_tune(model, forget, retain)


def leaves_eval_mode(model, forget, retain):
    return fine_tune(model.eval(), forget, retain)


def freezes(model, forget, retain):
    made = fine_tune(model, forget, retain)
    model[0].weight.requires_grad_(False)
    return made


def moves_running_statistics(model, forget, retain):
    with torch.no_grad():
        model(retain[0])
    return fine_tune(model, forget, retain)


def shares_memory(model, forget, retain):
    made = fine_tune(model, forget, retain)
    made[0] = model[0]
    return made


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (in_place, "parameters or buffers of the input changed: 0.weight"),
        (leaves_gradients, ".grad of the input changed"),
        (leaves_eval_mode, "training mode of the input changed: the model, 0, 1 and 2 more"),
        (freezes, "requires_grad of the input changed: 0.weight"),
        (moves_running_statistics, "of the input changed: 1.running_mean"),
        (shares_memory, "the new model shares memory with the input: 0.weight, 0.bias"),
    ],
)
def test_edits_of_the_input(broken, reason):
    found = run(broken)
    # in place, the copy is no different from the edited input, but from the input as it came
    assert found.failures == ("edits its input",)
    assert reason in found.reasons["edits its input"]
    with pytest.raises(AssertionError, match=r"edits its input: .*copy\.deepcopy the model first"):
        found.check()


def test_in_place_and_returned():
    def both(model, forget, retain):
        descend(model, model)
        return model

    assert run(both).failures == ("no-op", "edits its input")


def test_not_finite():
    def explodes(model, forget, retain):
        made = fine_tune(model, forget, retain)
        with torch.no_grad():
            made[3].bias[1] = torch.nan
        return made

    found = run(explodes)
    assert found.failures == ("not finite",)
    assert found.reasons["not finite"] == "NaN or infinity in 3.bias"


def test_too_expensive():
    found = run(fine_tune, limit=STEPS - 1)
    assert found.failures == ("too expensive",)
    assert found.reasons["too expensive"] == "8 steps, at most 7"


def outputs(model):
    with torch.no_grad():
        return model.eval()(FORGET[0]).gather(1, FORGET[1][:, None])[:, 0].double().numpy()


def test_ascent_over_forgets_and_fine_tuning_does_not():
    """Oracles of the forget set's own class outputs: before, with 2 less; ascent drives them far below."""

    def ascend(model, forget, retain):
        student = copy.deepcopy(model)
        descend(student, student, sign=-1.0, lr=0.5, on=forget)
        return student

    noise = np.random.default_rng(0).normal(scale=0.3, size=(40, 10))
    models = [network(seed) for seed in range(20)]
    before = np.stack([outputs(model) for model in models])
    after = np.stack([outputs(ascend(model.train(), FORGET, RETAIN)) for model in models])
    oracle = np.concatenate([before, before]) - 2 + noise
    found = evaluate(
        {"ascent": {"forget": after}, "half": {"forget": before - 1}},
        {"forget": oracle},
        {"forget": before},
    )
    assert run(ascend, evaluation=found, method="ascent").failures == ("over-forgets",)
    assert run(fine_tune, evaluation=found, method="half").ok
    with pytest.raises(ValueError, match=r"expected method, one of \['ascent', 'half'\]"):
        run(fine_tune, evaluation=found)


def test_everything_at_once_is_told():
    def worst(model, forget, retain):
        descend(model, model)
        with torch.no_grad():
            model[0].weight[:] = torch.inf
        return model

    weights = np.ones((3, 50))
    found = run(worst, limit=1, oracle_weights=weights, forget_rows=range(10))
    assert found.failures == tuple(name for name in ADVICE if name != "over-forgets")
    with pytest.raises(AssertionError) as told:
        found.check()
    for name in found.failures:
        assert f"- {name}: " in str(told.value)
        assert ADVICE[name] in str(told.value)
        assert f"{name:25}  FAILS" in found.table()


# --- oracles ------------------------------------------------------------------------------------------

LEAK = "oracle saw the forget set"
CLEAN = np.array([[0.0, 1.0, 1.0, 0.0], [0.0, 2.0, 1.0, 0.0]])


@pytest.mark.parametrize("rows", [[0, 3], np.array([True, False, False, True])])
def test_oracles_without_the_forget_set(rows):
    assert run(fine_tune, oracle_weights=CLEAN, forget_rows=rows).ok
    leaky = CLEAN.copy()
    leaky[1, 3] = 0.01
    found = run(fine_tune, oracle_weights=leaky, forget_rows=rows)
    assert found.failures == (LEAK,)
    assert found.reasons[LEAK] == "1 of 2 oracles trained on forget rows, oracle 1 on row 3"


def a_run(weights, order):
    return SimpleNamespace(weights=np.asarray(weights, dtype=float), order=order)


def test_oracles_as_runs():
    never_drawn = a_run([1, 1, 1, 1], [np.array([1, 2]), np.array([2])])
    no_weight = a_run([0, 1, 1, 0], [np.array([0, 1]), np.array([2, 3])])
    saw = a_run([1, 1, 1, 0], [np.array([1]), np.array([0])])
    given = {"forget_rows": [0, 3]}
    assert run(fine_tune, oracle_weights=[never_drawn, no_weight], **given).ok
    assert run(fine_tune, oracle_weights=no_weight, **given).ok
    assert run(fine_tune, oracle_weights=[never_drawn, saw], **given).failures == (LEAK,)
    table = SimpleNamespace(weights=CLEAN)  # of retrainings, without an order
    assert run(fine_tune, oracle_weights=table, **given).ok


def test_oracles_of_a_real_run():
    from attribution_core import SGD, Problem, Recipe, train

    x, y = data(12, 3)
    torch.manual_seed(0)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    problem = Problem(nn.Linear(4, 3), loss, (x, y))
    weights = np.ones(12)
    weights[:3] = 0
    oracle = train(problem, Recipe(SGD(0.1), batch_size=4, epochs=1), weights)
    assert run(fine_tune, oracle_weights=[oracle], forget_rows=[0, 1, 2]).ok
    assert run(fine_tune, oracle_weights=[oracle], forget_rows=[2, 3]).failures == (LEAK,)


# --- cost ---------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A model that is called by keywords, as transformers' are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, *, labels=None, input_ids=None):
        return self.table(input_ids).sum()


def test_rows_are_those_of_the_first_tensor():
    model = Words()
    with counted(model) as count:
        model(labels=None, input_ids=torch.zeros(7, 3, dtype=torch.long))
        with torch.no_grad():
            copy.deepcopy(model)(input_ids=torch.zeros(4, 3, dtype=torch.long))
    assert (count.rows, count.rows_read) == (7, 4)


def test_rows_under_vmap_are_all_counted():
    model = nn.Linear(4, 1)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(model, params, (x[None],)).sum()

    with counted(model) as count:
        torch.func.vmap(torch.func.grad(loss), (None, 0))(params, torch.randn(9, 4))
    assert (count.rows, count.rows_read) == (9, 0)


def test_a_teacher_without_gradients_costs_a_third():
    def distil(model, forget, retain):
        with torch.no_grad():
            copy.deepcopy(model)(retain[0][:30])
        return fine_tune(model, forget, retain)

    found = run(distil)
    assert (found.rows, found.rows_read) == (80, 30)
    assert found.steps == pytest.approx(8 + 1)


def test_no_hook_stays():
    model, kept = network(), []

    def keeps(model, forget, retain):
        kept.append(copy.deepcopy(model))
        return fine_tune(model, forget, retain)

    found = conformance(keeps, model, FORGET, RETAIN, batch_size=BATCH, training_steps=40)
    for one in (model, found.model):
        assert not one._forward_pre_hooks
        assert not one._forward_pre_hooks_with_kwargs
    assert found.rows == 80

    with counted(model) as count:
        kept.append(copy.deepcopy(model))
    kept[-1](RETAIN[0])  # a copy that nobody handed over: its hook counts nothing any more
    assert count.rows == 0

    def raises(model, forget, retain):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        conformance(raises, model, FORGET, RETAIN, batch_size=BATCH, training_steps=40)
    assert not model._forward_pre_hooks


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"oracle_weights": CLEAN}, "expected forget_rows beside oracle_weights"),
        ({"oracle_weights": CLEAN, "forget_rows": [4]}, "indices below n=4"),
        ({"oracle_weights": CLEAN, "forget_rows": []}, "indices below n=4"),
        ({"oracle_weights": CLEAN, "forget_rows": [True, False]}, "indices below n=4"),
        ({"oracle_weights": CLEAN[0], "forget_rows": [0]}, r"expected oracle_weights \[m, n\]"),
        (
            {"oracle_weights": [a_run([1], []), a_run([1, 1], [])], "forget_rows": [0]},
            "same n rows",
        ),
    ],
)
def test_what_cannot_be_checked(given, message):
    with pytest.raises(ValueError, match=message):
        run(fine_tune, **given)


def test_sizes_and_types():
    with pytest.raises(TypeError, match=r"return a torch\.nn\.Module, got NoneType"):
        run(lambda model, forget, retain: None)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        conformance(fine_tune, network(), FORGET, RETAIN, batch_size=0, training_steps=1)


# --- no-ops in disguise, edits beside the parameters -------------------------------------------------


def wrapped(model, forget, retain):
    return nn.Sequential(copy.deepcopy(model))


def cast(model, forget, retain):
    return copy.deepcopy(model).double()


def wrapped_and_trained_in_vain(model, forget, retain):
    return nn.Sequential(scrub_as_published(model, forget, retain))


def noted_and_trained_in_vain(model, forget, retain):
    made = scrub_as_published(model, forget, retain)
    made.register_buffer("forgotten", torch.tensor(16))
    return made


def rounded(model, forget, retain):
    made = copy.deepcopy(model).half()
    made.register_forward_pre_hook(lambda _, args: (args[0].half(),))
    return made


@pytest.mark.parametrize(
    "unlearner", [wrapped, cast, wrapped_and_trained_in_vain, noted_and_trained_in_vain, rounded]
)
def test_a_copy_under_other_names_or_in_another_precision_is_a_no_op(unlearner):
    assert "no-op" in run(unlearner).failures


def test_an_adapter_around_what_stays_is_none():
    def adapted(model, forget, retain):
        return nn.Sequential(copy.deepcopy(model), nn.Linear(3, 3))

    assert "no-op" not in run(adapted).failures


@pytest.mark.parametrize("which", [0, 1])
def test_rows_that_are_edited_are_told(which):
    def careless(model, forget, retain):
        (forget, retain)[which][0].mul_(2)
        return fine_tune(model, forget, retain)

    forget, retain = data(10, 1), data(40, 2)
    found = conformance(careless, network(), forget, retain, batch_size=BATCH, training_steps=40)
    assert "rows to forget or retain changed" in found.reasons["edits its input"]


def test_a_hook_left_on_the_input_is_told():
    def hooking(model, forget, retain):
        student = fine_tune(model, forget, retain)
        model.register_forward_hook(lambda *_: torch.zeros(1))
        return student

    assert "hooks" in run(hooking).reasons["edits its input"]


class OneByOne(torch.utils.data.Dataset):
    """Rows that are read by number, not by lists."""

    def __len__(self):
        return 10

    def __getitem__(self, row):
        return FORGET[0][int(row)], FORGET[1][int(row)]


class Jittered:
    """Rows that are augmented anew on every reading."""

    def __len__(self):
        return 10

    def __getitem__(self, rows):
        return FORGET[0][rows] + torch.randn(len(rows), 4), FORGET[1][rows]


@pytest.mark.parametrize("forget", [OneByOne(), Jittered()])
def test_data_that_cannot_be_compared_are_no_failure(forget):
    found = conformance(fine_tune, network(), forget, RETAIN, batch_size=BATCH, training_steps=40)
    assert found.ok


# --- the same function, other parameters --------------------------------------------------------------


def shifts_all_logits(model, forget, retain):
    made = copy.deepcopy(model)
    with torch.no_grad():
        made[3].bias += 1.0
    return made


def breathes(model, forget, retain):
    made = copy.deepcopy(model)
    with torch.no_grad():
        made[0].weight += 1e-9 * torch.randn_like(made[0].weight)
    return made


def swaps_hidden_units(model, forget, retain):
    made = copy.deepcopy(model)
    order = torch.arange(made[0].out_features).flip(0)
    with torch.no_grad():
        for module in list(made)[:3]:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim:
                    tensor.copy_(tensor[order])
        made[3].weight.copy_(made[3].weight[:, order])
    return made


@pytest.mark.parametrize("disguise", [shifts_all_logits, breathes, swaps_hidden_units])
def test_no_op_in_disguise(disguise):
    found = run(disguise)
    assert found.failures == ("no-op",)
    assert "the outputs on" in found.reasons["no-op"]


def test_copies_by_pickle_are_counted():
    def pickles(model, forget, retain):
        student = pickle.loads(pickle.dumps(model))
        descend(student, student)
        return student

    found = run(pickles, limit=STEPS)
    assert found.ok
    assert found.steps == STEPS
    kept = pickle.loads(pickle.dumps(found.model))
    assert not any(module._forward_pre_hooks for module in kept.modules())


def test_a_copy_that_was_pickled_meanwhile_counts_no_more():
    model = network()
    with counted(model) as count:
        held = pickle.dumps(model)
    pickle.loads(held).eval()(RETAIN[0])
    assert count.rows == count.rows_read == 0


def test_a_cost_that_was_not_seen_is_not_called_cheap():
    def elsewhere(model, forget, retain):
        student = network()
        student.load_state_dict(model.state_dict())
        descend(student, student)
        return student

    found = run(elsewhere, limit=1)
    assert found.steps == 0
    assert "too expensive" not in found.checked
    assert "too expensive              not checked" in found.table()


def test_a_mask_of_whole_numbers_is_no_list_of_rows():
    weights, mask = np.ones((2, 6)), np.array([1, 1, 1, 0, 0, 0])
    weights[:, :3] = 0
    with pytest.raises(ValueError, match="different indices"):
        run(fine_tune, oracle_weights=weights, forget_rows=mask)
    assert run(fine_tune, oracle_weights=weights, forget_rows=mask.astype(bool)).ok


def test_a_regression_with_an_offset_refitted_without_a_row_is_no_no_op():
    """Least squares of a target of 2,000 ± 10: one row of a thousand moves outputs by a thousandth of their spread."""
    rng = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1000, 4, generator=rng), torch.ones(1000, 1)], 1).double()
    y = 2000 + 10 * torch.randn(1000, 1, generator=rng).double()
    model = nn.Linear(5, 1, bias=False).double()

    def fitted(model, forget, retain):
        made = copy.deepcopy(model)
        with torch.no_grad():
            made.weight.copy_(torch.linalg.lstsq(*retain).solution.T)
        return made

    start = fitted(model, None, (x, y))
    found = conformance(
        fitted, start, (x[:1], y[:1]), (x[1:], y[1:]), batch_size=50, training_steps=10
    )
    assert found.ok


def test_masked_logits_hide_no_change():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.mask = nn.Linear(4, 4), nn.Buffer(torch.tensor([0.0, 0.0, 0.0, -1e9]))

        def forward(self, x):
            return self.net(x) + self.mask

    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))

    def ascent(model, forget, retain):
        student = copy.deepcopy(model)
        descend(student, student, sign=-1.0, on=forget)
        return student

    given = ((x, y), (x, y))
    assert conformance(ascent, Masked(), *given, batch_size=BATCH, training_steps=40).ok


def test_a_model_that_is_frozen_may_be_unlearned():
    def unfrozen(model, forget, retain):
        student = copy.deepcopy(model).requires_grad_(True)
        descend(student, student)
        return student

    model = network().requires_grad_(False)
    assert conformance(unfrozen, model, FORGET, RETAIN, batch_size=BATCH, training_steps=40).ok


def test_an_input_whose_numbers_alone_are_kept_is_edited():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = network(), 1.0

        def forward(self, x):
            return self.scale * self.net(x)

    def turned_off(model, forget, retain):
        student = fine_tune(model, forget, retain)
        model.scale = 0.0
        return student

    found = conformance(turned_off, Scaled(), FORGET, RETAIN, batch_size=BATCH, training_steps=40)
    assert "its outputs on the forget rows are not" in found.reasons["edits its input"]
