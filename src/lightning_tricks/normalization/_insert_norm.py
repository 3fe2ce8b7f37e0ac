"""Insert normalization layers around the nonlinearities of a network that has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_tricks._core.checks import check_choice, check_count, check_patterns
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import plain_name
from lightning_tricks.errors import NothingMatchedError
from lightning_tricks.normalization._channel_norm import LayerNorm2d, RMSNorm2d
from lightning_tricks.normalization._ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d

__all__ = ["insert_norm"]

Kind = Literal["batch", "layer", "group", "instance", "rms", "ghost"]
Position = Literal["before", "after"]

_NONLINEARITIES = (nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU,
                   nn.Softplus, nn.Tanh)  # fmt: skip
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_KEEPING = (*_NONLINEARITIES, nn.Sigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)
_CHILD = "norm"  # under which an activation holds the layer


@dataclass(frozen=True)
class Inserted:
    """What surgery has done.

    Attributes:
        inserted: The new layers, by the names of the activations that hold them, printed as their constructor calls.
        left: The activations that have none, each with the reason.
    """

    inserted: Mapping[str, str]
    left: Mapping[str, str]


class _Place(NamedTuple):
    """Where an activation stands: its channels, the dimensions of its input (0 for tokens), and where its norm is to live."""

    channels: int
    ndim: int
    like: Tensor


def insert_norm(
    model: nn.Module,
    kind: Literal["batch", "layer", "group", "instance", "rms", "ghost"],
    *,
    position: Literal["before", "after"] = "before",
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    groups: int = 32,
    ghost_size: int = 32,
    inputs: Any = None,
) -> Inserted:
    """Insert a normalization layer before or after each nonlinearity that has none in front.

    An activation holds its layer as a child ``norm``: keys are added, and no key changes. How many channels there are follows from the
    layer in front, in an ``nn.Sequential`` by itself, and anywhere else from a pass of example inputs in evaluation mode.

    Args:
        model: The model, which is changed in place.
        kind: Which layer: ``"batch"``, ``"layer"`` and ``"rms"`` over channels, ``"group"``, ``"instance"``, or ``"ghost"``.
        position: ``"before"`` the nonlinearity normalizes what it takes, ``"after"`` what it gives.
        where: Globs over names of activations; None = all but sigmoids, which often are gates or ends.
        exclude: Globs over names of activations that are left alone.
        groups: For ``"group"``, the number of groups, lowered to the nearest divisor of the channels.
        ghost_size: For ``"ghost"``, the samples that are normalized together.
        inputs: What the model is called with: a tensor, a tuple of arguments, or a mapping of them. None = the ``example_input_array`` of a
            LightningModule, and without one no pass.

    Returns:
        A report: ``inserted``, the layers by names of activations, and ``left``, why other activations have none.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no layer could be inserted.

    Note:
        Call it before the optimizer is made and before the model is sharded, since it creates parameters. A checkpoint has them: apply
        it to the plain model before that is loaded. Nonlinearities that are functions rather than modules are not found, and a module
        that is called at several places is left.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> insert_norm(model, "layer").inserted
        {'1': 'LayerNorm2d(8, eps=1e-06, affine=True)', '3': 'LayerNorm2d(8, eps=1e-06, affine=True)'}
        >>> list(model.state_dict())[:4]
        ['0.weight', '0.bias', '1.norm.weight', '1.norm.bias']
    """
    check_choice("kind", kind, get_args(Kind))
    check_choice("position", position, get_args(Position))
    where = None if where is None else check_patterns("where", where, empty=False)
    exclude = check_patterns("exclude", exclude, empty=True)
    check_count("groups", groups)
    check_count("ghost_size", ghost_size)
    found = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, _NONLINEARITIES if where is None else (*_NONLINEARITIES, nn.Sigmoid))
        and (where is None or matches(name, where))
        and not matches(name, exclude)
    }
    inputs = getattr(model, "example_input_array", None) if inputs is None else inputs
    places = _Walk.of_sequences(model) if inputs is None else _Walk.of_pass(model, inputs)
    inserted, left = {}, {}
    for name, activation in found.items():
        place = places.get(activation, "its place in the computation is not known; pass `inputs`")
        norm = place if isinstance(place, str) else _make(kind, place, groups, ghost_size)
        if isinstance(norm, str):
            left[name] = norm
            continue
        assert not isinstance(place, str)
        activation.add_module(_CHILD, norm.to(place.like.device, place.like.dtype).train(activation.training))
        if position == "before":
            activation.register_forward_pre_hook(_normalize_input)
        else:
            activation.register_forward_hook(_normalize_output)
        inserted[name] = repr(norm)
    if not inserted:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in list(left.items())[:4])
        criteria = "" if where is None else f" `where={where!r}` and `exclude={exclude!r}` leave"
        msg = f"insert_norm found no nonlinearity to normalize in {type(model).__name__}: " + (
            f"{listed}." if left else f"it has none that is a module{', or' + criteria + ' none' if criteria else ''}."
        )
        raise NothingMatchedError(msg)
    return Inserted(inserted, left)


def _normalize_input(activation: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    norm = activation.get_submodule(_CHILD)
    return norm(inputs[0]), *inputs[1:]


def _normalize_output(activation: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
    normalized: Tensor = activation.get_submodule(_CHILD)(output)
    return normalized


class _Walk:
    """Goes through the layers of a model in the order of computation and notes where its activations stand."""

    def __init__(self) -> None:
        self.places: dict[nn.Module, _Place | str] = {}
        self._forget()

    @classmethod
    def of_sequences(cls, model: nn.Module) -> dict[nn.Module, _Place | str]:
        """Walk through what is in sequences, without computing."""
        walk = cls()
        walk._enter(model)
        return walk.places

    @classmethod
    def of_pass(cls, model: nn.Module, inputs: Any) -> dict[nn.Module, _Place | str]:
        """Walk along with a pass of inputs in evaluation mode."""
        walk = cls()
        modes = [(module, module.training) for module in model.modules()]
        handles = [
            module.register_forward_pre_hook(walk._see)
            for module, _ in modes
            if isinstance(module, (*_NONLINEARITIES, nn.Sigmoid)) or not any(True for _ in module.children())
        ]
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes:
                module.training = mode
        return walk.places

    def _forget(self) -> None:
        self._layer: nn.Module | None = None  # the latest with weights
        self._normalized = False  # whether a norm came after it
        self._known = True  # whether nothing unknown came after it

    def _enter(self, module: nn.Module) -> None:
        if isinstance(module, nn.Sequential):
            for child in module:
                self._enter(child)
        elif isinstance(module, (*_NONLINEARITIES, nn.Sigmoid)) or not any(True for _ in module.children()):
            self._pass(module, None)
        else:
            for child in module.children():
                self._forget()
                self._enter(child)
            self._forget()

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._pass(module, inputs[0] if inputs and isinstance(inputs[0], Tensor) else None, seen=True)

    def _pass(self, module: nn.Module, x: Tensor | None, *, seen: bool = False) -> None:
        if isinstance(module, (*_NONLINEARITIES, nn.Sigmoid)):
            place = self._place(x)
            if _CHILD in module._modules or self._normalized:
                place = "it is normalized already"
            self.places[module] = "it is called at several places; give each one of its own" if module in self.places else place
        elif isinstance(module, _NORMS):
            self._normalized = True
        elif isinstance(module, _ConvNd | nn.Linear):
            self._layer, self._normalized, self._known = module, False, True
        elif not seen and not isinstance(module, _KEEPING) and "Pool" not in type(module).__name__:
            self._known = False

    def _place(self, x: Tensor | None) -> _Place | str:
        if self._layer is None or not (self._known or x is not None):
            return "its place in the computation is not known; pass `inputs`" if x is None else "no layer with weights is in front"
        weight = self._layer.weight
        assert isinstance(weight, Tensor)
        linear = isinstance(self._layer, nn.Linear)
        if x is None:
            channels = weight.shape[1] * self._layer.groups if isinstance(self._layer, _ConvTransposeNd) else weight.shape[0]
            return _Place(channels, 2 if linear else weight.ndim, weight)
        if x.ndim < 2:
            return f"it takes a tensor of {x.ndim} dimensions"
        tokens = linear and x.ndim > 2
        return _Place(x.shape[-1 if tokens else 1], 0 if tokens else x.ndim, weight)


def _make(kind: Kind, place: _Place, groups: int, ghost_size: int) -> nn.Module | str:
    """Return the layer for a place, or why there is none."""
    channels, ndim, _ = place
    over_channels: dict[str, tuple[Callable[[int], nn.Module], ...]] = {
        "layer": (nn.LayerNorm, LayerNorm2d),
        "rms": (nn.RMSNorm, RMSNorm2d),
    }
    if kind in over_channels:
        return over_channels[kind][ndim > 2](channels)
    if ndim == 0:
        return 'its channels come last; take "layer" or "rms"'
    if kind == "instance" and ndim == 2:
        return "each of its channels has a single value, which instance normalization would make zero"
    if kind == "group":
        return nn.GroupNorm(max(n for n in range(1, min(groups, channels) + 1) if channels % n == 0), channels)
    layers: dict[str, tuple[Callable[[int], nn.Module], ...]] = {
        "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        "instance": tuple(partial(each, affine=True) for each in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
        "ghost": tuple(partial(each, ghost_size=ghost_size) for each in (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)),
    }
    return layers[kind][max(0, ndim - 3)](channels)
