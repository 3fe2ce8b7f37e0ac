"""Where Optuna keeps a study: a database in the study's folder, a server, or a journal."""

from __future__ import annotations

import random
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.extras import require
from lightning_tricks.errors import ArgumentError, CheckpointError, MissingPackageError

if TYPE_CHECKING:
    from lightning_tricks.search._settings import Settings

__all__ = ["find_study", "open_study", "optuna"]

_PATIENCE = 60  # seconds to wait for another process's write before SQLite gives up; its own default of 5 is short on a busy disk
_TRIES = 5


def optuna() -> Any:
    """Import Optuna."""
    return require("optuna", package="Optuna", extra="search", who="A search")


def _open(storage: str | None, folder: Path) -> Any:
    """Open a storage of Optuna.

    Args:
        storage: A URL of SQLAlchemy or ``redis://…``, or the path of a journal; None = an SQLite file in the folder.
        folder: The study's.

    Raises:
        ArgumentError: If it cannot be opened.
        MissingPackageError: If Optuna, or the package that speaks to the server, is not installed.
    """
    if storage is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"`folder` must be one where files can be written, got '{folder}': {error}."
            raise ArgumentError(msg) from error
        storage = f"sqlite:///{folder.resolve() / 'study.db'}"
    scheme, has_scheme, _ = storage.partition("://")
    try:
        for _ in range(_TRIES - 1):
            with suppress(optuna().exceptions.StorageInternalError, *_locked()):  # others make the tables at this moment
                return _make(storage, scheme if has_scheme else None)
            time.sleep(random.random())  # noqa: S311 -- so that they do not meet again
        return _make(storage, scheme if has_scheme else None)
    except ImportError as error:
        package = "redis" if scheme in {"redis", "rediss", "unix"} else "the driver that SQLAlchemy wants for it"
        msg = f"`storage={scheme}://…` needs {package}, which is not installed: {error}"
        raise MissingPackageError(msg) from error
    except Exception as error:
        msg = (
            "`storage` must be a database that SQLAlchemy can open, such as 'postgresql://user:password@host/name', a Redis server, or the "
            f"path of a journal; {f'{scheme}://…' if has_scheme else repr(storage)} failed with {type(error).__name__}: {error}"
        )
        raise ArgumentError(msg) from error


def _make(storage: str, scheme: str | None) -> Any:
    storages = optuna().storages
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna().exceptions.ExperimentalWarning)
        if scheme is None:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            return storages.JournalStorage(storages.journal.JournalFileBackend(storage))
        if scheme in {"redis", "rediss", "unix"}:
            return storages.JournalStorage(storages.journal.JournalRedisBackend(storage, prefix="lightning-tricks"))
        return storages.RDBStorage(storage, {"connect_args": {"timeout": _PATIENCE}} if scheme.startswith("sqlite") else None)


def _locked() -> tuple[type[Exception], ...]:
    errors = require("sqlalchemy.exc", package="Optuna", extra="search", who="A search")
    return errors.OperationalError, errors.IntegrityError, errors.ProgrammingError


def open_study(settings: Settings) -> Any:
    """Create the study, or join it where there is one.

    Raises:
        ArgumentError: If it is one of other settings.
    """
    study = optuna().create_study(
        study_name=settings.folder.resolve().name,
        storage=_open(settings.storage, settings.folder),
        sampler=optuna().samplers.RandomSampler(),
        pruner=settings.make_pruner(),
        direction="minimize" if settings.mode == "min" else "maximize",
        load_if_exists=True,
    )
    _agree(study, settings)
    return study


def _agree(study: Any, settings: Settings) -> None:
    """Record what trials depend on, or see that it is what the study began with; only stages may be added.

    Raises:
        ArgumentError: If it is not.
    """
    direction = "minimize" if settings.mode == "min" else "maximize"
    if study.direction.name.lower() != direction:  # which Optuna cannot change, not even of a study without trials
        msg = (
            f"{settings.location.of(('mode',))}`mode` must stay what it was when the study {study.study_name!r} began, "
            f"got {settings.mode!r}. Take another `folder`."
        )
        raise ArgumentError(msg)
    now, before = settings.definition, study.user_attrs.get("definition")
    begun = any(trial.state.name in {"COMPLETE", "PRUNED"} for trial in study.get_trials(deepcopy=False))
    if begun and before is not None:
        for name, value in now.items():
            there = before[name]
            if there != value and not (name == "stages" and value[: len(there)] == there):
                found = "something else" if name in {"config", "parameters"} else f"{value!r}"
                was = "what it was" if name in {"config", "parameters"} else f"{there!r}, as it was"
                msg = (
                    f"{settings.location.of((name,))}`{name}` must stay {was} when the study {study.study_name!r} began, got {found}. "
                    "Take another `folder`; only stages can be added to a study."
                )
                raise ArgumentError(msg)
    if before != now:
        study.set_user_attr("definition", now)


def find_study(folder: Path, storage: str | None) -> Any:
    """Open a study that must be there already.

    Raises:
        CheckpointError: If it is not.
    """
    file = folder / "study.db" if storage is None else None if "://" in storage else Path(storage)
    there = file is None or file.is_file()
    name = folder.resolve().name
    study = None
    if there:
        try:
            study = optuna().load_study(study_name=name, storage=_open(storage, folder))
        except KeyError:
            study = None
    if study is None or "definition" not in study.user_attrs:
        where = f"'{file}'" if file is not None else "the storage"
        msg = f"'{folder}' must be the folder of a search, whose name is the study's, and there is no study {name!r} of one in {where}."
        raise CheckpointError(msg)
    return study
