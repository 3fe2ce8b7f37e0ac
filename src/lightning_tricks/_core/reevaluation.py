"""A second evaluation of a training step, for optimizers that need two gradients of one batch."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_tricks._core.evaluation import untouched_metrics
from lightning_tricks._core.lightning import rng_states, set_rng_states, trainer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_tricks._core.lightning import Trainer

__all__ = ["evaluate_twice"]


def evaluate_twice(closure: Callable[[], Any], model: nn.Module, move: Callable[[], Callable[[], None] | None]) -> Any:
    """Evaluate a loss and its gradient, move the weights, evaluate both again, and move the weights back.

    Both evaluations draw the same random numbers, so that dropout draws the same masks. Only the first one leaves traces: it alone
    logs, updates metrics, statistics of normalization layers and all other buffers, and gives the Trainer the step's outputs.
    Afterwards the random numbers go on as after one evaluation. Hooks around backward run in both.

    Args:
        closure: Clears the gradients, evaluates the loss and its gradient.
        model: The model, whose LightningModule is found through Lightning's closure if the model is only a part of it.
        move: Called after the first evaluation. Moves the weights and returns what moves them back, or does nothing and returns None,
            which leaves the second evaluation out.

    Returns:
        The first loss.
    """
    module = model if trainer_of(model) is not None else _module_behind(closure) or model
    trainer, before = trainer_of(module), rng_states()
    with _outputs_of_the_first(trainer), torch.enable_grad():
        loss = closure()
        move_back = move()
        if move_back is None:
            return loss
        after = rng_states()
        with ExitStack() as stack:
            stack.callback(set_rng_states, after)
            stack.callback(move_back)
            stack.enter_context(_untouched_buffers(module))
            stack.enter_context(untouched_metrics(module))
            stack.enter_context(_unlogged(trainer))
            set_rng_states(before)
            closure()
    return loss


def _module_behind(closure: Any) -> nn.Module | None:
    """Find the LightningModule that Lightning binds to the closures it hands out."""
    while isinstance(closure, partial):
        modules: list[nn.Module] = [argument for argument in closure.args if trainer_of(argument) is not None]
        if modules:
            return modules[0]
        closure = next((argument for argument in closure.args if isinstance(argument, partial)), None)
    return None


@contextmanager
def _untouched_buffers(module: nn.Module) -> Iterator[None]:
    """Give every buffer its values back, and the tensors themselves where they were replaced."""
    kept = [
        (owner, name, buffer, buffer.clone()) for owner in module.modules() for name, buffer in owner._buffers.items() if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, values in kept:
                buffer.copy_(values)
                owner._buffers[name] = buffer


@contextmanager
def _unlogged(trainer: Trainer | None) -> Iterator[None]:
    """Let what a training step logs go nowhere, and the loop's progress not count it."""
    if trainer is None:
        yield
        return
    loop: Any = trainer.fit_loop.epoch_loop
    results, progress = loop._results, loop.automatic_optimization.optim_progress.optimizer
    counts = deepcopy(progress.zero_grad)
    loop._results = aside = type(results)(training=True)
    aside.batch, aside.batch_size = results.batch, results.batch_size
    try:
        yield
    finally:
        loop._results, progress.zero_grad = results, counts


@contextmanager
def _outputs_of_the_first(trainer: Trainer | None) -> Iterator[None]:
    """Let the outputs that the Trainer hands to callbacks be those of the first evaluation."""
    if trainer is None:
        yield
        return
    loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
    loop.output_result_cls = _FirstOutputs(loop.output_result_cls)
    try:
        yield
    finally:
        del loop.output_result_cls


class _FirstOutputs:
    """Makes Lightning's record of a step's outputs, which from the second on differ from the first in the loss to differentiate only."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.first: tuple[Any, Any] | None = None

    def from_training_step_output(self, output: Any, normalize: int = 1) -> Any:
        """Make the record, as the class it stands for does."""
        result = self.kind.from_training_step_output(output, normalize)
        if self.first is None:
            self.first = result.loss, result.extra
        result.loss, result.extra = self.first
        return result
