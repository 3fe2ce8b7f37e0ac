"""The configuration of a search: read, and checked as a whole before anything is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_tricks._core.checks import check_choice, check_count
from lightning_tricks._core.extras import require
from lightning_tricks.errors import ArgumentError
from lightning_tricks.search._configuration import Configuration, Location, located, read_yaml
from lightning_tricks.search._space import Choice, Parameter, Point, active, grid, read_parameter
from lightning_tricks.search._trial import check_metric

__all__ = ["Settings", "Stage", "read_settings"]

_PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "none": "NopPruner"}
_KEYS = ("config", "parameters", "stages", "metric", "mode", "pruner", "seed", "failures", "folder", "storage", "heartbeat", "ray")


@dataclass(frozen=True)
class Stage:
    """One round of a search.

    Attributes:
        sampler: How points are chosen.
        size: How many there are; on a grid, how many values of each range.
    """

    sampler: Literal["grid", "random", "tpe"]
    size: int

    def __str__(self) -> str:
        return f"{self.sampler} {self.size}"


@dataclass(frozen=True)
class Settings:
    """A search, as its configuration describes it.

    Attributes:
        configuration: What is trained.
        space: What varies.
        stages: The rounds.
        metric: What decides, as validation logs it.
        mode: Whether less or more of it is better.
        pruner: Class in `optuna.pruners`, and its arguments.
        seed: Of every training, and of the points drawn.
        failures: How many trials in a row may fail.
        folder: Where the study and the best configuration are kept; its name is the study's.
        storage: Where else the study is kept, as a URL or the path of a journal; None = in the folder.
        heartbeat: Seconds between two signs of life of a worker.
        ray: Arguments of `ray.remote` for each worker.
        location: Where all of it was read.
    """

    configuration: Configuration
    space: tuple[Parameter, ...]
    stages: tuple[Stage, ...]
    metric: str
    mode: Literal["min", "max"]
    pruner: tuple[str, Mapping[str, Any]]
    seed: int
    failures: int
    folder: Path
    storage: str | None
    heartbeat: int
    ray: Mapping[str, Any]
    location: Location = field(repr=False)

    @property
    def definition(self) -> dict[str, Any]:
        """What trials depend on, and all workers must agree about; plain enough for a database."""
        return {
            "config": json.dumps(self.configuration.tree, sort_keys=True, default=str),
            "parameters": json.dumps({each.path: str(each) for each in self.space}, sort_keys=True),
            "paths": [each.path for each in self.space],
            "stages": [str(stage) for stage in self.stages],
            "metric": self.metric,
            "mode": self.mode,
            "seed": self.seed,
        }

    def make_pruner(self) -> Any:
        """Make the pruner.

        Raises:
            ArgumentError: If it does not take the arguments.
        """
        name, arguments = self.pruner
        kind = getattr(require("optuna.pruners", package="Optuna", extra="search", who="A search"), name)
        try:
            return kind(**arguments)
        except (TypeError, ValueError) as error:
            msg = f"{self.location.of(('pruner',))}`pruner` must have arguments of Optuna's {name}, got {dict(arguments)!r}: {error}."
            raise ArgumentError(msg) from error

    def quietly(self, point: Point, root: Path) -> Configuration:
        """Return the configuration at a point, with its files in a folder, and without bars and summaries unless it asks for them."""
        configuration = self.configuration.with_values(point)
        trainer = configuration.tree.get("trainer") or {}
        quiet = {
            "default_root_dir": str(root),
            "enable_progress_bar": "ProgressBar" in str(trainer.get("callbacks")),
            "enable_model_summary": False,
        }
        return configuration.with_values({f"trainer.{key}": value for key, value in quiet.items() if trainer.get(key) is None})

    def check_metric(self) -> None:
        """Evaluate one batch, to see that the metric is logged.

        Raises:
            ArgumentError: If it is not; with the line.
        """
        with located(self.location, "metric"):
            check_metric(self.quietly({}, self.folder / "trials").build, seed=self.seed, metric=self.metric, test=False)

    def check_builds(self) -> None:
        """Let LightningCLI make what the ends of all ranges and each choice describe, so that no trial fails by a wrong configuration.

        Raises:
            ArgumentError: If it refuses one; with the line that is to blame.
        """
        self._build({})
        for point in self._probes():
            try:
                self._build(point)
            except ArgumentError:
                for each in self.space:  # which of them is it?
                    if each.path in point:
                        with located(self.location, "parameters", each.path):
                            self._build({each.path: point[each.path]}, f"`{each.path}` must fit `config`, got {point[each.path]!r}: ")
                raise

    def _probes(self) -> list[Point]:
        """Return points that have the ends of all ranges and each choice among them."""
        ends = {each.path: each.values if isinstance(each, Choice) else (each.low, each.high) for each in self.space}
        switches = {each.path for each in self.space if isinstance(each, Choice) and each.switches}
        rows = [{path: values[min(i, len(values) - 1)] for path, values in ends.items()} for i in range(max(map(len, ends.values())))]
        points = [row | dict.fromkeys(switches, True) for row in rows]
        return [active(self.space, point) for point in [*points, *([points[0] | dict.fromkeys(switches, False)] if switches else [])]]

    def _build(self, point: Point, prefix: str = "") -> None:
        try:
            built = self.configuration.with_values(point).build()
        except ArgumentError as error:
            msg = f"{prefix}{error}"
            raise ArgumentError(msg) from error
        if built.trainer.world_size > 1:
            msg = (
                f"{self.configuration.location.of(('trainer',))}a search trains in one process each, got a Trainer of "
                f"{built.trainer.world_size} processes. Take `devices: 1`, and start as many workers."
            )
            raise ArgumentError(msg)


def read_settings(config: str | os.PathLike[str] | Mapping[str, Any]) -> Settings:
    """Read the configuration of a search.

    Args:
        config: A YAML file, or what it would hold.

    Raises:
        ArgumentError: If something is missing or wrong; with the line.
    """
    tree, location = (config, Location()) if isinstance(config, Mapping) else read_yaml(config)
    home = Path() if location.source is None else location.source.parent
    if not isinstance(tree, Mapping):
        msg = f"{location.of(())}the configuration of a search must be a mapping with `config`, `parameters`, …, got {tree!r:.80}."
        raise ArgumentError(msg)
    for key in tree:
        if key not in _KEYS:
            msg = f"{location.of((key,))}the configuration of a search must have no other keys than {', '.join(_KEYS)}, got {key!r}."
            raise ArgumentError(msg)
    for key in ("config", "parameters", "stages", "metric"):
        if not tree.get(key):
            msg = f"{location.of((key,))}the configuration of a search must have `{key}`, got {tree.get(key)!r}."
            raise ArgumentError(msg)
    configuration = _configuration(tree["config"], home, location)
    seed = configuration.tree.get("seed_everything")
    counts = {"seed": 0 if seed is None or isinstance(seed, bool) else seed, "failures": 5, "heartbeat": 10}
    for key, default in counts.items():
        with located(location, key):
            counts[key] = check_count(key, tree.get(key, default), least=int(key != "seed"))
            if counts["seed"] >= 2**32:
                msg = f"`seed` must be smaller than 2³², got {counts['seed']}."
                raise ArgumentError(msg)
    _check_kinds(tree, location)
    with located(location, "mode"):
        mode: Literal["min", "max"] = check_choice("mode", tree.get("mode", "min"), ("min", "max"))
    found = Settings(
        configuration=configuration,
        space=tuple(_space(tree["parameters"], configuration, location)),
        stages=tuple(_stages(tree["stages"], location)),
        metric=tree["metric"],
        mode=mode,
        pruner=_pruner(tree.get("pruner", "median"), location),
        seed=counts["seed"],
        failures=counts["failures"],
        folder=Path(tree.get("folder") or Path("runs") / (location.source.stem if location.source else "search")),
        storage=tree.get("storage"),
        heartbeat=counts["heartbeat"],
        ray=tree.get("ray") or {},
        location=location,
    )
    for index, stage in enumerate(found.stages):
        with located(location, "stages", index):  # a grid that is too large, or has more values than there are
            grid(found.space, stage.size if stage.sampler == "grid" else 2, inside=False)
    return found


def _check_kinds(tree: Mapping[str, Any], location: Location) -> None:
    kinds = {
        "metric": (str, "the name of what validation logs"),
        "folder": (str | os.PathLike, "the path of a folder"),
        "storage": (str, "a URL, or the path of a journal"),
        "ray": (Mapping, "a mapping with arguments of `ray.remote`"),
    }
    for key, (kind, what) in kinds.items():
        if tree.get(key) is not None and not isinstance(tree[key], kind):
            msg = f"{location.of((key,))}`{key}` must be {what}, got {tree[key]!r}."
            raise ArgumentError(msg)


def _configuration(given: Any, home: Path, location: Location) -> Configuration:
    if isinstance(given, Mapping):
        return Configuration(given, location.under(("config",)))
    with located(location, "config"):
        if not isinstance(given, str):
            msg = f"`config` must be the path of a configuration of LightningCLI, or what it holds, got {given!r}."
            raise ArgumentError(msg)
        path = home / given
        if not path.is_file():
            msg = f"`config` must be a YAML file, and '{path}' {'is a folder' if path.is_dir() else 'does not exist'}."
            raise ArgumentError(msg)
    return Configuration.read(path)


def _space(given: Any, configuration: Configuration, location: Location) -> list[Parameter]:
    space: list[Parameter] = []
    for path, values in given.items() if isinstance(given, Mapping) else [(None, given)]:
        with located(location, "parameters", *([path] if path else [])):
            if not isinstance(path, str):
                msg = f"`parameters` must map paths of `config`, such as 'model.init_args.lr', to values, got {given!r:.80}."
                raise ArgumentError(msg)
            parameter = read_parameter(path, configuration.find(path), values)
            for other in space:
                _check_apart(other, parameter)
            space.append(parameter)
    return space


def _check_apart(one: Parameter, other: Parameter) -> None:
    """Refuse what overwrites each other; what belongs to an item that is taken in and out does not."""
    outer, inner = sorted((one, other), key=lambda each: len(each.place))
    switch = isinstance(outer, Choice) and outer.switches and outer.place != inner.place
    if inner.place[: len(outer.place)] == outer.place and not switch:
        msg = f"`{other.path}` must lead to another place than `{one.path}`, since one would overwrite the other."
        raise ArgumentError(msg)


def _stages(given: Any, location: Location) -> list[Stage]:
    stages = []
    for index, stage in enumerate(given if isinstance(given, list) else [given]):
        with located(location, "stages", index):
            if not isinstance(stage, Mapping) or "sampler" not in stage:
                msg = f"A stage must be a mapping with `sampler`, and `trials` or `count`, got {stage!r}."
                raise ArgumentError(msg)
            sampler = check_choice("sampler", stage["sampler"], ("grid", "random", "tpe"))
            size = "count" if sampler == "grid" else "trials"
            if stage.keys() - {"sampler", size} or size not in stage:
                what = "`count`, the number of values of each range" if sampler == "grid" else "`trials`, their number"
                msg = f"A stage with the sampler {sampler!r} must have {what}, and nothing else, got {dict(stage)!r}."
                raise ArgumentError(msg)
            stages.append(Stage(sampler, check_count(size, stage[size], least=1)))
    return stages


def _pruner(given: Any, location: Location) -> tuple[str, Mapping[str, Any]]:
    arguments = dict(given) if isinstance(given, Mapping) else {"name": given}
    with located(location, "pruner"):
        name = "none" if arguments.get("name") is None else check_choice("pruner", arguments["name"], tuple(_PRUNERS))
    return _PRUNERS[name], {key: value for key, value in arguments.items() if key != "name"}
