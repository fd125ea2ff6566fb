import csv
import inspect
import math
import re
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from helpers import TINY, compose_config, compose_train
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torch import Tensor

from mlpmatch_pl.commands.benchmark.run import Options as Benchmark
from mlpmatch_pl.commands.evaluate.run import EvaluateOptions as Evaluate
from mlpmatch_pl.commands.evaluate.run import Scoring
from mlpmatch_pl.commands.export.run import ExportOptions
from mlpmatch_pl.commands.predict.run import PredictOptions as Predict
from mlpmatch_pl.commands.prepare.run import Options as Prepare
from mlpmatch_pl.commands.report.run import Options as Report
from mlpmatch_pl.commands.suggest.run import SuggestOptions
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.published import PUBLISHED, published_list
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.engine.build import build_datamodule, build_module, read_config
from mlpmatch_pl.engine.trainer import build_trainer
from mlpmatch_pl.evaluation.confusion import confusion_matrix
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.methods.method import PRESETS, Method, resolve_method
from mlpmatch_pl.methods.optimizers import PAPER_OPTIMIZER
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.segmentor.segmentor import resolve_decoder
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.validation import read_options

CONF = files("mlpmatch_pl.conf")


def choices(group: str) -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in CONF.joinpath(group).iterdir())


GROUPS = ("dataset", "backbone", "schedule", "trainer", "logger", "callbacks", "loader")
REQUIRED = {
    "dataset=folder": ("dataset.root=x", "dataset.classes=[a,b]"),
    "backbone=timm": ("backbone.name=resnet18",),
}


@pytest.fixture(autouse=True)
def data_folder(monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in choices(group)])
def test_every_choice_fits_the_schema(choice):
    read_config(compose_train(choice, *REQUIRED.get(choice, ()), output_dir=Path("out")))


ROOT_OF = dict.fromkeys(("folder_mobilenetv2", "folder_v2_dinov2s"), ("dataset.root=images",))

# Of an optimizer step with all its images: UniMatch's 8 + 8, and the authors' own of MLPMatch.
LEARNING_RATES = {
    name: 5e-6
    if "_v2_" in name  # the same for both of UniMatch V2's batch sizes
    else {"voc": 0.001, "cityscapes": 0.005, "coco": 0.001, "ade20k": 0.001, "camvid": 0.01, "folder": 0.0005}[
        name.split("_")[0]
    ]
    for name in choices("experiment")
}
LISTED = [
    name for name in choices("experiment")
    if name.count("_") == 2 and name.startswith(("voc_", "cityscapes_")) and not re.search("_(mlpmatch|v2)_", name)
]  # fmt: skip


@pytest.mark.parametrize("name", sorted({*choices("experiment")} - {*LISTED} | {"voc_92_r50"}))
def test_every_recipe_fits_the_schema_and_names_its_dataset_and_encoder(name):
    config = read_config(compose_train(f"experiment={name}", *ROOT_OF.get(name, ()), output_dir=Path("out")))
    dataset, *part, encoder = name.split("_")
    assert config["dataset"]["_target_"] == f"mlpmatch_pl.data.datasets.{dataset}.{dataset}"
    encoders = (config["backbone"]["name"].removesuffix("s"), "mobilenetv2", "dinov2s")
    assert re.sub("^r(?=[0-9])", "resnet", encoder) in encoders
    if part not in ([], ["mlpmatch"], ["v2"]):
        assert str(config["dataset"]["labeled"]) == part[0].replace("-", "/")


FOUR_IMAGES = (
    "camvid_1-8_mobilenetv2", "cityscapes_mlpmatch_r50", "cityscapes_mlpmatch_r101", "folder_mobilenetv2",
)  # fmt: skip
"""Recipes whose steps have fewer images than eight devices."""


