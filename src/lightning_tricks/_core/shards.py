"""Tensors of a model that are spread over ranks: the part that a rank owns, and the ways between parts and wholes.

Each strategy spreads parameters in its own way. FSDP2 makes each a `DTensor`. FSDP1 joins parameters to flat ones and cuts those
into equal pieces, so that a rank's part of a parameter is a run of its elements, which may be empty. DeepSpeed's ZeRO-3 cuts every
parameter into equal runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FlatShards", "PartitionShards", "Runs", "Shards", "TensorShards", "find_shards"]


class Shards(ABC):
    """A parameter that is spread over ranks.

    Attributes:
        parameter: The parameter as the model and the optimizer know it.
        shape: The shape of the whole.
    """

    parameter: Tensor
    shape: torch.Size

    @property
    @abstractmethod
    def own(self) -> Tensor:
        """The part that this rank owns, where the strategy keeps it now."""

    @property
    def version(self) -> int:
        """A number that changes when somebody writes to the parameter."""
        return self.own._version

    @property
    def replica(self) -> bool:
        """Whether a rank before this one has the same part."""
        return False

    @abstractmethod
    def whole(self, part: Tensor) -> Tensor:
        """Gather the whole from the parts of all ranks, which must all call this."""

    @abstractmethod
    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole; no rank needs to wait for others."""

    @abstractmethod
    def as_sharded(self, part: Tensor) -> Tensor:
        """Return the tensor of which each rank has a part, as sharded checkpoints take it; a view of the part."""


class TensorShards(Shards):
    """A `DTensor`."""

    def __init__(self, tensor: DTensor) -> None:
        self.parameter: DTensor = tensor
        self.shape = tensor.shape

    @property
    def own(self) -> Tensor:
        return self.parameter._local_tensor

    @property
    def replica(self) -> bool:
        coordinate = self.parameter.device_mesh.get_coordinate() or ()
        return any(place > 0 and placement.is_replicate() for place, placement in zip(coordinate, self.parameter.placements, strict=True))

    def whole(self, part: Tensor) -> Tensor:
        return self.as_sharded(part).full_tensor()

    def cut(self, whole: Tensor) -> Tensor:
        shape, offset = compute_local_shape_and_global_offset(self.shape, self.parameter.device_mesh, self.parameter.placements)
        return whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]

    def as_sharded(self, part: Tensor) -> DTensor:
        # Without shape and stride, ranks with uneven parts would disagree about both.
        like = self.parameter
        return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


class Runs(Shards):
    """A parameter of which each rank owns a run of elements.

    Attributes:
        runs: First element, and the one after the last, of each rank's run.
    """

    runs: list[tuple[int, int]]
    group: distributed.ProcessGroup

    @property
    def _rank(self) -> int:
        return distributed.get_rank(self.group)

    def whole(self, part: Tensor) -> Tensor:
        longest = max(stop - start for start, stop in self.runs)
        padded = part.new_zeros(longest)
        padded[: part.numel()] = part
        everyone = part.new_empty(len(self.runs) * longest)
        distributed.all_gather_into_tensor(everyone, padded, group=self.group)
        pieces = (piece[: stop - start] for piece, (start, stop) in zip(torch.split(everyone, longest), self.runs, strict=True))
        return torch.cat(list(pieces)).view(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        start, stop = self.runs[self._rank]
        return whole.reshape(-1)[start:stop]

    def as_sharded(self, part: Tensor) -> Tensor:
        ranks = distributed.get_process_group_ranks(self.group)
        shards = {
            rank: ShardMetadata([start], [stop - start], f"rank:{rank}/{part.device}")
            for rank, (start, stop) in zip(ranks, self.runs, strict=True)
            if stop > start
        }
        metadata = ShardedTensorMetadata(
            list(shards.values()), torch.Size([self.shape.numel()]), TensorProperties(dtype=part.dtype, requires_grad=False)
        )
        own = [Shard(part, shards[rank])] if (rank := distributed.get_rank()) in shards else []
        return ShardedTensor._init_from_local_shards_and_global_metadata(own, metadata, process_group=self.group)


class FlatShards(Runs):
    """A parameter of FSDP1, as a run of the elements of a flat parameter."""

    def __init__(self, handle: Any, index: int) -> None:
        self._flat, self._index = handle.flat_param, index
        self.group = handle.process_group
        self.parameter = self._flat._params[index]
        self.shape = self._flat._shapes[index]
        padding = self._flat._is_padding_mask
        bounds = list(pairwise(accumulate(self._flat._numels_with_padding, initial=0)))
        first, last = [bound for bound, is_padding in zip(bounds, padding, strict=True) if not is_padding][index]
        size = self._flat._sharded_size.numel()
        self.runs = [
            (min(max(rank * size, first), last) - first, min(max((rank + 1) * size, first), last) - first)
            for rank in range(self.group.size())
        ]

    @property
    def own(self) -> Tensor:
        # Where a parameter is whole at present, its shard is kept here.
        flat: Tensor = getattr(self._flat, "_local_shard", self._flat).detach()
        info = self._flat._shard_param_infos[self._index]
        return flat[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard] if info.in_shard else flat[:0]

    @property
    def version(self) -> int:
        return self.parameter._version  # the shard is written to by other names of its memory


class PartitionShards(Runs):
    """A parameter of ZeRO-3."""

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter
        self.shape = parameter.ds_shape
        self.group = parameter.ds_process_group
        numel, size = parameter.ds_numel, parameter.ds_tensor.ds_numel
        self.runs = [(min(rank * size, numel), min((rank + 1) * size, numel)) for rank in range(self.group.size())]

    @property
    def own(self) -> Tensor:
        start, stop = self.runs[self._rank]
        part: Tensor = self.parameter.ds_tensor.detach()[: stop - start]  # type: ignore[attr-defined]
        return part


def find_shards(model: nn.Module) -> dict[int, Shards]:
    """Return the parameters of a wrapped model that are spread over ranks, by their identity."""
    shards: dict[int, Shards] = {}
    for module in model.modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None and handle.uses_sharded_strategy:
            shards |= {id(parameter): FlatShards(handle, i) for i, parameter in enumerate(handle.flat_param._params or ())}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            shards[id(parameter)] = TensorShards(parameter)
        elif hasattr(parameter, "ds_tensor"):
            shards[id(parameter)] = PartitionShards(parameter)
    return shards
