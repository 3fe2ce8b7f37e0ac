"""Find out which tricks help a model, and with which arguments."""

from lightning_tricks.search._ablation import ablate
from lightning_tricks.search._grid import log_grid
from lightning_tricks.search._results import Ablation
from lightning_tricks.search._search import load, search

__all__ = ["Ablation", "ablate", "load", "log_grid", "search"]
