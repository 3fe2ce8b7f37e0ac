"""Settings of the documentation: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

project = "lightning-tricks"
author = "The lightning-tricks authors"
copyright = author
release = version = installed_version("lightning-tricks")

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design", "overview", "gallery"]
exclude_patterns = ["_build"]
default_role = "code"

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 2

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_display_short_literal_types = True

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = project
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/logo.svg"
html_copy_source = False
html_show_sphinx = False


def _mathml(tex: str) -> str:
    """Return a formula as MathML, with the space that browsers leave out between a function's name and what is no parenthesis."""
    return re.sub(r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>[(\[{])", r'\1<mspace width="0.17em"/>', tex2mathml(tex))


def _inline_formula(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _displayed_formula(translator: HTML5Translator, node: nodes.math_block) -> None:
    formula = _mathml(node.astext()).replace("<math ", '<math display="block" ', 1)
    translator.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def _with_defaults(_app: Sphinx, _what: str, _name: str, value: Any, _options: Any, signature: str, returns: str) -> tuple[str, str]:
    """Show what a dataclass makes as a default, where Python's own signature has `<factory>`, which Sphinx cannot parse."""
    if dataclasses.is_dataclass(value) and signature:
        for field in dataclasses.fields(value):
            if field.default_factory is not dataclasses.MISSING:
                signature = signature.replace("<factory>", repr(field.default_factory()), 1)
    return signature, returns


def _without_lists_of_initials(_app: Sphinx, _what: str, _name: str, _value: Any, _options: Any, lines: list[str]) -> None:
    """Keep a reference that begins with an initial, such as `L. K. Hansen`, from being read as item L of a list."""
    lines[:] = [re.sub(r"^(\s*(?:- )?)([A-Z]\. )", r"\1\\\2", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Let browsers set the formulas themselves, so that pages need nothing from elsewhere, neither when built nor when read."""
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_displayed_formula, None))
    app.connect("autodoc-process-signature", _with_defaults)
    app.connect("autodoc-process-docstring", _without_lists_of_initials, priority=900)  # after napoleon
