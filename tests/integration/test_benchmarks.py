"""The benchmarks and the longer examples run; what they measure is not checked here."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

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
def test_accuracy_skips_what_has_no_data_and_says_how_to_get_it(tmp_path):
    worker = Worker(BENCHMARKS / "accuracy.py", "--only", "averaging", "--output", tmp_path / "out")
    worker.finish()
    assert "averaging is skipped: fashion lies outside this repository" in worker.output.read_text()
    assert not (tmp_path / "out").exists()
