"""The tricks as plain functions, for use without a Trainer."""

from lightning_tricks._core.weights import using_weights
from lightning_tricks.averaging._ema import ema_decay, ema_update_
from lightning_tricks.normalization._batch_norm_refresh import refresh_batch_norm

__all__ = ["ema_decay", "ema_update_", "refresh_batch_norm", "using_weights"]
