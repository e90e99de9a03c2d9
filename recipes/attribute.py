"""How does a model depend on its training data? Attributed by any method, judged by retraining.

    python recipes/attribute.py                                   # digits MLP, metagradients, a few minutes
    python recipes/attribute.py --task text --drop .01 .05        # a tiny GPT-2 on embedded text
    python recipes/attribute.py --task text --data 'pool/*.parquet' --target target.jsonl --model my/folder
    python recipes/attribute.py --task table --data mine.csv --label outcome --out runs/mine
    python recipes/attribute.py --method influence --out runs/digits

Checks whether first order holds (and takes the learning rate or ε that the pre-flight suggests), trains,
attributes, retrains on random subsets and writes the report. The same command again reads back the
trainings that are finished.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.command import bar

if TYPE_CHECKING:
    from recipes.data.tasks import Task


@dataclass(frozen=True)
class Flags:
    """Train a small model, compute a datamodel, retrain on subsets, report LDS by fraction dropped."""

    task: Literal["digits", "text", "table"] = "digits"
    """'digits': an MLP on scikit-learn's digits; 'text': a language model; 'table': an MLP on a table, such as your own file."""
    data: str = "embedded"
    """Text to train on: 'embedded', a glob of .parquet/.jsonl/.txt files, a saved dataset, or a hub name; of a table, 'digits',
    'breast_cancer', or a .parquet or .csv file of features with a label column."""
    label: str = "label"
    """Column of a table that holds the label."""
    ignore: tuple[str, ...] = ()
    """Columns of a table that are no features, such as ids and dates."""
    test: str | None = None
    """File of held-out rows of a table; by default two fifths of the data, half of which are targets."""
    width: int = 64
    """Of the hidden layer of a table's network; 0 for logistic regression."""
    target: str = "embedded"
    """Held-out text whose losses are predicted; same forms."""
    text: str = "text"
    """Column that holds the text."""
    model: str = "gpt2"
    """Of a text task: 'gpt2' (130,000 parameters), or a transformers folder (its weights, else its config)."""
    rows: int | None = None
    """Training rows; by default 1,500 digits, up to 1,000 blocks of text or all of a table."""
    targets: int = 20
    """Outputs to predict."""
    method: Literal["magic", "influence", "ekfac", "trak", "source", "tracin"] = "magic"
    """How to attribute."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """SGD with momentum .9, or AdamW with 1e-8 inside its root."""
    lr: float | None = None
    """Learning rate; by default .02 for SGD, .003 for AdamW."""
    eps_root: float = 1e-8
    """Inside AdamW's root: larger is smoother."""
    batch_size: int = 50
    """Rows a step."""
    epochs: float | None = None
    """Passes over the rows; by default 15, 4 for text."""
    preflight: Literal["search", "look", "off"] = "search"
    """For magic: take what passes, only say what was found, or skip it."""
    exposure: float = 1.0
    """Of the attributed runs: .5 predicts fresh trainings on halves best."""
    runs: int = 1
    """Attributed runs, whose datamodels are averaged (with --fresh)."""
    fresh: bool = False
    """Judge by fresh seeds with rows really removed, instead of the same order with weights set to zero."""
    drop: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5)
    """Fractions of the rows that are dropped."""
    subsets: int = 40
    """Random subsets for each fraction."""
    seeds: int = 3
    """Trainings of each subset, with --fresh."""
    jobs: int = 2
    """Trainings side by side, each on one thread."""
    device: str = "cpu"
    """Where to train: cpu, cuda, ..."""
    out: Path = Path("runs/attribute")
    """Folder for everything that is written."""


def main(flags: Flags) -> None:
    """The steps, in order; each reads back what an earlier call has finished."""
    import torch

    from recipes.command import at_least, at_most, shares, some_rows

    torch.set_num_threads(1)  # small tensors: threads wait more than they work
    at_least(flags, subsets=3, runs=1, seeds=1, jobs=1, targets=1, rows=2, epochs=1e-9, lr=1e-12)
    at_least(flags, exposure=1e-9)
    at_most(flags, exposure=1)
    shares(flags, "drop")
    refuse_unused(flags)
    task, recipe = prepare(flags)
    some_rows(flags, "drop", task.problem.n)
    flags.out.mkdir(parents=True, exist_ok=True)
    recipe = checked(flags, task, recipe)
    estimate(flags, task, recipe)
    datamodel = attribute(flags, task, recipe)
    tables = judge(flags, task, recipe)
    write_report(flags, task, recipe, datamodel, tables)


