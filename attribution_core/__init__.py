"""How outputs of a model depend on its training weights.

    f̂(w) = base + (w − anchor) @ scores        scores[i, j] = ∂ output_j / ∂ weight_i

Every method returns a `LinearDatamodel`; nothing here prints, parses arguments or touches global
random state.
"""

from attribution_core.aumann_shapley import RemainderWarning, aumann_shapley
from attribution_core.certificate import Certified, fit_certified, remove
from attribution_core.comparison import Comparison, compare
from attribution_core.curvature import fit_curvature
from attribution_core.datamodel import LinearDatamodel, average
from attribution_core.evaluation import LDS, lds
from attribution_core.groups import AnchorWarning, group_table, kmeans_groups, random_groups
from attribution_core.in_run import InRun, in_run
from attribution_core.influence import influence
from attribution_core.input_influence import gradient_matching, input_influence
from attribution_core.joining import join_outputs, split_outputs
from attribution_core.leave_out import leave_one_out
from attribution_core.magic import magic
from attribution_core.neighbors import bm25, knn, knn_values, representation_similarity
from attribution_core.newton import NewtonDatamodel, newton
from attribution_core.outputs import (
    causal_lm_loss,
    correct,
    cross_entropy,
    logit_margin,
    margin,
    squared_error,
)
from attribution_core.preflight import preflight
from attribution_core.problem import Outputs, Problem
from attribution_core.projection import project
from attribution_core.refitting import refit, refitted
from attribution_core.regression import (
    NotConverged,
    PairDatamodel,
    PriorWarning,
    Underdetermined,
    fit_datamodel,
)
from attribution_core.rehearsal import Pace, Rehearsal, rehearse
from attribution_core.retraining import retrain
from attribution_core.safeguards.smoothness import MetagradientWarning, describe
from attribution_core.self_influence import self_influence
from attribution_core.subsets import (
    all_subsets,
    bernoulli_subsets,
    group_subsets,
    leave_out_subsets,
    permutation_subsets,
    random_subsets,
)
from attribution_core.table import RetrainingTable
from attribution_core.training import SGD, Adam, AdamW, Recipe, Run, train
from attribution_core.trak import trak
from attribution_core.unrolling import source, tracin

__all__ = [
    "LDS",
    "SGD",
    "Adam",
    "AdamW",
    "AnchorWarning",
    "Certified",
    "Comparison",
    "InRun",
    "LinearDatamodel",
    "MetagradientWarning",
    "NewtonDatamodel",
    "NotConverged",
    "Outputs",
    "Pace",
    "PairDatamodel",
    "PriorWarning",
    "Problem",
    "Recipe",
    "Rehearsal",
    "RemainderWarning",
    "RetrainingTable",
    "Run",
    "Underdetermined",
    "all_subsets",
    "aumann_shapley",
    "average",
    "bernoulli_subsets",
    "bm25",
    "causal_lm_loss",
    "compare",
    "correct",
    "cross_entropy",
    "describe",
    "fit_certified",
    "fit_curvature",
    "fit_datamodel",
    "gradient_matching",
    "group_subsets",
    "group_table",
    "in_run",
    "influence",
    "input_influence",
    "join_outputs",
    "kmeans_groups",
    "knn",
    "knn_values",
    "lds",
    "leave_one_out",
    "leave_out_subsets",
    "logit_margin",
    "magic",
    "margin",
    "newton",
    "permutation_subsets",
    "preflight",
    "project",
    "random_groups",
    "random_subsets",
    "refit",
    "refitted",
    "rehearse",
    "remove",
    "representation_similarity",
    "retrain",
    "self_influence",
    "source",
    "split_outputs",
    "squared_error",
    "tracin",
    "train",
    "trak",
]
