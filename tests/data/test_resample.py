import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlpmatch_pl.data.transforms.resample import Span, resample_image, resample_mask

lengths, seeds = st.integers(1, 130), st.integers(0, 10**6)


@st.composite
def spans(draw):
    """Rows and columns of a crop of any image resized by 0.2 to 4, with slightly different factors."""
    found = []
    for old in (draw(lengths), draw(lengths)):
        new = max(
            round(old * draw(st.one_of(st.floats(0.2, 4), st.floats(0.97, 1.03)))), 1
        )  # factors near 1 are special
        start = draw(st.integers(0, new - 1))
        found.append(Span(old, new, start, draw(st.integers(1, new - start))))
    return tuple(found)


def noise(seed, rows, columns, channels=3, dtype=np.uint8):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (rows.old, columns.old, channels), dtype, endpoint=True)


def pil_crop(plane, rows, columns, method):
    """Resize one whole channel, then crop."""
    whole = Image.fromarray(plane).resize((columns.new, rows.new), method)
    return np.asarray(whole)[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]


def pil_bilinear(image, rows, columns):
    planes = [pil_crop(image[..., c], rows, columns, Image.Resampling.BILINEAR) for c in range(image.shape[2])]
    return np.stack(planes, axis=2)


@settings(max_examples=100, deadline=None)
@given(spans(), seeds)
def test_crops_of_noise_equal_those_of_a_whole_resize_by_pil_within_two_levels(crop, seed):
    image = noise(seed, *crop)
    difference = resample_image(image, *crop).astype(int) - pil_bilinear(image, *crop)
    assert np.abs(difference).max() <= 2  # black next to white, shifted by 1/256 of a pixel, is 1; rounding is 1


@settings(max_examples=100, deadline=None)
@given(spans(), seeds)
def test_crops_of_masks_equal_those_of_a_whole_resize_by_pil(crop, seed):
    mask = noise(seed, *crop, channels=1)[..., 0]
    assert (resample_mask(mask, *crop) == pil_crop(mask, *crop, Image.Resampling.NEAREST)).all()


def test_nearest_pixels_equal_pils_for_random_lengths():
    rng = np.random.default_rng(0)
    for _ in range(300):
        old, new = rng.integers(1, 2100, 2)
        line = np.arange(old, dtype=np.int32)[None]
        expected = np.asarray(Image.fromarray(line).resize((new, 1), Image.Resampling.NEAREST))[0]
        assert (Span(old, new, 0, new).nearest() == expected).all()


@settings(max_examples=40, deadline=None)
@given(spans(), seeds, st.sampled_from([1, 2, 4, 12]))
def test_every_channel_is_resampled_like_a_gray_image(crop, seed, channels):
    image = noise(seed, *crop, channels=channels)
    assert np.abs(resample_image(image, *crop).astype(int) - pil_bilinear(image, *crop)).max() <= 2


@settings(max_examples=40, deadline=None)
@given(spans(), seeds, st.sampled_from([1, 3, 12]))
def test_sixteen_bit_images_keep_their_precision(crop, seed, channels):
    image = noise(seed, *crop, channels=channels, dtype=np.uint16)
    result = resample_image(image, *crop)
    assert result.dtype == np.uint16
    difference = result - pil_bilinear(image.astype(np.float32), *crop)
    assert np.abs(difference).max() <= 2 * 65535 / 256 + 1
    assert np.abs(difference).mean() <= 65535 / 256  # one 8-bit level


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("new", [70, 100, 150])
def test_read_only_and_strided_images_are_accepted(dtype, new):
    rows, columns = Span(80, new, 5, 60), Span(90, new + 9, 3, 50)
    image = noise(0, rows, columns, dtype=dtype)
    expected = resample_image(image, rows, columns)
    apart = np.zeros((160, 90, 3), dtype)[::2]
    apart[:] = image
    for other in (apart, image.copy()):
        other.setflags(write=False)
        before = other.copy()
        assert (resample_image(other, rows, columns) == expected).all()
        assert (other == before).all()


@pytest.mark.filterwarnings("error")
def test_read_only_images_are_shrunk_without_a_warning():
    rows = columns = Span(100, 60, 10, 40)
    image = noise(0, rows, columns)
    image.setflags(write=False)
    resample_image(image, rows, columns)


@pytest.mark.parametrize("new", [512, 1500, 4096])
def test_pixels_far_from_the_crop_are_not_read(new):
    rows = columns = Span(2048, new, new // 2, 300)
    window, offset = rows.window()
    assert (window.stop - window.start) * new / 2048 < 300 + 300  # else nothing is saved
    assert offset >= 0
    image = np.random.default_rng(0).integers(0, 256, (2048, 2048, 1), dtype=np.uint8)
    expected = resample_image(image, rows, columns)
    changed = np.full_like(image, 255)
    changed[window, window] = image[window, window]
    assert (resample_image(changed, rows, columns) == expected).all()


def test_an_image_that_keeps_its_size_is_only_cropped():
    rows, columns = Span(30, 30, 4, 20), Span(40, 40, 7, 25)
    image = noise(0, rows, columns)
    assert (resample_image(image, rows, columns) == image[4:24, 7:32]).all()


def test_opencv_starts_no_threads_in_workers():
    assert cv2.getNumThreads() == 1
