"""Pictures of loss landscapes: curves in one picture, planes side by side on one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_tricks._core.extras import require

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["draw_landscapes"]

_LEVELS = 30


def draw_landscapes(landscapes: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Draw landscapes, given by their names as steps and losses, and write a PNG.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    figure_of = require("matplotlib.figure", package="matplotlib", extra="examples", who="A picture of a loss landscape").Figure
    flat = next(iter(landscapes.values()))[1].ndim == 1
    panels = 1 if flat else len(landscapes)
    figure = figure_of(figsize=(1.5 + 4 * panels, 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if flat:
        _curves(axes[0], landscapes)
    else:
        figure.colorbar(_planes(axes, landscapes), ax=list(axes), label="log10 of loss", format="%.3g")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _curves(axes: Any, landscapes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (steps, losses) in landscapes.items():
        axes.plot(steps.numpy(), losses.numpy(), marker=".", label=name)
    axes.set_xlabel("α")
    axes.set_ylabel("loss")
    axes.legend()


def _planes(axes: Any, landscapes: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """Draw levels of the logarithm of the loss, the same ones in all panels, and return one of them for the scale."""
    heights = {name: losses.clamp(min=1e-12).log10() for name, (_, losses) in landscapes.items()}
    finite = torch.cat([height[height.isfinite()] for height in heights.values()])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    levels = torch.linspace(low, max(high, low + 1e-6), _LEVELS).numpy()
    drawn = None
    for panel, (name, (steps, _)) in zip(axes, landscapes.items(), strict=True):
        # β runs along the second dimension, and upwards.
        drawn = panel.contourf(steps.numpy(), steps.numpy(), heights[name].T.numpy(), levels=levels)
        panel.contour(steps.numpy(), steps.numpy(), heights[name].T.numpy(), levels=levels[::3], colors="white", linewidths=0.4)
        panel.plot(0, 0, marker="+", color="red")
        panel.set_title(name)
        panel.set_xlabel("α")
        panel.set_ylabel("β")
        panel.set_aspect("equal")
    return drawn
