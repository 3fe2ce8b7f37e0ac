"""What initializing a model does: choose its layers, draw them, scale them, let branches begin at zero, and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_tricks._core.checks import check_choice, check_in_interval, check_patterns
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import named_tensors, own_part, plain_name
from lightning_tricks.errors import ArgumentError, NothingMatchedError
from lightning_tricks.normalization._activations import kind_of
from lightning_tricks.normalization._flow import Flow, Following, examine_flow
from lightning_tricks.normalization._lsuv import output_variances, scale_to_unit_variance
from lightning_tricks.normalization._matrices import Matrix, find_matrices, generators, multiply, reason_to_leave, write, zero
from lightning_tricks.normalization._schemes import SCHEMES, Draw, Scheme, activation_gain

if TYPE_CHECKING:
    from lightning_tricks._core.shards import Shards

__all__ = ["InitializedLayer", "InitializedModel", "Options", "call_with", "choose", "first_of", "run_initialization", "sign_of_training"]


@dataclass(frozen=True)
class InitializedLayer:
    """What was done to a layer.

    Attributes:
        gain: The factor that the scheme was used with.
        activation: The activation that its output reaches, where the scheme asks; None if it reaches none.
        before: Variance of its output before, if batches were given that reach it.
        after: Variance of its output afterwards, likewise.
    """

    gain: float
    activation: str | None = None
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class InitializedModel:
    """What was done to a model.

    Attributes:
        layers: The layers that were drawn anew, by name.
        zeroed: Names of parameters at the ends of residual branches that are zero now.
        left: Layers that were left, each with the reason.
    """

    layers: Mapping[str, InitializedLayer]
    zeroed: Sequence[str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        """Return a table with a line for each layer."""
        lines = [
            f"{name}: gain {each.gain:.4g}{f' ({each.activation})' if each.activation else ''}"
            + (f", output variance {each.before:.4g} → {each.after:.4g}" if each.before is not None and each.after is not None else "")
            for name, each in self.layers.items()
        ]
        lines += [f"{name}: zero" for name in self.zeroed] + [f"{name}: left, since {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Options:
    """What can be asked for beside a scheme, checked."""

    scheme: Scheme
    where: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    gain: float | None = None
    mode: Literal["fan_in", "fan_out"] = "fan_in"
    std: float = 0.02
    bias: Literal["zero", "keep"] = "zero"
    residual: Literal["keep", "zero"] = "keep"
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        check_choice("scheme", self.scheme, SCHEMES)
        if self.where is not None:
            check_patterns("where", self.where, empty=False)
        check_patterns("exclude", self.exclude, empty=True)
        if self.gain is not None:
            check_in_interval("gain", self.gain, "(0, ∞)")
        check_choice("mode", self.mode, ("fan_in", "fan_out"))
        check_in_interval("std", self.std, "(0, ∞)")
        check_choice("bias", self.bias, ("zero", "keep"))
        check_choice("residual", self.residual, ("keep", "zero"))
        check_in_interval("tolerance", self.tolerance, "(0, 1)")


def call_with(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch, or with its first element, on the model's device."""
    values = first_of(batch)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    return model(values.to(device) if isinstance(values, Tensor) else values)


