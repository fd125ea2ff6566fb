import csv
import inspect
import re
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, compose_config, compose_train
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import Tensor

from mlpmatch_pl.commands.benchmark.run import Options as Benchmark
from mlpmatch_pl.commands.evaluate.run import EvaluateOptions as Evaluate
from mlpmatch_pl.commands.evaluate.run import Scoring
from mlpmatch_pl.commands.export.run import ExportOptions
from mlpmatch_pl.commands.predict.run import PredictOptions as Predict
from mlpmatch_pl.commands.prepare.run import Options as Prepare
from mlpmatch_pl.commands.report.run import Options as Report
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.published import PUBLISHED, published_list
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.methods.method import PRESETS, Method, resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.validation import parameters, read_options


def choices(group: str) -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in files("mlpmatch_pl.conf").joinpath(group).iterdir())


GROUPS = ("dataset", "backbone", "method", "schedule", "trainer", "logger", "callbacks", "loader", "experiment")
REQUIRED = {
    "dataset=folder": ("dataset.root=x", "dataset.classes=[a,b]"),
    "backbone=timm": ("backbone.name=resnet18",),
}


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in choices(group)])
def test_every_choice_composes_and_resolves(choice, monkeypatch, tmp_path):
    monkeypatch.setenv("MLPMATCH_DATA", str(tmp_path))
    cfg = compose_train(choice, *REQUIRED.get(choice, ()), output_dir=tmp_path)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for target in find_targets(config):
        known = set(inspect.signature(get_object(target.pop("_target_"))).parameters)
        assert set(target) <= known


