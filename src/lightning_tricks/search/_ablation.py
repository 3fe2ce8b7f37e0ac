"""Ablations: one call that trains, compares and reports."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from lightning_tricks._core.checks import check_bool, check_choice, check_count
from lightning_tricks._core.extras import require
from lightning_tricks._core.lightning import Callback, LightningModule, Trainer, is_trainer
from lightning_tricks.errors import ArgumentError
from lightning_tricks.search._configuration import Built
from lightning_tricks.search._progress import Progress
from lightning_tricks.search._results import Ablation, summarize
from lightning_tricks.search._study import Design, Study
from lightning_tricks.search._tracking import track

__all__ = ["ablate", "quiet", "run_ablation"]


def ablate(
    make_module: Callable[[], LightningModule],
    make_datamodule: Callable[[], Any] | None,
    tricks: Mapping[str, Callback | Sequence[Callback]],
    seeds: int | Sequence[int] = 5,
    *,
    trainer: Mapping[str, Any] | Callable[[], Trainer] | None = None,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    designs: Sequence[Design] = ("add", "remove"),
    folder: str | os.PathLike[str] = "runs/ablation",
    test: bool = False,
    wandb: str | None = None,
    progress: bool = True,
) -> Ablation:
    r"""Train without tricks, with each alone, with all, and with all but each, over seeds, and compare in pairs.

    ``difference = mean_s(m(cell, s) − m(reference, s))``, with the 95 % interval and the p-value of Student's t over the seeds s, and
    Holm's correction of p for the number of tricks, once for those alone and once for those taken out.

    Each training leaves a file in the folder. Calling again with the same arguments trains only what is missing or failed; more seeds,
    designs and tricks may be asked for later. Ctrl-C ends the study with what is done.

    Args:
        make_module: Makes a module with new weights. It may depend on random numbers, not on what was made before.
        make_datamodule: Makes its data; None if the module has its own loaders.
        tricks: Callbacks by the name of the trick. Each training gets copies.
        seeds: How many, from 0 on, or which.
        trainer: The Trainer's arguments, or what makes a Trainer. Arguments leave logging, checkpoints, progress bars and summaries out
            unless they ask for them.
        metric: What is compared, as ``validation_step`` (or ``test_step``) logs it, at the end of the training.
        mode: Whether ``"min"`` or ``"max"`` of it is better.
        designs: ``"add"`` for each trick alone, ``"remove"`` for all but each, or both.
        folder: Where trainings, table (CSV), forest plot (PNG) and report (HTML) go.
        test: Evaluate by the test set instead of the validation set.
        wandb: A project of W&B that gets a group with a run for each cell; None = none. Without W&B installed, a warning.
        progress: Show on standard error what is done, what runs, and the time left.

    Returns:
        The rows of the table and what to do with them; ``print`` it.

    Raises:
        ArgumentError: If an argument lies outside its domain, or the folder has a study with other settings.
        TrickConflictError: If tricks that are to train together cannot.
        MissingPackageError: If SciPy, pandas or matplotlib is not installed.

    Note:
        Trainings of one seed share the weights that ``make_module`` makes, the order of the data, and the random numbers at the start of
        each batch, whatever the tricks draw. Parameters that a trick adds or initializes are its own; all others start alike. Everything
        runs in this process, one training after the other, on one device.

    References:
        Student, "The Probable Error of a Mean", Biometrika, 1908. S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure",
        Scandinavian Journal of Statistics, 1979.

    Example:
        >>> import tempfile, torch, lightning_tricks as lt
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> class Model(BoringModel):
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", self.step(batch))
        >>> study = lt.search.ablate(
        ...     Model, BoringDataModule, {"EMA": lt.EMA(0.9)}, seeds=2, trainer={"max_steps": 8, "accelerator": "cpu"},
        ...     folder=tempfile.mkdtemp(), progress=False,
        ... )
        >>> [(row.cell, row.seeds) for row in study.rows]
        [('baseline', (0, 1)), ('+ EMA', (0, 1))]
    """
    for name, value in (("make_module", make_module), ("make_datamodule", make_datamodule)):
        made = isinstance(value, nn.Module)  # which can be called, and makes none
        if made or not (callable(value) or (value is None and name == "make_datamodule")):
            msg = f"`{name}` must be a function without arguments that makes a new one for each training, got {value!r}."
            raise ArgumentError(msg)
    make_trainer, settings = _trainer_maker(trainer)

    def build() -> Built:
        return Built(make_module(), None if make_datamodule is None else make_datamodule(), make_trainer())

    return run_ablation(
        build, tricks, seeds, metric=metric, mode=mode, designs=designs, folder=folder, test=test, wandb=wandb, progress=progress,
        settings=settings,
    )  # fmt: skip


def run_ablation(
    build: Callable[[], Built],
    tricks: Mapping[str, Callback | Sequence[Callback]],
    seeds: int | Sequence[int],
    *,
    metric: str,
    mode: Literal["min", "max"],
    designs: Sequence[Design],
    folder: str | os.PathLike[str],
    test: bool,
    wandb: str | None,
    progress: bool,
    settings: Mapping[str, Any],
) -> Ablation:
    """Do what `ablate` does, with whatever makes module, data and Trainer; `settings` is what a study may not change midway."""
    check_choice("mode", mode, ("min", "max"))
    check_bool("test", test)
    check_bool("progress", progress)
    _check_text("metric", metric, "the name of what an evaluation logs")
    if wandb is not None:
        _check_text("wandb", wandb, "the name of a project of W&B, or None")
    if not isinstance(folder, str | os.PathLike):
        msg = f"`folder` must be the path of a folder, got {folder!r}."
        raise ArgumentError(msg)
    for module, package in (("scipy.stats", "scipy"), ("pandas", "pandas"), ("matplotlib.figure", "matplotlib")):
        require(module, package=package, extra="search", who="An ablation")
    study = Study(
        folder, build, tricks, seeds=_check_seeds(seeds), metric=metric, designs=designs, test=test, settings=settings
    )  # fmt: skip
    study.prepare()
    interrupted = _train(study, progress=progress)
    ablation = summarize(study, mode=mode, interrupted=interrupted)
    ablation.save()
    if wandb is not None:
        track(ablation, wandb)
    return ablation


def _train(study: Study, *, progress: bool) -> bool:
    """Run what is not done, and tell whether Ctrl-C ended it."""
    missing = [(cell, seed) for cell, seed in study.trials if not study.done(cell, seed)]
    total = len(study.trials)
    try:
        with Progress(total, total - len(missing), study.metric, show=progress) as shown:
            for cell, seed in missing:
                shown.begin(cell, seed)
                shown.end(study.run(cell, seed))
    except KeyboardInterrupt:
        return True
    return False


def quiet(callbacks: Sequence[str]) -> dict[str, Any]:
    """Return the Trainer's arguments that keep a study quiet, less those that callbacks of these names need."""

    def absent(kind: str) -> bool:
        return not any(kind in name for name in callbacks)

    wanted = {"enable_checkpointing": "Checkpoint", "enable_progress_bar": "ProgressBar", "enable_model_summary": "ModelSummary"}
    return {"logger": False} | {argument: False for argument, kind in wanted.items() if absent(kind)}


