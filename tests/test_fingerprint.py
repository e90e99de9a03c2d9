"""attribution_core.disk.fingerprint: told apart by what matters, the same in every process and after use."""

import copy
import enum
import functools
import itertools
import pickle
import sys
import threading
import types
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution_core import (
    SGD,
    Outputs,
    Problem,
    Recipe,
    margin,
    retrain,
)
from attribution_core.disk.fingerprint import fingerprint
from tests import menagerie
from tests.test_store import run_python


def changed_weight(problem):
    other = menagerie.mlp()
    with torch.no_grad():
        other.model[0].weight[0, 0] += 1e-12
    return replace(problem, model=other.model)


def frozen_weight(problem):
    other = menagerie.mlp()
    other.model[0].requires_grad_(False)
    return replace(problem, model=other.model)


def changed_datum(problem):
    x, y = (column.clone() for column in problem.train.columns)
    x[5, 3] += 1e-12
    return replace(problem, train=(x, y))


def other_layer(problem):
    return replace(
        problem,
        model=nn.Sequential(*menagerie.mlp().model[:-2], nn.ReLU(), menagerie.mlp().model[-1]),
    )


CHANGES = {
    "weight": changed_weight,
    "frozen": frozen_weight,
    "datum": changed_datum,
    "layer": other_layer,
    "loss": lambda p: replace(p, loss=margin),
    "partial": lambda p: replace(p, loss=functools.partial(p.loss)),
    "decay": lambda p: replace(p, weight_decay=1e-9),
    "order": lambda p: replace(p, train=tuple(c.flip(0) for c in p.train.columns)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_problem_changes_its_print(change):
    problem = menagerie.mlp()
    assert fingerprint(menagerie.mlp()) == fingerprint(problem)
    assert fingerprint(CHANGES[change](problem)) != fingerprint(problem)


def closure(value):
    def function(model, batch):
        return value

    return function


def keyword(value):
    def function(model, batch, *, scale=value):
        return scale

    return function


class Scaled(nn.Module):
    """A setting that neither weights nor repr tell."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, x):
        return x / self.temperature


class Loss:
    """A plain object that is called."""

    def __init__(self, smoothing):
        self.smoothing = smoothing

    def __call__(self, model, batch):
        return model(batch[0]).sum(1) * self.smoothing


DIFFERENT = [
    (keyword(1), keyword(2)),
    (Scaled(1.0), Scaled(3.0)),
    (nn.Sequential(Scaled(1.0)), nn.Sequential(Scaled(3.0))),
    (Loss(0.0), Loss(0.5)),
    (closure(nn.CrossEntropyLoss()), closure(nn.CrossEntropyLoss(label_smoothing=0.5))),
    (functools.partial(margin, tokens=1), functools.partial(margin, tokens=2)),
    (functools.partial(margin, 1), functools.partial(margin, 2)),
    (lambda m, b: b + 1, lambda m, b: b + 2),
    (lambda m, b: b.sin(), lambda m, b: b.cos()),
    (closure(1), closure(2)),
    (lambda m, b: [lambda: 1], lambda m, b: [lambda: 2]),
    (Recipe(SGD(0.1), 2, 1), Recipe(SGD(0.2), 2, 1)),
    (Recipe(SGD(0.1), 2, 1), Recipe(SGD(0.1), 2, 1, "linear")),
    (torch.ones(2), torch.ones(2).double()),
    (torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()),
    (np.zeros((2, 3)), np.zeros((3, 2))),
    (["ab", "c"], ["a", "bc"]),
    ([{"a": 1}, {"b": 2}], [{"a": 1, "b": 2}, {}]),
    (None, 0),
    (1, 1.0),
    (TensorDataset(torch.ones(2)), TensorDataset(torch.zeros(2))),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=range(len(DIFFERENT)))
def test_different_things_have_different_prints(pair):
    first, second = pair
    assert fingerprint(first) == fingerprint(first)
    assert fingerprint(first) != fingerprint(second)


class Own:
    """Data of one's own, with neither a repr nor a fingerprint."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        return (self.x[rows],)


def test_data_of_ones_own_are_told_apart_by_their_rows():
    x = torch.randn(2000, 2)
    other = x.clone()
    other[1999, 1] += 1
    assert fingerprint(Own(x)) == fingerprint(Own(x.clone())) != fingerprint(Own(other))


def test_heads_of_a_transformer_are_part_of_it():
    """Four heads or two: the same weights, another function."""
    one, other = menagerie.gpt2().model, menagerie.gpt2().model
    assert fingerprint(one) == fingerprint(other)
    other.config.n_head = 4
    assert fingerprint(one) != fingerprint(other)


def edited(source, *changes, name="made", **scope):
    """What `source` defines as `name`, as an edit of the user's own file leaves it."""
    for before, after in changes:
        assert before in source
        source = source.replace(before, after)
    space = {"__name__": "a_module", "torch": torch, "nn": nn, "functools": functools, **scope}
    exec(source, space)
    return space[name]


NET = """
from types import SimpleNamespace
SCALES = {"first": 1, "all": [2, 3]}
config = SimpleNamespace(power=2)
SEEN, CACHE = [], {}

def squashed(x):
    return torch.tanh(x) * SCALES["first"] ** config.power + options.width

class Options:
    depth = 4
    def __init__(self):
        self.width = 5

options = Options()

class Base(nn.Module):
    RANK = 6
    def inner(self, x):
        return x + 7
    @property
    def times(self):
        return 8
    @staticmethod
    @functools.lru_cache
    def table(n):
        return n * 9

class Net(Base):
    def __init__(self, depth=10):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.loops, self._hidden, self.sizes, self.by_name = depth, 11, [12], {"a": 13}
        self.build()
        self.calls, self.shapes, self.cache, self.rows = 0, [], {}, {}

    def build(self):
        self.late = 14

    def forward(self, x):
        self.calls += 1
        self.shapes.append(len(x))
        self.cache[len(x), "key"] = x
        self.rows["n"] = self.rows.get("n", 0) + 1
        self.rows["n"] += 1
        SEEN.append(len(x))
        CACHE[len(SEEN)] = x
        y = squashed(self.layer(x))
        return y + self.inner(x) + self.times + self.table(2)

class Loss:
    def __init__(self, k):
        self._power, self.given = k, {"k": k}
        self.calls = 0
    def __call__(self, model, batch):
        self.calls += 1
        return model(batch[0]).sum(1) * self._power

made, loss = Net(), Loss(15)
"""
EDITS = [
    ("tanh", "relu"), ('"first": 1', '"first": 0'), ("[2, 3]", "[2, 4]"), ("(power=2)", "(power=0)"), ("depth = 4", "depth = 0"),
    ("width = 5", "width = 0"), ("RANK = 6", "RANK = 0"), ("x + 7", "x + 0"), ("return 8", "return 0"), ("n * 9", "n * 0"),
    ("depth=10", "depth=0"), ("_hidden, self.sizes, self.by_name = depth, 11", "_hidden, self.sizes, self.by_name = depth, 0"),
    ("[12]", "[0]"), ('"a": 13', '"a": 0'), ("late = 14", "late = 0"), ("y + self.inner", "y - self.inner"),
]  # fmt: skip


def test_edits_of_ones_own_model_and_its_settings_are_told_and_its_use_is_not():
    """The same weights and names; what forward computes, reads and is built with differs."""
    net = edited(NET)
    before = fingerprint(net)
    assert fingerprint(edited(NET)) == before
    assert fingerprint(edited("# a comment\n" + NET)) == before
    found = [fingerprint(edited(NET, edit)) for edit in EDITS]
    assert len({before, *found}) == 1 + len(EDITS)
    net(torch.ones(3, 2))
    net(torch.ones(3, 2))
    assert net.calls == 2
    assert fingerprint(net) == before


def test_edits_of_callable_losses_and_of_optimizers_are_told_and_their_use_is_not():
    loss = edited(NET, name="loss")
    before = fingerprint(loss)
    assert fingerprint(edited(NET, name="loss")) == before
    for edit in (("Loss(15)", "Loss(0)"), ("self._power\n", "-self._power\n"), ("{'k': k}", "{}")):
        edit = (edit[0].replace("'", '"'), edit[1])
        assert fingerprint(edited(NET, edit, name="loss")) != before
    loss(nn.Linear(2, 2), (torch.ones(1, 2),))
    assert fingerprint(loss) == before
    source = (
        "class Mine(SGD):\n    def update(self, *given):\n        return given[1]\nmade = Mine(0.1)"
    )
    one, same, other = (edited(source, ("[1]", to), SGD=SGD) for to in ("[1]", "[1]", "[0]"))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    wrapped = [functools.lru_cache(f) for f in (closure(1), closure(1), closure(2))]
    assert fingerprint(wrapped[0]) == fingerprint(wrapped[1]) != fingerprint(wrapped[2])


def test_what_is_taken_from_a_module_of_ones_own_is_part_of_a_print(monkeypatch):
    """Helpers of other files; of an installed one, its name."""
    prints = []
    for k in (1, 1, 2):
        helpers = types.ModuleType("helpers_of_mine")
        exec(f"def scaled(x):\n    return x * {k}", vars(helpers))
        monkeypatch.setitem(sys.modules, "helpers_of_mine", helpers)
        source = "import helpers_of_mine as h\nmade = lambda m, b: h.scaled(m(b))"
        taken = "from helpers_of_mine import scaled\nmade = lambda m, b: scaled(m(b))"
        prints.append((fingerprint(edited(source)), fingerprint(edited(taken))))
    assert prints[0] == prints[1]
    assert prints[0][0] != prints[2][0]
    assert prints[0][1] != prints[2][1]


class Kind(enum.Enum):
    ONE, TWO = 1, 2


@dataclass
class Chosen:
    kind: Kind = Kind.ONE


def test_a_print_is_the_same_after_pickling():
    """Which leaves `__slotnames__` behind in the class, as workers of joblib make it do."""
    before = fingerprint(Chosen)
    assert pickle.loads(pickle.dumps(Chosen())) == Chosen()
    assert "__slotnames__" in vars(Chosen)
    assert fingerprint(Chosen) == before


def test_members_of_an_enum_are_settings():
    """Their class has a length, which they have not."""
    assert fingerprint(Chosen()) == fingerprint(Chosen()) != fingerprint(Chosen(Kind.TWO))
    one, other = (edited("made = lambda m, b: kind", kind=kind) for kind in Kind)
    assert fingerprint(one) != fingerprint(other)


STAMPED = """
class Timer:
    def __init__(self):
        self.start, self._pid = next(TIMES), str(next(TIMES))

timer, RUNS, LOG, MEMO = Timer(), ["run", next(TIMES)], {next(TIMES): 1}, {}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.timer, self._made, self.sizes = Timer(), next(TIMES) / 2, [next(TIMES)]
        self.register_forward_hook(self.seen)
    def seen(self, module, given, output):
        self.count = 1
        self.sizes.append(len(output))
    def forward(self, x):
        memo = MEMO
        memo[len(x)] = 1
        return x * len(RUNS) + len(LOG) + (timer.start is None)

made = Net()
"""


def test_stamps_and_caches_are_no_settings():
    """A process's own times and numbers, in a killed run and in the one that goes on."""
    one, other = (edited(STAMPED, TIMES=itertools.count(stamp)) for stamp in (1, 100))
    assert fingerprint(one) == fingerprint(other)
    other(torch.ones(3))
    assert fingerprint(one) == fingerprint(other)


class Odd:
    """What cannot be pickled, compared or printed the same twice."""

    def __init__(self, lock):
        self.lock, self.file, self.rows = lock, (k for k in range(3)), {object()}
        self.options = {"lock": lock}


def test_what_cannot_be_read_is_passed_over():
    held = [edited("made = lambda m, b: odd", odd=Odd(threading.Lock())) for _ in range(2)]
    assert fingerprint(held[0]) == fingerprint(held[1])


def everything():
    """Of all kinds that have a print, some that Python orders or names by address."""
    held = {"a", "b", "c", "d"}
    return fingerprint(
        [edited(NET, name=name) for name in ("made", "loss", "Net", "options")],
        Problem(menagerie.mlp().model, lambda m, b: b in {"x", "y", "z"}, Own(torch.ones(3, 2))),
        Outputs(margin, menagerie.mlp().train).mean(by=list("aabbcc")),
        Recipe(SGD(0.1), 2, 1, schedule=lambda step: len(held) / (step + 1)),
        functools.partial(margin, held=held, thing=object()),
    )


def test_prints_are_the_same_in_every_process():
    """Whatever the hash seed, and wherever objects lie."""
    child = run_python(
        "from tests import test_fingerprint; print(test_fingerprint.everything())",
        PYTHONHASHSEED="1",
    )
    assert child.communicate(timeout=120)[0].strip() == everything()


def test_the_mode_of_a_model_is_no_part_of_it():
    model = Scaled(1.0)
    assert fingerprint(model.train()) == fingerprint(model.eval())


class Holder:
    """Attributes of many kinds, one of which refers back."""

    def __init__(self, inner, act=torch.tanh, options=None):
        self.inner, self.act, self.options = inner, act, options
        self.calls = 0
        self.back = lambda model, batch: self.inner

    def __call__(self, model, batch):
        self.calls += 1
        return self.act(model(batch[0])).sum(1)


class Buffered(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale), persistent=False)


HELD = {
    "module": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.5)),
    "act": (torch.tanh, torch.sin),
    "options": ({"t": 1}, {"t": 3}),
}