OF_TASK = {
    "digits": (),
    "text": ("data", "target", "text", "model"),
    "table": ("data", "label", "ignore", "test", "width"),
}


def refuse_unused(flags: Flags) -> None:
    """Raise for flags that another task reads, or that another flag rules out.

    Raises:
        ValueError: there are some; says which task they are of.
    """
    for task, names in OF_TASK.items():
        others = [name for name in names if name not in OF_TASK[flags.task]]
        if unused := [n for n in others if getattr(flags, n) != getattr(Flags, n)]:
            raise ValueError(
                f"expected --task {task} with {', '.join(f'--{n}' for n in unused)}, got --task {flags.task}"
            )
    if flags.runs > 1 and not flags.fresh:
        raise ValueError(
            f"expected --fresh with --runs {flags.runs}: several runs are of other initial weights and orders, and without "
            "it retrainings are of the first run's; got no --fresh"
        )
    if flags.task == "table" and flags.data == "embedded":
        raise ValueError(
            "expected --data with --task table: 'digits', 'breast_cancer', or a .parquet or .csv file; got none"
        )


def prepare(flags: Flags) -> tuple[Task, Any]:
    """The task, and the recipe as the flags have it."""
    from attribution_core import SGD, AdamW, Recipe
    from recipes.command import device_of
    from recipes.data.tasks import digits_task, table_task, text_task

    if flags.task == "digits":
        task = digits_task(1500 if flags.rows is None else flags.rows, flags.targets)
    elif flags.task == "table":
        task = table_task(
            flags.data,
            flags.label,
            flags.test,
            flags.ignore,
            flags.rows,
            flags.targets,
            flags.width,
        )
    else:
        task = text_task(
            flags.out / "text", flags.rows, flags.targets,
            data=flags.data, target=flags.target, text=flags.text, model=flags.model,
        )  # fmt: skip
    task.problem.model.to(device_of(flags.device))
    optimizer: Any = (
        SGD(flags.lr or 0.02, momentum=0.9)
        if flags.optimizer == "sgd"
        else AdamW(flags.lr or 0.003, eps_root=flags.eps_root)
    )
    epochs = flags.epochs or (4 if flags.task == "text" else 15)
    recipe = Recipe(
        optimizer, min(flags.batch_size, task.problem.n), epochs,
        schedule="linear" if flags.task == "text" else None, init=task.make,
    )  # fmt: skip
    return task, recipe


def checked(flags: Flags, task: Task, recipe: Any) -> Any:
    """The recipe that the pre-flight passes, or the given one."""
    from attribution_core import preflight

    if flags.method != "magic" or flags.preflight == "off":
        return recipe
    found = preflight(
        task.problem, recipe, task.outputs, exposure=flags.exposure,
        search=flags.preflight == "search", progress=bar("pre-flight"),
    )  # fmt: skip
    print(f"pre-flight\n{found.table()}\n{found}", flush=True)
    if flags.preflight == "look" or found.best is None:
        return recipe
    return found.best.recipe


def estimate(flags: Flags, task: Task, recipe: Any) -> None:
    """What is to come, from a few timed steps: printed before it starts."""
    import time
    import warnings

    from attribution_core import MetagradientWarning, magic, train

    few = [list(batch) for batch in recipe.draw(_rows(task), flags.exposure)]
    start = time.perf_counter()
    run = train(task.problem, replace(recipe, order=few[:4], schedule=None))
    step = (time.perf_counter() - start) / len(run.order)
    training = step * len(few)
    trainings = len(flags.drop) * flags.subsets * (flags.seeds if flags.fresh else 1)
    state = run.last.bytes
    words = f"training about {training:.0f} s ({len(few)} steps), {state / 2**20:.1f} MiB a state"
    if flags.method == "magic":
        with warnings.catch_warnings():  # rows that four steps leave out do not matter here
            warnings.simplefilter("ignore", MetagradientWarning)
            magic(run, task.outputs, check=False)  # the first walk takes seconds to start
            start = time.perf_counter()
            magic(run, task.outputs, check=False)
        walk = (time.perf_counter() - start) / len(run.order) * len(few)
        words += f"; walking back about {walk:.0f} s for {len(task.outputs)} outputs"
    retraining = trainings * training / flags.jobs
    print(
        f"{words}; {trainings} retrainings about {retraining / 60:.1f} min in {flags.jobs} jobs",
        flush=True,
    )