def find_targets(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield dict(node)
        for value in node.values():
            yield from find_targets(value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_file_holds_its_preset_and_nothing_else(name):
    node = OmegaConf.to_container(compose_train(f"method={name}").method, resolve=True)
    assert set(node) == {field.name for field in fields(Method)}
    assert asdict(resolve_method(node)) == asdict(PRESETS[name])


def test_every_key_of_loader_and_backbone_is_read_by_the_constructor_it_is_passed_to():
    cfg = compose_train()
    assert set(cfg.loader) <= set(inspect.signature(SemiSupervisedDataModule).parameters)
    assert set(cfg.backbone) - {"name"} <= set(inspect.signature(MLPMatch).parameters)
    assert set(cfg.objective) <= set(inspect.signature(MLPMatch).parameters)


def test_the_module_defaults_are_the_configured_defaults_of_the_paper():
    cfg = compose_train("backbone=resnet50s", "schedule=voc", "objective.confidence_threshold=0.95")
    defaults = {name: p.default for name, p in inspect.signature(MLPMatch).parameters.items()}
    for key in ("output_stride", "decoder_channels", "pretrained"):
        assert defaults[key] == cfg.backbone[key]
    for key in ("lr", "lr_multi", "momentum", "weight_decay", "power"):
        assert defaults[key] == cfg.schedule[key]
    assert list(defaults["mean"]) == list(cfg.backbone["mean"])
    assert list(defaults["std"]) == list(cfg.backbone["std"])


def test_datasets_and_experiments_win_over_the_primary_defaults(monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    assert compose_train().objective.confidence_threshold == 0.8
    assert compose_train("experiment=camvid_1-8_mobilenetv2").loader.crop_size == 160


@pytest.mark.parametrize("name", [name for name in choices("experiment") if name.count("_") == 2])
def test_a_recipe_names_its_data_set_its_list_and_its_encoder(name, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    dataset, part, encoder = name.split("_")
    cfg = compose_train(f"experiment={name}")
    assert cfg.dataset._target_ == f"mlpmatch_pl.data.datasets.{dataset}.{dataset}"
    published = published_list(dataset, cfg.dataset.labeled)
    if dataset in PUBLISHED:
        assert published is not None
        assert published.name in (part, f"blended/{part}")
    else:
        assert cfg.dataset.labeled == part.replace("-", "/")
        assert published is None
    assert re.sub("^r(?=[0-9])", "resnet", encoder) in (cfg.backbone.name.removesuffix("s"), "mobilenetv2")


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_every_published_list_of_the_papers_has_a_recipe(dataset):
    lists = {entry.name.removeprefix("blended/") for entry in PUBLISHED[dataset].values() if "u2pl" not in entry.name}
    recipes = {name for name in choices("experiment") if name.startswith(f"{dataset}_") and name.count("_") == 2}
    assert recipes == {f"{dataset}_{part}_{encoder}" for part in lists for encoder in ("r50", "r101")}


@pytest.mark.parametrize("name", ["92", "blended/1-16", "u2pl/1-8", "1-30"])
def test_the_name_of_a_list_can_be_given_on_the_command_line(name):
    dataset = "cityscapes" if name == "1-30" else "voc"
    labeled = compose_train(f"dataset={dataset}", f"dataset.labeled={name}").dataset.labeled
    entry = published_list(dataset, labeled)
    assert entry is not None
    assert entry.name == name


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_trains_from_its_configuration(method, tmp_path):
    metrics = train(
        compose_train(*TINY, f"method={method}", "schedule.steps=2", "schedule.lr=0.01", output_dir=tmp_path)
    )
    assert metrics["method"] == method
    assert 0 <= metrics["test"]["test/miou"] <= 1


# MLPMatch in four steps, two epochs of two; every pixel is confident, so that every term counts.
FOUR_STEPS = (
    *TINY, "dataset.train=12", "dataset.val=1", "dataset.test=1", "schedule.steps=4", "trainer.log_every_n_steps=1",
    "objective.confidence_threshold=0", "callbacks.predictions.num_images=0",
)  # fmt: skip
WEIGHTS = {"s1": 0.25, "s2": 0.25, "fp": 0.25, "u_np": 0.25}
NEVER, BY_EPOCH = (0, 0, 0, 0), (0, 0, 0.125, 0.125)


def train_four_steps(folder: Path, *overrides: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Return the logged loss terms of every step, by their names in the step, and the last weights."""
    train(compose_train(*FOUR_STEPS, *overrides, output_dir=folder))
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    columns = {"loss": "train/loss", "lambda": "train/lambda_np"}
    columns |= {name: f"train/loss_{name}" for name in ("x", "x_np", *WEIGHTS)}
    steps = [{name: float(row[key]) for name, key in columns.items() if row.get(key)} for row in rows]
    return steps, torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def mlpmatch(tmp_path_factory):
    """From weights of a short training: a new block adds nothing yet, and may be deactivated without a trace."""
    folder = tmp_path_factory.mktemp("start")
    train_four_steps(folder)
    start = f"init_weights={folder}/checkpoints/last.ckpt"
    return start, *train_four_steps(tmp_path_factory.mktemp("mlpmatch"), start)


@pytest.mark.parametrize(
    ("ablation", "lambdas", "weights", "gone", "changed"),
    [
        ("network_perturbation=null", NEVER, {}, {"x_np", "u_np"}, set()),
        ("lambda_max=0", NEVER, {}, set(), set()),
        ("lambda_schedule=constant", (0.25, 0.25, 0.25, 0.25), {}, set(), set()),
        ("lambda_schedule=linear_step", (0, 0.0625, 0.125, 0.1875), {}, set(), set()),
        ("network_weight=0", BY_EPOCH, {"u_np": 0}, set(), set()),
        ("feature_weight=0", BY_EPOCH, {}, {"fp"}, {"x", "s1", "s2", "u_np"}),  # the decoder's batch is smaller
        ("strong_weights=[0.5]", BY_EPOCH, {"s1": 0.5}, {"s2"}, {"s1"}),  # so is that of the strong views
        # Not single_stage: a stage of this encoder is a single block.
        ("network_perturbation.sampler=n_blocks", BY_EPOCH, {}, set(), {"x_np", "u_np"}),
        ("cutmix.p=0", BY_EPOCH, {}, set(), {"s1", "s2"}),
        ("partner=same_image", BY_EPOCH, {}, set(), {"s1", "s2"}),
        ("network_updates_batchnorm=false", BY_EPOCH, {}, set(), set()),
    ],
)
def test_an_ablation_is_one_override(ablation, lambdas, weights, gone, changed, mlpmatch, tmp_path):
    """Terms that it should change differ from MLPMatch's at the first step, no others, and the loss is their sum."""
    start, (first, *_), plain_state = mlpmatch
    steps, state = train_four_steps(tmp_path, start, f"method.{ablation}")
    assert set(first) - set(steps[0]) == gone
    assert {
        name for name in WEIGHTS.keys() | {"x", "x_np"} if name in steps[0] and steps[0][name] != first[name]
    } == changed
    assert [step["lambda"] for step in steps] == pytest.approx(lambdas)
    weights = {**WEIGHTS, **weights}
    for step, volatile in zip(steps, lambdas, strict=True):
        labeled = (1 - volatile) * step["x"] + volatile * step.get("x_np", 0)
        unlabeled = sum(weights[name] * step[name] for name in weights if name in step)
        assert step["loss"] == pytest.approx(0.5 * (labeled + unlabeled), rel=1e-5)
    differing = {name.rsplit(".", 1)[1] for name, value in state.items() if not torch.equal(value, plain_state[name])}
    if ablation == "network_updates_batchnorm=false":
        assert differing - {"num_batches_tracked"} == {"running_mean", "running_var"}
    else:
        assert differing >= {"weight", "running_mean"}


def test_a_key_at_the_top_that_nothing_reads_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the configuration has no key epochs\."):
        train(compose_train(*TINY, "+epochs=3", output_dir=tmp_path / "run"))
    with pytest.raises(UserError, match=r"no key see\. Did you mean seed"):
        train(compose_train(*TINY, "+see=3", output_dir=tmp_path / "run"))
    with pytest.raises(UserError, match=r"the configuration has no key benchmark\."):
        train(compose_config("benchmark", *TINY, output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


COMMANDS = {"evaluate": Evaluate, "predict": Predict, "export": ExportOptions}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_are_the_keys_of_its_configuration(command):
    assert set(compose_config(command)) == set(COMMANDS[command].__dataclass_fields__)


@pytest.mark.parametrize("cls", [*COMMANDS.values(), Prepare, Report, Benchmark, Scoring, SlidingWindowInference])
def test_every_option_of_a_command_has_a_type_that_is_compared(cls):
    assert Any not in parameters(cls)[0].values()


def test_evaluate_and_predict_infer_alike_by_default():
    assert (
        read_options(SlidingWindowInference, OmegaConf.to_container(compose_config("predict").inference))
        == SlidingWindowInference()
    )
    assert compose_config("evaluate").inference == compose_config("predict").inference


def test_the_configuration_of_prepare_is_no_group_of_the_training_s():
    assert not files("mlpmatch_pl.conf").joinpath("prepare").is_dir()
    assert set(OmegaConf.load(files("mlpmatch_pl.commands.prepare").joinpath("prepare.yaml"))) == {
        *Prepare.__dataclass_fields__, "hydra", "defaults",
    }  # fmt: skip


def test_another_project_uses_the_groups_through_its_search_path(tmp_path):
    from hydra import compose, initialize_config_dir

    (tmp_path / "app.yaml").write_text(
        "defaults:\n  - /method@mlp: unimatch\n  - /backbone@net: resnet18\n  - _self_\n"
        "hydra:\n  searchpath:\n    - pkg://mlpmatch_pl.conf\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("app", ["mlp.feature_weight=0.25"])
    assert resolve_method(OmegaConf.to_container(cfg.mlp, resolve=True)).feature_weight == 0.25
    assert cfg.net.name == "resnet18"
