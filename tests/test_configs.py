import inspect
import re
from dataclasses import asdict, fields
from importlib.resources import files

import pytest
from helpers import TINY, compose_train
from hydra.utils import get_object
from omegaconf import OmegaConf

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.published import PUBLISHED, published_list
from mlpmatch_pl.methods import PRESETS, Method, resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.train import train


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


@pytest.mark.parametrize(
    "ablation",
    [
        "method.network_perturbation=null",
        "method.lambda_max=0",
        "method.network_weight=0",
        "method.feature_weight=0",
        "method.strong_weights=[0.25]",
        "method.lambda_schedule=constant",
        "method.lambda_schedule=linear_step",
        "method.network_perturbation.sampler=single_stage",
        "method.network_perturbation.sampler=n_blocks",
        "method.cutmix.p=0",
        "method.partner=same_image",
        "method.network_updates_batchnorm=false",
    ],
)
def test_an_ablation_is_one_override(ablation, tmp_path):
    cfg = compose_train(*TINY, ablation, output_dir=tmp_path)
    method = resolve_method(OmegaConf.to_container(cfg.method, resolve=True))
    assert asdict(method) != asdict(PRESETS["mlpmatch"])


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
