"""Weights from local files: timm encoders, and published checkpoints by their documented names."""

import io
import logging
import pickle
import re
import zipfile

import huggingface_hub
import numpy as np
import pytest
import requests
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from mlpmatch_pl import Segmentor, UserError
from mlpmatch_pl.segmentor import Encoder, weights
from mlpmatch_pl.segmentor.weights import load_published, read_state_dict

CHANNELS, CLASSES, LOW = 8, 5, 48
NORM = ("weight", "bias", "running_mean", "running_var")


def random_tensors(shapes, seed=0):
    """Return random tensors by name, with positive variances."""
    rng = torch.Generator().manual_seed(seed)
    positive = ("running_var",)
    return {
        name: torch.rand(shape, generator=rng) + 0.5
        if name.endswith(positive)
        else torch.randn(shape, generator=rng) / max(1, int(np.prod(shape[1:]))) ** 0.5
        for name, shape in shapes.items()
    }


def randomized(state, seed=0):
    floats = {name: tuple(value.shape) for name, value in state.items() if value.is_floating_point()}
    return {**state, **random_tensors(floats, seed)}


def timm_state(backbone="test_resnet"):
    return randomized(timm.create_model(backbone).state_dict())


def save(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == weights.__name__]


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_loading_a_local_file_is_logged_in_four_lines(tmp_path, caplog, name):
    state = timm_state()
    path = save(state, tmp_path / name)
    with caplog.at_level(logging.INFO, logger="mlpmatch_pl"):
        loaded = Encoder("test_resnet", pretrained=path).model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert messages(caplog) == [
        f"weights from {path}: loaded {len(loaded)} of {len(loaded)} tensors",
        "  missing: none",
        "  of another shape: none",
        "  unexpected: none",
    ]


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "ema"])
def test_state_dicts_inside_a_checkpoint_are_found(tmp_path, wrapper):
    state = timm_state()
    path = save({wrapper: state, "epoch": 3}, tmp_path / "weights.pth")
    assert torch.equal(Encoder("test_resnet", pretrained=path).model.bn1.weight, state["bn1.weight"])


def test_files_may_lack_classifier_and_counters(tmp_path):
    state = {
        name: value
        for name, value in timm_state().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    encoder = Encoder("test_resnet", pretrained=save(state, tmp_path / "weights.pth"))
    assert torch.equal(encoder.model.bn1.running_mean, state["bn1.running_mean"])


def test_the_first_convolution_is_repeated_and_scaled_for_more_channels(tmp_path):
    state = timm_state()
    encoder = Encoder("test_resnet", pretrained=save(state, tmp_path / "weights.pth"), in_chans=5)
    rgb = state["conv1.0.weight"]
    torch.testing.assert_close(encoder.model.conv1[0].weight, torch.cat([rgb, rgb[:, :2]], dim=1) * 3 / 5)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = save(timm_state("resnet18"), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="expected weights of the configured architecture") as error:
        Encoder("test_resnet", pretrained=path)
    assert "check backbone.name" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("backbone", "file"), [("resnet18", "resnet34"), ("test_vit", "longer")])
def test_a_file_of_a_deeper_network_is_refused(tmp_path, backbone, file):
    """It has all tensors of a shallower one, in the same shapes."""
    state = timm.create_model(backbone if file == "longer" else file).state_dict()
    if file == "longer":
        state |= {name.replace("blocks.5", "blocks.6"): value for name, value in state.items() if "blocks.5" in name}
    path = save(state, tmp_path / "weights.pth")
    count = len(state.keys() - timm.create_model(backbone).state_dict().keys())
    first = {"resnet34": "layer1.2.bn1.bias", "longer": "blocks.6.attn.proj.bias"}[file]
    with pytest.raises(UserError, match=rf"in {path} are unexpected \({count}, such as {first}\); check backbone"):
        Encoder(backbone, pretrained=path)


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "nothing.pth")
    with pytest.raises(UserError) as error:
        Encoder("test_resnet", pretrained=path)
    assert str(error.value) == f"expected a file with weights, but {path} does not exist"
    with pytest.raises(UserError, match="does not exist"):
        read_state_dict(tmp_path)  # a folder


def truncated_torch_file():
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(100)}, buffer)
    return buffer.getvalue()[:300]


GARBAGE = {
    "empty": b"",
    "text": b"no weights, but text\n",
    "page": b"<html>404</html>",
    "bytes": bytes(range(256)),
    "stub": b"\x80\x02.",
    "truncated": truncated_torch_file(),
    "pickle": pickle.dumps([1], protocol=2),
}


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        pytest.param(content, suffix, id=f"{name}{suffix}")
        for name, content in GARBAGE.items()
        for suffix in (".pth", ".safetensors")
    ],
)
def test_corrupt_files_are_refused_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"expected a state dict of tensors in {path}")) as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1.0}, {"model": {"a": "text"}}, torch.zeros(2)], ids=repr)
def test_plain_values_are_not_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="expected a state dict of tensors"):
        read_state_dict(tmp_path / "weights.pth")


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, inside):
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    code = Code(marker)
    torch.save({"model": code} if inside else {"model": timm_state(), "extra": code}, path)
    with pytest.raises(UserError, match="expected a state dict of tensors") as error:
        Encoder("test_resnet", pretrained=str(path))
    assert "weights_only" not in str(error.value)  # torch's advice would execute the code
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.fixture
def no_connection(monkeypatch):
    def fail(*_, **__):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "head", fail)


