"""FineTuning in whole runs."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, launch, make_trainer, weights
from integration.watch import Watch
from lightning_tricks import errors

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore::UserWarning:torch.optim.lr_scheduler")

STAGES = {"0%": "head", "4 steps": "neck", "2 epochs": "*"}


class Decaying(Net):
    """Its optimizer would move what is frozen, if it could."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def training_step(self, batch, batch_idx):
        self.train()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("statistics", ["freeze", "train"])
def test_layers_train_from_their_moments_on_and_stand_still_before(statistics):
    watch = Watch()
    run = fit([lt.FineTuning(STAGES, statistics=statistics), watch], Decaying)
    assert watch.moves("head") == [True] * 14
    assert watch.moves("neck") == [False] * 3 + [True] * 11
    assert watch.moves("body.0") == [False] * 9 + [True] * 5
    assert watch.moves("body.1.weight") == [False] * 9 + [True] * 5
    assert watch.moves("body.1.running") == ([False] * 9 + [True] * 5 if statistics == "freeze" else [True] * 14)
    assert watch.modes == ([False] * 10 + [True] * 5 if statistics == "freeze" else [True] * 15)
    assert watch.moves("frozen") == [False] * 14
    asleep = [{name.partition(".")[0] for name in buffers} for buffers in watch.buffers]
    assert asleep[3] == {"head"}
    assert asleep[4] == {"head", "neck"}
    assert asleep[10] == {"head", "neck", "body", "tied"}
    names = [name for name, parameter in run.module.named_parameters() if not parameter.requires_grad]
    assert names == ["frozen.weight", "frozen.bias"]
    assert "train" not in vars(run.module.body[1])


def test_buffers_of_what_trains_on_are_the_same_to_the_bit_as_layers_thaw():
    """Up to the thaw, stages to come make no difference; and thawing itself touches no buffer."""
    seen = []
    for stages in ({"0%": "head"}, {"0%": "head", "4 steps": "neck"}):
        watch = Watch()
        fit([lt.FineTuning(stages), watch])
        seen.append(watch)
    for step in range(4):
        assert_equal(seen[0].buffers[step], seen[1].buffers[step])
        assert_equal(seen[0].states[step], seen[1].states[step])
    head = [name for name in seen[0].buffers[4] if name.startswith("head")]
    assert_equal(*({name: watch.buffers[4][name] for name in head} for watch in seen))


@pytest.mark.parametrize("step", [2, 4, 6, 10, 12])
def test_a_run_resumes_in_every_stage(step, tmp_path):
    make = lambda: lt.FineTuning(STAGES, lr_factors={"neck": 0.5, "body": 0.1})  # noqa: E731
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([make(), keep], Decaying)
    resumed = fit([make()], Decaying, ckpt_path=tmp_path / f"step={step}.ckpt", seed=99)
    assert resumed.losses == whole.losses[step:]
    assert_equal(weights(resumed.module), weights(whole.module))


def test_a_checkpoint_may_hold_objects_of_any_class(tmp_path):
    class Configured(Net):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"folder": Path("data"), "lr": 0.05})

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole = fit([lt.FineTuning(STAGES), keep], Configured)
    # Lightning before 2.6 has no such argument, and loads anything.
    options = {"weights_only": False} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
    module, trainer = Configured(), make_trainer([lt.FineTuning(STAGES)])
    trainer.fit(module, Loader(), ckpt_path=tmp_path / "step=15.ckpt", **options)
    assert_equal(weights(module), weights(whole.module))


def test_statistics_without_parameters_of_their_own_freeze_with_the_layer_before_them():
    class Bare(Net):
        def __init__(self):
            super().__init__()
            del self.tied, self.frozen, self.neck, self.head
            spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(144, 8))
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), spectral, nn.Linear(8, 3))

        def forward(self, x):
            return self.body(x)

    watch = Watch()
    fit([lt.FineTuning({"0%": "body.4", "4 steps": "body.0", "8 steps": "*"}), watch], Bare)
    assert watch.moves("body.1.running") == [False] * 3 + [True] * 11
    assert watch.moves("body.3.parametrizations.weight.0") == [False] * 7 + [True] * 7


def test_optimizers_that_adapt_a_value_for_each_group_are_refused():
    class Adapting(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["distance"] = len(group["params"]) + group["lr"]
            return loss

    class Tuned(Net):
        def configure_optimizers(self):
            kind = torch.optim.LBFGS if self.lbfgs else Adapting
            return kind([p for p in self.parameters() if p.requires_grad], lr=0.01)

    for lbfgs, words in ((False, "Adapting sets `distance` of each group at each step"), (True, "LBFGS has one for all")):
        Tuned.lbfgs = lbfgs
        module = Tuned()
        trainer = make_trainer([lt.FineTuning({"0%": "*"}, lr_factors={"head": 0.5})], max_epochs=1)
        with pytest.raises(errors.UnsupportedOptimizerError, match=words):
            trainer.fit(module, Loader())


def test_parameters_that_no_optimizer_holds_cannot_thaw():
    class HeadOnly(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.01)

    with pytest.raises(errors.TrickError, match=r"thaws 'neck.weight' and 2 more that no optimizer of HeadOnly holds"):
        fit([lt.FineTuning({"0%": "head", "2 steps": ["neck", "tied"]})], HeadOnly)


@pytest.mark.parametrize("automatic", [True, False])
def test_two_optimizers_and_manual_optimization_count_steps_of_each(automatic):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer) if automatic else None
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer) if automatic else None
            self.losses.append(loss.item())

        def configure_optimizers(self):
            one, other = [*self.head.parameters()], [*self.body.parameters(), *self.neck.parameters(), self.tied.bias]
            return [torch.optim.SGD(part, lr=0.01, momentum=0.9) for part in (one, other)]

    watch = Watch()
    fit([lt.FineTuning({"0%": ["head", "body"], "4 steps": "neck"}, lr_factors={"neck": 0.5}), watch], Two, max_epochs=2)
    assert watch.moves("head") == watch.moves("body.0") == [True] * 9
    assert watch.moves("neck.bias") == [False] * 3 + [True] * 6


