"""What training does to a model, measured, drawn and put into words."""

from lightning_tricks.diagnostics._loss_landscape import LossLandscape, loss_landscape

__all__ = ["LossLandscape", "loss_landscape"]