def test_what_objects_hold_is_told_apart_and_what_changes_in_use_is_not():
    assert fingerprint(Holder(1)) == fingerprint(Holder(1)) != fingerprint(Holder(2))
    for name, pair in HELD.items():
        settings = ({"inner": x} if name == "module" else {"inner": 1, name: x} for x in pair)
        one, other = (Holder(**given) for given in settings)
        assert fingerprint(one) != fingerprint(other)
    used = Holder(1)
    before = fingerprint(used)
    used(nn.Linear(2, 2), (torch.ones(1, 2),))
    assert fingerprint(used) == before
    assert fingerprint(Buffered(1.0)) == fingerprint(Buffered(1.0)) != fingerprint(Buffered(3.0))
    for layer in (nn.BatchNorm1d(2), nn.Dropout(0.5)):
        assert fingerprint(layer.train()) != fingerprint(layer.eval())


def test_a_part_of_itself_has_a_print():
    model = nn.Linear(2, 2)
    inner = model.forward
    model.forward = lambda x: inner(x) + model.bias.sum()
    assert fingerprint(model) == fingerprint(model)


def test_texts_that_look_like_addresses_are_texts():
    assert fingerprint(["cats at 0x1"]) != fingerprint(["dogs at 0x2"])


class Private(nn.Module):
    """A setting under a private name, and one that changes in use."""

    def __init__(self, scale):
        super().__init__()
        self._scale, self.calls = scale, 0

    def forward(self, x):
        self.calls += 1
        return x * self._scale


