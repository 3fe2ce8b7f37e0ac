"""Runs the first blocks of the quickstart, those that need no extra, where nothing but the package is installed."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_tricks

page = Path(__file__).parents[1] / "docs/quickstart.md"
blocks = re.findall(r"^```python\n(.*?)^```", page.read_text().partition("## From YAML")[0], flags=re.MULTILINE | re.DOTALL)
assert len(blocks) >= 4, f"{page} has {len(blocks)} blocks"
assert "site-packages" in lightning_tricks.__file__, f"installed from {lightning_tricks.__file__}"
exec(compile("\n".join(blocks), page, "exec"), {"__name__": "__main__"})  # noqa: S102 -- the page's own
