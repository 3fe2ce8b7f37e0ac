"""Trains with every wrapper on two processes: ``python wrappers_worker.py FOLDER``, with the variables of torchrun.

Writes ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.harness import assert_equal, make_trainer
from lightning_tricks import optim

RANK = int(os.environ.get("RANK", "0"))
STEPS, TIMEOUT = 8, timedelta(seconds=60)
SGD = optim.SGD(lr=0.05, momentum=0.9)
RECIPES = {
    "SAM": optim.SAM(SGD, rho=0.3),
    "ASAM": optim.SAM(SGD, rho=0.5, adaptive=True),
    "Lookahead": optim.Lookahead(SGD, k=3),
    "ClipNorm": optim.ClipNorm(SGD, max_norm=0.05),
    "ClipLargest": optim.ClipNorm(SGD, max_norm=0.05, order=float("inf")),
    "ClipValue": optim.ClipValue(SGD, max_value=0.005),
    "AdaptiveGradientClipping": optim.AdaptiveGradientClipping(SGD, max_ratio=0.02),
    "GradientCentralization": optim.GradientCentralization(SGD),
    "GradientNoise": optim.GradientNoise(SGD, eta=0.001),
    "nested": optim.ClipNorm(optim.SAM(optim.Lookahead(optim.AdamW(lr=0.01, weight_decay=0.1), k=2))),
    "ScheduleFree": optim.ScheduleFree(SGD),
    "ScheduleFree-AdamW": optim.ScheduleFree(optim.AdamW(lr=0.01, weight_decay=0.1)),
}


class Net(pl.LightningModule):
    """Shards itself under FSDP2, in parts that are uneven, and empty on one rank."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5))
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.full((1,), 0.9))

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            for part in (self.body, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))) * self.scale

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.evaluated = whole(self)
        self.log("loss", self.training_step(batch, batch_idx), sync_dist=True)


def whole(module):
    """Gather a model's state."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in module.state_dict().items()}
    return {name: value.detach().clone() for name, value in state.items()}


class Trained(Callback):
    """Keeps the training weights after the latest batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights = whole(pl_module)


def batches(part: slice):
    """Batches of which this process gets a part."""
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(8, 1, 4, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(STEPS)]
    return DataLoader([(x[part], y[part]) for x, y in drawn], batch_size=None)


def fit(recipe, strategy, part, *, devices=2, ckpt_path=None, callbacks=()):
    """Train on a part of each batch; validate at the end."""
    torch.manual_seed(0)
    module, trained = recipe.attach(Net()), Trained()
    options = {"strategy": strategy, "use_distributed_sampler": False} if devices > 1 else {}
    trainer = make_trainer([trained, *callbacks], devices=devices, max_epochs=1, **options)
    trainer.fit(module, batches(part), batches(slice(0, 4)), ckpt_path=ckpt_path)
    return {"trained": trained.weights, "evaluated": module.evaluated, "final": whole(module)}


def ddp():
    return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)


def fsdp2(*, distributed_checkpoint: bool = False):
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=distributed_checkpoint,
        process_group_backend="gloo",
        timeout=TIMEOUT,
    )


def half():
    return slice(4 * RANK, 4 * RANK + 4)


def check_ddp_equals_one_process(recipe, folder):
    compare(fit(recipe, ddp(), half()), torch.load(folder / "single.pt", weights_only=True))


def check_fsdp2_equals_one_process(recipe, folder):
    compare(fit(recipe, fsdp2(), half()), torch.load(folder / "single.pt", weights_only=True))


def check_fsdp2_resumes_from_a_full_checkpoint(recipe, folder):
    resume(recipe, folder / "full", distributed_checkpoint=False)


def check_fsdp2_resumes_from_a_sharded_checkpoint(recipe, folder):
    resume(recipe, folder / "sharded", distributed_checkpoint=True)


def resume(recipe, folder, *, distributed_checkpoint):
    keep = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}", enable_version_counter=False)
    run = fit(recipe, fsdp2(distributed_checkpoint=distributed_checkpoint), half(), callbacks=[keep])
    path = folder / "step=4.ckpt"
    assert path.is_dir() == distributed_checkpoint
    warnings.filterwarnings("ignore")
    again = Skipping(recipe, folder, distributed_checkpoint=distributed_checkpoint).run(path)
    for point in ("trained", "evaluated", "final"):
        assert_equal(run[point], again[point])


class Skipping:
    """Resumes in the middle of an epoch, with the batches that are left."""

    def __init__(self, recipe, folder, *, distributed_checkpoint):
        self.recipe, self.strategy = recipe, fsdp2(distributed_checkpoint=distributed_checkpoint)

    def run(self, path):
        torch.manual_seed(7)
        module, trained = self.recipe.attach(Net()), Trained()
        trainer = make_trainer([trained], devices=2, max_epochs=1, strategy=self.strategy, use_distributed_sampler=False)
        trainer.fit(module, Left(half()), batches(slice(0, 4)), ckpt_path=str(path))
        return {"trained": trained.weights, "evaluated": module.evaluated, "final": whole(module)}


class Left:
    """The second half of the batches."""

    def __init__(self, part):
        self.batches = list(batches(part))

    def __len__(self):
        return STEPS

    def __iter__(self):
        yield from self.batches[4:]


def compare(got, wanted):
    for point, state in wanted.items():
        for name, value in state.items():
            torch.testing.assert_close(
                got[point][name], value, atol=2e-6, rtol=2e-5, msg=lambda text, at=f"{point} {name}": f"{at}: {text}"
            )


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run every check with every recipe, and write down what failed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    for name, recipe in RECIPES.items():
        for check in CHECKS:
            key = f"{name}-{check.__name__.removeprefix('check_')}"
            if "fsdp2" in key and not hasattr(torch.cpu.Stream, "record_event"):
                continue  # this torch runs FSDP2 on accelerators only
            try:
                check(recipe, root / name)
                results[key] = "passed"
            except Exception:  # noqa: BLE001  # whatever it is, the parent process shows it
                results[key] = traceback.format_exc()
            (root / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
