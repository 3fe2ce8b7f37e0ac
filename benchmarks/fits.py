"""What `overhead.py` trains, and how it takes the time."""

from __future__ import annotations

import time
from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from gradient_flow import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["Clock", "Module", "Scheduled", "loaders", "network", "trainer_with"]


def network(widths: Sequence[int]) -> nn.Module:
    """Return a residual network that pools after its stem."""
    first = widths[0]
    parts = {
        "stem": nn.Sequential(nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
        "layers": nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths))),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(widths[-1], 10),
    }
    return nn.Sequential(OrderedDict(parts))


class Module(pl.LightningModule):
    """Trains a network by SGD with momentum, in torch's fused implementation, which a recipe of ours would choose, too."""

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], rate: float = 0.01, **options: Any) -> None:
        super().__init__()
        self.net, self.loss, self.rate, self.options = net, loss, rate, options

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        prediction: Tensor = self.net(x)
        return prediction

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of a batch."""
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, fused=True, **self.options)


class Scheduled(Module):
    """Has the weight decay and the schedule of rates of a whole run, too."""

    def configure_optimizers(self) -> Any:
        """Return the optimizer and what schedules its rate, step by step."""
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Clock(Callback):
    """Takes CPU time and elapsed time at the beginning and the end of the steps that count."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.first, self.last = warmup - 1, warmup + steps - 1
        self.times: list[tuple[float, float]] = []

    def read(self) -> None:
        """Note both times, after what the device has to do."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.times.append((time.process_time(), time.perf_counter()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clocks around the steps that count."""
        if batch_idx in {self.first, self.last}:
            self.read()


def trainer_with(callbacks: Sequence[Callback], folder: str, device: str) -> pl.Trainer:
    """Make a Trainer that logs each tenth step to a file, and does nothing else on its own."""
    return pl.Trainer(
        callbacks=list(callbacks),
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=CSVLogger(folder),
        log_every_n_steps=10,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loaders(images: Tensor, targets: Tensor, steps: int) -> tuple[Any, Any]:
    """Return loaders that hand out one batch at each step, and once for validation."""
    return tuple(torch.utils.data.DataLoader([(images, targets)] * n, batch_size=None) for n in (steps, 1))
