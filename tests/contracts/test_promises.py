"""Every promise of every trick, on a single device."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_tricks as lt
from contracts.cases import CASES, Case
from contracts.harness import Loader, Net, Recorder, assert_differ, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
each = pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])


class Plain(Callback):
    """Stands where a trick would, and does nothing."""


@functools.cache
def plain_run(model):
    return fit([Plain()], model)


@pytest.fixture
def plain(case: Case):
    return plain_run(case.model)


# 1. Keys stay.


@each
def test_keys_and_types_are_those_of_the_plain_model(case: Case, plain, tmp_path):
    run = fit([case.make(), ModelCheckpoint(tmp_path, filename="last")], case.model)
    if "keys" in case.skips:  # then one call makes the changes anew
        loaded = lt.load_from_checkpoint(case.model, tmp_path / "last.ckpt")
        assert [type(module) for module in loaded.modules()] == [type(module) for module in run.module.modules()]
        assert_equal(weights(loaded), weights(run.module))
        return
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(plain.module.state_dict())
    assert [name for name, _ in run.module.named_parameters()] == [name for name, _ in plain.module.named_parameters()]
    if "types" not in case.skips:
        assert [type(module) for module in run.module.modules()] == [type(module) for module in plain.module.modules()]
    case.model().load_state_dict(checkpoint["state_dict"], strict=True)


def test_checkpoints_load_in_code_that_never_heard_of_us(tmp_path):
    expected = []
    for case in CASES:
        run = fit([case.make(), ModelCheckpoint(tmp_path / case.trick.__name__, filename="last")], case.model, max_epochs=1)
        expected.append(f"{case.trick.__name__} {len(run.module.state_dict())}")
    script = """if True:
        import pathlib, sys, torch
        for path in pathlib.Path(sys.argv[1]).glob("*/last.ckpt"):
            print(path.parent.name, len(torch.load(path, weights_only=True)["state_dict"]))
        print("lightning_tricks" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    *sizes, heard = done.stdout.splitlines()
    assert heard == "False"
    assert sorted(sizes) == sorted(expected)


# 2. Neutral is nothing; acting is something.


@each
def test_neutral_arguments_change_nothing(case: Case, plain):
    run = fit([case.trick(**case.neutral)], case.model)
    assert run.losses == plain.losses
    assert_equal(run.trained, plain.trained)
    if "neutral" not in case.skips:
        assert_equal(weights(run.module), weights(plain.module))
    assert torch.equal(run.random_state, plain.random_state)


@each
def test_acting_arguments_change_something(case: Case, plain):
    run = fit([case.make()], case.model)
    if "trains alike" in case.skips:
        assert run.trainer.callback_metrics["val_loss"] != plain.trainer.callback_metrics["val_loss"]
        return
    changed, unchanged = weights(run.module), weights(plain.module)
    if "acts" in case.skips:  # then it must not disturb training, whatever its arguments
        assert run.losses == plain.losses
        assert_equal(changed, unchanged)
        return
    if "keys" in case.skips:
        changed, unchanged = ({name: state[name] for name in changed.keys() & unchanged.keys()} for state in (changed, unchanged))
    assert_differ(changed, unchanged)


# 3. Stop and resume equals never stopping.


@pytest.mark.parametrize("step", [2, 5, 8, 15])
@each
def test_resuming_equals_never_stopping(case: Case, step: int, tmp_path):
    whole = fit([case.make(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")], case.model)
    resumed = fit([case.make()], case.model, ckpt_path=tmp_path / f"step={step}.ckpt", seed=99)
    assert len(resumed.losses) == len(whole.losses) - step
    assert resumed.losses == whole.losses[step:]
    assert_equal(resumed.trained, whole.trained)
    assert_equal(weights(resumed.module), weights(whole.module))
    assert torch.equal(resumed.random_state, whole.random_state)


@each
def test_the_plain_run_resumes_so_too(case: Case, tmp_path):
    whole = fit([Plain(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")], case.model)
    resumed = fit([Plain()], case.model, ckpt_path=tmp_path / "step=8.ckpt", seed=99)
    assert resumed.losses == whole.losses[8:]


@each
def test_lightning_warns_when_a_run_is_resumed_without_the_trick(case: Case, tmp_path):
    fit([case.make(), ModelCheckpoint(tmp_path, filename="last")], case.model, max_epochs=1)
    if "keys" in case.skips:  # then the weights do not fit, which is no less clear
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict"):
            fit([Plain()], case.model, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
        return
    with pytest.warns(UserWarning, match=rf"callbacks used to create the checkpoint.*{case.trick.__name__}"):
        fit([Plain()], case.model, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)


@each
def test_a_checkpoint_made_without_the_trick_can_be_resumed_with_it(case: Case, tmp_path):
    fit([Plain(), ModelCheckpoint(tmp_path, filename="last")], case.model, max_epochs=1)
    if "weights" in case.skips:
        with pytest.raises(errors.CheckpointError, match="saved without it"):
            fit([case.make()], case.model, ckpt_path=tmp_path / "last.ckpt")
        return
    run = fit([case.make()], case.model, ckpt_path=tmp_path / "last.ckpt")
    assert len(run.losses) == 10


# 4. Training weights survive evaluation.


class TwiceSetUp(Callback):
    """Calls a trick's `setup` twice and leaves the rest to it."""

    def __new__(cls, trick):
        once = trick.setup

        def setup(trainer, pl_module, stage):
            once(trainer, pl_module, stage)
            once(trainer, pl_module, stage)

        trick.setup = setup
        return trick


class Fails(Callback):
    def __init__(self, error: type[BaseException], hook: str) -> None:
        self.error, self.before = error, None
        setattr(self, hook, self.fail)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.before = weights(pl_module)

    def fail(self, trainer, pl_module, *_):
        if self.before is not None and trainer.global_step > 7:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"])
@each
def test_no_exception_leaves_other_weights_in_the_model(case: Case, hook: str, error: type[BaseException]):
    for order in (1, -1):
        fails, module = Fails(error, hook), case.model()
        with pytest.raises((error, SystemExit)):
            make_trainer([case.make(), fails][::order]).fit(module, Loader(), Loader(2))
        assert_equal(
            {k: v for k, v in fails.before.items() if "running" not in k}, {k: v for k, v in weights(module).items() if "running" not in k}
        )


# 5. Any two tricks compose, or the second says why not.


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:SnapshotEnsemble.*was stopped after")  # as where LossSpikeGuard leaves out steps of its last cycle
@pytest.mark.parametrize(
    "pair", list(combinations_with_replacement(CASES, 2)), ids=lambda pair: f"{pair[0].trick.__name__}-{pair[1].trick.__name__}"
)
def test_any_two_tricks_compose_or_say_why_not(pair):
    first, second = pair[0].make(name="first"), pair[1].make(name="second")
    refusal = None
    try:
        run = fit([first, second], max((case.model for case in pair), key=lambda model: len(model.__mro__)))  # what has more
    except errors.TrickConflictError as error:
        refusal = str(error)
    if refusal is None:
        assert len(run.losses) == 15
    else:
        assert repr(first) in refusal
        assert repr(second) in refusal
        assert re.search(r"Keep one|pass `|Give ", refusal)


@each
def test_two_of_a_kind_without_names_are_refused(case: Case):
    with pytest.raises(errors.TrickConflictError, match=r"Give one of them a `name`|Keep one"):
        fit([case.trick(**case.neutral), case.trick(**case.neutral)], case.model)


# 6. Optimizer steps, not batches.


@each
def test_accumulated_gradients_equal_fewer_larger_steps(case: Case):
    """A trick that acts per batch would act twice as often in the first run."""
    recorder = Recorder()
    run = fit([case.make(), recorder], case.model, accumulate_grad_batches=2)
    entry = run.trainer
    assert entry.global_step == 9  # three in each epoch of five batches
    steps = [track.steps for track in run.trick._averages.tracks] if hasattr(run.trick, "_averages") else [9]
    assert steps == [9]


# 8. Precision.


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@each
def test_runs_in_every_precision(case: Case, precision: str):
    run = fit([case.make()], case.model, precision=precision)
    assert len(run.losses) == 15
    assert all(torch.isfinite(value).all() for value in weights(run.module).values())


# 9. torch.compile.


@pytest.mark.full
@each
def test_compiles_to_the_same_numbers_without_recompiling(case: Case):
    torch._dynamo.reset()
    counters = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counters.append(torch._dynamo.utils.counters["frames"]["total"])

    eager = fit([case.make()], case.model)

    def make():
        module = case.model()
        module.compile(backend="aot_eager")
        return module

    compiled = fit([case.make(), Count()], make)
    reference = weights(eager.module)
    for name, value in weights(compiled.module).items():
        torch.testing.assert_close(value, reference[name])
    assert counters[0] > 0
    assert counters[0] == counters[-1], "compiled again after the first epoch"
    assert len(compiled.losses) == 15


# 10. The callback as a value.


def as_config(value: object, key: str) -> object:
    """Write a recipe or schedule as YAML would: under LightningCLI's or Hydra's key for its class, with every argument."""
    if isinstance(value, list) and not all(isinstance(each, str) for each in value):
        return [as_config(each, key) for each in value]
    homes = (lt.optim, lt.schedules, lt.transforms)
    home = next((home for home in homes if getattr(home, type(value).__name__, None) is type(value)), None)
    if home is None:
        return value
    arguments = {each.name: getattr(value, each.name) for each in fields(value)}
    path = {key: f"{home.__name__}.{type(value).__name__}"}
    return {**path, **arguments} if key == "_target_" else {**path, "init_args": arguments}


@each
def test_repr_evaluates_back(case: Case):
    trick = case.make(name="slow")
    names = {case.trick.__name__: case.trick, **vars(lt.optim), **vars(lt.schedules), **vars(lt.transforms)}
    again = eval(repr(trick), names)  # noqa: S307
    assert again.arguments == trick.arguments
    assert repr(again) == repr(trick)
    assert case.trick.__name__ in repr(case.trick(**case.neutral))


@each
def test_pickles_and_copies_as_its_arguments(case: Case):
    run = fit([case.make()], case.model, max_epochs=1)
    for twin in (pickle.loads(pickle.dumps(run.trick)), copy.deepcopy(run.trick)):  # noqa: S301
        assert type(twin) is case.trick
        assert twin.arguments == run.trick.arguments
        assert len(fit([twin], case.model, max_epochs=1).losses) == 5


@pytest.mark.full
@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, called by Lightning
def test_round_trips_through_lightning_cli(case: Case, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    from lightning.pytorch.cli import LightningCLI

    acting = {
        "class_path": f"lightning_tricks.{case.trick.__name__}",
        "init_args": {name: as_config(value, "class_path") for name, value in case.acting.items()},
    }
    trainer = {"callbacks": [acting], "logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    cli = LightningCLI(
        Net,
        trainer_defaults={"enable_progress_bar": False},
        args={"trainer": trainer},
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
    )
    made = next(callback for callback in cli.trainer.callbacks if isinstance(callback, case.trick))
    assert made.arguments == case.make().arguments
    dumped = tmp_path / "config.yaml"
    dumped.write_text(cli.parser.dump(cli.config))
    again = LightningCLI(Net, args=["--config", str(dumped)], run=False, save_config_callback=None, seed_everything_default=False)
    assert next(c for c in again.trainer.callbacks if isinstance(c, case.trick)).arguments == made.arguments


@pytest.mark.full
@each
def test_hydra_instantiates_it_with_lists(case: Case):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    lists = {"exclude": ["head", "*.bias"]} if "exclude" in case.make().arguments else {}
    acting = {name: as_config(value, "_target_") for name, value in case.acting.items()}
    if any(isinstance(each, dict) for value in acting.values() if isinstance(value, list) for each in value):
        acting["_convert_"] = "all"  # or Hydra would make configurations again of the objects in lists
    config = OmegaConf.create({"_target_": f"lightning_tricks.{case.trick.__name__}", **acting, **lists})
    assert instantiate(config).arguments == case.make(**lists).arguments


# 11. Apply twice = once.


@each
def test_setting_up_again_does_nothing_more(case: Case):
    """`setup` is called before each use of the Trainer: fit, validate, and a second fit."""
    run = fit([case.make()], case.model, max_epochs=1)
    before = weights(run.module)
    run.trainer.validate(run.module, Loader(2), verbose=False)
    assert_equal(weights(run.module), before)
    twice = fit([TwiceSetUp(case.make())], case.model, max_epochs=1)
    assert_equal(weights(twice.module), before)


@each
def test_methods_replaced_for_a_fit_are_back_afterwards(case: Case):
    run = fit([case.make()], case.model, max_epochs=1)
    trainer = run.trainer
    for owner in (run.module, trainer.strategy, trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector):
        shadowed = [name for name, value in vars(owner).items() if callable(value) and callable(getattr(type(owner), name, None))]
        kept = ["forward"] if "keys" in case.skips and owner is run.module else []  # what stays in the model goes through it
        recorded = {"keys", "types"} & case.skips.keys() or hasattr(run.trick, "to_ensemble")
        if recorded and owner is trainer.strategy:
            kept = ["save_checkpoint"]  # files that are written after the fit record the change or the members, too
        assert [name for name in shadowed if name not in kept] == []


# 12. Logs, and prints nothing.


@each
def test_logs_under_its_own_name_to_every_logger_and_prints_nothing(case: Case, tmp_path, capsys):
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    run = fit([case.make(name="slow")], case.model, logger=loggers, log_every_n_steps=1)
    assert run.trick.log_prefix.endswith("_slow")
    for logger in loggers:
        assert f"{run.trick.log_prefix}/" in Path(logger.experiment.metrics_file_path).read_text().splitlines()[0]
    assert capsys.readouterr().out == ""


# 13. Wrong arguments fail early, in one sentence.


@pytest.mark.parametrize(
    ("case", "arguments", "words"), [(case, *wrong) for case in CASES for wrong in case.wrong], ids=lambda value: str(value)[:40]
)
def test_wrong_arguments_fail_in_the_constructor(case: Case, arguments, words: str):
    with pytest.raises(errors.ArgumentError, match=re.escape(words)) as raised:
        case.trick(**arguments)
    assert isinstance(raised.value, ValueError)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("case", "arguments", "words"), [(case, *row) for case in CASES for row in case.nothing_matched], ids=lambda value: str(value)[:40]
)
def test_nothing_matched_fails_in_setup(case: Case, arguments, words: str):
    module = case.model()
    with pytest.raises(errors.NothingMatchedError, match=re.escape(words)):
        make_trainer([case.make(**arguments)]).fit(module, Loader())
    assert module.losses == []


@each
def test_arguments_after_the_first_are_keyword_only(case: Case):
    with pytest.raises(TypeError):
        case.trick(*list(case.acting.values())[:1], 5, 5)
