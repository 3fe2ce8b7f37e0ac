"""From globs over qualified names to the parameters or modules they select, with a diagnosis when nothing is left."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch.nn import ModuleList

from lightning_tricks._core.strategies import plain_name
from lightning_tricks.errors import NothingMatchedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Sized

    from torch import nn

__all__ = ["matches", "nothing_left", "select_modules", "select_parameters"]


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Tell whether one of the globs matches a qualified name.

    A glob matches the whole name or any part of it that begins after a dot, and it matches a parameter through the name of any
    module that holds it: ``layer1.?`` and ``layer1`` both select ``model.layer1.0.weight``.

    Example:
        >>> matches("model.layer1.0.weight", "layer1.?"), matches("model.layer1.0.weight", ["head", "layer2"])
        (True, False)
    """
    globs = (patterns,) if isinstance(patterns, str) else patterns
    parts = name.split(".")
    spans = (".".join(parts[i:j]) for j in range(len(parts), 0, -1) for i in range(j))
    return "*" in globs or any(fnmatchcase(span, glob) for span in spans for glob in globs)


def select_parameters(
    module: nn.Module,
    where: str | Sequence[str],
    exclude: str | Sequence[str],
    *,
    trick: str,
) -> dict[str, nn.Parameter]:
    """Select parameters by name, frozen ones included; tied parameters appear once, under their first name.

    Raises:
        NothingMatchedError: If no trainable parameter is left, saying which of four reasons holds: the model has no parameters,
            `where` matches none, `exclude` removes all, or all that are left are frozen.
    """
    everything = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    located = {name: parameter for name, parameter in everything.items() if matches(name, where)}
    selected = {name: parameter for name, parameter in located.items() if not matches(name, exclude)}
    if any(parameter.requires_grad for parameter in selected.values()):
        return selected
    model = type(module).__name__
    if not everything:
        reason = f"{model} has none. Build its layers in `__init__`, `setup` or `configure_model`"
    elif not located:
        reason = f"`where={where!r}` matched none of {_inventory(module)}. {_hint(where, list(everything))}"
    elif not selected:
        reason = f"`exclude={exclude!r}` removed all {len(located)} that `where={where!r}` matched. Exclude less"
    else:
        reason = f"all {len(selected)} that `where={where!r}` matched are frozen (`requires_grad=False`). Thaw some, or select others"
    msg = f"{trick} found no trainable parameter: {reason}."
    raise NothingMatchedError(msg)


def select_modules(
    module: nn.Module, where: str | Sequence[str], exclude: str | Sequence[str], *, trick: str, argument: str = "where"
) -> dict[str, nn.Module]:
    """Select modules by name, shared ones once; of those that lie within each other, the outermost.

    A glob matches the whole name of a module or its end after a dot, and a list of modules stands for its members. Errors call `where`
    by the name of the trick's `argument`.

    Raises:
        NothingMatchedError: If none is left, saying whether `where` matches none or `exclude` removes all.
    """
    names = {plain_name(name): child for name, child in module.named_modules() if name}
    located = {name: child for name, child in names.items() if _is_named(name, where) and not isinstance(child, ModuleList)}
    lists = [name for name, child in names.items() if isinstance(child, ModuleList) and _is_named(name, where)]
    located.update({name: child for name, child in names.items() if name.rpartition(".")[0] in lists})
    selected: dict[str, nn.Module] = {}
    for name in names:  # parents before their children
        inside = any(name.startswith(f"{outer}.") for outer in selected)
        if name in located and not inside and not matches(name, exclude):
            selected[name] = located[name]
    if selected:
        return selected
    kinds = Counter(type(child).__name__ for child in names.values())
    listed = ", ".join(f"{kind} ×{count}" for kind, count in kinds.most_common(4))
    model = type(module).__name__
    if not located:
        found = f"{model}'s {len(names)} modules ({listed}{', …' if len(kinds) > 4 else ''})"
        examples = ", ".join(map(repr, list(names)[:3]))
        wanted = (where if isinstance(where, str) else where[0]).strip(".*?")
        close = get_close_matches(wanted, list(names), n=1) or list(names)[:1]
        reason = f"`{argument}={where!r}` matched none of {found}. Names look like {examples}; try `{argument}={''.join(close)!r}`"
    else:
        reason = f"`exclude={exclude!r}` removed all {len(located)} that `{argument}={where!r}` matched. Exclude less"
    msg = f"{trick} found no module: {reason}."
    raise NothingMatchedError(msg)


def nothing_left(model: nn.Module, names: Iterable[str], located: Sized, where: Any, exclude: Any) -> str:
    """Say why globs leave none of the things of these names: `where` matches none, or `exclude` removes all that it locates."""
    listed = list(names)
    if not located:
        examples = ", ".join(map(repr, listed[:3]))
        return f"`where={where!r}` matched none of {type(model).__name__}'s {len(listed)}. Their names look like {examples}"
    matched = "" if where is None else f" that `where={where!r}` matched"
    return f"`exclude={exclude!r}` removed all {len(located)}{matched}. Exclude less"


def _is_named(name: str, patterns: str | Sequence[str]) -> bool:
    globs, parts = (patterns,) if isinstance(patterns, str) else patterns, name.split(".")
    return any(fnmatchcase(".".join(parts[i:]), glob) for i in range(len(parts)) for glob in globs)


def _inventory(module: nn.Module) -> str:
    kinds = Counter(type(child).__name__ for child in module.modules() if any(True for _ in child.parameters(recurse=False)))
    listed = ", ".join(f"{kind} ×{count}" for kind, count in kinds.most_common(4))
    total = sum(1 for _ in module.parameters())
    return f"{type(module).__name__}'s {total} parameters (in {listed}{', …' if len(kinds) > 4 else ''})"


def _hint(where: str | Sequence[str], names: list[str]) -> str:
    examples = ", ".join(map(repr, names[:2]))
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))
    wanted = where if isinstance(where, str) else where[0]
    close = get_close_matches(wanted.rstrip(".*"), [*modules, *(part for module in modules for part in module.split("."))], n=1)
    suggestion = close[0] if close else names[0].split(".")[0]
    return f"Names look like {examples}; try `where={suggestion!r}`"
