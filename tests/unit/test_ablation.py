"""Ablations: what is trained, what is paired, what is compared, and what is told."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from lightning_tricks.errors import ArgumentError, MissingPackageError, TrickConflictError
from lightning_tricks.search._comparison import compare_pairs, holm
from lightning_tricks.search._configuration import Built
from lightning_tricks.search._forest import effects_of
from lightning_tricks.search._progress import Progress, spell_time
from lightning_tricks.search._results import summarize
from lightning_tricks.search._study import Study, plan_cells
from lightning_tricks.search._trial import Outcome, run_trial
from reference import ablation as reference

EPOCHS = 2


class Net(LightningModule):
    """Notes what it begins with and what it is given."""

    made: list[Net] = []  # noqa: RUF012 -- tests look here

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self.late, self.seen, self.noise = late, [], []
        if not late:
            self.configure_model()
        Net.made.append(self)

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
            self.first = {name: value.clone() for name, value in self.net.state_dict().items()}

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].clone())
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Augmented(TensorDataset):
    """Adds noise from torch's global generator, as augmentations do."""

    def __getitem__(self, index):
        return (self.tensors[0][index] + torch.randn(4) / 100,)


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.data = Augmented(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=12)

    test_dataloader = val_dataloader


class Drawing(Callback):
    """Draws from the global generators wherever it is asked to do something."""

    def draw(self, *args, **kwargs):
        torch.rand(7)

    setup = on_fit_start = on_train_start = on_train_epoch_start = draw
    on_train_batch_start = on_train_batch_end = on_validation_start = on_validation_end = on_train_epoch_end = draw


class Failing(Callback):
    """Raises what it is told, at the first step."""

    def __init__(self, error=None):
        self.error = error or RuntimeError("the <first> step")

    def on_train_batch_start(self, *args):
        raise self.error


class Widening(Callback):
    """Adds a layer with weights of its own."""

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            pl_module.net.append(nn.Linear(1, 1))


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=EPOCHS, accelerator="cpu", **quiet | options)


def build(*, late=False):
    return Built(Net(late=late), Data(), trainer())


def train(*callbacks, seed=3, late=False):
    run_trial(lambda: build(late=late), callbacks, seed=seed, metric="val_loss", test=False)
    return Net.made[-1]


@pytest.fixture(autouse=True)
def _few_modules():
    yield
    Net.made.clear()


def study_of(folder, tricks, **options):
    given = {"seeds": (0, 1), "metric": "val_loss", "designs": ("add", "remove"), "test": False, "settings": {}, **options}
    return Study(folder, build, tricks, **given)


def record(study, values, **outcomes):
    """Write what trainings came to, as if they had run: values by cell, one for each seed; None was not trained."""
    study._claim()
    for cell in study.cells:
        for seed, value in zip(study.seeds, values[cell.name], strict=True):
            if value is not None:
                failed = isinstance(value, str)
                outcome = Outcome(error=value) if failed else Outcome({"val_loss": value}, 0.01 * (1 + len(cell.tricks)), 2**20, 1.0)
                file = study._file(cell, seed)
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps({"outcome": outcome.as_dict()}))


# Pairs


