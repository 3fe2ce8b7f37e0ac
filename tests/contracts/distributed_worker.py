"""Checks every trick on two processes: ``python distributed_worker.py FOLDER``, with the variables of torchrun.

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

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from contracts.cases import CASES, Case
from contracts.harness import Loader, assert_equal, make_trainer, weights
from lightning_tricks import errors
from reference.batch_norm import population

RANK = int(os.environ["RANK"])


class Trained(Callback):
    """Keeps the training weights after the latest batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights, self.loss = weights(pl_module), pl_module.losses[-1]


def fit(callbacks, case: Case, **options):
    """Train on data that differ between the ranks."""
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(0)
    module, trained = case.model(), Trained()
    module.body[3].p = 0.0
    strategy = options.pop("strategy", DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)))
    options = {"num_sanity_val_steps": 2, "use_distributed_sampler": False, **options}
    trainer = make_trainer([*callbacks, trained], devices=2, strategy=strategy, **options)
    trainer.fit(module, Loader(seed=RANK), Loader(2, seed=5 + RANK), ckpt_path=ckpt_path)
    return module, trained


def gathered(values):
    """Collect one object from each rank."""
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, values)
    return everyone


def check_ranks_agree(case: Case, folder: Path) -> None:
    """Weights and averages are the same on both ranks, although their data differ."""
    module, trained = fit([case.make()], case)
    states = gathered({name: value for name, value in weights(module).items() if "running" not in name})
    assert_equal(*states)
    losses = gathered(trained.loss)
    assert losses[0] != losses[1]


def check_neutral_is_nothing(case: Case, folder: Path) -> None:
    """Neutral arguments change nothing."""
    module, trained = fit([case.trick(**case.neutral)], case)
    plain, plainly = fit([], case)
    if "neutral" not in case.skips:
        assert_equal(weights(module), weights(plain))
    assert_equal(trained.weights, plainly.weights)


def check_resume(case: Case, folder: Path) -> None:
    """A resumed run equals one that never stopped."""
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", enable_version_counter=False)
    whole, trained = fit([case.make(), keep], case)
    again, retrained = fit([case.make()], case, ckpt_path=str(folder / "step=10.ckpt"))
    assert_equal(trained.weights, retrained.weights)
    own = {name for name in weights(whole) if RANK == 0 or "running" not in name}  # a checkpoint has rank zero's statistics
    assert_equal(*({name: value for name, value in weights(module).items() if name in own} for module in (whole, again)))


def check_one_process_equals_two(case: Case, folder: Path) -> None:
    """With the same data on both ranks, two processes train as one does."""
    torch.manual_seed(0)
    model = case.model()
    model.body[3].p = 0.0
    trick = case.make()
    trainer = make_trainer([trick], devices=2, strategy=DDPStrategy(process_group_backend="gloo"), use_distributed_sampler=False)
    trainer.fit(model, Loader(seed=0), Loader(2, seed=5))
    expected = torch.load(folder / "single.pt", weights_only=True)
    for name, value in weights(model).items():
        if "one process" not in case.skips or "running_var" not in name:
            torch.testing.assert_close(value, expected[name], msg=name)


class Inputs(Callback):
    """Evaluates BatchNorm's inputs over what the ranks train on, with the weights that the fit leaves behind."""

    def __init__(self, loader):
        self.loader = loader

    def on_fit_end(self, trainer, pl_module):
        pl_module.eval()
        with torch.no_grad():
            own = torch.cat([pl_module.body[0](x) for x, _ in self.loader])
        self.inputs = gathered(own)


