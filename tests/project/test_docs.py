"""The documentation is one site that needs no network, names everything public, and shows what the commands print."""

import doctest
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import mlpmatch_pl
from mlpmatch_pl.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import transcripts  # noqa: E402  (a script beside the pages)

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Requests(HTMLParser):
    """What a browser fetches for a page without being asked: scripts, styles, fonts, pictures, frames."""

    def __init__(self):
        super().__init__()
        self.addresses = []
        self.ids = set()

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids.add(named.get("id"))
        if tag in ("link", "script", "img", "iframe", "source"):
            self.addresses += [named[key] for key in ("src", "href", "srcset") if named.get(key)]


def read(path: Path) -> Requests:
    parser = Requests()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        addresses = read(page).addresses
        assert any(address.endswith(".css") for address in addresses)
        assert not [address for address in addresses if re.match(r"(https?:)?//", address)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_everything_public_has_an_entry(site):
    ids = set().union(*(read(page).ids for page in (site / "reference").glob("*.html")))
    for name in mlpmatch_pl.__all__:
        if name != "__version__":
            home = getattr(mlpmatch_pl, name)
            assert f"{home.__module__}.{home.__qualname__}" in ids, name


def test_formulas_are_mathml_without_leftovers(site):
    text = (site / "method.html").read_text(encoding="utf-8")
    formulas = re.findall(r"<math.*?</math>", text, re.S)
    written = re.findall(r"\$+[^$]+\$+", (ROOT / "docs/method.md").read_text(encoding="utf-8"))
    assert len(formulas) == len(written) > 20
    assert not [formula for formula in formulas if "\\" in formula]


def test_links_into_the_code_lead_to_the_reference(site):
    text = (site / "method.html").read_text(encoding="utf-8")
    assert "../src/" not in text
    assert 'href="reference/methods.html#mlpmatch_pl.methods.step"' in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_search_works_without_a_server(site):
    arguments = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom")
    address = f"{(site / 'index.html').as_uri()}?q=deactivated"
    shown = subprocess.run(
        [CHROMIUM, *arguments, address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert re.search(r"\d+ matching documents", shown)


def test_every_command_has_a_transcript():
    shown = set(re.findall(r"python -m mlpmatch_pl\.(\w+)", " ".join(transcripts.outputs(page()))))
    assert shown == set(COMMANDS)
    assert all(output.strip() for output in transcripts.outputs(page()).values())


@pytest.mark.parametrize("beginning", ["python -m mlpmatch_pl.prepare", "python -m mlpmatch_pl.train schedule.step="])
def test_a_transcript_is_what_the_command_prints(beginning, tmp_path):
    ((command, output),) = [item for item in transcripts.outputs(page()).items() if item[0].startswith(beginning)]
    assert transcripts.run(command, tmp_path.resolve()) == output


def test_examples_of_the_transcript_script():
    done = doctest.testmod(transcripts)
    assert done.attempted >= 3
    assert not done.failed


def test_images_for_the_transcripts(tmp_path):
    transcripts.write_images(tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert len([name for name in names if name.startswith("my_images/images/")]) == 12
    assert len([name for name in names if name.startswith("my_images/masks/")]) == 8
    assert len([name for name in names if name.startswith("photos/")]) == 4


def page() -> str:
    return transcripts.PAGE.read_text(encoding="utf-8")
