import pytest
from helpers import TINY, compose_train
from omegaconf import OmegaConf

from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.engine.run_folder import resolved_config, write_run_folder
from mlpmatch_pl.utils.files import load_yaml

SECRET = "0123456789abcdef"


@pytest.fixture(scope="module")
def data():
    return shapes(labeled=2, train=6, val=2, test=1, size=48)


def test_the_configuration_in_the_run_folder_is_resolved(tmp_path, data, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "/data")
    cfg = compose_train("dataset=voc", "logger=wandb", output_dir=tmp_path)
    write_run_folder(cfg, tmp_path, data)
    config = load_yaml(tmp_path / "config.yaml")
    assert config["output_dir"] == str(tmp_path)
    assert config["dataset"]["root"] == "/data/voc2012"
    assert config["loader"]["unlabeled_batch_size"] == config["loader"]["batch_size"] == 8
    assert config["callbacks"]["checkpoint"]["dirpath"] == "${output_dir}/checkpoints"  # for a repeated run
    assert (tmp_path / "config.yaml").read_text().count("${") == 4


@pytest.mark.parametrize(
    "value",
    ["${oc.env:WANDB_API_KEY}", "${oc.env:WANDB_API_KEY,none}/x", "${.other}", "${oc.select:.other}",
     "${oc.decode:${.other}}", "${oc.env:${.variable}}", "${oc.env:MLPMATCH_NOT_SET,${oc.env:WANDB_API_KEY}}"],
)  # fmt: skip
def test_no_secret_of_the_environment_is_written(value, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.delenv("MLPMATCH_NOT_SET", raising=False)
    cfg = OmegaConf.create({"it": value, "other": "${oc.env:WANDB_API_KEY}", "variable": "WANDB_API_KEY"})
    assert SECRET in cfg.it
    config = resolved_config(cfg)
    assert SECRET not in str(config)
    assert "${oc.env:WANDB_API_KEY}" in config["it"]  # readers see that a value is missing
    assert SECRET in cfg.it  # the training itself still gets it


def test_the_configuration_before_a_change_is_kept(tmp_path, data):
    def write(*overrides):
        write_run_folder(compose_train(*TINY, *overrides, output_dir=tmp_path), tmp_path, data)
        return sorted(path.name for path in tmp_path.glob("config*"))

    assert write() == ["config.yaml"]
    assert write("resume=auto", "logger.tensorboard=true") == ["config.yaml"]  # the same training
    assert write("schedule.lr=0.5") == ["config-1.yaml", "config.yaml"]
    (tmp_path / "config.yaml").write_text("seed: [")
    assert write() == ["config-1.yaml", "config-2.yaml", "config.yaml"]
    assert load_yaml(tmp_path / "config-1.yaml")["schedule"]["lr"] == 0.05
