"""What the guides claim beyond the code that they show."""

from __future__ import annotations

import inspect
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_tricks as lt
from contracts.cases import CASES
from contracts.harness import PoolNet, fit, launch
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


# Tracking


@pytest.mark.filterwarnings("ignore:.*was stopped after", "ignore:Starting from v1.9", "ignore:Experiment logs directory")
def test_keys_of_logs_are_those_of_the_guide(tmp_path):
    said = {re.match(r"\[(\w+)\]", name)[1]: set(re.findall(r"`(\w+/\w+)`", keys)) for name, keys, _ in rows_of("tracking.md", "trick")}
    assert said.keys() == {case.trick.__name__ for case in CASES}
    logged = set()
    apart = (lt.BatchNormFreeze, lt.FastGeometricEnsemble)  # which hold what BatchNormRefresh and SnapshotEnsemble change
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
    unsaid = {key for key in logged for prefix in [key.partition("/")[0]] if prefix in prefixes and prefix not in loose} - set().union(*said.values())
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
