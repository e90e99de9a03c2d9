"""attribution_core.problem: data of every kind, outputs, guards."""

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    cross_entropy,
    influence,
    magic,
    margin,
    train,
)
from attribution_core.calling import call, per_example
from attribution_core.data import as_data, batches, rows_in, take
from attribution_core.gradients import directional
from tests import menagerie

X, Y = menagerie.mlp().train.columns
ARRAYS = {"x": X.numpy(), "y": Y.numpy()}


class Own:
    """The least a dataset must do."""

    def __len__(self):
        return len(X)

    def __getitem__(self, rows):
        return X[rows], Y[rows]


class Named(nn.Module):
    """A classifier that takes its input by name."""

    def __init__(self):
        super().__init__()
        self.inner = menagerie.mlp().model

    def forward(self, x):
        return self.inner(x)


def by_name(model, batch):
    return cross_entropy(model, (batch["x"].to(X), batch["y"]))


DATA = {
    "tuple": (X, Y),
    "list of arrays": [X.numpy(), Y.numpy()],
    "TensorDataset": TensorDataset(X, Y),
    "own": Own(),
    "dict": {"x": X, "y": Y},
    "dict of arrays": ARRAYS,
    "Dataset": datasets.Dataset.from_dict(ARRAYS),
    "Dataset of torch": datasets.Dataset.from_dict(ARRAYS).with_format("torch"),
    "Dataset with text": datasets.Dataset.from_dict({**ARRAYS, "text": ["a"] * len(X)}),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_of_every_kind_gives_the_same_scores(kind):
    data = DATA[kind]
    named = kind.startswith("d") or kind.startswith("Dataset")
    problem = Problem(menagerie.mlp().model, by_name if named else cross_entropy, data)
    assert problem.n == len(X)
    outputs = Outputs(problem.loss, data)
    found = influence(problem, outputs, damping=1.0)
    expected = influence(menagerie.mlp(), Outputs(cross_entropy, (X, Y)), damping=1.0)
    # a datasets.Dataset hands floats out in float32: 1e-7, through a curvature with damping 1
    tolerance = 1e-5 if kind.startswith("Dataset") else 1e-12
    np.testing.assert_allclose(found.scores, expected.scores, rtol=tolerance, atol=tolerance)


def test_rows_are_taken_in_the_order_asked_for_and_text_is_left_out():
    data = as_data(DATA["Dataset with text"])
    batch = take(data, [4, 0, 4])
    assert set(batch) == {"x", "y"}
    assert batch["y"].tolist() == Y[[4, 0, 4]].tolist()
    assert rows_in(batch) == 3


def test_batches_cover_rows_once_in_order():
    assert [b.tolist() for b in batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert [b.tolist() for b in batches([7, 3, 5], 2)] == [[7, 3], [5]]
    assert list(batches(0, 2)) == []


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "expected data with a length and"),
        ((X[:0], Y[:0]), ValueError, "at least one example, got empty data"),
        ((X, Y[:2]), ValueError, r"columns of one length, got \[6, 2\]"),
        ({"x": X, "y": Y[:2]}, ValueError, r"columns of one length, got \[6, 2\]"),
        (datasets.Dataset.from_dict({"t": ["a", "b"]}), TypeError, "a dict or tuple of tensors"),
        ("some text", TypeError, "a dict or tuple of tensors|expected data"),
        ({}, ValueError, "expected columns, one for inputs or more, got none"),
        ((), ValueError, "expected columns, one for inputs or more, got none"),
        (
            {"x": X, "city": ["a"] * 6},
            TypeError,
            "numbers in column 'city', got list: .*number categories",
        ),
        ({"x": np.array(["a"] * 6, object)}, TypeError, "numbers in column 'x', got object"),
        ({"x": None}, TypeError, "expected numbers in column 'x'"),
        ((X, torch.tensor(1)), ValueError, "a row for every example in column 1, got one number"),
        ((X, 3.0), ValueError, "a row for every example in column 1, got one number"),
    ],
)
def test_data_that_does_not_fit(data, error, message):
    with pytest.raises(error, match=message):
        as_data(data)


def test_columns_share_the_memory_of_arrays(tmp_path):
    """Of files that are mapped, too: they may be larger than memory."""
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(6, 2))
    held, mapped = np.arange(12.0).reshape(6, 2), np.load(tmp_path / "x.npy", mmap_mode="r")
    for array in (held, mapped):
        assert np.shares_memory(as_data({"x": array}).columns["x"].numpy(), array)


