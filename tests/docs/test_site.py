"""What the site makes from the cards and from the examples is whole and up to date."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import lightning_tricks as lt
from contracts.cases import CASES

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
STRATEGIES = {(): "", ("deepspeed",): "DeepSpeed", ("fsdp1",): "FSDP1", ("deepspeed", "fsdp1"): "FSDP1 and DeepSpeed"}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/_ext/{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def overview():
    return load("overview")


@pytest.fixture(scope="module")
def gallery():
    return load("gallery")


@pytest.fixture(scope="module")
def cards(overview):
    return {card.title: card for several in overview.read_cards().values() for card in several}


# The overview


def test_every_trick_is_in_the_overview(cards):
    pages = {case.trick.__name__: f"{case.trick.__module__.rpartition('.')[2].lstrip('_')}.md" for case in CASES}
    assert {title: card.page for title, card in cards.items()} == pages


def test_readme_has_the_table_of_the_cards(overview):
    readme = overview.README.read_text()
    assert readme == overview.with_table(readme, overview.readme_table(overview.read_cards())), f"run `{overview.COMMAND}`"


def test_site_shows_each_trick_with_its_cost_and_what_it_refuses(overview, cards):
    text = overview.site_overview(overview.read_cards())
    for card in cards.values():
        assert f"| [{card.title}]({card.page}) *{card.tags['From']}* | {card.sentence} | {card.tags['Costs']} |" in text
        if card.refused:
            assert re.search(rf"^- under {card.refused}: .*\[{card.title}\]", text, flags=re.MULTILINE)


@pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])
def test_card_names_the_strategies_that_the_trick_refuses(case, cards):
    refused = tuple(sorted(case.skips.keys() & {"deepspeed", "fsdp1"}))
    assert cards[case.trick.__name__].refused == STRATEGIES[refused]


def test_cards_come_from_what_they_refer_to(cards):
    for card in cards.values():
        references = (ROOT / "docs/tricks" / card.page).read_text().partition("\n## References\n")[2]
        authors, _, year = card.tags["From"].rpartition(", ")
        entries = [" ".join(entry.split()) for entry in references.split("\n- ")]
        names = re.split(r", | and ", authors.removesuffix(" et al."))
        assert any(year in entry and all(name in entry for name in names) for entry in entries), f"{card.page}: {card.tags['From']}"


def test_cards_name_public_functions(cards):
    for card in cards.values():
        for name, target in re.findall(r"\[`(.+?)`\]\(#(.+?)\)", card.tags.get("Without a Trainer", "")):
            home, key = name.split(".")
            assert target == f"lightning_tricks.{name}"
            assert key in getattr(lt, home).__all__


@pytest.mark.parametrize(
    "change",
    [("- **Kind:** averaging\n", ""), ("averaging\n", "averagings\n"), ("- **Costs:** ", "- **Cost:** "), ("## In one sentence", "## One")],
)
def test_a_card_that_lacks_something_is_refused(change, overview, tmp_path):
    page = tmp_path / "ema.md"
    text = (ROOT / "docs/tricks/ema.md").read_text()
    page.write_text(text)
    assert overview.Card.read(page).title == "EMA"
    page.write_text(text.replace(*change, 1))
    with pytest.raises(ValueError, match=r"ema\.md must have a list of .*`- \*\*Kind:\*\* …`.*averaging, ensembling"):
        overview.Card.read(page)


# The gallery


def test_every_example_has_a_page_with_a_picture_and_what_it_printed(gallery):
    examples = gallery.read_examples()
    assert gallery.SCRIPTS / "digits.py" in gallery.read_scripts()
    shown = {example.script for example in examples}
    assert gallery.read_scripts() == shown, "write docs/examples/NAME.md like its neighbours, then run `python docs/_ext/gallery.py NAME`"
    for example in examples:
        assert re.match(r"\d+ s of CPU time\n", example.record.read_text())
        assert (gallery.IMAGES / example.image).stat().st_size > 1000
        assert len(example.options["alt"]) > 20
        assert example.sentence.endswith((".", "?"))


def test_recording_keeps_what_is_printed_the_time_and_the_picture(gallery, tmp_path, monkeypatch):
    for name in ("SCRIPTS", "PAGES", "IMAGES"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(gallery, name, tmp_path / name)
    lines = ["from pathlib import Path", "Path('runs').mkdir()", "Path('runs/some.png').write_text('picture')"]
    (tmp_path / "SCRIPTS/some.py").write_text("\n".join([*lines, "print('trained  ')", "print(Path('runs').resolve() / 'some.png')"]))
    (tmp_path / "PAGES/some.md").write_text("# Some\n\nTwo\nlines.\n\n```{example}\n:alt: what is seen\n```\n")
    (example,) = gallery.read_examples()
    assert (example.title, example.sentence, example.command) == ("Some", "Two lines.", "python examples/some.py")
    gallery.record(example)
    assert example.record.read_text() == "1 s of CPU time\n\ntrained\nruns/some.png\n"
    assert example.took == "1 s"
    assert (tmp_path / "IMAGES/some.png").read_text() == "picture"
