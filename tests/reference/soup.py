"""Soups of models, written down as slowly and literally as their recipes, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Weights = dict[str, Tensor]


def mean(models: Sequence[Weights]) -> Weights:
    """Add up each tensor over the models and divide by their number; what is no floating-point tensor is the first model's."""
    soup = {}
    for name, first in models[0].items():
        if first.is_floating_point():
            total = first.double()
            for model in models[1:]:
                total = total + model[name].double()
            soup[name] = (total / len(models)).to(first.dtype)
        else:
            soup[name] = first
    return soup


def greedy(models: Sequence[Weights], score: Callable[[Weights], float]) -> tuple[Weights, list[int]]:
    """Sort by score, then add each model whose mean with the ingredients scores strictly better; return the soup and who is in it."""
    order = sorted(range(len(models)), key=lambda index: -score(models[index]))
    ingredients = [order[0]]
    for index in order[1:]:
        without = score(mean([models[i] for i in ingredients]))
        with_it = score(mean([models[i] for i in [*ingredients, index]]))
        if with_it > without:
            ingredients = [*ingredients, index]
    return mean([models[i] for i in ingredients]), ingredients
