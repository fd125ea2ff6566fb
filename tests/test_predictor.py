import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from helpers.checkpoints import make_module, save_checkpoint
from PIL import Image

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.predictor import Predictor, load
from mlpmatch_pl.utils.errors import UserError


def gray_network(bit_depth):
    level = 257 if bit_depth == 16 else 1
    return make_module(in_chans=1, mean=[120.0 * level], std=[50.0 * level], bit_depth=bit_depth)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    module = make_module(class_names=["a", "b", "c", "d"], palette=[[0, 0, 0], [9, 8, 7], [1, 2, 3], [255, 0, 4]])
    return save_checkpoint(module, tmp_path_factory.mktemp("run") / "epoch=1 é.ckpt")


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8), (83, 61), interpolation=cv2.INTER_CUBIC)


def plain_labels(module, pixels):
    with torch.no_grad():
        image = torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy())[None]
        return module.eval()(image)[0].argmax(0).numpy()


def test_predictions_are_those_of_the_saved_module(predictor, pixels):
    label = predictor.predict(pixels)
    expected = plain_labels(make_module(), pixels)
    assert label.dtype == np.uint8
    assert label.shape == (61, 83)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(label, expected)


@pytest.fixture(scope="module")
def with_teacher(tmp_path_factory):
    """A checkpoint whose teacher predicts class 2 everywhere."""
    module = make_module(method={"name": "fixmatch", "teacher": {"decay": 0.9, "ramp": True}})
    module.teacher.network.load_state_dict(module.segmentor.state_dict())
    module.teacher.network.decoder.classifier.bias.data[2] += 999.0
    return save_checkpoint(module, tmp_path_factory.mktemp("teacher") / "best.ckpt")


@pytest.mark.parametrize("weights", [None, "teacher", "student"])
def test_the_teacher_predicts_if_there_is_one_unless_the_student_is_asked_for(with_teacher, pixels, weights):
    predictor = load(with_teacher, device="cpu", weights=weights)
    expected = plain_labels(make_module(), pixels) if weights == "student" else np.full((61, 83), 2)
    np.testing.assert_array_equal(predictor.predict(pixels), expected)
    assert predictor.module.teacher is None  # one network in memory


def test_a_teacher_that_a_checkpoint_lacks_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"a teacher for weights=teacher, but .*epoch=1 é.ckpt has none; omit weights"):
        load(checkpoint, weights="teacher")
    with pytest.raises(UserError, match="expected weights as teacher or student, or None, but got 'ema'"):
        load(checkpoint, weights="ema")


def test_probabilities_are_float32_and_sum_to_one(predictor, pixels):
    probabilities = predictor.probabilities(pixels)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (4, 61, 83)
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(0), predictor.predict(pixels))


def test_a_checkpoint_contains_class_names_and_colors(predictor):
    assert predictor.class_names == ("a", "b", "c", "d")
    assert predictor.colors == ((0, 0, 0), (9, 8, 7), (1, 2, 3), (255, 0, 4))
    assert (predictor.in_chans, predictor.bit_depth) == (3, 8)
    assert not predictor.module.training


def test_an_old_checkpoint_without_palette_gets_distinct_colors(checkpoint, tmp_path, pixels, predictor):
    content = torch.load(checkpoint, weights_only=True)
    del content["hyper_parameters"]["palette"], content["hyper_parameters"]["bit_depth"]
    torch.save(content, tmp_path / "old.ckpt")
    old = load(tmp_path / "old.ckpt")
    assert len(set(old.colors)) == 4
    assert old.bit_depth == 8
    np.testing.assert_array_equal(old.predict(pixels), predictor.predict(pixels))


def test_all_kinds_of_images_give_the_same_labels(predictor, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "ein Bild ü.png")
    Image.fromarray(pixels).save(tmp_path / "image.tif")
    expected = predictor.predict(pixels)
    for image in (
        tmp_path / "ein Bild ü.png",
        str(tmp_path / "image.tif"),
        Image.fromarray(pixels),
        Image.fromarray(pixels).convert("RGBA"),
        torch.from_numpy(pixels).permute(2, 0, 1),
        np.asfortranarray(pixels),
        np.ascontiguousarray(pixels[..., ::-1])[..., ::-1],  # a view with a negative stride, as from BGR
    ):
        np.testing.assert_array_equal(predictor.predict(image), expected)


