"""What a strategy does to a model, and how to undo it for a moment."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor, Partial, Replicate

from lightning_tricks._core.lightning import wrapped
from lightning_tricks._core.shards import Shards, find_shards
from lightning_tricks.errors import UnsupportedStrategyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.optim import Optimizer

    from lightning_tricks._core.lightning import Trainer

__all__ = [
    "abandon_forward",
    "added_up",
    "as_sharded",
    "cut",
    "data_rank",
    "engine_of",
    "holder_of",
    "is_sharded",
    "load_parts",
    "moved_by",
    "named_tensors",
    "own_part",
    "owner_of",
    "plain_name",
    "refuse_flat_parameters",
    "refuse_strategies",
    "refuse_unreachable_parameters",
    "region_of",
    "return_to_shards",
    "stored_tensors",
    "summed",
    "through_wrapper",
    "unwrapped",
    "whole",
    "writes_own_files",
]

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_COMPILED = "_orig_mod"  # stands in a state dict's keys, too


def _is_a(trainer: Trainer, strategy: str) -> bool:
    """Tell a strategy by the names in its ancestry, since Lightning exists under two package names."""
    return any(kind.__name__ == strategy for kind in type(trainer.strategy).__mro__)


def refuse_strategies(trainer: Trainer, trick: str, reasons: dict[str, str]) -> None:
    """Refuse strategies under which a trick cannot work.

    Args:
        trainer: The Trainer.
        trick: What the trick calls itself.
        reasons: Names of strategies, each with what stands in the way.

    Raises:
        UnsupportedStrategyError: If the Trainer's strategy is one of them.
    """
    for strategy, reason in reasons.items():
        if _is_a(trainer, strategy):
            msg = f"{trick} cannot work under {strategy}: {reason}. Use another strategy, or remove the callback."
            raise UnsupportedStrategyError(msg)


def refuse_flat_parameters(trainer: Trainer, trick: str) -> None:
    """Refuse FSDP1 where it does not show parameters as the module has them.

    Raises:
        UnsupportedStrategyError: If the Trainer's strategy does so.
    """
    strategy: Any = trainer.strategy
    if _is_a(trainer, "FSDPStrategy") and not strategy.kwargs.get("use_orig_params"):
        msg = f"{trick} follows parameters, and FSDPStrategy(use_orig_params=False) melts them into flat ones. Pass `use_orig_params=True`."
        raise UnsupportedStrategyError(msg)


def refuse_unreachable_parameters(trainer: Trainer, trick: str) -> None:
    """Refuse settings of a strategy under which no rank can read and write its part of each parameter.

    Raises:
        UnsupportedStrategyError: If the Trainer's strategy has one of them.
    """
    refuse_flat_parameters(trainer, trick)
    strategy: Any = trainer.strategy
    config = strategy.config if _is_a(trainer, "DeepSpeedStrategy") else None
    offloaded = ((config or {}).get("zero_optimization") or {}).get("offload_param") or {}
    if offloaded.get("device") == "nvme":
        msg = f"{trick} follows parameters, and DeepSpeed keeps them on NVMe here, out of reach. Offload them to the CPU, or not at all."
        raise UnsupportedStrategyError(msg)


def return_to_shards(module: nn.Module) -> None:
    """Let parameters that were gathered for a while be spread over ranks again.

    A forward pass without gradients leaves the root of FSDP unsharded, and ZeRO-3 never spreads small parameters: then `parameters`
    yields whole tensors whose changes are lost, and the next forward pass would not see changes of the shards.
    """
    for child in wrapped(module).modules():
        if isinstance(child, FSDPModule):
            child.reshard()
        elif isinstance(child, FullyShardedDataParallel):
            handle = child._handle
            if handle is not None and hasattr(handle.flat_param, "_local_shard"):  # from the first forward pass on
                _reshard(child, handle, free_unsharded_flat_param=handle.uses_sharded_strategy)
    for parameter in module.parameters():
        if hasattr(parameter, "ds_status") and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()  # type: ignore[attr-defined]


def abandon_forward(module: nn.Module) -> None:
    """Let parameters be spread over ranks again that an interrupted forward pass of FSDP2 has left gathered, maybe from lent weights.

    In the middle of a forward pass, FSDP2 keeps the root gathered whatever it is told, unless somebody asks for its state.
    """
    if any(isinstance(child, FSDPModule) for child in module.modules()):
        module.state_dict()


def writes_own_files(trainer: Trainer) -> bool:
    """Tell whether the strategy writes the weights itself, each rank its own, as DeepSpeed does, rather than the checkpoint it is given."""
    return _is_a(trainer, "DeepSpeedStrategy")


def data_rank(trainer: Trainer) -> int:
    """Return this process's rank among those that train on different data."""
    options: Mapping[str, int] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return options.get("rank", 0)


def engine_of(trainer: Trainer) -> Any | None:
    """Return DeepSpeed's engine, which steps in the optimizer's place."""
    model = trainer.strategy.model
    return model if _is_a(trainer, "DeepSpeedStrategy") and model is not trainer.lightning_module else None


def through_wrapper(trainer: Trainer, method: str) -> Callable[..., Any]:
    """Return a method of the module that may call its layers, within the forward pass of the wrapper where that gathers weights."""
    strategy: Any = trainer.strategy
    module = trainer.lightning_module
    if engine_of(trainer) is None and not isinstance(strategy.model, FullyShardedDataParallel):
        call: Callable[..., Any] = getattr(module, method)
        return call
    return partial(strategy._forward_redirection, strategy.model, module, method)


