"""A run that saves a checkpoint after each step and goes on from the latest: ``python wrappers_kill_worker.py FOLDER``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_tricks as lt
from contracts.harness import fit, weights
from lightning_tricks import optim

RECIPE = optim.ClipNorm(optim.SAM(optim.ScheduleFree(optim.AdamW(lr=0.01)), rho=0.1), max_norm=1.0)


class Announce(Callback):
    """Prints each step, and takes long enough over it that a kill can hit anywhere."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(trainer.global_step, flush=True)  # noqa: T201
        time.sleep(0.03)


def main() -> None:
    """Train to the end, and leave the final states beside the checkpoints."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    saved = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    run = fit([lt.OptimizerFactory(RECIPE), checkpoints, Announce()], ckpt_path=saved[-1] if saved else None, seed=len(saved))
    torch.save({"trained": run.trained, "final": weights(run.module)}, folder / "end.pt")


if __name__ == "__main__":
    main()