def test_gray_images_become_rgb(predictor, pixels, tmp_path):
    gray = pixels[..., 0].copy()
    Image.fromarray(gray).save(tmp_path / "gray.png")
    expected = predictor.predict(np.repeat(gray[..., None], 3, axis=2))
    for image in (
        gray, gray[..., None], torch.from_numpy(gray)[None], Image.fromarray(gray), Image.fromarray(gray).convert("P"),
        Image.fromarray(gray).convert("LA"), tmp_path / "gray.png",
    ):  # fmt: skip
        np.testing.assert_array_equal(predictor.predict(image), expected)


def test_orientation_is_applied_to_files_and_pil_images(predictor, pixels, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn by a quarter
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    expected = predictor.predict(np.rot90(pixels, -1))
    assert (predictor.predict(path) == expected).all()
    with Image.open(path) as image:
        assert (predictor.predict(image) == expected).all()
    ignoring = Predictor(make_module(image_options={"orientation": "ignore"}))
    with Image.open(path) as image:
        for source in (path, image):
            assert (ignoring.image_tensor(source).numpy() == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_gray_images_of_16_bits(pixels, tmp_path, suffix):
    deep = pixels[..., 0].astype(np.uint16) * 257
    if suffix == ".tif":
        tifffile.imwrite(tmp_path / "deep.tif", deep)
    else:
        Image.fromarray(deep).save(tmp_path / "deep.png")
    module = gray_network(16)
    predictor = load(save_checkpoint(module, tmp_path / "deep.ckpt"))
    expected = plain_labels(module, deep[..., None])
    assert len(np.unique(expected)) > 1
    assert (predictor.in_chans, predictor.bit_depth) == (1, 16)
    tensor = torch.from_numpy(deep.astype(np.int32))[None]
    with Image.open(tmp_path / f"deep{suffix}") as opened:
        for image in (
            tmp_path / f"deep{suffix}", opened, deep, deep.astype(">u2"), deep[..., None], tensor,
            tensor.to(torch.uint16), Image.fromarray(deep.astype(np.int32)),
        ):  # fmt: skip
            np.testing.assert_array_equal(predictor.predict(image), expected)


def test_inference_options_are_used(checkpoint, predictor, pixels):
    inference = SlidingWindowInference("slide", window=40, scales=(1.0, 1.5), flip=True)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    expected = inference(predictor.module.segmentor, image)[0].numpy()
    probabilities = load(checkpoint, inference=inference).probabilities(pixels)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert np.abs(probabilities - predictor.probabilities(pixels)).max() > 1e-3


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((3, 40, 50), np.uint8), "expected an array (H, W, 3) of uint8 with values as in image"),
        (np.zeros((40, 50, 4), np.uint8), "files, but got (40, 50, 4) of uint8; convert it"),
        (np.zeros((40, 50, 3), np.float32), "but got (40, 50, 3) of float32; convert it"),
        (np.zeros((40, 50, 3), np.uint16), "but got (40, 50, 3) of uint16; convert it"),
        (np.zeros((0, 50, 3), np.uint8), "but got (0, 50, 3) of uint8; convert it"),
        (np.zeros(5, np.uint8), "but got (5,) of uint8; convert it"),
        (torch.zeros(40, 50, 3, dtype=torch.uint8), "a tensor (3, H, W) of uint8"),
        (torch.zeros(1, 3, 40, 50, dtype=torch.uint8), "a tensor (3, H, W) of uint8"),
        (torch.zeros(3, 40, 50), "but got (3, 40, 50) of float32; convert it"),
        (Image.fromarray(np.zeros((4, 5), np.uint16)), "but got (4, 5, 1) of uint16; convert it"),
        ([[0, 1]], "expected an image as path, PIL image, array or tensor, but got list"),
        ("none.png", "cannot read the image none.png"),
    ],
)  # fmt: skip
def test_wrong_images_are_refused(predictor, image, found):
    with pytest.raises(UserError) as caught:
        predictor.predict(image)
    assert found in str(caught.value)


def test_a_16_bit_network_refuses_float_tensors():
    with pytest.raises(UserError, match=r"expected a tensor \(1, H, W\) of uint16 or int32 .* of float32"):
        Predictor(gray_network(16)).predict(torch.zeros(1, 40, 50))


def test_a_gray_network_refuses_rgb():
    predictor = Predictor(gray_network(8))
    with pytest.raises(UserError, match=r"expected an array \(H, W, 1\) of uint8 .* got \(40, 50, 3\)"):
        predictor.predict(Image.new("RGB", (50, 40)))
    assert predictor.predict(Image.new("1", (50, 40))).shape == (40, 50)


