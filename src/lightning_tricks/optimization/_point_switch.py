"""The switch between the point that schedule-free optimizers train and the average that is evaluated."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_tricks._core.lightning import LightningModule, Trainer, override
from lightning_tricks._core.state_dicts import laid_out, put_beside, read_beside, replaced, write_parts
from lightning_tricks._core.strategies import holder_of, is_sharded, named_tensors, return_to_shards
from lightning_tricks._core.surgery import Patches
from lightning_tricks._core.swapping import SwappingTrick
from lightning_tricks.optimization._schedule_free_points import ScheduleFreeOptimizer
from lightning_tricks.optimization._wrapping import layers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_tricks._core.shards import Shards

__all__ = ["PointSwitch"]


class PointSwitch(SwappingTrick):
    """The base of callbacks whose optimizers may be schedule-free.

    Evaluations, checkpoints and the end of a fit see the average x of each schedule-free optimizer; training goes on from y to the bit.
    With other optimizers it does nothing.
    """

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self._switched: list[ScheduleFreeOptimizer] = []  # for the present evaluation
        self._deployment = Patches()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.evaluation_owner:
            self._deployment.wrap(trainer.strategy, "lightning_module_state_dict", partial(self._deploying, trainer))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._deployment.undo()

    @override
    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        # After a fit that an exception has ended, the parameters hold y, unless other weights have been loaded since.
        training = trainer.state.fn == "fit"
        self._switched = [each for each in _schedule_free(trainer) if each.kept is None and (training or not each.overwritten)]
        for optimizer in self._switched:
            return_to_shards(module)
            optimizer.eval()

    @override
    def _leave(self) -> None:
        while self._switched:
            self._switched.pop().train()

    @override
    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        for optimizer in _schedule_free(trainer):
            return_to_shards(module)
            optimizer.eval()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if trainer.state.fn == "fit":
            for optimizer in _schedule_free(trainer):
                return_to_shards(pl_module)
                optimizer.train()

    def _pack_points(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return what resuming needs of y, for this callback's entry in a checkpoint. All ranks must call this together."""
        optimizers = _schedule_free(trainer)
        if not optimizers:
            return {}
        trained, likes = _by_name(module, [optimizer.trained() for optimizer in optimizers])
        sharded = is_sharded(checkpoint["state_dict"])
        tensors = laid_out(trained, likes, sharded=sharded)
        dtypes = put_beside(checkpoint["state_dict"], tensors, "trained", self.state_key) if sharded else {}
        return {"trained": {} if sharded else tensors, "sharded": {"trained": dtypes}}

    def _unpack_points(self, trainer: Trainer, module: LightningModule, entry: Mapping[str, Any]) -> None:
        """Let the module, which has been given x, hold y."""
        if "trained" in entry:
            return_to_shards(module)
            write_parts(module, read_beside(entry, "trained", module, trainer.ckpt_path, self.state_key))

    def _deploying(self, trainer: Trainer, state_dict: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def deployed() -> dict[str, Any]:
            averages, likes = _by_name(trainer.lightning_module, [optimizer.averages() for optimizer in _schedule_free(trainer)])
            return replaced(state_dict(), averages, likes, trainer.lightning_module) if averages else state_dict()

        return deployed


def _schedule_free(trainer: Trainer) -> list[ScheduleFreeOptimizer]:
    return [layer for optimizer in trainer.optimizers for layer in layers_of(optimizer) if isinstance(layer, ScheduleFreeOptimizer)]


def _by_name(module: nn.Module, points: list[dict[nn.Parameter, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor | Shards]]:
    """Return the parts of points, and what they are spread like, by the names of the parameters that they are points of."""
    return_to_shards(module)
    parts = {id(parameter): part for each in points for parameter, part in each.items()}
    named = {id(holder_of(like)): (name, like) for name, like in reversed(named_tensors(module).items())}  # tied ones by the first name
    likes = dict(named[identity] for identity in parts if identity in named)
    return {name: parts[id(holder_of(like))] for name, like in likes.items()}, likes
