"""Soups: one model from the average of several fine-tuned ones.

Models fine-tuned from the same start with different learning rates, augmentations or seeds often lie in one basin of the loss, so that
the mean of their weights is a good model too, at the inference cost of one. The uniform soup averages all of them; the greedy soup adds
them from the best downwards and keeps those that help on held-out data.

Source: M. Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time", ICML, 2022.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks._core.files import check_paths, read_state_dict
from lightning_tricks._core.weights import memory
from lightning_tricks.errors import ArgumentError, CheckpointError

__all__ = ["Soup", "greedy_soup", "uniform_soup"]


@dataclass(frozen=True, eq=False)
class Soup:
    """What `greedy_soup` found.

    Args:
        state_dict: The mean of the members' weights, for ``model.load_state_dict``.
        members: The paths of the models in the soup, in the order in which they were added: the best single one first.
        score: The score of the soup.
        scores: The score of each single model by its path, in the order given.

    Example:
        >>> Soup({}, members=(Path("a.ckpt"),), score=0.9, scores={Path("a.ckpt"): 0.9}).score
        0.9
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    members: tuple[Path, ...]
    score: float
    scores: dict[Path, float]


def uniform_soup(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Tensor]:
    """Average the weights of checkpoints: ``w = (w_1 + … + w_n) / n``.

    Reach for it when several fine-tuned copies of one model are about equally good; `greedy_soup` also copes with poor ones.

    Args:
        paths: Files of one model, such as fine-tuned copies of it: Lightning checkpoints, whose ``"state_dict"`` is used (with `EMA`,
            that is the average it deploys), or state dicts saved by ``torch.save``. A path given twice counts twice.

    Returns:
        The mean as a state dict on the CPU. Floating-point and complex tensors are summed in double precision and have the dtype of
        the files; a value that is the same infinity in every file stays so. Integer and boolean tensors, and extra states, are
        those of the first file. One sum and one checkpoint are in memory at a time.

    Raises:
        ArgumentError: If `paths` holds no path, or something else.
        CheckpointError: If a file cannot be read or holds no state dict, or if names, shapes or dtypes differ between files.

    Note:
        The mean of BatchNorm's statistics is not the statistics of the mean: compute them anew on training data before using the soup.

    References:
        M. Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
        time", ICML, 2022.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, value in (("a.pt", 1.0), ("b.pt", 4.0)):
        ...         torch.save({"weight": torch.tensor([value, 0.0])}, Path(folder, name))
        ...     uniform_soup(sorted(Path(folder).glob("*.pt")))["weight"]
        tensor([2.5000, 0.0000])
    """
    first, *others = check_paths(paths)
    soup = _Sum(first)
    for path in others:
        soup.add(soup.load(path))
    return soup.mean()


def greedy_soup(paths: Iterable[str | os.PathLike[str]], score: Callable[[dict[str, Tensor]], float]) -> Soup:
    """Average those checkpoints that together score best: from the best downwards, add each that makes the mean better.

    ``S ← (w_1)``; for k = 2, …, n in descending order of score: ``S ← (S, w_k)`` if ``score(mean(S, w_k)) > score(mean(S))``.

    Reach for it when some of several fine-tuned copies of one model may be poor. The soup scores no lower than the best of them on the
    data that `score` uses; keep other data for the final test. For CLIP ViT-B/32 on ImageNet, the paper reports 80.39 % for the best
    single model, 79.97 % for the uniform and 81.03 % for the greedy soup.

    Args:
        paths: Files of one model, as for `uniform_soup`. A path given twice is tried once.
        score: Takes a state dict and returns a number; higher is better. For a loss, return its negative. It is called once for each
            single model, in the order given, and once for each mean that is tried: 2n − 1 times for n paths.

    Returns:
        The soup, with its members and all scores. Models of equal score are tried in the order given. Integer and boolean tensors,
        and extra states, are those of the best single model.

    Raises:
        ArgumentError: If `paths` holds no path, or something else; or if `score` is no function, or returns no finite number.
        CheckpointError: If a file cannot be read or holds no state dict, or if names, shapes or dtypes differ between files; this is
            checked before anything is scored.

    Note:
        One sum in double precision, one checkpoint and one mean are in memory at a time. In a model with BatchNorm, `score` should
        load the weights, compute the statistics anew on training data, and then measure.

    References:
        M. Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
        time", ICML, 2022. Differs from the paper's recipe in that a model which leaves the score equal is not added.

    Example:
        >>> import tempfile
        >>> def closeness(state_dict):  # to 2
        ...     return -abs(state_dict["weight"].item() - 2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [Path(folder, name) for name in ("a.pt", "b.pt", "c.pt")]
        ...     for path, value in zip(paths, (1.0, 2.5, 9.0)):
        ...         torch.save({"weight": torch.tensor([value])}, path)
        ...     soup = greedy_soup(paths, closeness)
        >>> [path.name for path in soup.members], soup.score, soup.state_dict["weight"]
        (['b.pt', 'a.pt'], -0.25, tensor([1.7500]))
    """
    files = tuple(dict.fromkeys(check_paths(paths)))
    if not callable(score):
        msg = f"`score` must be a function that takes a state dict and returns a number, got {score!r}."
        raise ArgumentError(msg)
    entries = _entries(read_state_dict(files[0]))
    for path in files[1:]:
        _check_agreement(path, _entries(read_state_dict(path)), files[0], entries)
    scores = {path: _check_score(score(read_state_dict(path)), str(path)) for path in files}
    best, *others = sorted(files, key=lambda path: scores[path], reverse=True)
    soup, members, highest = _Sum(best), [best], scores[best]
    for path in others:
        weights = soup.load(path)
        found = _check_score(score(soup.mean(weights)), " + ".join(map(str, [*members, path])))
        if found > highest:
            highest = found
            members.append(path)
            soup.add(weights)
        del weights  # before the next are loaded
    return Soup(soup.mean(), tuple(members), highest, scores)


