"""Training with BatchAugmentation: which batches change, when, and where the images are."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from contracts.harness import SCRATCH, Loader, fit, make_trainer
from lightning_tricks import errors, transforms
from lightning_tricks._core.loaders import move_batch, training_pass
from lightning_tricks.data import _batches
from lightning_tricks.data._augmenting import transformed
from lightning_tricks.data._batches import BatchTrick
from lightning_tricks.functional import augment

FLIP = transforms.Flip(probability=1)
IMAGES = torch.rand(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16)


class Sees(pl.LightningModule):
    """Notes what comes to each kind of step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.seen: dict[str, list[Any]] = {"train": [], "sanity": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.net(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["sanity" if self.trainer.sanity_checking else "val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return batch_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


class Batches:
    """A loader that gives the batches it holds."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def train(callbacks, data=None, module=None, **options) -> Sees:
    module = module or Sees()
    make_trainer(callbacks, **{"max_epochs": 1, **options}).fit(module, data or loader())
    return module


def test_training_alone_sees_changed_images_and_the_data_stay():
    module, before = Sees(), IMAGES.clone()
    trainer = make_trainer([lt.BatchAugmentation(FLIP)], max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, loader())
    for kind, batches in module.seen.items():
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        repeats = len(x) // 16
        assert repeats == (2 if kind == "val" else 1)
        assert torch.equal(x, (IMAGES.flip(-1) if kind == "train" else IMAGES).repeat(repeats, 1, 1, 1))
        assert torch.equal(y, LABELS.repeat(repeats))
    assert torch.equal(IMAGES, before)


class Doubles(Sees):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [2 * batch[0], batch[1]]


class Adds(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]


def test_hooks_of_modules_and_data_modules_come_before():
    seen = []
    look = lt.BatchAugmentation([lambda x: seen.append(x) or x, FLIP])
    module = train([look], module=Doubles())
    assert torch.equal(torch.cat(seen), 2 * IMAGES)
    assert torch.equal(module.seen["train"][0][0], 2 * IMAGES[:8].flip(-1))
    module = Sees()
    make_trainer([lt.BatchAugmentation(FLIP)], max_epochs=1).fit(module, datamodule=Adds())
    assert torch.equal(module.seen["train"][0][0], IMAGES[:8].flip(-1) + 1)


@pytest.mark.parametrize(
    ("batch", "item", "get"),
    [
        (IMAGES, None, lambda batch: batch),
        ((IMAGES, LABELS), 0, lambda batch: batch[0]),
        ([LABELS, IMAGES], 1, lambda batch: batch[1]),
        ({"image": IMAGES, "label": LABELS}, None, lambda batch: batch["image"]),
        ({"label": LABELS, "image": IMAGES}, "image", lambda batch: batch["image"]),
        ([[IMAGES, LABELS], [LABELS]], None, lambda batch: batch[0][0]),
    ],
)
def test_images_are_found_in_batches_of_any_form(batch, item, get):
    module = train([lt.BatchAugmentation(FLIP, item=item)], data=Batches(batch))
    (seen,) = module.seen["train"]
    assert type(seen) is type(batch)
    assert torch.equal(get(seen), IMAGES.flip(-1))
    assert torch.equal(get(batch), IMAGES)


@pytest.mark.parametrize(
    ("batch", "item", "words"),
    [
        (
            (LABELS, IMAGES),
            None,
            "`item=None` is a tensor of torch.int64 in a tuple of 2, of shape (16,). Give their index or key by `item`.",
        ),
        ((IMAGES, LABELS), 2, "`item=2` is a NoneType in a tuple of 2."),
        ({"x": IMAGES[0]}, "x", "`item='x'` is a tensor of torch.float32 in a dict with keys 'x', of shape (3, 4, 6)."),
        ({"x": IMAGES}, "image", "`item='image'` is a NoneType in a dict with keys 'x'."),
        (["text"], None, "`item=None` is a NoneType in a list of 1."),
    ],
)
def test_what_is_no_batch_of_images_is_named(batch, item, words):
    with pytest.raises(errors.ArgumentError) as raised:
        train([lt.BatchAugmentation(FLIP, item=item)], data=Batches(batch))
    assert words in str(raised.value)
    assert "BatchAugmentation(transforms=(Flip(probability=1),)" in str(raised.value)


def test_colours_of_standardized_images_are_refused():
    with pytest.raises(errors.ArgumentError, match=r"numbers from -0\.5 to 0\.5\. Standardize images afterwards"):
        train([lt.BatchAugmentation(transforms.ColorJitter(hue=0.1))], data=Batches(IMAGES - IMAGES.min() - 0.5))
    assert len(train([lt.BatchAugmentation(transforms.ColorJitter(hue=0.1))]).seen["train"]) == 2


# Draws


def offsets(module: Sees) -> list[Tensor]:
    return [batch[0].detach() for batch in module.seen["train"]]


def test_each_batch_epoch_and_rank_draws_anew_and_each_run_the_same(monkeypatch):
    crop, data = lt.BatchAugmentation(transforms.Crop(3)), Batches([IMAGES, LABELS], [IMAGES, LABELS])
    options = {"max_epochs": 2, "accumulate_grad_batches": 2}
    first, again = (offsets(train([crop], data=data, **options)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    monkeypatch.setattr(_batches, "data_rank", lambda trainer: 1)
    everything = [*first, *offsets(train([crop], data=data, **options))]
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    everything += offsets(train([crop], data=data, **options))
    assert len(everything) == 12
    assert not any(torch.equal(a, b) for i, a in enumerate(everything) for b in everything[:i])


def test_callables_of_others_draw_from_the_key():
    noisy = lt.BatchAugmentation(lambda x: x + torch.randn_like(x))
    first, again = (offsets(train([noisy])) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0] - IMAGES[:8], first[1] - IMAGES[8:])
    states = []
    for callbacks in ([], [noisy], [lt.BatchAugmentation(transforms.Noise(0.1))]):
        torch.manual_seed(0)
        train(callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_a_callable_may_turn_bytes_into_numbers():
    several = [FLIP, lambda x: x / 255, lambda x: (x - 0.5) / 0.25]  # as torchvision's ToDtype and Normalize
    module = train([lt.BatchAugmentation(several)], data=Batches((255 * IMAGES).byte()))
    torch.testing.assert_close(module.seen["train"][0], ((255 * IMAGES).byte() / 255 - 0.5).flip(-1) / 0.25)


@pytest.mark.full
def test_transforms_of_torchvision_are_taken_as_they_are():
    from torchvision.transforms import v2

    module = train([lt.BatchAugmentation([v2.RandomHorizontalFlip(1.0), v2.RandomErasing(1.0)])])
    flipped = module.seen["train"][0][0]
    assert (flipped == IMAGES[:8].flip(-1)).float().mean() > 0.6
    assert (flipped == 0).any()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, called by Lightning
def test_yaml_names_transforms_of_ours_and_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    from lightning.pytorch.cli import LightningCLI

    listed = [
        {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 0.3}},
        {"class_path": "lightning_tricks.transforms.ResizedCrop", "init_args": {"scale": [0.2, 1], "size": [3, 4]}},
    ]
    callback = {"class_path": "lightning_tricks.BatchAugmentation", "init_args": {"transforms": listed}}
    config, made = {"trainer": {"callbacks": [callback], "logger": False, "accelerator": "cpu"}}, []
    for _ in range(2):
        cli = LightningCLI(Sees, args=config, run=False, save_config_callback=None, seed_everything_default=False)
        made += [repr(each) for each in cli.trainer.callbacks if isinstance(each, lt.BatchAugmentation)]
        (tmp_path / "config.yaml").write_text(cli.parser.dump(cli.config))
        config = ["--config", str(tmp_path / "config.yaml")]
    assert made == ["BatchAugmentation(transforms=(RandomHorizontalFlip(p=0.3), ResizedCrop(scale=(0.2, 1.0), size=(3, 4))))"] * 2


# With others


class Times(BatchTrick):
    turn = 1

    @property
    def is_neutral(self) -> bool:
        return False

    def change(self, trainer, batch, key):
        return [batch[0] * 10, batch[1]]


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_the_callbacks_does_not_matter(order):
    module = train([lt.BatchAugmentation(lambda x: x + 1), Times(None)][::order])
    assert torch.equal(module.seen["train"][0][0], 10 * (IMAGES[:8] + 1))


class Standardized(Sees):
    def forward(self, x):
        return x

    def training_step(self, batch, batch_idx):
        self(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("order", [1, -1])
def test_inputs_are_standardized_after_augmentation_by_statistics_of_what_training_sees(order):
    standardize = lt.InputStandardization()
    module = train([lt.BatchAugmentation(lambda x: x + 100), standardize][::order], module=Standardized())
    torch.testing.assert_close(module.input_standardization.mean, (IMAGES + 100).mean(dim=(0, 2, 3)))


def test_batches_of_a_pass_over_the_training_data_draw_differently_and_leave_training_alone():
    class Passes(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_start(self, trainer, pl_module):
            with training_pass(trainer, None) as batches:
                self.seen = [move_batch(trainer, pl_module, batch)[0] for batch in batches]

    passes, data = Passes(), DataLoader(TensorDataset(IMAGES[:1].repeat(8, 1, 1, 1), LABELS[:8]), batch_size=4)
    crop = lt.BatchAugmentation(transforms.Crop(3))
    with_pass, without = offsets(train([crop, passes], data=data)), offsets(train([crop], data=data))
    assert all(map(torch.equal, with_pass, without))
    assert len(passes.seen) == 2
    assert not torch.equal(*passes.seen)


def test_several_change_different_items_and_never_the_same():
    data = Batches({"left": IMAGES, "right": IMAGES})
    left, right = (lt.BatchAugmentation(FLIP, item=side, name=side) for side in ("left", "right"))
    (batch,) = train([left, right], data=data).seen["train"]
    assert torch.equal(batch["left"], batch["right"])
    assert torch.equal(batch["left"], IMAGES.flip(-1))
    for item in ("left", None):
        with pytest.raises(errors.TrickConflictError, match=r"both change the images of a batch\. Keep one with the transforms of both"):
            train([left, lt.BatchAugmentation(FLIP, item=item)], data=data)


class TakesIterator(Sees):
    def training_step(self, dataloader_iter):
        next(dataloader_iter)
        return self.net(torch.ones(1, 1)).sum()


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_step_that_moves_batches_itself_is_refused():
    with pytest.raises(errors.TrickError, match="`training_step` of TakesIterator takes `dataloader_iter` and moves them itself"):
        train([lt.BatchAugmentation(FLIP)], module=TakesIterator())
    assert len(train([lt.BatchAugmentation([])], module=TakesIterator()).seen["train"]) == 0


def test_nothing_is_left_after_an_exception_or_a_fit():
    class Fails(Sees):
        def on_train_batch_end(self, *_):
            raise RuntimeError

    for module in (Sees(), Fails()):
        trainer = make_trainer([lt.BatchAugmentation(FLIP)], max_epochs=1)
        try:
            trainer.fit(module, loader())
        except RuntimeError:
            assert isinstance(module, Fails)
        assert "batch_to_device" not in vars(trainer.strategy)


def test_the_share_of_changed_images_is_logged():
    shares = []

    class Reads(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            shares.append(float(trainer.callback_metrics["batch_augmentation/changed"]))

    half = lt.BatchAugmentation(lambda x: torch.cat([x[:4], 1 - x[4:]]))
    train([half, Reads()], logger=CSVLogger(SCRATCH), log_every_n_steps=1)
    assert shares == [0.5]


def test_fits_learn_from_what_augment_gives():
    """The images that the callback makes are those of the function from the same key."""
    keys = []

    class Notes(lt.BatchAugmentation):
        def change(self, trainer, batch, key):
            keys.append(key)
            return super().change(trainer, batch, key)

    several = (transforms.Crop(2), transforms.Rotation(10))
    module = train([Notes(several)])
    for batch, key, plain in zip(module.seen["train"], keys, IMAGES.split(8), strict=True):
        assert torch.equal(batch[0], transformed(plain, several, torch.tensor(key)))
    assert not torch.equal(augment(IMAGES, several), IMAGES)
    assert len(fit([lt.BatchAugmentation(several)], max_epochs=1).losses) == len(Loader())
