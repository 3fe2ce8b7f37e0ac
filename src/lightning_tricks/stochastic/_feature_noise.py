"""Feature noise: add Gaussian noise to features, or multiply them by it, while training.

A network that has to do with disturbed features relies on no single one of them. Small noise on the input smooths the function that is
learned, as Tikhonov's penalty on its gradient does; noise that multiplies with mean one is Gaussian dropout.

Sources: C. M. Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", Neural Computation 7(1), 1995; N. Srivastava,
G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15,
2014, section 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_tricks._core.checks import check_bool, check_choice, check_in_interval, check_patterns, check_seed
from lightning_tricks._core.draws import Clock
from lightning_tricks._core.generators import normal
from lightning_tricks._core.lightning import LightningModule, override
from lightning_tricks._core.schedule import Schedule, check_varying
from lightning_tricks._core.selection import select_modules
from lightning_tricks.errors import ArgumentError, TrickError
from lightning_tricks.stochastic._drawing import Changed, Drawing, DrawingTrick, apply_drawings, remove_drawings

__all__ = ["FeatureNoise", "apply_feature_noise", "remove_feature_noise"]

Kind = Literal["additive", "multiplicative"]
At = Literal["output", "input"]

_FUNCTION = "apply_feature_noise"


def apply_feature_noise(
    model: nn.Module,
    std: float,
    *,
    where: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    kind: Kind = "additive",
    relative: bool = False,
    at: At = "output",
    seed: int = 0,
) -> Changed:
    """Let noise act on features of a model while it trains; a second call replaces the first.

    Each forward pass of the model in training mode draws anew. The model can be pickled and copied, and its keys stay.

    Args:
        model: The model, which is changed in place.
        std: Standard deviation of the noise, in [0, ∞).
        where: Globs over names of modules on whose features noise acts.
        exclude: Globs over names of modules that are left alone.
        kind: ``"additive"`` or ``"multiplicative"``, as in the callback.
        relative: Whether additive noise is measured in the features' own standard deviation, as in the callback.
        at: ``"output"`` or ``"input"`` of the modules, as in the callback.
        seed: What the draws follow from, at least 0; give each process its own.

    Returns:
        A report: ``names``, the modules whose features are disturbed.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no module is found.
        TrickConflictError: If a callback of a running fit disturbs features of this model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> apply_feature_noise(model, 0.1, where="1").names
        ('1',)
    """
    check_in_interval("std", std, "[0, ∞)")
    check_patterns("where", where, empty=False)
    check_patterns("exclude", exclude, empty=True)
    _check_kind(kind, relative=relative, at=at)
    clock = Clock(check_seed(seed))
    selected = select_modules(model, where, exclude, trick=_FUNCTION)
    remove_feature_noise(model)
    noises = [_Noise(module, name, kind, relative=relative, at=at, clock=clock, owner=_FUNCTION) for name, module in selected.items()]
    return apply_drawings(model, noises, clock, strength=std)


def remove_feature_noise(model: nn.Module) -> None:
    """Let no noise act, as before `apply_feature_noise`; on any other model, nothing happens.

    Raises:
        TrickConflictError: If a callback of a running fit disturbs features of this model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = apply_feature_noise(model, 0.1, where="1")
        >>> remove_feature_noise(model)
        >>> "forward" in vars(model[1])
        False
    """
    remove_drawings(model, _Noise, function=_FUNCTION)


def _check_kind(kind: Kind, *, relative: bool, at: At) -> None:
    check_choice("kind", kind, ("additive", "multiplicative"))
    check_choice("at", at, ("output", "input"))
    if check_bool("relative", relative) and kind == "multiplicative":
        msg = (
            "`relative=True` is for additive noise, got kind='multiplicative', which is relative to each feature already. Pass one of both."
        )
        raise ArgumentError(msg)


class _Noise(Drawing):
    """Lets noise act on the first tensor of floating-point numbers that a module returns, or takes."""

    def __init__(self, module: nn.Module, name: str, kind: Kind, *, relative: bool, at: At, clock: Clock, owner: str) -> None:
        super().__init__(module, name, clock=clock, owner=owner)
        self.kind, self.relative, self.at = kind, relative, at

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.ran = True
        if self.is_idle():
            return self.plain(*arguments, **options)
        if self.at == "input":
            arguments, options = self._disturb_first((arguments, options), "takes")
            return self.plain(*arguments, **options)
        return self._disturb_first(self.plain(*arguments, **options), "returns")

    def _disturb_first(self, values: Any, what: str) -> Any:
        leaves, structure = tree_flatten(values)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not places:
            msg = f"{self.owner} acts on tensors of floating-point numbers, and {self.name!r} {what} none. Exclude it."
            raise TrickError(msg)
        leaves[places[0]] = self._disturb(leaves[places[0]])
        return tree_unflatten(leaves, structure)

    def _disturb(self, x: Tensor) -> Tensor:
        noise: Tensor = normal(self.key(self.clock), self.strength, x.shape, x.dtype, x.device)
        if self.kind == "multiplicative":
            return torch.addcmul(x, x, noise)
        if not self.relative:
            return x + noise
        if x.shape[1:].numel() < 2:
            msg = (
                f"{self.owner} measures noise in the deviation within a sample, and a sample of {self.name!r} is one number: "
                f"{tuple(x.shape)}. Exclude it, or pass `relative=False`."
            )
            raise TrickError(msg)
        return torch.addcmul(x, noise, _deviation(x))


def _deviation(x: Tensor) -> Tensor:
    """Return the standard deviation within each sample, through which no gradient flows."""
    rows = x.detach().flatten(1)
    deviation = (rows.float() if x.element_size() < 4 else rows).std(1, correction=0)
    return deviation.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class FeatureNoise(DrawingTrick):
    """Add Gaussian noise to features while training, ``x + σ · ε``, or multiply them by it, ``x · (1 + σ · ε)``, with ``ε ~ N(0, 1)``.

    Each feature of each sample is disturbed independently. The expectation of what comes out is x, and evaluation uses the plain
    network. Reach for it against overfitting, on the input of small networks and on features between layers.

    Args:
        std: Standard deviation σ, in [0, ∞): a number, or a `Schedule` over optimizer steps.
        where: Glob or globs over qualified names of the modules on whose features noise acts; a glob matches the whole name or its end
            after a dot. Of modules that lie within each other, the outermost counts.
        exclude: Globs over names of modules that are left alone.
        kind: ``"additive"``, ``x + σ · ε``, in the units of x; or ``"multiplicative"``, ``x · (1 + σ · ε)``. The latter is Gaussian
            dropout, which has the variance of dropout with rate p at ``σ = sqrt(p / (1 − p))``.
        relative: Whether additive noise is measured in the standard deviation of the features within a sample, ``x + σ · s · ε``, with
            s over all dimensions but the first. No gradient flows through s.
        at: Whether noise acts on the modules' ``"output"`` or on their ``"input"``: on the first tensor of floating-point numbers.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no module is found.
        TrickConflictError: At setup, if noise acts on one of the modules already.
        TrickError: In training, if a module has no tensor of floating-point numbers, or none of them is called in a whole epoch.

    Note:
        Draws follow from the seed given to Lightning's ``seed_everything``, the rank, the epoch, the step, the batch and the module's
        name. The state of torch's generator stays as it is, and a resumed run draws what it would have drawn. A module that is called
        several times for a batch gets the same noise each time, which activation checkpointing needs; ranks of one tensor-parallel
        group draw alike. The checkpoint holds plain weights and the seed. ``torch.compile`` compiles it into one graph, once.

    References:
        - C. M. Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", Neural Computation 7(1), 1995.
        - N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks
          from Overfitting", JMLR 15, 2014, section 10 (multiplicative noise).

    Example:
        >>> FeatureNoise(0.1, where="backbone", kind="multiplicative")
        FeatureNoise(std=0.1, where='backbone', kind='multiplicative')
    """

    quantity: ClassVar[str] = "std"

    def __init__(
        self,
        std: float | Schedule,
        *,
        where: str | Sequence[str],
        exclude: str | Sequence[str] = (),
        kind: Literal["additive", "multiplicative"] = "additive",
        relative: bool = False,
        at: Literal["output", "input"] = "output",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.std = check_varying("std", std, "[0, ∞)")
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        _check_kind(kind, relative=relative, at=at)
        self.kind, self.relative, self.at = kind, relative, at

    @override
    def make(self, module: LightningModule) -> tuple[Sequence[Drawing], Mapping[str, str]]:
        selected = select_modules(module, self.where, self.exclude, trick=repr(self))
        return [
            _Noise(each, name, self.kind, relative=self.relative, at=self.at, clock=self._clock, owner=repr(self))
            for name, each in selected.items()
        ], {}
