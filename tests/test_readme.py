"""What README and the pages in docs/ show is run or composed as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import compose_config
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = PAGES[0].read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands() -> list[tuple[str, str]]:
    """All commands that compose a training configuration, with their primary config."""
    lines = [line for page in PAGES for block in blocks("bash", page.read_text(encoding="utf-8"))
             for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
    found = [re.search(r" -m mlpmatch_pl\.(train|check)\b(.*)", line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


def overrides_in_text() -> list[str]:
    """Overrides that docs/ mention in tables and prose, such as `dataset.in_chans=5`."""
    keys = r"(?:dataset|loader|method|backbone|objective|schedule|trainer|logger|callbacks|experiment)"
    texts = [page.read_text(encoding="utf-8") for page in PAGES[1:]]
    spans = [span for text in texts for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    parts = [part for span in spans for part in _split(span) if re.fullmatch(rf"{keys}(\.[\w.]+)?=[^.<][^<]*", part)]
    return sorted(set(parts))


def _split(span: str) -> list[str]:
    try:
        return shlex.split(span)
    except ValueError:
        return []


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_commands():
    assert len(commands()) >= 7


@pytest.mark.parametrize(("config", "command"), commands())
def test_every_command_composes(config, command, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    arguments = [part for part in shlex.split(command, comments=True) if not part.startswith(("-", "hydra."))]
    first_values = [re.sub(r"=([^\[,]+),.*", r"=\1", argument) for argument in arguments]  # of a sweep
    cfg = compose_config(config, *first_values, output_dir=Path("out"))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("override", overrides_in_text())
def test_every_override_in_the_pages_is_known(override, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    own = (
        ()
        if override.startswith(("dataset=", "experiment="))
        else ("dataset=folder", "dataset.root=x", "dataset.classes=[a,b]")
    )
    compose_config("train", *own, override)


def test_linked_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
