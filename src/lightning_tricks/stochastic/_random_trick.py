"""The base of callbacks that let a model draw at random while it trains."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_tricks._core.draws import Clock
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, defines, logs_now, override
from lightning_tricks._core.schedule import follow
from lightning_tricks._core.seeding import SeededTrick
from lightning_tricks._core.strategies import data_rank
from lightning_tricks.errors import NothingMatchedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_tricks._core.schedule import Schedule

__all__ = ["RandomTrick"]


class RandomTrick(SeededTrick):
    """Changes a model for the fit, so that it draws at random in training; the original is back at the end, whatever ends the fit.

    What is drawn follows from the clock, which stands at another moment in each batch: one of seed, rank, epoch, step and batch. Hence
    a resumed run draws what it would have drawn, and no generator's state is touched. The strength of what is drawn, the argument
    named by `quantity`, may be a `Schedule`; it is zero where nothing is drawn at all.
    """

    quantity: ClassVar[str] = "rate"

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self._clock = Clock(0)
        self._attached = False
        self._value: Callable[[int], float] | None = None
        self._now = 0.0

    @abstractmethod
    def attach(self, module: LightningModule) -> None:
        """Find the layers and change them; with neutral arguments only find them.

        Raises:
            NothingMatchedError: If there are none. Where the module builds layers in hooks of its own, the fit's start looks again.
        """

    @abstractmethod
    def detach(self) -> None:
        """Put everything back, if anything was changed."""

    @abstractmethod
    def set_value(self, value: float) -> None:
        """Let the following batch draw with this strength."""

    @abstractmethod
    def shares(self) -> Sequence[float]:
        """Return what share the latest batch has dropped, for each layer that ran."""

    @property
    def independent(self) -> bool:
        """Whether ranks with different data draw independently of each other."""
        return True

    @property
    def _strength(self) -> float | Schedule:
        strength: float | Schedule = getattr(self, self.quantity)
        return strength

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._value = None
            self._begin(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_again(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._value = follow(self._strength, trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._value is not None
        self._now = self._value(trainer.global_step)
        self.set_value(self._now)
        self._clock.set(self._seed, self._rank(trainer), trainer.current_epoch, trainer.global_step, batch_idx)

    def _rank(self, trainer: Trainer) -> int:
        """Return the rank among those with different data; 0 if all draw the same."""
        return data_rank(trainer) if self.independent else 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer) and self._strength != 0:
            pl_module.log(f"{self.log_prefix}/{self.quantity}", self._now)
            if shares := self.shares():
                pl_module.log(f"{self.log_prefix}/dropped", sum(shares) / len(shares))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def _begin(self, module: LightningModule) -> None:
        """Change the layers that are there; where none is and the module has hooks that build some, `_look_again` finds them."""
        self._undo()
        try:
            self._do(module)
        except NothingMatchedError:
            if not defines(module, "setup", "configure_model"):
                raise

    def _look_again(self, module: LightningModule) -> None:
        """Change what was built after `setup`."""
        if not self._attached:
            self._do(module)

    def _do(self, module: LightningModule) -> None:
        self.attach(module)
        self._attached = True

    def _undo(self) -> None:
        self.detach()
        self._attached = False
