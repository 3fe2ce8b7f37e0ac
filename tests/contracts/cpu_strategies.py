"""Strategies that Lightning runs on accelerators only, on the CPU."""

from __future__ import annotations

from typing import Any

import lightning.fabric.strategies.fsdp as fabric
import lightning.pytorch.strategies.fsdp as pytorch
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, FullyShardedDataParallel, StateDictType


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1, whose exact class Lightning refuses on the CPU."""

    def setup_environment(self):
        super().setup_environment()
        pytorch._get_full_state_dict_context = fabric._get_full_state_dict_context = _full_states

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            sharding_strategy=self.sharding_strategy,
            mixed_precision=self.mixed_precision_config,
            **self.kwargs,
        )


def _full_states(module: torch.nn.Module, world_size: int, *, rank0_only: bool = True) -> Any:
    """Gather without the copy to the CPU, which FSDP1 takes of memory that it then frees."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )
