"""One page with everything in it: tables, plots and pictures, without any other file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mlpmatch_pl.commands.report.groups import Group
from mlpmatch_pl.commands.report.runs import Unreadable
from mlpmatch_pl.utils.seeding import evenly_spaced

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 1240px;
  padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 36px 0 8px; border-bottom: 1px solid #ccc; } h3 { margin: 20px 0 6px; }
.note { color: #555; font-size: 13px; margin: 4px 0 12px; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 4px 10px; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; white-space: nowrap; } tbody tr:hover { background: #f4f7fb; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg, img { max-width: 100%; height: auto; } figure { margin: 8px 0 16px; } figcaption { font-size: 13px; color: #555; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        body: Its HTML.
        note: A sentence below the heading.
    """

    title: str
    body: str
    note: str = ""

    @property
    def html(self) -> str:
        """The heading, the note and the body; nothing without a body."""
        note = f"<p class=note>{escape(self.note)}</p>\n" if self.note else ""
        return f"<h2>{escape(self.title)}</h2>\n{note}{self.body}" if self.body else ""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Write the page.

    Args:
        title: Its title.
        lead: A sentence below it.
        sections: Its parts; empty ones are left out.
    """
    parts = "\n".join(section.html for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<p class=note>{escape(lead)}</p>\n"
        f"{parts}\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """Write a heading below that of a section."""
    return f"<h3>{escape(text)}</h3>\n"


def pictures(groups: Sequence[Group], count: int) -> tuple[str, list[Unreadable]]:
    """Show prediction pictures of every run, folded by group; those of the first group are open.

    Args:
        groups: The groups.
        count: Pictures of a run, spread evenly over those that it has.

    Returns:
        HTML, and the pictures that cannot be read.
    """
    parts: list[str] = []
    broken: list[Unreadable] = []
    for group in groups:
        shown = ""
        for run in group.runs:
            files = [path for path in (run.folder / "predictions").glob("*.png") if path.is_file()]  # no pipes
            for path in evenly_spaced(sorted(files), count):
                try:
                    shown += _figure(path, f"seed {run.seed}: {path.stem}")
                except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken PNG files
                    broken.append(Unreadable(run.name, f"predictions/{path.name} is broken: {error}", broken=True))
        if shown:
            name = escape(f"{group.dataset}, {group.series}, {group.label}")
            parts.append(f"<details{'' if parts else ' open'}><summary>{name}</summary>\n{shown}</details>")
    return "\n".join(parts), broken


def _figure(path: Path, caption: str) -> str:
    text = escape(caption)
    image = f'<img loading="lazy" alt="{text}" src="{_data_uri(path)}">'
    return f"<figure><figcaption>{text}</figcaption>{image}</figure>\n"


def _data_uri(path: Path) -> str:
    """Return a picture as text, made smaller: WebP, at most 1280 pixels wide."""
    from PIL import Image as PILImage

    with PILImage.open(path) as picture:
        rgb = picture.convert("RGB")
    rgb.thumbnail((1280, 4 * 1280))
    buffer = io.BytesIO()
    rgb.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
