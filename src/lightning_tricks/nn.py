"""Modules to build networks with."""

from lightning_tricks.stochastic._fractional_pooling import FractionalMaxPool2d, FractionalMaxPool3d

__all__ = ["FractionalMaxPool2d", "FractionalMaxPool3d"]
