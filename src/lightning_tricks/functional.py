"""The tricks as plain functions, for use without a Trainer."""

from lightning_tricks._core.weights import using_weights
from lightning_tricks.averaging._ema import ema_decay, ema_update_
from lightning_tricks.averaging._export import averaged_state_dict
from lightning_tricks.averaging._power_ema import power_ema_decay, power_ema_gamma, power_ema_sigma_rel
from lightning_tricks.averaging._snapshots import synthesize_ema
from lightning_tricks.averaging._soup import Soup, greedy_soup, uniform_soup
from lightning_tricks.data._input_standardization import standardize_inputs
from lightning_tricks.data._standardizer import remove_standardization
from lightning_tricks.data._statistics import StandardizationStatistics, standardization_statistics, whitening_matrix
from lightning_tricks.data._target_standardization import standardize_targets
from lightning_tricks.ensembling._bagging import OutOfBag
from lightning_tricks.ensembling._combining import Uncertainty, combine_predictions, decompose_uncertainty
from lightning_tricks.ensembling._measures import brier_score, disagreement, diversity
from lightning_tricks.ensembling._train_ensemble import TrainedEnsemble, train_ensemble
from lightning_tricks.normalization._activation_swap import swap_activation
from lightning_tricks.normalization._batch_norm_fold import FoldReport, fold_batch_norm
from lightning_tricks.normalization._batch_norm_refresh import refresh_batch_norm
from lightning_tricks.normalization._initialization import initialize
from lightning_tricks.normalization._insert_norm import insert_norm
from lightning_tricks.normalization._norm_swap import swap_norm
from lightning_tricks.normalization._self_normalizing import make_self_normalizing
from lightning_tricks.normalization._weight_normalization import apply_weight_normalization, remove_weight_normalization
from lightning_tricks.normalization._weight_standardization import apply_weight_standardization, remove_weight_standardization
from lightning_tricks.optimization._decay import decay_weights_
from lightning_tricks.stochastic._drop_block import apply_drop_block, remove_drop_block
from lightning_tricks.stochastic._drop_connect import apply_drop_connect, remove_drop_connect
from lightning_tricks.stochastic._dropout import apply_dropout, remove_dropout
from lightning_tricks.stochastic._feature_noise import apply_feature_noise, remove_feature_noise
from lightning_tricks.stochastic._fractional_max_pool import apply_fractional_max_pool, remove_fractional_max_pool
from lightning_tricks.stochastic._mc_dropout import MCClassification, MCRegression, mc_dropout
from lightning_tricks.stochastic._stochastic_depth import apply_stochastic_depth, remove_stochastic_depth

__all__ = [
    "FoldReport",
    "MCClassification",
    "MCRegression",
    "OutOfBag",
    "Soup",
    "StandardizationStatistics",
    "TrainedEnsemble",
    "Uncertainty",
    "apply_drop_block",
    "apply_drop_connect",
    "apply_dropout",
    "apply_feature_noise",
    "apply_fractional_max_pool",
    "apply_stochastic_depth",
    "apply_weight_normalization",
    "apply_weight_standardization",
    "averaged_state_dict",
    "brier_score",
    "combine_predictions",
    "decay_weights_",
    "decompose_uncertainty",
    "disagreement",
    "diversity",
    "ema_decay",
    "ema_update_",
    "fold_batch_norm",
    "greedy_soup",
    "initialize",
    "insert_norm",
    "make_self_normalizing",
    "mc_dropout",
    "power_ema_decay",
    "power_ema_gamma",
    "power_ema_sigma_rel",
    "refresh_batch_norm",
    "remove_drop_block",
    "remove_drop_connect",
    "remove_dropout",
    "remove_feature_noise",
    "remove_fractional_max_pool",
    "remove_standardization",
    "remove_stochastic_depth",
    "remove_weight_normalization",
    "remove_weight_standardization",
    "standardization_statistics",
    "standardize_inputs",
    "standardize_targets",
    "swap_activation",
    "swap_norm",
    "synthesize_ema",
    "train_ensemble",
    "uniform_soup",
    "using_weights",
    "whitening_matrix",
]
