"""What README and the pages in docs/ show is run or composed as it stands there."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from helpers import compose_config
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.commands.benchmark.run import Options as Benchmark
from mlpmatch_pl.commands.cli import LIKE_TRAIN, added_keys, keep_last_length, literal_paths, training_arguments
from mlpmatch_pl.commands.evaluate.run import EvaluateOptions as Evaluate
from mlpmatch_pl.commands.export.run import ExportOptions
from mlpmatch_pl.commands.predict.run import PredictOptions as Predict
from mlpmatch_pl.commands.prepare.run import Options as Prepare
from mlpmatch_pl.commands.report.run import Options as Report
from mlpmatch_pl.commands.suggest.run import SuggestOptions
from mlpmatch_pl.engine.build import read_config
from mlpmatch_pl.report import named_folders
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.validation import arguments_type, read_options, validate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = {
    "evaluate": Evaluate,
    "predict": Predict,
    "suggest": SuggestOptions,
    "export": ExportOptions,
    "prepare": Prepare,
    "report": Report,
}
NEEDED = {  # by a command beside an override that stands alone
    "train": ("dataset=folder", "dataset.root=x", "dataset.classes=[a,b]"),
    "benchmark": (),
    "evaluate": ("checkpoint=x",),
    "predict": ("checkpoint=x", "input=x", "output=x"),
    "suggest": ("input=x",),
    "export": ("checkpoint=x",),
    "prepare": ("dataset=voc", "root=x"),
    "report": ("runs=x",),
}
COMPLETE = {  # beside a choice of the group that stands alone
    "folder": ("dataset.root=x", "dataset.classes=[a,b]"),
    "annotations": ("root=x", "annotations=y"),
    "named": ("optimizer.name=Adam",),
}
REFUSED = ("overwrite=no",)  # what the pages show as refused
NOT_COMPOSED = {  # by their beginning
    "pip install": "would change the environment; tests/test_packaging.py installs the wheel",
    "export MLPMATCH_DATA=": "the environment of the commands below it; the tests set it",
    "benchmarks/gpu.sh": "needs a CUDA device",
    "hf upload": "a command of the Hugging Face Hub, which needs an account",
    "python -m mlpmatch_pl.train schedule.step=": "shows the answer to a mistyped key; tests/test_docs.py runs it",
}


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def lines_of(page: Path) -> list[str]:
    """Command lines in the blocks of a page: all of bash, and after the prompt those of a transcript."""
    bash = [line for block in blocks("bash", page) for line in block.replace("\\\n", " ").splitlines()]
    shown = [block.replace("\\\n", " ").splitlines()[0] for block in blocks("console", page)]
    return [line.removeprefix("$ ") for line in (*bash, *shown) if line.strip()]


LINES = sorted({line for page in PAGES for line in lines_of(page) if not line.startswith(tuple(NOT_COMPOSED))})
PYTHON = [(page.name, code) for page in PAGES for code in blocks("python", page)]


def overrides_in_text() -> list[tuple[str, ...]]:
    """Overrides that the pages mention together in tables and prose, such as `dataset.in_chans=5`."""
    keys = "|".join(sorted(set().union(*map(keys_of, NEEDED))))
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    spans = [span for text in texts for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    pattern = rf"({keys})(\.[\w.]+)?=[^<]+"
    split = [
        [part for part in _split(span) if "..." not in part and part.count("{") == part.count("}")] for span in spans
    ]
    found = {tuple(part for part in parts if re.fullmatch(pattern, part)) for parts in split}
    return sorted(found - {(), *((refused,) for refused in REFUSED)})


@cache
def keys_of(command: str) -> frozenset[str]:
    return frozenset(map(str, compose_for(command)))


def compose_for(command: str, *values: str) -> DictConfig:
    if command == "prepare":
        with initialize_config_dir(str(ROOT / "src/mlpmatch_pl/commands/prepare"), version_base="1.3"):
            return compose("prepare", list(values))
    if command not in LIKE_TRAIN:
        return compose_config(command, *values)
    cfg = compose_config(command, *training_arguments(values), output_dir=Path("out"))
    keep_last_length(cfg, values)
    return cfg


def pass_the_door(command: str, cfg: DictConfig) -> None:
    """Check the values as the command does, up to the first look at a file."""
    if command in LIKE_TRAIN:
        config = read_config(cfg, *(["benchmark"] if command == "benchmark" else []))
        if command == "benchmark":
            read_options(Benchmark, config["benchmark"], "benchmark")
        return
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if command == "prepare":  # its options look for the folder of the archives
        validate(arguments_type(Prepare), values)
    else:
        read_options(OPTIONS[command], values)


def _split(span: str) -> list[str]:
    try:
        return shlex.split(span)
    except ValueError:
        return []


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page for page, _ in PYTHON])
def test_every_python_block_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


def test_there_are_blocks():
    assert PYTHON
    assert len(LINES) >= 25


@pytest.mark.parametrize("beginning", NOT_COMPOSED)
def test_the_list_of_what_is_not_composed_is_current(beginning):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert beginning in text


@pytest.mark.parametrize("line", LINES)
def test_every_command_composes(line, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in arguments)
    elif program == "python" and arguments[0] == "-m" and arguments[1].startswith("benchmarks."):
        flags_exist(ROOT / "benchmarks" / f"{arguments[1].removeprefix('benchmarks.')}.py", arguments[2:])
    elif program == "python" and arguments[0] == "-m":
        compose_command(arguments[1].removeprefix("mlpmatch_pl."), arguments[2:])
    elif program == "python":
        flags_exist(ROOT / arguments[0], arguments[1:])
    else:
        pytest.fail(f"{line}: run it here, or give the reason in NOT_COMPOSED")


def flags_exist(script: Path, arguments: list[str]) -> None:
    assert script.is_file()
    scripts = "".join(path.read_text() for path in script.parent.glob("*.py"))
    assert all(f'"{flag}"' in scripts for flag in arguments if flag.startswith("--"))


def compose_command(command: str, arguments: list[str]) -> None:
    values = [part for part in arguments if not part.startswith(("-", "hydra."))]
    values = [re.sub(r"=([^\[,]+),.*", r"=\1", value) for value in values]  # the first of a sweep
    if command == "report":
        values = named_folders(values)
    if command == "evaluate":
        values = added_keys(values)
    pass_the_door(command, compose_for(command, *literal_paths(values)))


@pytest.mark.parametrize("overrides", overrides_in_text(), ids=" ".join)
def test_every_override_in_the_pages_is_known_and_of_its_type(overrides, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    keys = {re.split("[.=]", override)[0] for override in overrides}
    groups = [override.partition("=")[2] for override in overrides if override.startswith(("dataset=", "experiment="))]
    for command in (name for name in NEEDED if keys <= keys_of(name)):
        needed = NEEDED[command] if not groups else COMPLETE.get(groups[0], ())
        try:
            pass_the_door(command, compose_for(command, *literal_paths([*needed, *overrides])))
            return
        except (UserError, HydraException) as error:  # by this command; overwrite=missing is for predict alone
            refused = error
    raise refused


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("train", ["loader.batch_size=five"]),
        ("benchmark", ["benchmark.steps=many"]),
        ("evaluate", ["checkpoint=x", "evaluation.boundary=abc"]),
        *(("predict", ["checkpoint=x", "input=x", "output=x", refused]) for refused in REFUSED),
        ("prepare", ["dataset=voc", "root=x", "num_workers=all"]),
    ],
)
def test_a_value_of_another_type_would_be_found(command, values):
    with pytest.raises(UserError, match="expected"):
        compose_command(command, values)


def test_linked_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
