"""MixUp, CutMix and LabelSmoothing around the training steps of all kinds of modules."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lightning_tricks as lt
from contracts.harness import Loader, make_trainer
from lightning_tricks import errors
from lightning_tricks.data._batches import BatchTrick
from lightning_tricks.data._mixed_tensors import MixedTensor, seen
from lightning_tricks.functional import smooth_labels


class Probe(pl.LightningModule):
    """Shows what a training step gets, and computes any loss of it."""

    def __init__(self, step=None, batches=None):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.step = step or (lambda module, x, y: F.cross_entropy(module.net(x), y))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3, average="micro")
        self.batches, self.got, self.returned, self.validated = batches, [], [], []

    def training_step(self, batch):
        self.got.append(batch)
        return self.step(self, batch[0], batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.returned.append(outputs["loss"] if outputs else None)

    def validation_step(self, batch):
        self.validated.append(batch)
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def train_dataloader(self):
        return Loader() if self.batches is None else self.batches

    def val_dataloader(self):
        return Loader(2, seed=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)  # so that losses can be computed again


class Batches:
    """Hands out what it is given."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def train(*callbacks, step=None, batches=None, probe=Probe, **options) -> Probe:
    module = probe(step, Batches(batches) if isinstance(batches, list) else batches)
    torch.manual_seed(0)
    module.net[1].reset_parameters()
    make_trainer(callbacks, max_epochs=1, **options).fit(module)
    return module


def test_the_loss_is_that_of_soft_labels_and_the_images_are_mixed_by_the_same_shares():
    for trick in (lt.MixUp(1.0), lt.MixUp(1.0, per="sample")):
        module = train(trick)
        for (x, y), loss, (plain, labels) in zip(module.got, module.returned, Loader(), strict=True):
            shares = y.share.view(-1) if isinstance(y.share, Tensor) else torch.full((4,), y.share)
            pairs = torch.stack([labels.new_tensor([a, b]) for a, b in zip(*y.branches, strict=True)])
            for row, share, (first, second) in zip(x, shares, pairs, strict=True):
                sums = [share * a + (1 - share) * b for a in plain[labels == first] for b in plain[labels == second]]
                assert min((row - each).abs().max() for each in sums) < 1e-5
            soft = shares.unsqueeze(1) * F.one_hot(y.branches[0], 3) + (1 - shares).unsqueeze(1) * F.one_hot(y.branches[1], 3)
            torch.testing.assert_close(loss, F.cross_entropy(module.net(x), soft).detach())
            assert type(loss) is Tensor
            assert not torch.equal(x, plain)


def test_cut_images_have_labels_by_the_area_that_is_left():
    for per in ("batch", "sample"):
        module = train(lt.CutMix(1.0, per=per))
        for (x, y), (plain, _) in zip(module.got, Loader(), strict=True):
            kept = (x == plain).float().mean(dim=(1, 2, 3))
            shares = y.share if isinstance(y.share, Tensor) else torch.full((4,), y.share)
            own = torch.where(kept >= 0.5, kept, 1 - kept)
            same = kept == 1  # a permutation may leave a sample where it is
            torch.testing.assert_close(shares[~same], own[~same])


def test_smoothing_is_that_of_torch_also_of_mixed_labels():
    module = train(lt.LabelSmoothing(0.2))
    for (x, y), loss in zip(module.got, module.returned, strict=True):
        assert torch.equal(loss, F.cross_entropy(module.net(x), seen(y), label_smoothing=0.2))
    mixed = lt.MixUp(1.0), lt.LabelSmoothing(0.2)
    runs = [train(*callbacks) for callbacks in (mixed, mixed[::-1])]
    assert runs[0].returned == runs[1].returned
    for (x, y), loss in zip(runs[0].got, runs[0].returned, strict=True):
        soft = y.share * smooth_labels(y.branches[0], 3, 0.2) + (1 - y.share) * smooth_labels(y.branches[1], 3, 0.2)
        torch.testing.assert_close(loss, F.cross_entropy(runs[0].net(x), soft))


