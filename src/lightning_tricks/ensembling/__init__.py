"""Train several members and use them as one model."""

from lightning_tricks.ensembling._bagging import OutOfBag
from lightning_tricks.ensembling._train_ensemble import TrainedEnsemble, train_ensemble

__all__ = ["OutOfBag", "TrainedEnsemble", "train_ensemble"]
