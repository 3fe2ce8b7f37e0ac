"""Averages stored during training, from which the average of any length is made afterwards.

A snapshot is a folder. Each rank that owns parts of the model writes one file with them, so that nothing is gathered; reading needs
neither the ranks nor a process group. Folders are never written to again, and each names those before it, so that snapshots which a
run left behind when it was stopped and resumed from earlier are not taken for its own.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from lightning_tricks._core.files import whole_file
from lightning_tricks._core.shards import Runs, Shards
from lightning_tricks._core.strategies import holder_of, own_part, region_of, return_to_shards, stored_tensors
from lightning_tricks._core.weights import memory
from lightning_tricks.averaging._power_ema import power_ema_gamma, synthesis_coefficients
from lightning_tricks.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lightning_tricks.averaging._averages import Averages

__all__ = ["Stored", "claim_folder", "synthesize", "synthesize_ema", "write_snapshot"]

_VERSION = 1

Stored = dict[str, tuple[int, int]]
"""Address and version of each tensor that stays as it is, when it was stored last."""


def synthesize_ema(snapshot: str | os.PathLike[str], sigma_rel: float) -> dict[str, Tensor]:
    """Make the exponential moving average of any length from the snapshots of `PostHocEMA`, after training.

    Of averages ``e_i`` with profiles ``p_i``, it is ``Σ x_i e_i`` with the x that minimize ``‖Σ x_i p_i − p‖²`` under ``Σ x_i = 1``,
    where p is the profile of the average that is sought.

    Args:
        snapshot: Folder of a snapshot, which names those before it. The average is the one at its step.
        sigma_rel: Width σ of the average's profile over training, as a share of training, in (0, 1/√12). The error is small between
            the widths that were tracked and grows outside.

    Returns:
        A state dict on the CPU, whole whatever the number of ranks that wrote the files. Sums are taken in float64 and have the dtype
        of the model. What was not averaged is as it was at the snapshot.

    Raises:
        ArgumentError: If `sigma_rel` lies outside its domain.
        CheckpointError: If a file is missing, damaged, or does not belong to the others.

    References:
        T. Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR, 2024, section 3 and appendix C.
        Differs from the paper in that the coefficients add up to one.

    Example:
        >>> import tempfile
        >>> try:
        ...     synthesize_ema(tempfile.gettempdir() + "/none", 0.08)
        ... except CheckpointError as error:
        ...     print(str(error).partition(" with files")[0].replace(tempfile.gettempdir(), ""))
        A snapshot must be a folder
    """
    return synthesize(Path(snapshot), sigma_rel, lambda _, whole: whole)


def synthesize(folder: Path, sigma_rel: float, finish: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Do what `synthesize_ema` does, and hand each whole tensor, with its name, to `finish` for what is to be kept of it."""
    gamma = power_ema_gamma(sigma_rel)
    chain = _chain(folder)
    state: dict[str, Tensor] = {}
    for name, entry in chain[-1].entries.items():
        if entry["tied"] is None:
            whole = _unchanged(chain, name) if entry["age"] is None else _averaged(chain, name, gamma)
            state[name] = finish(name, whole.to(getattr(torch, entry["dtype"])))
        else:
            state[name] = state[entry["tied"]]
    return state


