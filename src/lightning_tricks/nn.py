"""Modules to build networks with."""

from lightning_tricks.ensembling._ensemble import Ensemble
from lightning_tricks.normalization._channel_norm import LayerNorm2d, RMSNorm2d
from lightning_tricks.normalization._filter_response_norm import FilterResponseNorm
from lightning_tricks.normalization._frozen_batch_norm import FrozenBatchNorm
from lightning_tricks.normalization._ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from lightning_tricks.normalization._lp_batch_norm import LpBatchNorm1d, LpBatchNorm2d, LpBatchNorm3d
from lightning_tricks.normalization._scaled_ws_conv import ScaledWSConv2d
from lightning_tricks.stochastic._drop_connect_layers import (
    DropConnectConv1d,
    DropConnectConv2d,
    DropConnectConv3d,
    DropConnectEmbedding,
    DropConnectGRU,
    DropConnectLinear,
    DropConnectLSTM,
    DropConnectMultiheadAttention,
)
from lightning_tricks.stochastic._fractional_pooling import FractionalMaxPool2d, FractionalMaxPool3d

__all__ = [
    "DropConnectConv1d",
    "DropConnectConv2d",
    "DropConnectConv3d",
    "DropConnectEmbedding",
    "DropConnectGRU",
    "DropConnectLSTM",
    "DropConnectLinear",
    "DropConnectMultiheadAttention",
    "Ensemble",
    "FilterResponseNorm",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "FrozenBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "LayerNorm2d",
    "LpBatchNorm1d",
    "LpBatchNorm2d",
    "LpBatchNorm3d",
    "RMSNorm2d",
    "ScaledWSConv2d",
]
