"""How outputs of a model depend on its training weights.

    f̂(w) = base + (w − anchor) @ scores        scores[i, j] = ∂ output_j / ∂ weight_i

Every method returns a `LinearDatamodel`; nothing here prints, parses arguments or touches global
random state.
"""

from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.evaluation import LDS, lds
from attribution_core.influence import influence
from attribution_core.outputs import causal_lm_loss, cross_entropy, margin, squared_error
from attribution_core.problem import Outputs, Problem
from attribution_core.retraining import RetrainingTable, random_subsets, retrain
from attribution_core.training import SGD, Adam, AdamW, Recipe, Run, train

__all__ = [
    "LDS",
    "SGD",
    "Adam",
    "AdamW",
    "LinearDatamodel",
    "Outputs",
    "Problem",
    "Recipe",
    "RetrainingTable",
    "Run",
    "average",
    "causal_lm_loss",
    "cross_entropy",
    "influence",
    "lds",
    "margin",
    "random_subsets",
    "retrain",
    "squared_error",
    "train",
]
