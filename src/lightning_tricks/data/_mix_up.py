"""Training on weighted sums of two samples, and of their labels.

A network is asked to be linear in between the samples that it is shown: half of one image and half of another shall be half of one class
and half of the other. That takes away much of its overconfidence, and of its memory for wrong labels.

Source: H. Zhang, M. Cisse, Y. N. Dauphin and D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR, 2018. arXiv:1710.09412.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks._core.lightning import override
from lightning_tricks.data._label_smoothing import smooth_labels
from lightning_tricks.data._mixing import MixingTrick, Per, column
from lightning_tricks.data._soft_labels import weighed
from lightning_tricks.data._target_trick import Places
from lightning_tricks.errors import TrickError

__all__ = ["MixUp", "mix_labels", "mix_up"]


def mix_up(inputs: Tensor, share: float | Tensor, partners: Tensor) -> Tensor:
    """Mix each sample with another one: ``x_i ← λ x_i + (1 − λ) x_σ(i)``.

    Args:
        inputs: Samples of floating-point numbers.
        share: λ in [0, 1], of all samples or of each.
        partners: σ, the row that each is mixed with: of the paper, ``torch.randperm(len(inputs))``; of timm, all rows in reverse.

    Returns:
        The mixed samples.

    Shape:
        - Input: (N, ...)
        - Share: () or (N)
        - Partners: (N)
        - Output: (N, ...)

    Example:
        >>> mix_up(torch.tensor([[1.0], [2.0], [4.0]]), 0.5, torch.tensor([2, 1, 0]))
        tensor([[2.5000],
                [2.0000],
                [2.5000]])
    """
    return weighed([inputs, inputs[partners]], column(_checked(share), inputs))


def mix_labels(labels: Tensor, share: float | Tensor, partners: Tensor, *, classes: int, smoothing: float = 0.0) -> Tensor:
    """Return the probabilities of classes of mixed samples: ``λ q(y_i) + (1 − λ) q(y_σ(i))`` with labels encoded, and smoothed.

    Args:
        labels: Indices of classes, from 0 to K − 1.
        share: As in `mix_up`; of `cut_mix`, the share that `cut_mix_box` returns.
        partners: As in `mix_up`.
        classes: K, the number of classes.
        smoothing: ε in [0, 1], as in `smooth_labels`.

    Returns:
        Probabilities, which `torch.nn.functional.cross_entropy` takes.

    Shape:
        - Input: (N)
        - Output: (N, K)

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> mix_labels(torch.tensor([0, 2]), 0.75, torch.tensor([1, 0]), classes=3)
        tensor([[0.7500, 0.0000, 0.2500],
                [0.2500, 0.0000, 0.7500]])
    """
    rows = smooth_labels(labels, classes, smoothing)
    return weighed([rows, rows[partners]], column(_checked(share), rows))


def _checked(share: float | Tensor) -> float | Tensor:
    return share if isinstance(share, Tensor) else check_in_interval("share", share, "[0, 1]")


class MixUp(MixingTrick):
    """Train on weighted sums of two samples of a batch, whatever loss the module computes from their targets.

    ``x ← λ x_i + (1 − λ) x_σ(i)`` and ``l ← λ l(ŷ, y_i) + (1 − λ) l(ŷ, y_σ(i))``, with λ ~ Beta(α, α) and a permutation σ of the batch's
    samples. Targets that are numbers are mixed themselves.

    Reach for it in long training of classifiers that overfit, on images as well as on spectra, sounds or tables.

    Args:
        alpha: α, at least 0: 0.1 to 0.4 in Zhang et al. for ImageNet, 1 for CIFAR-10; at 0, nothing is mixed.
        per: Whether λ is drawn for the batch, or for each sample.
        probability: Probability of mixing a batch, in [0, 1]. Of several callbacks that mix, one at most acts on a batch; where their
            probabilities exceed one together, they are scaled down to that.
        start: When mixing begins: a number of optimizer steps, or a duration such as ``"5 epochs"`` or ``"10%"``.
        stop: When it ends, so that the last part of training sees plain samples; None = never.
        item: Index or key in a training batch at which the inputs sit, as `training_step` gets it; None = the first tensor in it.
        target: The same for their targets, or a list of these.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickError: In training, if there are no such tensors in a batch, if inputs are no floating-point numbers, if the loss does not
            depend on the targets, or if it does in a way that cannot be mixed.

    Note:
        Labels that are classes keep looking like classes: metrics see those with the larger share. Whatever function of torch makes a
        loss of them is called with both, after one forward pass, and the losses are weighed; `cross_entropy` and `nll_loss` take class
        weights and ignored labels into account. With ``per="sample"``, labels that are encoded by `one_hot` or `scatter` become soft
        labels, and other functions are refused.

        What is drawn follows from seed, rank, epoch, step and batch: resuming is exact, and no generator's state is touched.

    References:
        - H. Zhang, M. Cisse, Y. N. Dauphin and D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR, 2018.

    Example:
        >>> MixUp(0.4, stop="90%")
        MixUp(alpha=0.4, stop='90%')
    """

    def __init__(
        self,
        alpha: float = 0.2,
        *,
        per: Per = "batch",
        probability: float = 1.0,
        start: int | str = 0,
        stop: int | str | None = None,
        item: int | str | None = None,
        target: Places = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(alpha, per=per, probability=probability, start=start, stop=stop, item=item, target=target, name=name)

    @override
    def mix(self, images: Tensor, shares: Sequence[float], partners: Tensor, draws: random.Random) -> tuple[Tensor, Sequence[float], Any]:
        if not images.is_floating_point():
            msg = f"{self!r} mixes floating-point numbers, and the inputs are of {images.dtype}. Convert them before, in the data set."
            raise TrickError(msg)
        share = shares[0] if self.per == "batch" else torch.tensor(shares, device=images.device)
        return mix_up(images, share, partners), shares, None
