"""The command line: ``lightning-tricks list``, ``explain`` and ``inspect``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING

from lightning_tricks import __version__
from lightning_tricks._cards import explain, list_tricks
from lightning_tricks._inspection import describe_checkpoint
from lightning_tricks.errors import TrickError

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
        else:
            text = describe_checkpoint(given.path)
    except TrickError as error:
        parser.exit(2, f"lightning-tricks {given.command}: {error}\n")
    sys.stdout.write(f"{text}\n")
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
