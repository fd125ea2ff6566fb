import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks.loader_reference import strong_view as reference_strong_view
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.utils.errors import UserError

# The published pipeline in PIL and torchvision.

OFF = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0}


def smooth(seed, height, width):
    """A random image without sharp edges, as photographs mostly are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def strong_views(strong, image, count=400):
    for seed in range(count):
        yield strong(image, random.Random(seed))


def test_strong_view_keeps_size_and_type_and_its_input():
    image = smooth(0, 40, 50)
    before = image.copy()
    for view in strong_views(StrongView(), image, 50):
        assert (view.shape, view.dtype) == (image.shape, np.uint8)
    assert (image == before).all()


def test_two_views_from_one_generator_differ():
    strong, image = StrongView(jitter_p=1.0), smooth(0, 40, 50)
    for seed in range(20):
        rng = random.Random(seed)
        assert (strong(image, rng) != strong(image, rng)).any()


@pytest.mark.parametrize("extra", [(), [{"name": "GaussNoise", "p": 0.7}, {"name": "RandomGamma", "p": 0.7}]])
def test_same_seed_gives_the_same_views_whatever_came_before(extra):
    image, strong, other = smooth(0, 40, 50), StrongView(extra=extra), StrongView(extra=extra)
    for seed in range(20):
        rng = random.Random(seed)
        expected = [strong(image, rng), strong(image, rng)]
        strong(smooth(1, 20, 20), random.Random(seed + 1))
        np.random.seed(seed)  # noqa: NPY002  global generators do not matter
        random.seed(seed)
        for again in (strong, other):
            rng = random.Random(seed)
            assert all((again(image, rng) == view).all() for view in expected)


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
    # Blur shows in noise, gray in equal channels; a flat color jitter would hide neither.
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
        rng = random.Random(seed)
        pairs.append([(strong(image, rng)[..., 0] == image[..., 0]).all() for _ in range(2)])
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


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, np.uint8), (4, np.uint8), (12, np.uint8), (3, np.uint16), (1, np.uint16)]
)
def test_any_channels_and_both_depths_are_changed_and_keep_their_type(channels, dtype):
    top = np.iinfo(dtype).max
    image = np.random.default_rng(0).integers(0, top, (30, 40, channels), dtype)
    image.setflags(write=False)
    changed = 0
    for view in strong_views(StrongView(), image, 40):
        assert (view.shape, view.dtype) == (image.shape, dtype)
        changed += (view != image).any()
    assert changed > 30


def test_images_that_are_not_rgb_keep_the_order_of_the_draws():
    # Gray is drawn, too, so that blur is as frequent as in RGB.
    strong = StrongView(jitter_p=0.0, gray_p=0.5, blur_p=0.5, blur_sigma=(1.0, 2.0))
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    assert np.mean([(view != image).any() for view in strong_views(strong, image)]) == pytest.approx(0.5, abs=0.08)


# Statistics, beside torchvision on PIL images -------------------------------------------------------------------------


def statistics(views):
    """Mean, contrast, saturation, hue and sharpness of each view."""
    found = []
    for view in views:
        pixels = view.astype(np.float32) / 255
        high, low = pixels.max(axis=2), pixels.min(axis=2)
        hue = pixels.mean(axis=(0, 1))
        edges = np.abs(np.diff(pixels, axis=1)).mean() / (pixels.std() + 1e-3)
        found.append((pixels.mean(), pixels.std(), (high - low).mean(), hue[0] - hue[2], edges))
    return dict(
        zip(("mean", "contrast", "saturation", "red against blue", "sharpness"), np.array(found).T, strict=True)
    )


def photograph():
    """Something like a photograph: smooth regions with texture, more red than blue, neither dark nor light."""
    noise = np.random.default_rng(5).normal(0, 12, (48, 56, 3))
    return (smooth(4, 48, 56) * 0.6 * np.array([1.2, 1.0, 0.6]) + 40 + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def both():
    image, count = photograph(), 1500
    own = statistics(strong_views(StrongView(), image, count))
    state = random.getstate()
    random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = statistics(np.asarray(reference_strong_view(Image.fromarray(image))) for _ in range(count))
    random.setstate(state)
    return own, expected


@pytest.mark.parametrize("what", ["mean", "contrast", "saturation", "red against blue", "sharpness"])
def test_colours_are_distributed_as_in_the_reference(both, what):
    own, expected = (found[what] for found in both)
    # Views that nothing was drawn for are all alike; rounding must not tell them apart.
    assert stats.ks_2samp(own.round(2), expected.round(2)).pvalue > 0.001
    assert own.mean() == pytest.approx(expected.mean(), abs=4 * expected.std() / np.sqrt(len(own) / 2))
    assert own.std() == pytest.approx(expected.std(), rel=0.1)


# Transforms of albumentations -----------------------------------------------------------------------------------------


def test_extra_transforms_come_after_the_built_in_ones_in_order():
    image = smooth(0, 40, 50)
    extra = [{"name": "InvertImg", "p": 1.0}, {"name": "Solarize", "threshold_range": (0.5, 0.5), "p": 1.0}]
    view = StrongView(**OFF, extra=extra)(image, random.Random(0))
    inverted = 255 - image.astype(int)
    threshold = view[inverted < 127]
    assert (threshold == inverted[inverted < 127]).all()
    assert (view[inverted > 128] == 255 - inverted[inverted > 128]).all()


def test_extra_transforms_have_their_own_probability():
    image = smooth(0, 20, 20)
    strong = StrongView(**OFF, extra=[{"name": "InvertImg", "p": 0.3}])
    changed = np.mean([(view != image).any() for view in strong_views(strong, image)])
    assert changed == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "RandomGama"}, r"a pixel transform of albumentations .* got 'RandomGama'\. Did you mean RandomGamma"),
        ({"gamma_limit": 3}, r"a pixel transform of albumentations .* got None"),
        ({"name": "HorizontalFlip"}, r"a pixel transform of albumentations .* got 'HorizontalFlip'"),
        ({"name": "RandomGamma", "gama": 3}, r"expected the arguments gamma_limit, .* for RandomGamma .* got gama"),
        ({"name": "RandomGamma", "p": 7}, r"RandomGamma refuses them: "),
    ],
)
def test_wrong_extra_transforms_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        StrongView(extra=[options])
    assert "\n" not in str(caught.value)


def test_extra_transforms_refuse_sixteen_bits_and_changes_of_type():
    with pytest.raises(UserError, match=r"expected 8-bit images for loader\.strong\.extra, but got uint16"):
        StrongView(extra=[{"name": "InvertImg"}])(np.zeros((8, 8, 3), np.uint16), random.Random(0))
    strong = StrongView(extra=[{"name": "ToFloat", "p": 1.0}])
    with pytest.raises(UserError, match=r"to keep images of \(8, 8, 3\) uint8, but they became \(8, 8, 3\) float32"):
        strong(np.zeros((8, 8, 3), np.uint8), random.Random(0))


def test_extra_transforms_reach_spawned_workers():
    strong = StrongView(extra=[{"name": "RandomGamma", "p": 1.0}])
    image = smooth(0, 20, 20)
    again = pickle.loads(pickle.dumps(strong))
    assert (again(image, random.Random(3)) == strong(image, random.Random(3))).all()


def run(script):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_albumentations_is_imported_only_when_asked_for_and_then_asks_no_network():
    script = """
import os, socket, sys
os.environ.pop("NO_ALBUMENTATIONS_UPDATE", None)
asked = []
socket.getaddrinfo = lambda *arguments, **options: asked.append(arguments) or []
from mlpmatch_pl.data.transforms.strong import StrongView
StrongView()
print("albumentations" in sys.modules)
StrongView(extra=[{"name": "RandomGamma"}])
print(asked, os.environ["NO_ALBUMENTATIONS_UPDATE"], "albumentations" in sys.modules)
"""
    assert run(script).split("\n") == ["False", "[] 1 True", ""]


def test_import_switches_inner_threads_off():
    assert run("import mlpmatch_pl.data.dataset, cv2; print(cv2.getNumThreads())").strip() == "1"
