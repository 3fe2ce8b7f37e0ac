"""A module that standardizes, as a part of the model whose inputs or outputs it changes.

It is a child of that model, with its statistics in buffers, and the model's `forward` goes through it. So state dicts, devices, copies
and exported programs have it, and validation and prediction cannot go without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import Signature, signature
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tricks._core.strategies import plain_name, unwrapped
from lightning_tricks._core.surgery import StandIn, stand_ins, stand_ins_of
from lightning_tricks.data._batches import with_item
from lightning_tricks.data._statistics import Per, StandardizationStatistics, Whitening, whitening_matrix
from lightning_tricks.errors import NothingMatchedError, TrickConflictError, TrickError

__all__ = ["InputStandardizer", "OutputStandardizer", "Standardizer", "attach", "remove_standardization", "submodule"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_BUFFERS = ("mean", "mean_rest", "std", "matrix")


class Standardizer(nn.Module):
    """Standardizes by statistics; without any it leaves everything as it is, and has no keys in a state dict.

    The mean is kept as a sum of two numbers, so that none of its digits are lost in single precision: ``x − m₁`` is exact for x near
    the mean. Casting a model to half precision leaves the statistics in single precision.

    Args:
        settings: How statistics are made and used: ``per``, ``dim``, ``whitening``, ``eps``, ``center``, ``scale`` and
            ``argument`` or ``output``.
    """

    place: ClassVar[str]  # which of the settings says where the tensor is
    mean: Tensor | None
    mean_rest: Tensor | None
    std: Tensor | None
    matrix: Tensor | None

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self.settings = dict(settings)
        self.per: Per = settings["per"]
        self.dim: int = settings["dim"]
        self.statistics: StandardizationStatistics | None = None
        self.reached = False  # by a forward pass

    def set_statistics(
        self, statistics: StandardizationStatistics, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Standardize by these from now on, on this device, at least in single precision."""
        whitening: Whitening | None = self.settings.get("whitening")
        mean = statistics.mean.double() if self.settings["center"] else torch.zeros_like(statistics.mean, dtype=torch.float64)
        buffers = {"mean": mean}
        if whitening is not None:
            assert statistics.covariance is not None
            buffers["matrix"] = whitening_matrix(statistics.covariance, mode=whitening, eps=self.settings["eps"])
        else:
            std = statistics.std(self.settings["eps"])
            buffers["std"] = std if self.settings["scale"] else torch.ones_like(std)
        dtype = torch.promote_types(dtype, torch.float32)
        buffers["mean_rest"] = mean - mean.to(dtype).double()
        rounded = {name: value.to(dtype=dtype, copy=True).to(device) for name, value in buffers.items()}
        for name in _BUFFERS:
            setattr(self, name, rounded.get(name))
        self.statistics = statistics

    def forward(self, values: Any) -> Any:
        """Return values as they are, since models such as `nn.Sequential` call whatever children they have."""
        return values

    def standardize(self, values: Tensor) -> Tensor:
        """Return ``(x − m)/s``, or ``W(x − m)``."""
        if self.mean is None or self.mean_rest is None:
            return values
        x = values.to(torch.promote_types(values.dtype, self.mean.dtype))
        x = x - self._laid_out(self.mean, x) - self._laid_out(self.mean_rest, x)
        x = x / self._laid_out(self.std, x) if self.std is not None else self._mixed(x)
        return x.to(values.dtype)

    def restore(self, values: Tensor) -> Tensor:
        """Return ``z·s + m``."""
        if self.mean is None or self.mean_rest is None or self.std is None:
            return values
        z = values.to(torch.promote_types(values.dtype, self.mean.dtype))
        z = z * self._laid_out(self.std, z) + self._laid_out(self.mean_rest, z) + self._laid_out(self.mean, z)
        return z.to(values.dtype)

    def _laid_out(self, statistic: Tensor, like: Tensor) -> Tensor:
        if statistic.numel() == 1:
            return statistic.view(())
        if self.per == "feature":
            if like.shape[-statistic.ndim :] == statistic.shape:
                return statistic
        elif -like.ndim <= self.dim < like.ndim and like.shape[self.dim] == len(statistic):
            return statistic.view(-1, *[1] * ((like.ndim if self.dim >= 0 else 0) - self.dim - 1))
        msg = (
            f"Statistics of shape {tuple(statistic.shape)}, per {self.per} with `dim={self.dim}`, do not fit a tensor of shape "
            f"{tuple(like.shape)}. Measure and standardize the same tensor: give its place in the batch and in `forward`."
        )
        raise TrickError(msg)

    def _mixed(self, x: Tensor) -> Tensor:
        assert self.matrix is not None
        assert self.mean is not None
        self._laid_out(self.mean, x)  # which checks the shape
        matrix = self.matrix.T.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.mean.numel() == 1:
                return x * matrix.view(())
            if self.per == "feature":
                return (x.flatten(x.ndim - self.mean.ndim) @ matrix).view_as(x)
            return (x.movedim(self.dim, -1) @ matrix).movedim(-1, self.dim)

    def enter(self, arguments: Arguments, names: Sequence[str]) -> Arguments:
        """Change what the model's `forward` gets, whose parameters have these names."""
        return arguments

    def leave(self, result: Any) -> Any:
        """Change what the model's `forward` returns."""
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Standardizer:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in {torch.float16, torch.bfloat16}:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _load_from_state_dict(  # noqa: PLR0917
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        stored = {name: state_dict[prefix + name] for name in _BUFFERS if prefix + name in state_dict}
        for name, value in stored.items():
            own = self._buffers[name]
            if own is None or own.shape != value.shape:
                self._buffers[name] = torch.empty_like(value)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        missing[:] = [key for key in missing if not key.startswith(prefix)]  # a state dict without statistics leaves those that there are


class InputStandardizer(Standardizer):
    """Standardizes an argument of the model's `forward`."""

    place: ClassVar = "argument"

    def enter(self, arguments: Arguments, names: Sequence[str]) -> Arguments:
        """Standardize the argument."""
        self.reached = True
        given, options = arguments
        place = self._place(given, options, names)
        if isinstance(place, int):
            return (*given[:place], self.standardize(given[place]), *given[place + 1 :]), options
        return given, {**options, place: self.standardize(options[place])}

    def _place(self, given: tuple[Any, ...], options: dict[str, Any], names: Sequence[str]) -> int | str:
        """Return where the argument is: its position, or its name."""
        argument = self.settings["argument"]
        if argument is None:
            for position, value in enumerate(given):
                if isinstance(value, Tensor) and value.is_floating_point():
                    return position
            for name, value in options.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    return name
        else:
            key = names[argument] if isinstance(argument, int) and argument < len(names) else argument
            place = names.index(key) if key in names else key
            if isinstance(place, int) and place < len(given):
                return place
            if isinstance(key, str) and key in options:
                return key
        msg = (
            f"`argument={argument!r}` must name a tensor of floating-point numbers that `forward` gets, and it got {len(given)} "
            f"arguments and {', '.join(map(repr, options)) or 'none by name'}. Give its position or name by `argument`."
        )
        raise TrickError(msg)


class OutputStandardizer(Standardizer):
    """Brings what the model's `forward` returns back to original units, except while `training_step` runs."""

    place: ClassVar = "output"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.in_step = False

    def leave(self, result: Any) -> Any:
        """Bring the output back."""
        self.reached = True
        output = self.settings["output"]
        values = result if output is None else result[output]
        if not isinstance(values, Tensor):
            msg = (
                f"`output={output!r}` must be a tensor in what `forward` returns, and is a {type(values).__name__}. Give its index or key."
            )
            raise TrickError(msg)
        if self.in_step:
            return result
        return self.restore(values) if output is None else with_item(result, output, self.restore(values))


class Standardized(StandIn):
    """Stands in for the `forward` of a model with standardizers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.parameters = list(signature(module.forward).parameters)
        self.parts: list[str] = []  # names of the standardizers

    # What torch.export asks of a model's `forward`

    @property
    def __signature__(self) -> Signature:
        return signature(self.before or partial(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:
        return type(self).__call__.__code__

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        parts: list[Any] = [self.module._modules[name] for name in self.parts if name in self.module._modules]
        given: Arguments = arguments, options
        for part in parts:
            given = part.enter(given, self.parameters)
        result = self.plain(*given[0], **given[1])
        for part in parts:
            result = part.leave(result)
        return result


def attach(owner: nn.Module, name: str, part: Standardizer) -> Standardizer:
    """Make a standardizer a part of a model under a name, or return the same that is there already.

    Raises:
        TrickConflictError: If the model has another one that stands at the same place.
    """
    for key, other in owner.named_children():
        if type(other) is not type(part):
            continue
        if key == name and other.settings == part.settings:
            return other
        places = {other.settings[part.place], part.settings[part.place]}
        if key == name or None in places or len(places) == 1:
            msg = (
                f"{type(owner).__name__} has {key!r} already, which would standardize the same tensor with the settings {other.settings}. "
                "Keep one, or call `functional.remove_standardization(model)` first."
            )
            raise TrickConflictError(msg)
    owner.add_module(name, part)
    stand_in = next((each for each in stand_ins_of(owner) if isinstance(each, Standardized)), None)
    if stand_in is None:
        stand_in = Standardized(owner)
        stand_in.attach()
    stand_in.parts.append(name)
    return part


def remove_standardization(model: nn.Module) -> None:
    """Take all standardization of inputs and outputs out of a model; on any other model, nothing happens.

    Example:
        >>> from lightning_tricks.functional import standardization_statistics, standardize_inputs
        >>> net = nn.Sequential(nn.Linear(2, 1))
        >>> statistics = standardization_statistics([torch.randn(8, 2)])
        >>> standardize_inputs(net, statistics)
        >>> remove_standardization(net)
        >>> list(net.state_dict())
        ['0.weight', '0.bias']
    """
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, Standardizer):
                del owner._modules[name]
    for stand_in in stand_ins(model, Standardized):
        stand_in.detach()


def submodule(model: nn.Module, name: str, *, trick: str) -> nn.Module:
    """Return the module of a model that has this name; ``""`` is the model.

    Raises:
        NothingMatchedError: If there is none.
    """
    for own, module in model.named_modules():
        if plain_name(own) == name:
            return unwrapped(module)
    names = ", ".join(repr(own) for own, _ in model.named_children())
    msg = f"{trick} found no module: `module={name!r}` is none of {type(model).__name__}'s. Its children are {names or 'none'}."
    raise NothingMatchedError(msg)