def test_an_exception_leaves_everything_trainable_and_groups_whole():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            assert not self.neck.weight.requires_grad
            if self.trainer.global_step == 3:
                raise RuntimeError("within a step")  # noqa: EM101, TRY003
            return super().training_step(batch, batch_idx)

    module = Fails()
    trainer = make_trainer([lt.FineTuning({"0%": "head"}, lr_factors={"head": 0.5, "*.bias": 0.1})])
    with pytest.raises(RuntimeError, match="within a step"):
        trainer.fit(module, Loader())
    assert [name for name, parameter in module.named_parameters() if not parameter.requires_grad] == ["frozen.weight", "frozen.bias"]
    assert "train" not in vars(module.body[1])
    optimizer = trainer.strategy._optimizers[0] if trainer.strategy._optimizers else None
    assert optimizer is None or len(optimizer.param_groups) == 1


# A new head


class Features(Net):
    """Without the harness's stray layers, so that the head is clear."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        del self.tied, self.frozen
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.neck(self.body(x))))


def test_a_new_head_is_trained_recorded_and_made_again(tmp_path):
    make = lambda: lt.FineTuning({"0%": 0, "5 steps": 1, "10 steps": "100%"}, num_classes=3)  # noqa: E731
    watch, keep = Watch(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    pretrained = lambda: Features(10)  # noqa: E731
    run = fit([make(), watch, keep], pretrained)
    assert run.module.head.out_features == 3
    assert watch.moves("neck") == [False] * 4 + [True] * 10
    assert watch.moves("body.0") == [False] * 9 + [True] * 5
    loaded = lt.load_from_checkpoint(Features, tmp_path / "step=15.ckpt", classes=10)
    assert loaded.head.out_features == 3
    assert_equal(weights(loaded), weights(run.module))
    resumed = fit([make()], pretrained, ckpt_path=tmp_path / "step=7.ckpt", seed=99)
    assert resumed.losses == run.losses[7:]
    assert_equal(weights(resumed.module), weights(run.module))
    before = weights(run.module)
    run.trainer.validate(run.module, Loader(2), verbose=False)
    assert_equal(weights(run.module), before)
    run.trainer.test(pretrained(), Loader(2), ckpt_path=tmp_path / "step=15.ckpt", verbose=False)


def test_a_head_of_the_same_size_is_new_once():
    torch.manual_seed(0)
    module = Features()
    old = module.head
    tuning = lt.FineTuning({"0%": 0}, num_classes=3)
    make_trainer([tuning], max_epochs=1).fit(module, Loader())
    new = module.head
    assert new is not old
    make_trainer([copy.deepcopy(tuning)], max_epochs=1).fit(module, Loader())
    assert module.head is new
    untouched = Features()
    make_trainer([copy.deepcopy(tuning)]).validate(untouched, Loader(2), verbose=False)
    assert not hasattr(untouched.head, "_replaced_head")


@pytest.mark.full
def test_a_timm_model_thaws_from_its_last_layers():
    import timm

    class Pretrained(Net):
        def __init__(self):
            super().__init__()
            del self.tied, self.frozen, self.neck, self.head, self.body
            self.net = timm.create_model("resnet10t", in_chans=1, num_classes=5)

        def forward(self, x):
            return self.net(torch.nn.functional.interpolate(x, scale_factor=4))

    class Frozen(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            tuning = trainer.callbacks[0]
            seen.append(
                {name.split(".")[1] for name in pl_module.state_dict() if name in tuning._all} - {n.split(".")[1] for n in tuning._frozen}
            )

    seen: list[set[str]] = []
    run = fit(
        [lt.FineTuning({"0%": 0, "2 steps": 1, "4 steps": "50%", "5 steps": "*"}, layer_decay=0.7, num_classes=3), Frozen()], Pretrained
    )
    assert [sorted(names) for names in (seen[0], seen[2], seen[4])] == [["fc"], ["fc", "layer4"], ["fc", "layer3", "layer4"]]
    assert {"conv1", "layer1"} <= seen[5]
    assert run.module.net.fc.out_features == 3


# Two processes


def test_thawed_layers_train_alike_on_all_ranks(tmp_path):
    launch(Path(__file__).with_name("transfer_worker.py"), tmp_path, processes=2)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen
        assert not {name: outcome for name, outcome in seen.items() if outcome != "passed"}