def test_metrics_see_hard_labels_and_validation_is_as_ever():
    seen_by = []

    def step(module, x, y):
        scores = module.net(x)
        module.accuracy(scores, y)
        module.accuracy.update(scores, y)
        seen_by.append((scores.argmax(1) == y).float().mean())
        module.log("accuracy", module.accuracy, on_step=True, on_epoch=False)
        module.log("by_hand", seen_by[-1])
        loss = F.cross_entropy(scores, y)
        module.log("loss", loss)
        return {"loss": loss, "labels": y, "score": seen_by[-1]}

    class Outputs(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert {type(value) for value in outputs.values()} == {Tensor}
            assert torch.equal(outputs["labels"], seen(batch[1]))
            assert trainer.callback_metrics["by_hand"] == (pl_module.net(batch[0]).argmax(1) == outputs["labels"]).float().mean()
            torch.testing.assert_close(trainer.callback_metrics["loss"], outputs["loss"])
            assert trainer.callback_metrics["accuracy"] == trainer.callback_metrics["by_hand"]
            assert type(pl_module.accuracy.tp) is Tensor

    module = train(lt.MixUp(1.0), lt.LabelSmoothing(), Outputs(), step=step)
    assert len(module.validated) == 2
    assert {type(value) for batch in module.validated for value in batch} == {Tensor}
    for batch, plain in zip(module.validated, Loader(2, seed=1), strict=True):
        assert torch.equal(batch[0], plain[0])
    assert not module.accuracy._forward_pre_hooks
    assert "training_step" not in vars(module)


def other_names(batch):
    return {"picture": batch[0], "digit": batch[1], "odd": batch[1] % 2, "weight": torch.ones(4)}


class Named(Probe):
    def training_step(self, batch):
        self.got.append(batch)
        scores = self.net(batch["picture"])
        return F.cross_entropy(scores, batch["digit"]) + F.binary_cross_entropy_with_logits(scores[:, 0], batch["odd"].float())


def test_inputs_and_several_targets_are_found_by_name():
    batches = [other_names(batch) for batch in Loader()]
    module = train(lt.MixUp(1.0, item="picture", target=["digit", "odd"]), batches=batches, probe=Named)
    for got, given, loss in zip(module.got, batches, module.returned, strict=True):
        assert torch.equal(got["weight"], given["weight"])
        share, scores = got["digit"].share, module.net(got["picture"])
        first, second = got["digit"].branches
        expected = sum(
            part * (F.cross_entropy(scores, each) + F.binary_cross_entropy_with_logits(scores[:, 0], (each % 2).float()))
            for part, each in ((share, first), (1 - share, second))
        )
        torch.testing.assert_close(loss, expected.detach())
        assert type(given["digit"]) is Tensor  # the loader's own batch is as it was
        assert torch.equal(given["picture"], next(x for x, y in Loader() if torch.equal(y, given["digit"])))


def test_only_the_labels_that_are_named_are_smoothed():
    batches = [other_names(batch) for batch in Loader()]
    mixing = lt.MixUp(1.0, item="picture", target=["digit", "odd"])
    for tricks in ((lt.LabelSmoothing(0.2, target="digit"),), (lt.LabelSmoothing(0.2, target="digit"), mixing)):
        module = train(*tricks, batches=batches, probe=Named)
        for got, loss in zip(module.got, module.returned, strict=True):
            scores, share = module.net(got["picture"]), got["digit"].share
            expected = sum(
                part
                * (
                    F.cross_entropy(scores, each, label_smoothing=0.2)
                    + F.binary_cross_entropy_with_logits(scores[:, 0], (each % 2).float())
                )
                for part, each in zip((share, 1 - share), got["digit"].branches, strict=False)
            )
            torch.testing.assert_close(loss, expected.detach())


def test_maps_are_cut_as_their_images_are():
    maps = [(x, (x.squeeze(1) > 0).long(), x * 2) for x, _ in Loader()]

    def step(module, x, y):
        return F.cross_entropy(torch.cat([x, -x], 1) * module.net[1].weight.mean(), y)

    for per in ("batch", "sample"):
        module = train(lt.CutMix(1.0, target=[1, 2], per=per), step=step, batches=maps)
        for (x, labels, numbers), (plain, *_) in zip(module.got, maps, strict=True):
            assert not torch.equal(x, plain)
            assert torch.equal(labels, (x.squeeze(1) > 0).long())
            assert torch.equal(numbers, x * 2)
            assert type(labels) is Tensor
    with pytest.raises(errors.TrickError, match=r"images are of \(8, 8\) and targets of \(4, 4\) pixels"):
        train(lt.CutMix(1.0), step=step, batches=[(x, y[:, ::2, ::2]) for x, y, _ in maps])


class Regressor(Probe):
    def forward(self, x):
        return self.net(x)[:, 0]

    def training_step(self, batch):
        self.got.append(batch)
        return F.mse_loss(self(batch[0]), batch[1])


def test_standardized_targets_are_mixed_in_any_order_of_the_list():
    numbers = [(x, 100 + 5 * y.float()) for x, y in Loader()]
    center, scale = (value(torch.cat([y for _, y in numbers])) for value in (torch.mean, lambda y: y.std(correction=0)))
    runs = []
    for order in (1, -1):
        tricks = [lt.TargetStandardization(), lt.MixUp(1.0)][::order]
        module = train(*tricks, batches=numbers, probe=Regressor, limit_val_batches=0)
        runs.append(module.returned)
        for (x, y), loss in zip(module.got, module.returned, strict=True):
            (soft,) = y.branches
            assert soft.abs().max() < 5
            assert (soft * scale + center).min() > 99
            torch.testing.assert_close(loss, F.mse_loss(module.net(x)[:, 0], soft).detach())
        assert "batch_to_device" not in vars(module.trainer.strategy)
    assert runs[0] == runs[1]


class Manual(Probe):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.got.append(batch)
        loss = self.step(self, *batch)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.returned.append(self.net[1].bias.grad.clone())
        self.optimizers().step()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def test_manual_optimization_goes_backward_from_the_mixed_loss():
    module = train(lt.MixUp(1.0), probe=Manual)
    for (x, y), gradient in zip(module.got, module.returned, strict=True):
        soft = y.share * F.one_hot(y.branches[0], 3) + (1 - y.share) * F.one_hot(y.branches[1], 3)
        expected = torch.autograd.grad(F.cross_entropy(module.net(x), soft), module.net[1].bias)[0]
        torch.testing.assert_close(gradient, expected)


# Nothing is ever a silent no-op


@torch.no_grad()
def _hard(y: Tensor) -> Tensor:
    return y.clone()


ESCAPES = {
    "no gradients": lambda module, x, y: F.cross_entropy(module.net(x), _hard(y)),
    "numbers": lambda module, x, y: F.cross_entropy(module.net(x), y.new_tensor(y.tolist())),
    "in place": lambda module, x, y: F.binary_cross_entropy_with_logits(module.net(x), _encoded(y)),
    "no labels": lambda module, x, y: module.net(x).square().mean(),
}


def _encoded(y: Tensor) -> Tensor:
    rows = torch.zeros(len(y), 3)
    rows[torch.arange(len(y)), y] = 1
    return rows


@pytest.mark.parametrize("probe", [Probe, Manual])
@pytest.mark.parametrize("step", ESCAPES)
@pytest.mark.parametrize("trick", [lt.MixUp(1.0), lt.LabelSmoothing(0.1)], ids=repr)
def test_losses_that_do_not_depend_on_the_targets_are_refused(trick, step: str, probe):
    with pytest.raises(errors.TrickError) as raised:
        train(copy.deepcopy(trick), step=ESCAPES[step], probe=probe)
    assert f"{trick!r} changes targets, and the loss that `training_step`" in str(raised.value)
    assert "does not depend on `batch[1]`" in str(raised.value)


def test_labels_that_are_smoothed_nowhere_are_refused():
    def step(module, x, y):
        return -(torch.eye(3)[y] * module.net(x).log_softmax(1)).sum(1).mean()

    for callbacks in ((lt.LabelSmoothing(),), (lt.MixUp(1.0), lt.LabelSmoothing())):
        with pytest.raises(errors.TrickError, match=r"LabelSmoothing\(\) smooths labels in .*Probe hands those at `batch\[1\]` to none"):
            train(*callbacks, step=step)
    assert len(train(lt.MixUp(1.0), step=step).returned) == 5


WRONG = [
    (lt.MixUp(1.0), lambda x, y: (x.mul(9).byte(), y), "mixes floating-point numbers, and the inputs are of torch.uint8"),
    (lt.MixUp(1.0), lambda x, y: (x, y.tolist()), "`target=1` is a list in a list of 2. Give its index or key by `target`."),
    (lt.MixUp(1.0, target="label"), lambda x, y: (x, y), "`target='label'` is a NoneType in a list of 2."),
    (lt.MixUp(1.0, item=2), lambda x, y: (x, y), "mixes a tensor of inputs, and `item=2` is a NoneType in a list of 2."),
    (lt.MixUp(1.0), lambda x, y: (x, y[:3]), "there are 4 inputs and 3 targets at 1. Give one for each."),
    (lt.CutMix(), lambda x, y: (x.flatten(1), y), "cuts images, and the inputs are a tensor of shape (4, 64)."),
    (lt.LabelSmoothing(), lambda x, y: (x, F.one_hot(y).float()), "smooths indices of classes, and the targets at 1 are of torch.float32."),
]


@pytest.mark.parametrize(("trick", "change", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_batches_that_cannot_be_mixed_are_refused(trick, change, words: str):
    with pytest.raises(errors.TrickError) as raised:
        train(trick, batches=[list(change(*batch)) for batch in Loader()])
    assert words in str(raised.value)


def test_two_that_smooth_the_same_labels_are_refused():
    with pytest.raises(errors.TrickConflictError, match=r"both smooth the same labels\. Keep one"):
        train(lt.LabelSmoothing(0.1), lt.LabelSmoothing(0.2, name="more"))


# When, and which


def acting(module: Probe) -> list[str]:
    """Name the trick that has mixed each batch."""
    return [each[1].marks.tricks[0].split("(")[0] if isinstance(each[1], MixedTensor) else "" for each in module.got]


def test_of_two_that_mix_one_acts_on_a_batch_with_its_probability_in_any_order():
    def run(*callbacks) -> list[str]:
        return acting(train(*callbacks, batches=Loader(100, 2), limit_val_batches=0))

    both = Counter(run(lt.MixUp(1.0), lt.CutMix()))
    assert both.keys() == {"MixUp", "CutMix"}
    assert abs(both["MixUp"] - 50) < 25  # five deviations
    tricks = lt.MixUp(1.0, probability=0.5), lt.CutMix(probability=0.3)
    runs = [run(*callbacks) for callbacks in (tricks, tricks[::-1])]
    assert runs[0] == runs[1]
    counts = Counter(runs[0])
    assert max(abs(counts["MixUp"] - 50), abs(counts["CutMix"] - 30), abs(counts[""] - 20)) < 25


def test_shares_are_drawn_from_the_beta_distribution():
    for trick in (lt.MixUp(0.3, per="sample"), lt.MixUp(3.0, per="sample")):
        module = train(trick, batches=[(torch.zeros(4000, 1, 8, 8), torch.zeros(4000, dtype=torch.int64))], limit_val_batches=0)
        larger = module.got[0][1].share
        assert larger.min() >= 0.5
        variance = (larger - 0.5).square().mean().item()  # of Beta(α, α), which is symmetric
        assert variance == pytest.approx(1 / (4 * (2 * trick.alpha + 1)), rel=0.1)


def test_mixing_begins_and_ends_when_told():
    late = train(lt.MixUp(1.0, start=2, stop="80%"))
    assert acting(late) == ["", "", "MixUp", "MixUp", ""]
    assert [late.returned[i] == loss for i, loss in enumerate(train().returned)][::2] == [True, False, True]
    assert acting(train(lt.MixUp(1.0, stop="2 epochs"), lt.CutMix(start=4))) in (["MixUp"] * 5, ["MixUp"] * 4 + ["CutMix"])
    with pytest.raises(errors.ArgumentError, match=r"`stop` must come after `start`, got start='80%' and stop=2\."):
        train(lt.MixUp(1.0, start="80%", stop=2))


def test_batches_of_one_sample_are_left_alone():
    assert acting(train(lt.MixUp(1.0), batches=Loader(3, 1))) == ["", "", ""]


class Negative(BatchTrick):
    turn = 0
    is_neutral = False

    def __init__(self) -> None:
        super().__init__(None)

    def change(self, trainer, batch, key):
        return -batch[0].abs(), batch[1]


def test_images_are_mixed_after_they_are_augmented_in_any_order_of_the_list():
    runs = [train(*callbacks) for callbacks in ((lt.CutMix(), Negative()), (Negative(), lt.CutMix()))]
    for first, second in zip(*(run.got for run in runs), strict=True):
        assert torch.equal(first[0], second[0])
        assert (first[0] <= 0).all()
        assert isinstance(first[1], MixedTensor)


def test_what_is_drawn_leaves_the_random_state_alone_and_differs_by_seed(monkeypatch):
    shares, states = [], []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        module = train(lt.MixUp(1.0))
        shares.append([y.share for _, y in module.got])
        states.append(torch.get_rng_state())
        assert len(set(shares[-1])) == 5
    train()
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)
    assert shares[0] == shares[1] != shares[2]


class Copying(SingleDeviceStrategy):
    """Hands a step copies of its batch, as DeepSpeed does under ZeRO-3."""

    def training_step(self, batch, *arguments):
        return super().training_step([seen(each) if isinstance(each, MixedTensor) else each for each in batch], *arguments)


def test_targets_keep_their_marks_where_a_strategy_copies_the_batch():
    tricks = lt.MixUp(1.0), lt.LabelSmoothing(0.2)
    copied = train(*copy.deepcopy(tricks), strategy=Copying(torch.device("cpu")))
    assert copied.returned == train(*tricks).returned


class Copies(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            pl_module.step = None  # a lambda, which cannot be pickled
            self.pickled = pickle.loads(pickle.dumps(pl_module.training_step))  # noqa: S301
            self.twin = copy.deepcopy(batch)
            trainer.should_stop = True


def test_modules_and_batches_can_be_copied_during_the_fit():
    copies = Copies()
    train(lt.MixUp(1.0), copies)
    assert type(copies.twin[1]) is Tensor


class Closures(Probe):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def test_a_step_that_is_computed_several_times_sees_one_mixture():
    module = train(lt.MixUp(1.0), probe=Closures)
    assert len(module.got) > 5
    assert len({id(batch[1]) for batch in module.got}) == 5


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:Dynamo:UserWarning")
def test_a_compiled_training_step_gives_the_same_losses():
    torch._dynamo.reset()
    tricks = lt.MixUp(1.0), lt.LabelSmoothing(0.1)
    plain, compiled = train(*tricks), Probe()
    compiled.net.load_state_dict(plain.net.state_dict())
    make_trainer(copy.deepcopy(tricks), max_epochs=1, limit_val_batches=0).fit(torch.compile(compiled, backend="aot_eager"))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch.testing.assert_close(torch.stack(compiled.returned), torch.stack(plain.returned))
