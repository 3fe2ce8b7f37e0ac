"""Recipes on parameters that FSDP2 and tensor parallelism hold as DTensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_tricks import optim

pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")  # of torch 2.6


@pytest.fixture
def mesh(process_group):
    return init_device_mesh("cpu", (1,))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2))


def sharded(mesh) -> nn.Module:
    return fully_shard(net(), mesh=mesh)


def partly_parallel(mesh) -> nn.Module:
    return parallelize_module(net(), mesh, {"0": ColwiseParallel(use_local_output=True)})


def train(model: nn.Module, recipe) -> torch.optim.Optimizer:
    optimizer = recipe.build(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().mean().backward()
        optimizer.step()
    return optimizer


on_cpu = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch runs FSDP2 on accelerators only")
RECIPES = [optim.AdamW(1e-2, weight_decay=0.1), optim.SGD(0.1, layer_decay=0.5), optim.Named("torch:adamax", lr=1e-2)]
if hasattr(torch.optim, "Muon"):
    RECIPES.append(optim.Muon(adamw_lr=1e-2))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize("shard", [pytest.param(sharded, marks=on_cpu), partly_parallel])
def test_groups_and_steps_are_those_of_the_plain_model(mesh, shard, recipe):
    plain, model = net(), shard(mesh)
    before = [(group.options, group.names) for group in recipe.groups(plain)]
    assert [(group.options, group.names) for group in recipe.groups(model)] == before
    train(plain, recipe)
    optimizer = train(model, recipe)
    assert any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])
    assert not optimizer.param_groups[0].get("fused")
    for ours, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        whole = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs
        torch.testing.assert_close(whole, ours)


def test_plain_and_sharded_parameters_together_are_stepped_one_by_one(mesh):
    assert optim.AdamW().build(partly_parallel(mesh)).param_groups[0]["foreach"] is False
    assert optim.AdamW().build(sharded(mesh)).param_groups[0]["foreach"] is None
