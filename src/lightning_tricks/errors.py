"""The errors of lightning-tricks.

Each inherits from `TrickError` and from the class a caller would expect, and says what must hold, what was found and what to do.
"""

from __future__ import annotations

from lightning_tricks._core.lightning import MisconfigurationException

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "MissingPackageError",
    "NothingMatchedError",
    "SearchError",
    "TrickConflictError",
    "TrickError",
    "UnsupportedOptimizerError",
    "UnsupportedStrategyError",
]


class TrickError(Exception):
    """Base of all errors raised by lightning-tricks."""


class ArgumentError(TrickError, ValueError, TypeError):
    """An argument lies outside its domain or has the wrong type."""


class NothingMatchedError(TrickError, ValueError):
    """A selection by name or kind leaves nothing for the trick to act on."""


class TrickConflictError(TrickError, MisconfigurationException):
    """Two callbacks of one Trainer cannot work together."""


class UnsupportedStrategyError(TrickError, MisconfigurationException):
    """A trick cannot work under the Trainer's strategy."""


class UnsupportedOptimizerError(TrickError, MisconfigurationException):
    """A trick cannot follow one of the module's optimizers."""


class CheckpointError(TrickError, RuntimeError):
    """A checkpoint, or its record of a trick, is missing, damaged or does not fit; nothing of it was loaded."""


class MissingPackageError(TrickError, ImportError):
    """An optional package is not installed, or too old for what was asked of it."""


class SearchError(TrickError, RuntimeError):
    """A search was given up, since too many of its trials in a row have failed."""
