"""Deep ensembles: the same training several times from different random numbers, and the members as one model.

Sources: B. Lakshminarayanan, A. Pritzel and C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
NeurIPS, 2017; L. Breiman, "Bagging Predictors", Machine Learning, 1996.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_tricks._core.checks import check_bool, check_choice, check_count, check_path, check_seed
from lightning_tricks._core.lightning import is_data_module
from lightning_tricks.ensembling._bagging import OutOfBag, combine_out_of_bag
from lightning_tricks.ensembling._combining import Combine, Output, check_combination
from lightning_tricks.ensembling._ensemble import Ensemble
from lightning_tricks.ensembling._member_files import MemberFiles, describe
from lightning_tricks.ensembling._member_runs import MakeModule, MakeTrainer, MemberRuns
from lightning_tricks.errors import ArgumentError

__all__ = ["TrainedEnsemble", "train_ensemble"]


@dataclass(frozen=True, eq=False)
class TrainedEnsemble:
    """What `train_ensemble` returns.

    Attributes:
        ensemble: The members as one module, in evaluation mode, on the CPU.
        metrics: What each member's Trainer had in ``callback_metrics`` at the end.
        paths: Each member's file of weights; none without a folder.
        out_of_bag: What the members predict for examples that they were not trained on; None unless they were bagged.
        mode: How the members were trained.

    Example:
        >>> TrainedEnsemble(Ensemble([torch.nn.Linear(2, 1)]), ({"loss": 0.5},), (), None, "loop").metrics[0]["loss"]
        0.5
    """

    ensemble: Ensemble
    metrics: tuple[dict[str, float], ...]
    paths: tuple[Path, ...]
    out_of_bag: OutOfBag | None
    mode: Literal["loop", "packed"]


def train_ensemble(
    make_module: MakeModule,
    datamodule: Any,
    members: int = 5,
    *,
    bootstrap: bool = False,
    trainer: MakeTrainer,
    val_dataloaders: Any = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    mode: Literal["auto", "loop", "packed"] = "auto",
    combine: Combine = "probabilities",
    output: Output = "logits",
    class_dim: int = -1,
) -> TrainedEnsemble:
    """Train independent members of an ensemble, and combine them: ``p(y | x) = 1/M Σ_m p_m(y | x)``.

    Members differ in what is random: first weights, order and augmentation of the data, dropout and, with `bootstrap`, the examples.
    Each is trained by a Trainer of its own, one after another, or packed: all at once, in one step that is mapped over them.

    Reach for it where one training is affordable several times: deep ensembles are the yardstick of accuracy, calibration and
    uncertainty among ensembles.

    Args:
        make_module: Makes a new, untrained LightningModule. If it requires an argument, that is the member's number.
        datamodule: The data: a LightningDataModule, or what loads the training data.
        members: Number of members (M).
        bootstrap: Train each member on as many examples as there are, drawn from them with replacement, and let it predict the others.
        trainer: Makes a new Trainer for each member, since a Trainer cannot be used for several; if it requires an argument, that is the
            member's number. Or the arguments of a Trainer by name, which are copied for each.
        val_dataloaders: What loads the validation data, unless a data module does.
        folder: Where members are kept. Called again with the same folder and settings, training goes on where it was stopped, and
            ends with the same members. None = nowhere.
        seed: From which each member's random numbers follow, together with its number.
        mode: ``"loop"`` trains one member after another. ``"packed"`` trains all at once on one device. ``"auto"`` tries both for a
            few steps, and takes the faster; it says which, and why if packing cannot be.
        combine: How predictions are combined, as in `Ensemble`.
        output: What members return, as in `Ensemble`.
        class_dim: Dimension of the classes, as in `Ensemble`.

    Returns:
        The ensemble, with the members' metrics and files and, if bagged, what they predict out of bag.

    Raises:
        ArgumentError: If an argument lies outside its domain, or the folder is that of an ensemble with other settings.
        CheckpointError: If a file in the folder is missing, altered or does not fit.
        TrickError: If members cannot be stored or packed, or do not predict what can be combined out of bag.
        UnsupportedStrategyError: If the Trainer's strategy spreads a member's weights over ranks.

    Note:
        Each epoch of each member begins with random numbers that follow from (seed, member, epoch), and the process' own are left as
        they were. A member is its module as the fit leaves it: with an EMA among the callbacks, that is the average. The folder holds
        for each a file of weights (safetensors), and while it is trained a checkpoint from before the latest epoch. Under DDP all ranks
        must reach the folder, and members are trained one after another.

        Packed members are one module for the Trainer. They have their own batches, and end as trained one after another to rounding,
        unless they draw random numbers, as dropout does: then they draw other ones. That holds for optimizers that act on each number by
        itself, without clipping by norm, and for members without hooks of their own, whose steps `torch.func` can map over;
        everything else is refused, or trained one after another.

    References:
        - B. Lakshminarayanan, A. Pritzel and C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
          NeurIPS, 2017. Differs from the paper in that there is no adversarial training.
        - L. Breiman, "Bagging Predictors", Machine Learning, 1996.

    Example:
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 3)
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = torch.utils.data.TensorDataset(torch.randn(30, 4), torch.randint(3, (30,)))
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> found = train_ensemble(
        ...     Classifier,
        ...     torch.utils.data.DataLoader(data, batch_size=10, shuffle=True),
        ...     members=3,
        ...     bootstrap=True,
        ...     trainer={"max_epochs": 2, "accelerator": "cpu", **quiet},
        ...     mode="loop",
        ... )
        >>> len(found.ensemble), found.out_of_bag.predictions.shape
        (3, torch.Size([30, 3]))
    """
    check_combination(combine, output)
    check_choice("mode", mode, ("auto", "loop", "packed"))
    check_path("folder", folder)
    if is_data_module(datamodule) and val_dataloaders is not None:
        msg = "`val_dataloaders` must be None where a LightningDataModule loads the data, since it loads those for validation, too."
        raise ArgumentError(msg)
    if not is_data_module(datamodule) and (isinstance(datamodule, Iterator) or not isinstance(datamodule, Iterable)):
        msg = (
            "`datamodule` must be a LightningDataModule, or what loads the training data anew for each member, such as a DataLoader, "
            f"got {datamodule!r}."
        )
        raise ArgumentError(msg)
    with tempfile.TemporaryDirectory() as passing:
        files = MemberFiles(Path(passing if folder is None else folder).absolute())
        runs = MemberRuns(
            make_module,
            trainer,
            files,
            datamodule=datamodule,
            validation=val_dataloaders,
            members=check_count("members", members),
            bootstrap=check_bool("bootstrap", bootstrap),
            seed=check_seed(seed),
            alone=folder is None,
        )
        settings = {"seed": runs.seed, "members": runs.members, "bootstrap": runs.bootstrap, **describe(runs.first)}
        known = files.settings()
        if known is not None:
            files.claim({**settings, "mode": known.get("mode") if mode == "auto" else mode})
        chosen: Literal["loop", "packed"] = runs.choose(mode) if known is None else known["mode"]
        if known is None:
            files.claim({**settings, "mode": chosen})
        records = runs.run(chosen)
        trained = [runs.rebuild(member, files.read(files.weights(member))) for member in range(runs.members)]
        found = None
        if bootstrap:
            parts = [files.read(files.predictions(member)) for member in range(runs.members)]
            pairs = [(part["rows"], part["predictions"]) for part in parts]
            found = combine_out_of_bag(pairs, records[0]["examples"], combine=combine, output=output, class_dim=class_dim)
    return TrainedEnsemble(
        Ensemble(trained, combine=combine, output=output, class_dim=class_dim).eval(),
        tuple(record["metrics"] for record in records),
        () if folder is None else tuple(files.weights(member) for member in range(runs.members)),
        found,
        chosen,
    )
