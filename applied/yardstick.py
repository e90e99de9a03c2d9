"""How far a set of unlearned models is from models that never saw the forget set.

Outputs [models, points] of unlearned models are compared with those of oracles, which were trained
without the forget set. No such distance is 0: two sets of oracles lie apart too, the more so the fewer
they are. So every number comes with its floor, the distance of other oracles, at the same number of
models; and with its ceiling, that of models which forgot nothing.

    found = evaluate({"newton": unlearned}, oracle, before)  # each: split -> [models, points]
    print(found.table())
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from applied.forgetting.divergence import attack, gaussian_klom, klom, sample
from applied.recipe import aligned
from attribution_core.disk.files import ending

__all__ = ["CEILING", "FLOOR", "Evaluation", "attack", "evaluate", "gaussian_klom", "klom"]

FLOOR, CEILING = "floor (oracle vs oracle)", "do nothing (ceiling)"
ORACLE, BEFORE = "oracle", "before"  # names of samples beside the methods
DIRECTION = "KL(unlearned || oracle)"
BINNED = 50  # models; with fewer, histograms of 20 bins show mostly their own noise
BEYOND = 3.0  # standard errors of a difference of means; fewer may be chance
SCATTERED = 3.0  # in distances from before to the oracles; models farther apart have scattered
Outputs = Mapping[str, NDArray[np.float64]]  # split -> [models, points]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Unlearned models beside oracles, beside other oracles (the floor) and those that forgot nothing.

    Args:
        scores: method -> split -> [z] divergences, nats; FLOOR and CEILING are methods too.
        outputs: method -> split -> [k, z], what was compared; "oracle" and "before" among them.
        kind: "binned" (`klom`) or "gaussian" (`gaussian_klom`).
        k: the number of models in every sample.
        bins: of the histograms.
        direction: of the divergence.
    """

    scores: Mapping[str, Outputs]
    outputs: Mapping[str, Outputs]
    kind: str
    k: int
    bins: int = 20
    direction: str = DIRECTION

    def __repr__(self) -> str:
        """A line: a generated one prints every output."""
        methods, splits = ", ".join(self.methods), ", ".join(self.splits)
        return f"Evaluation({methods} on {splits}, {self.kind}, {self.k} models of each)"

    @property
    def methods(self) -> tuple[str, ...]:
        """The unlearners, without floor and ceiling."""
        return tuple(name for name in self.scores if name not in (FLOOR, CEILING))

    @property
    def splits(self) -> tuple[str, ...]:
        """Such as forget, retain, validation."""
        return tuple(self.scores[FLOOR])

    @property
    def floor(self) -> Outputs:
        """Split -> [z], divergence of k other oracles: what no unlearner is asked to beat."""
        return self.scores[FLOOR]

    @property
    def ceiling(self) -> Outputs:
        """Split -> [z], divergence of the k models as they were before."""
        return self.scores[CEILING]

    def mean(self, method: str, split: str = "forget") -> float:
        """Mean divergence over a split's points, nats."""
        return float(self._of(self.scores, method, split).mean())

    def p95(self, method: str, split: str = "forget") -> float:
        """The divergence that 95 % of a split's points stay below, nats."""
        return float(np.quantile(self._of(self.scores, method, split), 0.95))

    def gap_closed(self, method: str, split: str = "forget") -> float:
        """(ceiling − method) / (ceiling − floor) of means: 0 did nothing, 1 is an oracle.

        nan where ceiling − floor ≤ floor / 2: the split shows no effect, so it tests nothing.
        """
        floor, ceiling = self.mean(FLOOR, split), self.mean(CEILING, split)
        if not ceiling - floor > floor / 2:
            return math.nan
        return (ceiling - self.mean(method, split)) / (ceiling - floor)

    def missing(self, method: str, split: str = "forget") -> dict[str, float]:
        """What keeps a method from the floor, nats a point: {"means": ..., "spread": ...}, adding up to mean − floor.

        "means" is by how much the distance would fall, more than the floor's, if each point's mean were the oracles':
        the error of the predicted, or matched, change. "spread" is the rest: models differ among themselves in
        another way than oracles do.
        """
        whole = self.mean(method, split) - self.mean(FLOOR, split)
        rest = self._levelled(method, split) - self._levelled(FLOOR, split)
        return {"means": whole - rest, "spread": rest}

    def _levelled(self, method: str, split: str) -> float:
        """The mean divergence, had each point the oracles' mean."""
        here, there = self._of(self.outputs, method, split), self.outputs[ORACLE][split]
        level = here - _centre(here) + _centre(there)
        return float(_divergence(level, there, self.kind, self.bins).mean())

    def margin_error(self, method: str, split: str = "forget") -> float:
        """Mean over points of |mean output − the oracles'|, output units; it never saturates."""
        here, there = self._of(self.outputs, method, split), self.outputs[ORACLE][split]
        return float(np.abs(here.mean(0) - there.mean(0)).mean())

    def attack(self, method: str, split: str = "forget") -> float:
        """Mean AUC of `attack` over a split's points; nan below four models."""
        here, there = self._of(self.outputs, method, split), self.outputs[ORACLE][split]
        return float(attack(here, there).mean()) if self.k >= 4 else math.nan

    def over_forgotten(self, method: str) -> float:
        """Share of forget points beyond the oracles, seen from before, by > 3 standard errors."""
        overshoot, error, _ = self._overshoot(method)
        return float((overshoot > BEYOND * error).mean())

    def over(self, method: str) -> bool:
        """Does it push outputs so far that this gives it away: `beyond` the oracles', or apart (`scatter` > 3)?"""
        return self.beyond(method) or self.scatter(method) > SCATTERED

    def beyond(self, method: str) -> bool:
        """Does it push outputs far beyond the oracles'?

        Yes if more than a quarter of the forget points are `over_forgotten` and the mean overshoot is
        more than 3 sd of an oracle's output; or more than half the way from before to the oracles and
        more than 1 sd. Less than 1 sd is hardly seen in one model (AUC .76).
        """
        overshoot, _, deviation = self._overshoot(method)
        before, oracle = self.outputs[BEFORE]["forget"], self.outputs[ORACLE]["forget"]
        way = float(np.abs(before.mean(0) - oracle.mean(0)).mean())
        far = min(3 * deviation, max(way / 2, deviation))
        return self.over_forgotten(method) > 0.25 and float(overshoot.clip(0).mean()) > far

    def scatter(self, method: str) -> float:
        """How far single models lie about their own mean, the median over models and forget points, in distances
        from before to the oracles or in an oracle's sd, whichever is longer.

        Destroyed models may lie on all sides of the oracles, so that their mean is not beyond them.
        """
        here, oracle, before = (
            self._of(self.outputs, name, "forget") for name in (method, ORACLE, BEFORE)
        )
        way = float(np.median(np.abs(before - oracle.mean(0))))
        deviation = float(oracle.std(0, ddof=1).mean())
        return float(np.median(np.abs(here - here.mean(0)))) / max(way, deviation, 1e-300)

    def _overshoot(self, method: str) -> tuple[NDArray[Any], NDArray[Any], float]:
        """How far [z] the mean lies beyond the oracles', its standard error [z], the oracles' mean sd."""
        here, oracle, before = (
            self._of(self.outputs, name, "forget") for name in (method, ORACLE, BEFORE)
        )
        off = here.mean(0) - oracle.mean(0)
        own = _direction(before, oracle)
        # a point that does not move by itself is to move as the set does; if that stays too, either
        # way is beyond
        toward = np.where(own != 0, own, _direction(before.mean(1), oracle.mean(1)))
        overshoot = np.where(toward != 0, toward * off, np.abs(off))
        return overshoot, _error(here, oracle), float(oracle.std(0, ddof=1).mean())

    def _of(self, table: Mapping[str, Outputs], method: str, split: str) -> NDArray[np.float64]:
        if method not in table or split not in table[method]:
            raise KeyError(
                f"no {method!r} on {split!r}; there are {list(table)} on {list(self.splits)}"
            )
        return table[method][split]

    def readings(self, method: str) -> dict[str, float]:
        """The numbers of one row of the table, by column."""
        row = {"forget": self.mean(method), "of that, from means": self.missing(method)["means"]}
        row |= {"forget p95": self.p95(method)}
        row |= {split: self.mean(method, split) for split in self.splits if split != "forget"}
        row |= {"gap closed": self.gap_closed(method), "margin error": self.margin_error(method)}
        return row | {"attack AUC": self.attack(method)}

    def table(self) -> str:
        """One row a method, each number with its floor in brackets; floor and ceiling at the end."""
        floor = self.readings(FLOOR)
        rows = [["method", *(f"{name} (floor)" for name in floor), "flags"]]
        for method in (*self.methods, FLOOR, CEILING):
            found = self.readings(method)
            cells = [_cell(name, found[name], floor[name]) for name in floor]
            rows.append([method, *cells, "over-forgets" if self.over(method) else ""])
        return "\n".join(
            [*aligned(rows), f"{self.direction}, nats, {self.kind}, {self.k} models of each"]
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers of `table`, for json: None for nan."""
        found: dict[str, Any] = {"kind": self.kind, "direction": self.direction, "k": self.k}
        found["methods"] = {
            method: {
                name: x if math.isfinite(x) else None for name, x in self.readings(method).items()
            }
            | {"over-forgotten": self.over_forgotten(method), "over-forgets": self.over(method)}
            for method in self.scores
        }
        return found

    def save(self, path: str | Path, rows: Mapping[str, ArrayLike] | None = None) -> None:
        """Write a .parquet or .csv file, a line per method, split and point: score, floor, ceiling, means.

        Args:
            rows: split -> [z] the points' names in their source, for a column of that name.

        Raises:
            ValueError: another ending; rows that are not one for every point of every split, or text in some and
                numbers in others.
        """
        import pyarrow as pa
        from pyarrow import csv, parquet

        suffix = ending(path, ".parquet", ".csv")
        named = None if rows is None else self._named(rows)
        parts = []
        for method, split in ((m, s) for m in self.scores for s in self.splits):
            z = len(self.floor[split])
            part = {"method": [method] * z, "split": [split] * z, "point": np.arange(z)}
            part |= {} if named is None else {"row": named[split]}
            part |= {"score": self.scores[method][split], "floor": self.floor[split]}
            part |= {"ceiling": self.ceiling[split], "mean": self.outputs[method][split].mean(0)}
            part |= {f"mean_{name}": self.outputs[name][split].mean(0) for name in (ORACLE, BEFORE)}
            parts.append(pa.table(part))
        write = csv.write_csv if suffix == ".csv" else parquet.write_table
        write(pa.concat_tables(parts), path)

    def _named(self, rows: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """The names of every split's points, checked."""
        named = {split: np.asarray(names) for split, names in rows.items()}
        named = {k: np.asarray(x.tolist()) if x.dtype == object else x for k, x in named.items()}
        found = {split: names.shape for split, names in named.items()}
        if found != {split: (len(self.floor[split]),) for split in self.splits}:
            many = {split: len(self.floor[split]) for split in self.splits}
            raise ValueError(f"expected rows for every point, {many}, got {found}")
        text = [split for split, names in named.items() if names.dtype.kind in "UST"]
        if 0 < len(text) < len(named):
            others = [split for split in named if split not in text]
            raise ValueError(
                f"expected rows all text or all numbers, got text in {text} and numbers in {others}; convert either"
            )
        common = np.result_type(*named.values())  # a column of a file has one type
        cast = {split: names.astype(common) for split, names in named.items()}
        lost = [
            split
            for split, names in named.items()
            if (cast[split].astype(names.dtype) != names).any()
        ]
        if lost:
            raise ValueError(
                f"expected rows of one type, got numbers in {lost} that {common} does not hold; convert them"
            )
        return cast


def _error(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Standard error [z] of the difference of two samples' means."""
    return np.sqrt(a.var(0, ddof=1) / len(a) + b.var(0, ddof=1) / len(b))


def _direction(before: NDArray[Any], oracle: NDArray[Any]) -> NDArray[np.float64]:
    """Which way [z] means go from before to the oracles: 1 or -1, 0 where it may be chance."""
    way = oracle.mean(0) - before.mean(0)
    return np.where(np.abs(way) > BEYOND * _error(before, oracle), np.sign(way), 0.0)


def _cell(name: str, number: float, floor: float) -> str:
    """A number with its floor; "no effect" where there is no gap."""
    if name == "gap closed" and math.isnan(number):
        return "no effect"
    return f"{number:.2f} ({floor:.2f})"


def evaluate(
    unlearned: Mapping[str, Any],
    oracle: Mapping[str, Any],
    before: Mapping[str, Any],
    *,
    kind: str = "auto",
    bins: int = 20,
) -> Evaluation:
    """Compare unlearned models with oracles, at as many models as leave other oracles for a floor.

    k = min(N, M // 2): the first k oracles are the reference, the next k the floor, the first k of the
    rest are compared. The floor depends strongly on k, so samples of different sizes have no common one.

    Args:
        unlearned: split ("forget" and others, such as "retain" and "validation") -> [N, z] outputs; or
            method -> such a mapping.
        oracle: split -> [M, z] outputs of models that never saw the forget set.
        before: split -> [N, z] outputs of the models that were to unlearn.
        kind: "binned" (`klom`), "gaussian" (`gaussian_klom`), or "auto": binned from k = 50 on.
        bins: of `klom`.

    Raises:
        ValueError: fewer than 4 oracles or 2 of the others; splits or points that differ, no "forget".
    """
    if kind not in ("auto", "binned", "gaussian"):
        raise ValueError(f"unknown kind {kind!r}; expected 'auto', 'binned' or 'gaussian'")
    many = bool(unlearned) and all(isinstance(given, Mapping) for given in unlearned.values())
    methods = dict(unlearned) if many else {"unlearned": unlearned}
    taken = {FLOOR, CEILING, ORACLE, BEFORE} & set(methods)
    if taken:
        raise ValueError(f"expected other names of methods than {sorted(taken)}; rename them")
    given = {ORACLE: oracle, BEFORE: before, **methods}
    samples = {name: _splits(name, splits, oracle) for name, splits in given.items()}
    n = {name: len(splits["forget"]) for name, splits in samples.items()}
    k = min(n.pop(ORACLE) // 2, *n.values())
    outputs = {name: {s: x[:k] for s, x in splits.items()} for name, splits in samples.items()}
    outputs[FLOOR] = {s: x[k : 2 * k] for s, x in samples[ORACLE].items()}
    outputs[CEILING] = outputs[BEFORE]
    kind = ("binned" if k >= BINNED else "gaussian") if kind == "auto" else kind
    scores = {
        name: {s: _divergence(outputs[name][s], x, kind, bins) for s, x in outputs[ORACLE].items()}
        for name in (FLOOR, CEILING, *methods)
    }
    return Evaluation(scores, outputs, kind, k, bins)


def _centre(x: NDArray[Any]) -> NDArray[np.float64]:
    """Means [z], without rounding where all models say the same."""
    return np.where(np.ptp(x, axis=0) == 0, x[0], x.mean(0))


def _divergence(
    here: NDArray[Any], oracle: NDArray[Any], kind: str, bins: int
) -> NDArray[np.float64]:
    """[z], in the form asked for."""
    return klom(here, oracle, bins=bins) if kind == "binned" else gaussian_klom(here, oracle)


def _splits(name: str, given: Mapping[str, Any], oracle: Mapping[str, Any]) -> Outputs:
    """One sample's outputs by split, as arrays over the oracles' points."""
    if "forget" not in oracle or set(given) != set(oracle):
        raise ValueError(
            f"expected the same splits everywhere and 'forget' among them, got {sorted(given)} of "
            f"{name} and {sorted(oracle)} of oracle; read the outputs at the same points"
        )
    least = 4 if name == ORACLE else 2  # oracles are halved, and a spread needs two
    found = {split: sample(f"{name} ({split})", given[split], least) for split in oracle}
    for split, x in found.items():
        z = np.shape(oracle[split])[1]
        if x.shape[1] != z or len(x) != len(found["forget"]):
            raise ValueError(
                f"expected {name} ({split}) [{len(found['forget'])}, {z}], got {x.shape}; pass the "
                "outputs of the same models in every split, at the oracles' points"
            )
    return found
