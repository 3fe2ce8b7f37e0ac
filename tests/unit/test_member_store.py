"""Members of an ensemble in files."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_tricks.ensembling._store import MemberStore


class Odd(nn.Module):
    """A model with what safetensors refuses or might lose: tied, transposed, small and complex tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.tied = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.tied.weight = self.first.weight
        self.strided = nn.Parameter(torch.randn(3, 5).T)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("small", torch.tensor(0.5, dtype=torch.float16))
        self.register_buffer("none", torch.zeros(0, 2))
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("passing", torch.ones(2), persistent=False)


def scramble(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(
                torch.randint(0, 2, tensor.shape) if not (tensor.is_floating_point() or tensor.is_complex()) else torch.randn_like(tensor)
            )
    return module


def trainer(**options):
    strategy = SimpleNamespace(barrier=lambda: None, save_checkpoint=lambda checkpoint, path, **_: torch.save(checkpoint, path))
    return SimpleNamespace(is_global_zero=True, global_rank=0, world_size=1, strategy=strategy, ckpt_path=None, **options)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("memory", ["cpu", "disk"])
def test_members_come_back_and_the_module_keeps_its_own(tmp_path, memory):
    module, store = Odd(), MemberStore(tmp_path / "members", memory)
    states = []
    for step in range(3):
        states.append(copy.deepcopy(scramble(module).state_dict()))
        store.add(module, trainer(), f"step={step}", {"step": step})
    scramble(module)
    own, pointers = copy.deepcopy(module.state_dict()), {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    strides = [tensor.stride() for tensor in module.state_dict().values()]
    lending = store.lending(module, trainer())
    for member, state in zip(store.members, states, strict=True):
        assert equal(store.state_dict(member), state)
        with torch.inference_mode():
            lending.hold(member)
        assert equal(module.state_dict(), state)
        assert module.tied.weight is module.first.weight
        assert [tensor.stride() for tensor in module.state_dict().values()] == strides
        module.norm.running_mean.add_(1)  # by an evaluation that changes a buffer
    lending.hold(None)
    assert equal(module.state_dict(), own)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == pointers
    assert equal(store.state_dict(store.members[0]), states[0])
    lending.hold(store.members[0])
    assert equal(module.state_dict(), states[0])
