"""TrackingReport: what loggers hold of a run afterwards, read back from where they keep it."""

from __future__ import annotations

import csv
import enum
import functools
import json
import math
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

import lightning_tricks as lt
from contracts.harness import Loader, Net, ResidualNet, fit, make_trainer
from lightning_tricks import optim, schedules
from lightning_tricks.diagnostics._checkpoint_files import checkpoint_files
from lightning_tricks.diagnostics._settings import plain

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:FitDiagnosis")
WANDB = [pytest.mark.full, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")]
PNG = b"\x89PNG"


class Token:
    """An argument that is no plain value, and keeps something to itself."""

    secret = "hunter2"  # noqa: S105 -- which must not be found

    def __repr__(self):
        return "Token()"


class Dotted(ResidualNet):
    """Logs its validation loss under a name with a dot, too."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val.loss", self.loss(batch))


class Ticket(lt.EMA):
    """A trick of somebody else's with such an argument."""

    def __init__(self, decay=0.9, *, token=None, evaluate="both"):
        super().__init__(decay, evaluate=evaluate)
        self.token = token


class Word(enum.StrEnum):
    """A text that is something else, too."""

    B = "b"


# W&B


def records(path: Path):
    """Read what W&B wrote: a header of seven bytes, and blocks of 32 KiB with pieces of records, as in LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An offline run, with everything that there is to report, and what W&B has recorded of it."""
    import wandb

    root, patch = tmp_path_factory.mktemp("wandb"), pytest.MonkeyPatch()
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": str(root), "WANDB_CACHE_DIR": str(root)}.items():
        patch.setenv(key, value)
    logger = WandbLogger(
        save_dir=root, project="tests", id="run1", prefix="own", settings=wandb.Settings(x_disable_stats=True, disable_git=True)
    )
    callbacks = [
        lt.TrackingReport(goals={"train_loss": "mean", "val.loss": "first"}, artifacts="all"),
        Ticket(token=Token()),
        lt.SnapshotEnsemble(2, evaluate=False),
        lt.FitDiagnosis(patience=1),
        lt.StochasticDepth(schedules.Constant(0.3, warmup="50%"), where="blocks.*"),
        ModelCheckpoint(root / "checkpoints", monitor="val_loss", save_last=True, filename="best"),
    ]
    run = fit(callbacks, Dotted, logger=logger, max_epochs=4, log_every_n_steps=5, num_sanity_val_steps=0)
    logger.experiment.finish()
    patch.undo()
    found, deadline = [], time.monotonic() + 60
    while not any(each.WhichOneof("record_type") == "exit" for each in found) and time.monotonic() < deadline:
        time.sleep(0.1)  # while W&B's own process writes
        found = list(records(next(root.rglob("*.wandb"))))
    return SimpleNamespace(run=run, root=root, records=found)


def of_kind(recorded, kind):
    return [getattr(record, kind) for record in recorded.records if record.WhichOneof("record_type") == kind]


class TestRecorded:
    """Reads one run back."""

    pytestmark = WANDB

    def test_config_has_every_trick_with_its_arguments(self, recorded):
        config = {}
        for record in (*(run.config for run in of_kind(recorded, "run")), *of_kind(recorded, "config")):
            config |= {each.key: json.loads(each.value_json) for each in record.update}
        assert config["lr"] == 0.05  # the module's own
        tricks = config["lightning_tricks"]
        assert tricks.keys() == {"version", "ticket", "snapshot_ensemble", "fit_diagnosis", "stochastic_depth"}
        assert tricks["version"] == lt.__version__
        assert tricks["ticket"] == {"decay": 0.9, "token": "Token()", "evaluate": "both"}
        assert tricks["stochastic_depth"]["rate"] == {"class": "Constant", "level": 0.3, "warmup": "50%"}
        assert not [path for path in recorded.root.rglob("*") if path.is_file() and Token.secret.encode() in path.read_bytes()]

    def test_metrics_are_defined_over_steps_with_the_value_that_counts(self, recorded):
        metrics = {each.name or each.glob_name: each for each in of_kind(recorded, "metric")}

        def summary(name):
            return {each.name for each, wanted in metrics[f"own-{name}"].summary.ListFields() if wanted}

        for name in ("val_loss", "raw/val_loss", "fit_diagnosis/train_loss", "snapshot_ensemble/nll"):
            assert summary(name) == {"min", "last"}
        assert summary("train_loss") == {"mean", "last"}
        assert not [name for name in metrics if "*" in name and name != "*"]  # of several that fit, W&B picks one at random
        own = [each for name, each in metrics.items() if name not in {"*", "trainer/global_step"}]
        assert {each.step_metric for each in own} == {"trainer/global_step"}

    def test_the_table_of_members_is_that_of_the_ensemble(self, recorded):
        table = json.loads(next(recorded.root.rglob("*member_table*.table.json")).read_text())
        assert table["columns"] == ["member", "step", "cycle", "bytes", "files"]
        members = recorded.run.callbacks[2]._members
        assert [row[:3] for row in table["data"]] == [[0, 10, 1], [1, 20, 2]]
        assert [row[4] for row in table["data"]] == [member.files[0] for member in members]
        assert all(row[3] == member.paths[0].stat().st_size for row, member in zip(table["data"], members, strict=True))

    def test_pictures_are_in_the_history_and_in_files(self, recorded):
        shown = {}
        for each in (item for history in of_kind(recorded, "history") for item in history.item):
            key, _, part = "/".join(each.nested_key).rpartition("/")
            shown.setdefault(key, {})[part] = json.loads(each.value_json)
        for key in ("own-stochastic_depth/planned_rate", "own-fit_diagnosis/loss_curves"):
            assert shown[key]["_type"] == "images/separated"
            (name,) = shown[key]["filenames"]
            assert next(recorded.root.rglob(Path(name).name)).read_bytes().startswith(PNG)
        assert shown["own-snapshot_ensemble/member_table"]["_type"] == "table-file"

    def test_artifacts_are_checkpoints_and_members_under_their_aliases(self, recorded):
        artifacts = [each for each in of_kind(recorded, "artifact") if each.type == "model"]  # a table is one, too
        files = [(each.name, *(Path(content.path).name for content in each.manifest.contents)) for each in artifacts]
        aliases = [set(each.aliases) - {"latest"} for each in artifacts]  # which W&B moves on to each that comes
        metadata = [json.loads(each.metadata) for each in artifacts]
        members, saver = recorded.run.callbacks[2]._members, recorded.run.callbacks[-1]
        assert files[:2] == [("snapshot_ensemble-members-run1", *member.files) for member in members]
        assert aliases[:2] == [{"member-0"}, {"member-1"}]
        assert metadata[:2] == [dict(member.facts) for member in members]
        assert files[2:] == [("model-run1", "model.ckpt")] * 2
        assert aliases[2:] == [{"best", "averaged"}, {"averaged"}]
        score = pytest.approx(saver.best_model_score.item())
        assert metadata[2] == {"original_filename": "best.ckpt", "monitor": "val_loss", "score": score, "weights": "averaged"}
        assert metadata[3] == {"original_filename": "last.ckpt", "weights": "averaged"}
        assert "latest" in artifacts[3].aliases

    def test_what_was_found_is_in_the_summary_beside_the_values_that_count(self, recorded):
        found = {}
        for summary in of_kind(recorded, "summary"):
            found |= {"/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in summary.update}
        assert found["own-fit_diagnosis/verdict"] == recorded.run.callbacks[3].diagnosis.kind
        losses = recorded.run.callbacks[3].curves["val_loss"]
        assert found["own-val_loss"] == pytest.approx({"min": min(losses), "last": losses[-1]})
        assert found["own-val.loss"] == pytest.approx({"first": losses[0], "last": losses[-1]})
        assert found["own-ticket/decay"] == pytest.approx(0.9)  # a number in every run, so that they can be compared


class FakeRun:
    """Stands for a run of W&B, and notes what it is given."""

    def __init__(self, name="run1", fails=()):
        self.id, self.fails = name, fails
        self.config, self.summary, self.artifacts, self.calls = Config(), {}, [], []

    def __getattr__(self, method):
        def note(*arguments, **_):
            self.calls.append(method)
            if method in self.fails:
                msg = f"no {method} today"
                raise ConnectionError(msg)

        return note

    def log_artifact(self, artifact, aliases):
        self.artifacts.append((artifact.name, tuple(aliases)))


class Config(dict):
    def update(self, values, *, allow_val_change):
        super().update(values)


class TestWithAFakeRun:
    """What needs no recording of its own."""

    pytestmark = WANDB

    def test_errors_of_the_logger_are_warned_of_once_and_training_goes_on(self):
        fails = ("log", "define_metric", "finish")
        logger = WandbLogger(experiment=FakeRun(fails=fails))
        report = lt.TrackingReport(name="slow")
        with pytest.warns(UserWarning, match=r"TrackingReport\(name='slow'\) goes on without what WandbLogger did not take") as warned:
            run = fit([report, lt.FitDiagnosis(patience=1)], logger=[Quiet(logger)])
        assert len(run.losses) == 15
        texts = [str(each.message).rpartition("take: ")[2] for each in warned if "did not take" in str(each.message)]
        assert texts == ["ConnectionError: no define_metric today"]

    def test_a_goal_that_is_not_taken_leaves_the_others(self):
        logger = WandbLogger(experiment=FakeRun(fails=("define_metric",)))
        with pytest.warns(UserWarning, match="did not take: ConnectionError"):
            fit([lt.TrackingReport(goals={"a": "first", "b": "min"})], logger=logger, max_epochs=1)
        assert logger.experiment.calls.count("define_metric") == 2

    @pytest.mark.parametrize("log_model", [False, True])
    def test_checkpoints_are_sent_once_whoever_sends_them(self, log_model, tmp_path):
        logger = WandbLogger(experiment=FakeRun(), log_model=log_model)
        saver = ModelCheckpoint(tmp_path, monitor="val_loss")
        fit([lt.TrackingReport(artifacts="best"), saver], logger=logger)
        expected = ("latest", "best") if log_model else ("best", "latest", "raw")
        assert [(name, sorted(aliases)) for name, aliases in logger.experiment.artifacts] == [("model-run1", sorted(expected))]

    @pytest.mark.parametrize(("artifacts", "number"), [("none", 0), ("best", 1), ("all", 3)])
    def test_what_was_sent_is_not_sent_again(self, artifacts, number, tmp_path):
        logger = WandbLogger(experiment=FakeRun())
        report, saver = lt.TrackingReport(artifacts=artifacts), ModelCheckpoint(tmp_path)
        run = fit([report, lt.SnapshotEnsemble(2), saver], logger=logger, max_epochs=2)
        assert len(logger.experiment.artifacts) == number
        logged = logger.experiment.calls.count("log")
        report.on_exception(run.trainer, run.module, RuntimeError())  # as of a callback that fails after the fit
        assert logger.experiment.calls.count("log") == logged
        report.on_train_start(run.trainer, run.module)
        report.on_fit_end(run.trainer, run.module)
        assert logger.experiment.calls.count("log") > logged
        assert len(logger.experiment.artifacts) == number
        Path(saver.best_model_path).write_bytes(Path(saver.best_model_path).read_bytes())  # another one of this name
        report.on_train_start(run.trainer, run.module)
        report.on_fit_end(run.trainer, run.module)
        assert len(logger.experiment.artifacts) == number + (artifacts != "none")

    def test_a_resumed_run_says_of_which_other_run_it_is_the_continuation(self, tmp_path):
        first, same, other = (WandbLogger(experiment=FakeRun(name)) for name in ("run1", "run1", "run2"))
        fit([lt.TrackingReport(), ModelCheckpoint(tmp_path, filename="last")], logger=first, max_epochs=1)
        for logger in (same, other):
            fit([lt.TrackingReport()], logger=logger, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
        assert "resumed_from" not in first.experiment.config
        assert "resumed_from" not in same.experiment.config
        assert other.experiment.config["resumed_from"] == ["run1"]
        assert first.experiment.config["lightning_tricks"] == same.experiment.config["lightning_tricks"]


class Quiet(WandbLogger):
    """Hands Lightning's own metrics nowhere, so that only what the report does can fail."""

    def __init__(self, logger):
        super().__init__(experiment=logger.experiment)

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("tracking_report") for key in metrics):
            super().log_metrics(metrics, step)


Quiet.__name__ = "WandbLogger"


# Other loggers


def rows_of(path):
    return list(csv.reader(path.read_text().splitlines()))


@pytest.mark.full
def test_a_folder_gets_hyperparameters_tables_pictures_and_facts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that importing it fails
    schedule = schedules.Cosine()
    tricks = [
        lt.TrackingReport(name="slow"),
        lt.OptimizerFactory(optim.SGD(lr=0.1), schedule=schedule),
        lt.LinearProbe(["body", "neck"]),
        lt.PostHocEMA(snapshot_every="1 epoch", dirpath=tmp_path / "snapshots"),
        lt.GradientFlow(every=5, heat_map="weight_norm"),
        lt.FitDiagnosis(patience=1),
    ]
    loggers = [CSVLogger(tmp_path, name=name) for name in "ab"]
    fit(tricks, logger=loggers)
    for logger in loggers:
        home = Path(logger.log_dir)
        held = yaml.safe_load((home / "hparams.yaml").read_text())
        assert held["lr"] == 0.05
        assert held["lightning_tricks"]["optimizer_factory"]["recipe"]["lr"] == 0.1
        report = home / "tracking_report_slow"
        pictures = {str(path.relative_to(report)) for path in report.rglob("*.png") if path.read_bytes().startswith(PNG)}
        flow = {f"gradient_flow/{name}_heat_map.png" for name in ("grad_norm", "update_ratio")}  # the third is drawn without being asked
        assert pictures == {"optimizer_factory/planned_schedule.png", "fit_diagnosis/loss_curves.png", *flow}
        stages = rows_of(report / "linear_probe" / "stage_table.csv")
        assert [row[0] for row in stages] == ["stage", "body", "neck"]
        assert [float(row[1]) for row in stages[1:]] == list(tricks[2].report.accuracies.values())
        snapshots = rows_of(report / "post_hoc_ema" / "snapshot_table.csv")
        assert [row[0] for row in snapshots] == ["step", "5", "10", "15"]
        assert json.loads((report / "facts.json").read_text())["fit_diagnosis/verdict"] == tricks[5].diagnosis.kind


class Events:
    """Stands for TensorBoard's writer."""

    def __init__(self):
        self.texts, self.images = {}, {}

    def add_text(self, key, text, step):
        self.texts[key] = text

    def add_image(self, key, image, step, dataformats):
        self.images[key] = image.shape


class FakeLogger(Logger):
    """A logger that takes hyperparameters and numbers, and has, if told, what TensorBoard's has."""

    def __init__(self, experiment=None):
        super().__init__()
        self._experiment, self.settings, self.numbers = experiment, [], {}

    name, version, experiment = "fake", 0, property(lambda self: self._experiment)

    def log_hyperparams(self, params, *_):
        self.settings.append(dict(params))

    def log_metrics(self, metrics, step=None):
        self.numbers |= metrics


@pytest.mark.full
def test_tensorboard_gets_texts_and_images_and_other_loggers_what_they_can_hold():
    events = Events()
    board, other = FakeLogger(events), FakeLogger()
    fit([lt.TrackingReport(), lt.LinearProbe("neck"), lt.FitDiagnosis(patience=1), lt.GradientFlow(every=5)], logger=[board, other])
    assert set(events.images) == {
        "fit_diagnosis/loss_curves",
        *(f"gradient_flow/{name}_heat_map" for name in ("grad_norm", "update_ratio")),
    }
    assert all(len(shape) == 3 and shape[2] == 3 for shape in events.images.values())
    header, rule, row = events.texts["linear_probe/stage_table"].splitlines()
    assert (header, rule) == ("| stage | accuracy |", "| --- | --- |")
    assert row.startswith("| neck | 0.")
    assert events.texts["fit_diagnosis/verdict"] in {"unclear", "underfitting", "overfitting", "fitted", "diverged"}
    for logger in (board, other):
        first = logger.settings[0]  # which alone TensorBoard shows
        assert first["lr"] == 0.05
        assert first["lightning_tricks"]["linear_probe"]["stages"] == "neck"
        assert logger.numbers["tracking_report/tricks"] == 3


def test_hyperparameters_that_the_module_keeps_to_itself_are_not_logged():
    class Silent(Net):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"path": "private"}, logger=False)

    logger = FakeLogger()
    fit([lt.TrackingReport(), lt.EMA()], Silent, logger=logger, max_epochs=1)
    assert [each.keys() for each in logger.settings] == [{"lightning_tricks"}]


