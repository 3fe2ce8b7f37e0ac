"""The benchmarks run; what they measure is not checked here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.full
@pytest.mark.parametrize("name", [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "--repeats" in path.read_text()])
def test_benchmark_runs_and_reports(name, tmp_path):
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--repeats", "2", "--warmup", "1", "--output", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "out.json").stat().st_size > 100
    assert (tmp_path / "out.md").stat().st_size > 100