@pytest.mark.parametrize("late", [False, True])
def test_a_trick_that_draws_changes_neither_initial_weights_nor_data(late):
    before = torch.get_rng_state()
    plain, drawing = train(late=late), train(Drawing(), late=late)
    assert len(plain.seen) == 3 * EPOCHS
    assert all(map(torch.equal, plain.seen, drawing.seen))
    assert all(torch.equal(drawing.first[name], value) for name, value in plain.first.items())
    assert not torch.equal(plain.seen[0], plain.seen[3])  # another order and other noise in each epoch
    other = train(seed=4, late=late)
    assert not torch.equal(plain.first["0.weight"], other.first["0.weight"])
    assert not torch.equal(plain.seen[0], other.seen[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_trick_adds_is_its_own_and_the_rest_starts_alike():
    plain, wide = train(), train(Widening())
    assert wide.net[4].weight.shape == (1, 1)
    assert all(torch.equal(wide.first[name], value) for name, value in plain.first.items())
    assert all(map(torch.equal, plain.seen, wide.seen))
    assert plain.seen[0].dtype == torch.float32


def test_tricks_are_copied_so_that_no_training_sees_anothers():
    ema = lt.EMA(0.5)
    outcomes = [run_trial(build, [ema], seed=0, metric="val_loss", test=False) for _ in range(2)]
    assert outcomes[0].metrics == outcomes[1].metrics
    assert not hasattr(ema, "_averages") or ema._averages is None or not ema._averages.tracks


# What is trained


def test_cells_of_each_design():
    names = [cell.name for cell in plan_cells(["a", "b", "c"])]
    assert names == ["baseline", "+ a", "+ b", "+ c", "everything", "everything − a", "everything − b", "everything − c"]
    assert [cell.name for cell in plan_cells(["a", "b"], ["add"])] == ["baseline", "+ a", "+ b"]
    assert [cell.name for cell in plan_cells(["a", "b"], ["remove"])] == ["baseline", "everything", "everything − a", "everything − b"]
    assert [cell.name for cell in plan_cells(["a"], ["remove"])] == ["baseline", "+ a"]


def test_cells_with_the_same_tricks_share_trainings_and_another_everything_does_not(tmp_path):
    two = study_of(tmp_path, {"A": Drawing(), "B": Drawing()})
    assert len(two.cells) == 6
    assert [cell.name for cell, seed in two.trials if seed == 0] == ["baseline", "+ A", "+ B", "everything"]
    three = study_of(tmp_path, {"C": Drawing(), "B": Drawing(), "A": Drawing()})
    stems = {cell.name: cell.stem for cell in three.cells}
    assert stems["everything − C"] == "with-a+b" == {cell.name: cell.stem for cell in two.cells}["everything"]
    assert stems["everything"] == "with-a+b+c"
    many = plan_cells([f"a trick with a long name {i}" for i in range(9)])[10:]
    assert all(len(cell.stem) < 100 for cell in many)
    assert len({cell.stem for cell in many}) == len(many) == 10


@pytest.mark.parametrize(
    ("tricks", "options", "words"),
    [
        ({}, {}, "`tricks` must map names to lists of callbacks"),
        ({"a": "EMA"}, {}, "`tricks` must map names to lists of callbacks"),
        ({"a": []}, {}, "`tricks` must map names to lists of callbacks"),
        ({"a b": lt.EMA(), "A-B": lt.EMA()}, {}, "differ by more than case and punctuation"),
        ({"a": lt.EMA()}, {"designs": ["minus"]}, "`designs` must be"),
        ({"a": lt.EMA()}, {"designs": []}, "`designs` must have 'add', 'remove' or both, got none"),
    ],
)
def test_wrong_arguments(tmp_path, tricks, options, words):
    with pytest.raises(ArgumentError, match=re.escape(words)):
        study_of(tmp_path, tricks, **options)


def test_what_spoils_a_study_is_found_before_the_first_training(tmp_path):
    with pytest.raises(TrickConflictError, match=r"The cell 'everything' cannot be trained: .*Or ask for `designs=\['add'\]`"):
        study_of(tmp_path, {"a": lt.EMA(0.5), "b": lt.EMA(0.9, name="b")}).prepare()
    with pytest.raises(ArgumentError, match="`metric` must be logged by validation_step, got 'loss'; logged are: val_loss"):
        study_of(tmp_path, {"a": lt.EMA()}, metric="loss").prepare()
    with pytest.raises(ArgumentError, match="`metric` must be logged by test_step, got 'val_loss'; logged are: test_loss"):
        study_of(tmp_path, {"a": lt.EMA()}, test=True).prepare()
    assert not any(module.seen for module in Net.made)
    assert not list(tmp_path.iterdir())


def test_a_study_goes_on_with_its_own_settings_only(tmp_path):
    study_of(tmp_path, {"a": lt.EMA(0.5), "b": Failing()}, settings={"trainer": {"max_epochs": 2}}).prepare()
    study_of(
        tmp_path, {"b": Failing(), "c": Drawing()}, seeds=(0, 1, 2), designs=["add"], settings={"trainer": {"max_epochs": 2}}
    ).prepare()
    with pytest.raises(ArgumentError, match=r"`tricks\['a'\]` must stay what it was .*decay=0.5.*, got .*decay=0.9.* Take another folder"):
        study_of(tmp_path, {"a": lt.EMA(0.9)}, settings={"trainer": {"max_epochs": 2}}).prepare()
    with pytest.raises(ArgumentError, match="`trainer` must stay what it was"):
        study_of(tmp_path, {"a": lt.EMA(0.5)}, settings={"trainer": {"max_epochs": 3}}).prepare()
    with pytest.raises(ArgumentError, match="`metric` must stay what it was"):
        study_of(tmp_path, {"a": lt.EMA(0.5)}, metric="val_acc", settings={"trainer": {"max_epochs": 2}}).prepare()


def test_a_training_that_fails_or_diverges_is_what_it_came_to(tmp_path):
    study = study_of(tmp_path, {"a": Failing(), "b": lt.WeightDecay(0.1)})
    outcome = study.run(study.cells[1], 0)
    assert re.fullmatch(r"RuntimeError: the <first> step \(test_ablation.py:\d+\)", outcome.error)
    assert study.outcome(study.cells[1], 0) == outcome
    assert not study.done(study.cells[1], 0)
    study.build = lambda: Built(Exploding(), Data(), trainer())
    assert study.run(study.cells[2], 0).error == "val_loss came out as nan"


def test_who_exits_has_failed_and_ctrl_c_ends_an_evaluation_too(tmp_path):
    study = study_of(tmp_path, {"a": Failing(SystemExit(3)), "b": lt.WeightDecay(0.1)})
    assert re.fullmatch(r"SystemExit: 3 \(test_ablation.py:\d+\)", study.run(study.cells[1], 0).error)
    study.build = lambda: Built(Impatient(), Data(), trainer())
    with pytest.raises(KeyboardInterrupt):
        study.run(study.cells[2], 0)
    assert study.outcome(study.cells[2], 0) is None


def test_files_that_are_damaged_or_of_something_else(tmp_path):
    study = study_of(tmp_path, {"a": Drawing()})
    record(study, {"baseline": [1.0, 1.0], "+ a": [1.0, 1.0]})
    cell = study.cells[1]
    study._file(cell, 0).write_text("")  # as a machine leaves it that lost its power
    assert (study.done(cell, 0), study.done(cell, 1)) == (False, True)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ArgumentError, match=r"`folder` must be new, or that of an ablation, and '.*study.json' is none of one"):
        study.prepare()


class Exploding(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", math.nan)


class Impatient(Net):
    def validation_step(self, batch, batch_idx):
        if self.trainer.state.fn == "validate":
            raise KeyboardInterrupt


# Whole studies


def ablate(folder, tricks, **options):
    given = {"seeds": 2, "trainer": {"max_epochs": 1, "accelerator": "cpu"}, "folder": folder, "progress": False, **options}
    return lt.search.ablate(Net, Data, tricks, **given)


@pytest.mark.full
def test_failures_and_ctrl_c_are_told_and_tried_again(tmp_path, capsys):
    handler = signal.getsignal(signal.SIGINT)
    tricks = {"bad": Failing(), "stop": Failing(KeyboardInterrupt())}
    study = ablate(tmp_path, tricks, designs=["add"], progress=True)
    assert study.interrupted
    assert (study.done, study.total) == (1, 6)
    assert signal.getsignal(signal.SIGINT) is handler
    assert list(study.failures) == ["+ bad, seed 0"]
    for text in (str(study), (tmp_path / "ablation.csv").read_text(), (tmp_path / "ablation.html").read_text().replace("&lt;", "<")):
        assert "RuntimeError: the <first" in text
    assert "1 of 6 trainings are done" in str(study)
    assert "[2/6] + bad, seed 0: failed, RuntimeError" in capsys.readouterr().err
    before = len(Net.made)
    again = ablate(tmp_path, {"bad": Failing()}, progress=True)
    assert (again.done, again.total, again.interrupted) == (2, 4, False)
    assert capsys.readouterr().err.startswith("1 of 4 trainings were done before.\n[2/4] + bad, seed 0: failed")
    assert len(Net.made) - before == 2 + 3  # two to look, three to train: the failed one again, and those of seed 1


@pytest.mark.full
def test_results_are_in_every_output(tmp_path):
    study = ablate(tmp_path, {"decay": lt.WeightDecay(0.1), "ema": lt.EMA(0.5)}, seeds=[5, 7], mode="max")
    assert [row.cell for row in study.rows] == ["baseline", "+ decay", "+ ema", "everything", "everything − decay", "everything − ema"]
    frame = study.to_frame().set_index("cell")
    assert frame.loc["+ decay", "mean"] == frame.loc["everything − ema", "mean"]
    assert math.isclose(frame.loc["+ ema", "difference"], frame.loc["+ ema", "mean"] - frame.loc["baseline", "mean"])
    assert (tmp_path / "ablation.csv").read_text().splitlines()[0].split(",") == ["cell", *frame.columns]
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "ablation.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in ("baseline", "decay", "ema", "everything", "without decay", "without ema"))
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", page)
    assert str(study).splitlines()[2].startswith("baseline")


@pytest.mark.full
def test_another_trainer_and_loaders_of_the_modules_own(tmp_path):
    class Whole(Net):
        train_dataloader, val_dataloader = Data.train_dataloader, Data.val_dataloader
        data = Data().data

    assert lt.search.ablate(Whole, None, {"a": [Drawing()]}, 1, trainer=trainer, folder=tmp_path, progress=False).rows[1].mean > 0
    for options, words in (
        ({"trainer": trainer()}, "`trainer` must be the Trainer's arguments, or a function"),
        ({"seeds": []}, "`seeds` must be how many, or different integers"),
        ({"seeds": [1, 1]}, "`seeds` must be how many, or different integers"),
        ({"mode": "less"}, "`mode` must be"),
    ):
        with pytest.raises(ArgumentError, match=words):
            ablate(tmp_path, {"a": Drawing()}, **options)
    with pytest.raises(ArgumentError, match="`make_module` must be a function"):
        lt.search.ablate(Net(), Data, {"a": Drawing()}, folder=tmp_path)


def test_a_missing_package_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lightning-tricks\[search\]'"):
        ablate(tmp_path, {"a": Drawing()})
    assert Net.made == []


# Comparisons


@pytest.mark.full
def test_pairs_agree_with_scipy_and_with_the_literal_formula():
    from scipy.stats import ttest_rel

    generator = torch.Generator().manual_seed(1)
    for count in (2, 3, 5, 12):
        values, baselines = torch.randn(2, count, dtype=torch.float64, generator=generator).tolist()
        found, theirs = compare_pairs(values, baselines), ttest_rel(values, baselines)
        interval = theirs.confidence_interval(0.95)
        assert found[1:4] == pytest.approx((interval.low, interval.high, theirs.pvalue), rel=1e-9)
    assert found[:4] == pytest.approx(reference.paired(values, baselines), rel=1e-6)


@pytest.mark.full
def test_pairs_at_the_edges():
    nan = math.nan
    assert compare_pairs([1.0, nan, 3.0, 5.0], [0.0, 1.0, 1.0, 2.0]) == compare_pairs([1.0, 3.0, 5.0], [0.0, 1.0, 2.0])
    assert compare_pairs([1.0, 2.0], [1.0, 2.0])[:4] == (0, 0, 0, 1)
    assert compare_pairs([2.0, 3.0], [1.0, 2.0])[:4] == (1, 1, 1, 0)
    single = compare_pairs([2.0], [1.0])
    assert (single.mean, single.pairs) == (1, 1)
    assert math.isnan(single.low)
    assert math.isnan(single.p_value)
    assert math.isnan(compare_pairs([], []).mean)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    draws = torch.rand(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square().tolist()
    for p_values in draws:
        assert holm(p_values) == pytest.approx(reference.holm(p_values))
    with_gap = holm([0.01, math.nan, 0.04])
    assert [with_gap[0], with_gap[2]] == pytest.approx([0.02, 0.04])
    assert math.isnan(with_gap[1])


@pytest.fixture
def compared(tmp_path):
    """A study of three seeds: `good` helps alone and beside the others, `bad` hurts, `same` does nothing, once it failed."""
    study = study_of(tmp_path, {"good": Drawing(), "bad": Drawing(), "same": Drawing()}, seeds=(0, 1, 2))
    record(
        study,
        {
            "baseline": [1.00, 1.10, 1.20],
            "+ good": [0.50, 0.61, 0.70],
            "+ bad": [2.00, 2.11, 2.20],
            "+ same": [1.01, 1.09, "it <broke>"],
            "everything": [1.50, 1.61, 1.70],
            "everything − good": [2.00, 2.10, 2.21],
            "everything − bad": [0.50, 0.60, None],
            "everything − same": [1.49, 1.62, 1.70],
        },
    )
    return summarize(study, mode="min", interrupted=False)


@pytest.mark.full
def test_verdicts_turn_round_where_a_trick_is_taken_out(compared):
    verdicts = {row.cell: row.verdict for row in compared.rows}
    assert verdicts["+ good"] == verdicts["everything − good"] == "helps"
    assert verdicts["+ bad"] == "hurts"
    assert verdicts["+ same"] == verdicts["everything − same"] == "unclear"
    rows = {row.cell: row for row in compared.rows}
    assert rows["+ good"].mean == pytest.approx(0.6033, abs=1e-4)
    assert rows["+ good"].std == pytest.approx(0.1002, abs=1e-4)
    assert rows["+ good"].p_holm == pytest.approx(
        reference.holm([rows[f"+ {name}"].difference.p_value for name in ("good", "bad", "same")])[0]
    )
    assert rows["everything"].p_holm == rows["everything"].difference.p_value
    assert rows["+ same"].difference.pairs == 2
    assert rows["+ same"].added_time == pytest.approx(1.0)
    assert rows["everything − same"].added_time == pytest.approx(-0.25)
    assert (compared.done, compared.total) == (22, 24)
    turned = [
        row.verdict
        for row in summarize(
            study_of(compared.folder, dict.fromkeys(["good", "bad", "same"], Drawing()), seeds=(0, 1, 2)), mode="max", interrupted=False
        ).rows
    ]
    assert turned[1:3] == ["hurts", "helps"]


@pytest.mark.full
def test_the_plot_shows_what_having_a_trick_changes(compared):
    groups = effects_of(compared)
    assert [group[0].label for group in groups] == ["good", "same", "bad", "all together"]
    alone, beside = groups[0]
    assert (alone.kind, beside.kind) == ("alone", "beside the others")
    assert alone.mean == pytest.approx(-0.4967, abs=1e-4)
    assert beside.mean == pytest.approx(-0.5, abs=1e-4)
    assert beside.low < beside.mean < beside.high


@pytest.mark.full
def test_the_table_and_the_report_tell_the_same(compared):
    text = str(compared)
    line = next(line for line in text.splitlines() if line.startswith("+ good"))
    assert re.sub(r" +", " ", line) == "+ good 0.60 ± 0.10 −0.50 −0.51 to −0.48 < 0.001 helps +100 % 0.0 MiB"
    assert "22 of 24 trainings are done" in text
    compared.save()
    page = (Path(compared.folder) / "ablation.html").read_text(encoding="utf-8")
    assert "Alone: good helps; bad hurts." in page
    assert "it &lt;broke&gt;" in page
    assert "<broke>" not in page
    assert page.count('class="interval') == 10


# Progress and tracking


def test_progress_tells_what_is_done_and_how_long_the_rest_takes(capsys):
    cells = plan_cells(["a"])
    with Progress(4, 1, "val_loss", show=True) as progress:
        progress.begin(cells[1], 3)
        progress.end(Outcome({"val_loss": 0.25}, seconds=1.0))
        progress._times = [90.0]
        assert progress.left == ", about 3 min left"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 of 4 trainings were done before."
    assert re.fullmatch(r"\[2/4\] \+ a, seed 3: val_loss 0.25 \(0.0 s, about 0.0 s left\)", lines[1])
    with Progress(4, 1, "val_loss", show=False) as progress:
        progress.begin(cells[1], 3)
        progress.end(Outcome({"val_loss": 0.25}))
    assert capsys.readouterr().err == ""
    assert [spell_time(seconds) for seconds in (1.23, 42, 100, 7200)] == ["1.2 s", "42 s", "2 min", "2.0 h"]


@pytest.mark.full
def test_in_a_terminal_a_bar_shows_the_same(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(4, 1, "val_loss", show=True) as progress:
        progress.begin(plan_cells(["a"])[1], 3)
        progress.end(Outcome(error="RuntimeError: no [luck]"))
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "+ a, seed 3: failed, RuntimeError: no [luck]" in text
    assert re.search(r"2/4 \+ a, seed 3, about 0.0 s left", text)


@pytest.mark.full
def test_each_cell_is_a_run_of_one_group(compared, monkeypatch):
    from lightning_tricks.search._tracking import track

    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.summary, self.finished = options, [], {}, False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    track(compared, "project")
    assert [run.options["name"] for run in runs] == [row.cell for row in compared.rows]
    assert {run.options["group"] for run in runs} == {compared.folder.rpartition("/")[2]}
    assert len({run.options["id"] for run in runs}) == len(runs) == 8
    assert runs[1].logged == [(0, {"val_loss": 0.5, "seed": 0}), (1, {"val_loss": 0.61, "seed": 1}), (2, {"val_loss": 0.7, "seed": 2})]
    assert runs[1].summary["verdict"] == "helps"
    assert "difference" not in runs[0].summary
    assert all(run.finished for run in runs)


@pytest.mark.full
def test_without_wandb_a_warning_is_all(compared, monkeypatch):
    from lightning_tricks.search._tracking import track

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="not sent to W&B, which is not installed"):
        track(compared, "project")
