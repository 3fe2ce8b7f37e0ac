"""An additional pass of validation whose metrics are logged under a prefix and otherwise leave no trace."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from torchmetrics import Metric

from lightning_tricks._core.lightning import is_progress_bar, isolate_rng
from lightning_tricks._core.surgery import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["validate_aside"]


def validate_aside(trainer: Any, loop: Any, prefix: str) -> None:
    """Run a validation loop once with what the module holds, before its proper run.

    The metrics go to the loggers and to ``trainer.logged_metrics`` as ``<prefix>/<metric>``. Callbacks other than progress bars do
    not see the pass, so that nothing is saved or stopped by it; the random state, metrics being accumulated and
    ``trainer.callback_metrics`` are as before.
    """
    connector = trainer._logger_connector
    if loop is not trainer.validate_loop:  # which loads its data at each run
        loop.setup_data()
    shadow = copy(loop)
    shadow._results = type(loop._results)(training=False)
    shadow.batch_progress = type(loop.batch_progress)()
    shadow._module_mode = type(loop._module_mode)()
    shadow._seen_batches_per_dataloader = copy(loop._seen_batches_per_dataloader)
    shadow._data_fetcher = None
    shadow._restarting = False
    shadow.__dict__.pop("run", None)
    shadow.verbose = False
    metrics = [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics]
    kept = [dict(values) for values in metrics]
    callbacks, first_iteration = trainer.callbacks, connector._first_loop_iter
    patches = Patches()
    patches.wrap(
        connector,
        "log_metrics",
        lambda log: lambda metrics, step=None: log({_prefixed(key, prefix): value for key, value in metrics.items()}, step=step),
    )
    try:
        trainer.callbacks = [callback for callback in callbacks if is_progress_bar(callback)]
        with _active(trainer, loop, shadow), isolate_rng(), _untouched_metrics(trainer.lightning_module):
            shadow.run()
        fresh = {key: value for key, value in connector._logged_metrics.items() if kept[1].get(key) is not value}
    finally:
        patches.undo()
        trainer.callbacks = callbacks
        connector._first_loop_iter = first_iteration
        for values, before in zip(metrics, kept, strict=True):
            values.clear()
            values.update(before)
        shadow.teardown()
    connector._logged_metrics.update({_prefixed(key, prefix): value for key, value in fresh.items()})


def _prefixed(key: str, prefix: str) -> str:
    return key if key in {"epoch", "step"} or key.startswith(f"{prefix}/") else f"{prefix}/{key}"


@contextmanager
def _active(trainer: Any, loop: Any, shadow: Any) -> Iterator[None]:
    """Let the Trainer take the shadow for its validation loop."""
    owner, name = (trainer, "validate_loop") if loop is trainer.validate_loop else (trainer.fit_loop.epoch_loop, "val_loop")
    setattr(owner, name, shadow)
    try:
        yield
    finally:
        setattr(owner, name, loop)


@contextmanager
def _untouched_metrics(module: Any) -> Iterator[None]:
    """Lend copies of their states to the module's metrics, and give the originals back at the end."""
    attributes = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced")
    metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
    kept = [{name: getattr(metric, name) for name in (*metric._defaults, *attributes)} for metric in metrics]
    for metric in metrics:
        for name in metric._defaults:
            state = getattr(metric, name)
            setattr(metric, name, list(state) if isinstance(state, list) else state.clone())
    try:
        yield
    finally:
        for metric, before in zip(metrics, kept, strict=True):
            for name, value in before.items():
                setattr(metric, name, value)
