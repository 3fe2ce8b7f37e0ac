"""How many dimensions follow the channels of a normalization layer's input, where its type does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.normalization._norm_reading import Norm

__all__ = ["locate"]


def locate(model: nn.Module, norms: Mapping[nn.Module, Norm]) -> dict[nn.Module, Norm]:
    """Return what layers compute, with the number of positions that a run of a model on its `example_input_array` shows."""
    unclear = {module: norm for module, norm in norms.items() if len(norm.positions) > 1 and not norm.last}
    seen = _probe(model, unclear) if unclear else {}
    return {module: replace(norm, positions=seen.get(module, norm.positions)) for module, norm in norms.items()}


def _probe(model: nn.Module, norms: Mapping[nn.Module, Norm]) -> dict[nn.Module, frozenset[int]]:
    example: Any = getattr(model, "example_input_array", None)
    if example is None:
        return {}
    seen: dict[nn.Module, frozenset[int]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen[module] = seen.get(module, frozenset()) | {args[0].ndim - 2}

    handles = [module.register_forward_pre_hook(note) for module in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(example, dict):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    except Exception:  # noqa: BLE001  # a model that does not run yet, as on another device, tells nothing
        return {}
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return seen
