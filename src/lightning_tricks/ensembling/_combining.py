"""One prediction from those of several members, and what their disagreement tells.

Sources: L. K. Hansen and P. Salamon, "Neural network ensembles", TPAMI, 1990, for averages and votes; B. Lakshminarayanan, A. Pritzel
and C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS, 2017, for mean probabilities;
S. Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep Learning for Efficient and Risk-sensitive Learning", ICML, 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import logsigmoid, one_hot

from lightning_tricks._core.checks import check_choice
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Combine", "Output", "Uncertainty", "check_combination", "combine_predictions", "decompose_uncertainty", "log_probabilities"]

Combine = Literal["probabilities", "logits", "vote", "mean"]
Output = Literal["logits", "probabilities"]


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """How uncertain the prediction of several members is, and why; ``total = aleatoric + epistemic``.

    Attributes:
        total: Classification: the entropy ``H(p)`` of the mean probabilities p, in nats. Regression: the variance.
        aleatoric: What the members agree is uncertain, noise in the data: the mean ``1/M Σ_m H(p_m)`` of their entropies. Zero in
            regression, whose members predict no variance.
        epistemic: What they disagree about, for lack of data: the mutual information ``H(p) − 1/M Σ_m H(p_m)``, or the variance
            ``1/M Σ_m (y_m − ȳ)²`` of their predictions.

    Example:
        >>> sure_but_opposed = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])
        >>> found = decompose_uncertainty(sure_but_opposed)
        >>> found.total.item() > 0.69, found.aleatoric.item() < 1e-6
        (True, True)
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def check_combination(combine: Combine, output: Output) -> None:
    """Check that members whose outputs are of a kind can be combined in a way."""
    check_choice("combine", combine, ("probabilities", "logits", "vote", "mean"))
    check_choice("output", output, ("logits", "probabilities"))
    if combine == "logits" and output == "probabilities":
        msg = "`combine='logits'` must have members that return logits, got output='probabilities'. Pass combine='probabilities'."
        raise ArgumentError(msg)


def combine_predictions(
    predictions: Tensor, *, combine: Combine = "probabilities", output: Output = "logits", class_dim: int = -1
) -> Tensor:
    """Put the predictions of M members together into one of the same kind.

    With ``p_m = softmax(z_m)`` of the logits ``z_m`` and the votes ``v_c`` of members whose largest entry is that of class c:

    - ``"probabilities"``: ``log(1/M Σ_m p_m)``, logits whose softmax is the mean probability;
    - ``"logits"``: ``1/M Σ_m z_m``;
    - ``"vote"``: ``log((v + 1/M Σ_m p_m)/(M + 1))``, the majority vote, in which the mean probability decides between equals;
    - ``"mean"``: ``1/M Σ_m y_m``, for regression.

    Args:
        predictions: What the members return, stacked along a first dimension.
        combine: How they are combined.
        output: What they are: with ``"probabilities"``, those are taken and returned in place of logits.
        class_dim: Dimension of the classes in what one member returns: −1 for (N, C), 1 for maps (N, C, H, W). If it has size 1, or
            there is none, the logit is that of a sigmoid.

    Returns:
        The combined prediction, in the members' dtype.

    Shape:
        - predictions: (M, N, ...), M members
        - Output: (N, ...)

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - L. K. Hansen and P. Salamon, "Neural network ensembles", TPAMI, 1990.
        - B. Lakshminarayanan, A. Pritzel and C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
          Ensembles", NeurIPS, 2017.

    Example:
        >>> probabilities = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]])
        >>> combine_predictions(probabilities, output="probabilities")
        tensor([[0.5667, 0.4333]])
        >>> combine_predictions(probabilities, output="probabilities", combine="vote")
        tensor([[0.3917, 0.6083]])
    """
    check_combination(combine, output)
    if combine in {"mean", "logits"}:
        return predictions.mean(0)
    logs, dim, binary = log_probabilities(predictions, output, class_dim)
    joined = torch.logsumexp(logs, 0) - math.log(len(logs)) if output == "logits" else logs.exp().mean(0)
    if combine == "vote":
        votes = one_hot(logs.argmax(dim), logs.shape[dim]).movedim(-1, dim).sum(0)
        share = (votes + logs.exp().mean(0)) / (len(logs) + 1)
        joined = share.log() if output == "logits" else share
    if binary:
        ones, zeros = joined.select(-1, 1), joined.select(-1, 0)
        joined = ones - zeros if output == "logits" else ones
    return joined.to(predictions.dtype)


def decompose_uncertainty(
    predictions: Tensor, *, combine: Combine = "probabilities", output: Output = "logits", class_dim: int = -1
) -> Uncertainty:
    """Tell how uncertain M members are together, and how much of it is their disagreement.

    Args:
        predictions: What the members return, stacked along a first dimension.
        combine: ``"mean"`` takes them for numbers to be regressed, anything else for classes.
        output: What classifiers return.
        class_dim: Dimension of the classes in what one member returns.

    Returns:
        The parts, for each sample.

    Shape:
        - predictions: (M, N, C, ...), classes at `class_dim`
        - Output: (N, ...), without the classes; in regression (N, ...) as the members return it

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - S. Depeweg, J. M. Hernández-Lobato, F. Doshi-Velez and S. Udluft, "Decomposition of Uncertainty in Bayesian Deep Learning for
          Efficient and Risk-sensitive Learning", ICML, 2018.

    Example:
        >>> decompose_uncertainty(torch.tensor([[[1.0]], [[3.0]]]), combine="mean").epistemic
        tensor([[1.]])
    """
    check_combination(combine, output)
    if combine == "mean":
        wide = _widened(predictions)
        spread = (wide - wide.mean(0)).square().mean(0)
        return Uncertainty(spread, torch.zeros_like(spread), spread)
    logs, dim, binary = log_probabilities(predictions, output, class_dim)
    total = _entropy(torch.logsumexp(logs, 0) - math.log(len(logs)), dim if dim < 0 else dim - 1)
    aleatoric = _entropy(logs, dim).mean(0)
    if binary and predictions.ndim > 2:
        total, aleatoric = total.squeeze(class_dim), aleatoric.squeeze(class_dim)
    return Uncertainty(total, aleatoric, (total - aleatoric).clamp(min=0))  # less than zero is rounding


def _widened(predictions: Tensor) -> Tensor:
    """Raise half precision, in which small probabilities vanish, to single."""
    return predictions.float() if predictions.dtype in {torch.float16, torch.bfloat16} else predictions


def log_probabilities(predictions: Tensor, output: Output, class_dim: int) -> tuple[Tensor, int, bool]:
    """Return the logarithms of each member's probabilities, the dimension of the classes, and whether one number stood for two of them.

    If it did, the two stand along a last dimension of their own.
    """
    wide, dim = _widened(predictions), class_dim + 1 if class_dim >= 0 else class_dim
    if predictions.ndim == 2 or predictions.shape[dim] == 1:
        both = (logsigmoid(-wide), logsigmoid(wide)) if output == "logits" else (torch.log1p(-wide), wide.log())
        return torch.stack(both, -1), -1, True
    return wide.log_softmax(dim) if output == "logits" else wide.log(), dim, False


def _entropy(logs: Tensor, dim: int) -> Tensor:
    return -torch.where(logs == -math.inf, 0.0, logs.exp() * logs).sum(dim)