@pytest.mark.parametrize("name", choices("experiment"))
def test_a_recipe_has_the_same_step_on_any_number_of_devices(name):
    """Images, and so the learning rate, of an optimizer step; the published ones where the paper says them."""
    config = read_config(compose_train(f"experiment={name}", *ROOT_OF.get(name, ()), output_dir=Path("out")))
    data, schedule, rates = shapes(labeled=8, train=32, val=8, test=1, size=48), config["schedule"], set()
    for devices, accumulated in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8)):
        built = SemiSupervisedDataModule(data, **config["loader"])
        if name in FOUR_IMAGES and devices * accumulated == 8:
            with pytest.raises(
                UserError, match=f"expected {devices} devices and {accumulated} accumulated .* remainder"
            ):
                built.share_batches(devices, accumulated)
        else:
            built.share_batches(devices, accumulated)
            images = built.images_per_step * devices * accumulated
            rates.add(schedule["lr"] * images / schedule["reference_images"])
    assert rates == {LEARNING_RATES[name]}


def test_a_folder_is_trained_with_a_pretrained_network_unless_another_is_chosen():
    config = read_config(compose_train(*REQUIRED["dataset=folder"], "dataset=folder", output_dir=Path("out")))
    assert (config["backbone"]["name"], config["backbone"]["pretrained"]) == ("mobilenetv2_100", "auto")
    assert config["schedule"] == read_config(compose_train("schedule=voc", output_dir=Path("out")))["schedule"]
    chosen = compose_train("dataset=folder", "backbone=tiny", "schedule=demo")
    assert (chosen.backbone, chosen.schedule) == (compose_train().backbone, compose_train().schedule)


@pytest.mark.parametrize("backbone", ["dinov2_small", "dinov3_base", "convnext_tiny"])
def test_naming_a_transformer_names_its_weights(backbone):
    chosen = ("dataset=folder", f"backbone={backbone}", "decoder=dpt", "method=mlpmatch_v2")
    assert compose_train(*chosen).backbone.pretrained == "auto"
    assert compose_train(*chosen, "backbone.pretrained=false").backbone.pretrained is False
    assert compose_train("experiment=folder_v2_dinov2s", f"backbone={backbone}").backbone.pretrained is True
    assert compose_config("suggest", f"backbone={backbone}").backbone.pretrained is True


@pytest.mark.parametrize("method", ["supervised", "mlpmatch"])
def test_the_demo_has_the_steps_that_its_results_name(method, tmp_path):
    config = read_config(compose_train(f"method={method}", output_dir=tmp_path))
    datamodule = build_datamodule(config, resolve_method(config["method"]))
    steps = build_trainer(config, tmp_path, datamodule, []).max_epochs * datamodule.steps_per_epoch()
    for page in ("README.md", "docs/results.md"):
        assert f"20 of 480 images labeled, {steps} steps" in (Path(__file__).parents[2] / page).read_text(
            encoding="utf-8"
        )


def test_training_validates_in_the_windows_of_its_configuration():
    def build(*overrides):
        config = read_config(compose_train(*TINY, *overrides, output_dir=Path("out")))
        method = resolve_method(config["method"])
        datamodule = build_datamodule(config, method)
        return build_module(config, method, datamodule, Trainer(logger=False, barebones=True)), datamodule

    module, datamodule = build("evaluation.mode=slide", "evaluation.window=40", "evaluation.windows=cut")
    assert module.inference == SlidingWindowInference("slide", 40, windows="cut")
    for parameter in module.segmentor.decoder.parameters():
        parameter.data *= 8 if parameter.ndim > 1 else 1  # all classes are predicted
    batch = next(iter(datamodule.val_dataloader()))
    module.eval().validation_step(batch, 0)
    counts_CC = confusion_matrix(module.inference.label(module.network, batch["image"]), batch["mask"], 6)
    assert torch.equal(module.confusion.compute(), counts_CC)
    assert not torch.equal(counts_CC, confusion_matrix(module(batch["image"]).argmax(1), batch["mask"], 6))
    with pytest.raises(UserError, match=r"expected evaluation.window with evaluation.mode=slide, .* it is not set"):
        build("evaluation.mode=slide")


