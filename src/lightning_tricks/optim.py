"""Optimizers as recipes, with the parameter groups that a model needs."""

from lightning_tricks.optimization._adam import Adam, AdamW
from lightning_tricks.optimization._adaptive_gradient_clipping import AdaptiveGradientClipping
from lightning_tricks.optimization._gradient_centralization import GradientCentralization
from lightning_tricks.optimization._gradient_clipping import ClipNorm, ClipValue
from lightning_tricks.optimization._groups import ParameterGroup
from lightning_tricks.optimization._lookahead import Lookahead
from lightning_tricks.optimization._recipe import OptimizerRecipe
from lightning_tricks.optimization._sam import SAM
from lightning_tricks.optimization._schedule_free import ScheduleFree
from lightning_tricks.optimization._sgd import SGD

__all__ = [
    "SAM",
    "SGD",
    "Adam",
    "AdamW",
    "AdaptiveGradientClipping",
    "ClipNorm",
    "ClipValue",
    "GradientCentralization",
    "Lookahead",
    "OptimizerRecipe",
    "ParameterGroup",
    "ScheduleFree",
]
