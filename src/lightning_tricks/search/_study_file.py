"""Studies in YAML: what ``lightning-tricks ablate --config study.yaml`` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tricks.errors import ArgumentError, MissingPackageError, TrickConflictError, TrickError
from lightning_tricks.search._ablation import quiet, run_ablation
from lightning_tricks.search._configuration import Built, Configuration, Location, build_callbacks, read_yaml

if TYPE_CHECKING:
    import os

    from lightning_tricks.search._results import Ablation

__all__ = ["ablate_from_file"]

_DEFAULTS: Mapping[str, Any] = {
    "seeds": 5,
    "metric": "val_loss",
    "mode": "min",
    "designs": ["add", "remove"],
    "folder": None,
    "test": False,
    "wandb": None,
}


def ablate_from_file(
    path: str | os.PathLike[str], *, folder: str | None = None, seeds: int | None = None, progress: bool = True
) -> Ablation:
    """Run the ablation that a YAML file describes.

    Args:
        path: The file: ``config``, a configuration of LightningCLI or the path of one; ``tricks``, by name lists of ``class_path`` and
            ``init_args``; and, as in `ablate`, ``seeds``, ``metric``, ``mode``, ``designs``, ``folder``, ``test`` and ``wandb``.
        folder: Takes the place of the file's.
        seeds: Takes the place of the file's.
        progress: As in `ablate`.

    Raises:
        TrickError: If the file, or anything in it, is wrong; with the line.
    """
    tree, location = read_yaml(path)
    _check_keys(tree, location)
    configuration = _configuration(tree["config"], location, Path(path).parent)
    tricks = {}
    if not isinstance(tree["tricks"], Mapping) or not tree["tricks"]:
        msg = f"{location.of(('tricks',))}`tricks` must map names to lists of `class_path` and `init_args`, got {tree['tricks']!r:.80}."
        raise ArgumentError(msg)
    for name, items in tree["tricks"].items():
        tricks[str(name)] = build_callbacks(items, location.under(("tricks", name)))
    options = {**_DEFAULTS, **tree, **({"seeds": seeds} if seeds is not None else {})}
    chosen = folder or options["folder"] or str(Path("runs") / Path(path).stem)
    build = _build_quietly(configuration)
    try:
        return run_ablation(
            build,
            tricks,
            options["seeds"],
            metric=options["metric"],
            mode=options["mode"],
            designs=options["designs"],
            folder=chosen,
            test=options["test"],
            wandb=options["wandb"],
            progress=progress,
            settings={"config": json.loads(json.dumps(configuration.tree, default=str))},
        )
    except MissingPackageError:
        raise
    except TrickError as error:
        raise type(error)(_located(error, location, tree, configuration)) from error


def _check_keys(tree: Any, location: Location) -> None:
    if not isinstance(tree, dict) or not {"config", "tricks"} <= tree.keys():
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else repr(tree)
        msg = f"{location.of(())}a study must have `config` and `tricks`, got {found}."
        raise ArgumentError(msg)
    known = {"config", "tricks", *_DEFAULTS}
    for key in tree:
        if key not in known:
            msg = f"{location.of((key,))}a study has no `{key}`; it may have {', '.join(sorted(known))}."
            raise ArgumentError(msg)


def _configuration(given: Any, location: Location, base: Path) -> Configuration:
    """Read the configuration at the path given, relative to the study, or take the one that stands inside it."""
    if isinstance(given, str):
        path = base / given
        if not path.is_file():
            msg = f"{location.of(('config',))}`config` must be a configuration of LightningCLI or the path of one, and '{path}' is no file."
            raise ArgumentError(msg)
        return Configuration.read(path)
    if not isinstance(given, Mapping) or "model" not in given:
        needed = "`config` must have `model`, and mostly `data` and `trainer`, or be the path of a file"
        msg = f"{location.of(('config',))}{needed}, got {given!r:.80}."
        raise ArgumentError(msg)
    return Configuration(given, location.under(("config",)))


def _build_quietly(configuration: Configuration) -> Callable[[], Built]:
    """Return what makes a run, without logging, checkpoints and bars unless the configuration asks for them."""
    trainer = configuration.tree.get("trainer")
    given = trainer if isinstance(trainer, Mapping) else {}
    callbacks = given.get("callbacks") or []
    items = callbacks if isinstance(callbacks, list) else [callbacks]
    names = [str(each.get("class_path") if isinstance(each, Mapping) else each) for each in items]
    unset = {name: value for name, value in quiet(names).items() if given.get(name) is None}
    return configuration.with_values({f"trainer.{name}": value for name, value in unset.items()}).build


def _located(error: TrickError, location: Location, tree: Mapping[str, Any], configuration: Configuration) -> str:
    """Put the line of the study's key that an error begins with before it."""
    words = str(error)
    key = words[1:].partition("`")[0] if words.startswith("`") else ""
    if key == "trainer":
        return f"{configuration.location.of((key,))}{words}"
    if isinstance(error, TrickConflictError):
        key = "tricks"
    return f"{location.of((key,))}{words}" if key in tree else words
