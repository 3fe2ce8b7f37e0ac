"""Equal-weight mean of the weights over the last part of training (Polyak–Juditsky averaging, stochastic weight averaging).

At a constant or cyclic learning rate the weights keep moving around a good region. The plain mean of the weights visited there lies
nearer its centre than any of them. Begun late, when the weights have reached the region, it needs no decay to be chosen.

Source: B. T. Polyak and A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
Optimization, 1992; P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI, 2018, for one mean
over the ends of epochs (SWA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from lightning_tricks._core.clock import plain_duration
from lightning_tricks._core.lightning import override
from lightning_tricks.averaging._average import WeightAverage
from lightning_tricks.averaging._tracks import Track

__all__ = ["PolyakAveraging"]


class PolyakAveraging(WeightAverage):
    """Keep the equal-weight mean of the weights from some moment on, and evaluate with it.

    ``a_1 = w_start``; with the n-th weights after that, ``a_n = a_{n-1} + (w_n − a_{n-1}) / n``, which is their mean.

    Reach for it when the last part of training runs at a constant or cyclic learning rate. With ``every="1 epoch"`` it is the average
    of SWA. Where the rate decays to zero, the last weights are hard to beat; where one cannot say when to begin, take an `EMA`.

    Args:
        start: Duration before the average begins, as the weights are then. Until then, and everywhere if it is never reached, the
            raw weights are used.
        stop: Duration after which the average no longer changes; None = the end of the fit.
        every: Duration between the weights that count; in epochs, those at the end of an epoch, before its validation.
        buffers: What evaluation finds in floating-point buffers that the state dict holds, such as BatchNorm's statistics:
            ``"copy"`` those of the training model, ``"average"`` their average, ``"keep"`` those at `start`. Integer buffers, and
            buffers with infinities, are always the training model's.
        device: Where the average is kept, such as ``"cpu"``; None = beside the weights.
        dtype: ``"float32"`` or ``"float64"``; None = that of the weights, but at least float32.
        where: Glob or globs over qualified names of parameters, or of the modules that hold them; a glob matches a whole name or
            any part of it that begins after a dot.
        exclude: Globs over names that are left out. They keep their raw values in evaluation, as frozen parameters do.
        evaluate: Whether validation, test, predict and deployment use the average. ``"both"`` also validates the raw weights and
            logs their metrics under ``raw/``, where checkpointing and early stopping do not see them.
        name: Tells several averages apart, in logs (``polyak_averaging_late/updates``) and checkpoints. Only one may `evaluate`.

    Raises:
        ArgumentError: If an argument lies outside its domain, or `stop` does not come after `start`.
        NothingMatchedError: At setup, if `where` and `exclude` leave no trainable parameter.
        TrickConflictError: At setup, if another callback, Lightning's own included, also replaces the evaluation weights or prunes.
        UnsupportedStrategyError: At setup, under FSDP1 with ``use_orig_params=False`` and with parameters offloaded to NVMe.
        UnsupportedOptimizerError: When training starts, if an optimizer is no ``torch.optim.Optimizer``.
        TrickError: When training starts, if no optimizer holds what is averaged, or a duration needs a fit of unknown length.
        CheckpointError: On resuming, if the checkpoint's entry is damaged or does not fit the model; nothing of it is loaded.

    Note:
        The weights at `start` count as the first. The learning rate is the module's own business, unlike in Lightning's
        ``StochasticWeightAveraging``. Early stopping and a limit on steps keep the average. Weights, checkpoints, resuming, DDP and
        FSDP2 are as in `EMA`.

    References:
        - B. T. Polyak and A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
          Optimization, 1992.
        - P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov and A. G. Wilson, "Averaging Weights Leads to Wider Optima and Better
          Generalization", UAI, 2018. Differs from the paper in that BatchNorm's statistics are not computed anew.

    Example:
        >>> PolyakAveraging(start="50%", every="1 epoch")
        PolyakAveraging(start='50%', every='1 epoch')
    """

    def __init__(
        self,
        *,
        start: int | str = "75%",
        stop: int | str | None = None,
        every: int | str = 1,
        buffers: Literal["average", "copy", "keep"] = "copy",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        evaluate: bool | Literal["both"] = True,
        name: str | None = None,
    ) -> None:
        super().__init__(
            start=start,
            stop=stop,
            every=every,
            buffers=buffers,
            device=device,
            dtype=dtype,
            where=where,
            exclude=exclude,
            evaluate=evaluate,
            name=name,
        )
        self.stop = None if stop is None else plain_duration(stop)

    @override
    def _update(self, track: Track) -> None:
        track.update(1 / (track.updates + 2))  # the weights at `start` are the first

    @override
    def _quantities(self, track: Track) -> dict[str, float]:
        return {"updates": float(track.updates)}
