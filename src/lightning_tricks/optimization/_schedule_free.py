"""Schedule-free training.

A decaying learning rate can be replaced by an average. Gradients are taken at a point y between the weights z that the optimizer moves
and their running average x, and x is what one evaluates and deploys. No schedule is needed, and so no length of training, apart from
a warm-up.

Source: A. Defazio, X. Yang, H. Mehta, K. Mishchenko, A. Khaled and A. Cutkosky, "The Road Less Scheduled", NeurIPS, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam

from lightning_tricks._core.extras import require
from lightning_tricks._core.lightning import callbacks_of, override, trainer_of
from lightning_tricks.errors import ArgumentError, TrickError
from lightning_tricks.optimization._point_switch import PointSwitch
from lightning_tricks.optimization._recipe import OptimizerRecipe
from lightning_tricks.optimization._schedule_free_points import GeneralOptimizer, PackagedOptimizer
from lightning_tricks.optimization._wrapping import WrapperRecipe

__all__ = ["ScheduleFree", "is_schedule_free"]

_PACKAGED: Final = {SGD: "SGDScheduleFree", Adam: "AdamWScheduleFree", AdamW: "AdamWScheduleFree", RAdam: "RAdamScheduleFree"}
_WITHOUT_COUNTERPART: Final = ("nesterov", "dampening", "amsgrad", "maximize")  # options that the package's optimizers do not have


@dataclass(frozen=True, repr=False)
class ScheduleFree(WrapperRecipe):
    """Train without a schedule: ``y = (1 − β)z + βx``, ``z ← step(z, ∇L(y))``, ``x ← (1 − c)x + cz``.

    The average x is what one evaluates and deploys, and y is where the model trains. c weighs the newest z by ``k^r η_max^p``, with the
    step's number k and the largest rate so far. Reach for it where the length of training is not known beforehand.

    SGD, Adam, AdamW and RAdam become the schedulefree package's optimizers of these names. Any other optimizer moves z as it is.

    Args:
        recipe: The recipe whose optimizer moves z. A constant rate is meant, larger than with a schedule; warm-up is best.
        momentum: The share β of x in y, in (0, 1), which takes the place of momentum. None takes over SGD's momentum and Adam's first
            beta, and is 0.9 where there is none.
        r: The power r of the step's number, in [0, ∞); 0 weighs early and late steps alike.
        weight_lr_power: The power p of the largest rate so far, in [0, ∞); 2 lets a warm-up count little.

    Raises:
        ArgumentError: If an argument lies outside its domain, another wrapper is inside, or, from `build`, the recipe has an option that
            has no schedule-free counterpart.
        MissingPackageError: From `build`, if the schedulefree package is needed and not installed.
        TrickError: From `build`, in a LightningModule's own `configure_optimizers`, since nobody would switch between x and y there.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        Give the recipe to ``OptimizerFactory``, which switches: validation, test, predict and ``checkpoint["state_dict"]`` see x, and
        training goes on from y, also after an exception and after resuming, to the bit. It therefore clashes with other callbacks that
        replace the weights used for evaluation, such as an `EMA` with ``evaluate=True``. After the fit the module holds x. Outside of
        Lightning, call ``optimizer.eval()`` and ``optimizer.train()``.

        BatchNorm's statistics are those of y; `BatchNormRefresh` measures them for x.

        z is state of the optimizer and sharded where the weights are. While the model is evaluated there is one more copy of the weights.

    References:
        - A. Defazio, X. Yang, H. Mehta, K. Mishchenko, A. Khaled and A. Cutkosky, "The Road Less Scheduled", NeurIPS, 2024.

    Example:
        >>> from lightning_tricks import optim
        >>> optim.ScheduleFree(optim.AdamW(lr=3e-3, weight_decay=0.05))
        ScheduleFree(AdamW(lr=0.003, weight_decay=0.05))
    """

    _: KW_ONLY
    momentum: float | None = None
    r: float = 0.0
    weight_lr_power: float = 2.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.recipe, WrapperRecipe):
            inside = type(self.recipe).__name__
            msg = f"ScheduleFree must be the innermost wrapper, got {inside} inside it. Put ScheduleFree inside, if {inside} can wrap it."
            raise ArgumentError(msg)
        if self.momentum is not None:
            self._check("momentum", "(0, 1)")
        self._check("r", "[0, ∞)")
        self._check("weight_lr_power", "[0, ∞)")

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        trainer = trainer_of(model)
        if trainer is not None and not any(isinstance(callback, PointSwitch) for callback in callbacks_of(trainer)):
            msg = (
                f"{self!r} trains one point and evaluates another, and nobody would switch between them. Pass it to the Trainer as "
                "`callbacks=[OptimizerFactory(…)]` instead of building it in `configure_optimizers`."
            )
            raise TrickError(msg)
        if type(inner) in _PACKAGED:
            return PackagedOptimizer(self._packaged(inner))
        beta = 0.9 if self.momentum is None else self.momentum
        return GeneralOptimizer(inner, momentum=beta, r=self.r, weight_lr_power=self.weight_lr_power)

    def _packaged(self, inner: Optimizer) -> Any:
        """Build the package's optimizer with the groups of one of torch's."""
        schedulefree = require("schedulefree", package="schedulefree", extra="optimizers", who=repr(self))
        for group in inner.param_groups:
            self._check_options(group, decoupled=isinstance(inner, AdamW))
        groups = [self._options(group) for group in inner.param_groups]
        return getattr(schedulefree, _PACKAGED[type(inner)])(groups, r=self.r, weight_lr_power=self.weight_lr_power)

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group of the package's optimizer: what it shares with torch's, and β."""
        beta = self.momentum or group.get("momentum") or group.get("betas", (0.0,))[0] or 0.9
        options = {name: group[name] for name in ("params", "lr", "weight_decay", "eps") if name in group}
        return {**options, "betas": (beta, group["betas"][1])} if "betas" in group else {**options, "momentum": beta}

    def _check_options(self, group: Mapping[str, Any], *, decoupled: bool) -> None:
        for name in _WITHOUT_COUNTERPART:
            if group.get(name):
                msg = f"Schedule-free optimizers have no `{name}`, got {name}={group[name]!r} in {self.recipe!r}. Leave it out."
                raise ArgumentError(msg)
        if "betas" in group and group["weight_decay"] and not (decoupled or group.get("decoupled_weight_decay")):
            msg = (
                f"Schedule-free Adam and RAdam decay weights apart from the gradient, and {self.recipe!r} adds its weight decay to it. Use "
                "`AdamW`, or `decoupled_weight_decay=True` where there is one."
            )
            raise ArgumentError(msg)


def is_schedule_free(recipe: OptimizerRecipe) -> bool:
    """Tell whether a recipe, or one inside it, is schedule-free.

    Example:
        >>> from lightning_tricks import optim
        >>> is_schedule_free(optim.SAM(ScheduleFree(optim.SGD()))), is_schedule_free(optim.SGD())
        (True, False)
    """
    return isinstance(recipe, ScheduleFree) or (isinstance(recipe, WrapperRecipe) and is_schedule_free(recipe.recipe))
