"""Two processes that share each batch train as one process with the whole batch, whatever the norms are taken of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from contracts.harness import launch

sys.path.insert(0, str(Path(__file__).parent))

from wrappers_worker import CHECKS, RECIPES, fit

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrappers")
    for name, recipe in RECIPES.items():
        (root / name).mkdir()
        torch.save(fit(recipe, "auto", slice(0, 8), devices=1), root / name / "single.pt")
    launch(Path(__file__).with_name("wrappers_worker.py"), root, processes=2)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", [check.__name__.removeprefix("check_") for check in CHECKS])
@pytest.mark.parametrize("name", RECIPES)
def test_on_two_processes(name, check, results):
    if check.startswith("fsdp2") and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch runs FSDP2 on accelerators only")
    for rank in range(2):
        assert results[rank][f"{name}-{check}"] == "passed", f"rank {rank}:\n{results[rank][f'{name}-{check}']}"
