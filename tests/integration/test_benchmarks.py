"""The benchmarks run; what they measure is not checked here."""

from __future__ import annotations

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