def test_columns_of_plain_numbers_are_in_the_default_dtype():
    lists = [[1.0, 2.0], [3.0, 4.0]]
    held = datasets.Dataset.from_dict({"x": lists, "y": [0, 1]})
    for given in (lists, held["x"], [torch.tensor(row) for row in lists]):
        found = as_data((given, held["y"]))[[0, 1]]
        assert found[0].dtype == torch.float32
        assert found[0].tolist() == lists
        assert found[1].dtype == torch.int64
    with pytest.raises(TypeError, match="pad rows of different lengths"):
        as_data(([[1.0], [1.0, 2.0]], [0, 1]))


def test_columns_of_arrays_and_tables_keep_the_order_of_their_rows():
    import pandas as pd

    plain = np.arange(12.0).reshape(6, 2)
    series = pd.Series(np.arange(6), index=[5, 3, 1, 0, 2, 4]).iloc[1:]
    frame = pd.DataFrame(plain[:5], columns=[7, 8])
    odd = {
        "backwards": plain[::-1], "foreign": plain.astype(">f8"), "read-only": np.broadcast_to(plain, (6, 2)),
    }  # fmt: skip
    found = as_data(odd)[[0, 5]]
    assert found["backwards"].tolist() == plain[[5, 0]].tolist()
    assert found["foreign"].tolist() == found["read-only"].tolist() == plain[[0, 5]].tolist()
    assert found["foreign"].dtype == torch.float64
    rows = as_data((frame, series))[[0, 4]]
    assert rows[0].tolist() == plain[[0, 4]].tolist()
    assert rows[1].tolist() == [1, 5]


def test_rows_of_different_lengths_are_not_dropped_in_silence():
    """A datasets.Dataset gives a list of tensors for ragged rows; the column would vanish."""
    ragged = datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0]], "y": [0, 1]})
    with pytest.raises(ValueError, match=r"rows of different lengths in \['x'\]; pad them"):
        take(as_data(ragged), [0, 1])


def test_a_model_without_trainable_parameters():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters, got none"):
        Problem(model, cross_entropy, (X, Y))


class Looped(nn.Module):
    """One layer three times: the same module, or three that share their tensors."""

    def __init__(self, *, same: bool):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            layers = [layer] * 3 if same else [layer, nn.Linear(4, 4), nn.Linear(4, 4)]
        for other in layers:
            other.weight, other.bias = layer.weight, layer.bias
        self.layers = nn.ModuleList(layers)
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


class Spectral(nn.Module):
    """A layer in frequencies, as neural operators have; its weights are numbers of two parts, or complex."""

    def __init__(self, real, trained=True):
        super().__init__()
        w = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
        self.w = nn.Parameter(w if real else torch.view_as_complex(w), requires_grad=trained)
        self.out = nn.Linear(6, 3).double()

    def forward(self, x):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return self.out(torch.fft.irfft(torch.fft.rfft(x, n=6) * w, n=6))


def test_complex_parameters_are_refused_and_what_is_told_works():
    with pytest.raises(ValueError, match=r"got complex ones in \['w'\]; hold torch.view_as_real"):
        Problem(Spectral(real=False), cross_entropy, (X, Y))
    problem = Problem(Spectral(real=True), cross_entropy, (X, Y))
    along = torch.eye(sum(value.numel() for value in problem.params.values())).double()
    expected = menagerie.row_gradients(problem)
    torch.testing.assert_close(directional(problem, along), expected)
    frozen = [menagerie.seeded(Spectral)(real, trained=False) for real in (True, False)]
    runs = [train(Problem(m, cross_entropy, (X, Y)), Recipe(SGD(0.1), 3, 2)) for m in frozen]
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)


class Called(nn.Module):
    """Layers that have hooks of their own here, called by name or by place."""

    def __init__(self, by_name):
        super().__init__()
        self.words = nn.Embedding(5, 4, padding_idx=0)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 3)
        self.by_name = by_name

    def forward(self, ids):
        if not self.by_name:
            return self.out(self.norm(self.words(ids).mean(1)))
        z = self.norm(input=self.words(input=ids).mean(1))
        return self.out(input=z)


