"""Parameter groups as a table that people read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_tricks.optimization._recipe import OptimizerRecipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_tricks.optimization._groups import ParameterGroup

__all__ = ["describe_groups"]

_NAMES = 3


def describe_groups(model: nn.Module, recipe: OptimizerRecipe) -> str:
    """Describe the parameter groups that a recipe makes of a model, as a table.

    Args:
        model: The model.
        recipe: The recipe.

    Returns:
        A line for each group, with its learning rate, its weight decay, whatever else differs between groups, how many parameters
        and values it has, and the names of the first. Values of lazy parameters are not counted.

    Raises:
        NothingMatchedError: If the recipe cannot group the parameters.

    Example:
        >>> from lightning_tricks.optim import AdamW
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> print(describe_groups(model, AdamW(lr=1e-3, weight_decay=0.05, overrides={"2": {"lr": 1e-2}})))
        group  lr     weight_decay  parameters  values  names
        0      0.001  0.05                   1      32  0.weight
        1      0.001  0.0                    3      12  0.bias, 1.weight, 1.bias
        2      0.01   0.05                   1       8  2.weight
        3      0.01   0.0                    1       2  2.bias
        4 groups of 6 parameters, 0 frozen
    """
    groups = recipe.groups(model)
    shown = _shown(groups)
    table = [["group", *shown, "parameters", "values", "names"]]
    for i, group in enumerate(groups):
        options = [_brief(group.options.get(option, "")) for option in shown]
        names = ", ".join(group.names[:_NAMES]) + (f", … {len(group.names) - _NAMES} more" if len(group.names) > _NAMES else "")
        table.append([str(i), *options, f"{len(group.parameters):,}", f"{sum(map(_size, group.parameters)):,}", names])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numbers = {len(shown) + 1, len(shown) + 2}
    lines = ["  ".join(_align(cell, widths[i], right=i in numbers) for i, cell in enumerate(row)).rstrip() for row in table]
    held = sum(len(group.parameters) for group in groups)
    frozen = sum(1 for parameter in model.parameters() if not parameter.requires_grad)
    return "\n".join([*lines, f"{len(groups)} group{'s' * (len(groups) != 1)} of {held} parameters, {frozen} frozen"])


def _shown(groups: Sequence[ParameterGroup]) -> list[str]:
    options = list(dict.fromkeys(option for group in groups for option in group.options))
    return [option for option in options if option in {"lr", "weight_decay"} or len({group.options.get(option) for group in groups}) > 1]


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and value else str(value)


def _size(parameter: nn.Parameter) -> int:
    return 0 if is_lazy(parameter) else int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 empties the tensor itself


def _align(cell: str, width: int, *, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)
