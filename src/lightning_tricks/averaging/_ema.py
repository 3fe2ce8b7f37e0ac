"""Exponential moving average (EMA) of the weights.

Late in training the weights wander around a good point; their average sits closer to it than any of them. An exponential moving
average forgets the past at a constant rate, so that it can follow the weights from the start and be evaluated at any time. It
costs one more copy of the weights and one pass over them per optimizer step.

Source: B. T. Polyak and A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
Optimization, 1992, for averaging; D. Morales-Brotons, T. Vogels and H. Hendrikx, "Exponential Moving Average of Weights in Deep
Learning: Dynamics and Benefits", TMLR, 2024, for its exponential form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_tricks._core.checks import check_in_unit_interval, check_tensors
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.lightning import Trainer, override
from lightning_tricks._core.weights import lerp_
from lightning_tricks.averaging._average import WeightAverage
from lightning_tricks.averaging._tracks import Track
from lightning_tricks.errors import ArgumentError

__all__ = ["EMA", "ema_decay", "ema_update_"]


def ema_update_(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """Update exponential moving averages in place: ``e ← β·e + (1 − β)·w``.

    All pairs that agree in dtype and device are updated in one foreach call.

    Args:
        average: The averages e, changed in place; keep those of low-precision weights in float32.
        current: The weights w; one tensor per average, of any dtype and device.
        decay: The share β of the old average that is kept, in [0, 1].

    Shape:
        - average, current: as many tensors ``(*)`` in each, equal in shape pair by pair.

    Raises:
        ArgumentError: If `decay` lies outside [0, 1], or `average` and `current` are no floating-point tensors that pair up.

    Example:
        >>> average = [torch.tensor([0.0, 1.0])]
        >>> ema_update_(average, [torch.tensor([1.0, 1.0])], decay=0.75)
        >>> average
        [tensor([0.2500, 1.0000])]
    """
    check_in_unit_interval("decay", decay)
    averages, currents = (list(check_tensors(name, tensors)) for name, tensors in (("average", average), ("current", current)))
    if [tensor.shape for tensor in averages] != [tensor.shape for tensor in currents]:
        found = f"{len(averages)} and {len(currents)} tensors" if len(averages) != len(currents) else "other shapes in some pairs"
        msg = f"`average` and `current` must pair up, tensor by tensor, with the same shapes, got {found}."
        raise ArgumentError(msg)
    lerp_(averages, currents, 1 - decay)


def ema_decay(step: int, decay: float, *, warmup: int = 0, steps: int = 1) -> float:
    """Return the share of the old average that an update keeps.

    One step keeps ``β_t = min(β, (1 + t) / (10 + t))`` for ``t < warmup`` and ``β`` afterwards; an update after several steps keeps
    the product of theirs, so that the average reaches equally far back however often it is updated.

    Args:
        step: Steps t between the start of the average and its latest update.
        decay: The decay β per step, in [0, 1].
        warmup: Number of steps over which the decay grows.
        steps: Number of steps since the latest update.

    Returns:
        The share, in [0, 1].

    Raises:
        ArgumentError: If `decay` lies outside [0, 1].

    Example:
        >>> ema_decay(0, 0.999)
        0.999
        >>> ema_decay(0, 0.999, warmup=100)
        0.1
        >>> ema_decay(0, 0.5, steps=3)
        0.125
    """
    check_in_unit_interval("decay", decay)
    share = 1.0
    for t in range(step, min(step + steps, warmup)):
        share *= min(decay, (1 + t) / (10 + t))
    return share * decay ** (steps - max(0, min(step + steps, warmup) - step))


class EMA(WeightAverage):
    """Keep an exponential moving average of the weights and evaluate with it.

    ``e_0 = w_0`` at `start`; after each optimizer step ``e ← β·e + (1 − β)·w``; with ``every=k``, after each k-th step with ``β^k``.

    Reach for it whenever weights are deployed: the average tends to generalize better than the weights it follows, and needs less
    decay of the learning rate (Morales-Brotons et al., 2024).

    Args:
        decay: Share β of the old average kept per optimizer step, in [0, 1]. None means 0.999, unless `half_life` says otherwise.
        half_life: The same as a duration h: ``β = 0.5^(1/h)``. At most one of the two is given.
        warmup: Duration over which the decay grows as ``β_t = min(β, (1 + t)/(10 + t))``, where t counts steps since `start`, so
            that early weights are forgotten quickly; 0 = off.
        start: Duration before the average begins, as the weights are then. Until then, and everywhere if it is never reached, the
            raw weights are used.
        every: Duration between updates; in epochs, at the end of an epoch and before its validation.
        buffers: What evaluation finds in floating-point buffers that the state dict holds, such as BatchNorm's statistics:
            ``"copy"`` those of the training model, ``"average"`` their average, ``"keep"`` those at `start`. Integer buffers, and
            buffers with infinities, are always the training model's.
        device: Where the average is kept, such as ``"cpu"``; None = beside the weights.
        dtype: ``"float32"`` or ``"float64"``; None = that of the weights, but at least float32, since a bfloat16 average at β = 0.999
            never moves.
        where: Glob or globs over qualified names of parameters, or of the modules that hold them; a glob matches a whole name or
            any part of it that begins after a dot.
        exclude: Globs over names that are left out. They keep their raw values in evaluation, as frozen parameters do.
        evaluate: Whether validation, test, predict and deployment use the average. ``"both"`` also validates the raw weights and
            logs their metrics under ``raw/``, where checkpointing and early stopping do not see them.
        name: Tells several averages apart, in logs (``ema_slow/decay``) and checkpoints. Only one may `evaluate`.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if `where` and `exclude` leave no trainable parameter.
        TrickConflictError: At setup, if another callback, Lightning's own included, also replaces the evaluation weights or prunes.
        UnsupportedStrategyError: At setup, under FSDP1 with ``use_orig_params=False`` and with parameters offloaded to NVMe.
        UnsupportedOptimizerError: When training starts, if an optimizer is no ``torch.optim.Optimizer``.
        TrickError: When training starts, if no optimizer holds what is averaged, or a duration needs a fit of unknown length.
        CheckpointError: On resuming, if the checkpoint's entry is damaged or does not fit the model; nothing of it is loaded.

    Note:
        Only trainable parameters are averaged; one that is thawed later joins when it is first trained. Steps that a gradient scaler
        skips do not count. With several optimizers, each parameter follows the steps of its own, and all durations count those; the
        logged ``ema/decay`` and ``ema/updates`` are those of the first whose average has begun.

        After the fit the module holds the average; `raw_state_dict` has the weights that training reached, and a second fit goes on
        from them. ``checkpoint["state_dict"]`` holds the average if this callback evaluates, so that ``load_from_checkpoint`` deploys
        it; resuming restores weights and average to the bit. A copied or pickled EMA has the same arguments and no progress.

        Works under DDP and DeepSpeed's ZeRO-1 and 2, where each rank keeps the same average, under FSDP2, FSDP1 and ZeRO-3, where
        each averages the shards it owns, and with ``torch.compile``. Under FSDP1 and ZeRO-3, `averaged_state_dict` and
        `raw_state_dict` must be called on all ranks, and rank zero gets the whole state. DeepSpeed's checkpoints hold the raw weights;
        `functional.averaged_state_dict` reads the averaged ones out of them.

    References:
        - B. T. Polyak and A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
          Optimization, 1992.
        - D. Morales-Brotons, T. Vogels and H. Hendrikx, "Exponential Moving Average of Weights in Deep Learning: Dynamics and
          Benefits", TMLR, 2024.

        The warm-up is that of TensorFlow's ``tf.train.ExponentialMovingAverage`` (argument ``num_updates``).

    Example:
        >>> EMA(half_life="500 steps", exclude="head")
        EMA(half_life='500 steps', exclude='head')
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: int | str | None = None,
        warmup: int | str = 0,
        start: int | str = 0,
        every: int | str = 1,
        buffers: Literal["average", "copy", "keep"] = "copy",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        evaluate: bool | Literal["both"] = True,
        name: str | None = None,
    ) -> None:
        if decay is not None and half_life is not None:
            msg = f"`decay` and `half_life` say the same thing, got decay={decay!r} and half_life={half_life!r}. Give one of them."
            raise ArgumentError(msg)
        super().__init__(
            start=start,
            every=every,
            buffers=buffers,
            device=device,
            dtype=dtype,
            where=where,
            exclude=exclude,
            evaluate=evaluate,
            name=name,
        )
        if half_life is None:
            decay = check_in_unit_interval("decay", 0.999 if decay is None else decay)
        self._half_life = None if half_life is None else Duration.parse("half_life", half_life, least=1)
        self._warmup = Duration.parse("warmup", warmup)
        self.decay, self.half_life = decay, None if half_life is None else plain_duration(half_life)
        self.warmup = plain_duration(warmup)
        self._beta, self._warmup_steps = 1.0, 0  # once resolved

    @override
    def _resolve(self, trainer: Trainer) -> None:
        super()._resolve(trainer)
        if self._half_life is not None:
            self._beta = 0.5 ** (1 / max(1, self._half_life.steps("half_life", trainer)))
        elif self.decay is not None:
            self._beta = self.decay
        self._warmup_steps = self._warmup.steps("warmup", trainer)

    @override
    def _update(self, track: Track) -> None:
        track.update(1 - ema_decay(track.age, self._beta, warmup=self._warmup_steps, steps=track.steps - track.latest))

    @override
    def _quantities(self, track: Track) -> dict[str, float]:
        decay = ema_decay(max(0, track.age - 1), self._beta, warmup=self._warmup_steps)
        return {"decay": decay, "updates": float(track.updates)}
