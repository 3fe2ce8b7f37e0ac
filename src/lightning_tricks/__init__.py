"""Proven tricks of neural-network training for any PyTorch LightningModule."""

from importlib.metadata import version

from lightning_tricks import errors, functional
from lightning_tricks.averaging._ema import EMA
from lightning_tricks.averaging._polyak_averaging import PolyakAveraging

__all__ = [
    "EMA",
    "PolyakAveraging",
    "errors",
    "functional",
]

__version__ = version("lightning-tricks")
