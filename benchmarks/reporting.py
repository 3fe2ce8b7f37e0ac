"""What the benchmarks share: a note of the circumstances, and tables on the screen and in files."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["environment", "markdown", "show", "write"]


def environment(command: str, *packages: str, device: str) -> dict[str, str]:
    """Return what numbers depend on: command, date, hardware and versions."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in info if line.startswith("model name")), platform.processor())
    gpu = f"; {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device == "cuda" else ""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{cpu}, {os.cpu_count()} cores{gpu}",
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, numbers to the right."""
    numeric = [bool(rows) and _is_number(rows[0][i]) for i in range(len(header))]
    lines = [header, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_number(cell: str) -> bool:
    return cell.lstrip("-")[:1].isdigit()


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    try:
        console, table = import_module("rich.console").Console(), import_module("rich.table").Table(title=title)
    except ImportError:
        print(f"\n{title}\n\n{markdown(header, rows)}\n", flush=True)
        return
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if _is_number(rows[0][i]) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:
        console.width = 140  # rather than a guess that cuts columns
    console.print(table)


def write(path: Path, title: str, circumstances: Mapping[str, str], data: Any, body: Sequence[str]) -> None:
    """Write data as JSON, and a Markdown file of the same name that people read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"environment": circumstances, **data}, indent=2, ensure_ascii=False) + "\n")
    notes = "\n".join(f"- {key}: {value}" for key, value in circumstances.items())
    path.with_suffix(".md").write_text("\n\n".join([f"# {title}", notes, *body]) + "\n")
