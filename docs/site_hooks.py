"""MkDocs hooks: links to source files point to the API reference, and formulas become MathML.

The pages are also read in the repository, where ``../src/mlpmatch_pl/methods/step.py`` and ``$x$`` work as they are.
"""

import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_CODE = re.compile(r"\]\(\.\./src/([\w/]+)\.py\)")
_FIGURES = re.compile(r"\]\(\.\./(benchmarks/results/[\w.-]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


class Docstrings(griffe.Extension):
    """Rename "Example" sections to "Examples", which mkdocstrings parses as doctests, and read "::" as a colon."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Edit the docstring when the object is loaded."""
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the benchmark results that pages link to."""
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Redirect links to files outside docs/ to their location in the site."""
    markdown = _CODE.sub(lambda match: f"][{match[1].replace('/', '.')}]", markdown)
    return _FIGURES.sub(r"](\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Convert formulas to MathML, which browsers render without a script."""
    return _FORMULA.sub(
        lambda match: convert(html.unescape(match[2]).strip(), "block" if match[1] == "div" else "inline"), content
    )
