"""The overview of all tricks, made from their cards: the directive `tricks` of the site, and the table of the README.

python docs/_ext/overview.py    # writes the README's table anew
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "docs/tricks"
README = ROOT / "README.md"
COMMAND = "python docs/_ext/overview.py"
BEGIN, END = f"<!-- from the cards, by `{COMMAND}` -->\n", "<!-- end of what is from the cards -->\n"
KINDS = {
    "averaging": "Averaging weights",
    "ensembling": "Ensembling",
    "regularization": "Regularization",
    "normalization": "Normalization, activations, first weights",
    "data": "Data",
    "optimization": "Optimization",
    "transfer": "Transfer",
    "diagnostics": "Diagnostics",
}
TAGS = ("Kind", "From", "Runs under", "Costs", "Without a Trainer")
EVERYWHERE = "every strategy"


@dataclass(frozen=True)
class Card:
    """What the top of a method card says.

    Args:
        page: File name of the card.
        title: Its heading, the name of the callback.
        sentence: Its section "In one sentence".
        tags: The list below the title, such as `"Kind"` and `"Costs"`; only `"Without a Trainer"` may be missing.
    """

    page: str
    title: str
    sentence: str
    tags: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read a card.

        Raises:
            ValueError: If its top lacks something.
        """
        head, _, body = path.read_text(encoding="utf-8").partition("\n## In one sentence\n")
        tags = dict(re.findall(r"^- \*\*(.+):\*\* (.+)$", head, flags=re.MULTILINE))
        if not body or list(tags) != list(TAGS[: len(tags)]) or len(tags) < len(TAGS) - 1 or tags["Kind"] not in KINDS:
            wanted = ", ".join(f"`- **{tag}:** …`" for tag in TAGS)
            msg = (
                f"{path.name} must have a list of {wanted} below its title, of which the last may be missing, with a kind among "
                f"{', '.join(KINDS)}, and then the heading 'In one sentence'; found {tags}."
            )
            raise ValueError(msg)
        return cls(path.name, head.partition("\n")[0].removeprefix("# "), " ".join(body.partition("\n## ")[0].split()), tags)

    @property
    def refused(self) -> str:
        """The strategies under which the trick does not run, in words; empty if there is none."""
        return self.tags["Runs under"].partition(";")[0].removeprefix(EVERYWHERE).removeprefix(" but ")


def read_cards() -> dict[str, list[Card]]:
    """Return the cards of each kind, in the order of the kinds and by name."""
    cards = sorted((Card.read(path) for path in CARDS.glob("*.md") if path.stem != "index"), key=lambda card: card.title.lower())
    return {kind: [card for card in cards if card.tags["Kind"] == kind] for kind in KINDS}


def readme_table(cards: Mapping[str, Sequence[Card]]) -> str:
    """Return the table of the README: one line for each trick, below one for its kind."""
    lines = ["| trick | in one sentence |", "| --- | --- |"]
    for kind, several in cards.items():
        lines.append(f"| **{KINDS[kind]}** | |")
        lines += [f"| [`{card.title}`](docs/tricks/{card.page}) | {card.sentence} |" for card in several]
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """Return the README's text with a table in its place."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"README.md lacks the line {BEGIN!r}"
    assert end, f"README.md lacks the line {END!r}"
    return f"{before}{begin}\n{table}\n{end}{after}"


def site_overview(cards: Mapping[str, Sequence[Card]]) -> str:
    """Return what the site shows: a table for each kind, what is refused where, and the order of the cards."""
    return "\n".join([*_tables(cards), *_refusals(cards), *_order(cards)])


def _tables(cards: Mapping[str, Sequence[Card]]) -> Iterator[str]:
    for kind, several in cards.items():
        yield f"\n## {KINDS[kind]}\n\n:::{{table}}\n:class: overview\n\n| trick | in one sentence | costs |\n| --- | --- | --- |"
        for card in several:
            yield f"| [{card.title}]({card.page}) *{card.tags['From']}* | {card.sentence} | {card.tags['Costs']} |"
        yield ":::\n"


def _refusals(cards: Mapping[str, Sequence[Card]]) -> Iterator[str]:
    refused = defaultdict(list)
    for several in cards.values():
        for card in several:
            refused[card.refused].append(f"[{card.title}]({card.page})")
    del refused[""]
    yield "\n## Where they run\n"
    yield "On a single device and under every strategy, some with an argument less, which the card names. Refused are:\n"
    for where, titles in refused.items():
        yield f"- under {where}: {', '.join(titles)}"


def _order(cards: Mapping[str, Sequence[Card]]) -> Iterator[str]:
    yield "\n```{toctree}\n:hidden:\n"
    yield from (card.page.removesuffix(".md") for several in cards.values() for card in several)
    yield "```"


class Tricks(SphinxDirective):
    """Shows the overview."""

    def run(self) -> list[nodes.Node]:
        """Read the cards, and parse what they come to."""
        for path in CARDS.glob("*.md"):
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(site_overview(read_cards()), allow_section_headings=True)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive."""
    app.add_directive("tricks", Tricks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), readme_table(read_cards())), encoding="utf-8")
