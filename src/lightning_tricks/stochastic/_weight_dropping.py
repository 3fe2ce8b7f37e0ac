"""The forward passes of a layer whose weights are dropped at random, and of an activation that averages what such a layer could give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_tricks._core.draws import Clock, mix, tick
from lightning_tricks._core.surgery import StandIn, stand_ins_of
from lightning_tricks.errors import TrickError
from lightning_tricks.stochastic._weight_masks import (
    Rate,
    kept,
    kept_rows,
    key_of,
    key_of_example,
    keys_of_examples,
    masked,
    normal,
    product_by_example,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle

__all__ = ["CONVOLUTIONS", "Averaging", "Granularity", "Inference", "WeightDropping", "activated", "computes_as", "masked_names"]

Granularity = Literal["batch", "example"]
Inference = Literal["mean", "gaussian", "sample"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EVALUATION = 0x3C6EF372


def masked_names(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the weights of a layer that are masked, and of the biases beside them."""
    if isinstance(module, nn.RNNBase):
        names = tuple(module._flat_weights_names)
        return tuple(name for name in names if "weight_hh" in name), tuple(name for name in names if "bias_hh" in name)
    if isinstance(module, nn.RNNCellBase):
        return ("weight_hh",), ("bias_hh",) if module.bias else ()
    if isinstance(module, nn.MultiheadAttention):
        inside = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        biases = ("in_proj_bias", "out_proj.bias") if module.in_proj_bias is not None else ()
        return (*(name for name in inside if getattr(module, name) is not None), "out_proj.weight"), biases
    return ("weight",), ("bias",) if getattr(module, "bias", None) is not None else ()