def test_the_recipes_of_cityscapes_validate_as_the_published_results_do():
    for name in (name for name in choices("experiment") if name.startswith("cityscapes")):
        evaluation = read_config(compose_train(f"experiment={name}", output_dir=Path("out")))["evaluation"]
        window, windows = (798, "inside") if "_v2_" in name else (801, "cut")
        assert (evaluation["mode"], evaluation["window"], evaluation["windows"]) == ("slide", window, windows)


@pytest.mark.parametrize("name", LISTED)
def test_a_recipe_of_a_published_list_adds_the_list_and_nothing_else(name):
    dataset, part, encoder = name.split("_")
    recipe = yaml.safe_load(CONF.joinpath(f"experiment/{name}.yaml").read_text(encoding="utf-8"))
    published = published_list(dataset, recipe["dataset"].pop("labeled"))
    assert published is not None
    assert published.name in (part, f"blended/{part}")
    assert recipe == {"defaults": [f"{dataset}_{encoder}", "_self_"], "dataset": {}}


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_every_published_list_of_the_papers_has_a_recipe(dataset):
    lists = {entry.name.removeprefix("blended/") for entry in PUBLISHED[dataset].values() if "u2pl" not in entry.name}
    recipes = {name for name in LISTED if name.startswith(f"{dataset}_")}
    assert recipes == {f"{dataset}_{part}_{encoder}" for part in lists for encoder in ("r50", "r101")}


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_file_is_flat_and_complete(name):
    node = yaml.safe_load(CONF.joinpath(f"method/{name}.yaml").read_text(encoding="utf-8"))
    assert set(node) == {field.name for field in fields(Method)}
    assert resolve_method(node) == resolve_method(name) == PRESETS[name]


def test_the_presets_are_those_of_the_method_description():
    assert set(PRESETS) == {
        "mlpmatch", "mlpmatch_burn_in", "mlpmatch_official", "mlpmatch_v2", "mlpmatch_v2_stream", "unimatch",
        "unimatch_official", "unimatch_v2", "fixmatch", "supervised",
    }  # fmt: skip
    assert (PRESETS["mlpmatch"].lambda_max, PRESETS["unimatch"].feature_weight) == (0.25, 0.5)


@pytest.mark.parametrize("wrong", [{"name": "mlpmach"}, {"name": "mlpmatch", "lambda_mx": 0.1}])
def test_an_unknown_method_or_key_names_the_nearest(wrong):
    with pytest.raises(UserError, match=r"Did you mean (mlpmatch|lambda_max)"):
        resolve_method(wrong)


def test_the_module_defaults_are_the_configured_defaults_of_the_paper():
    config = compose_train("backbone=resnet50s", "schedule=voc", "objective.confidence_threshold=0.95")
    defaults = {name: p.default for name, p in inspect.signature(MLPMatch).parameters.items()}
    for group, keys in {
        "backbone": ("output_stride", "pretrained", "pos_embed", "frozen", "mean", "std"),
        "schedule": ("lr", "lr_multi", "layer_decay", "decay", "power", "warmup_steps"),
    }.items():
        for key in keys:
            value = config[group][key]
            assert (tuple(value) if OmegaConf.is_list(value) else value) == defaults[key]
    assert resolve_decoder(config.decoder) == resolve_decoder(defaults["decoder"])
    assert config.optimizer == {**PAPER_OPTIMIZER, "fused": None}


def test_an_optimizer_brings_its_learning_rate_unless_another_is_given():
    adamw = compose_train("optimizer=adamw", "dataset=camvid", "schedule=short")
    assert (adamw.optimizer.name, adamw.schedule.lr, adamw.schedule.lr_multi) == ("AdamW", 1e-4, 10)
    assert compose_train("optimizer=adamw", "schedule.lr=0.01").schedule.lr == 0.01
    cnn = compose_train("optimizer=adamw_cnn", "dataset=folder", "schedule=short")
    assert (cnn.optimizer.name, cnn.schedule.lr, cnn.schedule.minutes) == ("AdamW", 5e-4, 20)


