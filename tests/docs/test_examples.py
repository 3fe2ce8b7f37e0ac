"""The examples that no command of the README runs do run, and leave what they say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from contracts.harness import Worker, launch

EXAMPLES = Path(__file__).parents[2] / "examples"
STRATEGIES = ("auto", "ddp", "model_parallel")


@pytest.mark.full
def test_uncertainty_compares_four_trainings_and_tracks_the_members(tmp_path):
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ["--epochs=2", "--members=2", f"--output={tmp_path}", "--wandb"]
    Worker(EXAMPLES / "uncertainty.py", *arguments, environment=environment).finish()
    rows = list(csv.DictReader((tmp_path / "uncertainty.csv").read_text().splitlines()))
    assert len(rows) == 16
    assert {row["training"] for row in rows} == {"single", "MC dropout", "snapshot", "deep"}
    for row in rows:
        assert (row["accuracy"] == "") == (row["set"] == "unknown digits")
        assert (row["auroc"] == "") == (row["set"] == "test digits")
        assert all(0 <= float(row[name]) <= 1 for name in ("accuracy", "calibration_error", "auroc") if row[name])
    assert (tmp_path / "uncertainty.png").stat().st_size > 10_000
    assert len(list(tmp_path.glob("models/*/*.safetensors"))) == 6
    run = next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    assert all(f"{name}-members".encode() in run for name in ("single", "MC-dropout", "snapshot", "deep"))


def numbers(cell: str) -> list[float]:
    return [float(each) for each in re.findall(r"\d+\.?\d*", cell)]


def results(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.full
def test_examples_run_alike_on_one_process_and_on_two(tmp_path):
    """One launch runs each under DDP and FSDP2, and then, on its first process, without either."""
    launch(Path(__file__).with_name("examples_worker.py"), tmp_path, processes=2)
    for name in ("gan", "language_model", "tabular", "timm"):
        tables = {strategy: results(tmp_path / strategy / f"{name}.csv") for strategy in STRATEGIES}
        assert len({len(table) for table in tables.values()}) == 1
        for replicated, sharded in zip(tables["ddp"], tables["model_parallel"], strict=True):
            for key, value in replicated.items():
                assert numbers(value) == pytest.approx(numbers(sharded[key]), rel=0.02), f"{name}: {key}"
        for strategy in STRATEGIES:
            assert (tmp_path / strategy / f"{name}.png").stat().st_size > 10_000
