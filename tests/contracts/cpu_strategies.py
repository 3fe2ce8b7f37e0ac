"""Strategies that Lightning runs on accelerators only, on the CPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import lightning.fabric.strategies.fsdp as fabric
import lightning.pytorch.strategies.fsdp as pytorch
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
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


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed, which Lightning allows on CUDA only; ``DS_ACCELERATOR=cpu`` must be in the environment before it is imported."""

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # which needs a compiler
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self):
        return torch.device("cpu", 0)
