"""WeightDecay in whole fits equals torch's own decay, step by step, and acts at real steps only."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_equal, fit, launch, make_trainer
from lightning_tricks import errors, optim, schedules

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
DECAYED = {"body.0.weight", "neck.weight", "head.weight"}  # what the default selects of Net, without what is frozen


def groups_of(module: nn.Module, **options) -> list[dict]:
    """Divide as the default selection does; the options are those of what it selects."""
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return [
        {"params": [trainable[name] for name in trainable if name in DECAYED], **options},
        {"params": [trainable[name] for name in trainable if name not in DECAYED]},
    ]


def trained_by(make, *, base: type = Net, **group):
    """Return a model trained by an optimizer, whose first group gets further options, and by a scheduler that steps each batch."""

    class Model(base):
        def configure_optimizers(self):
            optimizer = make(groups_of(self, **group))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Model


def history_of(model, *callbacks, **options) -> list[dict]:
    recorder = Recorder()
    plugins = options.pop("plugins", lambda: None)()
    fit([*callbacks, recorder], model, max_epochs=2, validate=False, **options, **({"plugins": plugins} if plugins else {}))
    return recorder.history


def assert_histories_equal(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right) > 5
    for one, other in zip(left, right, strict=True):
        assert_equal(one, other)
    assert not torch.equal(left[0]["head.weight"], left[-1]["head.weight"])


def assert_histories_differ(left: list[dict], right: list[dict]) -> None:
    assert not torch.equal(left[-1]["head.weight"], right[-1]["head.weight"])


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


def adam(groups):
    return torch.optim.Adam(groups, lr=0.01, weight_decay=0.0)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)


def scaled():
    """Mixed precision whose scaler grows until steps overflow."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_factor=16.0, growth_interval=1))]


CIRCUMSTANCES = [
    {},
    {"gradient_clip_val": 0.5},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"accumulate_grad_batches": 2},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true"},
    {"precision": "64-true"},
    {"plugins": scaled},
    {"plugins": scaled, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
]


@pytest.mark.parametrize("options", CIRCUMSTANCES, ids=str)
@pytest.mark.parametrize(
    ("mode", "plain", "torchs", "decay"),
    [("decoupled", adam, adamw, 2.0), ("l2", sgd, sgd, 0.1), ("l2", adam, adam, 0.1)],
    ids=["AdamW", "SGD", "Adam"],
)
def test_equals_torchs_own_decay_to_the_bit(mode, plain, torchs, decay, options):
    expected = history_of(trained_by(torchs, weight_decay=decay), **options)
    found = history_of(trained_by(plain), lt.WeightDecay(decay, mode=mode), **options)
    assert_histories_equal(found, expected)
    assert_histories_differ(found, history_of(trained_by(plain), **options))


def test_the_scaler_of_these_tests_skips_steps():
    history = history_of(trained_by(adam), plugins=scaled)
    stood = [torch.equal(one["head.weight"], other["head.weight"]) for one, other in pairwise(history)]
    assert 0 < sum(stood) < len(stood)


