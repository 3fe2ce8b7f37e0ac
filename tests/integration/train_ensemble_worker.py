"""Members trained apart, in a folder: ``python train_ensemble_worker.py FOLDER``; each step is printed, and takes a while."""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import count
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.harness import gathered
from lightning_tricks.ensembling import train_ensemble
from lightning_tricks.ensembling._bagging import draw_bag

SIZE = 20
ROWS = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.randint(3, (SIZE,), generator=torch.Generator().manual_seed(1))


class Net(pl.LightningModule):
    """A classifier of rows that remembers which it was trained on."""

    seen: tuple[list[int], ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def on_train_start(self):
        Net.seen = (*Net.seen, [])

    def training_step(self, batch, batch_idx):
        Net.seen[-1].extend((row == ROWS).all(1).nonzero().item() for row in batch[0])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


class Announce(Callback):
    """Prints each step, and takes long enough over it that a kill can hit anywhere."""

    steps = count(1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(next(Announce.steps), flush=True)  # noqa: T201
        time.sleep(0.01)


def main() -> None:
    """Train to the end, and leave what came out beside the members."""
    torch.set_num_threads(1)
    folder, distributed = Path(sys.argv[1]), "RANK" in os.environ
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    found = train_ensemble(
        Net,
        DataLoader(TensorDataset(ROWS, CLASSES), batch_size=5, shuffle=True),
        3,
        bootstrap=True,
        trainer={
            "accelerator": "cpu",
            "max_epochs": 1 if distributed else 4,
            "callbacks": [Announce()],
            "default_root_dir": folder,
            **({"strategy": "ddp", "devices": 2} if distributed else {}),
            **quiet,
        },
        folder=folder / "members",
    )
    assert found.mode == "loop"
    if distributed:
        states = gathered(found.ensemble.state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        bags = [sorted(one + other) for one, other in zip(*gathered(Net.seen), strict=True)]
        assert bags == [sorted(draw_bag(found_seed, SIZE).tolist()) for found_seed in seeds(folder)]
    else:
        content = {"state": found.ensemble.state_dict(), "predictions": found.out_of_bag.predictions.nan_to_num(-1.0)}
        torch.save(content, folder / "end.pt")


def seeds(folder: Path) -> list[int]:
    """Return the members' own seeds, as their records have them."""
    return [json.loads((folder / "members" / f"member-{member}.json").read_text())["seed"] for member in range(3)]


if __name__ == "__main__":
    main()
