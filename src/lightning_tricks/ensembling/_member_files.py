"""The folder of an ensemble that is trained member by member: what it is of, and what is finished."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_tricks._core.files import whole_file
from lightning_tricks._core.tensor_files import SUFFIX, TensorFiles, digest_of, finish_file, sweep_unfinished, write_unfinished
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["MemberFiles", "describe", "tensors_of"]

_SETTINGS = "ensemble.json"
_VERSION = 1


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict.

    Raises:
        TrickError: If it holds anything else than tensors.
    """
    state = module.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        msg = (
            f"Members are stored as tensors, and {type(module).__name__} has something else in its state dict under {odd[0]!r}. Keep that "
            "elsewhere, or make it a buffer."
        )
        raise TrickError(msg)
    return state


def describe(module: nn.Module) -> dict[str, Any]:
    """Return what tells members of one kind from others, as far as it can be written down."""
    tensors = {
        name: "not initialized" if is_lazy(value) else f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for name, value in tensors_of(module).items()
    }
    given: Mapping[str, Any] = getattr(module, "hparams", {})
    plain = {name: value for name, value in given.items() if isinstance(value, int | float | str | None)}
    return {"module": type(module).__qualname__, "hyperparameters": plain, "tensors": tensors}


class MemberFiles:
    """For each finished member a file of weights, if bagged one of predictions, and a record with their digests, which is written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, settings: dict[str, Any]) -> None:
        """Note what the ensemble is of, or check that it is what was noted.

        Raises:
            ArgumentError: If the folder is that of another ensemble.
            CheckpointError: If its record is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep_unfinished(self.folder)
        found, settings = self.settings(), {"version": _VERSION, **settings}
        if found is None:
            self._write(self.folder / _SETTINGS, settings)
            return
        for key in settings:
            _compare(self.folder, key, found.get(key), settings[key])

    def settings(self) -> dict[str, Any] | None:
        """Return what the ensemble was noted to be of, or None if the folder is new."""
        return _read(self.folder / _SETTINGS)

    def weights(self, member: int) -> Path:
        """Return where a member's weights are."""
        return self.folder / f"member-{member}{SUFFIX}"

    def predictions(self, member: int) -> Path:
        """Return where a member's out-of-bag predictions are."""
        return self.folder / f"member-{member}.out-of-bag{SUFFIX}"

    def progress(self, member: int | str) -> Path:
        """Return where the checkpoint of a member in training is."""
        return self.folder / f"member-{member}.ckpt"

    def record(self, member: int) -> dict[str, Any] | None:
        """Return what was noted of a finished member, or None if it is not finished.

        Raises:
            CheckpointError: If one of its files is missing or altered, or the record is damaged.
        """
        record = _read(self._record(member))
        for name, digest in (record or {}).get("digests", {}).items():
            path = self.folder / name
            if not path.is_file() or digest_of(path) != digest:
                found = "has been altered or cut short" if path.is_file() else "does not exist"
                msg = (
                    f"'{path}' must hold what was written when member {member} was finished, and {found}. Restore it, or delete "
                    f"'{self._record(member)}' to train the member anew."
                )
                raise CheckpointError(msg)
        return record

    def finish(self, member: int, state: Mapping[str, Tensor], out_of_bag: Mapping[str, Tensor] | None, record: dict[str, Any]) -> None:
        """Write a member's files."""
        digests = {}
        for path, tensors in ((self.weights(member), state), (self.predictions(member), out_of_bag)):
            if tensors is not None:
                unfinished, digests[path.name] = write_unfinished(self.folder, tensors, tensors)
                finish_file(unfinished, path)
        self._write(self._record(member), {**record, "digests": digests})
        self.progress(member).unlink(missing_ok=True)

    def read(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors in a file."""
        return TensorFiles([path]).wholes()

    def _record(self, member: int) -> Path:
        return self.folder / f"member-{member}.json"

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        msg = f"'{path}' must be a record of an ensemble, and it is damaged: {content}. Restore it, or use another folder."
        raise CheckpointError(msg)
    return content


def _compare(folder: Path, key: str, there: Any, here: Any) -> None:
    """Refuse a folder whose ensemble differs in a setting, and name the difference as closely as it goes."""
    if there == here:
        return
    if isinstance(there, dict) and isinstance(here, dict):
        key, there, here = next(
            (f"{key}[{name!r}]", there.get(name, "absent"), here.get(name, "absent"))
            for name in {**there, **here}
            if there.get(name, "absent") != here.get(name, "absent")
        )
    msg = (
        f"`folder` must be new, or hold this ensemble: in '{folder}' is one with {key} = {there!r}, and this call has {here!r}. "
        "Use another folder, or the same settings."
    )
    raise ArgumentError(msg)
