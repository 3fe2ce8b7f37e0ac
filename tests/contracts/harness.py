"""A model, its data and its runs, small enough that every promise is checked over every trick."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

BATCHES = 5
"""Batches in an epoch."""

if "LIGHTNING_TRICKS_SCRATCH" not in os.environ:  # a process that was started by another uses that one's
    os.environ["LIGHTNING_TRICKS_SCRATCH"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["LIGHTNING_TRICKS_SCRATCH"], ignore_errors=True)
SCRATCH = os.environ["LIGHTNING_TRICKS_SCRATCH"]
"""Where runs put what they write without being told where."""


class Net(pl.LightningModule):
    """Has whatever tricks act on: convolution, BatchNorm, dropout, an integer buffer, a tied and a frozen parameter."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        self.neck = nn.Linear(144, 8)
        self.head = nn.Linear(8, 3)
        self.tied = nn.Linear(144, 8)
        self.tied.weight = self.neck.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(requires_grad=False)
        self.losses: list[float] = []
        self.evaluated: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.head(torch.tanh(self.frozen(self.neck(features) + self.tied(features))))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.note(batch_idx)
        self.log("val_loss", self.loss(batch), sync_dist=self.trainer.world_size > 1)

    def test_step(self, batch, batch_idx):
        self.note(batch_idx)
        self.log("test_loss", self.loss(batch), sync_dist=self.trainer.world_size > 1)

    def predict_step(self, batch, batch_idx):
        self.note(batch_idx)
        return self(batch[0])

    def note(self, batch_idx: int) -> None:
        """Keep what an evaluation saw."""
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.evaluated.append(weights(self))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.hparams["lr"], momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)}


class ResidualNet(Net):
    """The same with two residual blocks."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.blocks = nn.Sequential(Residual(), Residual())

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.head(self.blocks(torch.tanh(self.frozen(self.neck(features) + self.tied(features)))))


class Residual(nn.Module):
    """A block whose output has its input's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Loader:
    """Hands out shuffled batches and remembers where it stands, so that an epoch cut in the middle goes on there."""

    def __init__(self, batches: int = BATCHES, size: int = 4, seed: int = 0, rank: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batches * size, 1, 8, 8, generator=generator) + rank
        self.y = torch.randint(0, 3, (batches * size,), generator=generator)
        self.batches, self.size, self.seed = batches, size, seed
        self.epoch, self.next = 0, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.next == self.batches:
            self.epoch, self.next = self.epoch + 1, 0
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
        while self.next < self.batches:
            rows = order[self.next * self.size : (self.next + 1) * self.size]
            self.next += 1
            yield self.x[rows], self.y[rows]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.next = state["epoch"], state["next"]


class KeepRandomState(Callback):
    """Puts torch's random state into checkpoints, as Lightning does not."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.state = checkpoint["random_state"]

    def on_train_start(self, trainer, pl_module):
        if self.state is not None:
            torch.set_rng_state(self.state)
            self.state = None


class StepCheckpoints(ModelCheckpoint):
    """Writes a checkpoint after each of these steps: ``FOLDER/step=7.ckpt``."""

    def __init__(self, folder: Path, *steps: int) -> None:
        super().__init__(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", enable_version_counter=False)
        self.steps = steps

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step in self.steps:
            super().on_train_batch_end(trainer, *arguments)


@dataclass
class Run:
    """What is left of a fit."""

    module: pl.LightningModule
    trainer: pl.Trainer
    callbacks: list[Callback]
    trained: dict[str, Tensor] = field(default_factory=dict)  # training weights at the end
    random_state: Tensor | None = None
    losses: list[float] = field(default_factory=list)

    @property
    def trick(self) -> Any:
        return self.callbacks[0]


class Recorder(Callback):
    """Notes the training weights after each batch."""

    def __init__(self) -> None:
        self.history: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        self.history.append(weights(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.history.append(weights(pl_module))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copy a model's state."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def make_trainer(callbacks: Sequence[Callback] = (), **options: Any) -> pl.Trainer:
    """Make a quiet Trainer on the CPU."""
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 3,
        "default_root_dir": SCRATCH,
        **options,
    }
    return pl.Trainer(callbacks=list(callbacks), **options)


def fit(
    callbacks: Sequence[Callback] = (),
    model: Callable[[], pl.LightningModule] = Net,
    *,
    seed: int = 0,
    ckpt_path: str | Path | None = None,
    validate: bool = True,
    **options: Any,
) -> Run:
    """Make a model and train it; the first callback is the trick in question."""
    torch.manual_seed(seed)
    module = model()
    recorder = Recorder()
    trainer = make_trainer([*callbacks, KeepRandomState(), recorder], **{"num_sanity_val_steps": 2, **options})
    torch.manual_seed(seed + 1)
    trainer.fit(module, Loader(), Loader(2, seed=1) if validate else None, ckpt_path=ckpt_path)
    run = Run(module, trainer, list(callbacks), recorder.history[-1] if recorder.history else {}, torch.get_rng_state())
    run.losses = getattr(module, "losses", [])
    return run


class Worker:
    """A script that runs in a process of its own, which is forked where torch and Lightning are imported already."""

    def __init__(self, script: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self.output = Path(tempfile.mkstemp(dir=SCRATCH)[1])
        given = (script, list(map(str, arguments)), environment or {}, self.output)
        self.process = FORKS.Process(target=_run, args=given)
        self.process.start()

    def wait_for(self, step: int) -> int:
        """Wait until it prints this number or a larger one, and return it; or the last it has printed, if it ends before."""
        reached = 0
        with self.output.open() as printed:
            while reached < step:
                alive = self.process.is_alive()
                while line := printed.readline():
                    reached = int(line) if line.strip().isdigit() else reached
                if not alive:
                    break
                time.sleep(0.002)
        return reached

    def kill(self) -> None:
        """Kill it in the middle of what it does."""
        self.process.kill()
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL, self.output.read_text()[-3000:]

    def finish(self) -> None:
        """Wait for its end, and show what it printed if it failed."""
        self.process.join(900)
        assert self.process.exitcode == 0, self.output.read_text()[-3000:]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["lightning_tricks", "lightning.pytorch.strategies", "torch.distributed.fsdp", "torch.distributed.checkpoint"])


def _run(script: Path, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    os.environ.update(environment)
    with output.open("w") as printed:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(printed.fileno(), stream.fileno())
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def launch(script: Path, folder: Path, *, processes: int) -> None:
    """Run a script on several processes that find each other as torchrun's do, and show what it printed if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    running = [
        Worker(script, folder, environment={**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)
    ]
    try:
        for each in running:
            each.finish()
    finally:
        for each in running:
            each.process.kill()


def gathered(values: Any) -> list[Any]:
    """Collect one object from each of two ranks."""
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, values)
    return everyone


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Check that two states are the same to the bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"differ: {different}"


def assert_differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Check that two states of one model are not the same."""
    assert left.keys() == right.keys()
    assert any(not torch.equal(left[name], right[name]) for name in left)