class _Sum:
    """The sum of checkpoints in double precision, and their mean in their own."""

    def __init__(self, path: Path) -> None:
        first = read_state_dict(path)
        self._path, self._entries, self._count = path, _entries(first), 1
        self._sums = {name: _precise(value) for name, value in first.items() if _is_averaged(value)}
        self._dtypes = {name: first[name].dtype for name in self._sums}
        self._tied = _ties(first)
        # The template keeps the first file's order, its versions of modules (`_metadata`), and what is not averaged.
        self._template = copy(first)
        self._template.update({name: None if name in self._sums else _own(value) for name, value in first.items()})

    def load(self, path: Path) -> dict[str, Any]:
        weights = read_state_dict(path)
        _check_agreement(path, _entries(weights), self._path, self._entries)
        return weights

    def add(self, weights: Mapping[str, Any]) -> None:
        for name, total in self._sums.items():
            total.add_(_precise(weights[name]))
        self._count += 1

    def mean(self, extra: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Return the mean of what was added and, if given, of one more checkpoint; weights tied in the first file stay tied."""
        soup = copy(self._template)
        for name in soup:
            if name not in self._sums:
                soup[name] = _own(soup[name])
                continue
            total = self._sums[name] if extra is None else _precise(extra[name]).add_(self._sums[name])
            mean = (total / (self._count + (extra is not None))).to(self._dtypes[name])
            tied = soup.get(self._tied.get(name, name))
            soup[name] = tied if tied is not None and torch.equal(tied, mean) else mean
        return soup


def _is_averaged(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _precise(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)


def _ties(weights: Mapping[str, Any]) -> dict[str, str]:
    """Return, for each further name of a tensor, its first name."""
    first: dict[object, str] = {}
    tensors = {name: value for name, value in weights.items() if _is_averaged(value) and value.numel()}
    names = {name: first.setdefault((memory(value), value.shape, value.stride(), value.dtype), name) for name, value in tensors.items()}
    return {name: tied for name, tied in names.items() if name != tied}


def _entries(weights: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else "something other than a tensor"
        for name, value in weights.items()
    }


def _check_agreement(path: Path, found: Mapping[str, str], first: Path, needed: Mapping[str, str]) -> None:
    for name in (*needed, *found):
        if needed.get(name) != found.get(name):
            msg = (
                "The checkpoints of a soup must agree in names, shapes and dtypes: "
                f"'{path}' has {found.get(name, 'nothing')} under {name!r}, and '{first}' has {needed.get(name, 'nothing')}. "
                "Give checkpoints of one model, saved in one precision."
            )
            raise CheckpointError(msg)


def _check_score(value: object, what: str) -> float:
    number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    score = float(value.detach() if isinstance(value, Tensor) else value) if number else math.nan  # type: ignore[arg-type]
    if not math.isfinite(score):
        msg = f"`score` must return a finite number, higher for better, got {value!r} for '{what}'. Leave that out, or mend `score`."
        raise ArgumentError(msg)
    return score
