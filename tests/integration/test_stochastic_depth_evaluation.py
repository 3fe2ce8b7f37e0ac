"""Scaling in evaluation, as the Trainer evaluates."""

from __future__ import annotations

import pytest
import torch

import lightning_tricks as lt
from contracts.harness import Loader, ResidualNet, pl
from lightning_tricks import schedules


def trainer(folder, trick, **options):
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[trick], logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=1, **options,
    )  # fmt: skip


class Watched(ResidualNet):
    """Notes what the blocks do in evaluation."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.blocks[1].register_forward_hook(self.note_block)

    def note_block(self, block, given, output):
        if not block.training:
            with torch.no_grad():
                self.seen.append(((output - given[0]) / block.branch(given[0])).median().item())


@pytest.mark.parametrize(
    ("rate", "last"), [(0.25, 0.25), (schedules.Linear(0.5, final=0.0), 0.5 * (1 - 5 / 6)), (schedules.Constant(0.4), 0.4)]
)
def test_branches_are_scaled_whenever_the_trainer_evaluates(tmp_path, rate, last):
    torch.manual_seed(0)
    model, trick = Watched(), lt.StochasticDepth(rate, scaling="evaluation")
    fitting = trainer(tmp_path, trick, num_sanity_val_steps=0)
    fitting.fit(model, Loader(batches=6), Loader(batches=1))
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    assert model.seen == pytest.approx([1 - last], abs=1e-4)
    assert all("forward" not in vars(module) for module in model.modules())
    fresh = lt.StochasticDepth(rate, scaling="evaluation")
    for each in (trick, fresh):
        model.seen.clear()
        trainer(tmp_path, each).test(model, Loader(batches=1), ckpt_path=tmp_path / "end.ckpt", verbose=False)
        assert model.seen == pytest.approx([1 - last], abs=1e-4)
        assert all("forward" not in vars(module) for module in model.modules())


def test_evaluation_is_that_of_the_plain_network_by_default(tmp_path):
    model = Watched()
    trainer(tmp_path, lt.StochasticDepth(0.5), num_sanity_val_steps=0).fit(model, Loader(batches=2), Loader(batches=1))
    assert model.seen == pytest.approx([1.0], abs=1e-4)
