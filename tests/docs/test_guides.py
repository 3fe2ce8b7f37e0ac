"""What the guides claim beyond the code that they show."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_tricks as lt
from contracts import test_promises as promises
from contracts.cases import CASES
from contracts.harness import Net, PoolNet, assert_equal, fit, launch
from lightning_tricks import errors
from lightning_tricks._core.conflicts import check_conflicts

GUIDES = Path(__file__).parents[2] / "docs/guides"
WORKER = Path(__file__).with_name("ranks_worker.py")


def rows_of(page: str, first: str) -> list[list[str]]:
    """Return the cells of the table whose header begins with these words."""
    lines = (GUIDES / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[start + 2 : end]]


# Composing


def test_tricks_exclude_each_other_as_the_guide_says():
    rows = {row[0]: row[1].partition("Lightning")[0] for row in rows_of("composing.md", "only one may")}
    evaluating = re.findall(r"`(\w+)`", rows["replace the weights of evaluation"].partition(", a recipe")[0])
    excluded = {frozenset(pair) for pair in combinations([name for name in evaluating if hasattr(lt, name)], 2)}
    excluded.add(frozenset(re.findall(r"`(\w+)`", rows["set learning rates for the whole fit"])))
    refused = set()
    for first, second in combinations(CASES, 2):
        try:
            check_conflicts([first.make(name="first"), second.make(name="second")])
        except errors.TrickConflictError:
            refused.add(frozenset({first.trick.__name__, second.trick.__name__}))
    assert refused == excluded


def test_every_trick_acts_on_something_in_the_guide():
    named = [name for _, names in rows_of("composing.md", "acts on") for name in re.findall(r"\[(\w+)\]", names)]
    assert sorted(named) == sorted(case.trick.__name__ for case in CASES)


# Configuring


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("callback", "words"),
    [
        ("class_path: lightning_tricks.EMAA", "module 'lightning_tricks' has no attribute 'EMAA'"),
        ("{class_path: lightning_tricks.EMA, init_args: {halflife: 5 steps}}", "Option 'halflife' is not accepted"),
        ("{class_path: lightning_tricks.EMA, half_life: 5 steps}", "Option 'class_path' is not accepted"),
        ("class_path: lightning_tricks.StochasticDepth", "the following arguments are required: rate"),
        ("{class_path: lightning_tricks.EMA, init_args: {decay: 1.5}}", "`decay` must lie in [0, 1], got 1.5."),
        (
            "{class_path: lightning_tricks.OptimizerFactory, init_args: {recipe: {lr: 0.001}}}",
            "Expected an instantiatable class",
        ),
        ("{class_path: lightning_tricks.BatchNormRefresh, init_args: {on: validation}}", "Key must be a string, got: True."),
        ("{class_path: lightning_tricks.EMA, init_args: {where: *.bias}}", "while scanning an alias"),
    ],
)
def test_mistakes_have_the_errors_of_the_guide(callback, words, tmp_path, capsys):
    from lightning.pytorch.cli import LightningCLI

    assert words in "".join(error for _, error in rows_of("configuration.md", "mistake"))
    path = tmp_path / "run.yaml"
    path.write_text(f"trainer:\n  callbacks:\n    - {callback}\n")
    with pytest.raises((SystemExit, ValueError)) as raised:
        LightningCLI(Net, run=False, save_config_callback=None, args=["--config", str(path)])
    assert words in f"{raised.value}{capsys.readouterr().err}"


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_callbacks_of_a_second_file_replace_those_of_the_first(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    for name in ("EMA", "PolyakAveraging"):
        (tmp_path / f"{name}.yaml").write_text(f"trainer:\n  callbacks:\n    - class_path: lightning_tricks.{name}\n")
    arguments = ["--config", str(tmp_path / "EMA.yaml"), "--config", str(tmp_path / "PolyakAveraging.yaml")]
    callbacks = LightningCLI(Net, run=False, save_config_callback=None, args=arguments).trainer.callbacks
    assert [type(each) for each in callbacks if type(each).__module__.startswith("lightning_tricks")] == [lt.PolyakAveraging]


# Checkpoints


def export(model, x):
    return torch.export.export(model, (x,), strict=False).module()


def trace(model, x):
    return model.to_torchscript(method="trace", example_inputs=x)


@pytest.mark.filterwarnings("ignore:.*(TorchScript|torch.jit|to_torchscript|Converting a tensor|legacy)")
@pytest.mark.parametrize("way", [export, trace])
def test_models_are_exported_after_tricks_that_leave_something_in_them(way):
    kept = {"keys", "types"}
    tricks = [case.make() for case in CASES if kept & case.skips.keys() and case.trick is not lt.NormSwap]
    model = fit([*tricks, lt.NormSwap("layer", "rms"), lt.EMA(0.5)], PoolNet, max_epochs=1).module.eval()
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(way(model, x)(x), model(x))
    if way is trace:
        with pytest.raises((RuntimeError, AttributeError)):
            model.to_torchscript(method="script")


# Tracking


@pytest.mark.filterwarnings("ignore:.*was stopped after", "ignore:Starting from v1.9", "ignore:Experiment logs directory")
def test_keys_of_logs_are_those_of_the_guide(tmp_path):
    said = {re.match(r"\[(\w+)\]", name)[1]: set(re.findall(r"`(\w+/\w+)`", keys)) for name, keys, _ in rows_of("tracking.md", "trick")}
    assert said.keys() == {case.trick.__name__ for case in CASES}
    logged = set()
    # Which hold or freeze what BatchNormRefresh and SnapshotEnsemble change, and leave no ReLU to GradientFlow.
    apart = (lt.BatchNormFreeze, lt.FineTuning, lt.FastGeometricEnsemble, lt.ActivationSwap)
    for cases in ([case for case in CASES if case.trick not in apart], [case for case in CASES if case.trick in apart]):
        tricks = []
        for case in cases:
            parameters = inspect.signature(case.trick).parameters
            changes = {"evaluate": False} if "evaluate" in parameters and case.trick is not lt.SnapshotEnsemble else {}
            changes |= {"schedule": None} if case.trick is lt.OptimizerFactory else {}
            tricks.append(case.make(**changes))
        logger = CSVLogger(tmp_path)
        fit(tricks, PoolNet, logger=logger, log_every_n_steps=1)
        logged |= set((Path(logger.log_dir) / "metrics.csv").read_text().partition("\n")[0].split(","))
    for trick, keys in said.items():
        assert keys <= logged, (trick, keys - logged)
    prefixes = {key.partition("/")[0]: keys for keys in said.values() for key in keys}
    loose = ("gradient_flow", "loss_spike_guard", "snapshot_ensemble", "linear_probe")  # whose row tells of others in words
    unsaid = {key for key in logged for prefix in [key.partition("/")[0]] if prefix in prefixes and prefix not in loose} - set().union(
        *said.values()
    )
    assert not unsaid


# Distributed training


def test_the_table_of_strategies_is_that_of_the_contract_suite():
    said = {re.match(r"\[(\w+)\]", name)[1]: marks for name, *marks in rows_of("distributed.md", "trick")}
    keys = (None, None, "tensor parallel", "fsdp1", "deepspeed")  # DDP and FSDP2 are never skipped
    marks = {"tensor parallel": "·", "fsdp1": "refused", "deepspeed": "refused"}
    assert said == {case.trick.__name__: [marks[key] if key in case.skips else "✓" for key in keys] for case in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(WORKER, folder, processes=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_the_script_resumes_to_the_bit_and_ranks_agree(ranks):
    whole = ranks[0]["whole"]
    assert len(whole) == 4
    for run in (ranks[1]["whole"], ranks[0]["parts"], ranks[1]["parts"]):
        assert all(torch.equal(whole[name], run[name]) for name in whole)


@pytest.mark.full
def test_the_script_runs_sharded(ranks):
    whole, sharded = ranks[0]["whole"], ranks[0]["fsdp2"]
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value)


# Writing a trick


@pytest.fixture
def case(monkeypatch):
    """Return the row of the guide's own trick."""
    monkeypatch.syspath_prepend(GUIDES / "code")
    yield importlib.import_module("row_of_max_norm").CASE
    for name in ("max_norm", "row_of_max_norm"):
        sys.modules.pop(name, None)


