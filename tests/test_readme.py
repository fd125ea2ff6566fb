"""What README shows is run or composed as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split(" -m mlpmatch_pl.train", 1)[1] for line in lines if " -m mlpmatch_pl.train" in line]


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_commands():
    assert len(commands()) >= 7


@pytest.mark.parametrize("command", commands())
def test_every_command_composes(command, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    arguments = [part for part in shlex.split(command, comments=True) if not part.startswith(("-", "hydra."))]
    first_values = [re.sub(r"=([^\[,]+),.*", r"=\1", argument) for argument in arguments]  # of a sweep
    with initialize_config_module("mlpmatch_pl.conf", version_base="1.3"):
        cfg = compose("train", [*first_values, "output_dir=out"])
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (Path(__file__).parents[1] / target).exists(), target
