"""Stores averages of a model that is sharded over four processes: ``python post_hoc_worker.py FOLDER``, with torchrun's variables.

Writes ``FOLDER/RANK.pt``: what each rank made of the snapshots, and the weights after each step.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_tricks as lt
from contracts.harness import Loader, make_trainer

RANK = int(os.environ.get("RANK", "0"))


class Net(pl.LightningModule):
    """Has shards that are uneven, some that are empty, a frozen parameter, and a buffer that is not sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))

    def configure_model(self):
        if not isinstance(self, FSDPModule):
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
            for part in (self.net[1], self.net[3], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.scale * self.net(x) + self.shift

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def whole(state):
    """Gather a state dict."""
    full = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in full.items()}


class History(Callback):
    """Keeps the whole weights after each step."""

    def on_train_start(self, trainer, pl_module):
        self.states = [whole(pl_module.state_dict())]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for part in pl_module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        self.states.append(whole(pl_module.state_dict()))


def fit(folder, callbacks, **options):
    """Train, and return the module and the callback."""
    torch.manual_seed(0)
    module, trick = Net(), lt.PostHocEMA(snapshot_every=2, dirpath=folder / "snapshots")
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=2, save_distributed_checkpoint=True, process_group_backend="gloo"
    )
    trainer = make_trainer([trick, *callbacks], devices=4, strategy=strategy, use_distributed_sampler=False)
    trainer.fit(module, Loader(seed=RANK // 2), **options)
    return module, trick


def main() -> None:
    """Make averages in a run and in one that was resumed, and write them down."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder, history = Path(sys.argv[1]), History()
    keep = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module, trick = fit(folder, [keep, history])
    made = trick.synthesize(0.08)
    assert {name for name, value in made.items() if isinstance(value, DTensor)} == {name for name, _ in module.named_parameters()}
    parts = whole(made)
    module.load_state_dict(made)
    loaded = whole(module.state_dict())
    _, again = fit(folder, [], ckpt_path=str(folder / "checkpoints" / "step=7.ckpt"))
    resumed = whole(again.synthesize(0.08))
    alone = lt.functional.synthesize_ema(trick.snapshots[15], 0.08) if RANK == 3 else {}  # without the others
    names = [path.name for path in again.snapshots.values()]
    results = {"made": parts, "loaded": loaded, "resumed": resumed, "alone": alone, "names": names, "history": history.states}
    torch.save(results, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main()
