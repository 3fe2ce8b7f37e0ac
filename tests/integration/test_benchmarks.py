"""The benchmarks and the longer examples run; what they measure is not checked here."""

from __future__ import annotations

import csv
import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest

from contracts.cases import CASES
from contracts.harness import Worker

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.full
@pytest.mark.parametrize("name", [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "--repeats" in path.read_text()])
def test_benchmark_runs_and_reports(name, tmp_path):
    Worker(BENCHMARKS / f"{name}.py", "--quick", "--repeats", 2, "--warmup", 1, "--output", tmp_path / "out").finish()
    assert (tmp_path / "out.json").stat().st_size > 100
    assert (tmp_path / "out.md").stat().st_size > 100


@pytest.mark.full
def test_the_example_of_transfer_fills_its_table(tmp_path):
    Worker(BENCHMARKS.parent / "examples" / "transfer.py", "--seeds", 1, "--steps", 2, "--output", tmp_path).finish()
    with (tmp_path / "transfer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 7
    assert sorted((row["amount"], row["kind"]) for row in rows if row["planned"] == "True") == [
        (amount, kind) for amount in ("little", "much") for kind in ("different", "similar")
    ]
    assert (tmp_path / "transfer.png").stat().st_size > 10_000


TINY = Namespace(model="tiny", batch_size=2, warmup=1, steps=1, device="cpu")


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("overhead")
    monkeypatch.setitem(module.WIDTHS, "tiny", [8, 8, 16])
    return module


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_every_public_callback_has_a_row_in_the_table_of_costs(overhead):
    for trick in (case.trick for case in CASES):
        assert [type(each) for each in overhead.TRICKS[trick.__name__]()] == [trick]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["EMA", "DropBlock", "Dropout", "FeatureNoise", "FineTuning", "LinearProbe", "TargetStandardization"])
def test_costs_are_measured_where_tricks_name_layers_or_need_other_targets(overhead, name):
    cpu, elapsed, around = overhead.times_of(name, TINY, acting=True)
    assert min(cpu, elapsed, around) > 0


@pytest.mark.full
def test_the_table_of_costs_has_time_memory_and_a_row_without_any_trick(tmp_path):
    Worker(BENCHMARKS / "overhead.py", "--quick", "--tricks", "SAM", "--warmup", 1, "--steps", 1, "--output", tmp_path / "out").finish()
    data = json.loads((tmp_path / "out.json").read_text())
    nothing, *tricks = data["times"]
    assert tricks == ["SAM"]
    assert data["made"][nothing] == ""
    assert data["peaks"][nothing]["with"] == data["peaks"][nothing]["without"]
    assert data["peaks"]["SAM"]["with"] > data["peaks"]["SAM"]["without"]
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert sum(line.startswith("| SAM |") for line in lines) == 2


@pytest.mark.full
def test_whole_runs_are_compared_beside_their_noise(tmp_path):
    Worker(BENCHMARKS / "overhead.py", "--whole-run", "--quick", "--steps", 1, "--output", tmp_path / "out").finish()
    assert [len(run["cpu"]) for run in json.loads((tmp_path / "out.json").read_text())["runs"].values()] == [2, 2, 2]
    assert "1.01 ×" in (tmp_path / "out.md").read_text()


@pytest.mark.full
def test_what_a_trick_imports_is_told_apart_from_what_training_imports(overhead):
    found = overhead.trick_imports(["EMA", "GradientFlow"], Namespace(**{**vars(TINY), "model": "small"}))
    assert any(name.startswith("matplotlib") for name in found["GradientFlow"])
    assert not [name for name in found["EMA"] if name.startswith(("torch.", "lightning.", "matplotlib"))]


@pytest.mark.full
def test_accuracy_is_measured_for_seeds_that_are_not_there(tmp_path):
    known = "arm,at,seed,error,nll,seconds\nlast weights,constant,0,50.0,1.5,3.0\n"
    (tmp_path / "averaging.csv").write_text(known)
    small = ("--data", "digits", "--epochs", 2, "--images", 16, "--output", tmp_path)
    Worker(BENCHMARKS / "accuracy.py", "--only", "averaging", "--seeds", 2, *small).finish()
    assert (tmp_path / "averaging.csv").read_text().startswith(known)
    with (tmp_path / "averaging.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[1:]
    assert [row["arm"] for row in rows[:2]] == ["last weights", "EMA"]
    assert {(row["at"], row["seed"]) for row in rows} == {("constant", "1"), ("cosine", "1")}
    assert len({row["nll"] for row in rows}) > 6
    assert all(0 <= float(row["error"]) <= 100 for row in rows)


@pytest.mark.full
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--seeds", 0), "--seeds must be at least 1, got 0"),
        (("--epochs", 1), "name another folder by --output"),
        (("--only", "norm_swap", "--images", 1500, "--output", "unused"), "digits has 1296 images to train on"),
    ],
)
def test_accuracy_refuses_what_it_cannot_measure_or_would_mix_up(given, words):
    worker = Worker(BENCHMARKS / "accuracy.py", *given)
    with pytest.raises(AssertionError, match=words):
        worker.finish()


@pytest.fixture
def accuracy_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("accuracy_report")


@pytest.mark.full
def test_the_interval_of_a_mean_of_pairs_is_students(accuracy_report):
    difference, half = accuracy_report.paired([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0])
    assert difference == 3
    assert half == pytest.approx(2.776445 * (10 / 4) ** 0.5 / 5**0.5)


@pytest.mark.full
@pytest.mark.parametrize("seeds", [(), (0,), (0, 0), (0, 1, 1)])
def test_a_table_refuses_a_file_that_lacks_seeds_of_a_way_or_holds_them_twice(accuracy_report, seeds):
    rows = [
        {"arm": arm, "at": "", "seed": str(seed), "error": "1", "nll": "1"}
        for arm, each in (("none", (0, 1)), ("MixUp", seeds))
        for seed in each
    ]
    table = next(each for each in accuracy_report.TABLES if each.page == "tricks/mix_up.md")
    with pytest.raises(LookupError, match=r"one row of 'MixUp' at '' for each of its seeds \[0, 1\]"):
        accuracy_report.render(table, rows)


@pytest.mark.full
def test_accuracy_skips_what_has_no_data_and_says_how_to_get_it(tmp_path):
    worker = Worker(BENCHMARKS / "accuracy.py", "--only", "averaging", "--output", tmp_path / "out")
    worker.finish()
    assert "averaging is skipped: fashion lies outside this repository" in worker.output.read_text()
    assert not (tmp_path / "out").exists()
