"""The tricks as plain functions, for use without a Trainer."""

from lightning_tricks._core.weights import using_weights
from lightning_tricks.averaging._ema import ema_decay, ema_update_
from lightning_tricks.averaging._export import averaged_state_dict
from lightning_tricks.averaging._power_ema import power_ema_decay, power_ema_gamma, power_ema_sigma_rel
from lightning_tricks.averaging._snapshots import synthesize_ema
from lightning_tricks.averaging._soup import Soup, greedy_soup, uniform_soup
from lightning_tricks.normalization._batch_norm_refresh import refresh_batch_norm
from lightning_tricks.optimization._decay import decay_weights_
from lightning_tricks.stochastic._drop_connect import apply_drop_connect, remove_drop_connect
from lightning_tricks.stochastic._stochastic_depth import apply_stochastic_depth, remove_stochastic_depth

__all__ = [
    "Soup",
    "apply_drop_connect",
    "apply_stochastic_depth",
    "averaged_state_dict",
    "decay_weights_",
    "ema_decay",
    "ema_update_",
    "greedy_soup",
    "power_ema_decay",
    "power_ema_gamma",
    "power_ema_sigma_rel",
    "refresh_batch_norm",
    "remove_drop_connect",
    "remove_stochastic_depth",
    "synthesize_ema",
    "uniform_soup",
    "using_weights",
]