def _trainer_maker(trainer: Mapping[str, Any] | Callable[[], Trainer] | None) -> tuple[Callable[[], Trainer], dict[str, Any]]:
    """Return what makes a Trainer, and those of its arguments that a file can hold."""
    if trainer is None or isinstance(trainer, Mapping):
        given = dict(trainer or {})
        callbacks = given.get("callbacks") or []
        names = [type(each).__name__ for each in (callbacks if isinstance(callbacks, Sequence) else [callbacks])]
        plain = {name: value for name, value in given.items() if value is None or isinstance(value, str | int | float)}
        return lambda: Trainer(**{**quiet(names), **copy.deepcopy(given)}), {"trainer": plain}
    if is_trainer(trainer) or not callable(trainer):
        msg = f"`trainer` must be the Trainer's arguments, or a function that makes a new Trainer for each training, got {trainer!r}."
        raise ArgumentError(msg)
    return trainer, {}


def _check_text(name: str, value: object, what: str) -> None:
    if not isinstance(value, str) or not value:
        msg = f"`{name}` must be {what}, got {value!r}."
        raise ArgumentError(msg)


def _check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Sequence):
        return tuple(range(check_count("seeds", seeds)))
    valid = not isinstance(seeds, str) and all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32 for seed in seeds)
    if not valid or not seeds or len(set(seeds)) < len(seeds):
        msg = f"`seeds` must be how many, or different integers from 0 on, got {seeds!r}."
        raise ArgumentError(msg)
    return tuple(seeds)
