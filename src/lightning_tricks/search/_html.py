"""The report of an ablation: one HTML file with nothing outside it, for wide and for narrow screens, bright and dark."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING

from lightning_tricks.search._forest import effects_of, reach_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_tricks.search._results import Ablation, Row

__all__ = ["report"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #ffffff; --stripe: #f6f8fa; --line: #d5dae0;
  --helps: #0b7a4b; --hurts: #b3401d; --unclear: #6b7580; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa5b1; --page: #14171b; --stripe: #1c2026; --line: #343b44;
  --helps: #4cc38a; --hurts: #f08a62; --unclear: #8d98a5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p, li { max-width: 46rem; }
.soft { color: var(--soft); }
.lead { font-size: 1.1rem; }
ul { padding-left: 1.2rem; }
table { border-collapse: collapse; width: 100%; margin-top: .75rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-weight: 600; padding-left: .4rem; }
thead th { font-size: .82rem; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody tr:nth-child(odd) { background: var(--stripe); }
.interval { width: 30%; min-width: 8rem; } thead th.interval { text-align: center; }
.interval svg { display: block; width: 100%; height: 1.5rem; }
.helps { color: var(--helps); font-weight: 600; } .hurts { color: var(--hurts); font-weight: 600; } .unclear { color: var(--unclear); }
svg .zero { stroke: var(--line); stroke-width: 1.5; } svg .reach { stroke: currentColor; stroke-width: 2.5; }
svg .mean { fill: currentColor; }
.failures li { color: var(--hurts); overflow-wrap: anywhere; }
@media (max-width: 52rem) {
  body { padding-top: 1.25rem; }
  thead { display: none; }
  table, tbody, tr, td { display: block; width: 100%; }
  tr { padding: .6rem .7rem; border-radius: .5rem; margin-bottom: .6rem; background: var(--stripe); }
  td, td:first-child { display: flex; justify-content: space-between; gap: 1rem; padding: .12rem 0; white-space: normal; }
  td:first-child { font-size: 1.05rem; }
  td[data-name]::before { content: attr(data-name); color: var(--soft); text-align: left; }
  td.interval { width: 100%; padding: .3rem 0; }
  td.none { display: none; }
}
"""

_WORDS = """
Difference: the mean over pairs of trainings that share a seed, and with it initial weights and the order of the data. Its interval is that
of Student's t for paired values, at 95 %, for this one comparison.

p: the probability of a difference at least as large where the trick changes nothing, corrected by Holm's rule for the number of tricks in
the table. Below 0.05 a trick is said to help or to hurt; otherwise it is unclear, which is not the same as no effect.

Time per step: the ratio of median times to the reference's. Memory: what is added at the peak, on an accelerator the memory allocated,
otherwise that resident in the process, which is known to a few MiB only.
"""


def report(ablation: Ablation) -> str:
    """Return the report as HTML."""
    added = [row for row in ablation.rows if row.trick is not None and not row.removes]
    removed = [row for row in ablation.rows if row.removes]
    plain = [row for row in ablation.rows if row.trick is None]
    better = "lower" if ablation.mode == "min" else "higher"
    metric, count = escape(ablation.metric), len(ablation.seeds)
    parts = [
        f"<h1>Which tricks change {metric}?</h1>",
        f'<p class="lead">{escape(_headline(added, removed))}</p>',
        (f'<p class="soft">{ablation.done} of {ablation.total} trainings done · {count} {"seed" if count == 1 else "seeds"} · '
        f"{metric}, {better} is better · {datetime.now(UTC).date().isoformat()}</p>"),
        _failures(ablation),
        _section(ablation, "Without any, and with all", "The second row is compared with the first.", plain) if len(plain) > 1 else "",
        _section(ablation, "Each trick alone", "One trick is added to the baseline, and compared with it.", [*plain[:1], *added]),
        _section(ablation, "Each taken out", "Of all tricks together one is left out. Where that makes it worse, the trick helps beside "
                 "the others.", [*plain[1:], *removed]) if removed else "",
        _reading(ablation),
    ]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, '
        f'initial-scale=1">\n<title>Ablation of {metric}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _headline(added: Sequence[Row], removed: Sequence[Row]) -> str:
    def tell(rows: Sequence[Row], where: str) -> str:
        helping = [str(row.trick) for row in rows if row.verdict == "helps"]
        hurting = [str(row.trick) for row in rows if row.verdict == "hurts"]
        helps = f"{_listed(helping)} {'helps' if len(helping) == 1 else 'help'}" if helping else ""
        hurts = f"{_listed(hurting)} {'hurts' if len(hurting) == 1 else 'hurt'}" if hurting else ""
        found = "; ".join(filter(None, [helps, hurts])) or "no trick makes a clear difference"
        return f"{where}: {found}."

    return " ".join([tell(added, "Alone")] * bool(added) + [tell(removed, "Beside the others")] * bool(removed))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _failures(ablation: Ablation) -> str:
    items = "".join(f"<li>{escape(name)}: {escape(error)}</li>" for name, error in ablation.failures.items())
    return f'<h2>Trainings that failed</h2>\n<ul class="failures">{items}</ul>' if items else ""


def _section(ablation: Ablation, title: str, words: str, rows: Sequence[Row]) -> str:
    scale = reach_of(effects_of(ablation))
    heads = list(ablation.header)
    heads.insert(2, "worse · better" if ablation.mode == "max" else "better · worse")
    head = "".join(f"<th{' class=interval' if index == 2 else ''}>{escape(name)}</th>" for index, name in enumerate(heads))
    lines = "\n".join(_line(ablation, row, heads, scale) for row in rows)
    return f"<h2>{title}</h2>\n<p class='soft'>{words}</p>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>"


def _line(ablation: Ablation, row: Row, heads: Sequence[str], scale: float) -> str:
    texts = list(ablation.cells(row))
    verdict = row.verdict or "unclear"
    name = row.cell if row.trick is None else f"without {row.trick}" if row.removes else row.trick
    cells = [f"<td>{escape(name)}</td>", _cell(heads[1], texts[1]), f'<td class="interval {verdict}">{_interval(row, scale)}</td>']
    for name, text in zip(heads[3:], texts[2:], strict=True):
        cells.append(_cell(name, text, verdict if name == "the trick" and row.verdict else ""))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(name: str, text: str, kind: str = "") -> str:
    kind = "none" if text == "—" else kind
    return f'<td data-name="{escape(name)}"{f" class={kind}" if kind else ""}>{escape(text)}</td>'


def _interval(row: Row, scale: float) -> str:
    if row.difference is None or math.isnan(row.difference.mean):
        return ""
    mean, low, high = row.difference[:3]
    low, high = (mean if math.isnan(end) else end for end in (low, high))

    def place(value: float) -> str:
        return f"{50 + 50 * max(-1.0, min(1.0, value / scale)):.2f}%"

    return (
        f'<svg role="img" aria-label="difference {mean:.4g}, from {low:.4g} to {high:.4g}">'
        '<line class="zero" x1="50%" x2="50%" y1="0" y2="100%"/>'
        f'<line class="reach" x1="{place(low)}" x2="{place(high)}" y1="50%" y2="50%"/>'
        f'<circle class="mean" cx="{place(mean)}" cy="50%" r="4.5"/></svg>'
    )


def _reading(ablation: Ablation) -> str:
    seeds = ", ".join(map(str, ablation.seeds))
    items = [f"{escape(ablation.metric)}: mean ± standard deviation over seeds {seeds}, at the end of each training."]
    items += [escape(words) for words in _WORDS.strip().split("\n\n")]
    return f"<h2>How to read this</h2>\n<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
