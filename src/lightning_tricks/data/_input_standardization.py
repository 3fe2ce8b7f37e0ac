"""Inputs of mean zero and variance one, by statistics of the training set that are part of the model.

Networks learn fastest when each input has mean zero, a variance like the others', and no correlation with them. The numbers that bring
inputs there belong to the model, as its weights do: they are measured once, on the training set alone, and go with it wherever it goes.

Source: Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, "Efficient BackProp", in: Neural Networks: Tricks of the Trade, Springer, 1998,
section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from lightning_tricks._core.checks import check_bool, check_choice, check_in_interval, check_name
from lightning_tricks._core.lightning import override
from lightning_tricks.data._standardizer import InputStandardizer, attach, submodule
from lightning_tricks.data._standardizing import StandardizingTrick, child_name
from lightning_tricks.data._statistics import Per, StandardizationStatistics, Whitening
from lightning_tricks.errors import ArgumentError

__all__ = ["InputStandardization", "standardize_inputs"]


def standardize_inputs(
    model: nn.Module,
    statistics: StandardizationStatistics | Mapping[str, Any],
    *,
    whitening: Whitening | None = None,
    eps: float = 0.0,
    center: bool = True,
    scale: bool = True,
    argument: int | str | None = None,
    module: str = "",
    name: str | None = None,
) -> None:
    """Let a model standardize its inputs, by statistics that become buffers of it.

    The model gets a child ``input_standardization``, and so further keys, and its `forward` begins with it, in training, in evaluation
    and in exported programs alike.

    Args:
        model: The model, which is changed in place.
        statistics: What `standardization_statistics` returns, or its attributes as a mapping.
        whitening: As in `InputStandardization`; needs statistics with a covariance.
        eps: As in `InputStandardization`.
        center: As in `InputStandardization`.
        scale: As in `InputStandardization`.
        argument: As in `InputStandardization`.
        module: As in `InputStandardization`.
        name: A further part of the child's name, for models with several inputs.

    Raises:
        ArgumentError: If an argument lies outside its domain, or whitening lacks a covariance.
        NothingMatchedError: If there is no module of that name.
        TrickConflictError: If the model standardizes this input already, with other settings.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import standardization_statistics
        >>> net = nn.Identity()
        >>> standardize_inputs(net, standardization_statistics([torch.tensor([[0.0, 5.0], [2.0, 7.0]])]))
        >>> net(torch.tensor([[1.0, 8.0]]))
        tensor([[0., 2.]])
    """
    values = statistics if isinstance(statistics, StandardizationStatistics) else StandardizationStatistics(**statistics)
    _check_whitening(whitening, center=center, scale=scale)
    if whitening is not None and values.covariance is None:
        msg = f"`whitening={whitening!r}` needs statistics with a covariance, and these have none. Measure them with `covariance=True`."
        raise ArgumentError(msg)
    settings = {
        "per": values.per,
        "dim": values.dim,
        "whitening": whitening,
        "eps": check_in_interval("eps", eps, "[0, ∞)"),
        "center": check_bool("center", center),
        "scale": check_bool("scale", scale),
        "argument": _check_argument(argument),
    }
    owner = submodule(model, module, trick="standardize_inputs")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    attach(owner, child_name("input", check_name(name)), InputStandardizer(settings)).set_statistics(values, device=device)


def _check_whitening(whitening: Whitening | None, *, center: bool, scale: bool) -> Whitening | None:
    check_choice("whitening", whitening, (None, "zca", "pca"))
    if whitening is not None and not (center and scale):
        msg = f"`whitening={whitening!r}` centers and scales, got center={center} and scale={scale}. Leave these at True."
        raise ArgumentError(msg)
    return whitening


def _check_argument(value: int | str | None) -> int | str | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and value < 0)):
        msg = f"`argument` must be a position or a name among the arguments of `forward`, or None for the first tensor, got {value!r}."
        raise ArgumentError(msg)
    return value


class InputStandardization(StandardizingTrick):
    """Standardize or whiten inputs by statistics of the training set, inside the model.

    With mean m and variance v of each channel over the training set, ``x ← (x − m)/√(v + ε)``; where the variance is zero, ``x − m``.
    With whitening, ``x ← W(x − m)`` with ``W Σ Wᵀ = 1`` for the covariance Σ of channels or features.

    Reach for it wherever inputs are not standardized by the data set: tables of features, spectra, sensors, images of a domain of its own.

    Args:
        per: ``"channel"``: one mean and variance for each index of dimension `dim`. ``"feature"``: one for each element of a sample.
        batches: Number of training batches of each rank to measure, or ``"all"`` for one epoch.
        whitening: None, or ``"zca"`` or ``"pca"``, which remove correlations, too. Memory grows with the square of the channels, or of
            the features.
        dim: The dimension of channels, not 0; -1 for sequences of vectors, ``(N, L, D)``, and -3 for images with and without a batch.
        eps: ε, at least 0, in squared units of the input: what is added to variances, so that little ones are not blown up.
        center: Whether the mean is taken away.
        scale: Whether values are divided by the standard deviation. Without both, nothing is done.
        item: Index or key in a training batch at which the inputs sit, as `training_step` gets it; None = the first tensor in it.
        argument: Position or name of the inputs among the arguments of `forward`; None = its first floating-point tensor.
        module: Name of the module whose `forward` standardizes what it gets; ``""`` = the LightningModule.
        name: Names the trick in logs and checkpoints, and its keys in the model.

    Raises:
        ArgumentError: If an argument lies outside its domain; when training starts, if there is no batch, or what sits in it is not
            finite or no floating-point tensor.
        NothingMatchedError: At setup, if there is no module of that name.
        TrickConflictError: At setup, if the same input is standardized already.
        TrickError: If a tensor of other channels comes, or the first `training_step` calls `forward` of the module nowhere.

    Note:
        Statistics are measured once, before the first step of the first fit, in float64 and over all ranks, on training data alone,
        augmented as they come. The random state and the loaders are then as before. A fit that resumes, and a second fit of the same
        model, use what there is. The sanity check before training sees plain inputs.

        The model keeps its standardization after the fit. It has further keys, ``input_standardization.mean``, ``.mean_rest``
        and ``.std`` or ``.matrix``; checkpoints record that, and ``lightning_tricks.load_from_checkpoint(ModelClass, path)`` makes a model
        that has them. Lightning's own ``load_from_checkpoint`` names them as unexpected. `functional.remove_standardization` takes
        them out.

        Works under DDP, FSDP and DeepSpeed, with ``torch.compile``, ``torch.export`` and ``torch.jit.trace``. Statistics stay in
        single precision when the model is cast to half.

    References:
        - Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, "Efficient BackProp", in: Neural Networks: Tricks of the Trade, Springer, 1998.
        - A. J. Bell and T. J. Sejnowski, "The 'independent components' of natural scenes are edge filters", Vision Research, 1997.

    Example:
        >>> InputStandardization(per="feature", whitening="zca", eps=1e-2)
        InputStandardization(per='feature', whitening='zca', eps=0.01)
    """

    kind = InputStandardizer
    function = "standardize_inputs"
    what = "input"

    def __init__(
        self,
        *,
        per: Per = "channel",
        batches: int | Literal["all"] = "all",
        whitening: Whitening | None = None,
        dim: int = 1,
        eps: float = 0.0,
        center: bool = True,
        scale: bool = True,
        item: int | str | None = None,
        argument: int | str | None = None,
        module: str = "",
        name: str | None = None,
    ) -> None:
        super().__init__(per=per, batches=batches, dim=dim, eps=eps, center=center, scale=scale, item=item, module=module, name=name)
        self.whitening = _check_whitening(whitening, center=center, scale=scale)
        self.argument = _check_argument(argument)

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("per", "dim", "whitening", "eps", "center", "scale", "argument")}

    @override
    def _overlaps(self, other: StandardizingTrick) -> bool:
        return isinstance(other, InputStandardization) and (self.argument == other.argument or None in {self.argument, other.argument})
