"""Checks fine-tuning and probes on two processes: ``python transfer_worker.py FOLDER``. Writes ``FOLDER/RANK.json``."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_tricks as lt
from contracts.cases import Case
from contracts.cpu_strategies import CPUFSDPStrategy
from contracts.harness import Loader, Net, StepCheckpoints, assert_equal, gathered, make_trainer, weights
from contracts.sharded_worker import fit, runs_here, whole
from lightning_tricks import errors
from lightning_tricks.functional import linear_probe

RANK = int(os.environ["RANK"])
CASE = Case(lt.FineTuning, {}, {}, ())
STAGES = {"0%": "head", "4 steps": "neck", "8 steps": "*"}


class History(Callback):
    """Keeps the whole weights after each step, and which parameters the wrapper reduces."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append(whole(pl_module))


def tune(kind, *more, **options):
    history = History()
    module, _ = fit([lt.FineTuning(STAGES, lr_factors={"body": 0.5}), history, *more], CASE, kind, **options)
    return module, history.states


def check_ddp(folder):
    """Layers thaw on time, ranks stay equal although their data differ, and all of it equals a fit that reduces by hand."""
    module, states = tune("ddp", StepCheckpoints(folder / "ddp", 6))
    for state in states:
        assert_equal(*gathered(state))
    moves = {name: [not torch.equal(one[name], other[name]) for one, other in pairwise(states)] for name in states[0]}
    assert moves["head.weight"] == [True] * 9
    assert moves["neck.weight"] == [False] * 3 + [True] * 6
    assert moves["body.0.weight"] == moves["scale"] == [False] * 7 + [True] * 2
    buffers = [state["momentum_buffer"] for state in module.trainer.optimizers[0].state.values()]
    assert_equal(*gathered({str(i): buffer for i, buffer in enumerate(buffers)}))
    _, again = tune("ddp", ckpt_path=folder / "ddp/step=6.ckpt")
    assert_equal(states[-1], again[-1])

    class Everything(Callback):
        """Reduces all, and throws away the gradients of what is frozen: as slow as it is plain."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, parameter in pl_module.named_parameters():
                begin = next((begin for key, begin in (("head", 0), ("neck", 4), ("tied.weight", 4)) if name.startswith(key)), 8)
                parameter.grad = None if trainer.global_step < begin else parameter.grad

    plain = History()
    fit([Everything(), plain, lt.FineTuning({"0%": "*"}, lr_factors={"body": 0.5}, statistics="train")], CASE, "ddp")
    alike, _ = History(), None
    fit([lt.FineTuning(STAGES, lr_factors={"body": 0.5}, statistics="train"), alike], CASE, "ddp")
    for one, other in zip(plain.states, alike.states, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], msg=name)


def check_fsdp2(folder):
    """The same under FSDP2, which also resumes before a thaw from both kinds of checkpoint."""
    if not runs_here("fsdp2"):
        return
    _, replicated = tune("ddp")
    for sharded in (False, True):
        kept = folder / f"fsdp2-{sharded}"
        _, states = tune("fsdp2", StepCheckpoints(kept, 6), sharded=sharded)
        for one, other in zip(states, replicated, strict=True):
            for name, value in one.items():
                torch.testing.assert_close(value, other[name], msg=name)
        _, again = tune("fsdp2", sharded=sharded, ckpt_path=kept / "step=6.ckpt")
        assert len(again) == 4
        assert_equal(states[-1], again[-1])


def check_refusals(folder):
    """What cannot work is refused before training, saying why."""
    refused = (
        (CPUFSDPStrategy(), "FSDP1 saves the optimizer's state of a flat parameter as a whole"),
        (DDPStrategy(process_group_backend="gloo", ddp_comm_hook=default_hooks.fp16_compress_hook), "keeps a state that belongs"),
    )
    for strategy, words in refused:
        try:
            make_trainer([lt.FineTuning(STAGES)], devices=2, strategy=strategy).fit(Net(), Loader())
        except errors.UnsupportedStrategyError as error:
            assert words in str(error)  # noqa: PT017
        else:
            raise AssertionError(words)


def check_probe(folder):
    """Classifiers are fitted and scored on the samples of both ranks together."""
    torch.manual_seed(0)
    module, probe = Net(), lt.LinearProbe(["neck", "body"], l2=0.1)
    train, validation = ([Loader(seed=seed + rank, size=3 + rank) for rank in range(2)] for seed in (0, 5))
    expected = linear_probe(
        module,
        [batch for loader in train for batch in loader],
        [batch for loader in validation for batch in loader],
        stages=["neck", "body"],
        l2=0.1,
    )
    own = [Loader(seed=seed + RANK, size=3 + RANK) for seed in (0, 5)]
    before = weights(module)

    class Unchanged(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            assert_equal(weights(pl_module), before)

    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer([probe, Unchanged()], devices=2, strategy=strategy, use_distributed_sampler=False, max_steps=1)
    trainer.fit(module, *own)
    assert probe.report.accuracies == expected.accuracies
    assert len(gathered(probe.report.accuracies)) == 2


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    """Run every check, and write down what failed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    for check in CHECKS:
        try:
            check(folder)
            results[check.__name__] = "passed"
        except Exception:  # noqa: BLE001  # whatever it is, the parent process shows it
            results[check.__name__] = traceback.format_exc()
        (folder / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
