"""``weights=teacher | student`` of the commands that read a checkpoint."""

import csv

import numpy as np
import pytest
import torch
from helpers import compose_config
from helpers.checkpoints import make_module, save_checkpoint
from helpers.images import save_image
from PIL import Image
from safetensors.torch import load_file

from mlpmatch_pl import shapes
from mlpmatch_pl.evaluate import evaluate
from mlpmatch_pl.export import export
from mlpmatch_pl.predict import predict

CLASS = 2  # that the teacher predicts everywhere
WEIGHTS = ("null", "teacher", "student")


@pytest.fixture(scope="module")
def module():
    names = list(shapes(labeled=1, train=2, val=1, test=1, size=48).class_names)
    built = make_module(6, method={"name": "mlpmatch_burn_in"}, class_names=names)
    built.teacher.network.load_state_dict(built.segmentor.state_dict())
    built.teacher.network.decoder.classifier.bias.data[CLASS] += 999.0
    return built


@pytest.fixture(scope="module")
def checkpoint(module, tmp_path_factory):
    return save_checkpoint(module, tmp_path_factory.mktemp("teacher") / "best.ckpt")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_predict(checkpoint, tmp_path, weights):
    save_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    paths = [f"checkpoint={checkpoint}", f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}"]
    predict(compose_config("predict", *paths, "save=[index]", f"weights={weights}"))
    found = set(np.unique(Image.open(next((tmp_path / "out").rglob("a.png")))).tolist())
    assert (found == {CLASS}) == (weights != "student")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_evaluate(checkpoint, tmp_path, weights):
    sizes = {"labeled": 1, "train": 2, "val": 1, "test": 2, "size": 48}
    data = ["dataset=shapes", *(f"dataset.{key}={value}" for key, value in sizes.items())]
    own = [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", "num_workers=0", f"weights={weights}"]
    scores = evaluate(compose_config("evaluate", *own, *data))
    with (tmp_path / "out" / "confusion.csv").open() as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], np.int64)
    others = np.delete(counts, CLASS, axis=1).sum()
    assert (others == 0) == (weights != "student"), scores


@pytest.mark.parametrize("weights", WEIGHTS)
def test_export(checkpoint, module, tmp_path, weights):
    file = tmp_path / "weights.safetensors"
    paths = [f"checkpoint={checkpoint}", f"output={file}"]
    export(compose_config("export", *paths, "format=safetensors", f"weights={weights}"))
    network = module.segmentor if weights == "student" else module.teacher.network
    assert torch.equal(load_file(file)["decoder.classifier.bias"], network.decoder.classifier.bias)
