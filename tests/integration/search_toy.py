"""A module that is trained in no time, and keeps a diary of its trainings."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Toy(LightningModule):
    """Learns to add two numbers."""

    def __init__(self, lr: float = 0.1, width: int = 4, fault: str = "none", pause: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def error(self, batch):
        return (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        if self.hparams.fault == "raise":
            message = "on purpose"
            raise ZeroDivisionError(message)
        if self.hparams.fault == "exit":
            sys.exit(3)
        return self.error(batch) * (float("nan") if self.hparams.fault == "diverge" else 1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.error(batch))

    def on_fit_start(self):
        self.note("began")

    def on_train_epoch_end(self):
        time.sleep(self.hparams.pause)

    def on_fit_end(self):
        self.note("ended")

    def note(self, what):
        if "DIARY" in os.environ:
            with Path(os.environ["DIARY"]).open("a") as diary:
                diary.write(f"{what} {self.hparams.lr!r} {os.getpid()}\n")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class ToyData(LightningDataModule):
    """Pairs of numbers."""

    def loader(self, seed, *, shuffle):
        data = TensorDataset(torch.randn(32, 2, generator=torch.Generator().manual_seed(seed)))
        return DataLoader(data, batch_size=8, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(0, shuffle=True)

    def val_dataloader(self):
        return self.loader(1, shuffle=False)
