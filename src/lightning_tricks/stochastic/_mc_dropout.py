"""Monte Carlo dropout: several passes with dropout on, whose spread tells what the model does not know.

Sources: Y. Gal and Z. Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning", ICML, 2016;
N. Houlsby, F. Huszár, Z. Ghahramani and M. Lengyel, "Bayesian Active Learning for Classification and Preference Learning", 2011, for
the mutual information; S. Depeweg, J. M. Hernández-Lobato, F. Doshi-Velez and S. Udluft, "Decomposition of Uncertainty in Bayesian Deep
Learning for Efficient and Risk-sensitive Learning", ICML, 2018, for the decomposition of entropy.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_tricks._core.checks import check_choice, check_count, check_seed
from lightning_tricks._core.draws import fold
from lightning_tricks._core.surgery import StandIn, stand_ins
from lightning_tricks.errors import NothingMatchedError, TrickError
from lightning_tricks.stochastic._dropout_rates import rates_of
from lightning_tricks.stochastic._masking import Masking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MCClassification", "MCRegression", "MeanOfPasses", "mc_dropout"]

_CALLER = "mc_dropout"


@dataclass(frozen=True)
class MCRegression:
    """What T passes with dropout on say of numbers.

    Attributes:
        mean: The predictive mean, ``1/T Σ_t y_t``.
        variance: The variance of the passes, ``1/T Σ_t (y_t − mean)²``.

    Example:
        >>> MCRegression(mean=torch.zeros(2), variance=torch.ones(2)).variance
        tensor([1., 1.])
    """

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class MCClassification:
    """What T passes with dropout on say of classes; entropies in nats.

    Attributes:
        mean: The predictive probabilities ``p = 1/T Σ_t p_t``, of the shape of the logits.
        variance: The variance of each probability, ``1/T Σ_t (p_t − p)²``.
        entropy: The predictive entropy ``H(p) = −Σ_c p_c ln p_c``, all uncertainty there is.
        expected_entropy: ``1/T Σ_t H(p_t)``, uncertainty that stays if the weights are known: that of the data.
        mutual_information: ``H(p) − 1/T Σ_t H(p_t)``, uncertainty about the weights, the score of BALD.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]])
        >>> sure = MCClassification(half, 0 * half, half.sum(1), half.sum(1), torch.zeros(1))
        >>> sure.mutual_information
        tensor([0.])
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


@overload
def mc_dropout(
    model: nn.Module, x: Any, *, samples: int = ..., task: Literal["classification"] = ..., dim: int = ..., seed: int = ...
) -> MCClassification: ...


@overload
def mc_dropout(
    model: nn.Module, x: Any, *, samples: int = ..., task: Literal["regression"], dim: int = ..., seed: int = ...
) -> MCRegression: ...


