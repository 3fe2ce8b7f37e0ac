"""An ablation in Weights & Biases: one group, with one run for each cell."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_tricks._core.lightning import rank_zero_warn

if TYPE_CHECKING:
    from lightning_tricks.search._results import Ablation

__all__ = ["track"]


def track(ablation: Ablation, project: str) -> None:
    """Send each cell's metrics, seed by seed, and its comparison; the same run again when a study goes on.

    Without W&B installed, a warning is all that happens: the results are in the folder.
    """
    try:
        wandb = import_module("wandb")
    except ModuleNotFoundError:
        rank_zero_warn(f"The ablation in '{ablation.folder}' is not sent to W&B, which is not installed: `pip install wandb`.")
        return
    folder = Path(ablation.folder)
    for row, record in zip(ablation.rows, ablation.to_frame().to_dict("records"), strict=True):
        name = hashlib.sha256(f"{project}/{folder.resolve()}/{row.cell}".encode()).hexdigest()[:16]
        config = {"cell": row.cell, "trick": row.trick, "reference": row.reference, "metric": ablation.metric}
        run = wandb.init(project=project, group=folder.name, name=row.cell, id=name, resume="allow", dir=folder, config=config)
        for step, (seed, value) in enumerate(zip(row.seeds, row.values, strict=True)):
            run.log({ablation.metric: value, "seed": seed}, step=step)
        run.summary.update({key: value for key, value in record.items() if isinstance(value, str | float | int) and value == value})  # noqa: PLR0124 -- no NaN
        run.finish()
