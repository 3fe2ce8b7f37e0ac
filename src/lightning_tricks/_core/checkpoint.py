"""What tricks leave in a checkpoint: ``checkpoint["lightning_tricks"]``, a version and one entry per state key.

An entry holds plain containers, numbers, texts and tensors only, so that it loads under ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_tricks._core.strategies import named_tensors, own_part
from lightning_tricks.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn

__all__ = ["check_tensors", "other_entries", "read_changes", "read_entry", "write_change", "write_entry"]

_KEY = "lightning_tricks"
_VERSION = 1
_CHANGES = "changes"


def write_entry(checkpoint: dict[str, Any], state_key: str, trick: str, entry: dict[str, Any]) -> None:
    """Record a trick. The mark under ``callbacks`` makes Lightning warn when a run is resumed without it."""
    checkpoint.setdefault(_KEY, {"version": _VERSION})[state_key] = {"trick": trick, **entry}
    checkpoint.setdefault("callbacks", {})[state_key] = {"trick": trick}


def read_entry(checkpoint: Mapping[str, Any], state_key: str) -> dict[str, Any] | None:
    """Return a trick's entry, or None if the checkpoint was made without it.

    Raises:
        CheckpointError: If the record is of a version we do not know, or is not a record at all.
    """
    entry = _record(checkpoint).get(state_key)
    if entry is not None and not isinstance(entry, dict):
        found = type(entry).__name__
        msg = f"The checkpoint's entry for {state_key} must be a dict, found a {found}. Nothing of it was loaded; the file is damaged."
        raise CheckpointError(msg)
    return entry


def _record(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    record = checkpoint.get(_KEY)
    if record is None:
        return {}
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        found = f"version {record.get('version')!r}" if isinstance(record, dict) else f"a {type(record).__name__}"
        msg = (
            f"`checkpoint['{_KEY}']` must be a record of version {_VERSION}, found {found}. Nothing of it was loaded. "
            "Upgrade lightning-tricks if a newer release wrote the file; otherwise the file is damaged."
        )
        raise CheckpointError(msg)
    return record


def write_change(checkpoint: dict[str, Any], function: str, arguments: Mapping[str, Any]) -> None:
    """Record that ``functional.FUNCTION(model, **arguments)`` has changed the model's keys, after the changes recorded before."""
    record = checkpoint.setdefault(_KEY, {"version": _VERSION})
    record.setdefault(_CHANGES, []).append({"function": function, "arguments": dict(arguments)})


def read_changes(checkpoint: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the changes to the model's keys in their order, each as a function's name and arguments.

    Raises:
        CheckpointError: If the record is of a version we do not know, or is not a record at all.
    """
    return [(change["function"], change["arguments"]) for change in _record(checkpoint).get(_CHANGES, [])]


def other_entries(checkpoint: Mapping[str, Any], present: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the entries of tricks that are not there, by state key."""
    record = checkpoint.get(_KEY) or {}
    return {key: entry for key, entry in record.items() if isinstance(entry, dict) and key not in present}


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], state_key: str, *, parts: bool = False) -> None:
    """Check that stored tensors, or this rank's parts of them, fit the model, before any is used.

    Raises:
        CheckpointError: If a name is unknown to the model or a shape differs.
    """
    own = {name: own_part(tensor) if parts else tensor for name, tensor in named_tensors(module).items()}
    for name, tensor in tensors.items():
        needed = f"shape {tuple(own[name].shape)}" if name in own else "no tensor of that name"
        found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        if needed != found:
            msg = (
                f"The checkpoint's entry for {state_key} must fit the model: {name!r} has {found} there, and {type(module).__name__} has "
                f"{needed}. Nothing of it was loaded. Resume with the model that wrote the checkpoint."
            )
            raise CheckpointError(msg)
