"""Measures what post-hoc EMA gives: ``python post_hoc_ema.py``.

Prints the error of synthesized averages by number of snapshots and width, and the width that averages have when they are updated
after every tenth step, ours and, if it is installed, ema-pytorch's.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import TYPE_CHECKING

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from lightning_tricks.functional import ema_update_, power_ema_decay, power_ema_gamma

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTHS = (0.03, 0.05, 0.06, 0.075, 0.10, 0.15, 0.20, 0.25)
STEPS = 2000


class Classifier(L.LightningModule):
    """Learns random labels with a constant learning rate, and keeps averages of every width, computed online in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.online = {width: self.flat() for width in WIDTHS}

    def flat(self) -> Tensor:
        """Return all weights as one vector."""
        return torch.cat([parameter.detach().double().flatten() for parameter in self.net.parameters()])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Update the averages."""
        for width, average in self.online.items():
            ema_update_([average], [self.flat()], power_ema_decay(self.trainer.global_step - 1, power_ema_gamma(width)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.2)


def errors(snapshots: int) -> list[float]:
    """Return the error of each synthesized average, as a share of the distance between the average and the last weights."""
    torch.manual_seed(0)
    model, data = Classifier(), TensorDataset(torch.randn(1000, 16), torch.randint(4, (1000,)))
    with tempfile.TemporaryDirectory() as folder:
        trick = lt.PostHocEMA(snapshot_every=STEPS // snapshots, dirpath=folder)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[trick], **quiet)
        trainer.fit(model, DataLoader(data, batch_size=10, shuffle=True))
        found = []
        for width, average in model.online.items():
            made = torch.cat([value.double().flatten() for value in trick.synthesize(width).values()])
            found.append(((made - average).norm() / (model.flat() - average).norm()).item())
    return found


def width_of(update: Callable[[int, Tensor], Tensor]) -> float:
    """Return the width of an average, from its averages of the time and of the square of the time."""
    for step in range(1, STEPS + 1):
        average = update(step, torch.tensor([step / STEPS, (step / STEPS) ** 2], dtype=torch.float64))
    return float((average[1] - average[0] ** 2).sqrt())


def ours(width: float, every: int) -> float:
    """Return the width of our average."""
    average = torch.zeros(2, dtype=torch.float64)

    def update(step: int, current: Tensor) -> Tensor:
        if step % every == 0:
            ema_update_([average], [current], power_ema_decay(step - every, power_ema_gamma(width), steps=every))
        return average

    return width_of(update)


def theirs(width: float, every: int) -> float:
    """Return the width of ema-pytorch's."""
    from ema_pytorch.post_hoc_ema import KarrasEMA  # noqa: PLC0415

    model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    ema = KarrasEMA(model, sigma_rel=width, update_every=every)

    def update(_: int, current: Tensor) -> Tensor:
        model[0].data.copy_(current)
        ema.update()
        return ema.ema_model[0].data

    return width_of(update)


def main() -> None:
    """Print both tables."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| snapshots |", " | ".join(f"{width:g}" for width in WIDTHS), "|")
    for snapshots in (10, 20, 40):
        print(f"| {snapshots} |", " | ".join(f"{error:.0e}" for error in errors(snapshots)), "|")
    for name, way in (("ours", ours), ("ema-pytorch", theirs)):
        try:
            print(f"{name}: width {way(0.10, 1):.3f} when updated each step, {way(0.10, 10):.3f} each tenth, for 0.100 asked")
        except ImportError:
            print(f"{name} is not installed")


if __name__ == "__main__":
    main()
