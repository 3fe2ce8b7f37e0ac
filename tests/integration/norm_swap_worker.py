"""Calibrates a swap on two processes with different data: ``python norm_swap_worker.py FOLDER``, with the variables of torchrun."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_tricks as lt
from contracts.harness import Loader, Net, make_trainer, weights


class Started(Callback):
    """Keeps the weights with which training starts."""

    def on_train_start(self, trainer, pl_module):
        self.weights = weights(pl_module)


def main() -> None:
    """Train, and write down what training started with and where it ended."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank, started = int(os.environ["RANK"]), Started()
    torch.manual_seed(0)
    module = Net()
    trainer = make_trainer(
        [started, lt.NormSwap("batch", "group", groups=2, calibrate=2)],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        max_epochs=1,
    )
    trainer.fit(module, Loader(seed=rank, rank=3 * rank))
    torch.save({"started": started.weights, "ended": weights(module)}, Path(sys.argv[1]) / f"{rank}.pt")


if __name__ == "__main__":
    main()