def mc_dropout(
    model: nn.Module,
    x: Any,
    *,
    samples: int = 20,
    task: Literal["classification", "regression"] = "classification",
    dim: int = -1,
    seed: int = 0,
) -> MCClassification | MCRegression:
    """Predict by T passes with dropout on, and tell how far they differ.

    Only dropout is switched to training; BatchNorm and everything else is evaluated, without gradients, and all modes are put back. What
    counts as dropout is said at `apply_dropout`. The same seed gives the same draws, and no random state changes.

    Args:
        model: A model with dropout that acts; called with x alone.
        x: The model's input.
        samples: Number T of passes, at least 1.
        task: ``"classification"`` takes the outputs for logits; ``"regression"`` takes them as they are.
        dim: Dimension of the classes.
        seed: What the draws follow from, at least 0. Batches predicted with one seed share their draws.

    Returns:
        `MCClassification` or `MCRegression`, with statistics in at least float32.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If the model has no dropout that acts.
        TrickError: If the model gives anything but a tensor, or logits of fewer than two classes.

    Note:
        The variance of regression is that of the passes. Gal & Ghahramani add the noise of the data, ``1/τ``, which depends on the
        weight decay and the length scale of the prior, and is left to the caller.

    References:
        - Y. Gal and Z. Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning", ICML, 2016.
        - N. Houlsby, F. Huszár, Z. Ghahramani and M. Lengyel, "Bayesian Active Learning for Classification and Preference Learning",
          arXiv:1112.5745, 2011.
        - S. Depeweg, J. M. Hernández-Lobato, F. Doshi-Velez and S. Udluft, "Decomposition of Uncertainty in Bayesian Deep Learning for
          Efficient and Risk-sensitive Learning", ICML, 2018.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
        >>> prediction = mc_dropout(model, torch.randn(8, 4), samples=10)
        >>> prediction.mean.shape, prediction.mutual_information.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """
    check_choice("task", task, ("classification", "regression"))
    check_count("samples", samples)
    check_seed(seed)
    moments = _Moments()
    entropies = _Moments()

    def take(output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
            msg = f"`{_CALLER}` needs a model that gives one tensor of floating-point numbers, got {found}. Wrap it in one that does."
            raise TrickError(msg)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if task == "classification":
            if dim not in range(-output.ndim, output.ndim) or output.shape[dim] < 2:
                msg = (
                    f"`dim={dim!r}` must be a dimension of at least two classes, got logits of shape {tuple(output.shape)}. "
                    "For one logit z of two classes, let the model give (0, z)."
                )
                raise TrickError(msg)
            output = output.softmax(dim)
            entropies.add(_entropy(output, dim))
        moments.add(output)

    with torch.no_grad():
        _draw_passes(model, lambda: model(x), samples=samples, seed=seed, take=take, caller=f"`{_CALLER}`")
    if task == "regression":
        return MCRegression(moments.mean, moments.variance)
    entropy, expected = _entropy(moments.mean, dim), entropies.mean
    return MCClassification(moments.mean, moments.variance, entropy, expected, (entropy - expected).clamp(min=0.0))


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(dim)
    return entropy


class _Moments:
    """Mean and variance of tensors that come one by one."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, value: Tensor) -> None:
        self.count += 1
        change = value - self.mean
        self.mean = self.mean + change / self.count
        self._squares = self._squares + change * (value - self.mean)

    @property
    def variance(self) -> Tensor:
        return self._squares / self.count


def _draw_passes(
    model: nn.Module, compute: Callable[[], Any], *, samples: int, seed: int, take: Callable[[Any], None], caller: str
) -> None:
    """Hand on the outputs of several passes of which only dropout is in training; modes and random states stay as they were.

    Raises:
        NothingMatchedError: If the model has no dropout that acts.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices]), _dropout_on(model, caller) as layers:
        for i in range(samples):
            torch.manual_seed(fold(seed, i))
            for layer in layers:
                layer.clock.set(seed, i)
            take(compute())


@contextmanager
def _dropout_on(model: nn.Module, caller: str) -> Iterator[list[Masking]]:
    """Evaluate a model but for its dropout."""
    layers = stand_ins(model, Masking)
    rates = rates_of(model).values()
    if not any(rate.value for rate in rates) and not any(layer.rate for layer in layers):
        msg = (
            f"{caller} needs dropout that acts, and {type(model).__name__} has "
            f"{'rates of zero only' if rates or layers else 'none'}. Train it with dropout, or insert some by `functional.apply_dropout`."
        )
        raise NothingMatchedError(msg)
    modes = [(module, module.training) for module in model.modules()]
    moments = [(layer.clock, layer.clock.now.clone()) for layer in layers]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # which passes by layers
        for rate in rates:
            for reader in rate.readers:
                reader.training = True
        for layer in layers:
            layer.sampling = True
        yield layers
    finally:
        for layer in layers:
            layer.sampling = False
        for clock, now in moments:
            clock.now.copy_(now)
        for module, training in modes:
            module.training = training
        torch.backends.mha.set_fastpath_enabled(fused)


class MeanOfPasses(StandIn):
    """Gives the mean of what a model gives in several passes with dropout on."""

    def __init__(self, model: nn.Module, samples: int, *, seed: int, owner: str) -> None:
        super().__init__(model)
        self.samples, self.seed, self.owner = samples, seed, owner
        self.calls = 0

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        seed, self.calls = fold(self.seed, self.calls), self.calls + 1
        passes: list[tuple[list[Any], TreeSpec]] = []
        moments: list[_Moments] = []

        def take(outputs: Any) -> None:
            values, structure = tree_flatten(outputs)
            if not passes:
                passes.append((values, structure))
                moments.extend(_Moments() for _ in values)
            for value, moment in zip(values, moments, strict=True):
                if isinstance(value, Tensor):
                    moment.add(self._checked(value))

        _draw_passes(self.module, lambda: self.plain(*arguments, **options), samples=self.samples, seed=seed, take=take, caller=self.owner)
        values, structure = passes[0]
        means = [moment.mean.to(value.dtype) if moment.count else value for value, moment in zip(values, moments, strict=True)]
        return tree_unflatten(means, structure)

    def _checked(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            msg = (
                f"{self.owner} takes the mean of what `forward` of {type(self.module).__name__} gives, and {value.dtype} has none. "
                "Let it give logits, probabilities or other floating-point numbers."
            )
            raise TrickError(msg)
        return value.to(torch.promote_types(value.dtype, torch.float32))
