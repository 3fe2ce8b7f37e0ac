"""Configurations of LightningCLI: read with the line of every key, changed by path, built, and written again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_tricks._core.extras import require
from lightning_tricks._core.lightning import Callback, LightningModule, Trainer, configure, make_callbacks
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    import os

__all__ = ["Built", "Configuration", "Location", "Path_", "build_callbacks", "located", "read_yaml"]

Path_ = tuple[str | int, ...]
"""Keys and indices that lead to a place in a tree."""


class Built(NamedTuple):
    """What a configuration makes."""

    module: LightningModule
    datamodule: Any
    trainer: Trainer


@dataclass(frozen=True)
class Location:
    """Where in a file each part of a tree stands.

    Attributes:
        source: The file; None = nowhere, since the tree was given as a mapping.
        lines: The line of each place, from 1 on.
    """

    source: Path | None = None
    lines: Mapping[Path_, int] = field(default_factory=dict)

    def of(self, place: Sequence[str | int]) -> str:
        """Return ``FILE:LINE: `` of a place, or of the nearest one above it; "" if it is in no file."""
        if self.source is None:
            return ""
        there = next((tuple(place[:length]) for length in range(len(place), -1, -1) if tuple(place[:length]) in self.lines), None)
        return f"{self.source}: " if there is None else f"{self.source}:{self.lines[there]}: "

    def under(self, place: Path_) -> Location:
        """Return the same for the tree at a place."""
        size = len(place)
        return Location(self.source, {each[size:]: line for each, line in self.lines.items() if each[:size] == place})

    def without(self, place: Path_) -> Location:
        """Return the same for the tree from which an item of a list is gone, so that those behind it count one less."""
        *way, item = place
        lines: dict[Path_, int] = {}
        for each, line in self.lines.items():
            index = each[len(way)] if len(each) > len(way) and each[: len(way)] == tuple(way) else None
            if isinstance(index, int) and isinstance(item, int) and index > item:
                lines[(*way, index - 1, *each[len(place) :])] = line
            elif index is None or index != item:
                lines[each] = line
        return Location(self.source, lines)


@contextmanager
def located(location: Location, *place: str | int) -> Iterator[None]:
    """Say in whatever is refused inside where in a file it stands."""
    try:
        yield
    except ArgumentError as error:
        msg = f"{location.of(place)}{error}"
        raise ArgumentError(msg) from error


def read_yaml(path: str | os.PathLike[str]) -> tuple[Any, Location]:
    """Read a YAML file, and the line of each of its keys and items.

    Raises:
        ArgumentError: If there is no such file, or it is no YAML; with the line.
        MissingPackageError: If PyYAML is not installed.
    """
    yaml = require("yaml", package="PyYAML", extra="search", who="Reading YAML")
    path = Path(path)
    if not path.is_file():
        msg = f"`config` must be a YAML file, and '{path}' {'is a folder' if path.is_dir() else 'does not exist'}."
        raise ArgumentError(msg)
    try:
        text = path.read_text(encoding="utf-8")
        tree, root = yaml.load(text, Loader=_loader(yaml)), yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(root, (), yaml)) if root is not None else {}
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: a file of YAML in UTF-8 is needed, and reading it failed: {error}."
        raise ArgumentError(msg) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        msg = f"{path}:{mark.line + 1 if mark else 1}: {getattr(error, 'problem', None) or error}."
        raise ArgumentError(msg) from error
    return tree, Location(path, lines)


def _loader(yaml: Any) -> Any:
    """Return a safe loader to which 1e-3 is a number, as it is to jsonargparse, and not a text, as YAML 1.1 has it."""
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
    return loader


def _lines(node: Any, place: Path_, yaml: Any) -> list[tuple[Path_, int]]:
    found = [(place, node.start_mark.line + 1)]
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.value in lines:
                problem = f"each key must be there once, and {key.value!r} is in line {lines[key.value]}, too"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
            inner = _lines(value, (*place, key.value), yaml)
            found += [((*place, key.value), lines[key.value]), *inner[1:]]
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found += _lines(value, (*place, index), yaml)
    return found


@dataclass(frozen=True)
class Configuration:
    """A configuration of LightningCLI.

    Attributes:
        tree: ``model``, ``data``, ``trainer``, ``optimizer``, … as in its YAML.
        location: Where it was read.
    """

    tree: Mapping[str, Any]
    location: Location = field(default_factory=Location, repr=False, compare=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Configuration:
        """Read a configuration from a YAML file.

        Raises:
            ArgumentError: If it is no mapping with a ``model``; with the line.
        """
        tree, location = read_yaml(path)
        if not isinstance(tree, dict) or "model" not in tree:
            msg = f"{location.of(())}a configuration must be a mapping with `model`, and mostly `data` and `trainer`, got {tree!r:.80}."
            raise ArgumentError(msg)
        return cls(tree, location)

    def find(self, path: str) -> Path_:
        """Return the place that a path such as ``trainer.callbacks.EMA.init_args.decay`` names.

        An item of a list is named by its index or, if it has a ``class_path``, by the last part of that.

        Raises:
            ArgumentError: If a list has no such item, or a part of the path leads into a number or a text.
        """
        place: Path_ = ()
        node: Any = self.tree
        for part in path.split("."):
            if isinstance(node, list):
                index = _index(node, part)
                if index is None:
                    there = ", ".join(_name_of(item) for item in node) or "nothing"
                    msg = f"{self.location.of(place)}`{path}` must lead somewhere: the list has no item {part!r}, but {there}."
                    raise ArgumentError(msg)
                place, node = (*place, index), node[index]
            elif isinstance(node, Mapping) or node is None:
                place, node = (*place, part), None if node is None else node.get(part)
            else:
                msg = f"{self.location.of(place)}`{path}` must lead somewhere: there is {node!r} where {part!r} is looked for."
                raise ArgumentError(msg)
        return place

    def get(self, path: str) -> Any:
        """Return what stands at a path; None where nothing does."""
        node: Any = self.tree
        for part in self.find(path):
            node = None if node is None else node[part] if isinstance(part, int) else node.get(part)
        return node

    def with_values(self, values: Mapping[str, Any]) -> Configuration:
        """Return the configuration with other values at some paths; ``False`` for an item of a list with a ``class_path`` removes it.

        Raises:
            ArgumentError: If a path leads nowhere.
        """
        tree, location = copy.deepcopy(dict(self.tree)), self.location
        removed: list[Path_] = []
        for path, value in values.items():
            place = self.find(path)
            *way, last = place
            node: Any = tree
            for part in way:
                if isinstance(node, list):
                    node = node[int(part)]
                else:
                    node[part] = {} if node.get(part) is None else node[part]
                    node = node[part]
            if isinstance(node, list) and isinstance(value, bool):
                removed += [] if value else [place]
            else:
                node[last] = value
        for place in sorted(removed, reverse=True):  # at last, and from the last on, since paths count items as they were
            node = tree
            for part in place[:-1]:
                node = node[part]
            del node[place[-1]]
            location = location.without(place)
        return Configuration(tree, location)

    def build(self) -> Built:
        """Make the module, the data and the Trainer, as LightningCLI does; the seed is the caller's business.

        Raises:
            ArgumentError: If LightningCLI refuses the configuration, or a constructor its arguments; with the line.
            MissingPackageError: If jsonargparse is not installed.
        """
        require("jsonargparse", package="jsonargparse", extra="cli", who="Building from a configuration")
        try:
            return Built(*configure(self._for_one_run()))
        except (Exception, SystemExit) as error:
            raise _refusal(self.tree, self.location, error) from error

    def _for_one_run(self) -> dict[str, Any]:
        """Return the tree without what LightningCLI writes for its subcommands, and without a seed, which would be that of every run."""
        dropped = {"seed_everything"} | {name for name in ("ckpt_path", "weights_only") if self.tree.get(name) is None}
        return {name: value for name, value in copy.deepcopy(dict(self.tree)).items() if name not in dropped}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as YAML that LightningCLI runs."""
        yaml = require("yaml", package="PyYAML", extra="search", who="Writing YAML")
        Path(path).write_text(yaml.safe_dump(dict(self.tree), sort_keys=False, allow_unicode=True), encoding="utf-8")


