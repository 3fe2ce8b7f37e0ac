"""An additional pass of validation whose metrics are logged under a prefix and otherwise leave no trace."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from torchmetrics import Metric

from lightning_tricks._core.lightning import callbacks_of, is_progress_bar, isolate_rng
from lightning_tricks._core.loaders import untouched_generators
from lightning_tricks._core.surgery import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["untouched_metrics", "validate_aside"]

_HOOKS = [f"on_validation_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")]


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
    shadow._results = _prefixing(type(loop._results)(training=False), prefix)
    shadow.batch_progress = type(loop.batch_progress)()
    shadow._module_mode = type(loop._module_mode)()
    shadow._seen_batches_per_dataloader = copy(loop._seen_batches_per_dataloader)
    shadow._data_fetcher = None
    shadow._restarting = False
    shadow.__dict__.pop("run", None)
    shadow.verbose = False
    first_iteration, callback_metrics = connector._first_loop_iter, dict(connector._callback_metrics)
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []
    owners = [owner for loader in loaders for owner in (loader, getattr(loader, "sampler", None))]
    patches = Patches()
    for callback in callbacks_of(trainer):
        for hook in _HOOKS if not is_progress_bar(callback) else ():
            patches.wrap(callback, hook, lambda _: lambda *_: None)
    try:
        with _active(trainer, loop, shadow), isolate_rng(), untouched_metrics(trainer.lightning_module), untouched_generators(owners):
            shadow.run()
    finally:
        patches.undo()
        connector._first_loop_iter = first_iteration
        connector._callback_metrics.clear()
        connector._callback_metrics.update(callback_metrics)
        shadow._results.cpu()


def _prefixing(results: Any, prefix: str) -> Any:
    """Let a loop's results go to loggers and progress bars under a prefix; module and callbacks still find them under their names."""
    compute = results.metrics

    def metrics(on_step: bool) -> dict[str, dict[str, Any]]:
        values: dict[str, dict[str, Any]] = compute(on_step)
        return {
            kind: values[kind] if kind == "callback" else {f"{prefix}/{key}": value for key, value in values[kind].items()}
            for kind in values
        }

    results.metrics = metrics
    return results


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
def untouched_metrics(module: nn.Module) -> Iterator[None]:
    """Lend copies of their states to the module's metrics, wrappers and collections, and give the originals back at the end."""
    parts = [part for part in module.modules() if type(part).__module__.startswith("torchmetrics") or isinstance(part, Metric)]
    kept = [{name: dict(value) if name == "_modules" else value for name, value in vars(part).items()} for part in parts]
    for part in parts:
        for name in part._defaults if isinstance(part, Metric) else ():
            state = getattr(part, name)
            setattr(part, name, list(state) if isinstance(state, list) else state.clone())
    try:
        yield
    finally:
        for part, attributes in zip(parts, kept, strict=True):
            vars(part).clear()
            vars(part).update(attributes)
