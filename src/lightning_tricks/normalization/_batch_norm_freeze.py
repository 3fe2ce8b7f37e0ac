"""BatchNorm whose statistics stay fixed from some moment on, while everything else trains.

A BatchNorm that trains normalizes by its batch, and evaluates by running averages. From the moment on, the layers normalize by those
averages in training as well: the network that trains is the one that is evaluated, batches may be small, and what is left to learn
is learned for fixed statistics.

Source: R. Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", arXiv:1806.08342, 2018,
for fixing them late in training; Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, 2021, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.batch_norms import select_batch_norms
from lightning_tricks._core.checkpoint import write_entry
from lightning_tricks._core.checks import check_bool, check_patterns
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.held_statistics import hold_statistics, release_statistics
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, callbacks_of, defines, logs_now, override
from lightning_tricks._core.strategies import refuse_flat_parameters, refuse_strategies
from lightning_tricks._core.trick import Trick
from lightning_tricks._core.updates import BeforeUpdate, updating
from lightning_tricks.errors import NothingMatchedError, TrickConflictError
from lightning_tricks.normalization._batch_norm_refresh import BatchNormRefresh

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.optim import Optimizer

__all__ = ["BatchNormFreeze"]

_OWN_GRADIENTS = {"DeepSpeedStrategy": "the engine keeps gradients to itself, so that `affine=True` cannot take any away"}


class BatchNormFreeze(Trick):
    """Let BatchNorm normalize by its running statistics from some moment of training on, and leave these as they are.

    From `start` on, in training as in evaluation, ``y = γ(x − m)/√(v + ε) + β`` with the running mean m and variance v of that moment.
    With ``affine=True``, scale γ and shift β stay as they are, too.

    Reach for it late in training, or from the first step of fine-tuning: batches that are small, or unlike those of pretraining, then
    leave the statistics alone, and training sees the network that evaluation sees.

    Args:
        start: When to begin: an int of optimizer steps, or a text such as ``"500 steps"``, ``"3 epochs"`` or ``"80%"``.
        affine: Whether scale and shift stay fixed as well.
        where: Glob or globs over qualified names of the layers; a glob matches a whole name or any part that begins after a dot.
        exclude: Globs over names that are left out, and train on.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no BatchNorm with running statistics is selected.
        TrickConflictError: At setup, if a `BatchNormRefresh` has no other layers to measure.
        UnsupportedStrategyError: At setup, with ``affine=True``, under DeepSpeed and under ``FSDPStrategy(use_orig_params=False)``.
        TrickError: When training starts, if `start` needs the length of a fit that has none.

    Note:
        The layers are kept in evaluation mode: calls of ``train()`` pass them by until the end of the fit, when those that trained
        before train again. A checkpoint needs no more than the step that it holds, and resuming is exact in every phase.

        Ranks go on with the statistics of rank zero, which are those that DDP and checkpoints keep, so that all of them train one network.

        Scale and shift that are fixed stay in the graph, so that DDP and FSDP reduce their gradients as before; the gradients are taken
        away before clipping and before each update. Optimizers leave a parameter without a gradient alone: no weight decay, no momentum.
        What moves weights without asking for gradients still moves them: `optim.Lookahead`, `optim.ScheduleFree`, and
        `WeightDecay` if told to decay normalization layers.

        With ``torch.compile`` the beginning compiles once more.

    References:
        - R. Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", arXiv:1806.08342, 2018.
        - Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, 2021.

    Example:
        >>> BatchNormFreeze("80%", affine=True)
        BatchNormFreeze(start='80%', affine=True)
    """

    def __init__(
        self,
        start: int | str,
        *,
        affine: bool = False,
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._start = Duration.parse("start", start)
        self.start = plain_duration(start)
        self.affine = check_bool("affine", affine)
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self._updates: list[BeforeUpdate] = []
        self._begin = 0  # in optimizer steps
        self._frozen: dict[str, _BatchNorm] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._thaw(pl_module)
        if self.affine:
            refuse_strategies(trainer, repr(self), _OWN_GRADIENTS)
            refuse_flat_parameters(trainer, repr(self))
        try:
            own = self._select(pl_module)
            self._check_refreshes(trainer, pl_module, set(own))
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):  # which build layers later; the beginning looks again
                raise

    def _check_refreshes(self, trainer: Trainer, module: LightningModule, own: set[str]) -> None:
        for other in callbacks_of(trainer):
            if isinstance(other, BatchNormRefresh) and own.issuperset(
                select_batch_norms(module, other.where, other.exclude, trick=repr(other))
            ):
                msg = (
                    f"{self!r} keeps the statistics of all layers that {other!r} would measure. Keep one, or give each its own layers "
                    "by `where`."
                )
                raise TrickConflictError(msg)

    def _select(self, module: LightningModule) -> dict[str, _BatchNorm]:
        return select_batch_norms(module, self.where, self.exclude, trick=repr(self))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = self._start.steps("start", trainer)
        if self.affine:
            self._updates = [BeforeUpdate(updating(optimizer), self._drop_gradients) for optimizer in trainer.optimizers]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._frozen and trainer.global_step >= self._begin * max(1, len(trainer.optimizers)):
            self._freeze(self._select(pl_module))

    def _freeze(self, norms: dict[str, _BatchNorm]) -> None:
        self._frozen = norms
        for norm in norms.values():
            hold_statistics(norm, self.state_key)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._drop_gradients()  # before clipping, which weighs all gradients together

    def _drop_gradients(self, *_: Any) -> None:
        for norm in self._frozen.values() if self.affine else ():
            for parameter in norm.parameters(recurse=False):  # an activation inside goes on
                parameter.grad = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer):
            pl_module.log(f"{self.log_prefix}/layers", float(len(self._frozen)))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._thaw(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._thaw(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._thaw(pl_module)

    def _thaw(self, module: LightningModule) -> None:
        for norm in self._frozen.values():
            release_statistics(norm, self.state_key, training=module.training)
        for update in self._updates:
            update.remove()
        self._frozen, self._updates = {}, []

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {})
