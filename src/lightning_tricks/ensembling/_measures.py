"""How good the prediction of several members is, and how far they differ: over a whole data set, in constant memory.

Sources: A. Krogh and J. Vedelsby, "Neural Network Ensembles, Cross Validation, and Active Learning", NeurIPS, 1994, for the diversity;
G. W. Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review, 1950; C. Guo, G. Pleiss, Y. Sun and
K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML, 2017, for the calibration error; S. Depeweg et al., "Decomposition
of Uncertainty in Bayesian Deep Learning for Efficient and Risk-sensitive Learning", ICML, 2018, for the entropies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import one_hot
from torchmetrics import Metric

from lightning_tricks._core.checks import check_count
from lightning_tricks._core.lightning import override
from lightning_tricks.ensembling._combining import (
    Combine,
    Output,
    check_combination,
    combine_predictions,
    decompose_uncertainty,
    log_probabilities,
)
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EnsembleMeasures", "brier_score", "disagreement", "diversity"]


def disagreement(predictions: Tensor, *, output: Output = "logits", class_dim: int = -1) -> Tensor:
    """Return the share of pairs of members that predict different classes: ``1 − Σ_c v_c (v_c − 1) / (M (M − 1))``, v the votes.

    Args:
        predictions: What M classifiers return, stacked along a first dimension. One alone does not disagree.
        output: What that is.
        class_dim: Dimension of the classes in what one member returns. If it has size 1, or there is none, the logit is that of a
            sigmoid.

    Returns:
        The share for each sample, in [0, 1].

    Shape:
        - predictions: (M, N, C, ...), classes at `class_dim`
        - Output: (N, ...), without the classes

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        S. Fort, H. Hu and B. Lakshminarayanan, "Deep Ensembles: A Loss Landscape Perspective", arXiv:1912.02757, 2019.

    Example:
        >>> disagreement(torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.6667])
    """
    return _disagreement(_classes_last(predictions, output, class_dim))


def diversity(predictions: Tensor, *, output: Output = "logits", class_dim: int = -1) -> Tensor:
    """Return how far the members' probabilities lie from their mean: ``1/M Σ_m ‖p_m − p‖²``, the ambiguity of the ensemble.

    By just as much the Brier score of the mean probabilities is better than the mean Brier score of the members. Unlike divergences
    it stays finite where probabilities are zero.

    Args:
        predictions: What M classifiers return, stacked along a first dimension.
        output: What that is.
        class_dim: Dimension of the classes in what one member returns. If it has size 1, or there is none, the logit is that of a
            sigmoid, which counts as two classes.

    Returns:
        The diversity for each sample, at least 0.

    Shape:
        - predictions: (M, N, C, ...), classes at `class_dim`
        - Output: (N, ...), without the classes

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        A. Krogh and J. Vedelsby, "Neural Network Ensembles, Cross Validation, and Active Learning", NeurIPS, 1994.

    Example:
        >>> predictions, target = torch.randn(5, 8, 3), torch.randint(3, (8,))
        >>> together = brier_score(combine_predictions(predictions), target)
        >>> apart = torch.stack([brier_score(member, target) for member in predictions]).mean(0)
        >>> torch.allclose(together, apart - diversity(predictions), atol=1e-6)
        True
    """
    return _diversity(_classes_last(predictions, output, class_dim))


def brier_score(prediction: Tensor, target: Tensor, *, output: Output = "logits", class_dim: int = -1) -> Tensor:
    """Return the squared distance between probabilities and what came true: ``Σ_c (p_c − 1[c = target])²``.

    Args:
        prediction: What one model, or an ensemble, returns.
        target: The true classes.
        output: What `prediction` is.
        class_dim: Dimension of the classes. If it has size 1, or there is none, the logit is that of a sigmoid, which counts as two
            classes, as Brier counts them; other libraries halve that.

    Returns:
        The score of each sample: 0 is best, 2 is worst.

    Shape:
        - prediction: (N, C, ...), classes at `class_dim`
        - target: (N, ...)
        - Output: (N, ...)

    Raises:
        ArgumentError: If an argument lies outside its domain, or the target does not fit the prediction.

    References:
        G. W. Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review, 1950.

    Example:
        >>> brier_score(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0]), output="probabilities")
        tensor([0.1400])
    """
    logs = _classes_last(prediction[None], output, class_dim)[0]
    return _brier(logs, _fitting_target(target, logs, prediction))


class EnsembleMeasures(Metric):
    """Measure the predictions of M members over a data set, as one of torchmetrics' metrics.

    For classes: ``disagreement``, ``diversity`` (see the functions of these names), ``predictive_entropy`` and ``mutual_information``
    (total and epistemic `Uncertainty`, in nats). With targets, of the combined prediction: ``nll``, the negative log-likelihood,
    ``brier``, and ``calibration_error``, ``Σ_b |hits_b − Σ_{n∈b} p_n| / N`` over bins b of the predicted class's probability p. For
    regression: ``variance`` of the members and, with targets, ``mse`` of their mean, which is the members' mean squared error less
    that variance. All are means over samples, not over batches.

    Reach for it to learn whether an ensemble's members differ, and whether its probabilities are frequencies.

    Args:
        combine: How members are put together, as for `combine_predictions`; ``"mean"`` is regression.
        output: What classifiers return.
        class_dim: Dimension of the classes in what one member returns: −1 for (N, C), 1 for maps (N, C, H, W). If it has size 1, or
            there is none, the logit is that of a sigmoid.
        bins: Bins of equal width of the calibration error, at least 1.
        ignore_index: Targets of this value, and the predictions there, count nothing.

    Raises:
        ArgumentError: If an argument lies outside its domain; in `update`, if predictions or targets have no fitting shape or type.

    Note:
        Sums are kept, not predictions, so that memory does not grow, and ranks add theirs. Updates without targets count for what needs
        none; if no update had targets, their measures are absent. The calibration error is that of torchmetrics'
        ``MulticlassCalibrationError`` on probabilities, which stores all confidences, and sets those of exactly 1 apart from the last
        bin, so that rounding decides; here they belong to it.

    References:
        - A. Krogh and J. Vedelsby, "Neural Network Ensembles, Cross Validation, and Active Learning", NeurIPS, 1994.
        - C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML, 2017.

    Example:
        >>> measures = EnsembleMeasures()
        >>> for _ in range(3):  # batches of 8 samples, predicted by 5 members
        ...     measures.update(torch.randn(5, 8, 4), torch.randint(4, (8,)))
        >>> list(measures.compute())
        ['disagreement', 'diversity', 'predictive_entropy', 'mutual_information', 'nll', 'brier', 'calibration_error']
    """

    is_differentiable = False
    full_state_update = False
    count: Tensor
    sums: Tensor
    labelled: Tensor
    labelled_sums: Tensor
    bin_sums: Tensor

    def __init__(
        self,
        *,
        combine: Combine = "probabilities",
        output: Output = "logits",
        class_dim: int = -1,
        bins: int = 15,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_combination(combine, output)
        self.combine, self.output, self.class_dim = combine, output, class_dim
        self.bins, self.ignore_index = check_count("bins", bins), ignore_index
        regression = combine == "mean"
        self._names = ("variance",) if regression else ("disagreement", "diversity", "predictive_entropy", "mutual_information")
        self._labelled_names = ("mse",) if regression else ("nll", "brier")
        self.add_state("count", torch.tensor(0), "sum")
        self.add_state("sums", torch.zeros(len(self._names)), "sum")
        self.add_state("labelled", torch.tensor(0), "sum")
        self.add_state("labelled_sums", torch.zeros(len(self._labelled_names)), "sum")
        self.add_state("bin_sums", torch.zeros(2, 0 if regression else bins), "sum")  # hits, confidences

    @override
    def update(self, member_predictions: Tensor, target: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            member_predictions: What each member predicts, (M, N, ...), as `nn.Ensemble.member_predictions` returns it.
            target: Classes, (N, ...), or, in regression, numbers of the shape of one member's prediction.
        """
        if self.combine == "mean":
            self._update_numbers(member_predictions, target)
        else:
            self._update_classes(member_predictions, target)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the measures by name, means over all samples of all ranks."""
        found = dict(zip(self._names, self.sums / self.count, strict=True))
        if self.labelled > 0:
            found |= zip(self._labelled_names, self.labelled_sums / self.labelled, strict=True)
            if self.combine != "mean":
                found["calibration_error"] = (self.bin_sums[0] - self.bin_sums[1]).abs().sum() / self.labelled
        return found

    def _update_classes(self, predictions: Tensor, target: Tensor | None) -> None:
        logs = _classes_last(predictions, self.output, self.class_dim)
        if target is not None:
            fitting = _fitting_target(target, logs[0], predictions[0], self.ignore_index)
            kept = fitting != self.ignore_index
            logs, target = logs[:, kept], fitting[kept]
        uncertainty = decompose_uncertainty(logs)
        each = (_disagreement(logs), _diversity(logs), uncertainty.total, uncertainty.epistemic)
        self.count = self.count + each[0].numel()
        self.sums = self.sums + torch.stack([values.sum() for values in each]).to(self.sums)
        if target is not None:
            together = combine_predictions(logs, combine=self.combine).log_softmax(-1)
            missed = (-together.gather(-1, target[:, None]), _brier(together, target))
            self.labelled = self.labelled + len(target)
            self.labelled_sums = self.labelled_sums + torch.stack([values.sum() for values in missed]).to(self.sums)
            confidences, chosen = together.exp().float().max(-1)
            edges = torch.linspace(0, 1, self.bins + 1, device=confidences.device)[1:-1]
            index = torch.bucketize(confidences, edges, right=True)
            hits = (chosen == target).to(confidences)
            self.bin_sums = self.bin_sums.index_add(1, index, torch.stack([hits, confidences]).to(self.sums))

    def _update_numbers(self, predictions: Tensor, target: Tensor | None) -> None:
        spread = decompose_uncertainty(_checked(predictions), combine="mean").total
        self.count = self.count + spread.numel()
        self.sums = self.sums + spread.sum().to(self.sums)
        if target is not None:
            if target.shape != spread.shape:
                msg = f"`target` must have the shape of one member's prediction, {tuple(spread.shape)}, got {tuple(target.shape)}."
                raise ArgumentError(msg)
            mean = predictions.mean(0, dtype=spread.dtype)
            self.labelled = self.labelled + spread.numel()
            self.labelled_sums = self.labelled_sums + (mean - target).square().sum().to(self.sums)


def _checked(predictions: Tensor) -> Tensor:
    if predictions.ndim < 2 or not len(predictions) or not predictions.is_floating_point():
        kind = str(predictions.dtype).removeprefix("torch.")
        msg = f"Predictions must be floating-point numbers, (members, samples, ...), got {kind} of shape {tuple(predictions.shape)}."
        raise ArgumentError(msg)
    return predictions


def _classes_last(predictions: Tensor, output: Output, class_dim: int) -> Tensor:
    """Return logarithms of probabilities, (M, N, ..., C), C at least 2."""
    check_combination("probabilities", output)
    logs, dim, binary = log_probabilities(_checked(predictions), output, class_dim)
    if not binary:
        return logs.movedim(dim, -1)
    return logs if predictions.ndim == 2 else logs.squeeze(class_dim + 1 if class_dim >= 0 else class_dim - 1)


def _fitting_target(target: Tensor, logs: Tensor, prediction: Tensor, ignored: int = -100) -> Tensor:
    """Check the true classes; those of a sigmoid may have its dimension of size 1, and its type."""
    points, classes = logs.shape[:-1], logs.shape[-1]
    if target.shape not in {points, prediction.shape} or target.numel() != points.numel():
        msg = f"`target` must have one class for each of {tuple(points)} predictions, got shape {tuple(target.shape)}."
        raise ArgumentError(msg)
    whole = target.long()
    wrong = ((whole < 0) | (whole >= classes) | (whole != target)) & (whole != ignored)
    if wrong.any():
        msg = f"`target` must hold classes 0 to {classes - 1}, got {target[wrong][0].item()}. Check `class_dim`, or set `ignore_index`."
        raise ArgumentError(msg)
    return whole.reshape(points)


def _disagreement(logs: Tensor) -> Tensor:
    members = len(logs)
    votes = one_hot(logs.argmax(-1), logs.shape[-1]).sum(0)
    agreeing = (votes * (votes - 1)).sum(-1)
    return 1 - agreeing.to(logs.dtype) / (members * (members - 1)) if members > 1 else torch.zeros_like(logs[0, ..., 0])


def _diversity(logs: Tensor) -> Tensor:
    probabilities = logs.exp()
    return (probabilities - probabilities.mean(0)).square().mean(0).sum(-1)


def _brier(logs: Tensor, target: Tensor) -> Tensor:
    miss = logs.exp() - one_hot(target, logs.shape[-1])
    return miss.square().sum(-1)
