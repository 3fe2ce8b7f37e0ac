"""Which layers of a model have their weights masked, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from lightning_tricks._core.checks import check_bool, check_choice, check_count, check_patterns
from lightning_tricks._core.draws import Clock
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import stand_ins_of
from lightning_tricks.errors import ArgumentError, NothingMatchedError, TrickConflictError
from lightning_tricks.stochastic._drop_connect_layers import DropsWeights
from lightning_tricks.stochastic._weight_dropping import Averaging, Granularity, Inference, WeightDropping, computes_as, masked_names
from lightning_tricks.stochastic._weight_masks import Rate

__all__ = ["Masking", "check_free"]

Kinds = str | type[nn.Module] | Sequence[str | type[nn.Module]] | None

KINDS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention,
    nn.Embedding)}  # fmt: skip


def _stay(_: nn.Module, __: Any) -> None:
    """Do nothing: a layer with a hook is called, where torch's encoder layers would otherwise use its weights by themselves."""


@dataclass
class Masking:
    """Which layers are masked, and how: the arguments that function and callback share."""

    where: str | Sequence[str]
    exclude: str | Sequence[str]
    kinds: Any
    granularity: Granularity
    inference: Inference
    draws: int
    mask_bias: bool

    def __post_init__(self) -> None:
        self.where = check_patterns("where", self.where, empty=False)
        self.exclude = check_patterns("exclude", self.exclude, empty=True)
        self.kinds = _check_kinds(self.kinds)
        check_choice("granularity", self.granularity, ("batch", "example"))
        check_choice("inference", self.inference, ("mean", "gaussian", "sample"))
        check_count("draws", self.draws)
        check_bool("mask_bias", self.mask_bias)

    def find(self, model: nn.Module, trick: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """Return the layers that can be masked, and why others cannot, both by name."""
        inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
        kinds: tuple[type[nn.Module], ...] = tuple(KINDS.values())
        everything = {
            plain_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, kinds) and not isinstance(module, DropsWeights) and id(module) not in inside
        }
        wanted = tuple(KINDS[name] for name in self.kinds or KINDS)
        typed = {name: module for name, module in everything.items() if isinstance(module, wanted)}
        located = {name: module for name, module in typed.items() if matches(name, self.where)}
        selected = {name: module for name, module in located.items() if not matches(name, self.exclude)}
        left = {name: reason for name, module in selected.items() if (reason := self._obstacle(module))}
        found = {name: module for name, module in selected.items() if name not in left}
        if not found:
            self._diagnose(type(model).__name__, everything, typed, located, left=left, trick=trick)
        return found, left

    def _obstacle(self, module: nn.Module) -> str:
        """Say why a layer cannot be masked as asked, or nothing."""
        if computes_as(module) is not None:
            return ""
        if self.inference == "gaussian":
            return "its output is no single product with its weight; pass `inference='mean'`"
        steps = isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)  # which are run for one example after another
        if self.granularity == "example" and not (steps and any(type(module).forward is kind.forward for kind in KINDS.values())):
            return "it has a forward pass of its own; pass `granularity='batch'`"
        return ""

    def _diagnose(
        self,
        model: str,
        everything: Mapping[str, nn.Module],
        typed: Mapping[str, nn.Module],
        located: Mapping[str, nn.Module],
        *,
        left: Mapping[str, str],
        trick: str,
    ) -> None:
        kinds = Counter(next(name for name, kind in KINDS.items() if isinstance(module, kind)) for module in everything.values())
        inventory = f"{model}'s {len(everything)} layers ({', '.join(f'{kind} ×{count}' for kind, count in kinds.most_common(4))})"
        if not everything:
            reason = f"{model} has none of {', '.join(KINDS)}. Build its layers in `__init__`, `setup` or `configure_model`"
        elif not typed:
            reason = f"`kinds={self.kinds!r}` matched none of {inventory}. Name one of these"
        elif not located:
            names = ", ".join(map(repr, list(typed)[:3]))
            reason = f"`where={self.where!r}` matched none of {inventory}. Names look like {names}"
        elif not left:
            reason = f"`exclude={self.exclude!r}` removed all {len(located)} that `where={self.where!r}` matched. Exclude less"
        else:
            reason = "; ".join(f"{name!r}: {why}" for name, why in list(left.items())[:4])
        msg = f"{trick} found no layer to mask: {reason}."
        raise NothingMatchedError(msg)

    def attach(self, model: nn.Module, layers: Mapping[str, nn.Module], rate: float, clock: Clock, *, owner: str) -> list[WeightDropping]:
        """Let layers mask their weights. A parameter of two layers has one number, hence one mask."""
        check_free(layers, owner)
        numbers = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        shared, droppings = Rate(rate), []
        for name, layer in layers.items():
            weights, biases = masked_names(layer)
            tensors = {each: attrgetter(each)(layer) for each in (*weights, *(biases if self.mask_bias else ()))}
            dropping = WeightDropping(
                layer,
                name,
                {each: numbers.setdefault(id(tensor), len(numbers)) for each, tensor in tensors.items()},
                shared,
                clock=clock,
                owner=owner,
                granularity=self.granularity,
                inference=self.inference,
                draws=self.draws,
            )
            dropping.attach()
            if self.inference != "mean":
                dropping.hook = layer.register_forward_pre_hook(_stay)
            droppings.append(dropping)
        if self.inference == "gaussian":
            for module in model.modules():
                if _is_activation(module) and not any(isinstance(each, Averaging) for each in stand_ins_of(module)):
                    Averaging(module).attach()
        return droppings


def _check_kinds(value: Kinds) -> str | tuple[str, ...] | None:
    """Accept classes of layers and their names, and return the names."""
    given = (value,) if isinstance(value, str | type) else value
    if given is None:
        return None
    listed = isinstance(given, Sequence) and len(given) > 0
    names = [each.__name__ if isinstance(each, type) else each for each in given] if listed else []
    wrong = [name for name in names if not isinstance(name, str) or name.rpartition(".")[2] not in KINDS]
    if wrong or not names:
        msg = f"`kinds` must name classes of layers among {', '.join(KINDS)}, or be None for all, got {wrong[0] if wrong else value!r}."
        raise ArgumentError(msg)
    return tuple(name.rpartition(".")[2] for name in names)


def _is_activation(module: nn.Module) -> bool:
    """Tell by where its class is defined: in torch, timm and transformers alike."""
    files = {kind.__module__.rpartition(".")[2] for kind in type(module).__mro__}
    return bool(files & {"activation", "activations", "activations_me"}) and not isinstance(module, nn.MultiheadAttention)


def check_free(layers: Mapping[str, nn.Module], owner: str) -> None:
    for name, layer in layers.items():
        for held in stand_ins_of(layer):
            if isinstance(held, WeightDropping) and held.owner != owner:
                msg = f"{held.owner} and {owner} both drop weights of {name!r}. Keep one, or let them select different layers."
                raise TrickConflictError(msg)
