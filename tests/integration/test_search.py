"""Searches from coarse to fine: their plan, their workers, their results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_tricks import errors, search
from lightning_tricks.__main__ import main

pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pandas = pytest.importorskip("pandas")

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")]

ROOT = Path(__file__).parents[2]
LR, EMA, DECAY = "model.init_args.lr", "trainer.callbacks.EMA", "trainer.callbacks.EMA.init_args.decay"
BASE = """\
seed_everything: 3
model:
  class_path: integration.search_toy.Toy
  init_args:
    lr: 1e-2
data:
  class_path: integration.search_toy.ToyData
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_tricks.EMA
      init_args:
        decay: 0.9
"""
SEARCH = """\
config: base.yaml
metric: val_loss
pruner: none
parameters:
  model.init_args.lr: {low: 1e-3, high: 1e-1, scale: log}
stages:
  - {sampler: grid, count: 3}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "search.yaml").write_text(SEARCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIARY", str(tmp_path / "diary"))
    return tmp_path


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["search", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def start(home):
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "lightning_tricks", "search", "--config", "search.yaml"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(home / "told").open("a"),
    )


def wait_until(happened, *processes, seconds=120):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        assert all(process.poll() is None for process in processes), Path("told").read_text()
        time.sleep(0.05)


def diary_of(home):
    file = home / "diary"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_two_workers_lose_and_repeat_nothing_when_one_is_killed_and_the_search_goes_on_when_both_are(home, capsys):
    import optuna
    from lightning.pytorch.cli import LightningCLI

    text = SEARCH.replace("count: 3", "count: 5").replace("1e-1", "1e-2") + "  - {sampler: random, trials: 3}\nheartbeat: 1\n"
    (home / "search.yaml").write_text(text)
    (home / "base.yaml").write_text(BASE.replace("lr: 1e-2", "lr: 1e-2\n    pause: 0.4"))
    first, second = (start(home) for _ in range(2))
    try:
        wait_until(lambda: any(pid == str(first.pid) for _, _, pid in diary_of(home)), first, second)
        first.kill()  # in a trial, just begun
        wait_until(lambda: sum(what == "began" and pid == str(second.pid) for what, _, pid in diary_of(home)) > 1, second)
        second.kill()
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    before = search.load("runs/search")
    assert (before["state"] == "complete").sum() >= 1
    assert {"running", "killed"} & set(before["state"])

    assert main(["search", "--config", "search.yaml"]) == 0
    told = capsys.readouterr().err
    assert "trials are there from before." in told
    assert "stage 2 of 2, random, 3 trials: model.init_args.lr" in told

    table = search.load("runs/search")
    assert list(table["state"]) == ["complete"] * 8
    assert sorted(table[LR][table["stage"] == 1]) == [0.001, 0.002, 0.003, 0.006, 0.01]
    ended = sorted(float(lr) for what, lr, _ in diary_of(home) if what == "ended")
    assert ended == sorted(table[LR])  # each point was trained to its end, and once
    # what is kept is a plain study of Optuna
    study = optuna.load_study(study_name="search", storage="sqlite:///runs/search/study.db")
    best = table.loc[table["val_loss"].idxmin()]
    assert (study.best_trial.number, study.best_value) == (best["trial"], best["val_loss"])
    assert len(study.trials) >= 9  # with those that were killed
    # the best configuration runs as it is, and gives what was found
    cli = LightningCLI(args=["fit", "--config", "runs/search/best.yaml"], save_config_callback=None)
    assert cli.model.hparams.lr == best[LR]
    assert cli.trainer.callback_metrics["val_loss"].item() == pytest.approx(best["val_loss"], rel=0.05)  # in another order of the data
    # a search that is done has nothing left to do
    assert main(["search", "--config", "search.yaml"]) == 0
    assert "8 trials are there from before.\nBest: val_loss" in capsys.readouterr().err
    assert search.load("runs/search").equals(table)


def test_tricks_are_searched_with_their_arguments_and_pruned(home):
    config = {
        "config": str(home / "base.yaml"),
        "metric": "val_loss",
        "pruner": {"name": "median", "n_startup_trials": 1},
        "parameters": {LR: [0.0001, 0.1], EMA: [True, False], DECAY: {"low": 0.5, "high": 0.9}},
        "stages": [{"sampler": "grid", "count": 2}, {"sampler": "tpe", "trials": 2}],
    }
    table = search.search(config, folder="runs/tricks", progress=False)
    coarse, fine = (table[table["stage"] == stage] for stage in (1, 2))
    points = {(row[LR], row[EMA], None if pandas.isna(row[DECAY]) else row[DECAY]) for _, row in coarse.iterrows()}
    assert points == {(lr, ema, decay) for lr in (0.0001, 0.1) for ema, decay in ((True, 0.5), (True, 0.9), (False, None))}
    assert len(coarse) == 6
    assert len(fine) == 2
    assert set(fine[LR]) == {0.1}
    assert set(table["state"]) == {"complete", "pruned"}
    assert table["seconds"].notna().equals(table["state"] == "complete")
    best = search.load("runs/tricks").sort_values("val_loss").iloc[0]
    assert ("EMA" in (home / "runs/tricks/best.yaml").read_text()) == best[EMA]


def test_failing_and_diverging_trials_are_told_and_too_many_end_the_search(home, capsys):
    faults = "model.init_args.fault: [none, raise, diverge, exit]"
    text = SEARCH.replace("scale: log}", f"scale: log}}\n  {faults}").replace("count: 3", "count: 2")
    (home / "search.yaml").write_text(text)
    assert main(["search", "--config", "search.yaml"]) == 0
    table = search.load("runs/search")
    states = dict(zip(table["model.init_args.fault"], table["state"], strict=True))
    assert states == {"none": "complete", "raise": "failed", "diverge": "pruned", "exit": "failed"}
    assert set(table["error"].dropna()) == {"ZeroDivisionError: on purpose (search_toy.py:29)", "SystemExit: 3 (search_toy.py:31)"}
    assert "failed, ZeroDivisionError: on purpose" in capsys.readouterr().err
    (home / "base.yaml").write_text(BASE.replace("lr: 1e-2", "lr: 1e-2\n    fault: raise"))
    (home / "search.yaml").write_text(SEARCH + "failures: 2\nfolder: other\n")
    words = refusal(capsys, "--config", "search.yaml")
    assert "2 trials in a row have failed, which is as many as `failures` allows; the last one, 1, with ZeroDivisionError" in words


def test_a_metric_that_nobody_logs_ends_the_search_and_can_be_mended(home, capsys):
    (home / "search.yaml").write_text(SEARCH.replace("val_loss", "val_los"))
    words = "search.yaml:2: `metric` must be logged by validation_step, got 'val_los'; logged are: "
    assert words in refusal(capsys, "--config", "search.yaml")
    assert diary_of(home) == []
    (home / "search.yaml").write_text(SEARCH + "mode: max\n")
    words = "search.yaml:8: `mode` must stay what it was when the study 'search' began, got 'max'. Take another `folder`"
    assert words in refusal(capsys, "--config", "search.yaml")
    (home / "search.yaml").write_text(SEARCH)
    assert main(["search", "--config", "search.yaml"]) == 0
    assert list(search.load("runs/search")["state"]) == ["complete"] * 3
    (home / "search.yaml").write_text(SEARCH.replace("1e-1", "1"))
    words = refusal(capsys, "--config", "search.yaml")
    assert "search.yaml:4: `parameters` must stay what it was when the study 'search' began" in words


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("model.init_args.lr:", "model.init_args.lrr:", "search.yaml:5: `model.init_args.lrr` must fit `config`, got 0.001: "),
        ("model.init_args.lr:", "trainer.callbacks.EMMA.decay:", "search.yaml:5: "),
        ("low: 1e-3", "low: 0", "search.yaml:5: `low` must lie in (0, ∞), got 0"),
        ("low: 1e-3", "low: 2", "search.yaml:5: `low` must be smaller than `high`, got 2 and 0.1"),
        ("low: 1e-3, ", "", "search.yaml:5: `model.init_args.lr` must be a list of choices, or a mapping with `low`"),
        ("scale: log", "scale: ln", "search.yaml:5: `scale` must be one of 'linear', 'log', got 'ln'"),
        ("sampler: grid", "sampler: gird", "search.yaml:7: `sampler` must be one of 'grid', 'random', 'tpe', got 'gird'"),
        ("count: 3", "trials: 3", "search.yaml:7: A stage with the sampler 'grid' must have `count`"),
        ("count: 3", "count: 30000", "search.yaml:7: A grid must have at most 10,000 points, got 30,000"),
        ("pruner: none", "pruner: {name: halving, factor: 2}", "search.yaml:3: `pruner` must have arguments of Optuna's Success"),
        ("pruner: none", "prunner: none", "search.yaml:3: the configuration of a search must have no other keys than config, "),
        ("pruner: none", "mode: less", "search.yaml:3: `mode` must be one of 'min', 'max', got 'less'"),
        ("metric: val_loss", "metric:", "search.yaml:2: the configuration of a search must have `metric`, got None"),
        ("base.yaml", "bas.yaml", "search.yaml:1: `config` must be a YAML file, and 'bas.yaml' does not exist"),
        ("{low: 1e-3, high: 1e-1, scale: log}", "[1]", "search.yaml:5: `model.init_args.lr` must be a list of at least two different"),
        ("{low: 1e-3, high: 1e-1, scale: log}", "[1, fast]", "search.yaml:5: `model.init_args.lr` must fit `config`, got 'fast': "),
        ("model.init_args.lr:", DECAY + ":", f"search.yaml:5: `{DECAY}` must fit `config`, got 2: "),
        ("model.init_args.lr: {low: 1e-3, high: 1e-1, scale: log}", EMA + ": [1, 2]", "search.yaml:5: `trainer.callbacks.EMA` is an item"),
        ("pruner: none", "pruner: [", "search.yaml:5: expected"),
        ("stages:", "  model.init_args: [1, 2]\nstages:", "search.yaml:6: `model.init_args` must lead to another place than `model.ini"),
        ("stages:", f"  {EMA[:-3]}0: [true, false]\n  {EMA}: [true, false]\nstages:", f"search.yaml:7: `{EMA}` must lead to another place"),
        ("pruner: none", "seed: 4294967296", "search.yaml:3: `seed` must be smaller than 2³², got 4294967296"),
        ("pruner: none", "folder: 3", "search.yaml:3: `folder` must be the path of a folder, got 3"),
        ("pruner: none", "folder: base.yaml", "`folder` must be one where files can be written"),
        ("pruner: none", "ray: 3", "search.yaml:3: `ray` must be a mapping"),
    ],
)
def test_wrong_configurations_are_refused_with_their_line_before_anything_is_trained(home, capsys, before, after, words):
    text = SEARCH.replace(before, after)
    (home / "search.yaml").write_text(text.replace("high: 1e-1", "high: 2") if DECAY in text else text)
    assert words in refusal(capsys, "--config", "search.yaml")
    assert diary_of(home) == []


