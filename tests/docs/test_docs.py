"""The documentation names everything that is public, its code runs, and its pages build."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from lightning_tricks._core.trick import Trick

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)]
HEADINGS = [
    "In one sentence",
    "The idea",
    "Use it",
    "Knobs",
    "What we measured",
    "Cost",
    "Goes well with / clashes with",
    "Pitfalls",
    "Where it acts",
    "References",
]
HOMES = (lt, lt.functional, lt.metrics, lt.nn, lt.optim, lt.errors, lt.schedules, lt.transforms, lt.search)
PUBLIC = {f"{home.__name__}.{name}": getattr(home, name) for home in HOMES for name in home.__all__}
CALLBACKS = {name: value for name, value in PUBLIC.items() if inspect.isclass(value) and issubclass(value, Trick)}
CODE = DOCS / "guides/code"  # of which pages show whole files
OPTIONAL = ("ema_pytorch", "hydra", "jsonargparse", "lightning.pytorch.cli", "timm", "wandb")
EXEMPT = (Exception,)  # an error's example is where it is raised
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = ["lightning_tricks", *sorted(module.name for module in pkgutil.walk_packages(lt.__path__, "lightning_tricks."))]


def card_of(callback: type) -> Path:
    """Return where a callback's card must be: under the name of the file that defines it."""
    return DOCS / "tricks" / f"{callback.__module__.rpartition('.')[2].lstrip('_')}.md"


def sections_of(text: str) -> dict[str, str]:
    """Split a page at its headings of the second level; a line of code is no heading."""
    sections, title, fenced = {}, None, False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            title = line.removeprefix("## ")
            assert title not in sections, f"the heading {title!r} stands twice"
            sections[title] = ""
        elif title is not None:
            sections[title] += line + "\n"
    return sections


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Every public name


def test_api_pages_document_exactly_the_public_names():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto\w+:: (\S+)$", text, flags=re.MULTILINE)
    assert sorted(documented) == sorted({*PUBLIC, "lightning_tricks"})


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if callable(value)])
def test_public_name_has_an_example(name):
    value = PUBLIC[name]
    assert inspect.getdoc(value), f"{name} has no docstring"
    if not (inspect.isclass(value) and issubclass(value, EXEMPT)):
        examples = doctest.DocTestParser().get_examples(value.__doc__)
        assert any(example.want for example in examples), f"{name} has no doctest that shows its result"


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    assert results.failed == 0


# Every trick


def test_there_are_callbacks():
    assert "lightning_tricks.EMA" in CALLBACKS


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
def test_callback_has_a_card_with_every_heading(callback):
    sections = sections_of(card_of(callback).read_text())
    assert list(sections) == HEADINGS
    assert not [title for title, text in sections.items() if len(text.split()) < 5]


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
def test_card_explains_every_argument(callback):
    knobs = sections_of(card_of(callback).read_text())["Knobs"]
    explained = re.findall(r"^\| `(\w+)` \|", knobs, flags=re.MULTILINE)
    assert explained == list(inspect.signature(callback).parameters)


# Every page


class Classifier(LightningModule):
    """Stands for the reader's own module."""

    def __init__(self, recipe: lt.optim.OptimizerRecipe | None = None):
        super().__init__()
        self.recipe = recipe
        self.body = torch.nn.Linear(16, 8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1) if self.recipe is None else self.recipe.build(self)


LIGHTNINGS_ADVICE = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(32, 16), torch.randint(4, (32,))), batch_size=16)


def with_marks(page: Path):
    """Mark the pages whose code needs more than the package's own dependencies."""
    optional = re.search(rf"^\s*(from|import) ({'|'.join(OPTIONAL)})\b", "".join(blocks_of(page.read_text(), "python")), flags=re.MULTILINE)
    return pytest.param(page, marks=pytest.mark.full if optional else ())


@LIGHTNINGS_ADVICE
@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES if blocks_of(page.read_text(), "python")], ids=relative)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(CODE)
    for block in blocks_of(page.read_text(), "yaml"):
        if name := re.match(r"# (\w+\.yaml)$", block, flags=re.MULTILINE):  # a file that the page's code reads
            Path(name[1]).write_text(block)
    torch.manual_seed(0)
    namespace = {"model": Classifier(), **{f"{stage}_loader": loader() for stage in ("train", "val", "test")}}
    for block in blocks_of(page.read_text(), "python"):
        exec(compile(block, relative(page), "exec"), namespace)  # noqa: S102


