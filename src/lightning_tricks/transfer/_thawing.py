"""Which parameters train in which stage of fine-tuning, and by which factor of the learning rate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.optim import SGD

from lightning_tricks._core.checks import check_count, check_in_interval, check_patterns
from lightning_tricks._core.layers import inferred_layers
from lightning_tricks._core.owners import Owned, owned_parameters
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import plain_name, return_to_shards
from lightning_tricks.errors import ArgumentError, NothingMatchedError
from lightning_tricks.transfer._replace_head import find_head

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch.optim import Optimizer

__all__ = ["Thaw", "Thawing", "begin_momentum", "check_factors", "check_thaw", "frozen_norms"]

Thaw: TypeAlias = int | str | Sequence[str]

_SHARE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Thawing:
    """What thaws, stage by stage.

    Attributes:
        trick: What the trick calls itself.
        thaws: What each stage thaws.
        head: Name of the head, or None to find it where it is needed.
        layer_decay: Factor on the learning rate from each layer to the one before it; None = 1.
        lr_factors: Factors by globs; the last that matches a parameter wins.
    """

    trick: str
    thaws: Sequence[Thaw]
    head: str | None
    layer_decay: float | None
    lr_factors: Mapping[str, float]

    def resolve(self, model: nn.Module) -> list[list[Owned]]:
        """Return what each stage thaws, of the parameters that the model trains.

        Raises:
            NothingMatchedError: If the model trains none, or a stage thaws none.
        """
        return_to_shards(model)
        everything = owned_parameters(model)
        trained = [owned for owned in everything if owned.parameter.requires_grad]
        found = []
        for thaw in self.thaws:
            thawed = self._thawed(model, thaw, trained)
            if not thawed:
                frozen = bool(self._thawed(model, thaw, everything))
                own = "all that it matches are frozen by the model itself. Leave `requires_grad` to the callback"
                why = own if frozen else _names(trained)
                msg = f"{self.trick}: each of `stages` must thaw something, and {thaw!r} thaws no parameter of {_kind(model)}: {why}."
                raise NothingMatchedError(msg)
            found.append(thawed)
        return found

    def _thawed(self, model: nn.Module, thaw: Thaw, trained: Sequence[Owned]) -> list[Owned]:
        share = _SHARE.fullmatch(thaw) if isinstance(thaw, str) else None
        if not isinstance(thaw, int) and share is None:
            return [owned for owned in trained if any(matches(name, thaw) for name in owned.names)]
        home, _ = find_head(model, self.head, who=self.trick)
        head = [owned for owned in trained if any(name.startswith(f"{home}.") for name in owned.names)]
        body = [owned for owned in trained if not any(name.startswith(f"{home}.") for name in owned.names)]
        if thaw == 0:
            return head
        layers = inferred_layers(model, body, self.trick, least=1, asking=f"{thaw!r} in `stages`", advice="Name layers by globs.")
        count = max(layers) + 1
        last = thaw if isinstance(thaw, int) else max(1, round(count * float(share[1]) / 100)) if share else 0
        return [owned for owned, layer in zip(body, layers, strict=True) if layer >= count - last] + head

    def factors(self, model: nn.Module) -> dict[int, float]:
        """Return the factors of the learning rate that are not 1, by the parameters' identities.

        Raises:
            NothingMatchedError: If the model has only one layer, or a glob matches nothing.
        """
        trained = [owned for owned in owned_parameters(model) if owned.parameter.requires_grad]
        factors = dict.fromkeys((id(owned.parameter) for owned in trained), 1.0)
        if self.layer_decay is not None:
            layers = inferred_layers(model, trained, self.trick, advice="Give `lr_factors` instead.")
            factors = {id(owned.parameter): self.layer_decay ** (max(layers) - layer) for owned, layer in zip(trained, layers, strict=True)}
        for glob in self.lr_factors:
            if not any(matches(name, glob) for owned in trained for name in owned.names):
                msg = f"{self.trick}: {glob!r} in `lr_factors` matched no parameter that {_kind(model)} trains: {_names(trained)}."
                raise NothingMatchedError(msg)
        for owned in trained:
            for glob, factor in reversed(list(self.lr_factors.items())):
                if any(matches(name, glob) for name in owned.names):
                    factors[id(owned.parameter)] *= factor
                    break
        return {key: factor for key, factor in factors.items() if factor != 1}


def frozen_norms(model: nn.Module, frozen: Collection[int]) -> list[nn.Module]:
    """Return the layers with running statistics, or vectors of a power iteration, whose parameters are frozen.

    One without parameters of its own goes with those of the module around it, and where some of these train, with the layer before it.
    """
    found, modules = [], {plain_name(name): module for name, module in model.named_modules()}
    owners = [path for path, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    order = {path: i for i, path in enumerate(modules)}

    def stands(module: nn.Module, *, recurse: bool = True) -> bool:
        return all(id(parameter) in frozen or not parameter.requires_grad for parameter in module.parameters(recurse))

    for path, module in modules.items():
        if isinstance(getattr(module, "running_mean", None), Tensor) or isinstance(module, _SpectralNorm):
            home = path
            while home and not any(True for _ in modules[home].parameters()):
                home = home.rpartition(".")[0]
            before = [owner for owner in owners if f"{owner}.".startswith(f"{home}." if home else "") and order[owner] < order[path]]
            if stands(modules[home]) or (home != path and before and stands(modules[before[-1]], recurse=False)):
                found.append(module)
    return found


def begin_momentum(optimizer: Optimizer, parameters: Collection[int]) -> None:
    """Give parameters that have no momentum one of zero, from which the first step without dampening makes what it would make of none.

    torch's fused SGD cannot take parameters with momentum and others without in one step; other optimizers are left alone.
    """
    for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
        for parameter in group["params"] if group.get("fused") and group["momentum"] else ():
            if id(parameter) in parameters and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def check_thaw(name: str, value: Thaw) -> Thaw:
    """Accept what a stage may thaw."""
    if isinstance(value, int):
        return check_count(name, value, least=0)
    share = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if share:
        check_in_interval(name, float(share[1]), "(0, 100]")
        return str(value)
    try:
        return check_patterns(name, value, empty=False)
    except ArgumentError as error:
        msg = (
            f"`{name}` must be a glob over qualified names such as 'layer4.*', a list of globs, a number of last layers beside the head "
            f"(0 = the head alone), or a share of the layers such as '50%', got {value!r}."
        )
        raise ArgumentError(msg) from error


def check_factors(value: Mapping[str, float] | None) -> dict[str, float]:
    """Accept positive factors by globs."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(glob, str) and glob for glob in value)):
        msg = f"`lr_factors` must map globs over qualified names to factors, such as {{'backbone.*': 0.1}}, got {value!r}."
        raise ArgumentError(msg)
    return {str(glob): float(check_in_interval(f"lr_factors[{glob!r}]", each, "(0, ∞)")) for glob, each in (value or {}).items()}


def _names(owned: Iterable[Owned]) -> str:
    names = [each.names[0] for each in owned]
    return f"names look like {', '.join(map(repr, names[:3]))}" if names else "the model trains none"


def _kind(model: nn.Module) -> str:
    return type(model).__name__
