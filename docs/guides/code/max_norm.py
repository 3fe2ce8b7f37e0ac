"""Max-norm: keep the weights that enter each unit no longer than a limit.

After each step, a row of a weight whose norm exceeds the limit c is shortened to it, so that no unit outgrows the others, however high the
learning rate.

Source: N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks from
Overfitting", JMLR 15, 2014, section 5.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_in_interval, check_patterns
from lightning_tricks._core.clock import after_each_step
from lightning_tricks._core.lightning import callbacks_of, defines, logs_now, override
from lightning_tricks._core.selection import select_parameters
from lightning_tricks._core.strategies import refuse_strategies
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import NothingMatchedError, TrickConflictError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_tricks._core.lightning import LightningModule, Trainer

_UNSUPPORTED = dict.fromkeys(
    ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"), "each rank has parts of the rows whose norms are limited"
)


@torch.no_grad()
def limit_norms_(weight: torch.Tensor, limit: float) -> torch.Tensor:
    """Shorten rows to the limit, ``w ← w · min(1, c / ‖w‖)``, and return how many were longer."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    weight.mul_((limit / norms).clamp_(max=1.0).view(-1, *[1] * (weight.ndim - 1)))
    return (norms > limit).sum()


class MaxNorm(Trick):
    """Limit the norm of the weights that enter each unit, ``‖w‖ ≤ c``, after each optimizer step.

    Args:
        limit: The longest norm c, in (0, ∞).
        where: Glob or globs over names of parameters; of those selected, vectors are left alone.
        exclude: Globs over names that are left alone.
        name: Tells it apart in logs and checkpoints.
    """

    def __init__(
        self, limit: float = 3.0, *, where: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), name: str | None = None
    ) -> None:
        super().__init__(name)
        self.limit = check_in_interval("limit", limit, "(0, ∞)")
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self._handles: list[Any] = []
        self._shortened: int | torch.Tensor = 0

    def _select(self, module: LightningModule) -> dict[str, torch.nn.Parameter]:
        found = select_parameters(module, self.where, self.exclude, trick=repr(self))
        return {name: each for name, each in found.items() if each.ndim > 1 and each.requires_grad}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)  # which looks for conflicts that hold for all tricks
        refuse_strategies(trainer, repr(self), _UNSUPPORTED)
        if stage == "fit":
            self._shortened = 0
            try:
                self._select(pl_module)
            except NothingMatchedError:
                if not defines(pl_module, "setup", "configure_model"):  # which build layers later
                    raise

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # before averages begin to follow steps
        weights = self._select(pl_module)
        for other in callbacks_of(trainer):
            if isinstance(other, MaxNorm) and other is not self and (both := weights.keys() & other._select(pl_module).keys()):
                msg = f"{self!r} and {other!r} both limit {min(both)!r}. Keep one, or let their `where` tell them apart."
                raise TrickConflictError(msg)

        def limit() -> None:
            self._shortened = sum((limit_norms_(weight, self.limit) for weight in weights.values()), start=self._shortened)

        self._detach()
        self._handles = [handle for optimizer in trainer.optimizers for handle in after_each_step(optimizer, limit)]

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer):
            pl_module.log(f"{self.log_prefix}/shortened", float(self._shortened))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {"shortened": int(self._shortened)})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None:
            self._shortened = entry["shortened"]
