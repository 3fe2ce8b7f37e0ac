"""Checks every trick under strategies that shard, on two processes: ``python sharded_worker.py FOLDER``, with the variables of torchrun.

Writes ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor

from contracts.cases import CASES, Case
from contracts.cpu_strategies import CPUDeepSpeedStrategy, CPUFSDPStrategy
from contracts.harness import Loader, StepCheckpoints, assert_equal, gathered, make_trainer
from lightning_tricks.functional import using_weights

if TYPE_CHECKING:
    from collections.abc import Callable

RANK = int(os.environ.get("RANK", "0"))
KINDS = ("fsdp1", "fsdp2", "zero1", "zero2", "zero3")


def runs_here(kind: str) -> bool:
    """Tell whether a strategy runs on the CPU with what is installed: some torch runs FSDP2 on accelerators only."""
    return {"fs": kind == "fsdp1" or hasattr(torch.cpu.Stream, "record_event"), "ze": find_spec("deepspeed") is not None}[kind[:2]]


def refusal(case: Case, kind: str) -> str | None:
    """Return why a trick refuses a strategy, if it does."""
    return case.skips.get("deepspeed" if "zero" in kind else kind)


def _is_unit(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) or (isinstance(module, nn.Linear) and module.out_features == 3)


def make_strategy(kind: str, *, sharded: bool = False):
    """Make a strategy; under FSDP, sharded ones write sharded checkpoints."""
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=int(os.environ["WORLD_SIZE"]),
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded,
            process_group_backend="gloo",
        )
    if kind == "fsdp1":
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_unit)
        return CPUFSDPStrategy(auto_wrap_policy=policy, state_dict_type="sharded" if sharded else "full", process_group_backend="gloo")
    return CPUDeepSpeedStrategy(stage=int(kind[-1]), process_group_backend="gloo")


def model_of(case: Case, kind: str):
    """Make the case's model so that it shards itself under FSDP2, in parts that are uneven, and empty on one rank."""

    class Sharded(case.model):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.body[3].p = 0.0

        def forward(self, x):
            return self.scale * super().forward(x)

        def configure_model(self):
            if kind == "fsdp2" and not isinstance(self, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                for part in (self.body[0], self.head, self):
                    fully_shard(part, mesh=mesh)

    return Sharded()


def fit(callbacks, case: Case, kind: str, *, sharded: bool = False, fails: str | None = None, ckpt_path: Path | None = None, **options):
    """Train on data that differ between the ranks."""
    torch.manual_seed(0)
    module, trained = model_of(case, kind), Trained()
    options = {"max_epochs": 2, "num_sanity_val_steps": 2, "use_distributed_sampler": False, **options}
    trainer = make_trainer([*callbacks, trained], devices=2, strategy=make_strategy(kind, sharded=sharded), **options)
    try:
        trainer.fit(module, Loader(seed=RANK), Loader(2, seed=5 + RANK), ckpt_path=ckpt_path)
    except RuntimeError as error:
        if fails is None or fails not in str(error):
            raise
    return module, trained


def whole(module):
    """Gather a model's state, without statistics that differ between ranks."""
    wrapper = module.trainer.strategy.model
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    if isinstance(wrapper, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapper, writeback=False):
            state = {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in module.named_parameters()}
    elif any(hasattr(parameter, "ds_tensor") for parameter in module.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            state = {name: value.detach().clone() for name, value in module.named_parameters()}
    else:
        state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in module.named_parameters()}
    return {name: value.detach().clone() for name, value in state.items()}


def statistics(module):
    """Copy the statistics that differ between ranks."""
    return {name.replace("_fsdp_wrapped_module.", ""): value.clone() for name, value in module.named_buffers() if "running" in name}


class Trained(Callback):
    """Keeps the whole training weights at the end of the latest epoch, and this rank's statistics."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            self.weights, self.statistics = whole(pl_module), statistics(pl_module)


class Started(Callback):
    """Keeps the whole training weights with which training starts, and stops there."""

    def on_train_start(self, trainer, pl_module):
        self.weights = whole(pl_module)
        trainer.should_stop = True


@dataclass
class Ended:
    """What a fit leaves: the weights that trained, and those in the model; without the model, so that it can be kept for other checks."""

    trained: dict[str, torch.Tensor]
    trained_statistics: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    statistics: dict[str, torch.Tensor]


@dataclass
class Runs:
    """The fits of one trick under one strategy that several checks share."""

    case: Case
    kind: str
    folder: Path
    kept: dict[tuple[object, ...], Ended]

    @property
    def sharded(self) -> bool:
        """Whether the checks take sharded checkpoints: under FSDP2, unless the trick's own state is sharded, which asks for both kinds."""
        return self.kind == "fsdp2" and not self.case.make().follows_weights

    def acting(self, *, sharded: bool | None = None) -> Ended:
        """Train with acting arguments, keep checkpoints of steps 5, 7 and 10, and the one of the end, written after the fit."""
        sharded = self.sharded if sharded is None else sharded
        folder = self.checkpoints(sharded=sharded)

        def run():
            module, trained = fit([self.case.make(), StepCheckpoints(folder, 5, 7, 10)], self.case, self.kind, sharded=sharded)
            ended = self.ended(module, trained)
            module.trainer.save_checkpoint(folder / "end.ckpt")
            if self.kind == "fsdp2":
                assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
                assert module.scale.to_local().numel() == (1 if RANK == 0 else 0)
            return ended

        return self._once((self.case.trick, self.kind, sharded), run)

    def replicated(self) -> Ended:
        """Train with acting arguments under DDP."""
        return self._once((self.case.trick, "ddp"), lambda: self.ended(*fit([self.case.make()], self.case, "ddp")))

    def plain(self) -> Ended:
        """Train the model without any trick."""
        return self._once((self.case.model, self.kind), lambda: self.ended(*fit([], self.case, self.kind)))

    def checkpoints(self, *, sharded: bool) -> Path:
        return self.folder / ("sharded" if sharded else "full")

    @staticmethod
    def ended(module, trained: Trained) -> Ended:
        weights = whole(module)  # which first returns to shards what the last validation has gathered
        return Ended(trained.weights, trained.statistics, weights, statistics(module))

    def _once(self, key: tuple[object, ...], run: Callable[[], Ended]) -> Ended:
        if key not in self.kept:
            self.kept[key] = run()
        return self.kept[key]


class NotCheckedError(Exception):
    """What makes a check pointless for a trick or under a strategy."""


def check_equals_ddp(runs: Runs) -> None:
    """Sharded and replicated runs train and act alike, and something acts."""
    one, twin = runs.acting(), runs.replicated()
    for mine, its in ((one.trained, twin.trained), (one.weights, twin.weights)):
        for name, value in mine.items():
            torch.testing.assert_close(value, its[name], msg=name)
    raw = {**one.trained, **one.trained_statistics}
    if "lends" not in runs.case.skips:
        assert any(not torch.equal(value, raw[name]) for name, value in {**one.weights, **one.statistics}.items())
    if "pooled" not in runs.case.skips:
        assert_equal(*gathered(one.statistics))
        for name, value in one.statistics.items():
            torch.testing.assert_close(value, twin.statistics[name], msg=name)


def check_neutral_is_nothing(runs: Runs) -> None:
    """Neutral arguments change nothing, under one strategy of each family."""
    if runs.kind not in {"fsdp2", "zero2"}:
        raise NotCheckedError("strategies of one family are alike in this")  # noqa: EM101, TRY003
    neutral, plain = runs.ended(*fit([runs.case.trick(**runs.case.neutral)], runs.case, runs.kind)), runs.plain()
    assert_equal(neutral.trained, plain.trained)
    assert_equal(neutral.weights, plain.weights)
    if "neutral" not in runs.case.skips:
        assert_equal(neutral.statistics, plain.statistics)


def _resume(runs: Runs, step: int, *, sharded: bool) -> None:
    whole_run = runs.acting(sharded=sharded)
    path = runs.checkpoints(sharded=sharded) / f"step={step}.ckpt"
    assert path.is_dir() == (sharded or "zero" in runs.kind)
    resumed = runs.ended(*fit([runs.case.make()], runs.case, runs.kind, ckpt_path=path, sharded=sharded))
    assert_equal(whole_run.trained, resumed.trained)
    assert_equal(whole_run.weights, resumed.weights)


def check_resumes_in_the_middle_of_an_epoch(runs: Runs) -> None:
    """A resumed run equals one that never stopped; a full checkpoint's weights load into the plain model."""
    _resume(runs, 7, sharded=runs.sharded)
    if "zero" not in runs.kind and not runs.sharded and "keys" not in runs.case.skips:
        checkpoint = torch.load(runs.checkpoints(sharded=False) / "step=10.ckpt", weights_only=True)
        runs.case.model().load_state_dict({name: value for name, value in checkpoint["state_dict"].items() if name != "scale"})


def check_resumes_at_the_end_of_an_epoch(runs: Runs) -> None:
    """A resumed run equals one that never stopped; from a sharded checkpoint, where a trick's state is sharded in one.

    What other tricks keep is the same in every rank's checkpoint, and the middle of an epoch asks more of them.
    """
    if not runs.case.make().follows_weights:
        raise NotCheckedError("its state is not sharded, and the middle of an epoch is checked")  # noqa: EM101, TRY003
    _resume(runs, 5, sharded="fsdp" in runs.kind)


def check_resumes_what_is_saved_after_the_fit(runs: Runs) -> None:
    """A checkpoint of the end, when the model may hold other weights than those that trained, has both."""
    if "lends" in runs.case.skips:
        raise NotCheckedError(runs.case.skips["lends"])
    ended, path = runs.acting(), runs.checkpoints(sharded=runs.sharded) / "end.ckpt"
    trick = runs.case.make()
    again, _ = fit([trick], runs.case, runs.kind, ckpt_path=path, sharded=runs.sharded)
    assert_equal(ended.weights, whole(again))
    if trick.follows_weights:
        state = trick.raw_state_dict()
        with using_weights(again, state if runs.kind == "fsdp2" else gathered(state)[0]):
            assert_equal(ended.trained, whole(again))
        assert_equal(ended.weights, whole(again))
    started = Started()
    fit([runs.case.make(), started], runs.case, runs.kind, max_epochs=3, ckpt_path=path, sharded=runs.sharded)
    assert_equal(ended.trained, started.weights)


def check_exception_returns_training_weights(runs: Runs) -> None:
    """An exception in validation leaves the training weights in the shards."""
    if "lends" in runs.case.skips:
        raise NotCheckedError(runs.case.skips["lends"])

    class Fails(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                raise RuntimeError("in validation")  # noqa: EM101, TRY003

    module, trained = fit([runs.case.make(), Fails()], runs.case, runs.kind, fails="in validation")
    assert_equal(whole(module), trained.weights)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run every check over every trick and every strategy, and write down what failed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results, kept = Path(sys.argv[1]), {}, {}
    for case in CASES:
        for kind in (kind for kind in KINDS if runs_here(kind) and refusal(case, kind) is None):
            runs = Runs(case, kind, root / f"{case.trick.__name__}-{kind}", kept)
            for check in CHECKS:
                key, start = f"{case.trick.__name__}-{kind}-{check.__name__.removeprefix('check_')}", time.perf_counter()
                try:
                    check(runs)
                    results[key] = "passed"
                except NotCheckedError as reason:
                    results[key] = f"skipped: {reason}"
                except Exception:  # noqa: BLE001  # whatever it is, the parent process shows it
                    results[key] = traceback.format_exc()
                print(f"{time.perf_counter() - start:6.2f} s  {key}", flush=True)  # noqa: T201  # shown if the worker fails
                (root / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