def test_without_a_connection_a_local_file_is_suggested_at_once(no_connection, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match=r"timm's weights of test_resnet \(no connection to https://.*\); set backbone"):
        Encoder("test_resnet", pretrained=True)


def test_auto_without_a_connection_is_a_note_and_random_weights(no_connection, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    torch.manual_seed(0)
    auto = Encoder("test_resnet", pretrained="auto").state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(value, auto[name]) for name, value in Encoder("test_resnet").state_dict().items())
    (note,) = messages(caplog)
    assert note.startswith("note: could not download timm's weights of test_resnet (no connection to")
    assert note.endswith("the training starts from random weights, which needs many more images")


def test_weights_that_were_downloaded_before_need_no_connection(no_connection, monkeypatch, tmp_path):
    state = timm_state("test_resnet")
    save_file(state, tmp_path / "model.safetensors")
    cached = {("timm/test_resnet.r160_in1k", "model.safetensors"): str(tmp_path / "model.safetensors")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *name: cached[name])
    loaded = Encoder("test_resnet", pretrained=True).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def published_decoder_shapes(low_channels, high_channels, num_classes):
    """Return shapes by their documented names."""
    convolutions = {
        "head.b0.0": (CHANNELS, high_channels, 1, 1),
        "head.b1.0": (CHANNELS, high_channels, 3, 3),
        "head.b2.0": (CHANNELS, high_channels, 3, 3),
        "head.b3.0": (CHANNELS, high_channels, 3, 3),
        "head.b4.gap.1": (CHANNELS, high_channels, 1, 1),
        "head.project.0": (CHANNELS, 5 * CHANNELS, 1, 1),
        "reduce.0": (LOW, low_channels, 1, 1),
        "fuse.0": (CHANNELS, CHANNELS + LOW, 3, 3),
        "fuse.3": (CHANNELS, CHANNELS, 3, 3),
    }
    norms = {
        "head.b0.1": CHANNELS,
        "head.b1.1": CHANNELS,
        "head.b2.1": CHANNELS,
        "head.b3.1": CHANNELS,
        "head.b4.gap.2": CHANNELS,
        "head.project.1": CHANNELS,
        "reduce.1": LOW,
        "fuse.1": CHANNELS,
        "fuse.4": CHANNELS,
    }
    shapes = {f"{name}.weight": shape for name, shape in convolutions.items()}
    shapes |= {f"{name}.{part}": (width,) for name, width in norms.items() for part in NORM}
    return {**shapes, "classifier.weight": (num_classes, CHANNELS, 1, 1), "classifier.bias": (num_classes,)}


def published_state(prefix="module.", num_classes=CLASSES):
    encoder = Encoder("test_resnet")
    state = {f"backbone.{name}": value for name, value in randomized(encoder.model.state_dict(), 1).items()}
    state |= random_tensors(published_decoder_shapes(*encoder.channels, num_classes), 2)
    counters = [name.replace("running_var", "num_batches_tracked") for name in state if "running_var" in name]
    state |= {name: torch.tensor(7) for name in counters}
    return {f"{prefix}{name}": value for name, value in state.items()}


def plain_deeplab(state, low, high, size):
    """Run DeepLabV3+ written by hand with the documented names."""

    def layer(x, convolution, norm, padding=0, dilation=1):
        x = F.conv2d(x, state[f"{convolution}.weight"], padding=padding, dilation=dilation)
        weight, bias, mean, var = (state[f"{norm}.{part}"] for part in NORM)
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5))

    def resize(x, shape):
        return F.interpolate(x, size=shape, mode="bilinear", align_corners=True)

    branches = [layer(high, "head.b0.0", "head.b0.1")]
    for index, rate in ((1, 6), (2, 12), (3, 18)):
        branches.append(layer(high, f"head.b{index}.0", f"head.b{index}.1", padding=rate, dilation=rate))
    pooled = layer(F.adaptive_avg_pool2d(high, 1), "head.b4.gap.1", "head.b4.gap.2")
    branches.append(resize(pooled, high.shape[2:]))
    x = layer(torch.cat(branches, dim=1), "head.project.0", "head.project.1")
    x = torch.cat([layer(low, "reduce.0", "reduce.1"), resize(x, low.shape[2:])], dim=1)
    x = layer(x, "fuse.0", "fuse.1", padding=1)
    x = layer(x, "fuse.3", "fuse.4", padding=1)
    return resize(F.conv2d(x, state["classifier.weight"], state["classifier.bias"]), size)


def plain_model(state, image_BCHW):
    encoder = Encoder("test_resnet").eval()
    encoder.model.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    )
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    low, high = encoder((image_BCHW.float() - mean) / std).levels
    return plain_deeplab(state, low, high, image_BCHW.shape[2:])