def test_a_wrong_base_is_told_with_its_own_line(home, capsys):
    (home / "base.yaml").write_text(BASE.replace("decay: 0.9", "decay: 1.9"))
    assert "base.yaml:16: " in (words := refusal(capsys, "--config", "search.yaml"))
    assert "`decay` must lie in [0, 1], got 1.9" in words
    (home / "base.yaml").write_text(BASE + "  devices: 2\n")
    assert "base.yaml:8: a search trains in one process each" in refusal(capsys, "--config", "search.yaml")


def test_a_journal_and_what_cannot_be_opened(home, capsys):
    import optuna

    table = search.search("search.yaml", storage="shared/journal.log", progress=False)
    assert list(table["state"]) == ["complete"] * 3
    assert not (home / "runs/search/study.db").exists()
    assert search.load("runs/search", storage="shared/journal.log").equals(table)
    with pytest.raises(errors.CheckpointError, match="'runs/search' must be the folder of a search, whose name is the study's, and there"):
        search.load("runs/search")
    foreign = optuna.create_study(study_name="search", storage="sqlite:///runs/search/study.db")
    assert foreign.trials == []
    with pytest.raises(errors.CheckpointError, match=r"there is no study 'search' of one in 'runs/search/study\.db'"):
        search.load("runs/search")
    assert "`storage` must be a database" in refusal(capsys, "--config", "search.yaml", "--storage", "nothing://host/name")
    assert "Start the same search once more" in refusal(capsys, "--config", "search.yaml", "--workers", "2")


def test_an_interrupted_trial_is_done_again(home, monkeypatch, capsys):
    from integration.search_toy import Toy

    monkeypatch.setattr(Toy, "on_train_epoch_end", lambda self: signal.raise_signal(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main(["search", "--config", "search.yaml"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    assert "Interrupted. The same command goes on from here." in capsys.readouterr().err
    assert list(search.load("runs/search")["state"]) == ["killed"]
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert main(["search", "--config", "search.yaml"]) == 0
    assert list(search.load("runs/search")["state"]) == ["complete"] * 3


def test_ray_shares_the_trials(home):
    pytest.importorskip("ray")
    table = search.search("search.yaml", launcher="ray", workers=2, progress=False)
    assert list(table["error"].dropna()) == []
    assert list(table["state"]) == ["complete"] * 3
