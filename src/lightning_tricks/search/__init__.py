"""Find out which tricks help a model, and with which arguments."""

from lightning_tricks.search._grid import log_grid

__all__ = ["log_grid"]