def _rows(task: Task) -> Any:
    import numpy as np

    return np.arange(task.problem.n)


def curvature(flags: Flags, task: Task) -> dict[str, Any]:
    """Of an influence function: EK-FAC as it is where the model has no products with its exact curvature."""
    from recipes.data.language_model import no_forward_mode

    own = flags.task == "text" and flags.model != Flags.model
    if not own or flags.method not in ("influence", "ekfac"):
        return {}
    if not (why := no_forward_mode(task.problem)):
        return {}
    print(
        f"warning: EK-FAC, not refined, as {flags.model!r} has no forward-mode derivatives: {why}",
        flush=True,
    )
    return {"curvature": "ekfac", "refine": 0}


def attribute(flags: Flags, task: Task, recipe: Any) -> Any:
    """The datamodel of the runs, by the method asked for."""
    from attribution_core import describe, influence, magic, source, tracin, train, trak

    exact = curvature(flags, task)
    steps = len(recipe.draw(_rows(task), flags.exposure))
    marks = min(6, steps) if flags.method in ("source", "tracin") else 0
    states: Any = "sqrt" if flags.method == "magic" else 0
    kept = f"{'states' if states else 'checkpoints' if marks else 'plain'}-{flags.exposure:g}"
    first = 1000 if flags.fresh else recipe.seed  # seeds that the truth does not use
    runs = [
        train(
            task.problem, replace(recipe, seed=first + k), exposure=flags.exposure, checkpoints=marks,
            states=states, folder=flags.out / "runs" / f"{kept}-{first + k}",
            progress=bar("training"),
        )
        for k in range(flags.runs)
    ]  # fmt: skip
    given: Any = runs if len(runs) > 1 else runs[0]
    methods: dict[str, Any] = {
        "magic": partial(magic, check=True, progress=bar("walking back")),
        "influence": partial(influence, **exact),
        "ekfac": partial(influence, **{"curvature": "ekfac", **exact}),
        "trak": trak,
        "source": partial(source, segments=min(3, marks)),
        "tracin": tracin,
    }
    datamodel = replace(methods[flags.method](given, task.outputs), ids=task.places)
    if flags.method == "magic":
        print(describe(datamodel), flush=True)
    return datamodel


def judge(flags: Flags, task: Task, recipe: Any) -> dict[float, Any]:
    """Retrained random subsets for each fraction dropped."""
    from attribution_core import random_subsets, retrain

    tables = {}
    for drop in flags.drop:
        weights = random_subsets(task.problem.n, flags.subsets, keep=1 - drop)
        tables[drop] = retrain(
            task.problem, recipe, task.outputs, weights,
            seeds=flags.seeds if flags.fresh else [recipe.seed],
            drop="row" if flags.fresh else "weight", jobs=flags.jobs,
            folder=flags.out / "retraining", progress=bar(f"retraining, {100 * drop:g}% dropped"),
        )  # fmt: skip
    return tables


