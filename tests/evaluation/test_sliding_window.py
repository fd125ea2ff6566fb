import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mlpmatch_pl.evaluation import predict_logits
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.utils.errors import UserError


@pytest.fixture(scope="module")
def segmentor():
    """A network whose prediction of a pixel depends on what else is in the window, through ASPP's pooling."""
    torch.manual_seed(0)
    network = Segmentor(4, "test_resnet", decoder={"channels": 8}).eval()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # probabilities far from uniform
    return network


class Pixelwise(nn.Module):
    """Logits of a pixel's own values, and a record of the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def forward(self, image_BCHW):
        self.passes.append(len(image_BCHW))
        return torch.cat([image_BCHW.float() / 50, -image_BCHW.float() / 50], dim=1)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def plain_softmax(segmentor, image_BCHW):
    with torch.no_grad():
        return predict_logits(segmentor, image_BCHW).softmax(1).numpy()


def plain_slide(segmentor, image_BCHW, window, stride):
    """Window by window, image by image, in float64."""
    height, width = image_BCHW.shape[2:]
    results = []
    for image_1CHW in image_BCHW[:, None]:
        total, count, top = 0.0, np.zeros((height, width)), 0
        while True:
            left = 0
            while True:
                y, x = min(top, max(height - window, 0)), min(left, max(width - window, 0))
                crop = plain_softmax(segmentor, image_1CHW[..., y : y + window, x : x + window])[0]
                padded = np.zeros((crop.shape[0], height, width))
                padded[:, y : y + crop.shape[1], x : x + crop.shape[2]] = crop
                total = total + padded
                count[y : y + crop.shape[1], x : x + crop.shape[2]] += 1
                left += stride
                if x + window >= width:
                    break
            top += stride
            if y + window >= height:
                break
        assert count.min() > 0
        results.append(total / count)
    return np.stack(results)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """The triangle filter of antialiased bilinear resizing, (new, old)."""
    factor = old / new
    centers, pixels = (np.arange(new) + 0.5) * factor, np.arange(old) + 0.5
    weights = np.maximum(0, 1 - np.abs(centers[:, None] - pixels) / max(factor, 1))
    return weights / weights.sum(1, keepdims=True)


def plain_resize(values_BCHW, height, width):
    rows = resize_matrix(values_BCHW.shape[2], height)
    columns = resize_matrix(values_BCHW.shape[3], width)
    return np.einsum("yh,bchw,xw->bcyx", rows, np.asarray(values_BCHW, dtype=np.float64), columns, optimize=True)


def test_whole_images_are_softmax_of_the_logits(segmentor):
    image = images(2, 3, 45, 70)
    expected = predict_logits(segmentor, image).softmax(1)
    assert torch.equal(SlidingWindowInference()(segmentor, image), expected)


@pytest.mark.parametrize(
    ("height", "width", "window", "stride", "window_batch"),
    [
        (75, 101, 50, None, 4),
        (75, 101, 50, 50, 3),
        (64, 96, 32, 16, 5),
        (40, 131, 64, 21, 1),  # lower than the window
        (20, 90, 40, 39, 7),  # and than the smallest input
        (67, 67, 33, 33, 100),
    ],
)
def test_windows_equal_a_double_loop_with_counts(segmentor, height, width, window, stride, window_batch):
    image = images(2, 3, height, width)
    inferred = SlidingWindowInference("slide", window, stride, window_batch)(segmentor, image).numpy()
    expected = plain_slide(segmentor, image, window, stride or window * 2 // 3)
    np.testing.assert_allclose(inferred, expected, atol=2e-5)
    assert np.abs(expected - plain_softmax(segmentor, image)).max() > 1e-3  # the windows matter


def published_slide(segmentor, image_1CHW, window):
    """The loops of the published evaluation of Cityscapes, image by image: windows are cut at the borders."""
    height, width = image_1CHW.shape[2:]
    total = np.zeros((4, height, width))
    row = 0
    while row < height:
        col = 0
        while col < width:
            crop = image_1CHW[:, :, row : row + window, col : col + window]
            total[:, row : row + window, col : col + window] += plain_softmax(segmentor, crop)[0]
            col += int(window * 2 / 3)
        row += int(window * 2 / 3)
    return total


@pytest.mark.parametrize(("height", "width", "window"), [(75, 131, 50), (64, 100, 36), (40, 90, 60), (50, 50, 60)])
def test_cut_windows_equal_the_published_loops(segmentor, height, width, window):
    image = images(2, 3, height, width)
    inference = SlidingWindowInference("slide", window, windows="cut")
    confidence, label = inference.confidence_and_label(segmentor, image)
    assert torch.equal(label, inference(segmentor, image).argmax(dim=1))
    for index in range(2):
        total = published_slide(segmentor, image[index : index + 1], window)
        expected = total / total.sum(0)
        np.testing.assert_allclose(inference(segmentor, image)[index].numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(confidence[index].numpy(), expected.max(0), atol=2e-5)
        differ = label[index].numpy() != total.argmax(0)
        assert (np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0][differ] < 1e-4).all()  # ties alone
    if height > window:
        inside = SlidingWindowInference("slide", window)(segmentor, image)
        assert (inference(segmentor, image) - inside).abs().max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(60, 60), (41, 60), (5, 9)])
def test_one_window_that_covers_the_image_is_the_whole_image(segmentor, height, width):
    image = images(1, 3, height, width)
    assert torch.equal(
        SlidingWindowInference("slide", window=60)(segmentor, image), SlidingWindowInference()(segmentor, image)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.data())
def test_windows_do_not_change_a_pixelwise_network(height, width, window, data):
    stride = data.draw(st.integers(max(window // 2, 1), window))
    image = images(2, 1, height, width)
    network = Pixelwise()
    inference = SlidingWindowInference("slide", window, stride, window_batch=64)
    torch.testing.assert_close(inference(network, image), SlidingWindowInference()(network, image))


def test_windows_of_all_images_share_forward_passes():
    network = Pixelwise()
    SlidingWindowInference("slide", window=40, stride=20, window_batch=4)(
        network, images(3, 1, 40, 80)
    )  # three windows each
    assert network.passes == [4, 4, 1]


def test_scales_and_flip_equal_a_plain_mean(segmentor):
    image, size = images(2, 3, 61, 83), (61, 83)
    scales = (0.6, 1.0, 1.7)
    views = []
    for scale in scales:
        height, width = round(61 * scale), round(83 * scale)
        scaled = torch.from_numpy(plain_resize(image, height, width)).float()
        views.append(plain_resize(plain_softmax(segmentor, scaled), *size))
        mirrored = plain_softmax(segmentor, torch.from_numpy(scaled.numpy()[..., ::-1].copy()))[..., ::-1]
        views.append(plain_resize(mirrored, *size))
    inferred = SlidingWindowInference(scales=scales, flip=True)(segmentor, image).numpy()
    np.testing.assert_allclose(inferred, np.mean(views, axis=0), atol=1e-4)
    assert np.abs(inferred - plain_softmax(segmentor, image)).max() > 1e-3


def test_scaled_images_are_inferred_in_windows(segmentor):
    image = images(1, 3, 50, 70)
    scaled = torch.from_numpy(plain_resize(image, 100, 140)).float()
    expected = plain_resize(plain_slide(segmentor, scaled, 60, 40), 50, 70)
    inferred = SlidingWindowInference("slide", window=60, stride=40, scales=(2.0,))(segmentor, image)
    np.testing.assert_allclose(inferred.numpy(), expected, atol=1e-4)


def test_with_flip_a_mirror_image_has_the_mirrored_prediction(segmentor):
    image, inference = images(1, 3, 50, 70), SlidingWindowInference(flip=True)
    once, mirrored = inference(segmentor, image), inference(segmentor, image.flip(-1))
    torch.testing.assert_close(once, mirrored.flip(-1))
    assert (SlidingWindowInference()(segmentor, image) - once).abs().max() > 1e-3


@pytest.mark.parametrize(
    "inference",
    [SlidingWindowInference(scales=(0.25, 2), flip=True), SlidingWindowInference("slide", 7, scales=(0.1, 1.0))],
)
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (3, 2)])
def test_tiny_images_have_probabilities_that_sum_to_one(segmentor, inference, size):
    probabilities = inference(segmentor, images(2, 3, *size))
    assert probabilities.shape == (2, 4, *size)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, *size))


def test_16_bit_images_keep_their_values_when_scaled():
    image = torch.randint(0, 65536, (1, 1, 40, 50), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    seen = []

    class Recorder(nn.Module):
        def forward(self, image_BCHW):
            seen.append(image_BCHW)
            return image_BCHW.float().repeat(1, 2, 1, 1)

    SlidingWindowInference(scales=(1.0, 2.0))(Recorder(), image)
    assert torch.equal(seen[0], image)
    np.testing.assert_allclose(seen[1].numpy(), plain_resize(image, 80, 100), rtol=1e-5)


def test_no_gradient_is_recorded(segmentor):
    assert not SlidingWindowInference("slide", window=40)(segmentor, images(1, 3, 50, 50)).requires_grad


def test_bf16_logits_become_float32_probabilities():
    class Half(Pixelwise):
        def forward(self, image_BCHW):
            return super().forward(image_BCHW).bfloat16()

    assert SlidingWindowInference("slide", window=40)(Half(), images(1, 1, 50, 50)).dtype == torch.float32


def test_the_default_stride_is_two_thirds_of_the_window():
    assert [SlidingWindowInference("slide", window=window).stride for window in (801, 321, 2, 1)] == [534, 214, 1, 1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"mode": "slid"}, "expected inference.mode as whole or slide, but got 'slid'. Did you mean slide?"),
        ({"mode": "slide"}, "expected inference.window with inference.mode=slide, but it is not set"),
        ({"mode": "slide", "window": 0}, "expected inference.window as a positive integer, but got 0"),
        ({"mode": "slide", "window": 8.0}, "expected inference.window as a positive integer, but got 8.0"),
        (
            {"mode": "slide", "window": 8, "stride": 9},
            "expected inference.stride of at most the window's 8 pixels, but got 9",
        ),
        ({"mode": "slide", "window": 8, "stride": 0}, "expected inference.stride as a positive integer, but got 0"),
        (
            {"window": 8},
            "expected inference.window and inference.stride with inference.mode=slide only, but got window=8",
        ),
        ({"window_batch": True}, "expected inference.window_batch as a positive integer, but got True"),
        ({"scales": ()}, "expected inference.scales as positive numbers"),
        ({"scales": (1.0, 0)}, "expected inference.scales as positive numbers"),
        ({"scales": (1.0, 1e30)}, "expected inference.scales as positive numbers up to 16"),
        ({"scales": "1.0"}, "expected inference.scales as positive numbers"),
        ({"scales": (math.inf,)}, "expected inference.scales as positive numbers"),
        ({"windows": "cuts"}, "expected inference.windows as inside or cut, but got 'cuts'. Did you mean cut?"),
        ({"flip": "yes"}, "expected inference.flip as true or false, but got 'yes'"),
    ],
)
def test_wrong_values_are_refused(values, sentence):
    with pytest.raises(UserError) as caught:
        SlidingWindowInference(**values)
    assert str(caught.value).startswith(sentence)


def test_a_single_scale_needs_no_list():
    assert SlidingWindowInference(scales=2).scales == (2.0,)
    assert SlidingWindowInference(scales=[0.5, 1]) == SlidingWindowInference(scales=(0.5, 1.0))
