"""Layers, for use in any module."""

from lightning_tricks.ensembling._ensemble import Ensemble

__all__ = ["Ensemble"]
