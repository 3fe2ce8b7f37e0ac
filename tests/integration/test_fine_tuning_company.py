"""FineTuning beside other tricks, optimizers and schedulers."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import lightning_tricks as lt
from contracts.harness import fit, make_trainer, weights
from integration.watch import Watch
from lightning_tricks import optim
from reference.transfer import sgd_with_rates

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Quadratic(pl.LightningModule):
    """Four weights, each with a loss of its own, so that gradients are known."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in "abcd"}).double()
        for i, layer in enumerate(self.layers.values()):
            nn.init.constant_(layer.weight, i + 1.0)

    def training_step(self, batch, batch_idx):
        return sum(layer.weight.square().sum() * (i + 1) / 2 for i, layer in enumerate(self.layers.values()))

    def configure_optimizers(self):
        groups = [{"params": list(self.layers["a"].parameters())}]
        groups.append({"params": [p for name in "bcd" for p in self.layers[name].parameters()], "lr": 0.02})
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.9**t, lambda t: 1 / (1 + t)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_rates_per_layer_follow_a_scheduler_with_a_function_for_each_group():
    """Against the formula in loops: two groups with schedules of their own, one of them divided in three, and stages on top."""
    torch.manual_seed(0)
    module, stages = Quadratic(), {"0 steps": ["layers.c", "layers.d"], "2 steps": "layers.b", "5 steps": "*"}
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
            assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [1, 3]

    tuning = lt.FineTuning(stages, layer_decay=0.5, lr_factors={"layers.c": 0.1, "layers.?": 3.0, "c": 0.2})
    make_trainer([tuning, Rates()], max_steps=9).fit(module, torch.utils.data.DataLoader(torch.zeros(9, 1)))
    factors = {"a": 3 * 0.5**3, "b": 3 * 0.5**2, "c": 0.2 * 0.5, "d": 3.0}
    given = [{name: factors[name] * (0.01 * 0.9**t if name == "a" else 0.02 / (1 + t)) for name in "abcd"} for t in range(9)]
    expected = sgd_with_rates(
        {name: i + 1.0 for i, name in enumerate("abcd")},
        [lambda weights: {name: (i + 1) * weights[name] for i, name in enumerate("abcd")}] * 9,
        given,
        momentum=0.9,
        weight_decay=0.1,
        frozen=[{name for name in "ab" if t < {"a": 5, "b": 2}[name]} for t in range(9)],
    )
    for name, value in expected.items():
        torch.testing.assert_close(module.layers[name].weight.item(), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(rates[0], [0.01 * 0.9, 0.02 / 2])  # after the scheduler's step, without factors


def test_weight_decay_sees_the_rates_with_their_factors():
    """Decay by another callback shrinks by the layer's own rate, whether it joins the optimizer's own or replaces it."""

    class Plain(Quadratic):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02, weight_decay=0.3)

        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    module = Plain()
    decay = lt.WeightDecay(0.5, existing="replace")
    tuning = lt.FineTuning({"0%": "*"}, lr_factors={"layers.a": 0.1})
    make_trainer([decay, tuning], max_epochs=2).fit(module, torch.utils.data.DataLoader(torch.zeros(3, 1)))
    for i, (name, factor) in enumerate((("a", 0.1), ("b", 1.0))):
        assert module.layers[name].weight.item() == pytest.approx((i + 1) * (1 - 0.02 * factor * 0.5) ** 6, rel=1e-12)


@pytest.mark.parametrize("front", [True, False])
def test_cyclic_rates_meet_factors_of_the_rate(front):
    """Each step multiplies a weight by 1 − (its factor) · (the rate of the cycle) · (its curvature), whoever comes first in the list."""

    class Plain(Quadratic):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02)

    class Weights(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append([layer.weight.item() for layer in pl_module.layers.values()])
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module, seen, rates = Plain(), [[1.0, 2.0, 3.0, 4.0]], [0.02]
    tuning, snapshots = lt.FineTuning({"0%": "*"}, lr_factors={"layers.a": 0.1}), lt.SnapshotEnsemble(2)
    both = [tuning, snapshots] if front else [snapshots, tuning]
    make_trainer([*both, Weights()], max_steps=6).fit(module, torch.utils.data.DataLoader(torch.zeros(6, 1)))
    for rate, before, after in zip(rates, seen[:6], seen[1:], strict=False):
        assert after == pytest.approx([w * (1 - f * rate * (i + 1)) for i, (w, f) in enumerate(zip(before, (0.1, 1, 1, 1), strict=True))])
    assert len({round(rate, 6) for rate in rates[:3]}) == 3


def test_layers_thaw_under_a_fused_optimizer_which_takes_no_parameters_without_momentum_beside_others(tmp_path):
    stages, runs = {"0%": "head", "4 steps": "neck", "7 steps": "*"}, {}
    for implementation in ("fused", "foreach"):
        factory = lt.OptimizerFactory(optim.SGD(lr=0.05, momentum=0.9, weight_decay=0.1, implementation=implementation))
        keep = ModelCheckpoint(tmp_path / implementation, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        runs[implementation] = fit([factory, lt.FineTuning(stages), keep])
    assert runs["fused"].losses == pytest.approx(runs["foreach"].losses, rel=1e-5)
    for step in (4, 5, 7):
        again = fit([copy.deepcopy(factory), lt.FineTuning(stages)], ckpt_path=tmp_path / f"foreach/step={step}.ckpt", seed=9)
        assert again.losses == runs["foreach"].losses[step:]
        resumed = lt.OptimizerFactory(optim.SGD(lr=0.05, momentum=0.9, weight_decay=0.1, implementation="fused"))
        again = fit([resumed, lt.FineTuning(stages)], ckpt_path=tmp_path / f"fused/step={step}.ckpt", seed=9)
        assert again.losses == runs["fused"].losses[step:]
    fit([copy.deepcopy(resumed)], ckpt_path=tmp_path / "fused/step=5.ckpt")  # without the callback


def test_two_holders_of_statistics_give_them_back_when_both_are_done():
    watch = Watch()
    run = fit([lt.FineTuning({"0%": "head", "6 steps": "*"}), lt.BatchNormFreeze(3), watch])
    assert watch.modes == [False] * 15
    assert run.module.body[1].training
    watch = Watch()
    fit([lt.FineTuning({"0%": "head", "6 steps": "*"}), lt.BatchNormFreeze(9), watch])
    assert watch.modes == [False] * 6 + [True] * 3 + [False] * 6


def test_ema_averages_what_thaws_and_the_factory_builds_over_all():
    ema = lt.EMA(0.5)
    factory = lt.OptimizerFactory(optim.AdamW(lr=1e-2, layer_decay=0.9, layers=["body", "neck", "tied", "head"]))
    run = fit([ema, factory, lt.FineTuning({"0%": "head", "8 steps": "*"})])
    raw, averaged = ema.raw_state_dict(), weights(run.module)
    assert not torch.equal(raw["neck.weight"], averaged["neck.weight"])
    assert not torch.equal(raw["head.weight"], averaged["head.weight"])