def computes_as(module: nn.Module, base: type[nn.Module] | None = None) -> type[nn.Module] | None:
    """Return the layer of torch's own that a module computes by one product with its weight; None if it computes something else.

    Args:
        module: The layer.
        base: The class whose forward pass is meant; None = the layer's own.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, nn.Embedding)
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    own = ("forward", "_conv_forward")
    plain = kind is not None and all(getattr(base or type(module), name, None) is getattr(kind, name, None) for name in own)
    innermost: Any = vars(module).get("forward")
    while isinstance(innermost, StandIn):  # none of which computes with the weight by itself
        innermost = innermost.before
    return kind if plain and innermost is None else None


class WeightDropping(StandIn):
    """Computes with ``W∘M/(1 − p)`` while the layer trains, and as `inference` says while it is evaluated."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        numbers: Mapping[str, int],
        rate: Rate,
        *,
        clock: Clock | None,
        owner: str,
        granularity: Granularity,
        inference: Inference,
        draws: int,
        base: type[nn.Module] | None = None,
    ) -> None:
        super().__init__(module)
        self.name, self.rate, self.clock, self.owner = name, rate, clock, owner
        self.granularity, self.inference, self.draws = granularity, inference, draws
        self.numbers = dict(numbers)  # of the masked tensors in the model, by their names in the layer; tied ones have one number
        tensors = {name: self.tensor(name) for name in numbers}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items() if not is_lazy(tensor)}  # which strategies may hide
        self.base = base
        self.hook: RemovableHandle | None = None
        self.kind = computes_as(module, base)
        self.calls = torch.zeros((), dtype=torch.int64)  # in evaluation
        self.ran = False  # since the latest batch began
        self.spread = self.taken = False  # whether a deviation was given to what follows, and an activation took it

    @override
    def attach(self) -> None:
        """Take the place of the module's own `forward`, within whatever else stands in for it, which acts on input or output."""
        outer = list(stand_ins_of(self.module))
        if not outer:
            super().attach()
        elif self not in outer:
            self.before, outer[-1].before = outer[-1].before, self

    @override
    def detach(self) -> None:
        super().detach()
        if self.hook is not None:
            self.hook.remove()

    @override
    def plain(self, *arguments: Any, **options: Any) -> Any:
        return super().plain(*arguments, **options) if self.base is None else self.base.forward(self.module, *arguments, **options)

    @property
    def dropped(self) -> float | None:
        """The share of the weights that the latest batch dropped, or its first example; None if the layer has not run."""
        if not self.ran or self.clock is None:
            return None
        count = total = 0
        for name, number in self.numbers.items():
            key, tensor = key_of(int(self.clock.now), number), self.tensor(name)
            shape = self.shapes.get(name, tensor.shape)
            if self.granularity == "example":
                key = key_of_example(key, 0)
            count += int(kept(key, shape, self.rate.threshold, tensor.device).sum())
            total += shape.numel()
        return 1.0 - count / total

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.module.training:
            self.ran = True
            return self._drop(self._now(), arguments, options)
        if self.inference == "mean":
            return self.plain(*arguments, **options)
        tick(self.calls)
        calls: Any = self.calls if torch.compiler.is_compiling() else int(self.calls)
        now = mix(self._now() ^ mix(calls + _EVALUATION))
        if self.inference == "sample":
            return self._drop(now, arguments, options)
        mean, deviation = self.moments(*arguments, **options)
        self.spread = True
        mean.drop_connect = Spread(deviation, now, self)  # type: ignore[attr-defined]  # until an activation takes it
        return mean

    def _now(self) -> Any:
        """Return the moment from which draws follow; a layer that follows no clock takes it from torch's generator."""
        now = torch.randint(2**31, ()) if self.clock is None else self.clock.now
        return now if torch.compiler.is_compiling() else int(now)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the layer by its name there."""
        owner, key = self._place(name)
        tensor: Tensor = getattr(owner, key)
        return tensor

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        return (getattr(self.module, path), key) if path else (self.module, key)

    def _drop(self, now: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        keys = {name: key_of(now, number) for name, number in self.numbers.items()}
        if self.kind is nn.Embedding:
            return self._look_up(keys["weight"], *arguments, **options)
        if self.granularity == "batch":
            return self._with_masks(keys, arguments, options)
        if self.kind is nn.Linear:
            return self._multiply(keys, *arguments, **options)
        if self.kind is not None:
            return self._convolve(keys, *arguments, **options)
        if isinstance(self.module, nn.MultiheadAttention):
            return self._attend(keys, *arguments, **options)
        return self._recur(keys, *arguments, **options)

    # With other weights

    def _with_masks(self, keys: Mapping[str, Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return self._with({name: masked(self.tensor(name), key, self.rate) for name, key in keys.items()}, arguments, options)

    def _with(self, tensors: Mapping[str, Tensor | None], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Compute what the layer computes, with other tensors in the place of its own."""
        module = self.module
        if isinstance(module, nn.RNNBase):
            own = module._flat_weights
            module._flat_weights = [tensors.get(name, each) for name, each in zip(module._flat_weights_names, own, strict=True)]
            try:
                return self.plain(*arguments, **options)
            finally:
                module._flat_weights = own
        before: list[tuple[dict[str, Any], str, Any]] = []
        for name, tensor in tensors.items():
            owner, key = self._place(name)
            shadowed = not torch.compiler.is_compiling() and key in vars(owner)  # by FSDP1, with views of flat parameters
            held: dict[str, Any] = vars(owner) if shadowed else owner._parameters
            before.append((held, key, held[key]))
            held[key] = tensor
        try:
            return self.plain(*arguments, **options)
        finally:
            for held, key, value in before:
                held[key] = value

    # By example

    def _multiply(self, keys: Mapping[str, Any], input: Tensor) -> Tensor:  # noqa: A002, as torch names it
        examples = input.reshape(len(input) if input.ndim > 1 else 1, input.shape[1:-1].numel(), input.shape[-1])
        output = self._add_bias(keys, product_by_example(examples, self.tensor("weight"), keys["weight"], self.rate), -1)
        return output.view(*input.shape[:-1], output.shape[-1])

    def _convolve(self, keys: Mapping[str, Any], input: Tensor) -> Tensor:  # noqa: A002
        module: Any = self.module
        single = input.ndim == module.weight.ndim - 1
        x, padding = input[None] if single else input, module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x, padding = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * len(module.stride)
        geometry = (*module.stride, *padding, *module.dilation, module.groups)
        output = self._add_bias(keys, product_by_example(x, self.tensor("weight"), keys["weight"], self.rate, geometry), 1)
        return output[0] if single else output

    def _add_bias(self, keys: Mapping[str, Any], output: Tensor, axis: int) -> Tensor:
        bias: Tensor | None = getattr(self.module, "bias", None)
        if bias is None:
            return output
        shape = [1] * output.ndim
        shape[axis] = -1
        if "bias" in keys:
            examples = keys_of_examples(keys["bias"], len(output), output.device)[:, None]
            bias = (bias * self.rate.scale) * kept(examples, bias.shape, self.rate.threshold, output.device)
            shape[0] = len(output)
        return output + bias.to(output.dtype).view(shape)

    def _look_up(self, key: Any, input: Tensor) -> Tensor:  # noqa: A002
        rows: Tensor = self.plain(input)
        if self.granularity == "example":
            key = keys_of_examples(key, len(input), input.device).view(-1, *[1] * (input.ndim - 1))
            flat = input.reshape(len(input), input.shape[1:].numel())
            mask = kept_rows(key.reshape(-1, 1), flat, rows.shape[-1], self.rate.threshold).view(rows.shape)
        else:
            mask = kept_rows(key, input, rows.shape[-1], self.rate.threshold)
        return (rows * self.rate.scale) * mask

    def _one(self, keys: Mapping[str, Any], example: int, *arguments: Any, **options: Any) -> Any:
        """Compute one example with masks of its own, which the backward pass draws again; that of compiled code keeps them."""

        def run(*tensors: Any) -> Any:
            own = {name: key_of_example(key, example) for name, key in keys.items()}
            return self._with_masks(own, tensors, options)

        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(run, *arguments, use_reentrant=False)
        return run(*arguments)

    def _recur(self, keys: Mapping[str, Any], input: Tensor, hx: Any = None) -> Any:  # noqa: A002
        if isinstance(input, PackedSequence):
            msg = f"{self.owner} masks {self.name!r} for each example, which needs a padded tensor. Pad it, or pass `granularity='batch'`."
            raise TrickError(msg)
        sequence = isinstance(self.module, nn.RNNBase)
        if input.ndim == (2 if sequence else 1):
            return self._one(keys, 0, input, hx)
        axis = 0 if not sequence or self.module.batch_first else 1
        inputs = torch.split(input, 1, axis)
        states = [_part(hx, i, 1 if sequence else 0) for i in range(len(inputs))]
        outputs = [self._one(keys, i, each, state) for i, (each, state) in enumerate(zip(inputs, states, strict=True))]
        if not sequence:
            return _joined(outputs, 0)
        return torch.cat([output for output, _ in outputs], axis), _joined([state for _, state in outputs], 1)

    def _attend(  # noqa: PLR0917, positions are those of torch
        self,
        keys: Mapping[str, Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self.module
        options = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal}
        if query.ndim == 2:
            return self._one(keys, 0, query, key, value, key_padding_mask=key_padding_mask, attn_mask=attn_mask, **options)  # type: ignore[no-any-return]
        axis = 0 if module.batch_first else 1
        outputs = []
        for i in range(query.shape[axis]):
            heads = attn_mask
            if attn_mask is not None and attn_mask.ndim == 3:
                heads = attn_mask[i * module.num_heads : (i + 1) * module.num_heads]
            padding = None if key_padding_mask is None else key_padding_mask[i : i + 1]
            examples = [each.narrow(axis, i, 1) for each in (query, key, value)]
            outputs.append(self._one(keys, i, *examples, key_padding_mask=padding, attn_mask=heads, **options))
        attention = torch.cat([weights for _, weights in outputs]) if need_weights else None
        return torch.cat([output for output, _ in outputs], axis), attention

    # In evaluation

    def moments(self, input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002
        """Return mean and standard deviation of what the layer gives over its masks."""
        mean = self.plain(input)
        ratio = self.rate.now * self.rate.scale
        if self.kind is nn.Embedding:
            return mean, mean.abs() * ratio.sqrt()
        squares: dict[str, Tensor | None] = {"weight": self.tensor("weight").square()}
        if getattr(self.module, "bias", None) is not None:
            squares["bias"] = self.tensor("bias").square() if "bias" in self.numbers else None
        variance = self._with(squares, (input.square(),), {})
        return mean, (variance * ratio).clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # whose gradient is finite at 0, too


def _part(state: Any, example: int, axis: int) -> Any:
    if isinstance(state, tuple):
        return tuple(_part(each, example, axis) for each in state)
    return None if state is None else state.narrow(axis, example, 1)


def _joined(states: list[Any], axis: int) -> Any:
    if isinstance(states[0], tuple):
        return tuple(torch.cat(each, axis) for each in zip(*states, strict=True))
    return torch.cat(states, axis)


class Spread(NamedTuple):
    """What goes along with a mean: the standard deviation around it, the key of its draws, and the layer that gave it."""

    deviation: Tensor
    key: Any
    dropping: WeightDropping


def activated(activation: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Apply an activation; to what goes along with a deviation, as the mean of ``a(u)`` over draws of u."""
    spread: Spread | None = getattr(x, "drop_connect", None)
    if spread is None:
        return activation(x)
    spread.dropping.taken = True
    draws = spread.dropping.draws
    total = torch.zeros(())
    for i in range(draws):
        total = total + activation(x + spread.deviation * normal(mix(spread.key ^ mix(i + 1)), x))
    return total / draws


class Averaging(StandIn):
    """Averages an activation over draws of its input, where a layer whose weights were dropped says how that is spread."""

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002, as torch names it
        return activated(self.plain, input)
