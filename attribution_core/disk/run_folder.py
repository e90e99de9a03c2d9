"""A run on disk, finished or under way.

run.safetensors, checkpoint0.safetensors ...   parameters and the optimizer's state
run.npz                                        order, losses, digests, the checkpoints' steps
states/00000012.safetensors ...                states kept for attribution
resume.safetensors, resume.npz                 the last snapshot of a training under way
run.json                                       the fingerprint of what the run was made of
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from attribution_core.calling import Params
from attribution_core.disk.files import whole, write_arrays, write_text
from attribution_core.stepwise.optimizers import Checkpoint, State
from attribution_core.stepwise.steps import Steps, TrainingState

if TYPE_CHECKING:
    from attribution_core.training import Run

EVERY = 30.0  # seconds between snapshots


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `like` has the shapes of its states."""

    path: Path
    fingerprint: str
    like: TrainingState
    clock: dict[str, float] = field(default_factory=lambda: {"last": time.monotonic()})

    def finished(self) -> bool:
        """Whether the run stands here already.

        Raises:
            ValueError: another run stands here.
        """
        return self._is_ours(self.path / "run.json")

    def _is_ours(self, head: Path) -> bool:
        if not head.exists():
            return False
        if json.loads(head.read_text(encoding="utf-8")) != {"fingerprint": self.fingerprint}:
            raise ValueError(
                f"{self.path} holds another training; the model, the data, the recipe or the number of "
                "checkpoints has changed: choose another folder or delete this one"
            )
        return True

    # --- under way

    def clear(self) -> None:
        """Forget states of a training that was killed before its first snapshot, by another recipe perhaps."""
        for old in (self.path / "states").glob("*.safetensors"):
            old.unlink()

    def keep(self, step: int, state: TrainingState) -> None:
        """Keep a state for attribution."""
        _save_training_state(StatesOnDisk(self.path / "states", self.like).path(step), state)

    def mark(self, k: int, at: Checkpoint) -> None:
        """Keep the k-th checkpoint."""
        _save(self._tensors(k), {"params": at.params, **at.state})

    def marks(self, places: list[tuple[int, int, int]], like: Params) -> list[Checkpoint]:
        """The first checkpoints, of these (step, first, last)."""
        return [
            Checkpoint(*_load_checkpoint(self._tensors(k), like), *at)
            for k, at in enumerate(places)
        ]

    def snapshot(
        self, step: int, state: TrainingState, losses: NDArray[Any], digests: NDArray[Any]
    ) -> None:
        """Every half minute: where the training stands, to go on from after a kill."""
        if time.monotonic() - self.clock["last"] < EVERY:
            return
        _save_training_state(self.path / f"resume{step}.safetensors", state)
        write_arrays(  # names the state
            self.path / "resume.npz",
            step=step, losses=losses, digests=digests, fingerprint=self.fingerprint,
        )  # fmt: skip
        for old in self.path.glob("resume*.safetensors"):
            if old.name != f"resume{step}.safetensors":
                old.unlink()
        self.clock["last"] = time.monotonic()

    def resume(
        self, start: TrainingState, losses: NDArray[Any], digests: NDArray[Any]
    ) -> tuple[TrainingState, int, NDArray[Any], NDArray[Any]]:
        """(state, step to go on with, losses and digests so far): the last snapshot, or the start.

        Raises:
            ValueError: a snapshot of another training.
        """
        path = self.path / "resume.npz"
        if not path.exists():
            return start, 0, losses, digests
        with np.load(path) as held:
            if str(held["fingerprint"]) != self.fingerprint:
                raise ValueError(
                    f"{self.path} holds another training under way; the model, the data or the recipe "
                    "has changed: choose another folder or delete this one"
                )
            step = int(held["step"])
            losses, digests = held["losses"], held["digests"]
        state = _load_training_state(self.path / f"resume{step}.safetensors", self.like)
        return state, step, losses, digests

    # --- finished

    def _tensors(self, checkpoint: int | None = None) -> Path:
        name = "run" if checkpoint is None else f"checkpoint{checkpoint}"
        return self.path / f"{name}.safetensors"

    def write(self, run: Run) -> None:
        """The finished run, whose checkpoints are kept already; run.json last, so that it vouches for the others."""
        _save(self._tensors(), {"params": run.params, **run.state, "buffers": run.buffers})
        write_arrays(
            self.path / "run.npz",
            order=np.concatenate(run.order),
            sizes=[len(batch) for batch in run.order],
            losses=run.losses,
            shards=run.shards,
            digests=np.zeros(0, np.int64) if run.digests is None else run.digests,
            checkpoints=np.array([(at.step, at.first, at.last) for at in run.checkpoints], int),
        )
        write_text(self.path / "run.json", json.dumps({"fingerprint": self.fingerprint}))
        for old in self.path.glob("resume*"):
            old.unlink()

    def read(self, steps: Steps) -> dict[str, Any]:
        """What the finished run adds to its problem, recipe and weights."""
        with np.load(self.path / "run.npz") as held:
            order = np.split(held["order"], np.cumsum(held["sizes"])[:-1])
            losses = held["losses"]
            shards = int(held["shards"]) if "shards" in held else 1
            digests = held["digests"] if "digests" in held else np.zeros(0)
            where = held["checkpoints"].tolist() if "checkpoints" in held else []
        like = steps.problem.params
        params, state = _load_checkpoint(self._tensors(), like)
        buffers = state.pop("buffers", {})
        return {
            "params": params, "state": state, "order": order, "losses": losses,
            "checkpoints": tuple(self.marks(where, like)), "buffers": buffers, "states": StatesOnDisk(self.path / "states", self.like),
            "digests": digests if len(digests) else None, "shards": shards,
        }  # fmt: skip


