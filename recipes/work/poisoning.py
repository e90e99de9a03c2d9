"""The work of poison.py: a split of the data at a time, attacked, retrained, searched and mended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from applied.audit.attack import instead
from applied.audit.versions import Versions, labels_of
from applied.poisoning import (
    Attack,
    Detection,
    Repair,
    ThreatModel,
    attempt,
    detect,
    flip_labels,
    relabelled,
    repair,
)
from attribution_core import (
    SGD,
    LinearDatamodel,
    Outputs,
    Problem,
    Recipe,
    correct,
    cross_entropy,
    fit_curvature,
    influence,
    join_outputs,
    refit,
    refitted,
    retrain,
    self_influence,
    train,
)
from recipes.command import at_least, bar
from recipes.data.classification import (
    Classification,
    load,
    problem_of,
    warn_of_repeated,
)

if TYPE_CHECKING:
    from recipes.poison import Flags

ATTACKS = ("random", "confident", "one shot", "in rounds")
TARGET, HELD_OUT, ACCURACY = "target loss", "held-out loss", "held-out accuracy"
SURROGATES = 3  # trainings that a network's surrogate is the mean of
BATCH = 1024  # rows that are scored at a time
FIRST_VICTIM = 1000  # seed


@dataclass(frozen=True)
class Outcome:
    """What one attack of one split came to, in numbers.

    Args:
        clean, changed, random: output -> value without attack, change by the attack, by a random attack of the
            same budget; means over victims. predicted: output -> change, where it was predicted.
        auc: detector -> chance that a changed row looks more suspicious than another.
        possible: output -> share that comes back where exactly the changed rows are removed.
        suspects: rows whose label is disputed; removed: all of them, or none; caught: changed ones among these.
        spared: classes of which removing the suspects, or as many rows at random, would leave no row.
        recovered: output -> share of the damage that came back; by_random: by removing as many at random; nan where
            nothing was removed.
        curves: detector -> ROC curve, (false, true) positive rates.
    """

    split: int
    budget: float
    attack: str
    rows: int
    clean: dict[str, float]
    changed: dict[str, float]
    random: dict[str, float]
    predicted: dict[str, float]
    auc: dict[str, float]
    suspects: int
    removed: int
    caught: int
    spared: Sequence[str]
    recovered: dict[str, float]
    by_random: dict[str, float]
    possible: dict[str, float]
    curves: dict[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Emptied:
    """An attack of one split, or the random one beside it, that left some classes no row: nothing can be fitted."""

    split: int
    budget: float
    attack: str
    emptied: Sequence[str]


class ClassGone(ValueError):
    """No row of the classes that it holds is left."""


@dataclass(frozen=True, eq=False)
class Bench:
    """One split: the model under audit, how its surrogates and victims are trained, and what a defender holds.

    Args:
        problem: the training data and the model on them, trained.
        surrogate, victim: as `flip_labels` takes them.
        trained: poisoned problem -> (the problem with a model trained on it, what `influence` takes, a curvature).
        names: of the victims' outputs.
        trusted: rows that the defender has looked at.
    """

    data: Classification
    problem: Problem
    classes: int
    surrogate: Callable[[Problem, NDArray[np.float64]], LinearDatamodel]
    victim: Callable[..., Any]
    trained: Callable[[Problem], tuple[Problem, Any, Any]]
    names: tuple[str, ...]
    trusted: tuple[NDArray[Any], NDArray[Any]]
    seeds: list[int]


def checked(flags: Flags) -> Classification:
    """The first split's data.

    Raises:
        ValueError: budgets, rounds, splits or victims out of range; data that are no table of classes.
        FileNotFoundError: no such data.
    """
    if not flags.budgets or not all(0 < budget < 1 for budget in flags.budgets):
        raise ValueError(f"expected budgets in (0, 1), shares of the labels, got {flags.budgets}")
    if len(set(flags.budgets)) < len(flags.budgets):
        raise ValueError(f"expected different budgets, got {flags.budgets}; each is counted once")
    for name in ("rounds", "splits", "victims", "jobs"):
        if getattr(flags, name) < 1:
            raise ValueError(f"expected at least one of --{name}, got {getattr(flags, name)}")
    at_least(flags, width=0, decay=1e-12)
    data = data_of(flags, flags.seed)
    warn_of_repeated(data)
    for budget in flags.budgets:
        ThreatModel(budget, "labels").rows(len(data.x))
    return data


def data_of(flags: Flags, split: int) -> Classification:
    """The rows of a split."""
    return load(flags.data, flags.label, flags.ignore, flags.test, split)


def study(flags: Flags) -> tuple[list[Outcome], list[Emptied]]:
    """All splits and budgets, side by side on `jobs` cores; what is finished is kept and read back by the same call."""
    from joblib import Parallel, delayed, parallel_config

    splits = range(flags.seed, flags.seed + flags.splits)
    parts = [(split, budget) for split in splits for budget in flags.budgets]
    workers = min(flags.jobs, len(parts))
    with parallel_config(backend="loky", n_jobs=workers, inner_max_num_threads=1):
        found = Parallel(return_as="generator")(delayed(one_part)(flags, *part) for part in parts)
        return parted(
            [x for some in bar("splits x budgets")(found, total=len(parts)) for x in some]
        )


def parted(found: Sequence[Outcome | Emptied]) -> tuple[list[Outcome], list[Emptied]]:
    """(outcomes of attacks that left rows of every class in every split, where others did not).

    Over the splits that it spared alone, an attack would look weaker than it is.

    Raises:
        ValueError: no such attack.
    """
    lost = [x for x in found if isinstance(x, Emptied)]
    without = {(x.budget, x.attack) for x in lost}
    kept = [x for x in found if isinstance(x, Outcome) and (x.budget, x.attack) not in without]
    if not kept:
        names = sorted({name for x in lost for name in x.emptied})
        raise ValueError(
            f"expected an attack that leaves rows of every class, got none: they take away {names[:5]}; pass smaller "
            "--budgets, a --width, or data without these classes"
        )
    return kept, lost


def one_part(flags: Flags, split: int, budget: float) -> list[Outcome | Emptied]:
    """Every attack of one split and budget."""
    torch.set_num_threads(1)  # small tensors: threads wait more than they work
    from attribution_core.disk.files import write_text
    from attribution_core.disk.fingerprint import fingerprint

    shared = ("out", "jobs", "splits", "seed", "budgets")
    settings = {k: v for k, v in asdict(flags).items() if k not in shared}
    bench = prepared(flags, split)
    told = [field.name for field in fields(Outcome)]  # an earlier version had others
    made_of = fingerprint(bench.problem, bench.data, settings, split, told)[:16]
    outcomes: list[Outcome | Emptied] = []
    for name in ATTACKS:
        file = f"{split}-{budget:g}-{name.replace(' ', '-')}-{made_of}.json"
        path = flags.out / "splits" / file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found: Outcome | Emptied
            try:
                found = judged(bench, budget, name, flags.rounds, split)
            except ClassGone as error:
                found = Emptied(split, budget, name, error.args)
            write_text(path, json.dumps(asdict(found)))
        kept = json.loads(path.read_text(encoding="utf-8"))
        outcomes.append(Emptied(**kept) if "emptied" in kept else Outcome(**kept))
    return outcomes


def prepared(flags: Flags, split: int) -> Bench:
    """Training, target, trusted and test rows, and how models are made of them."""
    data = data_of(flags, split)
    half = len(data.target_x) // 2
    trusted = data.target_x[half:], data.target_y[half:]
    target = data.target_x[:half], data.target_y[:half]
    make = exact if flags.width == 0 else network
    return make(flags, data, trusted, target)


def readings(data: Classification, target: Any, dtype: torch.dtype) -> dict[str, Outputs]:
    """Mean losses of the target and of the test rows, and the accuracy of the latter."""
    test = torch.tensor(data.test_x, dtype=dtype), torch.tensor(data.test_y)
    target = torch.tensor(target[0], dtype=dtype), torch.tensor(target[1])
    return {
        TARGET: Outputs(cross_entropy, target).mean(), HELD_OUT: Outputs(cross_entropy, test).mean(),
        ACCURACY: Outputs(correct, test).mean(),
    }  # fmt: skip


def read(parts: dict[str, Outputs]) -> tuple[Outputs, Outputs]:
    """(what is read of victims, what is predicted: all that has a derivative)."""
    losses = {name: some for name, some in parts.items() if name != ACCURACY}
    return join_outputs(parts), join_outputs(losses)


@contextmanager
def every_class(data: Classification, table: Problem, weights: Any) -> Iterator[None]:
    """Name the classes without a row, where that is why nothing can be fitted at weights [n] or [m, n].

    Raises:
        ClassGone: it is.
    """
    try:
        yield
    except ValueError:
        labels = labels_of(table.train)[1]
        there = [np.unique(labels[w > 0]) for w in np.atleast_2d(weights)]
        gone = [name for k, name in enumerate(data.classes) if not all(k in some for some in there)]
        if not gone:
            raise
        raise ClassGone(*gone) from None


def exact(flags: Flags, data: Classification, trusted: Any, target: Any) -> Bench:
    """Logistic regression: surrogate and victims at the optimum."""
    from sklearn.linear_model import LogisticRegression

    strength = 1.0 / (flags.decay * len(data.x))
    fitted = LogisticRegression(C=strength, tol=1e-6, max_iter=5000).fit(data.x, data.y)
    problem = Problem.from_sklearn(fitted, data.x, data.y)
    outputs, losses = read(readings(data, target, torch.float64))

    def surrogate(table: Problem, w: NDArray[np.float64]) -> LinearDatamodel:
        with every_class(data, table, w):
            at = refitted(fitted, table, w)
        return influence(at, losses, weights=w, drop="row", curvature="hessian", batch_size=BATCH)

    def victim(table: Problem, w: NDArray[np.float64], seeds: Any) -> Any:
        with every_class(data, table, w):
            return refit(fitted, table, outputs, w, seeds=seeds)

    def trained(poisoned: Problem) -> tuple[Problem, Any, Any]:
        at = refitted(fitted, poisoned, np.ones(poisoned.n))
        return at, at, fit_curvature(at, "hessian")

    return Bench(
        data, problem, len(data.classes), surrogate, victim, trained, outputs.names, trusted, [0]
    )


def network(flags: Flags, data: Classification, trusted: Any, target: Any) -> Bench:
    """A small network: surrogates and victims trained from fresh seeds."""
    problem, make = problem_of(data, flags.width, 0.0)
    size = min(flags.batch_size, problem.n)
    recipe = Recipe(SGD(flags.lr, momentum=0.9), size, flags.epochs, init=make)
    outputs, losses = read(readings(data, target, torch.float32))
    seeds = list(range(FIRST_VICTIM, FIRST_VICTIM + flags.victims))

    def runs(table: Problem, w: NDArray[np.float64]) -> Any:
        return [
            train(table, replace(recipe, seed=seed), w, drop="row", states=0)
            for seed in range(SURROGATES)
        ]

    def surrogate(table: Problem, w: NDArray[np.float64]) -> LinearDatamodel:
        return influence(runs(table, w), losses, curvature="ekfac", batch_size=BATCH)

    def victim(table: Problem, w: NDArray[np.float64], seeds: Any) -> Any:
        return retrain(table, recipe, outputs, w, seeds=seeds)

    def trained(poisoned: Problem) -> tuple[Problem, Any, Any]:
        run = train(poisoned, replace(recipe, seed=FIRST_VICTIM), states=0)
        return run.trained(), run, "ekfac"

    return Bench(
        data, replace(problem, model=trained(problem)[0].model), len(data.classes), surrogate, victim, trained, outputs.names, trusted,
        seeds,
    )  # fmt: skip


def judged(bench: Bench, budget: float, name: str, rounds: int, split: int) -> Outcome:
    """One attack: what it changed, who would have seen it, what comes back."""
    attack = attacked(bench, budget, name, rounds, split)
    found = searched(bench, attack)
    labels = labels_of(attack.poisoned.train)[1]
    lost = np.setdiff1d(labels, np.delete(labels, found.suspects))
    spared, mended = [bench.data.classes[k] for k in lost], None
    if len(found.suspects) and not spared:
        try:
            mended = repair(attack, found, bench.victim)
        except ClassGone as error:  # removed at random, or with the changed rows
            spared = list(error.args)
    return outcome(bench, attack, found, mended, spared, budget, name, split)


def attacked(bench: Bench, budget: float, name: str, rounds: int, split: int) -> Attack:
    """The attack by name, verified on victims."""
    threat = ThreatModel(budget, "labels")
    if name in ("one shot", "in rounds"):
        many = 1 if name == "one shot" else min(rounds, threat.rows(bench.problem.n))
        return flip_labels(
            bench.problem, threat, bench.surrogate, bench.victim, classes=bench.classes, goal=TARGET,
            rounds=many, targets=bench.names, seeds=bench.seeds,
        )  # fmt: skip
    versions = relabelled(bench.problem, bench.classes)
    k = threat.rows(bench.problem.n)
    rng = np.random.default_rng([split, 0xA7])
    weights = confident(bench, versions, k) if name == "confident" else at_random(bench, versions, k, rng)  # fmt: skip
    return attempt(
        versions, weights, threat, bench.victim, targets=bench.names, seeds=bench.seeds, name=name
    )


def at_random(bench: Bench, versions: Versions, k: int, rng: Any) -> NDArray[np.float64]:
    """Random labels on random rows."""
    rows = rng.choice(bench.problem.n, k, replace=False)
    labels = (bench.data.y[rows] + rng.integers(1, bench.classes, k)) % bench.classes
    return instead(versions, rows * bench.classes + labels)


def confident(bench: Bench, versions: Versions, k: int) -> NDArray[np.float64]:
    """The least likely label on the rows that the model is surest of."""
    with torch.no_grad():
        p = (
            bench.problem.model(bench.problem.train[list(range(bench.problem.n))][0])
            .softmax(1)
            .numpy()
        )
    rows = np.argsort(-p[np.arange(len(p)), bench.data.y], kind="stable")[:k]
    return instead(versions, rows * bench.classes + p[rows].argmin(axis=1))


def searched(bench: Bench, attack: Attack) -> Detection:
    """What a defender sees, who holds the poisoned data and the trusted rows."""
    own, at, curve = bench.trained(attack.poisoned)
    batch: Any = own.train[list(range(own.n))]
    with torch.no_grad():
        losses = cross_entropy(own.model, batch).double().numpy()
    x, y = torch.tensor(bench.trusted[0]).to(batch[0]), torch.tensor(bench.trusted[1])
    trusted = Outputs(cross_entropy, (x, y)).mean()
    return detect(
        batch[0].numpy(), batch[1].numpy(), trusted=bench.trusted, planted=attack.planted,
        signals={
            "loss": losses,
            "self-influence": self_influence(at, curvature=curve),
            "influence on trusted rows": influence(at, trusted, curvature=curve, batch_size=BATCH).scores[:, 0],
        },
    )  # fmt: skip


def outcome(
    bench: Bench, attack: Attack, found: Detection, mended: Repair | None, spared: Sequence[str], budget: float,
    name: str, split: int,
) -> Outcome:  # fmt: skip
    """The numbers of one attack."""
    from sklearn.metrics import roc_curve

    names = attack.targets
    assert found.planted is not None
    curves = {}
    for detector, scores in found.scores.items():
        wrong, right, _ = roc_curve(found.planted, scores)
        curves[detector] = (wrong.tolist(), right.tolist())

    def each(values: Callable[[int], float]) -> dict[str, float]:
        return {target: float(values(j)) for j, target in enumerate(names)}

    repaired, at_random = (
        (None, None)
        if mended is None
        else (mended.verified.actual, mended.verified.control["random"])
    )
    best = without_changed(bench, attack)
    removed = found.suspects if mended is not None else found.suspects[:0]
    return Outcome(
        split=split, budget=budget, attack=name, rows=len(attack.changed),
        clean=each(lambda j: attack.outputs("no attack")[:, j].mean()),
        changed=each(lambda j: attack.effect(j).mean),
        random=each(lambda j: attack.effect(j, "random").mean),
        predicted={t: float(p) for t, p in zip(names, attack.predicted, strict=True) if np.isfinite(p)},
        auc={detector: found.auc(detector) for detector in found.scores},
        suspects=len(found.suspects),
        removed=len(removed), caught=int(attack.planted[removed].sum()), spared=spared,
        recovered=each(lambda j: share(attack, repaired, j)),
        by_random=each(lambda j: share(attack, at_random, j)),
        possible=each(lambda j: share(attack, best, j)),
        curves=curves,
    )  # fmt: skip


def without_changed(bench: Bench, attack: Attack) -> NDArray[np.float64] | None:
    """Outputs [s, t] of victims without exactly the changed rows; None where these are a whole class."""
    kept = attack.weights * attack.versions.clean
    try:
        return bench.victim(attack.versions.problem, kept[None], bench.seeds).per_seed[0]
    except ClassGone:
        return None


def share(attack: Attack, outputs: NDArray[np.float64] | None, j: int) -> float:
    """Recovered of the damage, ratio of means over victims; nan without outputs [s, t], or damage."""
    attacked = attack.outputs()[:, j]
    lost = (attacked - attack.outputs("no attack")[:, j]).mean()
    if outputs is None or not lost:
        return float("nan")
    return float((attacked - outputs[:, j]).mean() / lost)