def of_globals(helper, temperature):
    """A loss that reads a helper and a number of its module."""
    space = {"__name__": "a_module", "torch": torch, "TEMPERATURE": temperature, "SEEN": []}
    exec(
        f"def helper(z):\n    return z {helper}\n"
        "def loss(model, batch):\n    SEEN.append(1)\n    return helper(model(batch[0]) / TEMPERATURE).sum(1)\n",
        space,
    )
    return space["loss"]


def test_private_settings_and_what_a_function_reads_are_part_of_a_print():
    assert fingerprint(Private(1)) == fingerprint(Private(1)) != fingerprint(Private(2))
    one = of_globals("+ 1", 1.0)
    assert fingerprint(one) == fingerprint(of_globals("+ 1", 1.0))
    assert fingerprint(one) != fingerprint(of_globals("+ 2", 1.0))
    assert fingerprint(one) != fingerprint(of_globals("+ 1", 2.0))
    used, before = Private(1), fingerprint(Private(1))
    used(torch.ones(1))
    assert fingerprint(used) == before
    before = fingerprint(one)
    one(nn.Linear(2, 2), (torch.ones(1, 2),))
    assert fingerprint(one) == before


def times(k):
    """Hooks of the four kinds that multiply by k, and one that torch has wrapped."""

    @torch.no_grad()
    def wrapped(module, given, output):
        return output * k

    return {
        "register_forward_hook": lambda module, given, output: output * k,
        "register_forward_pre_hook": lambda module, given: (given[0] * k,),
        "register_full_backward_hook": lambda module, given, output: (given[0] * k,),
        "register_full_backward_pre_hook": lambda module, given: (given[0] * k,),
        "wrapped": wrapped,
    }


