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
