"""BatchNorm computed by the layer before it.

With fixed statistics BatchNorm is an affine map of each channel, and so it can be made part of the convolution or linear layer whose
output it normalizes. The network computes the same with fewer layers.

Source: B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam and D. Kalenichenko, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", CVPR, 2018, section 3.2.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_tricks._core.checks import check_bool, check_patterns
from lightning_tricks._core.selection import matches
from lightning_tricks._core.surgery import replace_module
from lightning_tricks.errors import ArgumentError, NothingMatchedError
from lightning_tricks.normalization._order import Order, copy_of, find_order

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FoldReport", "fold_batch_norm"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PADDED = {"Conv2dSame"}  # timm's, which pads by itself and is a Conv2d otherwise
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ACTING = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}  # timm's, followed by ``drop`` and ``act``
_FROZEN = {"FrozenBatchNorm2d", "FrozenBatchNormAct2d"}  # torchvision's and timm's, which have buffers alone
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # when they evaluate


@dataclass(frozen=True)
class FoldReport:
    """What folding has done.

    Attributes:
        model: The folded model.
        folded: Names of the BatchNorm layers that are gone, each with the name of the layer that computes them now.
        left: Names of those that are still there, each with the reason.
        untraced: Names of the modules whose order of execution `torch.fx` could not trace, each with its reason; ``""`` is the model.

    Example:
        >>> fold_batch_norm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()).folded
        {'1': '0'}
    """

    model: nn.Module
    folded: Mapping[str, str]
    left: Mapping[str, str]
    untraced: Mapping[str, str]


def fold_batch_norm(
    model: nn.Module, *, where: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), inplace: bool = True
) -> FoldReport:
    """Let convolutions and linear layers compute the BatchNorm that follows them, for inference.

    A layer ``Wx + b`` that is followed by ``γ(x − m)/√(v + ε) + β`` gets ``W ← W·γ/√(v + ε)`` and ``b ← (b − m)·γ/√(v + ε) + β``,
    computed in float64, so that the model's outputs differ by rounding alone. The BatchNorm becomes an identity, or the activation that
    its class has beside it, as timm's do.

    The order of execution is traced by `torch.fx`. Where a module cannot be traced, the modules in it are traced one by one, and it is
    called as a whole in the trace of what holds it: an `nn.Sequential` gives the order of its members whatever these are.

    Args:
        model: The model, in evaluation mode.
        where: Glob or globs over qualified names of BatchNorm layers; a glob matches a whole name or any part that begins after a dot.
        exclude: Globs over names that are left as they are.
        inplace: Whether to change this model, or a copy.

    Returns:
        A report: ``model``, the folded one, ``folded``, ``left`` with reasons, and ``untraced``.

    Raises:
        ArgumentError: If an argument lies outside its domain, or the model or a selected BatchNorm is in training mode.
        NothingMatchedError: If no BatchNorm is selected.

    Note:
        A BatchNorm is folded if all of this holds: it keeps statistics; it alone uses the output of a layer of torch's own kinds, or of
        timm's Conv2dSame; both are called once, have no hooks, no replaced forward, no parametrization, and share neither themselves nor
        parameters with other places. A linear layer before a BatchNorm1d is taken to compute a matrix.

        State dicts change: the keys of the BatchNorm go, and a layer without a bias gets one. Save the folded model for inference, and
        train the other one. A module that calls layers of another directly, past its ``forward``, must be traceable itself for that to
        be seen.

    References:
        - B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam and D. Kalenichenko, "Quantization and Training of Neural
          Networks for Efficient Integer-Arithmetic-Only Inference", CVPR, 2018.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)).eval()
        >>> report = fold_batch_norm(net)
        >>> report.folded, report.left
        ({'1': '0'}, {'3': "it follows '2', a ReLU"})
        >>> net[1]
        Identity()
    """
    patterns = check_patterns("where", where, empty=False), check_patterns("exclude", exclude, empty=True)
    names = _selected(model, *patterns)
    training = next((name for name in ("", *names) if model.get_submodule(name).training), None)
    if training is not None:
        what = f"its {training!r}" if training else "the model"
        msg = f"`model` must be in evaluation mode, by whose statistics it is folded, and {what} is in training mode. Call `model.eval()`."
        raise ArgumentError(msg)
    model = model if check_bool("inplace", inplace) else copy_of(model)
    order, places = find_order(model, lambda module: _is_norm(module) or isinstance(module, _LAYERS)), _places(model)
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    for name in names:
        layer, reason = _layer_before(model, order, name)
        reason = reason or _entanglement(model, name, places, order) or _entanglement(model, layer, places, order)
        reason = reason or _mismatch(model.get_submodule(layer), model.get_submodule(name), layer)
        if reason is not None:
            left[name] = reason
            continue
        _fold(model.get_submodule(layer), model.get_submodule(name))
        replace_module(model, model.get_submodule(name), _remainder(model.get_submodule(name)))
        folded[name] = layer
    return FoldReport(model, folded, left, order.untraced)


def _selected(model: nn.Module, where: str | Sequence[str], exclude: str | Sequence[str]) -> list[str]:
    everything = [name for name, module in model.named_modules() if _is_norm(module)]
    selected = [name for name in everything if name and matches(name, where) and not matches(name, exclude)]
    if not selected:
        some = ", ".join(map(repr, everything[:3]))
        found = f"`where={where!r}` and `exclude={exclude!r}` left none of {len(everything)} ({some})" if some else "there is none"
        msg = f"fold_batch_norm found no BatchNorm in {type(model).__name__}: {found}. Select others, or leave the model as it is."
        raise NothingMatchedError(msg)
    return selected


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or type(module).__name__ in _FROZEN


def _layer_before(model: nn.Module, order: Order, name: str) -> tuple[str, str | None]:
    """Return the name of the layer whose output a BatchNorm alone uses, or why there is none."""
    calls = order.calls.get(name, [])
    while len(calls) == 1 and (before := calls[0].module) is not None:
        kind = type(model.get_submodule(before))
        if kind not in (*_PASSING, *_LAYERS) and kind.__name__ not in _PADDED:
            return "", f"it follows {before!r}, a {kind.__name__}"
        if calls[0].users != 1:
            return "", f"the output of {before!r} before it is used elsewhere, too"
        if kind not in _PASSING:
            return before, None
        calls = order.calls[before]
    if not calls:
        return "", "no module that could be traced calls it"
    return "", f"it is called {len(calls)} times" if len(calls) > 1 else f"it follows {calls[0].source}"


def _places(model: nn.Module) -> Counter[int]:
    """Count under how many names a model has each module, and each parameter and buffer."""
    modules = (id(module) for _, module in model.named_modules(remove_duplicate=False))
    parameters = (id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    buffers = (id(buffer) for _, buffer in model.named_buffers(remove_duplicate=False))
    return Counter((*modules, *parameters, *buffers))


def _entanglement(model: nn.Module, name: str, places: Counter[int], order: Order) -> str | None:
    """Return why a module is not its own, or computes something else than its class says."""
    module = model.get_submodule(name)
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(places[id(each)] > 1 for each in (module, *tensors)):
        return f"{name!r} or one of its tensors is shared with another place"
    if len(order.calls[name]) > 1:
        return f"{name!r} is called {len(order.calls[name])} times"
    if any(hooks) or "forward" in vars(module) or is_parametrized(module):
        return f"{name!r} has hooks, a replaced `forward` or a parametrization"
    if any(each.rpartition(".")[0] == name for each in order.read):
        return f"tensors of {name!r} are used elsewhere, too"
    return f"{name!r} does not know its shape yet" if any(is_lazy(tensor) for tensor in tensors) else None


def _mismatch(layer: nn.Module, norm: nn.Module, name: str) -> str | None:
    """Return why a layer cannot compute a normalization."""
    if type(norm) not in _NORMS and type(norm).__name__ not in _ACTING | _FROZEN:
        return f"a {type(norm).__name__} may compute more than its base"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    channels: Any = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    count: Any = norm.running_mean.numel()  # type: ignore[operator]
    return None if channels == count else f"it normalizes another dimension than the {channels} channels of {name!r}"


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Make a layer compute the normalization, too."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factor = (variance + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.double()
    shift = -mean * factor if norm.bias is None else norm.bias.double() - mean * factor
    weight, bias = layer.weight.double(), layer.bias
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, *)
        parts = weight.view(layer.groups, layer.in_channels // layer.groups, -1, *weight.shape[2:])
        folded = (parts * factor.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))).view_as(weight)
    else:
        folded = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    shift = shift if bias is None else shift + bias.double() * factor
    layer.weight.copy_(folded)
    if bias is None:
        layer.bias = nn.Parameter(shift.to(layer.weight), requires_grad=layer.weight.requires_grad)
    else:
        bias.copy_(shift)


def _remainder(norm: nn.Module) -> nn.Module:
    """Return what a class of normalization computes afterwards."""
    if type(norm).__name__ not in _ACTING:
        return nn.Identity()
    return nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act))  # type: ignore[arg-type]