@pytest.mark.full
@LIGHTNINGS_ADVICE
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page.read_text(), "yaml")], ids=relative)
def test_yaml_blocks_configure_a_run(page, tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page.read_text(), "yaml"):
        if "_target_:" in block:
            check_hydra(block)
            continue
        Path("config.yaml").write_text(
            block if re.search("^(trainer|model):", block, flags=re.MULTILINE) else f"trainer:\n{indent(block, '  ')}"
        )
        cli = LightningCLI(Classifier, run=False, save_config_callback=None, args=["--config", "config.yaml"])
        assert any(isinstance(callback, Trick) for callback in cli.trainer.callbacks) or cli.model.recipe is not None


def check_hydra(block: str) -> None:
    """Check that Hydra makes tricks of a list or a mapping of callbacks."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    made = instantiate(OmegaConf.create(block)).callbacks
    assert made
    assert all(isinstance(callback, Trick) for callback in (made.values() if isinstance(made, Mapping) else made))


def test_relative_links_lead_somewhere():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 5
    assert not [f"{relative(page)}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_no_number_is_missing():
    missing = {relative(page): re.findall(r"@@\w+@@", page.read_text()) for page in PAGES}
    assert not {page: names for page, names in missing.items() if names}


def test_readme_sets_up_with_two_commands():
    commands = blocks_of(sections_of((ROOT / "README.md").read_text())["Set up"], r"\w*")
    assert len(commands) == 2
    ends = []
    for command in commands:
        make, install, act = command.strip().split(" && ")
        assert make == "python3 -m venv .venv"
        *words, what = shlex.split(install)
        assert words == [".venv/bin/python", "-m", "pip", "install", "-e"]
        assert what.removeprefix(".[").removesuffix("]") in PROJECT["optional-dependencies"]
        ends.append(act)
    assert ends == [".venv/bin/python examples/digits.py", ".venv/bin/python -m pytest"]
    assert (ROOT / "examples/digits.py").exists()


def test_install_page_agrees_with_the_project():
    sections = sections_of((DOCS / "install.md").read_text())
    floors = dict(re.findall(r"^\| `?([\w-]+)`? \| ([\d.]+) or newer", sections["Versions"], flags=re.MULTILINE))
    needed = [f"Python{PROJECT['requires-python']}", *PROJECT["dependencies"]]
    assert floors == dict(re.match(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in needed)
    assert set(re.findall(r"^\| `(\w+)` \|", sections["Extras"], flags=re.MULTILINE)) == PROJECT["optional-dependencies"].keys()


def test_the_citation_is_of_this_release():
    cited = dict(re.findall(r"^([\w-]+): (\S.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE))
    assert cited["version"] == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", folder / "trees", DOCS, folder / "html"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.mark.full
def test_pages_build_and_the_index_has_every_public_name(pages):
    inventory = zlib.decompress((pages / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    indexed = {line.split()[0] for line in inventory.splitlines()}
    methods = {f"{name}.{key}" for name, value in CALLBACKS.items() for key in public_methods(value)}
    assert {*PUBLIC, *methods} <= indexed


@pytest.mark.full
def test_pages_build_signatures_and_references_as_they_are_written(pages):
    for page in (pages / "api").glob("*.html"):
        text = page.read_text()
        assert "&lt;factory&gt;" not in text  # which Sphinx cannot parse, so that it would cut the signature at any comma
        assert '<ol class="upper' not in text  # an author's initial, taken for an item of a list


@pytest.mark.full
def test_pages_build_the_overview_and_the_gallery(pages):
    overview = (pages / "tricks/index.html").read_text()
    table = re.findall(r'<td><p><a class="reference internal" href="(\w+)\.html">.*?(\w+)(?:</span>)?</a>', overview)
    assert sorted(table) == sorted((card_of(value).stem, value.__name__) for value in CALLBACKS.values())
    gallery = (pages / "examples/index.html").read_text()
    for example in (DOCS / "examples").glob("*.txt"):
        assert f'href="{example.stem}.html"' in gallery
        before, source = (pages / f"examples/{example.stem}.html").read_text().split("Source</h2>")
        assert "of CPU time on one core" in before
        assert before.count('<img alt="') == 1
        assert "def main" in re.sub("<[^>]+>", "", source)


def public_methods(callback: type) -> set[str]:
    """Return the methods that users call: those that Lightning's Callback does not have, beyond what bases have or ask for."""
    asked = {name for base in callback.__mro__ for name, value in vars(base).items() if getattr(value, "__isabstractmethod__", False)}
    methods = {
        name for name, _ in inspect.getmembers(callback, inspect.isfunction) if not name.startswith("_") and not hasattr(Trick, name)
    }
    return methods - asked
