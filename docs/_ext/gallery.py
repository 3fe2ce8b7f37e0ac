"""The gallery of examples: a page for each script, which shows what it prints and draws as recorded by running it.

    python docs/_ext/gallery.py digits    # runs examples/digits.py, and records what it prints, how long it takes, and its picture

A page `docs/examples/NAME.md` is a title, a sentence, and the directive `example` with the script's name; the directive `gallery`
lists the pages. Options of `example` are `:alt:`, what the picture shows, and where they differ from the page's name, `:image:`, the
picture's file, and `:command:`, the whole command.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/examples"
IMAGES = ROOT / "docs/images"
SCRIPTS = ROOT / "examples"


@dataclass(frozen=True)
class Example:
    """A page of the gallery.

    Args:
        name: Name of the page, and of what was recorded.
        title: Its heading.
        sentence: Its first paragraph.
        options: Those of its directive `example`.
    """

    name: str
    title: str
    sentence: str
    options: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Example:
        """Read a page."""
        text = path.read_text(encoding="utf-8")
        title, sentence = text.split("\n\n")[:2]
        options = dict(re.findall(r"^:(\w+): (.+)$", text, flags=re.MULTILINE))
        return cls(path.stem, title.removeprefix("# "), " ".join(sentence.split()), options)

    @property
    def command(self) -> str:
        """What runs it, from the root of the repository."""
        return self.options.get("command", f"python examples/{self.name}.py")

    @property
    def script(self) -> Path:
        """The first file of the command."""
        return ROOT / next(word for word in shlex.split(self.command) if word.endswith(".py"))

    @property
    def image(self) -> str:
        """File name of its picture."""
        return self.options.get("image", f"{self.name}.png")

    @property
    def record(self) -> Path:
        """Where what it prints is recorded, after a line with the seconds of CPU time that it took."""
        return PAGES / f"{self.name}.txt"

    @property
    def took(self) -> str:
        """How long it took, in words."""
        seconds = int(self.record.read_text(encoding="utf-8").split(maxsplit=1)[0])
        return f"{seconds} s" if seconds < 100 else f"{round(seconds / 60)} min"


def read_examples() -> list[Example]:
    """Return the pages of the gallery, by title."""
    return sorted((Example.read(path) for path in PAGES.glob("*.md") if path.stem != "index"), key=lambda example: example.title)


def read_scripts() -> set[Path]:
    """Return the scripts of which each must have a page: all but modules that others import."""
    return {path for path in SCRIPTS.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}


def record(example: Example) -> None:
    """Run an example in an empty folder, on one core, and keep what it prints, the CPU time that it took, and its picture."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "100"}
    python, script, *arguments = shlex.split(example.command)
    assert python == "python", f"the command of {example.name} must begin with 'python', got {example.command!r}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(SCRIPTS)
        (Path(folder) / "docs/images").mkdir(parents=True)  # where a script draws a picture for a page itself
        command = [sys.executable, script, *arguments]
        before = _seconds_of_children()
        run = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
        seconds = _seconds_of_children() - before
        printed = "\n".join(line.rstrip() for line in run.stdout.replace(f"{Path(folder).resolve()}/", "").splitlines())
        example.record.write_text(f"{max(1, round(seconds))} s of CPU time\n\n{printed}".strip() + "\n", encoding="utf-8")
        for picture in Path(folder).rglob(example.image):
            shutil.copy(picture, IMAGES / example.image)


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class ExampleDirective(SphinxDirective):
    """Shows the command of an example, its picture, what it prints, and its source."""

    option_spec: ClassVar = {"alt": directives.unchanged_required, "command": directives.unchanged, "image": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Parse what a page of the gallery has in common with the others."""
        example = Example.read(PAGES / f"{self.env.docname.rpartition('/')[2]}.md")
        self.env.note_dependency(str(example.record))
        source = example.script.relative_to(ROOT)
        printed = example.record.read_text(encoding="utf-8").partition("\n\n")[2].strip()
        text = f"""
```bash
{example.command}
```

Takes {example.took} of CPU time on one core.

![{self.options["alt"]}](../images/{example.image})
"""
        if printed:
            text += f"\n{_heading('What it prints')}\n````text\n{printed}\n````\n"
        text += f"\n{_heading('Source')}\n`{source}`:\n\n```{{literalinclude}} ../../{source}\n:language: python\n```\n"
        return self.parse_text_to_nodes(text)


def _heading(title: str) -> str:
    return f"```{{rubric}} {title}\n:heading-level: 2\n```\n"


class Gallery(SphinxDirective):
    """Shows a card for each example, and puts the pages into the navigation."""

    def run(self) -> list[nodes.Node]:
        """Read the pages, and parse what they come to."""
        examples = read_examples()
        for example in examples:
            self.env.note_dependency(str(PAGES / f"{example.name}.md"))
            self.env.note_dependency(str(example.record))
        cards = "".join(
            f"::::{{grid-item-card}} {example.title}\n:link: {example.name}\n:link-type: doc\n:img-top: ../images/{example.image}\n"
            f":class-card: example\n\n{example.sentence}\n\n:::{{card-footer}}\n`{example.command}` · {example.took}\n:::\n::::\n\n"
            for example in examples
        )
        names = "\n".join(example.name for example in examples)
        text = f":::::{{grid}} 1 1 2 2\n:gutter: 3\n\n{cards}:::::\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directives."""
    app.add_directive("example", ExampleDirective)
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> None:
    """Record examples."""
    examples = {example.name: example for example in read_examples()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=examples, metavar="NAME", help=f"of {', '.join(examples)}")
    for name in parser.parse_args().names:
        record(examples[name])


if __name__ == "__main__":
    main()
