"""Parameter groups: every trainable parameter in exactly one, with the options that its owner, its name and its layer give it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from lightning_tricks._core.layers import given_layers, inferred_layers
from lightning_tricks._core.owners import Kind, Owned, clean_name, owned_parameters
from lightning_tricks._core.selection import matches
from lightning_tricks.errors import NothingMatchedError, UnsupportedOptimizerError, UnsupportedStrategyError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ParameterGroup",
    "check_complete",
    "check_globs",
    "group_parameters",
]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share all options.

    Attributes:
        options: The optimizer's options for this group, such as ``lr`` and ``weight_decay``.
        names: The parameters' names; of a tied one, the first.
        parameters: The parameters.

    Example:
        >>> from lightning_tricks.optim import SGD
        >>> [group] = SGD(lr=0.1).groups(nn.Linear(2, 1))
        >>> group.names, group.options["lr"]
        (('weight', 'bias'), 0.1)
    """

    options: Mapping[str, Any]
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the group as optimizers of torch take it."""
        return {"params": list(self.parameters), **self.options}


def group_parameters(
    model: nn.Module,
    options_of: Callable[[Owned], Mapping[str, Any]],
    *,
    decayed: Sequence[Kind] = ("matrix",),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    layer_decay: float | None = None,
    layers: Sequence[str] | None = None,
    who: str,
) -> list[ParameterGroup]:
    """Divide a model's trainable parameters into groups that share all options; each parameter is in exactly one.

    Args:
        model: The model.
        options_of: What holds for a parameter where nothing else is said, such as ``lr`` and ``weight_decay``.
        decayed: The kinds of parameters that decay; all others get ``weight_decay=0``.
        overrides: Globs over qualified names, each with options for what it matches; the last glob that sets an option wins.
        layer_decay: Factor on ``lr`` from each layer to the one before it.
        layers: Globs over qualified names, one for each layer; None infers the layers.
        who: What asks, for errors.

    Returns:
        The groups, in the order of their first parameters.

    Raises:
        NothingMatchedError: If there is no trainable parameter, a glob matches none of the parameters, or a parameter has no layer.
        UnsupportedStrategyError: If FSDP has joined parameters into one.
    """
    everything = owned_parameters(model)
    flat = next((owned.names[0] for owned in everything if owned.names[0].rpartition(".")[2] == "_flat_param"), None)
    if flat is not None:
        msg = (
            f"{who} cannot tell the parameters in {flat!r} apart, which FSDP has joined. Use `FSDPStrategy(use_orig_params=True)` or FSDP2."
        )
        raise UnsupportedStrategyError(msg)
    overrides = overrides or {}
    check_globs("overrides", overrides, everything, who)
    check_globs("layers", layers or (), everything, who)
    trained = [owned for owned in everything if owned.parameter.requires_grad]
    if not trained:
        why = (
            f"all {len(everything)} are frozen (`requires_grad=False`). Thaw some" if everything else "it has none. Build its layers first"
        )
        msg = f"{who} found no trainable parameter in {type(model).__name__}: {why}."
        raise NothingMatchedError(msg)
    factors = [1.0] * len(trained)
    if layer_decay is not None:
        found = given_layers(trained, layers, who) if layers else inferred_layers(model, trained, who)
        factors = [layer_decay ** (max(found) - layer) for layer in found]
    groups: list[tuple[Mapping[str, Any], list[Owned]]] = []
    for owned, factor in zip(trained, factors, strict=True):
        options = dict(options_of(owned))
        if factor != 1:
            options["lr"] *= factor
        if options.get("weight_decay") and (owned.exempt or owned.kind not in decayed):
            options["weight_decay"] = 0.0
        for pattern, changes in overrides.items():
            if any(matches(name, pattern) for name in owned.names):
                options |= changes
        members = next((members for equal, members in groups if equal == options), None)
        if members is None:
            members = []
            groups.append((options, members))
        members.append(owned)
    return [
        ParameterGroup(options, tuple(owned.names[0] for owned in members), tuple(owned.parameter for owned in members))
        for options, members in groups
    ]


def check_globs(argument: str, globs: Iterable[str], everything: Sequence[Owned], who: str) -> None:
    """Check that each glob of an argument matches some parameter, trainable or not.

    Raises:
        NothingMatchedError: If one does not; the error names what it may have meant.
    """
    names = [name for owned in everything for name in owned.names]
    for glob in globs:
        if not any(matches(name, glob) for name in names):
            holders = dict.fromkeys(".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2))
            close = get_close_matches(glob.rstrip(".*"), [*holders, *(part for name in names for part in name.split("."))], n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Names look like {', '.join(map(repr, names[:3]))}."
            msg = f"{who}: {glob!r} in `{argument}` matched none of the {len(names)} parameters. {hint}"
            raise NothingMatchedError(msg)


def check_complete(optimizer: Optimizer, model: nn.Module) -> None:
    """Check that an optimizer holds every trainable parameter of a model exactly once.

    Raises:
        UnsupportedOptimizerError: If it does not; the error names a parameter.
    """
    held = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and held[id(parameter)] != 1:
            msg = (
                f"{type(optimizer).__name__} must hold every trainable parameter in exactly one group, and holds {clean_name(name)!r} "
                f"{held[id(parameter)]} times. Use another optimizer, or freeze the parameter."
            )
            raise UnsupportedOptimizerError(msg)
