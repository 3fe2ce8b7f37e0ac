"""The tricks as plain functions, for use without a Trainer."""

from lightning_tricks._core.weights import using_weights
from lightning_tricks.averaging._ema import ema_decay, ema_update_

__all__ = ["ema_decay", "ema_update_", "using_weights"]
