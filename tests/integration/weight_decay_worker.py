"""Compares decay of sharded tensors with that of whole ones, on two processes: ``python weight_decay_worker.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_tricks.functional import decay_weights_
from lightning_tricks.optimization._decay import measure


def main() -> None:
    """Check terms and gradients, and leave a mark."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    wholes = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 2))]
    layouts = [[Shard(0)], [Replicate()], None]  # three rows on two ranks are uneven parts
    parts = []
    for weight, layout in zip(wholes, layouts, strict=True):
        weight.grad = torch.randn_like(weight)
        part = nn.Parameter(weight.detach().clone() if layout is None else distribute_tensor(weight.detach().clone(), mesh, layout))
        part.grad = weight.grad.clone() if layout is None else distribute_tensor(weight.grad.clone(), mesh, layout)
        parts.append(part)
    for mode in ("decoupled", "l2", "l1"):
        torch.testing.assert_close(torch.tensor(measure(parts, 0.3, mode, 2.0)), torch.tensor(measure(wholes, 0.3, mode, 2.0)))
        # A gradient that tensor parallelism has not added up yet
        parts[1].grad = DTensor.from_local(wholes[1].grad / 2, mesh, [Partial()], run_check=False)
        for parameters in (parts, wholes):
            decay_weights_(parameters, 0.3, mode=mode, lr=0.1)
        for part, weight in zip(parts, wholes, strict=True):
            for found, expected in ((part.detach(), weight.detach()), (part.grad, weight.grad)):
                torch.testing.assert_close(found.full_tensor() if isinstance(found, DTensor) else found, expected)
    Path(sys.argv[1], os.environ["RANK"]).touch()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
