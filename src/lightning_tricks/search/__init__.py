"""Find out which tricks help a model, and with which arguments."""

from lightning_tricks.search._ablation import ablate
from lightning_tricks.search._results import Ablation

__all__ = ["Ablation", "ablate"]