def test_layers_are_called_by_name_or_by_place():
    ids = torch.randint(0, 5, (6, 3), generator=torch.Generator().manual_seed(0))
    outputs, found = Outputs(margin, (ids[:2], Y[:2])), []
    for by_name in (False, True):
        problem = Problem(menagerie.seeded(Called)(by_name).double(), cross_entropy, (ids, Y))
        run = train(problem, Recipe(SGD(0.1), 3, 2))
        groups = magic(run, outputs, groups=[0, 1] * 3, mode="forward", check=False)
        fitted = Problem(run.model, cross_entropy, (ids, Y))
        ghost = influence(fitted, outputs, damping=1.0, engine="ghost")
        jvp = influence(fitted, outputs, damping=1.0, engine="jvp")
        scores = (magic(run, outputs, check=False), groups, ghost, jvp)
        found.append([run.losses, *run.buffers.values(), *(f.scores for f in scores)])
    for by_place, by_name in zip(*found, strict=True):
        np.testing.assert_array_equal(by_place, by_name)


def test_a_module_under_several_names_is_as_modules_that_share_their_tensors():
    """torch's `functional_call` leaves what it swapped in behind there: the model lost its parameters."""
    data = (torch.linspace(-1, 1, 24).double().reshape(6, 4), torch.arange(6) % 3)
    scores, runs = [], []
    for same in (True, False):
        problem = Problem(Looped(same=same), cross_entropy, data)
        outputs = Outputs(cross_entropy, (data[0][:2], data[1][:2]))
        before = {name: p.clone() for name, p in problem.model.named_parameters()}
        runs.append(train(problem, Recipe(SGD(0.1, 0.5), 3, 2)))
        scores.append(influence(problem, outputs, damping=0.1).scores)
        after = dict(problem.model.named_parameters())
        assert list(after) == list(before)
        assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in after.items())
    np.testing.assert_allclose(*scores, rtol=1e-12)  # rounding
    for name, value in runs[0].params.items():
        torch.testing.assert_close(value, runs[1].params[name], rtol=1e-12, atol=0)


def test_parameters_are_those_that_train_and_tied_ones_appear_once():
    assert set(menagerie.ODD["frozen"]().params) == {"2.weight", "4.weight", "4.bias"}
    names = set(menagerie.gpt2().params)
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_losses_that_are_one_number_or_another_shape():
    problem = menagerie.mlp()
    batch = (X[:3], Y[:3])
    wrong = {
        r"got \(\)": lambda m, b: cross_entropy(m, b).mean(),
        r"got \(3, 1\)": lambda m, b: cross_entropy(m, b)[:, None],
        r"got .*float": lambda m, b: float(cross_entropy(m, b).mean()),
    }
    for message, loss in wrong.items():
        with pytest.raises(
            ValueError, match=rf"one loss per row, shape \(3,\), {message}.*reduction"
        ):
            per_example(problem.model, loss, batch)


def test_values_of_nan_name_the_rows_of_the_data():
    x = X.clone()
    x[1] = float("inf")
    with pytest.raises(ValueError, match=r"finite loss values, got NaN or infinity in rows \[14\]"):
        per_example(menagerie.mlp().model, cross_entropy, (x[:3], Y[:3]), rows=[13, 14, 15])
    outputs = Outputs(margin, (x, Y))
    with pytest.raises(ValueError, match=r"finite output values.*rows \[1\]"):
        outputs.evaluate(menagerie.mlp().model, batch_size=4)


