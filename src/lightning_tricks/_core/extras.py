"""Packages that the library needs only here and there: imported where they are used, named where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_tricks.errors import MissingPackageError

__all__ = ["require"]


def require(module: str, *, package: str, extra: str, who: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: The module's name, such as ``timm.optim``.
        package: What pip calls the package.
        extra: Our extra that installs it.
        who: What needs it, for the error.

    Raises:
        MissingPackageError: If the package is not installed; an error inside an installed one is raised as it is.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        msg = f"{who} needs {package}, which is not installed: `pip install {package}`, or `pip install 'lightning-tricks[{extra}]'`."
        raise MissingPackageError(msg) from error
