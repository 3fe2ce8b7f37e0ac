"""Labels that leave a share to all classes.

A network that is trained on labels of one class each grows its logits without end, since only then does the loss vanish. Labels that
give the share ε to all classes alike have the loss vanish at finite logits, whose clusters are tighter and whose probabilities are
better calibrated.

Sources: C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens and Z. Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR,
2016, section 7; R. Müller, S. Kornblith and G. Hinton, "When Does Label Smoothing Help?", NeurIPS, 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # as torch's own documentation calls it
from torch.utils._pytree import tree_leaves

from lightning_tricks._core.checks import check_count, check_in_interval
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, callbacks_of, logs_now, override
from lightning_tricks.data._batches import replaced
from lightning_tricks.data._mixed_tensors import Marks, MixedTensor, mixed
from lightning_tricks.data._soft_labels import soft_rows
from lightning_tricks.data._target_trick import Places, TargetTrick
from lightning_tricks.errors import TrickConflictError, TrickError

__all__ = ["LabelSmoothing", "smooth_labels"]


def smooth_labels(labels: Tensor, classes: int, smoothing: float = 0.1) -> Tensor:
    """Return probabilities of classes, of which the label's own has ``1 − ε + ε/K`` and each other one ``ε/K``.

    Args:
        labels: Indices of classes, from 0 to K − 1.
        classes: K, the number of classes.
        smoothing: ε in [0, 1].

    Returns:
        Probabilities, which `torch.nn.functional.cross_entropy` takes.

    Shape:
        - Input: (N, ...)
        - Output: (N, ..., K)

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> smooth_labels(torch.tensor([0, 2]), 4, 0.2)
        tensor([[0.8500, 0.0500, 0.0500, 0.0500],
                [0.0500, 0.0500, 0.8500, 0.0500]])
    """
    rows = F.one_hot(labels.long(), check_count("classes", classes))
    return soft_rows([rows], 1.0, smoothing=check_in_interval("smoothing", smoothing, "[0, 1]"), dim=-1)


class LabelSmoothing(TargetTrick):
    """Smooth the labels of training, whatever loss the module computes from them.

    With a label y among K classes, the loss is that of the probabilities ``q = (1 − ε) onehot(y) + ε/K``. Metrics see y, and so does
    validation.

    Reach for it in classification with many epochs and few doubts in the labels; not where the network is to be distilled from.

    Args:
        smoothing: ε in [0, 1]; 0.1 in Szegedy et al.
        target: Index or key in a training batch at which the labels sit, as `training_step` gets it, or a list of these.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickConflictError: At setup, if another one smooths the same labels.
        TrickError: In training, if the targets are no classes, if the loss does not depend on them, if it smooths them itself, or if it
            takes them in a function other than those below.

    Note:
        Labels are smoothed where they become a loss: in `torch.nn.functional.cross_entropy` and `nll_loss`, which `nn.CrossEntropyLoss`
        and `nn.NLLLoss` call, class weights and ignored labels included, and in `one_hot` and `scatter`, by which other losses encode
        them. Others, such as a `gather` of log-probabilities, are refused.

        Together with `MixUp` and `CutMix`, smoothed labels are mixed.

    References:
        - C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens and Z. Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR,
          2016.
        - R. Müller, S. Kornblith and G. Hinton, "When Does Label Smoothing Help?", NeurIPS, 2019.

    Example:
        >>> LabelSmoothing(0.1, target="label")
        LabelSmoothing(target='label')
    """

    turn = 20
    does = "smooths"

    def __init__(self, smoothing: float = 0.1, *, target: Places = 1, name: str | None = None) -> None:
        super().__init__(target, name)
        self.smoothing = check_in_interval("smoothing", smoothing, "[0, 1]")

    @property
    @override
    def is_neutral(self) -> bool:
        return self.smoothing == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for other in callbacks_of(trainer):
            if isinstance(other, LabelSmoothing) and other is not self and {*other.places} & {*self.places}:
                msg = f"{other!r} and {self!r} both smooth the same labels. Keep one."
                raise TrickConflictError(msg)

    @override
    def change(self, trainer: Trainer, batch: Any, key: int) -> Any:
        found = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, MixedTensor)), None)
        marks = Marks() if found is None else found.marks  # of the batch, if something is mixed in it
        marks.tricks.append(repr(self))
        for place, labels in zip(self.places, self._targets(batch), strict=True):
            branches, share = (labels.branches, labels.share) if isinstance(labels, MixedTensor) else ((labels,), 1.0)
            if branches[0].is_floating_point() or branches[0].dtype == torch.bool:
                kind = branches[0].dtype
                msg = f"{self!r} smooths indices of classes, and the targets at {place!r} are of {kind}. Smooth them in the data set."
                raise TrickError(msg)
            batch = replaced(batch, place, mixed(branches, share, marks, classes=True, smoothing=self.smoothing))
        return batch

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer) and not self.is_neutral:
            pl_module.log(f"{self.log_prefix}/smoothing", self.smoothing)
