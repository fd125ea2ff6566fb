import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlpmatch_pl.data.views import StrongView, WeakView
from mlpmatch_pl.errors import UserError

quick = settings(max_examples=60, deadline=None)
lengths = st.integers(1, 130)


def smooth(seed, height, width):
    """A random image without sharp edges, as photographs mostly are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def regions(seed, height, width, classes=4):
    return np.random.default_rng(seed).integers(0, classes, (height, width), dtype=np.uint8)


def reference(image, mask, rng, size, low=0.5, high=2.0, flip=0.5, ignore=255):
    """The published recipe in plain PIL: resize everything, pad at the right and bottom, crop, flip."""
    image, mask = Image.fromarray(image), Image.fromarray(mask)
    width, height = image.size
    long_side = max(width, height)
    target = rng.randint(int(long_side * low), int(long_side * high))
    if height > width:
        new_height, new_width = target, int(width * target / height + 0.5)
    else:
        new_width, new_height = target, int(height * target / width + 0.5)
    image = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR))
    mask = np.asarray(mask.resize((new_width, new_height), Image.Resampling.NEAREST))
    bottom, right = max(size - new_height, 0), max(size - new_width, 0)
    image = np.pad(image, ((0, bottom), (0, right), (0, 0)))
    mask = np.pad(mask, ((0, bottom), (0, right)), constant_values=ignore)
    y, x = rng.randint(0, image.shape[0] - size), rng.randint(0, image.shape[1] - size)
    image, mask = image[y : y + size, x : x + size], mask[y : y + size, x : x + size]
    if rng.random() < flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return image, mask


# Weak -----------------------------------------------------------------------------------------------------------------


@quick
@given(lengths, lengths, st.integers(33, 80), st.integers(0, 1000))
def test_weak_view_has_the_size_and_types_of_the_contract_for_any_image(height, width, size, seed):
    view, mask, valid = WeakView(size)(smooth(0, height, width), regions(0, height, width), random.Random(seed))
    assert (view.shape, mask.shape, valid.shape) == ((size, size, 3), (size, size), (size, size))
    assert (view.dtype, mask.dtype, valid.dtype) == (np.uint8, np.uint8, np.bool_)


@quick
@given(lengths, lengths, st.integers(33, 80), st.integers(0, 1000))
def test_mask_never_holds_invented_labels(height, width, size, seed):
    labels = np.random.default_rng(seed).choice([3, 90, 200, 255], (height, width)).astype(np.uint8)
    _, mask, valid = WeakView(size, ignore_index=254)(smooth(0, height, width), labels, random.Random(seed))
    assert set(np.unique(mask[valid])) <= set(np.unique(labels))
    assert (mask[~valid] == 254).all()


@quick
@given(lengths, lengths, st.integers(33, 80), st.sampled_from([0.0, 1.0]), st.integers(0, 1000))
def test_padding_is_at_the_right_and_bottom_before_the_flip(height, width, size, flip, seed):
    image, mask = np.full((height, width, 3), 9, np.uint8), np.zeros((height, width), np.uint8)
    view, labels, valid = WeakView(size, flip=flip)(image, mask, random.Random(seed))
    rows, columns = valid.any(1).sum(), valid.any(0).sum()
    expected = np.zeros((size, size), bool)
    expected[:rows, :columns] = True
    if flip:
        expected = expected[:, ::-1]
    assert (valid == expected).all()
    assert (view[valid] == 9).all()
    assert (view[~valid] == 0).all()
    assert (labels == np.where(valid, 0, 255)).all()


def test_an_unlabeled_view_has_no_labels_but_the_same_image_and_padding():
    image, mask = smooth(1, 50, 40), regions(1, 50, 40)
    for seed in range(20):
        view, labels, valid = WeakView(48)(image, None, random.Random(seed))
        other, _, valid_too = WeakView(48)(image, mask, random.Random(seed))
        assert (view == other).all()
        assert (valid == valid_too).all()
        assert (labels == np.where(valid, 0, 255)).all()


@quick
@given(st.integers(40, 120), st.integers(40, 120), st.integers(0, 1000), st.booleans())
def test_image_and_mask_take_the_same_way(height, width, seed, upright):
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 :] = 1
    mask[:, width // 2 :] ^= 1
    image = np.repeat((mask * 255)[..., None], 3, axis=2)
    if upright:
        image, mask = np.swapaxes(image, 0, 1).copy(), mask.T.copy()
    view, labels, valid = WeakView(64)(image, mask, random.Random(seed))
    pure = valid & ((view[..., 0] == 0) | (view[..., 0] == 255))  # elsewhere two classes are blended
    assert pure.sum() > 0.7 * valid.sum()
    assert (labels[pure] == view[pure][:, 0] // 255).all()


@pytest.mark.parametrize(("height", "width"), [(97, 131), (131, 97), (60, 60), (45, 200)])
def test_weak_view_equals_plain_resize_then_crop_of_the_same_draws(height, width):
    size, differences = 64, []
    for seed in range(60):
        image, mask = smooth(seed, height, width), regions(seed, height, width)
        view, labels, valid = WeakView(size)(image, mask, random.Random(seed))
        expected, expected_mask = reference(image, mask, random.Random(seed), size)
        assert (labels == expected_mask).all()  # bit for bit
        assert (expected[~valid] == 0).all()
        differences.append(np.abs(view.astype(int) - expected)[valid])
    assert max(difference.mean() for difference in differences) < 1
    assert max(difference.max() for difference in differences) <= 8


def test_weak_view_of_noise_is_antialiased_like_the_reference():
    rng = np.random.default_rng(0)
    for seed in range(30):
        image, mask = rng.integers(0, 256, (90, 140, 3), dtype=np.uint8), regions(seed, 90, 140)
        view, _, valid = WeakView(64)(image, mask, random.Random(seed))
        expected, _ = reference(image, mask, random.Random(seed), 64)
        assert np.abs(view.astype(int) - expected)[valid].mean() < 2.5


def located(size, scale, count=600):
    """Scale, offset and flip of many views, read off an image that holds its own coordinates."""
    height, width = 60, 100
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([2 * x, 4 * y, np.zeros_like(x)], axis=2).astype(np.uint8)
    found = []
    for seed in range(count):
        view, _, valid = WeakView(size, scale)(image, None, random.Random(seed))
        pixels = view.astype(float)[: valid.any(1).sum()][:, valid.any(0)]
        step = np.diff(pixels[2, 2:-2, 0]).mean() / 2  # source pixels a view pixel
        flipped = step < 0
        left, top = pixels[:, :, 0].min() / 2, pixels[:, :, 1].min() / 4
        found.append((1 / abs(step), left, top, flipped))
    return np.array(found).T


def test_scale_is_uniform_over_its_range():
    scale, *_ = located(64, (0.5, 2.0))
    assert scale.min() == pytest.approx(0.5, abs=0.05)
    assert scale.max() == pytest.approx(2.0, abs=0.05)
    counts, _ = np.histogram(scale, bins=5, range=(0.48, 2.02))
    assert abs(counts - 120).max() < 5 * np.sqrt(120 * 0.8)


def test_half_of_the_views_are_flipped_whatever_the_scale():
    scale, _, _, flipped = located(64, (0.5, 2.0))
    assert flipped.mean() == pytest.approx(0.5, abs=0.1)
    assert flipped[scale > 1.25].mean() == pytest.approx(flipped[scale <= 1.25].mean(), abs=0.15)


def test_crops_are_uniform_to_both_edges():
    _, left, top, _ = located(40, (1.0, 1.0))
    for offset, most in ((left, 60), (top, 20)):
        assert offset.min() == pytest.approx(0, abs=1)
        assert offset.max() == pytest.approx(most, abs=1)
        assert offset.mean() == pytest.approx(most / 2, abs=0.06 * most)
        assert offset.std() == pytest.approx(most / np.sqrt(12), rel=0.1)
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.15


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_can_be_switched_off_and_on(flip):
    image = smooth(3, 50, 50)
    for seed in range(10):
        view, *_ = WeakView(50, (1.0, 1.0), flip=flip)(image, None, random.Random(seed))
        assert (view == (image[:, ::-1] if flip else image)).all()


def test_weak_view_leaves_its_input_and_the_global_generators_alone():
    image, mask = smooth(0, 40, 40), regions(0, 40, 40)
    before, state = image.copy(), random.getstate()
    first = WeakView(48)(image, mask, random.Random(5))
    again = WeakView(48)(image, mask, random.Random(5))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (image == before).all()
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"crop_size": 32}, "expected loader.crop_size of at least 33 pixels, but got 32"),
        (
            {"crop_size": 64, "scale": (0.0, 1.0)},
            "expected loader.scale as 0 < low <= high and flip from 0 to 1, but got (0.0, 1.0) and 0.5",
        ),
        (
            {"crop_size": 64, "scale": (2.0, 1.0)},
            "expected loader.scale as 0 < low <= high and flip from 0 to 1, but got (2.0, 1.0) and 0.5",
        ),
        (
            {"crop_size": 64, "flip": 1.5},
            "expected loader.scale as 0 < low <= high and flip from 0 to 1, but got (0.5, 2.0) and 1.5",
        ),
    ],
)
def test_wrong_weak_options_are_refused(options, sentence):
    with pytest.raises(UserError) as caught:
        WeakView(**options)
    assert str(caught.value) == sentence


# Strong ---------------------------------------------------------------------------------------------------------------

OFF = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0}


def strong_views(strong, image, count=400):
    for seed in range(count):
        strong.reseed(seed)
        yield strong(image)


def test_strong_view_keeps_size_and_type_and_its_input():
    image = smooth(0, 40, 50)
    before = image.copy()
    for view in strong_views(StrongView(), image, 50):
        assert (view.shape, view.dtype) == (image.shape, np.uint8)
    assert (image == before).all()


def test_two_views_after_one_reseed_differ():
    strong, image = StrongView(jitter_p=1.0), smooth(0, 40, 50)
    for seed in range(20):
        strong.reseed(seed)
        assert (strong(image) != strong(image)).any()


def test_same_seed_gives_the_same_views_whatever_came_before():
    image, strong, other = smooth(0, 40, 50), StrongView(), StrongView()
    for seed in range(20):
        strong.reseed(seed)
        expected = [strong(image), strong(image)]
        strong(smooth(1, 20, 20))
        for again in (strong, other):
            again.reseed(seed)
            assert all((again(image) == view).all() for view in expected)


def test_different_seeds_give_different_views():
    found = {view.tobytes() for view in strong_views(StrongView(jitter_p=1.0), smooth(0, 40, 50), 50)}
    assert len(found) == 50


@pytest.mark.parametrize("options", [OFF, {**OFF, "jitter": (0, 0, 0, 0), "jitter_p": 1.0}])
def test_nothing_switched_on_is_the_identity(options):
    image = smooth(0, 40, 50)
    assert all((view == image).all() for view in strong_views(StrongView(**options), image, 30))


@pytest.mark.parametrize("key", ["jitter_p", "gray_p", "blur_p"])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.8, 1.0])
def test_every_transform_is_applied_as_often_as_asked(key, p):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    options = {**OFF, key: p, "blur_sigma": (1.0, 2.0)}
    changed = np.mean([(view != image).any() for view in strong_views(StrongView(**options), image)])
    assert changed == pytest.approx(p, abs=0.08)


def test_gray_views_have_three_equal_channels():
    for view in strong_views(StrongView(**{**OFF, "gray_p": 1.0}), smooth(0, 30, 30), 5):
        assert (view[..., :1] == view).all()


def test_blur_smooths_and_keeps_the_mean():
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for view in strong_views(StrongView(**{**OFF, "blur_p": 1.0}, blur_sigma=(1.5, 2.0)), image, 10):
        assert view.std() < 0.4 * image.std()
        assert view.mean() == pytest.approx(image.mean(), abs=2)


def test_transforms_are_drawn_independently_of_each_other():
    # Blur shows in noise, grey in equal channels; a flat colour jitter would hide neither.
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    strong = StrongView(jitter_p=0.0, gray_p=0.5, blur_p=0.5, blur_sigma=(1.5, 2.0))
    gray, blurred = np.array(
        [((view[..., :1] == view).all(), view[..., 0].std() < 40) for view in strong_views(strong, image, 600)]
    ).T
    assert gray.mean() == pytest.approx(0.5, abs=0.08)
    assert blurred.mean() == pytest.approx(0.5, abs=0.08)
    assert abs(np.corrcoef(gray, blurred)[0, 1]) < 0.15


def test_the_two_views_of_a_sample_are_drawn_independently():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    strong, pairs = StrongView(**{**OFF, "gray_p": 0.5}), []
    for seed in range(600):
        strong.reseed(seed)
        pairs.append([(strong(image)[..., 0] == image[..., 0]).all() for _ in range(2)])
    first, second = np.array(pairs).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_jitter_strength_bounds_the_change():
    image = np.full((16, 16, 3), 100, np.uint8)
    options = {**OFF, "jitter": (0.5, 0.0, 0.0, 0.0), "jitter_p": 1.0}
    levels = np.array([view.mean() for view in strong_views(StrongView(**options), image, 300)])
    assert levels.min() == pytest.approx(50, abs=4)
    assert levels.max() == pytest.approx(150, abs=4)
    assert levels.mean() == pytest.approx(100, abs=5)


@pytest.mark.parametrize(
    "jitter", [(0.5, 0.5, 0.5), (-0.1, 0, 0, 0), (1.5, 0, 0, 0), (0, 0, 0, 0.6), (0.1, 0.1, 0.1, 0.1, 0.1)]
)
def test_wrong_jitter_is_refused(jitter):
    with pytest.raises(UserError) as caught:
        StrongView(jitter=jitter)
    assert str(caught.value) == (
        "expected loader.strong.jitter as brightness, contrast and saturation from 0 to 1 and hue from 0 to 0.5, "
        f"but got {list(jitter)}"
    )


@pytest.mark.parametrize("options", [{"jitter_p": 2.0}, {"gray_p": 1.5}, {"blur_p": -0.1}])
def test_wrong_probabilities_are_refused(options):
    with pytest.raises(ValueError, match=r"\bp\b|probabilities"):
        StrongView(**options)


def test_construction_uses_no_argument_that_albumentations_does_not_know():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it only warns, and then ignores the argument
        StrongView()
        StrongView(jitter=(0.1, 0.2, 0.3, 0.4), jitter_p=0.1, gray_p=0.1, blur_sigma=(0.5, 1.0), blur_p=0.1)


def test_import_asks_no_network_and_switches_inner_threads_off():
    script = """
import os, socket
os.environ.pop("NO_ALBUMENTATIONS_UPDATE", None)
asked = []
socket.getaddrinfo = lambda *arguments, **options: asked.append(arguments) or []
import mlpmatch_pl.data.views as views
print(asked, os.environ["NO_ALBUMENTATIONS_UPDATE"], views.cv2.getNumThreads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[] 1 1"
