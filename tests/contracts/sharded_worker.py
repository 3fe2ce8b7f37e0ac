"""Checks every trick under strategies that shard, on two processes: ``python sharded_worker.py FOLDER``, with the variables of torchrun.

Writes ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path

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
from contracts.harness import Loader, StepCheckpoints, assert_equal, make_trainer

RANK = int(os.environ.get("RANK", "0"))
KINDS = ("fsdp1", "fsdp2", "zero1", "zero2", "zero3")


def runs_here(kind: str) -> bool:
    """Tell whether a strategy runs on the CPU with what is installed: some torch runs FSDP2 on accelerators only."""
    return {"fs": kind == "fsdp1" or hasattr(torch.cpu.Stream, "record_event"), "ze": find_spec("deepspeed") is not None}[kind[:2]]


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
    options = {"num_sanity_val_steps": 2, "use_distributed_sampler": False, **options}
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


def gathered(values):
    """Collect one object from each rank."""
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, values)
    return everyone


class Trained(Callback):
    """Keeps the whole training weights after the latest batch, and this rank's statistics."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights, self.statistics = whole(pl_module), statistics(pl_module)


def check_equals_ddp(case: Case, kind: str, folder: Path) -> None:
    """Sharded and replicated runs train and act alike, and something acts."""
    module, trained = fit([case.make()], case, kind)
    ended = whole(module)  # which returns to shards what the last validation has gathered
    if kind == "fsdp2":
        assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
        assert module.scale.to_local().numel() == (1 if RANK == 0 else 0)
    twin, twin_trained = fit([case.make()], case, "ddp")
    for one, other in ((trained.weights, twin_trained.weights), (ended, whole(twin))):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], msg=name)
    raw = {**trained.weights, **trained.statistics}
    if "lends" not in case.skips:
        assert any(not torch.equal(value, raw[name]) for name, value in {**ended, **statistics(module)}.items())
    if "pooled" not in case.skips:
        assert_equal(*gathered(statistics(module)))
        for name, value in statistics(module).items():
            torch.testing.assert_close(value, statistics(twin)[name], msg=name)


def check_neutral_is_nothing(case: Case, kind: str, folder: Path) -> None:
    """Neutral arguments change nothing."""
    module, trained = fit([case.trick(**case.neutral)], case, kind)
    plain, plainly = fit([], case, kind)
    assert_equal(trained.weights, plainly.weights)
    assert_equal(whole(module), whole(plain))
    if "neutral" not in case.skips:
        assert_equal(statistics(module), statistics(plain))


def _resume(case: Case, kind: str, folder: Path, *, sharded: bool) -> None:
    keep = StepCheckpoints(folder, 7, 10, 15)
    module, trained = fit([case.make(), keep], case, kind, sharded=sharded)
    ended = whole(module)
    for step in (7, 10):
        path = folder / f"step={step}.ckpt"
        assert path.is_dir() == (sharded or "zero" in kind)
        again, retrained = fit([case.make()], case, kind, ckpt_path=path, sharded=sharded)
        assert_equal(trained.weights, retrained.weights)
        assert_equal(ended, whole(again))


def check_resumes_from_a_full_checkpoint(case: Case, kind: str, folder: Path) -> None:
    """A resumed run equals one that never stopped; and a file loads into the plain model."""
    _resume(case, kind, folder, sharded=False)
    if "zero" not in kind:
        checkpoint = torch.load(folder / "step=15.ckpt", weights_only=True)
        case.model().load_state_dict({name: value for name, value in checkpoint["state_dict"].items() if name != "scale"})


def check_resumes_from_a_sharded_checkpoint(case: Case, kind: str, folder: Path) -> None:
    """A resumed run equals one that never stopped."""
    if "zero" not in kind:  # whose checkpoints are all of one kind
        _resume(case, kind, folder, sharded=True)


class Started(Callback):
    """Keeps the whole weights with which training starts."""

    def on_train_start(self, trainer, pl_module):
        self.weights = whole(pl_module)


def check_resumes_what_is_saved_after_the_fit(case: Case, kind: str, folder: Path) -> None:
    """A checkpoint of the end, when the model may hold other weights than those that trained, has both."""
    module, trained = fit([case.make()], case, kind)
    ended, started = whole(module), Started()
    module.trainer.save_checkpoint(folder / "end.ckpt")
    again, _ = fit([case.make()], case, kind, ckpt_path=folder / "end.ckpt")
    assert_equal(ended, whole(again))
    fit([case.make(), started], case, kind, max_epochs=4, ckpt_path=folder / "end.ckpt")
    assert_equal(trained.weights, started.weights)


def check_exception_returns_training_weights(case: Case, kind: str, folder: Path) -> None:
    """An exception in validation leaves the training weights in the shards."""

    class Fails(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                raise RuntimeError("in validation")  # noqa: EM101, TRY003

    module, trained = fit([case.make(), Fails()], case, kind, fails="in validation")
    assert_equal(whole(module), trained.weights)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run every check over every trick and every strategy, and write down what failed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    for case in CASES:
        for kind in (kind for kind in KINDS if runs_here(kind) and not ("zero" in kind and "deepspeed" in case.skips)):
            for check in CHECKS:
                key = f"{case.trick.__name__}-{kind}-{check.__name__.removeprefix('check_')}"
                folder = root / key
                folder.mkdir(exist_ok=True)
                try:
                    check(case, kind, folder)
                    results[key] = "passed"
                except Exception:  # noqa: BLE001  # whatever it is, the parent process shows it
                    results[key] = traceback.format_exc()
                (root / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
