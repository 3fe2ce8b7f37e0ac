"""How far a search is: a bar in a terminal, lines elsewhere; and the best configuration so far, in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_tricks._core.files import whole_file
from lightning_tricks._core.lightning import override
from lightning_tricks.search._board import Board, holders, outcome_of
from lightning_tricks.search._display import Display
from lightning_tricks.search._settings import Settings

__all__ = ["SearchProgress"]

_DONE = {"complete", "pruned", "failed"}


class SearchProgress(Display):
    """Tells what comes of the trials of a search, whoever does them, and keeps `best.yaml` in its folder up to date.

    Args:
        settings: The search.
        show: Whether anything is told.
    """

    def __init__(self, settings: Settings, *, show: bool) -> None:
        super().__init__(show=show)
        self.settings = settings
        self._told: set[int] | None = None
        self._stage = -1
        self._best: int | None = None

    @override
    def columns(self, progress: Any) -> Sequence[Any]:
        text = progress.TextColumn("{task.description}")
        return text, progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()

    def update(self, trials: Sequence[Any], board: Board) -> None:
        """Look at all trials, and tell what is new."""
        done = [trial for trial in holders(trials).values() if outcome_of(trial) in _DONE]
        best = self._best_of(done)
        if best is not None and best.number != self._best:
            self._save(best)
        self._best = None if best is None else best.number
        if self._told is None:
            self._told = {trial.number for trial in done}
            if done:
                self.say(f"{len(done)} trials are there from before.")
        for trial in sorted(done, key=lambda trial: trial.number):
            if trial.number not in self._told:
                self._told.add(trial.number)
                self.say(self._describe(trial))
        if board.stage != self._stage:
            self._stage = board.stage
            self.say(self._announce(board, best))
        self.advance(completed=board.done, total=board.total, description=f"stage {board.stage + 1}")

    def _best_of(self, trials: Sequence[Any]) -> Any:
        sign = 1 if self.settings.mode == "min" else -1
        complete = [trial for trial in trials if outcome_of(trial) == "complete"]
        return min(complete, key=lambda trial: (sign * trial.value, trial.number), default=None)

    def _save(self, trial: Any) -> None:
        """Write the configuration of a trial."""
        with whole_file(self.settings.folder / "best.yaml") as unfinished:
            self.settings.configuration.with_values({**trial.params, "seed_everything": self.settings.seed}).save(unfinished)

    def _describe(self, trial: Any) -> str:
        state, metric = outcome_of(trial), self.settings.metric
        where = f"stage {trial.user_attrs['stage'] + 1}, trial {trial.number}: "
        if state == "complete":
            best = ", the best so far" if trial.number == self._best else ""
            what = f"{metric} {trial.value:.6g}{best} ({trial.user_attrs['seconds']:.1f} s)"
        elif state == "pruned":
            what = f"pruned at {metric} {trial.intermediate_values[trial.last_step]:.6g}" if trial.intermediate_values else "pruned"
        else:
            what = f"failed, {trial.user_attrs.get('error', 'its worker died again and again')}"
        return f"{where}{what}; {_spell(trial.params)}"

    def _announce(self, board: Board, best: Any) -> str:
        if board.stage < len(self.settings.stages):
            stages = f"stage {board.stage + 1} of {len(self.settings.stages)}"
            ranges = ", ".join(
                f"{each.path} {list(each.values) if hasattr(each, 'values') else f'{each.low:.6g} to {each.high:.6g}'}"
                for each in board.space
            )
            return f"{stages}, {self.settings.stages[board.stage].sampler}, {board.total} trials: {ranges}"
        if best is None:
            return "The search is done, and no trial was completed."
        told = f"{self.settings.metric} {best.value:.6g}, trial {best.number}; {_spell(best.params)}"
        return f"Best: {told}\nIts configuration: {self.settings.folder / 'best.yaml'}"


def _spell(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value:.6g}" if isinstance(value, float) else f"{path}={value}" for path, value in params.items())