def test_the_limit_is_that_of_the_formula(case):
    limit_norms_ = sys.modules["max_norm"].limit_norms_
    weight = torch.randn(6, 2, 3)
    limited = weight.clone()
    count = limit_norms_(limited, 2.0)
    for row, found in zip(weight, limited, strict=True):
        norm = row.square().sum().sqrt()
        torch.testing.assert_close(found, row if norm <= 2.0 else row * 2.0 / norm)
    assert count.item() == sum(row.norm().item() > 2.0 for row in weight)


PROMISES = [
    promises.test_keys_and_types_are_those_of_the_plain_model,
    promises.test_neutral_arguments_change_nothing,
    promises.test_acting_arguments_change_something,
    partial(promises.test_resuming_equals_never_stopping, step=8),
    promises.test_lightning_warns_when_a_run_is_resumed_without_the_trick,
    promises.test_a_checkpoint_made_without_the_trick_can_be_resumed_with_it,
    promises.test_two_of_a_kind_without_names_are_refused,
    promises.test_accumulated_gradients_equal_fewer_larger_steps,
    partial(promises.test_runs_in_every_precision, precision="bf16-true"),
    promises.test_setting_up_again_does_nothing_more,
    promises.test_methods_replaced_for_a_fit_are_back_afterwards,
    promises.test_logs_under_its_own_name_to_every_logger_and_prints_nothing,
    promises.test_arguments_after_the_first_are_keyword_only,
]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: getattr(promise, "func", promise).__name__.removeprefix("test_"))
def test_the_guides_trick_keeps_the_promises(promise, case, tmp_path, capsys):
    found = {"case": case, "plain": promises.plain_run(case.model), "tmp_path": tmp_path, "capsys": capsys}
    wanted = inspect.signature(promise).parameters
    promise(**{name: value for name, value in found.items() if name in wanted})


def test_the_guides_trick_refuses_what_its_row_says(case):
    for arguments, words in case.wrong:
        promises.test_wrong_arguments_fail_in_the_constructor(case, arguments, words)
    for arguments, words in case.nothing_matched:
        promises.test_nothing_matched_fails_in_setup(case, arguments, words)


@pytest.mark.parametrize("names", [("first", "second"), ("second", "first")])
def test_the_guides_trick_goes_with_averages_in_any_order_and_not_with_itself(case, names):
    one, other = case.make(name=names[0]), case.make(name=names[1])
    with pytest.raises(errors.TrickConflictError, match=r"both limit 'body\.0\.weight'"):
        fit([one, other], case.model)
    assert_equal(*(fit(tricks, case.model).module.state_dict() for tricks in ([case.make(), lt.EMA(0.5)], [lt.EMA(0.5), case.make()])))