@pytest.mark.parametrize("options", [{}, {"plugins": scaled}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_fused_optimizers_agree_to_rounding(mode, options):
    """Their kernels multiply and add in one instruction; under a scaler they also skip and unscale by themselves."""
    fused = (
        (lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True)),
        (lambda groups: (torch.optim.AdamW if mode == "decoupled" else torch.optim.Adam)(groups, lr=0.01, weight_decay=0.0, fused=True)),
    )
    expected = history_of(trained_by(fused[1], weight_decay=0.5), **options)
    found = history_of(trained_by(fused[0]), lt.WeightDecay(0.5, mode=mode), **options)
    for one, other in zip(found, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    stood = [torch.equal(one["head.weight"], other["head.weight"]) for one, other in pairwise(found)]
    assert any(stood) == bool(options)
    assert_histories_differ(found, history_of(trained_by(fused[0]), **options))


def test_l1_adds_the_sign():
    class Penalized(Net):
        def loss(self, batch):
            penalty = sum(parameter.abs().sum() for name, parameter in self.named_parameters() if name in DECAYED)
            return super().loss(batch) + 0.01 * penalty

    expected = history_of(trained_by(sgd, base=Penalized))
    for one, other in zip(history_of(trained_by(sgd), lt.WeightDecay(0.01, mode="l1")), expected, strict=True):
        for name in DECAYED:
            torch.testing.assert_close(one[name], other[name])


def test_optimizers_that_maximize_are_given_penalties_with_the_other_sign():
    def make(groups):
        return torch.optim.SGD(groups, lr=0.01, maximize=True)

    expected = history_of(trained_by(make, weight_decay=0.3))
    assert_histories_equal(history_of(trained_by(make), lt.WeightDecay(0.3, mode="l2")), expected)


# When it acts


class ByHand(Net):
    """Steps by itself, with a closure or without one, on Lightning's wrapper or on the optimizer inside."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.automatic_optimization, self.way = False, way

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if self.way == "closure":
            optimizer.step(closure)
        elif self.way == "positional":
            optimizer.optimizer.step(closure)
        else:
            closure()
            (optimizer if self.way == "wrapper" else optimizer.optimizer).step()
        optimizer.param_groups[0]["lr"] *= 0.9


@pytest.mark.parametrize("way", ["closure", "positional", "wrapper", "inside"])
def test_manual_optimization(way):
    def model(make, **group):
        class Model(ByHand):
            def configure_optimizers(self):
                return make(groups_of(self, **group))

        return lambda: Model(way)

    expected = history_of(model(adamw, weight_decay=2.0))
    assert_histories_equal(history_of(model(adam), lt.WeightDecay(2.0)), expected)


def test_a_step_that_a_subclass_hands_to_its_base_is_one_step():
    class Wordy(torch.optim.Adam):
        def step(self, closure=None):
            loss = closure()
            super().step()
            return loss

    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # whose constructor lets the base's `step` call hooks, too
    expected = history_of(trained_by(adamw, weight_decay=2.0))
    found = history_of(trained_by(lambda groups: Wordy(groups, lr=0.01)), lt.WeightDecay(2.0))
    assert_histories_equal(found, expected)


def test_a_step_that_raises_leaves_nothing_behind():
    """Users catch errors in manual optimization, such as those of memory."""

    class Fragile(torch.optim.SGD):
        def step(self, closure=None):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                raise MemoryError
            return super().step(closure)

    def model(decay):
        class Model(ByHand):
            def training_step(self, batch, batch_idx):
                try:
                    super().training_step(batch, batch_idx)
                except MemoryError:
                    self.optimizers().zero_grad()

            def configure_optimizers(self):
                return Fragile(groups_of(self, weight_decay=decay), lr=0.05)

        return lambda: Model("inside")

    expected = history_of(model(0.1))
    found = history_of(model(0.7), lt.WeightDecay(0.1, mode="l2", existing="replace"))
    assert_histories_equal(found, expected)
    assert torch.equal(found[2]["head.weight"], found[3]["head.weight"])


class Sharpness(torch.optim.Optimizer):
    """SAM as published: an optimizer around another, which steps without a closure after the weights have returned."""

    def __init__(self, groups, base_optimizer):
        super().__init__(groups, {"lr": 0.01, "weight_decay": 0.0})
        self.base_optimizer = base_optimizer(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        kept = {p: (p.clone(), 0.05 * p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None}
        for p, (_, ascent) in kept.items():
            p.add_(ascent)
        with torch.enable_grad():
            closure()
        for p, (weight, _) in kept.items():
            p.copy_(weight)
        self.base_optimizer.step()
        return loss


@pytest.mark.parametrize(("mode", "plain", "torchs"), [("decoupled", adam, adamw), ("l2", sgd, sgd)])
def test_an_optimizer_around_another_decays_once_where_the_inner_one_would(mode, plain, torchs):
    expected = history_of(trained_by(lambda groups: Sharpness(groups, torchs), weight_decay=0.5))
    found = history_of(trained_by(lambda groups: Sharpness(groups, plain)), lt.WeightDecay(0.5, mode=mode))
    assert_histories_equal(found, expected)
    assert_histories_differ(found, history_of(trained_by(lambda groups: Sharpness(groups, plain))))


class Twice(torch.optim.SGD):
    """Evaluates its closure twice and steps with the second gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        return super().step(closure)


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_closures_evaluated_twice_decay_once(mode):
    def decoupled(groups):
        class Shrinks(Twice):
            def step(self, closure=None):
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.data.mul_(1 - group["lr"] * group["strength"])
                return super().step(closure)

        return Shrinks([{**groups[0], "strength": 0.5}, {**groups[1], "strength": 0.0}], lr=0.01)

    def plain(groups):
        return Twice(groups, lr=0.01)

    def quadratic(base):
        class Model(base):  # a loss whose gradient does not depend on the weights, since these shrink before or after the first gradient
            def loss(self, batch):
                return sum((parameter * (batch[0].mean() + 0.1)).sum() for parameter in self.parameters() if parameter.requires_grad)

        return Model

    if mode == "decoupled":
        expected = history_of(quadratic(trained_by(decoupled)))
    else:
        expected = history_of(quadratic(trained_by(plain, weight_decay=0.5)))
    found = history_of(quadratic(trained_by(plain)), lt.WeightDecay(0.5, mode=mode))
    assert len(found) == len(expected) == 11
    for one, other in zip(found, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("mode", ["l2", "l1"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_sees_the_penalty_in_gradient_and_loss(mode, search):
    def term(weight):
        return weight.abs().sum() if mode == "l1" else weight.square().sum() / 2

    class Deterministic(Net):
        def __init__(self, penalty: float) -> None:
            super().__init__()
            self.body[3].p, self.penalty = 0.0, penalty

        def loss(self, batch):
            penalty = sum(term(parameter) for name, parameter in self.named_parameters() if name in DECAYED)
            return super().loss(batch) + self.penalty * penalty

        def configure_optimizers(self):
            trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.LBFGS(trainable, lr=0.1, max_iter=4, line_search_fn=search)

    expected = history_of(lambda: Deterministic(0.01), precision="64-true")
    found = history_of(lambda: Deterministic(0.0), lt.WeightDecay(0.01, mode=mode), precision="64-true")
    plain = history_of(lambda: Deterministic(0.0), precision="64-true")
    assert_histories_differ(found, plain)
    for one, other in zip(found[:6], expected[:6], strict=True):  # a line search amplifies rounding from step to step
        for name in DECAYED:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_step_without_gradients_decays_nothing():
    class Idle(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="returned `None`"):
        history = history_of(trained_by(adam, base=Idle), lt.WeightDecay(2.0))
    moved = [not torch.equal(one["head.weight"], other["head.weight"]) for one, other in pairwise(history)]
    assert moved == [True, False, False, False, False] * 2


class Adversaries(pl.LightningModule):
    """Two optimizers, one of which steps twice in each batch, the other in every other batch; both have one layer."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.automatic_optimization, self.decay = False, decay
        self.often, self.seldom, self.shared = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def training_step(self, batch, batch_idx):
        often, seldom = self.optimizers()
        for optimizer in (often, often, seldom):
            if optimizer is seldom and batch_idx % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward((self.seldom(self.shared(self.often(batch[0]))) ** 2).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.AdamW([*layer.parameters(), *self.shared.parameters()], lr=0.1, weight_decay=self.decay)
            for layer in (self.often, self.seldom)
        ]


def test_with_several_optimizers_each_parameter_decays_at_the_steps_of_its_own():
    histories = []
    for decay, callbacks in ((0.5, []), (0.0, [lt.WeightDecay(0.5)])):
        torch.manual_seed(0)
        module, recorder = Adversaries(decay), Recorder()
        make_trainer([*callbacks, recorder], max_epochs=2).fit(module, DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4))
        histories.append(recorder.history)
    for one, other in zip(*histories, strict=True):
        assert_equal(one, other)
    assert [decays.steps for decays in callbacks[0]._decays] == [20, 6]


# What decays


def test_names_and_kinds_choose_rules_and_the_last_glob_wins():
    rules = {"*": 0.1, "body": 0.0, "neck": schedules.Linear(0.2, final=0.4, stop=10), "head.*": 0.3}

    class Model(Net):
        def configure_optimizers(self):
            named = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
            values = {"neck.weight": 0.2, "head.weight": 0.3, "head.bias": 0.3, "neck.bias": 0.2, "tied.bias": 0.1}
            groups = [{"params": [parameter], "weight_decay": values.get(name, 0.0)} for name, parameter in named.items()]
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
            self.neck_groups = [group for group, name in zip(groups, named, strict=True) if name.startswith("neck")]
            return optimizer

        def on_train_batch_start(self, batch, batch_idx):
            taken = self.trainer.global_step
            for group in self.trainer.optimizers[0].param_groups:
                if any(group["params"][0] is each["params"][0] for each in self.neck_groups):
                    group["weight_decay"] = 0.2 + 0.2 * min(taken / 10, 1.0)

    class Plain(Net):
        def configure_optimizers(self):
            groups = [{"params": [parameter]} for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    found = history_of(Plain, lt.WeightDecay(rules, mode="l2", skip="norm"))
    for one, other in zip(found, history_of(Model), strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name])


def test_a_tied_parameter_decays_once_and_is_found_under_each_of_its_names():
    by_first = history_of(trained_by(sgd), lt.WeightDecay({"neck.weight": 0.1}, mode="l2"))
    by_second = history_of(trained_by(sgd), lt.WeightDecay({"tied.weight": 0.1}, mode="l2"))
    assert_histories_equal(by_first, by_second)
    expected = history_of(trained_by(sgd), lt.WeightDecay(0.1, mode="l2", where="neck"))
    assert_histories_equal(by_first, expected)


def test_layers_made_late_decay():
    class Late(pl.LightningModule):
        def __init__(self, decay):
            super().__init__()
            self.decay = decay

        def configure_model(self):
            self.net = nn.Linear(4, 4, bias=False)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=self.decay)

    assert_histories_equal(*(fit_on_numbers(Late(decay), *callbacks) for decay, callbacks in ((0.5, []), (0.0, [lt.WeightDecay(0.5)]))))
    with pytest.raises(errors.NothingMatchedError, match="`where='heat'` matched none"):
        fit_on_numbers(Late(0.0), lt.WeightDecay(0.1, where="heat"))


def fit_on_numbers(module, *callbacks):
    torch.manual_seed(0)
    recorder, data = Recorder(), DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4)
    make_trainer([*callbacks, recorder]).fit(module, data)
    return [{name.replace("net.", "head."): value for name, value in state.items()} for state in recorder.history]


@pytest.mark.parametrize("order", [1, -1])
def test_parameters_added_in_training_decay(order):
    class Staged(pl.LightningModule):
        def __init__(self, decay):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head, self.decay = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), decay

        def training_step(self, batch, batch_idx):
            return self.head(self.body(batch[0])).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters(), lr=0.1, weight_decay=self.decay)

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            pl_module.body.requires_grad_(requires_grad=False)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                pl_module.body.requires_grad_(requires_grad=True)
                optimizer.add_param_group({"params": list(pl_module.body.parameters()), "lr": 0.1, "weight_decay": pl_module.decay})

    expected = fit_on_numbers(Staged(0.5), Unfreeze())
    found = fit_on_numbers(Staged(0.0), *[lt.WeightDecay(0.5), Unfreeze()][::order])
    assert_histories_equal(found, expected)
    assert torch.equal(found[0]["body.weight"], found[5]["body.weight"])
    assert not torch.equal(found[5]["body.weight"], found[-1]["body.weight"])


def test_a_models_own_exemptions_hold():
    class Exempting(Net):
        def no_weight_decay(self):
            return {"neck.weight", "head"}

    module = Exempting()
    trick = lt.WeightDecay(0.1, skip=())
    fit([trick], lambda: module, max_epochs=1)
    assert {decayed.name for decayed in trick._selected.values()}.isdisjoint({"neck.weight", "head.weight", "head.bias"})
    with pytest.raises(errors.NothingMatchedError, match="exempt by `no_weight_decay`"):
        fit([lt.WeightDecay(0.1, where="head")], Exempting)


def test_names_inside_compiled_layers():
    module = Net()
    module.head = torch.compile(module.head)
    assert "head._orig_mod.weight" in dict(module.named_parameters())
    selected = lt.WeightDecay(0.1, where="head.weight")._rules.select(module)
    assert [decayed.name for decayed in selected.values()] == ["head.weight"]


# With a decay of the optimizer's own


def test_an_optimizers_own_decay_is_refused():
    for model in (trained_by(adam, weight_decay=0.01), trained_by(torch.optim.AdamW)):
        with pytest.raises(
            errors.UnsupportedOptimizerError, match=r"decays 'body.0.weight' itself by `weight_decay=0.01`.*existing='replace'"
        ):
            fit([lt.WeightDecay(0.1)], model)


def test_an_optimizers_own_decay_of_other_parameters_is_left_alone():
    expected = history_of(trained_by(sgd, weight_decay=0.1))
    found = history_of(trained_by(sgd, weight_decay=0.1), lt.WeightDecay(0.1, mode="l2", where="tied.bias", skip=()))
    for name in ("body.0.weight", "head.bias"):
        assert torch.equal(found[1][name], expected[1][name])
    assert not torch.equal(found[2]["tied.bias"], expected[2]["tied.bias"])


@pytest.mark.parametrize("options", [{}, {"plugins": scaled}], ids=str)
def test_an_optimizers_own_decay_is_replaced_during_each_step_and_seen_as_it_was_otherwise(options):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([group["weight_decay"] for group in trainer.optimizers[0].param_groups])

    expected = history_of(trained_by(sgd, weight_decay=0.1), **options)
    found = history_of(trained_by(sgd, weight_decay=0.7), lt.WeightDecay(0.1, mode="l2", existing="replace"), Watch(), **options)
    assert_histories_equal(found, expected)
    assert seen == [[0.7, 0]] * 10


def test_replacing_takes_the_decay_of_whole_groups_away():
    class Model(Net):
        def configure_optimizers(self):
            (selected, *others), rest = (group["params"] for group in groups_of(self))
            decays = ({"params": [selected], "weight_decay": 0.1}, {"params": others}, {"params": rest, "weight_decay": 0.7})
            return torch.optim.SGD(decays, lr=0.05)

    class Grouped(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(groups_of(self), lr=0.05, weight_decay=0.7)

    found = history_of(Grouped, lt.WeightDecay(0.1, mode="l2", where="body.0", existing="replace"))
    assert_histories_equal(found, history_of(Model))


def test_a_decay_of_zero_leaves_an_optimizers_own_alone():
    expected = history_of(trained_by(sgd, weight_decay=0.7))
    assert_histories_equal(history_of(trained_by(sgd, weight_decay=0.7), lt.WeightDecay(0.0)), expected)


def test_a_checkpoint_keeps_the_optimizers_own_decay(tmp_path):
    own = trained_by(lambda groups: torch.optim.SGD(groups, lr=0.05, weight_decay=0.7))
    fit([lt.WeightDecay(0.1, existing="replace"), ModelCheckpoint(tmp_path, filename="last")], own, max_epochs=1)
    groups = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.7]


def test_two_decays_of_one_parameter_are_refused_and_elastic_nets_are_not():
    for modes in (("l2", "l2"), ("l2", "decoupled"), ("l1", "l1")):
        first, second = (lt.WeightDecay(0.1, mode=mode, name=name) for mode, name in zip(modes, ("a", "b"), strict=True))
        with pytest.raises(errors.TrickConflictError, match=r"both decay 'body.0.weight'. Keep one, or let their `where`"):
            fit([first, second])
    run = fit([lt.WeightDecay(0.1, mode="l1", name="a"), lt.WeightDecay(0.1, mode="l2", name="b")], max_epochs=1)
    assert len(run.losses) == 5
    run = fit([lt.WeightDecay(0.1, where="head", name="a"), lt.WeightDecay(0.1, exclude="head", name="b")], max_epochs=1)
    assert len(run.losses) == 5


# What it needs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.optim.LBFGS, "LBFGS evaluates the loss again from where its gradient was taken. Use mode='l2'"),
        (lambda p: torch.optim.SGD([{"params": p, "lr": None}]), "SGD has `lr=None`. Use mode='l2'"),
    ],
)
def test_decoupled_decay_needs_a_learning_rate(make, words):
    class Model(Net):
        def configure_optimizers(self):
            return make([parameter for parameter in self.parameters() if parameter.requires_grad])

    with pytest.raises(errors.UnsupportedOptimizerError, match=words):
        fit([lt.WeightDecay(0.1)], Model)


@pytest.mark.full
@pytest.mark.parametrize("recipe", [optim.SGD(0.1), optim.AdamW(0.1, weight_decay=0)], ids=repr)
def test_optimizers_that_train_another_point_than_they_move_are_not_decayed_apart_from_gradients(recipe):
    pytest.importorskip("schedulefree")
    factory = lt.OptimizerFactory(optim.ScheduleFree(recipe))
    with pytest.raises(errors.UnsupportedOptimizerError, match="moves another point than the one that parameters hold"):
        fit([factory, lt.WeightDecay(0.1)])


@pytest.mark.full
def test_l2_before_a_schedule_free_optimizer_is_its_own_decay():
    pytest.importorskip("schedulefree")
    runs = []
    for own, ours in ((0.1, 0.0), (0.0, 0.1)):
        recipe = optim.ScheduleFree(optim.SGD(0.1, weight_decay=own))
        runs.append(fit([lt.OptimizerFactory(recipe), lt.WeightDecay(ours, mode="l2")]).trained)
    assert_equal(*runs)
    assert not torch.equal(runs[0]["head.weight"], fit([lt.OptimizerFactory(optim.ScheduleFree(optim.SGD(0.1)))]).trained["head.weight"])


def test_a_module_without_optimizers_is_refused():
    class Untrained(Net):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="configure_optimizers"),
        pytest.raises(errors.TrickError, match="no optimizer of Untrained has any parameter that it selects"),
    ):
        make_trainer([lt.WeightDecay(0.1)]).fit(Untrained(), Loader())


def test_deepspeed_is_refused():
    trainer = make_trainer([trick := lt.WeightDecay(0.1)])
    trainer.strategy.__class__ = type("DeepSpeedStrategy", (type(trainer.strategy),), {})
    with pytest.raises(errors.UnsupportedStrategyError, match="cannot work under DeepSpeedStrategy: the engine keeps its own copies"):
        trick.setup(trainer, Net(), "fit")


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"use_orig_params": False}, {}, r"FSDPStrategy\(use_orig_params=False\) melts them into flat ones"),
        ({}, {"log_penalty": True}, "cannot work under FSDPStrategy: `log_penalty=True` sums over parameters"),
    ],
)
def test_fsdp1_in_which_it_cannot_see_parameters_is_refused(options, arguments, words):
    trainer = make_trainer([trick := lt.WeightDecay(0.1, **arguments)])
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {"kwargs": {"use_orig_params": True, **options}})
    with pytest.raises(errors.UnsupportedStrategyError, match=words):
        trick.setup(trainer, Net(), "fit")


def test_a_schedule_of_ones_own_that_gets_below_zero_is_refused_there():
    class Falling(schedules.Schedule):
        def after_warmup(self, step, spans):
            return 0.1 - 0.1 * step

    with pytest.raises(errors.ArgumentError, match=r"`weight_decay\['\*'\]` must lie in \[0, ∞\), got -0.1"):
        fit([lt.WeightDecay(Falling())])


@pytest.mark.parametrize(
    ("decay", "words"),
    [
        (schedules.Linear(0.1, final=-0.1, stop=2), r"`weight_decay` must lie in \[0, ∞\), and Linear\(.*\) reaches -0.1"),
        ({"*": schedules.Cosine(-1.0)}, r"`weight_decay\['\*'\]` must lie in \[0, ∞\), and Cosine\(.*\) reaches -1"),
        (schedules.ReduceOnPlateau("val_loss"), "which follows a metric. Use it for learning rates alone"),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_a_decay_are_refused(decay, words):
    with pytest.raises(errors.ArgumentError, match=words):
        lt.WeightDecay(decay)


# Progress and logs


def test_schedules_follow_real_steps_and_resume(tmp_path):
    def trick():
        return lt.WeightDecay(schedules.Cosine(2.0, stop="100%"))

    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([trick(), checkpoints], trained_by(adam), plugins=scaled())
    steps = torch.load(tmp_path / "step=15.ckpt", weights_only=True)["lightning_tricks"]["WeightDecay"]["steps"]
    assert 0 < steps[0] < 15
    resumed = fit([trick()], trained_by(adam), ckpt_path=tmp_path / "step=7.ckpt", seed=9, plugins=scaled())
    assert_equal(resumed.trained, whole.trained)
    constant = fit([lt.WeightDecay(2.0)], trained_by(adam), plugins=scaled())
    assert not torch.equal(constant.trained["head.weight"], whole.trained["head.weight"])


@pytest.mark.parametrize("mode", ["decoupled", "l2", "l1"])
def test_logs_the_penalty_and_its_share_of_the_gradient(mode, tmp_path):
    logger = CSVLogger(tmp_path)
    noted = []

    class Note(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weights = {name: parameter for name, parameter in pl_module.named_parameters() if name in DECAYED}
            flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
            slope = 0.1 * (flat.sign() if mode == "l1" else flat)
            penalty = 0.1 * flat.abs().sum() if mode == "l1" else 0.05 * flat.square().sum()
            gradient = torch.cat([weight.grad.flatten() for weight in weights.values()])
            noted.append((penalty.item(), (slope.norm() / gradient.norm()).item()))

    run = fit([lt.WeightDecay(0.1, mode=mode, log_penalty=True), Note()], logger=logger, log_every_n_steps=2, max_epochs=2)
    rows = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    columns = [rows[0].index(f"weight_decay/{key}") for key in ("penalty", "ratio")]
    logged = [tuple(float(row[column]) for column in columns) for row in rows[1:] if row[columns[0]]]
    assert len(run.losses) == 10
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(noted[1::2]))


def test_logs_the_decay_of_each_step_and_of_a_mapping_the_largest(tmp_path):
    rules = {"*": 0.01, "head": schedules.Linear(0.0, final=0.1, stop=10)}
    fit([lt.WeightDecay(rules)], logger=CSVLogger(tmp_path), log_every_n_steps=5, max_epochs=2)
    rows = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    logged = [float(row[rows[0].index("weight_decay/decay")]) for row in rows[1:] if row[rows[0].index("weight_decay/decay")]]
    assert logged == pytest.approx([0.04, 0.09])


def test_nothing_is_measured_unless_it_is_logged(monkeypatch):
    from lightning_tricks.optimization import _decaying

    monkeypatch.setattr(_decaying, "measure", lambda *_: pytest.fail("measured"))
    fit([lt.WeightDecay(0.1)], max_epochs=1)
    fit([lt.WeightDecay(0.1, log_penalty=True)], max_epochs=1)  # without a logger


def test_hooks_are_gone_after_the_fit_and_after_an_exception():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop")  # noqa: EM101

    run = fit([lt.WeightDecay(0.1, existing="replace")], max_epochs=1)
    optimizer = run.trainer.optimizers[0] if run.trainer.optimizers else None
    trainer, module = make_trainer([lt.WeightDecay(0.1, existing="replace"), Fails()]), Net()
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, Loader())
    for each in filter(None, [optimizer, *trainer.optimizers]):
        assert not each._optimizer_step_pre_hooks
        assert len(each._optimizer_step_post_hooks) == 0


def test_sharded_tensors_decay_as_whole_ones_do(tmp_path):
    launch(Path(__file__).with_name("weight_decay_worker.py"), tmp_path, processes=2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