def build_callbacks(items: Any, location: Location) -> list[Callback]:
    """Make callbacks from a list of ``class_path`` and ``init_args``, or from one of them.

    Args:
        items: The list.
        location: Where it stands.

    Raises:
        ArgumentError: If one cannot be made; with the line.
        MissingPackageError: If jsonargparse is not installed.
    """
    require("jsonargparse", package="jsonargparse", extra="cli", who="Building from a configuration")
    try:
        return make_callbacks(copy.deepcopy([items] if isinstance(items, Mapping | str) else items))
    except (Exception, SystemExit) as error:
        raise _refusal(items, location, error) from error


def _refusal(tree: Any, location: Location, error: BaseException) -> ArgumentError:
    words = _essence(str(error))
    return ArgumentError(f"{location.of(_blamed(tree, words))}{words}")


def _blamed(tree: Any, words: str) -> Path_:
    """Return the place whose key and value an error's words name, the innermost of several; () if there is none."""

    def named(place: Path_) -> int:
        value: Any = tree
        for part in place:
            value = value[part]
        key_named = isinstance(place[-1], str) and _says(words, rf"[`'\".]{re.escape(place[-1])}['\"`=]")
        value_named = not isinstance(value, Mapping | list | bool | None) and _says(words, rf"(?<!\w){re.escape(str(value))}(?!\w)")
        return 2 * key_named + value_named

    places = {place: named(place) for place in _places(tree, ())}
    best = max(places, key=lambda place: (places[place], len(place)), default=())
    return best if places.get(best) else ()


def _places(tree: Any, place: Path_) -> list[Path_]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    return [each for key, value in items for each in ((*place, key), *_places(value, (*place, key)))]


def _name_of(item: Any) -> str:
    path = item.get("class_path") if isinstance(item, Mapping) else item
    return repr(str(path).rpartition(".")[2]) if path else repr(item)


def _index(items: list[Any], part: str) -> int | None:
    if part.lstrip("-").isdigit():
        return int(part) % len(items) if -len(items) <= int(part) < len(items) else None
    return next((index for index, item in enumerate(items) if _name_of(item) == repr(part.rpartition(".")[2])), None)


def _says(words: str, pattern: str) -> bool:
    return re.search(pattern, words) is not None


def _essence(message: str) -> str:
    """Leave out of an error of jsonargparse what an argument might have been instead."""
    kept = []
    for line in message.partition("Given value")[0].splitlines():
        words = line.strip()
        if words.startswith("- Not a valid subclass"):
            break
        if words and not re.match(r"Does not validate against any|Subtypes: |Errors:|- Expected a <class 'NoneType'>", words):
            kept.append(words.removeprefix("- "))
    return " ".join(kept)