def hooked(*hooks, kind="register_forward_hook"):
    model = menagerie.mlp().model
    for hook in hooks:
        getattr(model[0], kind)(hook)
    return model


@pytest.mark.parametrize("kind", times(1.0))
def test_hooks_are_part_of_a_model(kind):
    """A folder of retrainings went on after an edit of a hook, with the outputs of the old one."""
    how = {} if kind == "wrapped" else {"kind": kind}
    one, same, other = (hooked(times(k)[kind], **how) for k in (1.0, 1.0, 5.0))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(one) != fingerprint(menagerie.mlp().model)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))


def test_hooks_count_by_their_order_and_their_module():
    twice, plus = times(2.0)["register_forward_hook"], lambda module, given, output: output + 1
    assert fingerprint(hooked(twice, plus)) != fingerprint(hooked(plus, twice))
    elsewhere = menagerie.mlp().model
    elsewhere[-1].register_forward_hook(twice)
    assert fingerprint(hooked(twice)) != fingerprint(elsewhere)


def collecting():
    """A hook that keeps and counts what it sees, in every way that closures do."""
    seen, by_name, counts, calls = [], {}, [0], 0

    def hook(module, given, output, name="layer"):
        nonlocal calls
        calls += 1
        seen.append(output)
        by_name[name] = output.detach()
        by_name.setdefault("all", []).append(calls)
        by_name["all"].append(len(output))
        counts[0] += 1

    return hook


