"""A picture in whatever can show one of the loggers that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_tricks._core.extras import require

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["show_picture"]


def show_picture(logger: Any, key: str, path: Path, step: int) -> None:
    """Hand a PNG to a logger: W&B's and those that follow it, and TensorBoard's; others have no place for it.

    Raises:
        MissingPackageError: If TensorBoard wants it, and matplotlib, which reads it, is not installed.
    """
    if hasattr(logger, "log_image"):
        logger.log_image(key, [str(path)])
    elif hasattr(getattr(logger, "experiment", None), "add_image"):
        image = require("matplotlib.image", package="matplotlib", extra="examples", who="A picture in TensorBoard")
        logger.experiment.add_image(key, image.imread(path)[..., :3], step, dataformats="HWC")
