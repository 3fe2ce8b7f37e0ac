"""Find out which tricks help a model, and with which arguments."""

from lightning_tricks.search._grid import log_grid
from lightning_tricks.search._search import load, search

__all__ = ["load", "log_grid", "search"]
