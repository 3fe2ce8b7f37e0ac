"""Which trials of a search are done, run, or are to be taken: a pure function of what the study holds.

No process is special. A trial is enqueued with a ticket, (stage, slot, attempt), and Optuna numbers trials one by one, whoever adds them.
Of several trials with one ticket the first one counts, and the others are void; so two workers that want the same slot at the same moment
agree without speaking. A stage begins when all slots of the one before are done, and its region follows from those, which do not change
any more; so every worker finds the same one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_tricks.search._settings import Settings
from lightning_tricks.search._space import Choice, Parameter, Point, active, grid, zoom

__all__ = ["ATTEMPTS", "Board", "Slot", "holders", "look", "outcome_of"]

ATTEMPTS = 3
"""How many workers may die in a trial until it counts as failed."""

Ticket = tuple[int, int, int]


@dataclass(frozen=True)
class Slot:
    """A trial to be done.

    Attributes:
        ticket: Stage, place in it, and how many attempts there were.
        deaths: In how many of those the worker died.
        fixed: Values that no sampler chooses.
    """

    ticket: Ticket
    deaths: int
    fixed: Point


@dataclass(frozen=True)
class Board:
    """How far a search is.

    Attributes:
        stage: The stage at work, from 0 on; the number of stages when all is done.
        space: Its region.
        total: How many trials it has.
        done: How many of them are done.
        open: Those that can be taken.
    """

    stage: int
    space: tuple[Parameter, ...]
    total: int
    done: int
    open: tuple[Slot, ...]


def ticket_of(trial: Any) -> Ticket | None:
    """Return a trial's ticket; None if it is one that nobody planned."""
    stage, slot, attempt = (trial.user_attrs.get(key) for key in ("stage", "slot", "attempt"))
    return None if stage is None or slot is None or attempt is None else (stage, slot, attempt)


def holders(trials: Sequence[Any]) -> dict[tuple[int, int], Any]:
    """Return the trial that counts for each slot: of its last attempt, the one that was added first."""
    first: dict[Ticket, Any] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        if (ticket := ticket_of(trial)) is not None:
            first.setdefault(ticket, trial)
    return {(stage, slot): trial for (stage, slot, _), trial in sorted(first.items(), key=lambda item: item[0])}


def outcome_of(trial: Any) -> str:
    """Return what came of a trial: complete, pruned, failed, waiting, running; or killed, and then it is to be tried again."""
    state: str = trial.state.name
    if state != "FAIL":
        return state.lower()
    return "failed" if "error" in trial.user_attrs or deaths_of(trial) >= ATTEMPTS else "killed"


def deaths_of(trial: Any) -> int:
    """Return how many workers have died in a trial that failed, in its earlier attempts included; who interrupts one kills none."""
    return int(trial.user_attrs["deaths"]) + ("interrupted" not in trial.user_attrs)


def look(settings: Settings, trials: Sequence[Any]) -> Board:
    """Find out what is to be done."""
    slots = holders(trials)
    space: tuple[Parameter, ...] = settings.space
    for stage in range(len(settings.stages)):
        mine = {slot: trial for (its, slot), trial in slots.items() if its == stage}
        planned = _plan(settings, stage, space, [trial.params for (its, _), trial in slots.items() if its < stage])
        states = {slot: outcome_of(mine[slot]) if slot in mine else "open" for slot in range(len(planned))}
        free = []
        for slot, state in states.items():
            if state == "open":
                free.append(Slot((stage, slot, 0), 0, planned[slot]))
            elif state == "killed":
                last = mine[slot]
                ticket = (stage, slot, last.user_attrs["attempt"] + 1)
                free.append(Slot(ticket, deaths_of(last), {**planned[slot], **last.params}))
        done = sum(state in {"complete", "pruned", "failed"} for state in states.values())
        if done < len(planned):
            return Board(stage, space, len(planned), done, tuple(free))
        space = tuple(_zoom(settings, [trial for (its, _), trial in slots.items() if its <= stage], len(planned)))
    return Board(len(settings.stages), space, 0, 0, ())


def _plan(settings: Settings, stage: int, space: Sequence[Parameter], known: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return what is fixed of each trial of a stage: on a grid all, without the points that are known; else the choices that are left."""
    given = settings.stages[stage]
    if given.sampler == "grid":
        return [point for point in grid(space, given.size, inside=stage > 0) if point not in known]
    narrowed = [each for each in space if isinstance(each, Choice) and len(each.values) < len(each.all)]
    points = []
    for slot in range(given.size):
        drawn = random.Random(f"{settings.seed}/{stage}/{slot}")  # noqa: S311 -- drawn alike by every worker
        points.append(active(space, {each.path: drawn.choice(each.values) for each in narrowed}))
    return points


def _zoom(settings: Settings, trials: Sequence[Any], size: int) -> list[Parameter]:
    """Zoom around the best quarter: as many of the best trials so far as a quarter of the last stage's."""
    sign = 1 if settings.mode == "min" else -1
    complete = sorted((trial for trial in trials if outcome_of(trial) == "complete"), key=lambda trial: (sign * trial.value, trial.number))
    tried = [trial.params for trial in trials if trial.params]
    return zoom(settings.space, tried, [trial.params for trial in complete[: math.ceil(size / 4)]])
