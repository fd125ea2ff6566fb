"""What the site does beyond Markdown: links into the code lead to the reference, and formulas are MathML.

The pages are also read in the repository, where ``../src/mlpmatch_pl/methods/step.py`` is the right link and ``$x$`` a
formula.
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
    """Tell mkdocstrings that a section "Example" holds doctests, as "Examples" does, and that "::" is a colon."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring while the code is read."""
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the measured figures, to which pages link."""
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at files outside of docs/ to their place in the site."""
    markdown = _CODE.sub(lambda match: f"][{match[1].replace('/', '.')}]", markdown)
    return _FIGURES.sub(r"](\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers show without a script."""
    return _FORMULA.sub(
        lambda match: convert(html.unescape(match[2]).strip(), "block" if match[1] == "div" else "inline"), content
    )
