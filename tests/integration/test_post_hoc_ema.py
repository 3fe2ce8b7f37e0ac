"""Averages of any length from stored ones."""

from __future__ import annotations

import shutil

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors, functional
from reference.power_ema import power_ema

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
PARAMETERS = ("head.weight", "neck.bias", "body.0.weight")


class Drifts(Callback):
    """Moves the weights after each step, so that averages of different lengths lie far apart."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        generator = torch.Generator().manual_seed(trainer.global_step)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 + 0.05 * torch.randn(parameter.shape, generator=generator))


def saving(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run of 200 steps, with a snapshot after every tenth."""
    recorder, folder = Recorder(), tmp_path_factory.mktemp("snapshots")
    run = fit([lt.PostHocEMA(dirpath=folder), Drifts(), recorder], max_epochs=40)
    run.history = recorder.history
    return run


@pytest.mark.parametrize(
    ("arguments", "every"), [({}, 1), ({"every": 3}, 3), ({"every": "1 epoch"}, 5), ({"every": 7, "dtype": "float64"}, 7)], ids=str
)
def test_the_running_averages_are_those_of_the_equation(arguments, every, tmp_path):
    recorder = Recorder()
    run = fit([lt.PostHocEMA((0.05, 0.1, 0.2), dirpath=tmp_path, **arguments), recorder])
    track = run.trick._averages.tracks[0]
    for table, width in zip((track.averages, *track.others), (0.05, 0.1, 0.2), strict=True):
        for name in PARAMETERS:
            wanted = power_ema([state[name] for state in recorder.history], width, every=every)
            torch.testing.assert_close(table[name].double(), wanted, rtol=1e-5, atol=1e-6)
    assert list(run.trick.snapshots) == list(range(every, 15 // every * every + 1, every))


def distance(left, right):
    """Return the distance of two states over the parameters."""
    return sum((left[name].double() - right[name].double()).square().sum() for name in PARAMETERS).sqrt().item()


@pytest.mark.parametrize(
    ("width", "bound"), [(0.03, 1e-2), (0.05, 3e-6), (0.06, 3e-4), (0.075, 3e-4), (0.1, 3e-6), (0.15, 3e-4), (0.2, 5e-3), (0.25, 3e-2)]
)
def test_a_synthesized_average_is_the_one_that_is_computed_online(long_run, width, bound):
    """The error is measured against the distance between the average and the weights that training reached."""
    online = {name: power_ema([state[name] for state in long_run.history], width) for name in PARAMETERS}
    made = long_run.trick.synthesize(width)
    assert len(long_run.trick.snapshots) == 20
    assert distance(made, online) < bound * distance(long_run.history[-1], online)


def test_a_width_that_was_tracked_gives_that_average_back(long_run):
    track = long_run.trick._averages.tracks[0]
    for table, width in zip((track.averages, *track.others), (0.05, 0.1), strict=True):
        made = long_run.trick.synthesize(width)
        for name in PARAMETERS:
            torch.testing.assert_close(made[name], table[name], rtol=1e-6, atol=1e-7)


def test_an_average_can_end_at_any_snapshot(long_run):
    online = {name: power_ema([state[name] for state in long_run.history[:121]], 0.075) for name in PARAMETERS}
    made = long_run.trick.synthesize(0.075, step=120)
    assert distance(made, online) < 5e-3 * distance(long_run.history[120], online)
    with pytest.raises(errors.ArgumentError, match=r"`step` must be that of a snapshot, one of 10, 20, .*, 200, got 123\."):
        long_run.trick.synthesize(0.075, step=123)


def test_the_state_is_complete_and_files_alone_give_it_too(long_run):
    made = long_run.trick.synthesize(0.08)
    alone = functional.synthesize_ema(long_run.trick.snapshots[200], 0.08)
    assert_equal(made, alone)
    assert list(made) == list(Net().state_dict())
    model = Net()
    model.load_state_dict(made)
    assert model.tied.weight is model.neck.weight
    assert torch.equal(made["tied.weight"], made["neck.weight"])
    for name in ("frozen.weight", "body.1.running_mean", "body.1.num_batches_tracked"):
        assert torch.equal(made[name], long_run.history[-1][name])
    assert made["body.1.num_batches_tracked"].dtype == torch.int64


def test_training_is_not_disturbed_and_nothing_is_evaluated_by_default(tmp_path):
    run, plain = fit([lt.PostHocEMA(dirpath=tmp_path)]), fit([Recorder()])
    assert_equal(weights(run.module), weights(plain.module))
    assert run.losses == plain.losses


def test_evaluating_uses_the_first_width(tmp_path):
    recorder = Recorder()
    run = fit([lt.PostHocEMA((0.2, 0.05), dirpath=tmp_path, evaluate=True), recorder])
    wanted = power_ema([state["head.weight"] for state in recorder.history], 0.2)
    torch.testing.assert_close(run.module.head.weight.detach(), wanted.float(), rtol=1e-5, atol=1e-6)
    made = run.trick.synthesize(0.2)
    torch.testing.assert_close(made["head.weight"], wanted.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(made["frozen.weight"], recorder.history[-1]["frozen.weight"])


def test_the_last_step_is_reached_whenever_the_fit_ends(tmp_path):
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    run = fit([lt.PostHocEMA(snapshot_every=4, dirpath=tmp_path / "a"), stop], max_epochs=9)
    assert list(run.trick.snapshots) == [4, 8, 10]
    run = fit([lt.PostHocEMA(snapshot_every="1 epoch", dirpath=tmp_path / "b")], max_steps=12)
    assert list(run.trick.snapshots) == [5, 10, 12]
    assert run.trick.snapshots[12] == tmp_path / "b" / "step=12"


@pytest.mark.parametrize("step", [3, 8, 15])
def test_a_resumed_run_makes_the_same_averages_and_overwrites_nothing(tmp_path, step):
    trick = {"snapshot_every": 2, "dirpath": tmp_path / "snapshots"}
    whole = fit([lt.PostHocEMA(**trick), saving(tmp_path)])
    wanted = {at: whole.trick.synthesize(0.07, step=at) for at in (8, 15)}
    files = {path: path.read_bytes() for path in tmp_path.glob("snapshots/*/*.pt")}
    resumed = fit([lt.PostHocEMA(**trick), Drifts()] if step == 3 else [lt.PostHocEMA(**trick)], ckpt_path=tmp_path / f"step={step}.ckpt")
    assert list(resumed.trick.snapshots) == list(whole.trick.snapshots) == [2, 4, 6, 8, 10, 12, 14, 15]
    assert len(files) == 8
    assert all(path.read_bytes() == content for path, content in files.items())
    assert_equal(whole.trick.synthesize(0.07), wanted[15])
    assert [path.name.endswith("-v1") for path in resumed.trick.snapshots.values()] == [
        at > step or at == 15
        for at in resumed.trick.snapshots  # the one at the end is taken after the checkpoint of that step
    ]
    if step == 3:  # and goes another way, of which the files know
        assert_equal(functional.synthesize_ema(resumed.trick.snapshots[15], 0.07), resumed.trick.synthesize(0.07))
        assert not torch.equal(resumed.trick.synthesize(0.07)["head.weight"], wanted[15]["head.weight"])
    else:
        for at, state in wanted.items():
            assert_equal(resumed.trick.synthesize(0.07, step=at), state)


def test_a_run_that_was_stopped_by_a_limit_and_goes_on_equals_one_that_was_not(tmp_path):
    trick = {"snapshot_every": 4}
    whole = fit([lt.PostHocEMA(**trick, dirpath=tmp_path / "whole")])
    fit([lt.PostHocEMA(**trick, dirpath=tmp_path / "parts"), saving(tmp_path / "checkpoints")], max_steps=10)
    assert (tmp_path / "parts" / "step=10").is_dir()
    resumed = fit([lt.PostHocEMA(**trick, dirpath=tmp_path / "parts")], ckpt_path=tmp_path / "checkpoints" / "step=10.ckpt")
    assert list(resumed.trick.snapshots) == list(whole.trick.snapshots) == [4, 8, 12, 15]
    assert_equal(resumed.trick.synthesize(0.07), whole.trick.synthesize(0.07))


def test_a_second_fit_goes_on_and_another_model_starts_anew(tmp_path):
    trick = lt.PostHocEMA(snapshot_every=4, dirpath=tmp_path)
    run = fit([trick], max_epochs=2)
    assert list(trick.snapshots) == [4, 8, 10]
    trainer = make_trainer([trick], max_epochs=1)
    trainer.fit(run.module, Loader())
    assert list(trick.snapshots) == [4, 8, 12, 15]
    make_trainer([trick], max_epochs=1).fit(Net(), Loader())
    assert {step: path.name for step, path in trick.snapshots.items()} == {4: "step=4-v1", 5: "step=5"}


def test_snapshots_that_were_moved_are_found_under_dirpath(tmp_path):
    whole = fit([lt.PostHocEMA(snapshot_every=5, dirpath=tmp_path / "here"), saving(tmp_path)])
    wanted = whole.trick.synthesize(0.07)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert_equal(functional.synthesize_ema(tmp_path / "there" / "step=15", 0.07), wanted)
    resumed = fit([lt.PostHocEMA(snapshot_every=5, dirpath=tmp_path / "there")], ckpt_path=tmp_path / "step=11.ckpt")
    assert_equal(resumed.trick.synthesize(0.07), wanted)


def test_by_default_snapshots_lie_under_the_root_of_the_trainer(tmp_path):
    run = fit([lt.PostHocEMA(snapshot_every=5, name="late")], default_root_dir=tmp_path)
    assert run.trick.snapshots[15] == tmp_path / "post_hoc_ema_late" / "step=15"
    assert not list(tmp_path.rglob("*.new"))


def test_a_remote_root_needs_a_folder_for_snapshots(tmp_path):
    trainer = make_trainer([lt.PostHocEMA(snapshot_every=5)], max_epochs=1)
    trainer._default_root_dir = "s3://bucket"
    with pytest.raises(errors.ArgumentError, match=r"`default_root_dir` is 's3://bucket'\. Pass `dirpath`"):
        trainer.fit(Net(), Loader())


def test_frozen_parameters_are_stored_once_and_thawed_ones_from_then_on(tmp_path):
    class Thaws(Net):
        def __init__(self):
            super().__init__()
            self.head.requires_grad_(requires_grad=False)

        def on_train_batch_start(self, batch, batch_idx):
            self.head.requires_grad_(requires_grad=self.trainer.global_step >= 7)

        def configure_optimizers(self):
            return torch.optim.SGD([*self.neck.parameters(), *self.head.parameters()], lr=0.05)

    recorder = Recorder()
    run = fit([lt.PostHocEMA(snapshot_every=1, dirpath=tmp_path), recorder], Thaws)
    entries = [torch.load(path / "part_0_of_1.pt")["entries"] for path in run.trick.snapshots.values()]
    assert [len(entry["frozen.weight"]["values"]) for entry in entries] == [1, *[0] * 14]
    assert [len(entry["head.weight"]["values"]) for entry in entries] == [1, *[0] * 6, *[2] * 8]
    for step in (3, 15):
        made = run.trick.synthesize(0.08, step=step)
        assert_equal(made, functional.synthesize_ema(run.trick.snapshots[step], 0.08))
        for name in ("head.weight", "neck.weight"):
            wanted = power_ema([state[name] for state in recorder.history[: step + 1]], 0.08)
            torch.testing.assert_close(made[name], wanted.float(), rtol=1e-3, atol=5e-4)
        assert torch.equal(made["frozen.weight"], recorder.history[-1]["frozen.weight"])


def test_several_optimizers_and_odd_views(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.turned = nn.Parameter(self.head.weight.data.T)  # a view of the same memory

        def training_step(self, batch, batch_idx):
            for i, optimizer in enumerate(self.optimizers()):
                if i == 0 or batch_idx % 2:
                    optimizer.zero_grad()
                    self.manual_backward(super().training_step(batch, batch_idx))
                    optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.head, self.neck)]

    recorder = Recorder()
    run = fit([lt.PostHocEMA(snapshot_every=1, dirpath=tmp_path), recorder], Two, max_epochs=6)
    made = run.trick.synthesize(0.08)
    history = [state["head.weight"] for state in recorder.history]
    torch.testing.assert_close(made["head.weight"], power_ema(history, 0.08).float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(made["turned"], made["head.weight"].T)
    alone = functional.synthesize_ema(run.trick.snapshots[30], 0.08)
    assert torch.equal(alone["turned"], made["turned"])
    # The second optimizer steps after the second and fourth batch of five.
    history = [recorder.history[0], *(recorder.history[5 * epoch + batch] for epoch in range(6) for batch in (2, 4))]
    wanted = power_ema([state["neck.weight"] for state in history], 0.08)
    torch.testing.assert_close(made["neck.weight"], wanted.float(), rtol=1e-2, atol=1e-3)
    assert torch.equal(made["tied.weight"], made["neck.weight"])


def test_low_precision_is_rounded_once_at_the_end(tmp_path):
    recorder = Recorder()
    run = fit([lt.PostHocEMA(snapshot_every=1, dirpath=tmp_path), recorder], precision="bf16-true")
    made = run.trick.synthesize(0.08)
    wanted = power_ema([state["head.weight"] for state in recorder.history], 0.08)
    assert made["head.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(made["head.weight"].double(), wanted, rtol=2**-8, atol=1e-4)


def test_before_a_fit_there_is_nothing_to_make_an_average_of(tmp_path):
    trick = lt.PostHocEMA(dirpath=tmp_path)
    with pytest.raises(errors.TrickError, match="has seen no model yet"):
        trick.synthesize(0.1)
    with pytest.raises(errors.TrickError, match="has taken no snapshot yet"):
        fit([trick], max_steps=0).trick.synthesize(0.1)
    assert trick.snapshots == {}


def remove(folder):
    shutil.rmtree(folder)


def empty(folder):
    (folder / "part_0_of_1.pt").unlink()


def truncate(folder):
    file = folder / "part_0_of_1.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replace(folder):
    torch.save({"weights": torch.zeros(2)}, folder / "part_0_of_1.pt")


def mislead(folder):
    record = torch.load(folder / "part_0_of_1.pt")
    torch.save({**record, "sigma_rel": [0.1, 0.2]}, folder / "part_0_of_1.pt")


def shorten(folder):
    record = torch.load(folder / "part_0_of_1.pt")
    record["entries"]["head.weight"]["region"] = ((1, 8), (8, 1), 0)
    record["entries"]["head.weight"]["values"] = [torch.zeros(1, 8)] * 2
    torch.save(record, folder / "part_0_of_1.pt")


def lose(folder):
    record = torch.load(folder / "part_0_of_1.pt")
    record["entries"]["head.weight"]["values"].pop()
    torch.save(record, folder / "part_0_of_1.pt")


def divide(folder):
    (folder / "part_0_of_1.pt").rename(folder / "part_0_of_2.pt")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (remove, "step=5' does not exist"),
        (empty, "step=5' holds none"),
        (truncate, "step=5/part_0_of_1.pt' is damaged"),
        (replace, "step=5/part_0_of_1.pt' is damaged .no record of version 1"),
        (mislead, "must agree in `sigma_rel`: .*step=5' has .0.1, 0.2."),
        (shorten, "step=5/part_0_of_1.pt' is damaged .8 of 24 elements of 'head.weight' are there"),
        (lose, "step=5/part_0_of_1.pt' is damaged .IndexError"),
        (divide, "step=5/part_1_of_2.pt' is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_missing_and_damaged_files_are_named(harm, words, tmp_path):
    run = fit([lt.PostHocEMA(snapshot_every=5, dirpath=tmp_path)])
    harm(tmp_path / "step=5")
    for make in (run.trick.synthesize, lambda width: functional.synthesize_ema(str(tmp_path / "step=15"), width)):
        with pytest.raises(errors.CheckpointError, match=words):
            make(0.07)


@pytest.mark.parametrize("width", [0, 0.3, "0.1"])
def test_wrong_widths_are_refused(long_run, width):
    for make in (long_run.trick.synthesize, lambda width: functional.synthesize_ema(long_run.trick.snapshots[200], width)):
        with pytest.raises(errors.ArgumentError, match="`sigma_rel` must lie between 0 and"):
            make(width)


def test_other_widths_cannot_go_on_from_a_checkpoint(tmp_path):
    fit([lt.PostHocEMA(dirpath=tmp_path), saving(tmp_path)], max_epochs=1)
    with pytest.raises(errors.CheckpointError, match=r"`sigma_rel` must be that of the checkpoint, \[0.05, 0.1\].*got \[0.05, 0.2\]"):
        fit([lt.PostHocEMA((0.05, 0.2), dirpath=tmp_path)], ckpt_path=tmp_path / "step=5.ckpt")


@pytest.mark.parametrize("change", [{"snapshots": None}, {"snapshots": {"5": "x"}}, {"closing": 99}, {"snapshots": {5: 5}}], ids=str)
def test_a_checkpoint_that_names_no_snapshots_is_refused(tmp_path, change):
    fit([lt.PostHocEMA(dirpath=tmp_path), saving(tmp_path)], max_epochs=1)
    checkpoint = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    checkpoint["lightning_tricks"]["PostHocEMA"].update(change)
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(errors.CheckpointError, match="must name snapshots by their steps"):
        fit([lt.PostHocEMA(dirpath=tmp_path)], ckpt_path=tmp_path / "damaged.ckpt")


def test_joining_a_run_counts_from_there(tmp_path):
    first = fit([Recorder(), saving(tmp_path)], max_epochs=1)
    recorder = Recorder()
    run = fit([lt.PostHocEMA(snapshot_every=1, dirpath=tmp_path), recorder], ckpt_path=tmp_path / "step=5.ckpt")
    assert first.trainer.global_step == 5
    assert list(run.trick.snapshots) == list(range(1, 11))
    wanted = power_ema([state["head.weight"] for state in recorder.history], 0.1)
    torch.testing.assert_close(run.trick.synthesize(0.1)["head.weight"], wanted.float(), rtol=1e-5, atol=1e-6)