def first_of(batch: Any) -> Any:
    """Return the inputs in a batch."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def run_initialization(
    model: nn.Module, options: Options, seed: int, batches: Iterable[Any] | None, forward: Callable[[Any], Any], *, trick: str
) -> InitializedModel:
    """Do what `initialize` says, on behalf of whom errors should name."""
    given = list(batches) if batches is not None else []
    if options.scheme == "lsuv" and not given:
        msg = f"{trick} with 'lsuv' needs batches, from which variances are measured, and got none. Pass `batches=[…]`."
        raise ArgumentError(msg)
    everything = find_matrices(model)
    chosen, left = choose(model, everything, options, trick)
    kaiming = options.scheme.startswith("kaiming") and options.gain is None
    flow = Flow()
    if kaiming or options.residual == "zero":
        used = {name for name, matrix in everything.items() if not matrix.embedding}
        flow = examine_flow(model, used, example=first_of(given[0]) if given else None)
    following = _completed(model, flow, everything) if kaiming else {}
    layers = {}
    draws = generators(list(everything), seed)
    measured = {_layer_name(name): matrix.measured for name, matrix in chosen.items() if matrix.measured is not None}
    before = output_variances(model, measured, given, forward) if given else {}
    tensors = named_tensors(model)
    for name, matrix in chosen.items():
        after = following.get(name)
        factor = options.gain or (activation_gain(after.kind, after.function, after.negative_slope) if after else 1.0)
        if options.scheme != "keep":
            draw = Draw(options.scheme, factor, options.mode, options.std)
            write(matrix, tensors, name, partial(draw.matrix, matrix, generator=draws[name]))
            zero(tensors, [_sibling(name, key) for key in matrix.biases] if options.bias == "zero" else [])
            layers[_layer_name(name)] = InitializedLayer(factor, after.kind if after else None)
    if options.scheme == "lsuv":
        scaled = {_layer_name(name): (each.measured, partial(multiply, each)) for name, each in chosen.items() if each.measured is not None}
        left |= scale_to_unit_variance(model, scaled, given, forward, tolerance=options.tolerance, most=10)
    zeroed = _zero_branches(model, flow, options, tensors, trick) if options.residual == "zero" else []
    if given:
        now = output_variances(model, measured, given, forward)
        layers = {name: replace(each, before=before.get(name), after=now.get(name)) for name, each in layers.items()}
    return InitializedModel(layers, zeroed, left)


def _layer_name(weight: str) -> str:
    return weight.removesuffix(".weight")


def _sibling(weight: str, key: str) -> str:
    return f"{weight.rpartition('.')[0]}.{key}".lstrip(".")


def choose(model: nn.Module, everything: Mapping[str, Matrix], options: Options, trick: str) -> tuple[dict[str, Matrix], dict[str, str]]:
    """Return the matrices to draw, and why others are left."""
    where, exclude = options.where, options.exclude
    located = {name: each for name, each in everything.items() if where is None or matches(name, where)}
    wanted = {name: each for name, each in located.items() if not matches(name, exclude)}
    reasons = {name: reason_to_leave(each, embeddings=options.scheme == "truncated_normal") for name, each in wanted.items()}
    chosen = {name: each for name, each in wanted.items() if not reasons[name]}
    left = {_layer_name(name): reason for name, reason in reasons.items() if reason}
    if chosen or (options.scheme == "keep" and options.residual == "zero"):
        return chosen, left
    if not everything:
        reason = f"{type(model).__name__} has none. Build its layers first"
    elif not located:
        names = ", ".join(repr(_layer_name(name)) for name in list(everything)[:3])
        reason = f"`where={where!r}` matched none of {type(model).__name__}'s {len(everything)}. Their names look like {names}"
    elif not wanted:
        reason = f"`exclude={exclude!r}` removed all {len(located)} that there are. Exclude less"
    else:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in list(left.items())[:3])
        reason = f"all {len(wanted)} are left ({why}). Select others"
    msg = f"{trick} found no layer to initialize: {reason}."
    raise NothingMatchedError(msg)


def _completed(model: nn.Module, flow: Flow, everything: Mapping[str, Matrix]) -> dict[str, Following | None]:
    """Return what follows each weight; of those that no run has shown, the next activation among the modules as they were registered."""
    order: list[str | nn.Module] = []
    owners = {id(matrix.owner): name for name, matrix in everything.items()}
    for module in model.modules():
        order += [owners[id(module)]] if id(module) in owners else [module] if kind_of(module) not in {None, "identity"} else []
    registered: dict[str, Following | None] = {}
    for here, then in zip(order, [*order[1:], ""], strict=True):
        if isinstance(here, str):
            registered[here] = None
            if isinstance(then, nn.Module):
                kind = str(kind_of(then))
                slope = float(getattr(then, "negative_slope", 0.25 if kind == "prelu" else 0.01))
                registered[here] = Following("leaky_relu" if kind == "prelu" else kind, then, slope)
    # Attention's first matrices lead into a product, and recurrent ones into gates.
    inner = {name: None for name, matrix in everything.items() if matrix.measured is None}
    return {**registered, **flow.following, **inner}


def _zero_branches(model: nn.Module, flow: Flow, options: Options, tensors: Mapping[str, Tensor | Shards], trick: str) -> list[str]:
    """Set the ends of residual branches to zero."""
    trainable = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = [name for end in flow.ends for name in end if name in trainable]
    names = [name for name in names if (options.where is None or matches(name, options.where)) and not matches(name, options.exclude)]
    if not names:
        unseen = f", and {', '.join(map(repr, flow.unseen[:3]))} could not be run without data" if flow.unseen else ""
        msg = (
            f"{trick} found no residual branch to begin at zero in {type(model).__name__}: no sum of a layer's output and its input was "
            f"seen that `where` and `exclude` leave{unseen}. Pass `residual='keep'`, or `batches` whose shape the model takes."
        )
        raise NothingMatchedError(msg)
    zero(tensors, names)
    return names


def sign_of_training(model: nn.Module) -> str | None:
    """Return what shows that a model has been trained; None if nothing does.

    The norms of a new model treat all channels alike: running statistics have one value each, and so have scales and shifts where there
    are no statistics. (Some models draw the scales of BatchNorm at random.) Nothing but training lets these differ.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> before, output = sign_of_training(norm), norm(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> before, sign_of_training(norm)
        (None, "'running_mean' differs from channel to channel")
    """
    tensors = named_tensors(model)
    for path, module in model.named_modules():
        if any("norm" in kind.__name__.lower() for kind in type(module).__mro__):
            statistics = isinstance(getattr(module, "running_mean", None), Tensor)
            keys = ("running_mean", "running_var") if statistics else ("weight", "bias")
            for name in (plain_name(f"{path}.{key}".lstrip(".")) for key in keys):
                part = own_part(tensors[name]) if name in tensors else torch.zeros(())
                if part.ndim == 1 and part.numel() > 1 and not part.is_meta and not torch.equal(part, part[:1].expand_as(part)):
                    return f"{name!r} differs from channel to channel"
    return None
