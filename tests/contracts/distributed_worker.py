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
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.cases import CASES, Case
from contracts.cpu_strategies import CPUFSDPStrategy
from contracts.harness import Loader, StepCheckpoints, assert_equal, gathered, make_trainer, weights
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
    keep = StepCheckpoints(folder, 10)
    whole, trained = fit([case.make(), keep], case)
    again, retrained = fit([case.make()], case, ckpt_path=str(folder / "step=10.ckpt"))
    assert_equal(trained.weights, retrained.weights)
    own = {name for name in weights(whole) if RANK == 0 or "running" not in name}  # a checkpoint has rank zero's statistics
    assert_equal(*({name: value for name, value in weights(module).items() if name in own} for module in (whole, again)))


def check_one_process_equals_two(case: Case, folder: Path) -> None:
    """With the same data on both ranks, two processes train as one does."""
    if "ranks alike" in case.skips:
        return
    torch.manual_seed(0)
    model = case.model()
    model.body[3].p = 0.0
    trick = case.make()
    trainer = make_trainer([trick], devices=2, strategy=DDPStrategy(process_group_backend="gloo"), use_distributed_sampler=False)
    trainer.fit(model, Loader(seed=0), Loader(2, seed=5))
    expected = torch.load(folder / "single.pt", weights_only=True)
    for name, value in weights(model).items():
        if "one process" not in case.skips or "running_var" not in name:
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


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


def check_unreachable_parameters_are_refused(case: Case, folder: Path) -> None:
    """What cannot work is refused in `setup`, saying why."""
    trick = case.make()
    if not trick.follows_weights:
        return
    try:
        make_trainer([trick], devices=2, strategy=CPUFSDPStrategy(use_orig_params=False)).fit(case.model(), Loader())
    except errors.UnsupportedStrategyError as error:
        assert "FSDPStrategy(use_orig_params=False) melts them into flat ones" in str(error)  # noqa: PT017
        assert case.trick.__name__ in str(error)  # noqa: PT017
    else:
        raise AssertionError("flat parameters were not refused")  # noqa: EM101, TRY003


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run every check over every trick, and write down what failed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    for case in CASES:
        for check in CHECKS:
            key = f"{case.trick.__name__}-{check.__name__.removeprefix('check_')}"
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