def test_datasets_and_experiments_override_the_primary_defaults():
    assert compose_train().objective.confidence_threshold == 0.8
    assert compose_train("experiment=camvid_1-8_mobilenetv2").loader.crop_size == 160


@pytest.mark.parametrize("name", ["92", "u2pl/1-8"])
def test_the_name_of_a_list_can_be_given_on_the_command_line(name):
    labeled = compose_train("dataset=voc", f"dataset.labeled={name}").dataset.labeled
    entry = published_list("voc", labeled)
    assert entry is not None
    assert entry.name == name


# Types and keys -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    return compose_train(output_dir=Path("out"))


@pytest.mark.parametrize(
    "key",
    [
        "seed", "callbacks", "dataset", "backbone.mean", "evaluation.absent", "loader.scale", "logger.tensorboard",
        "method.lambda_max", "method.cutmix.p", "objective.criterion.name", "schedule.power", "trainer.compile_blocks",
    ],
)  # fmt: skip
def test_a_removed_key_is_refused(key, composed):
    cfg = composed.copy()
    OmegaConf.set_struct(cfg, False)
    group, _, name = key.rpartition(".")
    del (OmegaConf.select(cfg, group) if group else cfg)[name]
    with pytest.raises(UserError, match=re.escape(f"expected a value for {key}, but the configuration lacks it; set ")):
        read_config(cfg)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("dataset.size", "64", "expected dataset.size as an integer, but got '64'"),
        ("loader.batch_size", True, "expected loader.batch_size as an integer, but got true"),
        ("schedule.lr", math.inf, "expected schedule.lr as a finite number, but got inf"),
        ("method.cutmix.area", [0.1, "x"], "expected method.cutmix.area[1] as a number, but got 'x'"),
        ("method.cutmix.area", [0.1], "expected method.cutmix.area as a longer list, but got [0.1]"),
        ("logger.wandb", {"mode": "online"}, "expected a value for logger.wandb.project, but the configuration lacks"),
        ("objective.criterion", ["ce"], "criterion as a string or a mapping of keys to values, but got ['ce']"),
        ("objective.criterion.min_kep", 3, "no key objective.criterion.min_kep. Did you mean min_kept?"),
        ("trainer.precision", "bf16-mixd", "but got 'bf16-mixd'. Did you mean bf16-mixed"),
        ("see", 3, "the configuration has no key see. Did you mean seed"),
        ("seed", -1, "expected seed as an integer from 0 to 4294967295, but got -1"),
        ("callbacks.a._target_", "os.nothing", "_target_ as the path of a function or class, but os.nothing is none"),
        ("callbacks.a._target_", "helpers.StopAfterFirstEpoch", None),
        ("trainer.limit_train_batches", 0.5, None),
    ],
)
def test_types_are_checked_before_anything_is_built(key, value, sentence, composed):
    cfg = composed.copy()
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    if sentence is None:
        read_config(cfg)
    else:
        with pytest.raises(UserError, match=re.escape(sentence)):
            read_config(cfg)


def test_a_command_allows_its_own_group_only():
    cfg = compose_config("benchmark", output_dir=Path("out"))
    assert read_config(cfg, "benchmark")["benchmark"]["steps"] == 20
    with pytest.raises(UserError, match=r"the configuration has no key benchmark\."):
        read_config(cfg)