def claim_folder(parent: Path, step: int) -> Path:
    """Make a new folder for a snapshot; one of the same step stays as it is."""
    version = 0
    while True:
        folder = parent / (f"step={step}-v{version}" if version else f"step={step}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            version += 1
        else:
            return folder


def write_snapshot(
    folder: Path, averages: Averages, sigma_rel: Sequence[float], earlier: Sequence[Path], stored: Stored, *, rank: int, ranks: int
) -> None:
    """Write this rank's part of a snapshot. All ranks must call this.

    Args:
        folder: A new folder.
        averages: The averages.
        sigma_rel: Their lengths.
        earlier: Folders of the snapshots before, oldest first.
        stored: What has been stored already and has not changed since is left out; this is brought up to date.
        rank: This rank.
        ranks: Number of ranks.
    """
    return_to_shards(averages.module)
    sharded = any(isinstance(tensor, Shards) for tensor in stored_tensors(averages.module).values())
    if not sharded and rank > 0:
        return
    record = {
        "version": _VERSION,
        "sigma_rel": list(sigma_rel),
        "earlier": [os.path.relpath(path, folder.parent) for path in earlier],
        "entries": _entries(averages, stored),
    }
    path = folder / f"part_{rank if sharded else 0}_of_{ranks if sharded else 1}.pt"
    with whole_file(path) as unfinished:
        torch.save(record, unfinished)


def _entries(averages: Averages, stored: Stored) -> dict[str, dict[str, Any]]:
    """Describe each tensor of the model's state dict, with this rank's part of its averages or, if it has none, of itself."""
    kinds = [averages.averaged(), *averages.others().values()]
    ages = {name: track.age for track in averages.tracks for name in track.names}
    holders = {name: place.holder for track in averages.tracks for name, place in track.places.items() if name in ages}
    by_identity = {id(holder): name for name, holder in holders.items()}
    by_memory = {memory(holder): name for name, holder in holders.items() if own_part(holder).numel()}
    first: dict[int, str] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, tensor in stored_tensors(averages.module).items():
        holder, own = holder_of(tensor), own_part(tensor)
        if is_lazy(holder):
            continue
        tied = first.setdefault(id(holder), name)
        source = by_identity.get(id(holder))
        if source is None and not isinstance(tensor, Runs) and own.numel():
            source = by_memory.get(memory(own))
        if source is None:
            values, state = [own], (memory(own)[0], own._version)
            same = isinstance(holder, torch.nn.Parameter) and stored.get(name) == state
            stored[name] = state
        else:
            values, same = [kind[source] for kind in kinds], False
            if holder is not holders[source] and holder.stride() != holders[source].stride():  # another view of the same memory
                values = [value.as_strided(holder.shape, holder.stride()) for value in values]
        region = region_of(tensor) if tied == name and not same else None
        entries[name] = {
            "tied": None if tied == name else tied,
            "age": None if source is None else ages[source],
            "earlier": same,
            "dtype": str(own.dtype).removeprefix("torch."),
            "shape": tuple(tensor.shape),
            "region": region,
            "values": [] if region is None else [value.detach().to("cpu", copy=True) for value in values],
        }
    return entries


class _Snapshot:
    """A snapshot that is read, tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = sorted(folder.glob("part_*_of_*.pt"))
        if not found:
            what = "holds none" if folder.is_dir() else "does not exist"
            msg = (
                f"A snapshot must be a folder with files such as 'part_0_of_1.pt', and '{folder}' {what}. Give a snapshot of PostHocEMA; "
                "if snapshots have been moved, move all of them together, and pass the folder above them as `dirpath`."
            )
            raise CheckpointError(msg)
        ranks = found[0].stem.rpartition("_")[2]
        self._files = [folder / f"part_{rank}_of_{ranks}.pt" for rank in range(int(ranks))]
        self._parts = [_load(file) for file in self._files]
        self.sigma_rel: list[float] = self._parts[0]["sigma_rel"]
        self.earlier: list[str] = self._parts[0]["earlier"]
        self.entries: dict[str, dict[str, Any]] = self._parts[0]["entries"]

    def precise(self, name: str) -> torch.dtype:
        """Return the dtype for sums of a tensor."""
        return torch.complex128 if getattr(torch, self.entries[name]["dtype"]).is_complex else torch.float64

    def value(self, name: str, kind: int, dtype: torch.dtype) -> Tensor:
        """Return a whole tensor of one kind: with averages, of one length.

        Raises:
            CheckpointError: If the parts do not make a whole.
        """
        try:
            shape, regions = self.entries[name]["shape"], set()
            whole = torch.empty(shape, dtype=dtype)
            for part in self._parts:
                region, values = part["entries"][name]["region"], part["entries"][name]["values"]
                if region is not None:
                    whole.as_strided(*region).copy_(values[kind])
                    regions.add(region)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise _damaged(self._files[0], error) from error
        covered = sum(math.prod(size) for size, *_ in regions)  # several ranks may have written the same
        if covered != math.prod(shape):
            raise _damaged(self._files[0], f"{covered} of {math.prod(shape)} elements of {name!r} are there")
        return whole


def _chain(folder: Path) -> list[_Snapshot]:
    """Open a snapshot and those before it, oldest first."""
    last = _Snapshot(folder)
    chain = [*(_Snapshot((folder.parent / path).resolve()) for path in last.earlier), last]
    for snapshot in chain:
        if snapshot.sigma_rel != last.sigma_rel:
            msg = (
                f"Snapshots of one run must agree in `sigma_rel`: '{snapshot.folder}' has {snapshot.sigma_rel}, and '{folder}' has "
                f"{last.sigma_rel}. Restore the folder that was written before '{folder}'."
            )
            raise CheckpointError(msg)
    return chain


def _averaged(chain: Sequence[_Snapshot], name: str, gamma: float) -> Tensor:
    """Return the average of a tensor that has the exponent `gamma`, in double precision."""
    last, precise = chain[-1], chain[-1].precise(name)
    ages = {one.entries[name]["age"]: one for one in chain if name in one.entries and one.entries[name]["age"]}
    if not ages:  # its optimizer has not stepped
        return last.value(name, 0, precise)
    gammas = tuple(map(power_ema_gamma, last.sigma_rel))
    whole = torch.zeros(last.entries[name]["shape"], dtype=precise)
    for age, row in zip(ages, synthesis_coefficients(tuple(ages), gammas, max(ages), gamma), strict=True):
        for kind, coefficient in enumerate(row):
            whole.add_(ages[age].value(name, kind, precise), alpha=coefficient)
    return whole


def _unchanged(chain: Sequence[_Snapshot], name: str) -> Tensor:
    """Return a tensor that is not averaged, from the latest snapshot that has it."""
    source = next((one for one in reversed(chain) if name in one.entries and not one.entries[name]["earlier"]), chain[-1])
    return source.value(name, 0, getattr(torch, source.entries[name]["dtype"]))


def _load(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        msg = f"The snapshot's file '{file}' is missing. Restore it; without it, averages can be made at the steps before it only."
        raise CheckpointError(msg)
    try:
        record = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise _damaged(file, error) from error
    if not isinstance(record, dict) or record.get("version") != _VERSION or not {"sigma_rel", "earlier", "entries"} <= record.keys():
        raise _damaged(file, f"no record of version {_VERSION}")
    return record


def _damaged(file: Path, reason: object) -> CheckpointError:
    found = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
    msg = f"The snapshot's file '{file}' is damaged ({found}). Restore it; without it, averages can be made at the steps before it only."
    return CheckpointError(msg)
