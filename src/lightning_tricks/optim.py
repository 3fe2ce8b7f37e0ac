"""Optimizers as recipes, with the parameter groups that a model needs."""

from lightning_tricks.optimization._adam import Adam, AdamW, NAdam, RAdam
from lightning_tricks.optimization._adaptive import Adadelta, Adafactor, Adagrad, RMSprop, Rprop
from lightning_tricks.optimization._adaptive_gradient_clipping import AdaptiveGradientClipping
from lightning_tricks.optimization._describe import describe_groups
from lightning_tricks.optimization._gradient_centralization import GradientCentralization
from lightning_tricks.optimization._gradient_clipping import ClipNorm, ClipValue
from lightning_tricks.optimization._gradient_noise import GradientNoise
from lightning_tricks.optimization._groups import ParameterGroup
from lightning_tricks.optimization._lbfgs import LBFGS
from lightning_tricks.optimization._lookahead import Lookahead
from lightning_tricks.optimization._muon import Muon
from lightning_tricks.optimization._named import Named, list_recipes
from lightning_tricks.optimization._recipe import GroupedRecipe, OptimizerRecipe
from lightning_tricks.optimization._sam import SAM
from lightning_tricks.optimization._schedule_free import ScheduleFree
from lightning_tricks.optimization._sgd import SGD

__all__ = [
    "LBFGS",
    "SAM",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdaptiveGradientClipping",
    "ClipNorm",
    "ClipValue",
    "GradientCentralization",
    "GradientNoise",
    "GroupedRecipe",
    "Lookahead",
    "Muon",
    "NAdam",
    "Named",
    "OptimizerRecipe",
    "ParameterGroup",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFree",
    "describe_groups",
    "list_recipes",
]