def test_what_hooks_collect_is_no_part_of_a_model():
    model = hooked(collecting())
    before = fingerprint(model)
    model(menagerie.mlp().train[[0, 1]][0])
    assert fingerprint(model) == before == fingerprint(hooked(collecting()))


def collecting_elsewhere(weights):
    """Losses that change containers and tensors of their own, beside settings around them that they only read."""

    def appends(model, batch):
        parts = []
        parts.append(model(batch[0]).sum(1) * weights["one"])
        return parts[0]

    def masks(model, batch):
        scale = torch.ones(len(batch[0]))
        scale[batch[1] == 1] = weights["one"]
        return model(batch[0]).sum(1) * scale

    def adds(model, batch):
        return model(batch[0]).sum(1).add(weights["one"])

    def pops(model, batch):
        batch = dict(enumerate(batch))
        batch.pop(1)
        return model(batch[0]).sum(1) * weights["one"]

    return appends, masks, adds, pops


@pytest.mark.parametrize("which", range(4))
def test_settings_that_a_function_only_reads_are_part_of_it_whatever_else_it_changes(which):
    one, same, other = (collecting_elsewhere({"one": k})[which] for k in (1.0, 1.0, 9.0))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    prints = []
    for scale in (1.0, 9.0):
        space = {"__name__": "__main__", "CONFIG": {"scale": scale}}
        exec(
            "def loss(m, b):\n    parts = []\n    parts.append(1)\n    return parts[0] * CONFIG['scale']",
            space,
        )
        prints.append(fingerprint(space["loss"]))
    assert prints[0] != prints[1]


