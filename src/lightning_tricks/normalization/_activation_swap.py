"""Swap the activations of a network, whoever made it.

An activation is a choice that papers make once and code spreads over a hundred places. Swapping it in a model that exists keeps all
else as it is: weights, keys, shared modules, hooks, and computation in place where that is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_tricks._core.checkpoint import read_changes, write_change, write_entry
from lightning_tricks._core.checks import check_patterns
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, logs_now, override, rank_zero_info
from lightning_tricks._core.recording import RecordingTrick
from lightning_tricks._core.surgery import Patches, when_built
from lightning_tricks.normalization._activation_surgery import Source, SwappedActivations, run_swap
from lightning_tricks.normalization._activations import as_text, maker_of

__all__ = ["ActivationSwap", "swap_activation"]

_FUNCTION = "swap_activation"


def swap_activation(
    model: nn.Module,
    source: str | type[nn.Module] | Sequence[str | type[nn.Module]],
    target: str | type[nn.Module] | nn.Module,
    *,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> SwappedActivations:
    """Put other activations in the place of a model's own.

    Modules are replaced wherever they are held, so that shared ones stay shared. Attributes that hold a function, such as
    ``torch.nn.functional.relu`` in ``nn.TransformerEncoderLayer``, get the target's function. An activation works in place if the one
    before it did and it can.

    Args:
        model: The model, which is changed in place.
        source: What is replaced: a name (``"relu"``), the path of a class, a class, or several of these. Names also find modules of
            other packages, by the names of their classes; ``"gelu"`` finds the tanh approximation, too.
        target: What comes in its place: a name, ``"leaky_relu(negative_slope=0.2)"`` with settings, a class, or a module, of which
            each place gets a copy.
        where: Glob or globs over qualified names of modules or attributes; None = everywhere.
        exclude: Globs over names that are left alone.

    Returns:
        A report: ``swapped``, and ``left`` with the reasons, among them code that calls an activation by itself.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If the model has no such activation, or `where` and `exclude` leave none.
        UnsupportedStrategyError: If the target has parameters and the model is sharded already.

    Note:
        A second call for the same target finds what the first has put there, and does nothing more. A target with parameters, ``"prelu"``,
        adds them to the model's keys; all others keep the keys.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.TransformerEncoderLayer(2, 1, 2))
        >>> report = swap_activation(model, "relu", "silu")
        >>> model[1], model[2].activation.__name__
        (SiLU(inplace=True), 'silu')
    """
    return run_swap(model, Source(source), maker_of("target", target), where, exclude, trick=_FUNCTION)


class ActivationSwap(RecordingTrick):
    """Swap activations of a model for others: ``σ(x)`` becomes ``σ'(x)`` wherever the model has it.

    Reach for it to try an activation in a model that you did not write: a smooth one in a network of ReLUs, a cheap one in a network of
    GELUs. A trained network needs some training afterwards.

    Args:
        source: What is replaced: a name (``"relu"``), the path of a class, a class, or several of these. Names also find modules of
            other packages, by the names of their classes; ``"gelu"`` finds the tanh approximation, too.
        target: What comes in its place: a name, ``"leaky_relu(negative_slope=0.2)"`` with settings, the path of a class, a class, or
            one of torch's modules. Equal to `source`, it changes nothing.
        where: Glob or globs over qualified names of modules, or of attributes that hold functions; None = everywhere.
        exclude: Globs over names that are left alone.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if the model has no such activation, or `where` and `exclude` leave none.
        UnsupportedStrategyError: At setup, if the target has parameters and `configure_model` shards the layers as it builds them.

    Note:
        The swap happens before weights are loaded and optimizers configured, in every use of the Trainer, and lasts. A model that has
        been swapped already is left as it is. Keys stay, unless the target is ``"prelu"``, whose slopes are new keys. The checkpoint
        records the swap, since the weights belong to the new activation; `functional.swap_activation` repeats it on a new model.

        An activation works in place if the one before it did and it can. Code that calls an activation by itself is out of reach; the
        report that is logged at the start names it.

    Example:
        >>> ActivationSwap("relu", nn.LeakyReLU(0.2), exclude="head")
        ActivationSwap(source='relu', target='leaky_relu(negative_slope=0.2)', exclude='head')
    """

    def __init__(
        self,
        source: str | type[nn.Module] | Sequence[str | type[nn.Module]],
        target: str | type[nn.Module] | nn.Module,
        *,
        where: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._source = Source(source)
        several = isinstance(source, Sequence) and not isinstance(source, str)
        self.source = [as_text("source", each) for each in source] if several else as_text("source", source)  # type: ignore[union-attr]
        self._make = maker_of("target", target)
        self.target = as_text("target", target)
        self.where = None if where is None else check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self._patches = Patches()
        self._count = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._patches.undo()
        creates = any(True for _ in self._make().parameters())
        self._patches = when_built(pl_module, self._operate, trick=repr(self), function=_FUNCTION, creates=creates)

    def _operate(self, module: nn.Module) -> None:
        report = run_swap(module, self._source, self._make, self.where, self.exclude, trick=repr(self))
        self._count = len(report.swapped)
        text = "; ".join(f"{name}: {what}" for name, what in report.swapped.items()) or "nothing"
        rank_zero_info(f"{self!r} swapped {text}." + "".join(f" Not {name}: {reason}." for name, reason in report.left.items()))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer):
            pl_module.log(f"{self.log_prefix}/swapped", float(self._count))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._patches.undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {})

    @override
    def _record(self, checkpoint: dict[str, Any]) -> None:
        arguments = {"source": self.source, "target": self.target, "where": self.where, "exclude": self.exclude}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
        if (_FUNCTION, plain) not in read_changes(checkpoint):
            write_change(checkpoint, _FUNCTION, plain)
