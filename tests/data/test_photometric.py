"""Single operations beside torchvision's on PIL images: colors at random, and a picture with smooth ones."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from mlpmatch_pl.data.transforms import photometric

NOISE = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE[:6, :7]).resize((90, 80), Image.Resampling.BICUBIC))
COLORFUL = ("adjust_saturation", "adjust_hue", "to_gray")


def both(name, image, *arguments):
    """The operation, and torchvision's, as integers."""
    theirs = getattr(F, "rgb_to_grayscale" if name == "to_gray" else name)
    expected = theirs(Image.fromarray(image), *((3,) if name == "to_gray" else arguments))
    return getattr(photometric, name)(image, *arguments).astype(int), np.asarray(expected).astype(int)


@pytest.mark.parametrize("image", [NOISE, SMOOTH])
@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 0.61, 0.73, 1.0, 1.28, 1.43, 1.5])
def test_brightness_contrast_and_saturation_equal_torchvisions_within_one_level(image, name, factor):
    result, expected = both(name, image, factor)
    assert np.abs(result - expected).max() <= 1
    if factor % 0.5:  # elsewhere many values lie just between two levels
        assert abs((result - expected).mean()) < 0.15


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.73, 1.0, 1.28, 1.5])
def test_brightness_equals_torchvisions_exactly_and_one_changes_nothing(factor):
    result, expected = both("adjust_brightness", NOISE, factor)
    assert (result == expected).all()


@pytest.mark.parametrize("image", [NOISE, SMOOTH])
def test_gray_equals_torchvisions_within_one_level(image):
    result, expected = both("to_gray", image)
    assert np.abs(result - expected).max() <= 1
    assert (result == result[..., :1]).all()


@pytest.mark.parametrize("shift", [-0.25, -0.11, 0.07, 0.2, 0.25])
def test_hue_equals_torchvisions_but_for_rounding(shift):
    for image, mean, most in ((NOISE, 1.3, 12), (SMOOTH, 1.3, 12)):
        result, expected = both("adjust_hue", image, shift)
        assert np.abs(result - expected).mean() < mean
        assert np.abs(result - expected).max() <= most
        assert abs((result - expected).mean()) < 0.7


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_blur_is_near_pils(sigma):
    for image, mean in ((SMOOTH, 0.6), (NOISE, 1.4)):
        expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))).astype(int)
        difference = photometric.gaussian_blur(image, sigma) - expected
        assert np.abs(difference).mean() < mean
        assert abs(difference.mean()) < 0.6


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.3, 2.0])
def test_blur_spreads_a_point_by_sigma(sigma):
    point = np.zeros((41, 41, 1), np.uint16)
    point[20, 20] = 65535
    spread = photometric.gaussian_blur(point, sigma)[..., 0].astype(float)
    assert spread.sum() == pytest.approx(65535, rel=0.01)
    variance = (spread.sum(axis=0) * (np.arange(41) - 20) ** 2).sum() / spread.sum()
    exact = np.exp(-0.5 * ((np.arange(41) - 20) / sigma) ** 2)
    assert variance == pytest.approx((exact * (np.arange(41) - 20) ** 2).sum() / exact.sum(), rel=0.12)


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue", "to_gray"])
def test_sixteen_bits_give_what_eight_bits_give_but_finer(name):
    image = NOISE.astype(np.uint16) * 257  # the same brightness
    amounts = {"adjust_hue": [0.2], "to_gray": []}.get(name, [1.3])
    coarse = getattr(photometric, name)(NOISE, *amounts).astype(float)
    fine = getattr(photometric, name)(image, *amounts)
    assert fine.dtype == np.uint16
    difference = np.abs(fine / 257 - coarse)
    assert difference.max() <= (12 if name == "adjust_hue" else 1.5)
    assert difference.mean() < (1.2 if name == "adjust_hue" else 0.8)


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_other_numbers_of_channels_are_treated_one_by_one(channels, dtype):
    top = np.iinfo(dtype).max
    image = np.random.default_rng(1).integers(0, top, (20, 30, channels), dtype)
    for channel in range(channels):
        plane = image[..., channel].astype(float)
        mean = np.floor(plane.mean() + 0.5)
        expected = {"adjust_brightness": plane * 1.4, "adjust_contrast": mean + 1.4 * (plane - mean)}
        for name, values in expected.items():
            result = getattr(photometric, name)(image, 1.4)[..., channel]
            assert np.abs(result - values.clip(0, top)).max() <= 1.01
        blurred = photometric.gaussian_blur(image, 1.1)[..., channel]
        alone = photometric.gaussian_blur(np.ascontiguousarray(image[..., channel : channel + 1]), 1.1)[..., 0]
        assert np.abs(blurred.astype(int) - alone).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_read_only_and_strided_images_are_left_alone(channels, dtype):
    whole = np.random.default_rng(2).integers(0, 255, (40, 50, channels)).astype(dtype)
    part = whole[5:30, 7:40]
    part.setflags(write=False)
    before = whole.copy()
    for name in ("adjust_brightness", "adjust_contrast", "gaussian_blur", *(COLORFUL if channels == 3 else ())):
        arguments = () if name == "to_gray" else (0.4,)
        operation = getattr(photometric, name)
        result = operation(part, *arguments)
        assert (result.shape, result.dtype) == (part.shape, dtype)
        again = operation(part.copy(), *arguments).astype(int)  # other loops of OpenCV: one of 65,536 levels
        assert np.abs(result - again).max() <= (dtype == np.uint16)
        assert (whole == before).all()