def test_more_classes_than_8_bits_hold_are_refused():
    with pytest.raises(UserError, match=r"expected at most 256 classes.*has 300"):
        Predictor(make_module(300))


def test_nothing_in_a_checkpoint_is_executed(checkpoint, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "callbacks": Harm()}, tmp_path / "harmful.ckpt")
    with pytest.raises(UserError, match=r"expected a training checkpoint, but .*harmful\.ckpt cannot be read as one"):
        load(tmp_path / "harmful.ckpt")
    assert not (tmp_path / "harmed").exists()


def test_checkpoints_of_version_0_1_name_the_decoder_by_its_channels(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    decoder = content["hyper_parameters"].pop("decoder")
    assert content["hyper_parameters"].keys().isdisjoint({"decoder_channels", "atrous_rates"})
    content["hyper_parameters"] |= {"decoder_channels": decoder["channels"], "atrous_rates": decoder["atrous_rates"]}
    torch.save(content, tmp_path / "old.ckpt")
    loaded = MLPMatch.load_from_checkpoint(tmp_path / "old.ckpt")
    for module in (loaded, load(tmp_path / "old.ckpt", device="cpu").module):
        assert module.hparams["decoder"] == decoder
        for name, tensor in module.segmentor.state_dict().items():
            assert torch.equal(tensor, content["state_dict"][f"segmentor.{name}"])


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save(make_module().segmentor.state_dict(), tmp_path / "weights.pth")
    for name in ("text.ckpt", "weights.pth"):
        with pytest.raises(UserError, match=f"expected a training checkpoint, but .*{name} cannot be read as one"):
            load(tmp_path / name)
    with pytest.raises(UserError, match=r"config.json and model.safetensors, .* name a checkpoint"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"none\.ckpt does not exist"):
        load(tmp_path / "none.ckpt")


@pytest.mark.parametrize("device", ["cuad", "cuda:99"])
def test_a_missing_device_is_refused(checkpoint, device):
    with pytest.raises(UserError, match=f"expected device as auto, or one that this machine has, but got {device}"):
        load(checkpoint, device=device)


WITHOUT_HYDRA = """
import sys
sys.modules.update(dict.fromkeys(BLOCKED := ("hydra", "omegaconf", "wandb", "albumentations")))  # as if not installed
import socket
socket.socket.connect = socket.create_connection = socket.getaddrinfo = None  # calling them would fail
import numpy
import tifffile
import torch
from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule, load
from mlpmatch_pl.methods.method import resolve_method
assert resolve_method("mlpmatch").lambda_max == 0.25
checkpoint, image, labels, logits = sys.argv[1:]
module = MLPMatch.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
assert (module.method.lambda_max, module.class_names) == (0.1, ["a", "b", "c", "d"])
with torch.no_grad():
    torch.save(module(torch.load(image)), logits)
    assert MLPMatch(3, backbone="test_resnet").eval()(torch.zeros(1, 3, 40, 40)).shape == (1, 3, 40, 40)
numpy.save(labels, load(checkpoint).predict(image.replace(".pt", ".png")))
assert all(sys.modules[name] is None for name in BLOCKED)
"""


def test_the_python_interface_needs_neither_hydra_nor_albumentations_nor_the_network(pixels, tmp_path):
    """A module is built; a checkpoint gives the same network, with its options, and the same prediction."""
    module = make_module(method={"name": "mlpmatch", "lambda_max": 0.1}, class_names=["a", "b", "c", "d"])
    checkpoint = save_checkpoint(module, tmp_path / "last.ckpt")
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image_BCHW = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    torch.save(image_BCHW, tmp_path / "image.pt")
    paths = [str(path) for path in (checkpoint, *(tmp_path / name for name in ("image.pt", "labels.npy", "logits.pt")))]
    subprocess.run([sys.executable, "-c", WITHOUT_HYDRA, *paths], check=True, timeout=300)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(paths[3]), module.eval()(image_BCHW), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.load(paths[2]), plain_labels(module, pixels))


def test_a_predictor_reads_files_as_the_training_did(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 5), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, planarconfig="contig", photometric="minisblack")
    module = make_module(image_options={"bands": [5, 1, 2]})
    chosen = Predictor(module).image_tensor(tmp_path / "a.tif")
    assert (chosen.numpy() == pixels[..., [4, 0, 1]].transpose(2, 0, 1)).all()
