"""What a strategy allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_tricks.errors import UnsupportedStrategyError

if TYPE_CHECKING:
    from lightning_tricks._core.lightning import Trainer

__all__ = ["require_whole_weights"]

_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def require_whole_weights(trainer: Trainer, trick: str) -> None:
    """Refuse strategies that shard parameters over ranks.

    The strategy is known by the names in its ancestry, since Lightning exists under two package names.

    Raises:
        UnsupportedStrategyError: If the strategy shards.
    """
    if kinds := {kind.__name__ for kind in type(trainer.strategy).__mro__}.intersection(_SHARDING):
        msg = (
            f"{trick} needs every rank to hold whole weights, and {kinds.pop()} shards them. "
            "Use a single device or `strategy='ddp'`, or remove the callback."
        )
        raise UnsupportedStrategyError(msg)
