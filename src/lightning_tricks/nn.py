"""The tricks as layers, to be built into models like torch's own."""

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

__all__ = [
    "DropConnectConv1d",
    "DropConnectConv2d",
    "DropConnectConv3d",
    "DropConnectEmbedding",
    "DropConnectGRU",
    "DropConnectLSTM",
    "DropConnectLinear",
    "DropConnectMultiheadAttention",
]