def test_call_swaps_parameters_in_and_leaves_the_model():
    problem = menagerie.mlp()
    zeros = {name: torch.zeros_like(value) for name, value in problem.params.items()}
    losses = call(problem.model, problem.loss, zeros, (X, Y))
    torch.testing.assert_close(losses, torch.full((6,), np.log(3), dtype=torch.float64))
    for name, value in menagerie.mlp().params.items():
        assert torch.equal(problem.params[name], value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_float64_transformers_are_computed_in_float64(name):
    """The plain model casts to float32 inside: it agrees to 1e-5 and is not the same."""
    problem = menagerie.ARCHITECTURES[name]()
    batch = take(problem.train, [0, 1, 2])
    found = call(problem.model, problem.loss, problem.params, batch)
    with torch.no_grad():
        plain = problem.loss(problem.model, batch)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    if name == "llama":
        assert not torch.equal(found, plain)


# --- outputs ---------------------------------------------------------------------------------


def test_outputs_by_row_by_mean_and_by_label():
    model, labels = menagerie.mlp().model, np.array(["b", "a", "b", "c", "a", "b"])
    outputs = Outputs(margin, (X, Y))
    rows = margin(model, (X, Y)).detach()
    torch.testing.assert_close(outputs.evaluate(model), rows)
    torch.testing.assert_close(outputs.mean().evaluate(model), rows.mean()[None])
    by = outputs.mean(by=labels)
    expected = [rows[labels == name].mean() for name in "abc"]
    torch.testing.assert_close(by.evaluate(model, batch_size=4), torch.stack(expected))
    assert by.names == ("a", "b", "c")
    assert (len(outputs), len(outputs.mean()), len(by)) == (6, 1, 3)


def test_means_that_make_no_sense():
    outputs = Outputs(margin, (X, Y))
    with pytest.raises(ValueError, match="got averages already"):
        outputs.mean().mean()
    with pytest.raises(ValueError, match=r"one label per row \[6\], got \(2,\)"):
        outputs.mean(by=["a", "b"])


def test_outputs_in_single_precision_are_returned_in_double():
    model = menagerie.mlp().model.float()
    values = Outputs(margin, (X.float(), Y)).mean().evaluate(model)
    assert values.dtype == torch.float64


def test_several_data_sets_and_lists_of_rows_are_told():
    one = datasets.Dataset.from_dict({"x": [[1.0], [2.0]]})
    with pytest.raises(TypeError, match=r"one data set, got several: \['train', 'test'\]"):
        as_data(datasets.DatasetDict({"train": one, "test": one}))
    with pytest.raises(TypeError, match="got a list of rows"):
        as_data([{"x": 1.0}, {"x": 2.0}])
    with pytest.raises(TypeError, match="a length"):
        as_data(one.to_iterable_dataset())


@pytest.mark.parametrize(
    "features",
    [
        lambda x: torch.zeros(len(x), 6).scatter_add_(1, x, (x > 0).float()).double(),
        lambda x: F.one_hot(x[:, 0], 6).float().double(),
        lambda x: torch.bmm(x.float()[:, None], torch.eye(4).expand(len(x), 4, 4))[:, 0].double(),
        lambda x: x[:, :1].contiguous().view(torch.float32).double(),
    ],
)
def test_whole_numbers_in_float64_models_keep_their_casts(features):
    """Only products that torch would refuse, of float64 and float32, are float64 altogether."""
    x = torch.randint(0, 4, (3, 4), generator=torch.Generator().manual_seed(0))
    model = nn.Linear(features(x).shape[1], 2).double()

    def loss(model, batch):
        return model(features(batch[0])).square().sum(1)

    found = call(model, loss, dict(model.named_parameters()), (x,))
    assert torch.equal(found, loss(model, (x,)))


def test_positions_meet_frequencies_in_float64():
    """As in the rotary embeddings of older transformers: whole numbers cast to float32 beside what stays float64."""
    model = nn.Linear(3, 2).double()
    model.frequencies = nn.Buffer(torch.tensor([[0.1], [0.2], [1 / 3]]).double())

    def loss(model, batch):
        angles = model.frequencies.float() @ batch[0].float()[:, None]
        return model(angles[..., 0].double()).square().sum(1)

    x = torch.tensor([[3], [5]])
    found = call(model, loss, dict(model.named_parameters()), (x,))
    expected = model(model.frequencies[:, 0] * x).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_a_tuple_with_a_place_that_is_no_tensor_is_refused():
    """Left out, the places after it would move up, and batch[1] be another column."""

    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, rows):
            return [f"row {i}" for i in rows], torch.ones(len(rows), 2), torch.zeros(len(rows))

    problem = Problem(nn.Linear(2, 1), lambda model, batch: model(batch[0])[:, 0], Named())
    with pytest.raises(ValueError, match=r"got list in place 0; .* or give a dict"):
        take(problem.train, [0, 1])


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_outputs_are_read_in_eval_mode_and_leave_the_model_as_it_was(layer):
    """Left in training mode by a loop of one's own they would be random, or hang on the size of a batch."""
    model = nn.Sequential(nn.Linear(4, 3), layer).train()
    data = torch.randn(12, 4), torch.arange(12) % 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [Outputs(margin, data).evaluate(model, batch_size=size) for size in (5, 12)]
    assert model.training
    assert layer.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    expected = Outputs(margin, data).evaluate(model.eval())
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)  # float32, other batches
