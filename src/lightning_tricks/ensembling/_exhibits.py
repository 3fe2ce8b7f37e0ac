"""What there is to show of the members of an ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lightning_tricks._core.exhibits import Exhibits, Goal, Table, WeightFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_tricks.ensembling._store import Member

__all__ = ["exhibits_of"]

_GOALS: Final[Mapping[str, Goal]] = {"nll": "min", "brier": "min", "calibration_error": "min", "mse": "min"}


def exhibits_of(members: Sequence[Member], asides: Sequence[str]) -> Exhibits:
    """Tell of members what is known of them, where they are and how large, and hand out their files.

    Args:
        members: The members in their order, by which ``member-0`` is the first.
        asides: Prefixes of the metrics of single members.
    """
    known = list(dict.fromkeys(fact for member in members for fact in member.facts))
    rows = []
    for index, member in enumerate(members):
        size = sum(path.stat().st_size for path in member.paths if path.exists())
        rows.append((index, *(member.facts.get(fact) for fact in known), size, ", ".join(member.files)))
    return Exhibits(
        goals=_GOALS,
        asides=tuple(asides),
        tables={"member_table": Table(("member", *known, "bytes", "files"), tuple(rows))} if members else {},
        members=tuple(WeightFiles(f"member-{index}", tuple(member.paths), member.facts) for index, member in enumerate(members)),
    )