def check_statistics_are_pooled(case: Case, folder: Path) -> None:
    """Both ranks end with the statistics of all data together, although their data differ in number and values."""
    if "pooled" in case.skips:
        return
    torch.manual_seed(0)
    module, data = case.model(), Loader(size=4 + 3 * RANK, seed=RANK, rank=5 * RANK)
    inputs = Inputs(Loader(size=4 + 3 * RANK, seed=RANK, rank=5 * RANK))
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer([case.make(), inputs], devices=2, strategy=strategy, use_distributed_sampler=False)
    trainer.fit(module, data, Loader(2, seed=5 + RANK))
    norm = module.body[1]
    assert_equal(*gathered({"mean": norm.running_mean, "variance": norm.running_var}))
    mean, variance = population(inputs.inputs)
    torch.testing.assert_close(norm.running_mean, mean.float())
    torch.testing.assert_close(norm.running_var, variance.float())
    assert {len(part) for part in inputs.inputs} == {20, 35}


def check_exception_returns_training_weights(case: Case, folder: Path) -> None:
    """An exception in validation leaves the training weights in the model, on every rank."""

    class Fails(Trained):
        def on_validation_epoch_end(self, trainer, pl_module):
            raise RuntimeError("in validation")  # noqa: EM101, TRY003

    torch.manual_seed(0)
    module, fails = case.model(), Fails()
    trainer = make_trainer(
        [case.make(), fails], devices=2, strategy=DDPStrategy(process_group_backend="gloo"), use_distributed_sampler=False
    )
    try:
        trainer.fit(module, Loader(seed=RANK), Loader(2))
    except RuntimeError as error:
        assert "in validation" in str(error)  # noqa: PT017
    states = (weights(module), fails.weights)  # without statistics, which DDP sends from rank zero in a forward pass of any kind
    assert_equal(*({name: value for name, value in state.items() if "running" not in name} for state in states))


def sharded(case: Case):
    """Make the case's model so that it shards itself under FSDP2, in parts that are uneven, and empty on one rank."""

    class Sharded(case.model):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.body[3].p = 0.0

        def forward(self, x):
            return self.scale * super().forward(x)

        def configure_model(self):
            if self.device_mesh is not None and not isinstance(self, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                for part in (self.body[0], self.head, self):
                    fully_shard(part, mesh=mesh)

    return Sharded


def fit_sharded(callbacks, case: Case, *, distributed_checkpoint: bool = False, **options):
    """Train under FSDP2 on data that differ between the ranks."""
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed_checkpoint, process_group_backend="gloo"
    )
    ckpt_path, fails = options.pop("ckpt_path", None), options.pop("fails", None)
    torch.manual_seed(0)
    module, trained = sharded(case)(), WholeTrained()
    options = {"num_sanity_val_steps": 2, "use_distributed_sampler": False, **options}
    trainer = make_trainer([*callbacks, trained], devices=2, strategy=strategy, **options)
    try:
        trainer.fit(module, Loader(seed=RANK), Loader(2, seed=5 + RANK), ckpt_path=ckpt_path)
    except RuntimeError as error:
        if fails is None or fails not in str(error):
            raise
    return module, trained


def whole(module):
    """Gather a model's state, without statistics that differ between ranks."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in module.state_dict().items()}
    return {name: value.detach().clone() for name, value in state.items() if "running" not in name}


def statistics(module):
    """Copy the statistics that differ between ranks."""
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name}


class WholeTrained(Callback):
    """Keeps the whole training weights after the latest batch, this rank's statistics, and its loss."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights, self.statistics, self.loss = whole(pl_module), statistics(pl_module), pl_module.losses[-1]


def check_fsdp2_equals_ddp(case: Case, folder: Path) -> None:
    """Sharded and replicated runs train and act alike."""
    module, trained = fit_sharded([case.make()], case)
    evaluated = {**whole(module), **statistics(module)}  # which returns to shards what the last validation has gathered
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert module.scale.to_local().numel() == (1 if RANK == 0 else 0)
    torch.manual_seed(0)
    twin, twin_trained = sharded(case)(), WholeTrained()
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer([case.make(), twin_trained], devices=2, strategy=strategy, use_distributed_sampler=False)
    trainer.fit(twin, Loader(seed=RANK), Loader(2, seed=5 + RANK))
    for one, other in ((trained.weights, twin_trained.weights), (whole(module), whole(twin))):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], msg=name)
    if "lends" not in case.skips:
        assert any(not torch.equal(value, {**trained.weights, **trained.statistics}[name]) for name, value in evaluated.items())
    if "pooled" not in case.skips:
        assert_equal(*gathered(statistics(module)))
        for name, value in statistics(module).items():
            torch.testing.assert_close(value, statistics(twin)[name], msg=name)


