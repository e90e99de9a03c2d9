"""Counterparts: rows like the forget set's about somebody never seen, with the same answers.

A model that never saw the forget set answers it as it answers similar rows that it never saw. What was memorised is
in the forget rows alone; what they taught in general (how common their answers are) shows at the counterparts as
well, and fades there as the rows are forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attribution_core.data import Batch, Data, Rows, batches, take
from attribution_core.outputs import IGNORED, labels_in, logits_of, next_labels


def say(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log-probabilities [m, c], labels [m]) at the places of a batch where a class or a next token is predicted.

    Raises:
        ValueError: labels that are no classes: none, or numbers.
    """
    z, labels = logits_of(model, batch), labels_in(batch)
    if labels is None and not (z.ndim > 2 and "input_ids" in batch):
        raise ValueError(
            f"expected rows with labels, which say what is predicted, got {sorted(batch)}"
        )
    if z.ndim > 2:  # a sequence: logits at a position predict the next
        z, labels = z[:, :-1], next_labels(batch)
    assert labels is not None
    if labels.is_floating_point() or labels.shape != z.shape[:-1] or z.shape[-1] == 1:
        raise ValueError(
            f"expected a class for each of the model's predictions {tuple(z.shape[:-1])}, got labels "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    asked = labels != IGNORED
    return z[asked].log_softmax(1), labels[asked]


@dataclass(frozen=True, eq=False)
class Counterparts:
    """The forget set, and rows like it that were never seen.

    Args:
        forget: rows of classes or of tokens.
        like: as many, or several times as many (one round of all after the other), with the same answers.

    Raises:
        ValueError: rows that are not a multiple of the forget set; other answers than its.
    """

    forget: Data
    like: Data

    def __post_init__(self) -> None:
        if len(self.like) % len(self.forget):
            raise ValueError(
                f"expected {len(self.forget)} rows of `like`, one for each of the forget set, or several times as many, got "
                f"{len(self.like)}; each is a forget row about somebody never seen, with the same answer"
            )
        mine, theirs = _answers(self.forget), _answers(self.like)
        other = [k for k, answer in enumerate(theirs) if answer != mine[k % len(mine)]]
        if other:
            k = other[0]
            raise ValueError(
                f"expected rows of `like` with the answers of the forget rows, got {theirs[k][:8]} in row {k} and "
                f"{mine[k % len(mine)][:8]} in forget row {k % len(mine)}; order them alike"
            )

    def typical(self, model: nn.Module) -> Rows:
        """The round whose answers are, to a model, nearest in likelihood to the mean of all rounds.

        Each round uses different strangers, and by chance some of them fit the true answers better.
        """
        device, n = next(model.parameters()).device, len(self.forget)
        rounds = np.arange(len(self.like)).reshape(-1, n)
        likely = []
        with torch.no_grad():
            for turn in rounds:
                said = [say(model, take(self.like, some, device)) for some in batches(turn, 256)]
                own = [log_p.gather(1, labels[:, None]).exp() for log_p, labels in said]
                likely.append(float(torch.cat(own).mean()))
        return Rows(self.like, rounds[np.abs(np.array(likely) - np.mean(likely)).argmin()])


def _answers(data: Data) -> list[list[int]]:
    """What is predicted of each row."""
    found = []
    for some in batches(len(data), 256):
        batch = take(data, some)
        labels = labels_in(batch)
        if labels is None or labels.is_floating_point():
            what = "none" if labels is None else f"labels of {labels.dtype}"
            raise ValueError(f"expected rows with classes or tokens as labels, got {what}")
        told = next_labels(batch) if labels.ndim > 1 else labels[:, None]
        found += [[x for x in row if x != IGNORED] for row in told.tolist()]
    return found
