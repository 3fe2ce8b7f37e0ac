"""The checkpoint files of a run, and by which aliases they are found."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_tricks._core.checkpoint import read_entry
from lightning_tricks._core.exhibits import WeightFiles

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["checkpoint_files"]


def checkpoint_files(savers: Sequence[Any], which: Literal["best", "all"], state_key: str) -> list[tuple[WeightFiles, list[str]]]:
    """Return checkpoints that exist and are whole, the latest last, each with what is known of it and its aliases.

    ``best`` is that of the first callback that monitors a metric, ``best-<metric>`` those of others, and ``latest`` the one that was
    written last; ``averaged`` or ``raw`` tells what its state dict holds, where the file says so.

    Args:
        savers: The callbacks that write checkpoints.
        which: The best and the latest, or all of which the callbacks keep account.
        state_key: Under which the file says what its state dict holds.
    """
    aliases: dict[Path, list[str]] = {}
    scores: dict[Path, dict[str, Any]] = {}
    for saver in savers:
        monitor, best = getattr(saver, "monitor", None), getattr(saver, "best_model_path", "")
        kept: dict[str, Any] = getattr(saver, "best_k_models", {})
        for path in (best, getattr(saver, "last_model_path", ""), *kept):
            if _is_whole(path):
                aliases.setdefault(Path(path), [])
                score = kept.get(path)
                scores.setdefault(Path(path), {}).update({} if score is None else {"monitor": monitor, "score": float(score)})
        if monitor is not None and Path(best) in aliases:
            taken = any("best" in each for each in aliases.values())
            aliases[Path(best)].append("best-" + re.sub(r"[^\w.-]+", "-", monitor) if taken else "best")
    ordered = sorted(aliases, key=lambda path: path.stat().st_mtime_ns)
    if ordered:
        aliases[ordered[-1]].append("latest")
    found = []
    for path in ordered:
        if which == "all" or aliases[path]:
            weights = _weights_in(path, state_key)
            facts = {"original_filename": path.name, **scores[path], **({"weights": weights} if weights else {})}
            found.append((WeightFiles(path.name, (path,), facts), [*aliases[path], *([weights] if weights else [])]))
    return found


def _is_whole(path: str) -> bool:
    """Tell whether a checkpoint is on this file system, and not half written in the background."""
    return bool(path) and (Path(path).is_dir() or (Path(path).is_file() and zipfile.is_zipfile(path)))


def _weights_in(path: Path, state_key: str) -> str | None:
    """Return what a checkpoint says of its state dict, without reading tensors; None if it says nothing, or cannot be read safely."""
    try:
        checkpoint = torch.load(path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True)
        entry = read_entry(checkpoint, state_key)
    except Exception:  # noqa: BLE001 -- of other people's objects, or of none that torch wrote
        return None
    return None if entry is None else entry.get("weights")
