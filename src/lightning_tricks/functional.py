"""The tricks as plain functions, for use without a Trainer."""

from lightning_tricks._core.weights import using_weights
from lightning_tricks.averaging._ema import ema_decay, ema_update_
from lightning_tricks.averaging._export import averaged_state_dict
from lightning_tricks.averaging._power_ema import power_ema_decay, power_ema_gamma, power_ema_sigma_rel
from lightning_tricks.averaging._snapshots import synthesize_ema
from lightning_tricks.averaging._soup import Soup, greedy_soup, uniform_soup
from lightning_tricks.normalization._activation_swap import swap_activation
from lightning_tricks.normalization._batch_norm_refresh import refresh_batch_norm
from lightning_tricks.normalization._initialization import initialize
from lightning_tricks.normalization._self_normalizing import make_self_normalizing
from lightning_tricks.optimization._decay import decay_weights_
from lightning_tricks.stochastic._stochastic_depth import apply_stochastic_depth, remove_stochastic_depth

__all__ = [
    "Soup",
    "apply_stochastic_depth",
    "averaged_state_dict",
    "decay_weights_",
    "ema_decay",
    "ema_update_",
    "greedy_soup",
    "initialize",
    "make_self_normalizing",
    "power_ema_decay",
    "power_ema_gamma",
    "power_ema_sigma_rel",
    "refresh_batch_norm",
    "remove_stochastic_depth",
    "swap_activation",
    "synthesize_ema",
    "uniform_soup",
    "using_weights",
]
