"""The examples that no command of the README runs do run, and leave what they say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from contracts.harness import Worker

EXAMPLES = Path(__file__).parents[2] / "examples"


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
