"""Post-hoc EMA: choose the length of the exponential moving average after training.

How long an average should be depends on the model, the data and the training time, and a wrong length can cost more than the average
gains. During training, this keeps averages of two lengths and stores snapshots of both from time to time. Afterwards the average of
any length follows from the snapshots by least squares, without another run.

Source: T. Karras, M. Aittala, J. Lehtinen, J. Hellsten, T. Aila and S. Laine, "Analyzing and Improving the Training Dynamics of
Diffusion Models", CVPR, 2024, section 3 and appendix C.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tricks._core.checkpoint import read_entry
from lightning_tricks._core.checks import check_path
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.exhibits import Exhibits, Table
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, override
from lightning_tricks._core.shards import Runs
from lightning_tricks._core.strategies import as_sharded, cut, named_tensors, own_part
from lightning_tricks.averaging._average import WeightAverage
from lightning_tricks.averaging._power_ema import check_sigma_rel, power_ema_decay, power_ema_gamma
from lightning_tricks.averaging._snapshots import Stored, claim_folder, synthesize, write_snapshot
from lightning_tricks.averaging._tracks import Track
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError

__all__ = ["PostHocEMA"]


class PostHocEMA(WeightAverage):
    """Store averages of two lengths during training, from which `synthesize` makes the average of any length afterwards.

    For each width σ in `sigma_rel`, after step t ``e ← β_t·e + (1 − β_t)·w`` with ``β_t = (1 − 1/t)^(γ+1)`` and
    ``σ = √((γ+1) / ((γ+2)²(γ+3)))``: the weights after s of t steps count in proportion to ``s^γ``.

    Reach for it when the length of the average matters and is not known, as in diffusion models: one run gives all lengths.

    Args:
        sigma_rel: Widths σ of the averages that are kept: the standard deviation of an average's profile over training, as a share of
            training, in (0, 1/√12). At ``0.05``, 98 % of the weight lies in the last fifth of training.
        every: Duration between updates; in epochs, at the end of an epoch and before its validation. The widths stay as they are.
        snapshot_every: Duration between snapshots; one more is taken at the end of the fit.
        dirpath: Folder for snapshots; None = ``post_hoc_ema`` (with a `name`, ``post_hoc_ema_<name>``) in the Trainer's
            ``default_root_dir``. All ranks must reach it. Nothing in it is ever overwritten.
        buffers: What becomes of floating-point buffers that the state dict holds, such as BatchNorm's statistics: ``"copy"`` those of
            the training model, ``"average"`` their average, ``"keep"`` those at the start. Integer buffers, and buffers with
            infinities, are always the training model's.
        device: Where the averages are kept, such as ``"cpu"``; None = beside the weights.
        dtype: ``"float32"`` or ``"float64"``; None = that of the weights, but at least float32.
        where: Glob or globs over qualified names of parameters, or of the modules that hold them; a glob matches a whole name or
            any part of it that begins after a dot.
        exclude: Globs over names that are left out. They keep their raw values, as frozen parameters do.
        evaluate: Whether validation, test, predict and deployment use the average of the first width. ``"both"`` also validates the
            raw weights and logs their metrics under ``raw/``.
        name: Tells several averages apart, in logs (``post_hoc_ema_late/snapshots``) and checkpoints. Only one may `evaluate`.

    Raises:
        ArgumentError: If an argument lies outside its domain; at setup, if `default_root_dir` is remote and there is no `dirpath`.
        NothingMatchedError: At setup, if `where` and `exclude` leave no trainable parameter.
        TrickConflictError: At setup, if another callback, Lightning's own included, also replaces the evaluation weights or prunes.
        UnsupportedStrategyError: At setup, under FSDP1 with ``use_orig_params=False`` and with parameters offloaded to NVMe.
        UnsupportedOptimizerError: When training starts, if an optimizer is no ``torch.optim.Optimizer``.
        TrickError: When training starts, if no optimizer holds what is averaged, or a duration needs a fit of unknown length.
        CheckpointError: On resuming, if the checkpoint's entry is damaged, does not fit the model, or has other widths; nothing of it
            is loaded.

    Note:
        Steps count from the start of training, or from where the callback joined a run. With several optimizers, each parameter
        follows the steps of its own, and snapshots those of the first.

        Each snapshot takes as much room on disk as one copy of the weights for each width; a frozen parameter is stored once. Under
        FSDP and ZeRO-3 each rank writes the shards it owns. A checkpoint holds the running averages and says which snapshots belong
        to it: a run resumed from an earlier one does not use those that came later. Weights, checkpoints, resuming and DDP are
        otherwise as in `EMA`.

    References:
        T. Karras, M. Aittala, J. Lehtinen, J. Hellsten, T. Aila and S. Laine, "Analyzing and Improving the Training Dynamics of Diffusion
        Models", CVPR, 2024, section 3 and appendix C. Differs from the paper in that the coefficients of the snapshots add up to one.

    Example:
        >>> PostHocEMA(every=10, snapshot_every="5000 steps", dirpath="runs/averages")
        PostHocEMA(every=10, snapshot_every='5000 steps', dirpath='runs/averages')
    """

    def __init__(
        self,
        sigma_rel: Sequence[float] = (0.05, 0.10),
        *,
        every: int | str = 1,
        snapshot_every: int | str = "5%",
        dirpath: str | os.PathLike[str] | None = None,
        buffers: Literal["average", "copy", "keep"] = "copy",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        evaluate: bool | Literal["both"] = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            start=0,
            every=every,
            buffers=buffers,
            device=device,
            dtype=dtype,
            where=where,
            exclude=exclude,
            evaluate=evaluate,
            name=name,
        )
        self.sigma_rel = _check_widths(sigma_rel)
        self._gammas = [power_ema_gamma(width) for width in self.sigma_rel]
        self._storage = replace(self._storage, count=len(self.sigma_rel))
        self._between = Duration.parse("snapshot_every", snapshot_every, least=1)
        self.snapshot_every = plain_duration(snapshot_every)
        self.dirpath = check_path("dirpath", dirpath)
        self._steps_between = 1  # once resolved
        self._snapshots: dict[int, Path] = {}  # by step
        self._closing: int | None = None  # step of the one that was taken because a fit ended, and that a run which goes on has not
        self._stored: Stored = {}

    def synthesize(self, sigma_rel: float, *, step: int | None = None) -> dict[str, Tensor]:
        """Return the model's state dict with the average of any width, made from the snapshots of this run.

        Without the callback, `functional.synthesize_ema` does the same from the files.

        Args:
            sigma_rel: Width σ of the average, in (0, 1/√12). The error is small between the widths that were kept.
            step: Step that the average is to end at, one of `snapshots`; None = the latest.

        Returns:
            A state dict on the model's device: whole, or under FSDP2 with this rank's shards; under FSDP1 and ZeRO-3 whole, on the
            CPU. What was not averaged is as it was at the snapshot.

        Raises:
            ArgumentError: If `sigma_rel` lies outside its domain, or there is no snapshot at `step`.
            TrickError: If no snapshot has been taken.
            CheckpointError: If a file is missing, damaged, or does not belong to the others.
        """
        module = self._seen().module
        if not self._snapshots:
            msg = f"{self!r} has taken no snapshot yet. Ask after the fit, or choose a smaller `snapshot_every`."
            raise TrickError(msg)
        step = max(self._snapshots) if step is None else step
        if step not in self._snapshots:
            msg = f"`step` must be that of a snapshot, one of {', '.join(map(str, self._snapshots))}, got {step!r}."
            raise ArgumentError(msg)
        own = named_tensors(module)

        def spread(name: str, whole: Tensor) -> Tensor:
            if name not in own or isinstance(own[name], Runs):
                return whole
            return as_sharded(cut(whole, own[name]).to(own_part(own[name]).device), own[name])

        made = synthesize(self._snapshots[step], check_sigma_rel(sigma_rel), spread)
        if self._seen().cut_in_runs:  # and no state dict of the module's own holds wholes
            return made
        return {name: made.get(name, value) for name, value in module.state_dict().items()}

    @property
    def snapshots(self) -> dict[int, Path]:
        """The snapshots of this run: folders by step, in the order in which they were taken."""
        return dict(self._snapshots)

    @override
    def _update(self, track: Track) -> None:
        steps = track.steps - track.latest
        track.update(*(1 - power_ema_decay(track.age, gamma, steps=steps) for gamma in self._gammas))

    @override
    def _quantities(self, track: Track) -> dict[str, float]:
        return {"snapshots": float(len(self._snapshots)), "updates": float(track.updates)}

    @override
    def _resolve(self, trainer: Trainer) -> None:
        super()._resolve(trainer)
        self._steps_between = max(1, self._between.steps("snapshot_every", trainer))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._parent(trainer)
        super().setup(trainer, pl_module, stage)

    @override
    def _take_up(self, module: LightningModule) -> None:
        super()._take_up(module)
        if not self._seen().tracks:
            self._snapshots, self._closing, self._stored = {}, None, {}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = self._step()
        if self._closing is not None and step > self._closing:
            del self._snapshots[self._closing]
            self._closing, self._stored = None, {}
        if step // self._steps_between > max(self._snapshots, default=0) // self._steps_between:
            self._take_snapshot(trainer, step)

    @override
    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        step = self._step()
        if step > max(self._snapshots, default=0):
            self._take_snapshot(trainer, step)
            self._closing = step
        super()._settle(trainer, module)

    @override
    def _exhibits(self) -> Exhibits:
        rows = tuple((step, path.name) for step, path in sorted(self._snapshots.items()))
        return replace(super()._exhibits(), tables={"snapshot_table": Table(("step", "folder"), rows)} if rows else {})

    def _step(self) -> int:
        return next((track.age for track in self._seen().tracks if track.started), 0)

    def _take_snapshot(self, trainer: Trainer, step: int) -> None:
        path = claim_folder(self._parent(trainer), step) if trainer.is_global_zero else Path()
        path = trainer.strategy.broadcast(path)
        earlier = list(self._snapshots.values())
        write_snapshot(path, self._seen(), self.sigma_rel, earlier, self._stored, rank=trainer.global_rank, ranks=trainer.world_size)
        trainer.strategy.barrier()  # so that any rank can read it from here on
        self._snapshots[step] = path

    def _parent(self, trainer: Trainer) -> Path:
        if self.dirpath is None and "://" in trainer.default_root_dir:
            msg = f"{self!r} must store files, and the Trainer's `default_root_dir` is {trainer.default_root_dir!r}. Pass `dirpath`."
            raise ArgumentError(msg)
        return (Path(trainer.default_root_dir, self.log_prefix) if self.dirpath is None else Path(self.dirpath)).absolute()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        entry = read_entry(checkpoint, self.state_key)
        if entry is not None:
            snapshots = {step: str(path) for step, path in self._snapshots.items()}
            entry.update(sigma_rel=list(self.sigma_rel), snapshots=snapshots, closing=self._closing)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        snapshots = {} if entry is None else self._snapshots_in(entry, self._parent(trainer))
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._snapshots, self._closing, self._stored = snapshots, (entry or {}).get("closing"), {}

    def _snapshots_in(self, entry: Mapping[str, Any], parent: Path) -> dict[int, Path]:
        """Return the snapshots that belong to a checkpoint; those that are no longer where they were, where they would be by now."""
        widths, closing = entry.get("sigma_rel"), entry.get("closing")
        recorded: dict[int, str] = entry.get("snapshots", {})
        if widths != list(self.sigma_rel):
            msg = (
                f"`sigma_rel` must be that of the checkpoint, {widths}, to go on with its averages, got {list(self.sigma_rel)}. Nothing of "
                "it was loaded. Resume with the same widths, or give the callback another `name` to start new averages."
            )
            raise CheckpointError(msg)
        valid = isinstance(recorded, dict) and all(type(step) is int and isinstance(path, str) for step, path in recorded.items())
        if not valid or (closing is not None and closing not in recorded):
            msg = (
                f"The checkpoint's entry for {self.state_key} must name snapshots by their steps, found {recorded!r} and {closing!r}. "
                "Nothing of it was loaded. Resume from another checkpoint, or give the callback another `name` to start new averages."
            )
            raise CheckpointError(msg)
        paths = {step: Path(path) for step, path in recorded.items()}
        return {step: path if path.exists() else parent / path.name for step, path in paths.items()}


def _check_widths(values: Sequence[float]) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        msg = f"`sigma_rel` must be a list of widths such as (0.05, 0.10), got {values!r}."
        raise ArgumentError(msg)
    widths = tuple(map(check_sigma_rel, values))
    if len(set(widths)) < len(widths):
        msg = f"`sigma_rel` must be a list of different widths, got {values!r}."
        raise ArgumentError(msg)
    return widths
