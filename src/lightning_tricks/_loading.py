"""Load a checkpoint of a model whose keys were changed by tricks."""

from __future__ import annotations

import os
import sys
from inspect import isclass
from typing import IO, Any, TypeVar

from lightning_tricks import functional
from lightning_tricks._core.checkpoint import read_changes
from lightning_tricks._core.lightning import LightningModule, is_lightning_module_class
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError

__all__ = ["load_from_checkpoint"]

_CLASSES = {"swap_activation": ("source", "target")}  # arguments that may be paths of classes
_M = TypeVar("_M", bound=LightningModule)


def load_from_checkpoint(model_class: type[_M], path: str | os.PathLike[str] | IO[bytes], **kwargs: Any) -> _M:
    """Load a LightningModule, with the changes that tricks such as `NormSwap` have made to its layers.

    Makes the model as ``model_class.load_from_checkpoint`` does, changes it as the checkpoint records, and loads the weights.
    Without a record, it is the same as that.

    Args:
        model_class: The class of the model that was trained, without tricks.
        path: The checkpoint: the path of a file, or an open one.
        kwargs: Further arguments of ``model_class.load_from_checkpoint``: ``map_location``, ``strict``, ``weights_only``, and those of
            the model's constructor.

    Returns:
        The model, in training mode.

    Raises:
        ArgumentError: If `model_class` is no class of LightningModules.
        CheckpointError: If the record is damaged, names a change that this release does not know, or a class of a module that is not
            imported yet, since a file shall not choose what is imported.
        TrickError: If a recorded change cannot be made to the model.

    Example:
        >>> import io
        >>> import lightning as L
        >>> import torch
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> change = {"function": "swap_norm", "arguments": {"source": "batch", "target": "group", "groups": 4}}
        >>> net = Net()
        >>> _ = functional.swap_norm(net, **change["arguments"])
        >>> record = {"version": 1, "changes": [change]}  # as a fit with NormSwap("batch", "group", groups=4) leaves it
        >>> checkpoint = {"state_dict": net.state_dict(), "pytorch-lightning_version": L.__version__, "lightning_tricks": record}
        >>> file = io.BytesIO()
        >>> torch.save(checkpoint, file)
        >>> _ = file.seek(0)
        >>> load_from_checkpoint(Net, file).body[1].num_groups
        4
    """
    if not isclass(model_class) or not is_lightning_module_class(model_class):
        msg = f"`model_class` must be a class of LightningModules, such as the one that was trained, got {model_class!r}."
        raise ArgumentError(msg)

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        for function, arguments in read_changes(checkpoint):
            if function not in functional.__all__:
                msg = (
                    f"The checkpoint's model was changed by `functional.{function}`, which this release does not have. "
                    "Upgrade lightning-tricks."
                )
                raise CheckpointError(msg)
            _check_imported(*(arguments.get(key) for key in _CLASSES.get(function, ())))
            try:
                getattr(functional, function)(self, **arguments)
            except TrickError as error:
                error.add_note(f"The checkpoint records this change. Load it with the class that was trained, not {type(self).__name__}.")
                raise
        model_class.on_load_checkpoint(self, checkpoint)

    # Lightning calls that hook between making a model and loading its weights; the class is the user's own again afterwards.
    body = {"on_load_checkpoint": on_load_checkpoint, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    changed: Any = type(model_class.__name__, (model_class,), body)
    model: _M = changed.load_from_checkpoint(path, **kwargs)
    model.__class__ = model_class
    return model


def _check_imported(*paths: Any) -> None:
    for path in paths:
        home = str(path).partition("(")[0].rpartition(".")[0]
        if home and home not in sys.modules:
            msg = f"The checkpoint's model was changed with {path!r}, whose module is not imported. Import {home!r} if you trust it."
            raise CheckpointError(msg)