def test_pictures_can_be_left_out(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([lt.TrackingReport(figures=False), lt.FitDiagnosis(patience=1)], logger=logger)
    report = Path(logger.log_dir, "tracking_report")
    assert {path.name for path in report.rglob("*") if path.is_file()} == {"facts.json"}


def test_without_matplotlib_pictures_are_left_out_with_a_word(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("lightning_tricks.diagnostics._tracking_report.find_spec", lambda _: None)
    monkeypatch.setattr("lightning_tricks.diagnostics._tracking_report.rank_zero_info", told.append)
    fit([lt.TrackingReport(), lt.FitDiagnosis(patience=1)], logger=CSVLogger(tmp_path))
    assert told == [
        "TrackingReport() leaves out the pictures of fit_diagnosis/loss_curves: matplotlib, which draws them, is not installed."
    ]


def test_a_folder_may_be_a_path_object(tmp_path):
    class Elsewhere(FakeLogger):
        log_dir = tmp_path / "elsewhere"

    fit([lt.TrackingReport(figures=False), lt.FitDiagnosis(patience=1)], logger=Elsewhere())
    assert (tmp_path / "elsewhere" / "tracking_report" / "facts.json").exists()


def test_checkpoints_under_averages_of_lightning_are_not_called_raw(tmp_path):
    path, held = tmp_path / "last.ckpt", []
    for others in ([], [StochasticWeightAveraging(0.1, swa_epoch_start=1)]):
        fit([lt.TrackingReport(), *others], max_epochs=2).trainer.save_checkpoint(path)
        held.append(torch.load(path, weights_only=False)["lightning_tricks"]["TrackingReport"]["weights"])
    assert held == ["raw", None]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_fails_is_reported_once(error, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                raise error

    logger = CSVLogger(tmp_path)
    with pytest.raises((error, SystemExit)):
        make_trainer([lt.TrackingReport(figures=False), lt.FitDiagnosis(patience=1), Fails()], logger=logger).fit(
            Net(), Loader(), Loader(2)
        )
    facts = json.loads((Path(logger.log_dir) / "tracking_report" / "facts.json").read_text())
    assert facts["fit_diagnosis/verdict"] == "unclear"


def test_a_test_alone_has_its_hyperparameters_and_no_report(tmp_path):
    logger = CSVLogger(tmp_path)
    make_trainer([lt.TrackingReport(), lt.EMA()], logger=logger).test(Net(), Loader(2), verbose=False)
    held = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert held["lightning_tricks"]["ema"]["decay"] == 0.999
    assert not Path(logger.log_dir, "tracking_report").exists()


def test_a_trial_run_and_a_trainer_without_loggers_report_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in ({"fast_dev_run": True}, {"logger": False}):
        run = fit([lt.TrackingReport(artifacts="all", figures=False), lt.FitDiagnosis(patience=1)], **options)
        assert len(run.losses) > 0
    assert not list(tmp_path.iterdir())


def test_nothing_is_done_where_a_step_is_taken():
    hooks = {name for name in vars(lt.TrackingReport) if name.startswith("on_")}
    assert hooks == {"on_train_start", "on_fit_end", "on_exception", "on_save_checkpoint", "on_load_checkpoint"}


# Parts


def test_checkpoints_are_found_with_their_aliases(tmp_path):
    savers = [
        ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}", save_last=True),
        ModelCheckpoint(tmp_path / "other", monitor="val_loss", mode="max", filename="{step}", save_weights_only=True),
    ]
    report = lt.TrackingReport()
    fit([report, lt.EMA(0.5, start="2 epochs"), *savers])
    kept = {Path(path) for saver in savers for path in (saver.last_model_path, *saver.best_k_models) if path}
    found = {files.paths[0]: (files, aliases) for files, aliases in checkpoint_files(savers, "all", report.state_key)}
    assert found.keys() == kept
    assert {alias for _, aliases in found.values() for alias in aliases} >= {"averaged", "raw", "best", "best-val_loss", "latest"}
    latest = list(found.values())[-1]
    assert "latest" in latest[1]
    for path, (files, aliases) in found.items():
        saver = savers[path.parent.name == "other"]
        if path.parent.name == "other":  # a file of weights alone says nothing of them
            assert not {"averaged", "raw"} & set(aliases)
        else:
            (track,) = torch.load(path, weights_only=True)["lightning_tricks"]["EMA"]["tracks"]
            assert ("raw" if track["begun"] is None else "averaged") in aliases
        own = "best" if saver is savers[0] else "best-val_loss"
        assert (own in aliases) == (str(path) == saver.best_model_path)
        if str(path) in saver.best_k_models:
            assert files.facts["score"] == pytest.approx(float(saver.best_k_models[str(path)]))
    fewer = checkpoint_files(savers, "best", report.state_key)
    assert [aliases for _, aliases in fewer] == [
        aliases for _, aliases in found.values() if {"best", "best-val_loss", "latest"} & set(aliases)
    ]
    half = Path(savers[0].best_model_path)
    half.write_bytes(half.read_bytes()[:100])  # as one that is being written in the background
    assert half not in {files.paths[0] for files, _ in checkpoint_files(savers, "all", report.state_key)}


def test_values_become_plain():
    recipe = optim.SAM(optim.SGD(lr=0.1), rho=0.1)
    assert plain(recipe)["class"] == "SAM"
    assert plain({"a": (1, None, True), 3: math.nan, "path": Path("x"), "lr": recipe})["lr"]["rho"] == 0.1
    assert plain({3: math.nan, "p": Path("x")}) == {"3": "nan", "p": "x"}
    assert plain(Token()) == "Token()"
    assert plain(Token).endswith(".Token")
    assert plain(torch.float32) == "torch.float32"
    assert json.dumps(plain([recipe, Token, {1, 2}]))
    unusual = [np.float64(0.5), np.float64("nan"), enum.IntEnum("Kind", "A").A, Word.B, object(), functools.partial(Token.__repr__)]
    assert yaml.safe_load(yaml.dump(plain(unusual))) == [
        0.5,
        "nan",
        1,
        "b",
        "<object object>",
        "functools.partial(<function Token.__repr__>)",
    ]
    assert len(plain(set(range(1000)))) == 301
