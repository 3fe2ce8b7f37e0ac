"""Search from coarse to fine for the arguments that suit a model: a round over wide ranges, and rounds zoomed around the best of it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_tricks._core.checks import check_choice, check_count
from lightning_tricks._core.extras import require
from lightning_tricks.errors import ArgumentError
from lightning_tricks.search._board import holders, look, outcome_of
from lightning_tricks.search._search_progress import SearchProgress
from lightning_tricks.search._settings import Settings, read_settings
from lightning_tricks.search._storage import find_study, open_study, optuna
from lightning_tricks.search._trial import quieted
from lightning_tricks.search._worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["load", "search"]


def search(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    launcher: Literal["local", "ray"] = "local",
    workers: int | None = None,
    progress: bool = True,
) -> Any:
    r"""Search for arguments that suit a model, in stages from coarse to fine.

    A stage tries points of the region at hand: on a grid, at random, or where Optuna's TPE sampler expects the best. Of the ``n`` trials
    of a stage, and of those before, the best ``⌈n / 4⌉`` are looked at. The next stage's range of an argument reaches from the value that
    was tried next below all of theirs to the one next above, ``[max{v : v < min B}, min{v : v > max B}]`` with the values ``B`` of the
    best; its choices are those that the best have. A grid zoomed in has its values strictly inside, since the bounds were tried.

    Trials that have no hope are pruned by their metric after each validation. A search that was stopped goes on where it was, and any
    number of processes that are started with the same configuration and storage share its trials. What a killed one leaves is done again.

    Args:
        config: A YAML file, or a mapping with the same content: ``config``, a configuration of LightningCLI, inline or as a path beside
            the file; ``parameters``, which map paths of it to ``{low: …, high: …, scale: linear or log}`` or to lists of choices, where
            ``true`` and ``false`` take an item such as ``trainer.callbacks.EMA`` in and out; ``stages``, a list of
            ``{sampler: grid, count: …}`` with the number of values of each range, or ``{sampler: random or tpe, trials: …}``;
            ``metric``, as validation logs it, and ``mode``, ``min`` by default or ``max``. The rest has defaults: ``pruner``, ``median``,
            ``halving``, ``none``, or a mapping with such a ``name`` and arguments of Optuna's class; ``seed``, of the trainings and of
            the draws; ``failures``, 5, the trials in a row that may fail; ``heartbeat``, 10, seconds between signs of life; ``folder``,
            ``storage``; ``ray``, arguments of `ray.remote` such as ``num_gpus``.
        folder: Where the study, `best.yaml` and the trials' files go; its name is the study's in the storage. Default: what `config` says,
            or ``runs/`` and the name of the file.
        storage: A URL such as ``postgresql://user:password@host/name`` or ``redis://host``, or the path of a journal file. Default: what
            `config` says, or an SQLite file in the folder.
        launcher: ``"local"`` works in this process; ``"ray"`` starts workers on a Ray cluster, or on this machine if there is none.
        workers: How many workers Ray starts, by default one.
        progress: Whether standard error tells what comes of the trials.

    Returns:
        What `load` returns for the folder.

    Raises:
        ArgumentError: If the configuration is wrong, with file and line, before anything is trained; or the metric is never logged.
        SearchError: If too many trials in a row fail.
        MissingPackageError: If a package is missing; ``pip install 'lightning-tricks[search]'``.

    Note:
        All trials have the same seed. Each trains in one process: for several accelerators, start as many workers with one device each.

    References:
        T. Akiba, S. Sano, T. Yanase, T. Ohta, M. Koyama, "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019.

    Example:
        >>> from lightning_tricks import search
        >>> search.search({"config": {"model": {}}, "parameters": {}, "stages": [], "metric": "val_loss"})
        Traceback (most recent call last):
        lightning_tricks.errors.ArgumentError: the configuration of a search must have `parameters`, got {}.
    """
    check_choice("launcher", launcher, ("local", "ray"))
    if workers is not None and launcher == "local":
        msg = f"`workers` must be None for `launcher='local'`, got {workers!r}. Start the same search once more for each further worker."
        raise ArgumentError(msg)
    settings = read_settings(config)
    settings = replace(settings, folder=Path(folder or settings.folder).resolve(), storage=storage or settings.storage)
    with _quiet():
        require("pandas", package="pandas", extra="search", who="A search")
        study = open_study(settings)
        settings.check_builds()
        if not any(trial.state.name in {"COMPLETE", "PRUNED"} for trial in study.get_trials(deepcopy=False)):
            settings.check_metric()
        with SearchProgress(settings, show=progress) as shown:
            if launcher == "ray":
                _work_on_ray(settings, study, shown, check_count("workers", 1 if workers is None else workers))
            else:
                Worker(settings, study, shown.update).run()
    return load(settings.folder, storage=settings.storage)


def load(path: str | os.PathLike[str], *, storage: str | None = None) -> Any:
    """Return the trials of a search as a table.

    Args:
        path: The search's folder.
        storage: The storage, where it is another than the SQLite file in the folder.

    Returns:
        A pandas DataFrame with a row for each trial that was begun, in the order of their numbers: ``trial``, the number; ``stage``, from
        1 on; ``state``, one of complete, pruned, failed, running, waiting and killed, where killed ones will be done again; a column for
        each parameter, named by its path, missing where it had no part; the metric, of pruned trials the last one; ``seconds`` of the fit;
        ``error``. An attempt that was killed and done again has no row.

    Raises:
        CheckpointError: If there is no such study.
        MissingPackageError: If pandas or Optuna is not installed.

    Example:
        >>> from lightning_tricks import search
        >>> search.load("runs/nothing")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_tricks.errors.CheckpointError: 'runs/nothing' must be the folder of a search, ... in 'runs/nothing/study.db'.
    """
    pandas = require("pandas", package="pandas", extra="search", who="`search.load`")
    with _quiet():
        study = find_study(Path(path), storage)
        trials = sorted(holders(study.get_trials(deepcopy=False)).values(), key=lambda trial: trial.number)
    definition = study.user_attrs["definition"]
    rows = [
        {
            "trial": trial.number,
            "stage": trial.user_attrs["stage"] + 1,
            "state": outcome_of(trial),
            **trial.params,
            definition["metric"]: _value(trial),
            "seconds": trial.user_attrs.get("seconds"),
            "error": trial.user_attrs.get("error"),
        }
        for trial in trials
    ]
    columns = ["trial", "stage", "state", *definition["paths"], definition["metric"], "seconds", "error"]
    return pandas.DataFrame(rows, columns=columns)


def _value(trial: Any) -> float | None:
    if trial.state.name == "COMPLETE":
        return float(trial.value)
    return float(trial.intermediate_values[trial.last_step]) if trial.intermediate_values else None


def _work(settings: Settings, paths: list[str]) -> None:
    sys.path += [path for path in paths if path not in sys.path]  # where the user's modules are
    with _quiet():
        Worker(settings, open_study(settings), lambda trials, board: None).run()  # noqa: ARG005 -- the process that started it watches


def _work_on_ray(settings: Settings, study: Any, shown: SearchProgress, workers: int) -> None:
    ray = require("ray", package="Ray", extra="ray", who="`launcher='ray'`")
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False)
    try:
        if settings.storage is None and len(ray.nodes()) > 1:
            msg = f"`storage` must be one that all {len(ray.nodes())} nodes of the Ray cluster reach, such as 'postgresql://…', got None."
            raise ArgumentError(msg)
        pending = [ray.remote(**{"num_cpus": 1, **settings.ray})(_work).remote(settings, sys.path) for _ in range(workers)]
        while pending:
            done, pending = ray.wait(pending, timeout=1)
            trials = study.get_trials(deepcopy=False)
            shown.update(trials, look(settings, trials))
            ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        if own:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Optuna and Lightning tell no more than they must: what comes of trials is told by the progress."""
    optuna()  # which sets a level of its own when it is imported
    with quieted("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"), quieted("optuna", level=logging.ERROR):
        yield