def library_hooks():
    """Prints of a model before and after what packages hook into it by themselves."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    prints = [fingerprint(model), fingerprint(pickle.loads(pickle.dumps(model)))]
    model(input_ids=torch.ones(1, 4, dtype=torch.long), output_hidden_states=True)
    model.enable_input_require_grads()
    prints.append(fingerprint(model))
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        layer = norm(nn.Linear(3, 3)).eval()
        prints += [fingerprint(layer), fingerprint(copy.deepcopy(layer))]
    return [*prints, fingerprint(hooked(times(3.0)["wrapped"]))]


def test_hooks_that_packages_register_by_themselves_are_no_part_of_a_model():
    """Before and after a first pass, of copies, and in another process."""
    prints = library_hooks()
    assert prints[0] == prints[1] == prints[2]
    assert prints[3] == prints[4]
    assert prints[5] == prints[6]
    child = run_python(
        "from tests import test_fingerprint; print(test_fingerprint.library_hooks())",
        PYTHONHASHSEED="1",
    )
    assert child.communicate(timeout=120)[0].strip().splitlines()[-1] == str(prints)


def test_a_folder_is_refused_after_an_edit_of_a_hook_and_goes_on_without(tmp_path):
    def call(k):
        problem = menagerie.mlp(9)
        problem.model.register_forward_hook(times(k)["register_forward_hook"])
        outputs = Outputs(margin, problem.train)
        return retrain(
            problem, Recipe(SGD(0.1), 3, 1), outputs, np.ones((1, 9)), seeds=1, folder=tmp_path
        )

    first = call(1.0)
    np.testing.assert_array_equal(call(1.0).per_seed, first.per_seed)
    with pytest.raises(ValueError, match="of another run"):
        call(5.0)


def test_what_transformers_notes_on_a_first_pass_is_no_part_of_a_print():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    before = fingerprint(model)
    model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 2]))
    assert config.problem_type is not None
    assert fingerprint(model) == before


def test_prints_of_functions_that_call_one_another_take_no_time():
    """A dozen functions that each read all others: read once each, where paths through them are 12!."""
    names = [f"f{k}" for k in range(12)]
    space = {"__name__": "a_module"}
    lines = [f"def {a}(x):\n    return [{', '.join(names)}] and {k}" for k, a in enumerate(names)]
    exec("\n".join(lines), space)
    first = fingerprint(space["f0"])
    space2 = {"__name__": "a_module"}
    exec("\n".join(lines).replace("and 11", "and 99"), space2)
    assert fingerprint(space["f0"]) == first != fingerprint(space2["f0"])


def test_arrays_of_objects_and_sparse_tensors_have_prints():
    names = [np.array(["cat", dog], dtype=object) for dog in ("dog", "dog", "cow")]
    assert fingerprint(names[0]) == fingerprint(names[1]) != fingerprint(names[2])
    sparse = [(k * torch.eye(3)).to_sparse() for k in (1, 1, 2)]
    assert fingerprint(sparse[0]) == fingerprint(sparse[1]) != fingerprint(sparse[2])
    fingerprint(torch.ones(2, device="meta"))


def test_what_an_object_keeps_in_slots_counts():
    class Weighted:
        __slots__ = ("_factor",)

        def __init__(self, factor):
            self._factor = factor

        def __call__(self, model, batch):
            return self._factor * model(batch)

    class Again(Weighted):
        __slots__ = "more"

    for kind in (Weighted, Again):
        assert fingerprint(kind(1.0)) == fingerprint(kind(1.0))
        assert fingerprint(kind(1.0)) != fingerprint(kind(10.0))
    assert fingerprint(Again(1.0)) != fingerprint(Weighted(1.0))
