"""Trains every trick under FSDP2 and tensor parallelism, on four processes started as torchrun starts them.

``python tensor_parallel_worker.py FOLDER`` writes ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.cases import CASES
from contracts.harness import Loader, StepCheckpoints, make_trainer

RANK = int(os.environ["RANK"])


class Net(pl.LightningModule):
    """Two layers, split over two processes each, and those over two more."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 3))

    def configure_model(self):
        if not isinstance(self.net, FSDPModule):
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
            for part in (self.net[1], self.net[3], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)}


def fit(callbacks, *, sharded: bool, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
    """Train, and return the whole state that the model ends with."""
    torch.manual_seed(0)
    module = Net()
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=2, save_distributed_checkpoint=sharded, process_group_backend="gloo"
    )
    trainer = make_trainer(callbacks, devices=4, strategy=strategy, use_distributed_sampler=False)
    trainer.fit(module, Loader(seed=RANK // 2), Loader(2, seed=5), ckpt_path=ckpt_path)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone() for name, value in module.state_dict().items()
    }


def main() -> None:
    """Compare runs with and without each trick, stopped and not, and write down what was seen."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    plain = fit([], sharded=False)
    for case in CASES:
        if "tensor parallel" in case.skips:
            continue
        neutral = fit([case.trick(**case.neutral)], sharded=False)
        seen = {"neutral is nothing": all(torch.equal(plain[name], neutral[name]) for name in plain)}
        for kind in ("full", "sharded"):
            folder = root / f"{case.trick.__name__}-{kind}"
            keep = StepCheckpoints(folder, 7)
            whole = fit([case.make(), keep], sharded=kind == "sharded")
            resumed = fit([case.make()], sharded=kind == "sharded", ckpt_path=folder / "step=7.ckpt")
            changed = any(not torch.equal(plain[name], whole[name]) for name in plain)
            seen[f"acts ({kind})"] = changed != ("acts" in case.skips)
            seen[f"resumes from a {kind} checkpoint"] = all(torch.equal(resumed[name], whole[name]) for name in whole)
        results[case.trick.__name__] = seen
    (root / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
