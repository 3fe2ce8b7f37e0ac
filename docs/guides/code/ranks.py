"""Train on two CPU processes, and go on from the latest checkpoint if there is one.

`python ranks.py runs/ranks` starts the second process by itself. `torchrun --nproc-per-node 2 ranks.py runs/ranks` starts both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from lightning_tricks import optim, schedules


class Classifier(L.LightningModule):
    """A small network, which `ModelParallelStrategy` shards and other strategies wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self, FSDPModule):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)  # which OptimizerFactory takes over


def main(folder: Path, *, strategy: str = "ddp", epochs: int = 4) -> L.Trainer:
    """Train up to so many epochs, from the latest checkpoint in the folder on."""
    L.seed_everything(0)  # on all ranks alike; each draws its own masks and samples
    x = torch.randn(256, 16)
    data = TensorDataset(x, x[:, :4].argmax(1))
    last = folder / "last.ckpt"
    if strategy == "ddp":
        chosen = DDPStrategy(process_group_backend="gloo")
    else:
        chosen = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=chosen,
        max_epochs=epochs,
        callbacks=[
            lt.OptimizerFactory(optim.AdamW(lr=1e-2), schedule=schedules.Linear(final=0.1, stop="4 epochs")),
            lt.FeatureNoise(0.1, where="layers.0"),
            lt.LabelSmoothing(0.1),
            lt.EMA(half_life="1 epoch"),
            ModelCheckpoint(folder, save_last=True, monitor="val_loss"),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=64)
    trainer.fit(Classifier(), *loaders, ckpt_path=last if last.exists() else None)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.folder, strategy=arguments.strategy, epochs=arguments.epochs)
