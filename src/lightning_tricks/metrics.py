"""Metrics, in the manner of torchmetrics."""

from lightning_tricks.ensembling._measures import EnsembleMeasures

__all__ = ["EnsembleMeasures"]