def check_fsdp2_neutral_is_nothing(case: Case, folder: Path) -> None:
    """Neutral arguments change nothing in a sharded run."""
    module, _ = fit_sharded([case.trick(**case.neutral)], case)
    plain, _ = fit_sharded([], case)
    assert_equal(whole(module), whole(plain))
    if "neutral" not in case.skips:
        assert_equal(statistics(module), statistics(plain))


def _resume_sharded(case: Case, folder: Path, *, distributed_checkpoint: bool) -> None:
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", enable_version_counter=False)
    module, trained = fit_sharded([case.make(), keep], case, distributed_checkpoint=distributed_checkpoint)
    for step in (7, 10):
        path = folder / f"step={step}.ckpt"
        assert path.is_dir() == distributed_checkpoint
        again, retrained = fit_sharded([case.make()], case, ckpt_path=str(path), distributed_checkpoint=distributed_checkpoint)
        assert_equal(trained.weights, retrained.weights)
        assert_equal(whole(module), whole(again))


def check_fsdp2_resumes_from_a_full_checkpoint(case: Case, folder: Path) -> None:
    """A resumed run equals one that never stopped; and the file loads into the plain model."""
    _resume_sharded(case, folder, distributed_checkpoint=False)
    checkpoint = torch.load(folder / "step=15.ckpt", weights_only=True)
    case.model().load_state_dict({name: value for name, value in checkpoint["state_dict"].items() if name != "scale"})


def check_fsdp2_resumes_from_a_sharded_checkpoint(case: Case, folder: Path) -> None:
    """A resumed run equals one that never stopped."""
    _resume_sharded(case, folder, distributed_checkpoint=True)


def check_fsdp2_exception_returns_training_weights(case: Case, folder: Path) -> None:
    """An exception in validation leaves the training weights in the shards."""

    class Fails(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                raise RuntimeError("in validation")  # noqa: EM101, TRY003

    module, trained = fit_sharded([case.make(), Fails()], case, fails="in validation")
    assert_equal(whole(module), trained.weights)


def check_unsupported_strategies_are_refused(case: Case, folder: Path) -> None:
    """What cannot work is refused in `setup`, saying why."""
    if "refused" in case.skips:
        return

    class OnCPU(FSDPStrategy):
        """Lightning refuses the exact class on the CPU."""

    module = case.model()
    try:
        make_trainer([case.make()], devices=2, strategy=OnCPU()).fit(module, Loader())
    except errors.UnsupportedStrategyError as error:
        assert "cannot work under FSDPStrategy: " in str(error)  # noqa: PT017
        assert case.trick.__name__ in str(error)  # noqa: PT017
    else:
        raise AssertionError("FSDPStrategy was not refused")  # noqa: EM101, TRY003


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run every check over every trick, and write down what failed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    for case in CASES:
        for check in CHECKS:
            key = f"{case.trick.__name__}-{check.__name__.removeprefix('check_')}"
            if "fsdp2" in key and not hasattr(torch.cpu.Stream, "record_event"):
                continue  # this torch runs FSDP2 on accelerators only
            folder = root / key if "resume" in key else root / case.trick.__name__
            folder.mkdir(exist_ok=True)
            try:
                check(case, folder)
                results[key] = "passed"
            except Exception:  # noqa: BLE001  # whatever it is, the parent process shows it
                results[key] = traceback.format_exc()
            (root / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
