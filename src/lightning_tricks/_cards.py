"""What the method cards say, for whoever asks from the command line."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

import lightning_tricks
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import ArgumentError

__all__ = ["explain", "list_tricks"]

_PLACES = (Path(__file__).parent / "_cards", Path(__file__).parents[2] / "docs" / "tricks")  # in a wheel; in a checkout
_ESSENCE = ("In one sentence", "Use it", "Knobs", "Goes well with / clashes with", "Pitfalls")


def list_tricks() -> str:
    """Return a line for each trick: its name, and its card's one sentence."""
    tricks = {name: value for name, value in _public().items() if inspect.isclass(value) and issubclass(value, Trick)}
    width = max(map(len, tricks))
    return "\n".join(f"{name:<{width}}  {_summary(trick)}" for name, trick in sorted(tricks.items(), key=lambda each: each[0].lower()))


def explain(name: str, *, whole: bool = False) -> str:
    """Return a trick's card, or what it comes to; of any other public name the docstring.

    Args:
        name: A trick's name, such as ``EMA``, or another public name, such as ``functional.swap_norm``.
        whole: Whether to return the whole card.

    Raises:
        ArgumentError: If there is no such name; the error has those which are spelled alike.
    """
    public = _public()
    found = {key.lower(): key for key in public}.get(name.removeprefix("lightning_tricks.").removeprefix("lt.").lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), [key.lower() for key in public], n=3, cutoff=0.5)
        there = ", ".join(key for key in public if key.lower() in near)
        hint = f"Did you mean {there}?" if there else "`lightning-tricks list` prints those of the tricks."
        msg = f"`name` must be a public name of lightning_tricks, got {name!r}. {hint}"
        raise ArgumentError(msg)
    value = public[found]
    if not (inspect.isclass(value) and issubclass(value, Trick)):
        return f"{found}{_signature(value)}\n\n{inspect.getdoc(value)}"
    card = _card(value)
    if card is None or whole:
        return card or f"{found}{_signature(value)}\n\n{inspect.getdoc(value)}"
    sections = _sections(card)
    parts = [sections[title] if title != "Use it" else sections[title].partition("\n### ")[0] for title in _ESSENCE]
    headings = ["" if title == _ESSENCE[0] else f"## {title}\n\n" for title in _ESSENCE]
    texts = [heading + part.strip() for heading, part in zip(headings, parts, strict=True)]
    return "\n\n".join([f"# {found}", *texts, f"`lightning-tricks explain {found} --whole` prints the whole card."])


def _public() -> dict[str, Any]:
    """Return every public name, those of the modules with the module's name before it."""
    public: dict[str, Any] = {}
    for name in lightning_tricks.__all__:
        value = getattr(lightning_tricks, name)
        public |= {f"{name}.{each}": getattr(value, each) for each in value.__all__} if inspect.ismodule(value) else {name: value}
    return public


def _signature(value: Any) -> str:
    return str(inspect.signature(value)) if callable(value) else ""


def _summary(trick: type[Trick]) -> str:
    return (inspect.getdoc(trick) or "").partition("\n\n")[0].replace("\n", " ")


def _card(trick: type[Trick]) -> str | None:
    name = f"{trick.__module__.rpartition('.')[2].lstrip('_')}.md"
    return next(((place / name).read_text(encoding="utf-8") for place in _PLACES if (place / name).is_file()), None)


def _sections(card: str) -> dict[str, str]:
    parts = card.split("\n## ")[1:]
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}
