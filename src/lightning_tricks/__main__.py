"""The command line: ``lightning-tricks list``, ``explain``, ``inspect`` and ``ablate``."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING

from lightning_tricks import __version__
from lightning_tricks._cards import explain, list_tricks
from lightning_tricks._inspection import describe_checkpoint
from lightning_tricks.errors import TrickError
from lightning_tricks.search import search
from lightning_tricks.search._results import show
from lightning_tricks.search._study_file import ablate_from_file

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status: 0, or 2 after a wrong argument."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if given.command == "list":
            text = list_tricks()
        elif given.command == "explain":
            text = explain(given.name, whole=given.whole)
        elif given.command == "ablate":
            return _ablate(given)
        elif given.command == "search":
            return _search(given)
        else:
            text = describe_checkpoint(given.path)
    except TrickError as error:
        parser.exit(2, f"lightning-tricks {given.command}: {error}\n")
    sys.stdout.write(f"{text}\n")
    return 0


def _ablate(given: Namespace) -> int:
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 -- where the user's modules are
    ablation = ablate_from_file(given.config, folder=given.folder, seeds=given.seeds)
    show(ablation)
    return 130 if ablation.interrupted else 0


def _search(given: Namespace) -> int:
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 -- where the user's modules are
    try:
        search(given.config, folder=given.folder, storage=given.storage, launcher=given.launcher, workers=given.workers)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command goes on from here.\n")
        return 130
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("lightning-tricks", description="Proven tricks of neural-network training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the tricks with a line each")
    explaining = commands.add_parser("explain", help="print what a trick's card comes to, or the docstring of any public name")
    explaining.add_argument("name", help="such as EMA, or functional.swap_norm")
    explaining.add_argument("--whole", action="store_true", help="print the whole card")
    inspecting = commands.add_parser(
        "inspect",
        help="say which tricks made a checkpoint",
        description="Say which tricks made a checkpoint, with what arguments, and what averages and members it holds.\n"
        "No code that the file names is run.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    inspecting.add_argument("path", help="a checkpoint: a file, or a folder that FSDP or DeepSpeed has written")
    ablating = commands.add_parser("ablate", help="train with and without each trick, over seeds, and compare")
    ablating.add_argument("--config", required=True, help="a YAML file with a configuration of LightningCLI, and with tricks")
    ablating.add_argument("--folder", help="where results go, and whence an interrupted study goes on")
    ablating.add_argument("--seeds", type=int, help="how many trainings of each kind")
    searching = commands.add_parser("search", help="search for arguments that suit a model, from coarse to fine")
    searching.add_argument("--config", required=True, help="a YAML file with a configuration of LightningCLI, and with ranges")
    searching.add_argument("--folder", help="where the study and the best configuration go, and whence an interrupted search goes on")
    searching.add_argument("--storage", help="postgresql://…, redis://… or the path of a journal, for workers on several machines")
    searching.add_argument("--launcher", choices=("local", "ray"), default="local", help="ray: start workers on a Ray cluster")
    searching.add_argument("--workers", type=int, help="how many workers Ray starts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
