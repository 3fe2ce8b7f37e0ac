"""The tricks as plain functions, for use without a Trainer."""

from lightning_tricks._core.weights import using_weights
from lightning_tricks.averaging._ema import ema_decay, ema_update_
from lightning_tricks.averaging._export import averaged_state_dict
from lightning_tricks.averaging._soup import Soup, greedy_soup, uniform_soup
from lightning_tricks.normalization._batch_norm_refresh import refresh_batch_norm

__all__ = [
    "Soup",
    "averaged_state_dict",
    "ema_decay",
    "ema_update_",
    "greedy_soup",
    "refresh_batch_norm",
    "uniform_soup",
    "using_weights",
]
