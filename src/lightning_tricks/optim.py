"""Optimizers as recipes, with the parameter groups that a model needs."""

from lightning_tricks.optimization._adam import Adam, AdamW
from lightning_tricks.optimization._groups import ParameterGroup
from lightning_tricks.optimization._recipe import OptimizerRecipe
from lightning_tricks.optimization._sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "OptimizerRecipe", "ParameterGroup"]
