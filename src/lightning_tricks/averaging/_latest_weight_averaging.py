"""Equal-weight mean of the latest checkpoints of the weights (LAWA).

Long before the learning rate has decayed, the weights are noisy, and their mean over the last few epochs is as good as the weights
that training would reach only later. A window forgets what is older, so that the mean can be evaluated from the first epoch on,
and no beginning has to be chosen. It costs one copy of the weights for each checkpoint in the window.

Source: J. Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", arXiv:2209.14981,
2022; S. Sanyal et al., "Early Weight Averaging meets High Learning Rates for LLM Pre-training", arXiv:2306.03241, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from lightning_tricks._core.checks import check_count
from lightning_tricks._core.lightning import override
from lightning_tricks.averaging._average import WeightAverage
from lightning_tricks.averaging._tracks import Track
from lightning_tricks.averaging._window import Window

__all__ = ["LatestWeightAveraging"]


class LatestWeightAveraging(WeightAverage):
    """Keep the latest checkpoints of the weights, and evaluate with their mean.

    With the weights ``w_1, …, w_n`` at the end of each of n epochs, ``a_n = (w_{n−k+1} + … + w_n) / k``; of all n while there are
    fewer than k.

    Reach for it to see early, at a high learning rate, what training would reach later (Kaddour, 2022; Sanyal et al., 2023). Where
    memory is short, an `EMA` needs one copy instead of k.

    Args:
        window: Number k of checkpoints that are averaged, at least 1.
        every: Duration between checkpoints; in epochs, they are taken at the end of an epoch and before its validation.
        start: Duration before counting begins; the first checkpoint is taken one `every` later, and the weights at `start` are none.
            Until then the raw weights are used.
        buffers: What evaluation finds in floating-point buffers that the state dict holds, such as BatchNorm's statistics:
            ``"copy"`` those of the training model, ``"average"`` their mean, ``"keep"`` those of the first checkpoint. Integer
            buffers, and buffers with infinities, are always the training model's.
        device: Where the checkpoints are kept, such as ``"cpu"``; None = beside the weights.
        dtype: Of the mean, ``"float32"`` or ``"float64"``; None = that of the weights, but at least float32. Checkpoints have the
            dtype of the weights.
        where: Glob or globs over qualified names of parameters, or of the modules that hold them; a glob matches a whole name or
            any part of it that begins after a dot.
        exclude: Globs over names that are left out. They keep their raw values in evaluation, as frozen parameters do.
        evaluate: Whether validation, test, predict and deployment use the mean. ``"both"`` also validates the raw weights and
            logs their metrics under ``raw/``, where checkpointing and early stopping do not see them.
        name: Tells several averages apart, in logs (``latest_weight_averaging_long/checkpoints``) and checkpoints. Only one may
            `evaluate`.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if `where` and `exclude` leave no trainable parameter.
        TrickConflictError: At setup, if another callback, Lightning's own included, also replaces the evaluation weights or prunes.
        UnsupportedStrategyError: At setup, under FSDP1 with ``use_orig_params=False`` and with parameters offloaded to NVMe.
        UnsupportedOptimizerError: When training starts, if an optimizer is no ``torch.optim.Optimizer``.
        TrickError: When training starts, if no optimizer holds what is averaged, or a duration needs a fit of unknown length.
        CheckpointError: On resuming, if the checkpoint's entry is damaged or does not fit the model; nothing of it is loaded.

    Note:
        An epoch that is cut short, as by ``max_steps``, ends with a checkpoint, too. A parameter that is thawed later counts in
        earlier checkpoints as it was while frozen. The mean is computed from the window whenever it is needed, and exists only while
        the model or a file needs it. A file from which training can be resumed holds the window: k copies of what is averaged.
        Resumed with a smaller `window`, the latest checkpoints stay. Weights, checkpoints, resuming, DDP and FSDP2 are otherwise as
        in `EMA`.

    References:
        - J. Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", arXiv:2209.14981,
          2022. Differs from the paper in that the mean exists before the window is full, and that BatchNorm's statistics are those of
          the training model unless `buffers` says otherwise.
        - S. Sanyal, A. Neerkaje, J. Kaddour, A. Kumar and S. Sanghavi, "Early Weight Averaging meets High Learning Rates for LLM
          Pre-training", arXiv:2306.03241, 2023.

    Example:
        >>> LatestWeightAveraging(6, every="500 steps", device="cpu")
        LatestWeightAveraging(window=6, every='500 steps', device='cpu')
    """

    def __init__(
        self,
        window: int = 5,
        *,
        every: int | str = "1 epoch",
        start: int | str = 0,
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
            every=every,
            buffers=buffers,
            device=device,
            dtype=dtype,
            where=where,
            exclude=exclude,
            evaluate=evaluate,
            name=name,
        )
        self.window = check_count("window", window)
        self._storage = replace(self._storage, kind=Window, count=self.window)

    @override
    def _update(self, track: Track) -> None:
        track.update()

    @override
    def _quantities(self, track: Track) -> dict[str, float]:
        return {"checkpoints": float(len(track.others)), "updates": float(track.updates)}