def small_segmentor(num_classes=CLASSES):
    torch.manual_seed(1)
    return Segmentor(num_classes, backbone="test_resnet", decoder={"channels": CHANNELS}).eval()


def with_old_numpy_names(content):
    """Rewrite a torch file as numpy 1 would write its scalars."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            archive.writestr(name, data)
    return target.getvalue()


@pytest.mark.parametrize("numpy_major", [1, 2])
@pytest.mark.parametrize("prefix", ["module.", ""])
@torch.no_grad()
def test_a_published_checkpoint_gives_the_logits_of_a_plain_model(tmp_path, caplog, prefix, numpy_major):
    state, path, buffer = published_state(prefix), tmp_path / "unimatch.pth", io.BytesIO()
    torch.save({"model": state, "epoch": 79, "previous_best": np.float64(71.9)}, buffer)
    content = buffer.getvalue()
    path.write_bytes(with_old_numpy_names(content) if numpy_major == 1 else content)
    segmentor = small_segmentor()
    with caplog.at_level(logging.INFO, logger="mlpmatch_pl"):
        load_published(segmentor, path)

    image_BCHW = torch.randint(0, 256, (2, 3, 65, 81), dtype=torch.uint8)
    expected = plain_model({name.removeprefix(prefix): value for name, value in state.items()}, image_BCHW)
    torch.testing.assert_close(segmentor(image_BCHW), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01
    total = len(segmentor.state_dict())
    assert messages(caplog) == [
        f"weights from {path}: loaded {total} of {total} tensors",
        "  missing: none",
        "  of another shape: none",
        "  unexpected: none",
    ]


def test_a_classifier_for_other_classes_is_not_loaded(tmp_path, caplog):
    path, segmentor = tmp_path / "unimatch.pth", small_segmentor(3)
    before = {name: value.clone() for name, value in segmentor.decoder.classifier.state_dict().items()}
    state = published_state(num_classes=21)
    torch.save({"model": state}, path)
    with caplog.at_level(logging.INFO, logger="mlpmatch_pl"):
        load_published(segmentor, path)
    assert all(torch.equal(v, before[k]) for k, v in segmentor.decoder.classifier.state_dict().items())
    assert torch.equal(segmentor.decoder.fuse[0].weight, state["module.fuse.0.weight"])
    total = len(segmentor.state_dict())
    assert messages(caplog) == [
        f"weights from {path}: loaded {total - 2} of {total} tensors",
        "  missing: none",
        "  of another shape: decoder.classifier.bias, decoder.classifier.weight",
        "  unexpected: none",
    ]


@pytest.mark.parametrize("lacking", ["module.reduce.0.weight", "module.backbone.bn1.running_mean"])
def test_an_incomplete_checkpoint_is_refused_and_changes_nothing(tmp_path, lacking):
    segmentor, state = small_segmentor(), published_state()
    del state[lacking]
    torch.save({"model": state}, tmp_path / "unimatch.pth")
    before = {name: value.clone() for name, value in segmentor.state_dict().items()}
    with pytest.raises(UserError, match=r"are missing \(1, such as [a-z0-9._]+\); check backbone.name"):
        load_published(segmentor, tmp_path / "unimatch.pth")
    assert all(torch.equal(value, before[name]) for name, value in segmentor.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "segmentor."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_own_state_dicts_load_too(tmp_path, prefix, wrapper):
    segmentor = small_segmentor()
    state = randomized(segmentor.state_dict(), 5)
    named = {f"{prefix}{name}": value for name, value in state.items()}
    torch.save({wrapper: named} if wrapper else named, tmp_path / "own.pth")
    load_published(segmentor, tmp_path / "own.pth")
    assert all(torch.equal(value, state[name]) for name, value in segmentor.state_dict().items())


def test_a_training_checkpoint_gives_the_student_and_a_classifier_of_the_encoder_is_dropped(tmp_path):
    segmentor = small_segmentor()
    state = randomized(segmentor.state_dict(), 5)
    named = {f"segmentor.{name}": value for name, value in state.items()}
    named |= {f"teacher.network.{name}": value + 1 for name, value in state.items()}
    torch.save({"state_dict": named | {"segmentor.encoder.model.fc.weight": torch.zeros(2)}}, tmp_path / "own.pth")
    load_published(segmentor, tmp_path / "own.pth")
    assert all(torch.equal(value, state[name]) for name, value in segmentor.state_dict().items())
    torch.save(named | {"segmentor.decoder.aspp.extra": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"are unexpected \(1, such as decoder.aspp.extra\)"):
        load_published(segmentor, tmp_path / "more.pth")


def test_names_of_published_resnets_are_timms():
    model = Encoder("resnet50s").model
    names = set(model.state_dict())
    documented = {"conv1.0.weight", "conv1.1.running_mean", "conv1.3.weight", "conv1.6.weight", "bn1.weight"}
    documented |= {"layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias", "layer4.2.bn3.running_var"}
    assert documented <= names
    assert isinstance(model.conv1, nn.Sequential)
