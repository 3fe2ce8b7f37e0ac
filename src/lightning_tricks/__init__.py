"""Proven tricks of neural-network training for any PyTorch LightningModule."""

from importlib.metadata import version

from lightning_tricks import errors, functional, nn, optim, schedules
from lightning_tricks.averaging._ema import EMA
from lightning_tricks.averaging._latest_weight_averaging import LatestWeightAveraging
from lightning_tricks.averaging._polyak_averaging import PolyakAveraging
from lightning_tricks.averaging._post_hoc_ema import PostHocEMA
from lightning_tricks.normalization._batch_norm_refresh import BatchNormRefresh
from lightning_tricks.optimization._optimizer_factory import OptimizerFactory
from lightning_tricks.optimization._weight_decay import WeightDecay
from lightning_tricks.stochastic._drop_connect import DropConnect
from lightning_tricks.stochastic._stochastic_depth import StochasticDepth

__all__ = [
    "EMA",
    "BatchNormRefresh",
    "DropConnect",
    "LatestWeightAveraging",
    "OptimizerFactory",
    "PolyakAveraging",
    "PostHocEMA",
    "StochasticDepth",
    "WeightDecay",
    "errors",
    "functional",
    "nn",
    "optim",
    "schedules",
]

__version__ = version("lightning-tricks")