class StatesOnDisk(Mapping[int, TrainingState]):
    """The kept states of a run in a folder, read one at a time."""

    def __init__(self, folder: Path, like: TrainingState):
        self.folder = folder
        self.like = like

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"

    def __getitem__(self, step: int) -> TrainingState:
        if not self.path(step).exists():
            raise KeyError(step)
        return _load_training_state(self.path(step), self.like)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(path.stem) for path in self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


# --- tensors -----------------------------------------------------------------------------------


def _save(path: Path, groups: Mapping[str, Params]) -> None:
    """Tensors by group and name as one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{g}/{k}": v.contiguous() for g, held in groups.items() for k, v in held.items()}
    with whole(path) as part:
        save_file(flat, part)


def _load(path: Path, device: torch.device) -> dict[str, Params]:
    """What `_save` wrote; names are in the order of the alphabet."""
    groups: dict[str, Params] = {}
    for key, value in load_file(path).items():
        group, name = key.split("/", 1)
        groups.setdefault(group, {})[name] = value.to(device)
    return groups


def _load_checkpoint(path: Path, like: Params) -> tuple[Params, State]:
    """Parameters and an optimizer's state, on the device and in the order of `like`."""
    ordered = {
        group: {name: held[name] for name in (*(name for name in like if name in held), *held)}
        for group, held in _load(path, next(iter(like.values())).device).items()
    }  # who flattens a group goes by its order
    return ordered.pop("params"), ordered


def _save_training_state(path: Path, state: TrainingState) -> None:
    moments = {f"moments.{name}": held for name, held in state.moments.items()}
    _save(path, {"params": state.params, "buffers": state.buffers, **moments})


def _load_training_state(path: Path, like: TrainingState) -> TrainingState:
    groups = _load(path, next(iter(like.params.values())).device)

    def ordered(group: str, names: Params) -> Params:
        return {name: groups[group][name] for name in names}

    return TrainingState(
        ordered("params", like.params),
        {name: ordered(f"moments.{name}", of) for name, of in like.moments.items()},
        ordered("buffers", like.buffers),
    )
