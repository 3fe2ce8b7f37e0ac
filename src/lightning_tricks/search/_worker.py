"""A worker: takes trials of a study one after the other, trains them, and tells what came of them."""

from __future__ import annotations

import gc
import math
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lightning_tricks._core.lightning import Callback, LightningModule, Trainer, callbacks_of, is_progress_bar, override
from lightning_tricks.errors import ArgumentError, SearchError
from lightning_tricks.search._board import Board, Slot, holders, look, ticket_of
from lightning_tricks.search._configuration import Built
from lightning_tricks.search._settings import Settings
from lightning_tricks.search._space import Point, suggest
from lightning_tricks.search._storage import optuna
from lightning_tricks.search._trial import run_trial

__all__ = ["Worker"]

_GRACE = 3  # signs of life that may be missing


class MetricError(ArgumentError):
    """No validation logs the metric, of this trial nor of any other."""


class Worker:
    """Does trials until none is left.

    Args:
        settings: The search.
        study: Optuna's study.
        watch: Called with all trials and the state of the search whenever something may have changed.
    """

    def __init__(self, settings: Settings, study: Any, watch: Callable[[Sequence[Any], Board], None]) -> None:
        self.settings, self.study, self.watch = settings, study, watch
        self.failed = 0
        self._seen: dict[int, tuple[float | None, float]] = {}

    def run(self) -> None:
        """Do trials until the search is done, waiting where others have the last ones of a stage.

        Raises:
            SearchError: If too many trials in a row fail.
            ArgumentError: If nothing logs the metric.
            KeyboardInterrupt: If a trial is interrupted; it is left to be done again.
        """
        while True:
            trials = self.study.get_trials(deepcopy=False)
            self._bury(trials)
            board = look(self.settings, trials)
            self.watch(trials, board)
            if board.stage == len(self.settings.stages):
                return
            if board.open:
                self._enqueue(board.open, busy=any(trial.state.name == "RUNNING" for trial in trials))
            elif not any(trial.state.name == "WAITING" for trial in trials):
                time.sleep(min(self.settings.heartbeat / 2, 2))
                continue
            trial = self.study.ask()
            if self._counts(trial, board.stage):
                with _alive(trial, self.settings.heartbeat):
                    verdict = self._try(trial, board)
                self._tell(trial, **verdict)
            else:
                self._tell(trial, state=_state("FAIL"))

    def _enqueue(self, free: Sequence[Slot], *, busy: bool) -> None:
        slot = random.choice(free) if busy else free[0]  # noqa: S311 -- so that two workers rarely want the same
        stage, place, attempt = slot.ticket
        attributes = {"stage": stage, "slot": place, "attempt": attempt, "deaths": slot.deaths}
        self.study.enqueue_trial(slot.fixed, user_attrs=attributes)

    def _counts(self, trial: Any, stage: int) -> bool:
        """Whether a trial is the first of its ticket, and the ticket one of the stage at work."""
        ticket = ticket_of(trial)
        holder = None if ticket is None else holders(self.study.get_trials(deepcopy=False)).get(ticket[:2])
        return ticket is not None and ticket[0] == stage and holder is not None and holder.number == trial.number

    def _bury(self, trials: Sequence[Any]) -> None:
        """Give up trials whose worker has shown no sign of life since long; no clock but one's own is trusted."""
        now, running = time.monotonic(), {trial.number: trial.user_attrs.get("beat") for trial in trials if trial.state.name == "RUNNING"}
        self._seen = {
            number: self._seen[number] if number in self._seen and self._seen[number][0] == beat else (beat, now)
            for number, beat in running.items()
        }
        for number, (_, since) in self._seen.items():
            if now - since > _GRACE * self.settings.heartbeat:
                with suppress(ValueError):  # somebody else was faster
                    self.study.tell(number, state=_state("FAIL"))

    def _try(self, trial: Any, board: Board) -> dict[str, Any]:
        """Train, and return what to tell Optuna."""
        lost = optuna().exceptions.UpdateFinishedTrialError
        try:
            self.study.sampler = self._sampler(board.stage, trial.user_attrs["slot"])
            point = suggest(board.space, trial)
            outcome = run_trial(lambda: self._build(trial, point), [], seed=self.settings.seed, metric=self.settings.metric, test=False)
            value = outcome.metrics[self.settings.metric]
            trial.set_user_attr("metrics", outcome.metrics)
            trial.set_user_attr("seconds", round(outcome.seconds, 3))
        except optuna().TrialPruned:
            return {"state": _state("PRUNED")}
        except lost:  # this process slept so long that others gave the trial up
            return {"state": _state("FAIL")}
        except KeyboardInterrupt:
            trial.set_user_attr("interrupted", value=True)
            self._tell(trial, state=_state("FAIL"))
            raise
        except MetricError:
            self._tell(trial, state=_state("FAIL"))
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- reported, so that the others go on
            return self._fail(trial, error)
        finally:
            _free_memory()
        self.failed = 0
        return {"values": value} if math.isfinite(value) else {"state": _state("PRUNED")}

    def _fail(self, trial: Any, error: BaseException) -> dict[str, Any]:
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        trial.set_user_attr("error", words[:1000])
        self.failed += 1
        if self.failed >= self.settings.failures:
            self._tell(trial, state=_state("FAIL"))
            msg = (
                f"{self.failed} trials in a row have failed, which is as many as `failures` allows; the last one, {trial.number}, with "
                f"{words}. Mend the cause and start the search again in another `folder`, or raise `failures`."
            )
            raise SearchError(msg) from error
        return {"state": _state("FAIL")}

    def _sampler(self, stage: int, slot: int) -> Any:
        """Return a sampler whose draws follow from the seed and the trial's place, whoever does it."""
        seed = random.Random(f"{self.settings.seed}/{stage}/{slot}").getrandbits(32)  # noqa: S311 -- as the sampler's seed
        samplers = optuna().samplers
        if self.settings.stages[stage].sampler == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=False, constant_liar=True)
        return samplers.RandomSampler(seed=seed)

    def _build(self, trial: Any, point: Point) -> Built:
        built = self.settings.quietly(point, self.settings.folder / "trials" / str(trial.number)).build()
        for callback in callbacks_of(built.trainer):
            if is_progress_bar(callback):
                callback.disable()  # type: ignore[attr-defined]  # it would tear the search's own
        callbacks_of(built.trainer).append(Reporting(trial, self.settings.metric))
        return built

    def _tell(self, trial: Any, **verdict: Any) -> None:
        with suppress(ValueError):  # given up by others, who thought this worker dead
            self.study.tell(trial, **verdict)


class Reporting(Callback):
    """Tells Optuna the metric after each validation, and stops a trial that has no hope."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.count = 0

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            there = ", ".join(trainer.callback_metrics) or "none"
            msg = f"`metric` must be logged by validation_step, got {self.metric!r}; logged are: {there}."
            raise MetricError(msg)
        value = float(trainer.callback_metrics[self.metric])
        self.count += 1
        self.trial.report(value, self.count)
        if not math.isfinite(value) or self.trial.should_prune():
            raise optuna().TrialPruned


@contextmanager
def _alive(trial: Any, interval: float) -> Iterator[None]:
    """Show signs of life while a trial lasts."""
    over = threading.Event()

    def beat() -> None:
        while True:
            with suppress(Exception):  # a storage that does not answer now may do so later
                trial.set_user_attr("beat", time.time())
            if over.wait(interval):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _state(name: str) -> Any:
    return optuna().trial.TrialState[name]


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
