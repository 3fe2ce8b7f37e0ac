"""Proven tricks of neural-network training for any PyTorch LightningModule."""

from importlib.metadata import version

from lightning_tricks import errors, functional, nn, optim, schedules, search
from lightning_tricks._loading import load_from_checkpoint
from lightning_tricks.averaging._ema import EMA
from lightning_tricks.averaging._latest_weight_averaging import LatestWeightAveraging
from lightning_tricks.averaging._polyak_averaging import PolyakAveraging
from lightning_tricks.averaging._post_hoc_ema import PostHocEMA
from lightning_tricks.data._input_standardization import InputStandardization
from lightning_tricks.data._target_standardization import TargetStandardization
from lightning_tricks.normalization._activation_swap import ActivationSwap
from lightning_tricks.normalization._batch_norm_freeze import BatchNormFreeze
from lightning_tricks.normalization._batch_norm_refresh import BatchNormRefresh
from lightning_tricks.normalization._initialization import Initialization
from lightning_tricks.normalization._norm_swap import NormSwap
from lightning_tricks.optimization._optimizer_factory import OptimizerFactory
from lightning_tricks.optimization._weight_decay import WeightDecay
from lightning_tricks.stochastic._drop_block import DropBlock
from lightning_tricks.stochastic._drop_connect import DropConnect
from lightning_tricks.stochastic._dropout import Dropout
from lightning_tricks.stochastic._feature_noise import FeatureNoise
from lightning_tricks.stochastic._fractional_max_pool import FractionalMaxPool
from lightning_tricks.stochastic._stochastic_depth import StochasticDepth

__all__ = [
    "EMA",
    "ActivationSwap",
    "BatchNormFreeze",
    "BatchNormRefresh",
    "DropBlock",
    "DropConnect",
    "Dropout",
    "FeatureNoise",
    "FractionalMaxPool",
    "Initialization",
    "InputStandardization",
    "LatestWeightAveraging",
    "NormSwap",
    "OptimizerFactory",
    "PolyakAveraging",
    "PostHocEMA",
    "StochasticDepth",
    "TargetStandardization",
    "WeightDecay",
    "errors",
    "functional",
    "load_from_checkpoint",
    "nn",
    "optim",
    "schedules",
    "search",
]

__version__ = version("lightning-tricks")
