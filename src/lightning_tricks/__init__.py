"""Proven tricks of neural-network training for any PyTorch LightningModule."""

from importlib.metadata import version

from lightning_tricks import diagnostics, errors, functional, metrics, nn, optim, schedules, search, transforms
from lightning_tricks._loading import load_from_checkpoint
from lightning_tricks.averaging._ema import EMA
from lightning_tricks.averaging._latest_weight_averaging import LatestWeightAveraging
from lightning_tricks.averaging._polyak_averaging import PolyakAveraging
from lightning_tricks.averaging._post_hoc_ema import PostHocEMA
from lightning_tricks.data._batch_augmentation import BatchAugmentation
from lightning_tricks.data._cut_mix import CutMix
from lightning_tricks.data._input_standardization import InputStandardization
from lightning_tricks.data._label_smoothing import LabelSmoothing
from lightning_tricks.data._mix_up import MixUp
from lightning_tricks.data._target_standardization import TargetStandardization
from lightning_tricks.diagnostics._fit_diagnosis import FitDiagnosis
from lightning_tricks.diagnostics._gradient_flow import GradientFlow
from lightning_tricks.diagnostics._tracking_report import TrackingReport
from lightning_tricks.ensembling._checkpoint_ensemble import CheckpointEnsemble
from lightning_tricks.ensembling._fast_geometric_ensemble import FastGeometricEnsemble
from lightning_tricks.ensembling._snapshot_ensemble import SnapshotEnsemble
from lightning_tricks.normalization._activation_swap import ActivationSwap
from lightning_tricks.normalization._batch_norm_freeze import BatchNormFreeze
from lightning_tricks.normalization._batch_norm_refresh import BatchNormRefresh
from lightning_tricks.normalization._initialization import Initialization
from lightning_tricks.normalization._norm_swap import NormSwap
from lightning_tricks.optimization._loss_spike_guard import LossSpikeGuard
from lightning_tricks.optimization._optimizer_factory import OptimizerFactory
from lightning_tricks.optimization._weight_decay import WeightDecay
from lightning_tricks.stochastic._drop_block import DropBlock
from lightning_tricks.stochastic._drop_connect import DropConnect
from lightning_tricks.stochastic._dropout import Dropout
from lightning_tricks.stochastic._feature_noise import FeatureNoise
from lightning_tricks.stochastic._fractional_max_pool import FractionalMaxPool
from lightning_tricks.stochastic._stochastic_depth import StochasticDepth
from lightning_tricks.transfer._fine_tuning import FineTuning
from lightning_tricks.transfer._linear_probe import LinearProbe

__all__ = [
    "EMA",
    "ActivationSwap",
    "BatchAugmentation",
    "BatchNormFreeze",
    "BatchNormRefresh",
    "CheckpointEnsemble",
    "CutMix",
    "DropBlock",
    "DropConnect",
    "Dropout",
    "FastGeometricEnsemble",
    "FeatureNoise",
    "FineTuning",
    "FitDiagnosis",
    "FractionalMaxPool",
    "GradientFlow",
    "Initialization",
    "InputStandardization",
    "LabelSmoothing",
    "LatestWeightAveraging",
    "LinearProbe",
    "LossSpikeGuard",
    "MixUp",
    "NormSwap",
    "OptimizerFactory",
    "PolyakAveraging",
    "PostHocEMA",
    "SnapshotEnsemble",
    "StochasticDepth",
    "TargetStandardization",
    "TrackingReport",
    "WeightDecay",
    "diagnostics",
    "errors",
    "functional",
    "load_from_checkpoint",
    "metrics",
    "nn",
    "optim",
    "schedules",
    "search",
    "transforms",
]

__version__ = version("lightning-tricks")