def moved_by(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer moves; DeepSpeed's keep copies of them in their groups."""
    own = (group["params"] for group in optimizer.param_groups)
    copied = (group for name in ("bit16_groups", "fp16_groups") for group in getattr(optimizer, name, ()))
    return {id(parameter) for group in (*own, *copied) for parameter in group}


def plain_name(name: str, *, compiled: bool = True) -> str:
    """Return a qualified name without the wrappers that a strategy puts around modules, nor, unless `compiled`, torch.compile's."""
    wrappers = _wrappers(compiled=compiled)
    return ".".join(part for part in name.split(".") if part not in wrappers)


def unwrapped(module: nn.Module, *, compiled: bool = True) -> nn.Module:
    """Return the module inside the wrappers that `plain_name` leaves out."""
    while inner := next((module._modules[wrapper] for wrapper in _wrappers(compiled=compiled) if wrapper in module._modules), None):
        module = inner
    return module


def _wrappers(*, compiled: bool) -> tuple[str, ...]:
    return _WRAPPERS if compiled else (*_WRAPPERS, _COMPILED)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a named tensor, inside all wrappers, and the tensor's name there."""
    path, _, key = name.rpartition(".")
    return unwrapped(module.get_submodule(path)), key


def named_tensors(module: nn.Module) -> dict[str, Tensor | Shards]:
    """Return parameters and buffers by every name they have, tied ones under each, and shards for those that are spread over ranks."""
    shards = find_shards(wrapped(module))
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {plain_name(name): shards.get(id(tensor), tensor) for name, tensor in tensors}


def stored_tensors(module: nn.Module) -> dict[str, Tensor | Shards]:
    """Return those named tensors that a state dict holds."""
    modules = module.named_modules(remove_duplicate=False)
    passing = {plain_name(f"{path}.{key}".lstrip(".")) for path, owner in modules for key in owner._non_persistent_buffers_set}
    return {name: tensor for name, tensor in named_tensors(module).items() if name not in passing}


def is_sharded(state_dict: Mapping[str, Any]) -> bool:
    """Tell whether a state dict holds each rank's own parts."""
    return any(isinstance(tensor, DTensor | ShardedTensor) for tensor in state_dict.values())


def holder_of(tensor: Tensor | Shards) -> Tensor:
    """Return the parameter or buffer itself, as the optimizer knows it."""
    return tensor.parameter if isinstance(tensor, Shards) else tensor


def own_part(tensor: Tensor | Shards) -> Tensor:
    """Return the part of a tensor that this rank owns: a view, which may be all of it."""
    if isinstance(tensor, Shards):
        return tensor.own
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def as_sharded(part: Tensor, like: Tensor | Shards) -> Tensor:
    """Return the tensor of which each rank has a part, spread as another; a view of the part."""
    return like.as_sharded(part) if isinstance(like, Shards) else part


def whole(part: Tensor, like: Tensor | Shards) -> Tensor | None:
    """Gather the whole tensor from the parts of all ranks, which must all call this; the rank that writes gets it, on the CPU."""
    if not isinstance(like, Shards):
        return part
    gathered = like.whole(part)
    return gathered.cpu() if distributed.get_rank() == 0 else None


def cut(tensor: Tensor, like: Tensor | Shards) -> Tensor:
    """Return this rank's part of a whole tensor, spread as another; no rank needs to wait for others."""
    if not isinstance(like, Shards):
        return tensor
    with torch.no_grad():
        return like.cut(tensor)


def added_up(tensor: Tensor) -> Tensor:
    """Return a tensor of which ranks hold terms, such as a gradient under tensor parallelism, as their sum; others as they are."""
    if not isinstance(tensor, DTensor) or not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    return tensor.redistribute(placements=[Replicate() if placement.is_partial() else placement for placement in tensor.placements])


def summed(value: Tensor, like: Tensor) -> Tensor:
    """Add up what each rank has summed over its own part of a tensor; all ranks must call this."""
    if not isinstance(like, DTensor):
        return value
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements, run_check=False).full_tensor()


def load_parts(path: str, likes: Mapping[str, Tensor | Shards], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Read this rank's parts of tensors from a sharded checkpoint.

    Args:
        path: The checkpoint's folder.
        likes: Names in the checkpoint's state dict, each with what it is spread like; its values are not used.
        dtypes: The dtype of each.

    Returns:
        The parts by name.
    """
    parts = {name: torch.empty_like(own_part(like), dtype=dtypes[name]) for name, like in likes.items()}
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    root = "state_dict" if any(key.startswith("state_dict.") for key in stored) else "model"  # FSDP2 and FSDP1 call it by other names
    load({root: {name: as_sharded(part, likes[name]) for name, part in parts.items()}}, checkpoint_id=path)
    return parts


def region_of(like: Tensor | Shards) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Return where in the contiguous whole this rank's part lies, as the arguments of `as_strided`.

    None where the part is empty, or another rank has the same.
    """
    part = cut(torch.empty(like.shape, device="meta"), like)
    copy = like.replica if isinstance(like, Shards) else distributed.is_initialized() and distributed.get_rank() > 0
    empty = like.shape.numel() > 0 and part.numel() == 0
    return None if copy or empty else (tuple(part.shape), part.stride(), int(part.storage_offset()))