OPTIONS = {
    "evaluate": Evaluate, "predict": Predict, "suggest": SuggestOptions, "export": ExportOptions, "report": Report,
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_of_a_command_are_the_keys_of_its_configuration(command):
    assert set(compose_config(command)) == {field.name for field in fields(OPTIONS[command])}


@pytest.mark.parametrize("cls", [*OPTIONS.values(), Prepare, Benchmark, Scoring, SlidingWindowInference])
def test_every_option_of_a_command_has_a_type(cls):
    assert Any not in get_type_hints(cls).values()


def test_evaluate_and_predict_infer_alike_by_default():
    inference = compose_config("predict").inference
    assert read_options(SlidingWindowInference, OmegaConf.to_container(inference)) == SlidingWindowInference()
    assert compose_config("evaluate").inference == inference


def test_the_configuration_of_prepare_is_not_a_group_of_the_training():
    assert not CONF.joinpath("prepare").is_dir()
    own = yaml.safe_load(files("mlpmatch_pl.commands.prepare").joinpath("prepare.yaml").read_text(encoding="utf-8"))
    assert set(own) == {field.name for field in fields(Prepare)} | {"hydra", "defaults"}


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


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mlpmatch_official", "fixmatch", "supervised"])
def test_every_method_trains_from_its_configuration(method, tmp_path):
    metrics = train(compose_train(*TINY, f"method={method}", "schedule.steps=1", output_dir=tmp_path))
    assert metrics["method"] == method
    assert 0 <= metrics["test"]["test/miou"] <= 1


def test_a_monitor_that_is_never_logged_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"as monitor of BestCheckpoint, .* but got 'val/mIoU'\. Did you mean val/miou"):
        train(compose_train(*TINY, "callbacks.checkpoint.monitor=val/mIoU", output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_early_stopping_learning_rates_and_the_profiler_are_groups_and_options(tmp_path, caplog):
    options = ("callbacks=[early_stopping,lr_monitor]", "+trainer.profiler=simple", "schedule.steps=25")
    never = ("callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=1")
    metrics = train(compose_train(*TINY, *options, *never, "trainer.log_every_n_steps=1", output_dir=tmp_path))
    assert metrics["steps"] == 10  # the second epoch is not better by 1
    assert "lr-SGD/encoder" in (tmp_path / "metrics.csv").read_text()
    assert "FIT Profiler Report" in caplog.text


# MLPMatch in four steps, two epochs of two; every pixel is confident, so that every term counts.
FOUR_STEPS = (
    *TINY, "dataset.train=12", "dataset.val=1", "dataset.test=1", "schedule.steps=4", "trainer.log_every_n_steps=1",
    "objective.confidence_threshold=0", "callbacks.predictions.num_images=0", "callbacks.confusion=null",
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
        ("lambda_schedule=linear_step", (0, 0.0625, 0.125, 0.1875), {}, set(), set()),
        ("network_weight=0", BY_EPOCH, {"u_np": 0}, set(), set()),
        ("strong_weights=[0.5]", BY_EPOCH, {"s1": 0.5}, {"s2"}, {"s1"}),  # the batch of strong views is smaller
        ("partner=same_image", BY_EPOCH, {}, set(), {"s1", "s2"}),
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


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "ade20k", "coco"])
def test_the_recipes_of_unimatch_v2_are_as_described(dataset):
    config = read_config(compose_train(f"experiment={dataset}_v2_dinov2s", output_dir=Path("out")))
    crop, epochs, images, criterion = {
        "voc": (518, 60, 16, "ce"), "cityscapes": (798, 180, 8, "ohem"), "ade20k": (518, 60, 8, "ce"),
        "coco": (518, 20, 16, "ce"),
    }[dataset]  # fmt: skip
    assert (config["loader"]["crop_size"], config["loader"]["batch_size"]) == (crop, images)
    assert (config["schedule"]["epochs"], config["schedule"]["lr_multi"], config["schedule"]["power"]) == (
        epochs,
        40,
        0.9,
    )
    assert config["optimizer"] == {"name": "AdamW", "betas": [0.9, 0.999], "weight_decay": 0.01, "fused": None}
    assert (config["objective"]["criterion"]["name"], config["objective"]["confidence_threshold"]) == (criterion, 0.95)
    assert (config["method"]["name"], config["decoder"]["name"]) == ("unimatch_v2", "dpt")
    assert config["backbone"]["name"] == "vit_small_patch14_dinov2"