def write_report(
    flags: Flags, task: Task, recipe: Any, datamodel: Any, tables: dict[float, Any]
) -> None:
    """LDS by fraction as a table, the calibration picture, the rows that matter most; printed and written."""
    import warnings
    from dataclasses import asdict

    from applied import pictures, report
    from applied.recipe import Interval
    from attribution_core import describe, lds
    from recipes.command import as_given

    datamodel.save(flags.out / "datamodel")
    found = {drop: lds(datamodel, table) for drop, table in tables.items()}
    print("\n".join(f"{100 * drop:4g}% dropped: {one}" for drop, one in found.items()))
    rows = [
        (f"{100 * drop:g}%", Interval(one.mean, *one.interval), one.slope, one.ceiling)
        for drop, one in found.items()
    ]
    truth = (
        f"{flags.seeds} fresh seeds, rows removed"
        if flags.fresh
        else "same initial weights and order, weights set to zero"
    )
    sections = {
        "How well retrained models are predicted": [
            report.table(rows, ("dropped", "LDS", "slope", "ceiling")),
            report.paragraph(
                f"Rank correlation, over {flags.subsets} random subsets, of predicted and retrained outputs; mean over "
                f"{len(datamodel.base)} outputs with its 95 % interval. Truth: {truth}."
            ),
        ]
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for drop, table in tables.items():
            predicted = datamodel.predict(table.weights).mean(1)
            figure = pictures.calibration(predicted, table.outputs.mean(1), unit=task.unit)
            sections[f"Predicted against actual, {100 * drop:g}% dropped"] = [
                report.picture(figure)
            ]
    reading = report.paragraph(task.reading)
    sections["Rows that move the mean output most"] = [reading, moving(datamodel, task)]
    sections["Rows that move the worst outputs most"] = [reading, worst(datamodel, task)]
    facts = {
        "model": f"{task.name}, {sum(v.numel() for v in task.problem.params.values()):,} parameters, {task.problem.n:,} rows",
        "optimizer": str(recipe.optimizer),
        "steps": f"batches of {recipe.batch_size}, {recipe.epochs:g} epochs",
        "method": flags.method,
        "attributed": f"{flags.runs} run{'s'[: flags.runs != 1]} at exposure {flags.exposure:g}",
        "truth": f"{flags.subsets} subsets a fraction, {truth}",
        **task.facts,
    }
    if flags.method == "magic":
        sections["Can it be believed?"] = [report.paragraph(describe(datamodel))]
    sections["How this was made"] = [report.facts(facts)]
    report.Page(
        "How outputs depend on training data",
        f"{task.name}: {flags.method} at exposure {flags.exposure:g}",
        sections,
    ).save(flags.out / "report.html")
    metrics = {f"{drop:g}": asdict(one) for drop, one in found.items()}
    report.write_metrics(
        flags.out / "metrics.json",
        {"lds": metrics, "meta": datamodel.meta, **facts, "flags": as_given(flags)},
    )
    print(f"written to {flags.out}/report.html")


def moving(datamodel: Any, task: Task) -> str:
    """A table of the rows whose weight would lower or raise the mean output most; of none, it says so."""
    from applied import report
    from recipes.reports.ends import ends

    scores = datamodel.mean().scores[:, 0]
    rows: list[Any] = []
    for which, some in zip(("lower", "raise"), ends(scores, 10), strict=True):
        found: list[Any] = [
            (
                which,
                _does(which, task),
                task.places[i].item(),
                float(scores[i]),
                task.show(int(i))[:80],
            )
            for i in some
        ]
        rows += found or [(which, _does(which, task), "none", None, "")]
    return report.table(rows, ("its weight would", "so it", "row", "score", "what it is"))


def _does(which: str, task: Task) -> str:
    """Whether a row helps whose weight would lower or raise outputs."""
    return "helps" if (which == "raise") == (task.better > 0) else "hurts"


def worst(datamodel: Any, task: Task, count: int = 3) -> str:
    """A table of the rows whose weight would lower or raise each of the worst outputs most."""
    import numpy as np

    from applied import report
    from recipes.reports.ends import ends

    rows: list[Any] = []
    for j in np.argsort(task.better * datamodel.base, kind="stable")[:count].tolist():
        scores, what = datamodel.scores[:, j], task.show_target(j)[:80]
        for which, some in zip(("lower", "raise"), ends(scores, 5), strict=True):
            rows += [
                (what, float(datamodel.base[j]), which, _does(which, task), task.places[i].item(), float(scores[i]),
                 task.show(int(i))[:80])
                for i in some
            ]  # fmt: skip
    header = ("output", "its value", "its weight would", "so it", "row", "score", "what it is")
    return report.table(rows, header)


def run(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    from recipes.command import run_command

    run_command(Flags, main, __doc__, arguments)


if __name__ == "__main__":
    run()
