import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from benchmarks.loader_reference import weak_view as reference_weak_view
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.utils.errors import UserError

quick = settings(max_examples=30, deadline=None)
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


@quick
@given(lengths, lengths, st.integers(33, 80), st.integers(0, 1000))
def test_views_of_any_image_have_the_documented_shapes_and_types(height, width, size, seed):
    view, mask, valid = WeakView(size)(smooth(0, height, width), regions(0, height, width), random.Random(seed))
    assert (view.shape, mask.shape, valid.shape) == ((size, size, 3), (size, size), (size, size))
    assert (view.dtype, mask.dtype, valid.dtype) == (np.uint8, np.uint8, np.bool_)


@quick
@given(lengths, lengths, st.integers(33, 80), st.integers(0, 1000))
def test_resized_masks_contain_no_new_labels(height, width, size, seed):
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


@pytest.mark.parametrize(("height", "width"), [(40, 120), (75, 75), (101, 58)])
def test_image_and_mask_are_transformed_alike(height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 :] = 1
    mask[:, width // 2 :] ^= 1
    image = np.repeat((mask * 255)[..., None], 3, axis=2)
    for seed in range(20):
        view, labels, valid = WeakView(64)(image, mask, random.Random(seed))
        pure = valid & ((view[..., 0] == 0) | (view[..., 0] == 255))  # elsewhere two classes are blended
        assert pure.sum() > 0.7 * valid.sum()
        assert (labels[pure] == view[pure][:, 0] // 255).all()


@pytest.mark.parametrize(("height", "width"), [(97, 131), (131, 97), (60, 60), (45, 200)])
def test_views_equal_those_of_resizing_and_cropping_with_the_same_draws(height, width):
    size, differences = 64, []
    for seed in range(40):
        image, mask = smooth(seed, height, width), regions(seed, height, width)
        view, labels, valid = WeakView(size)(image, mask, random.Random(seed))
        expected, expected_mask = reference(image, mask, random.Random(seed), size)
        assert (labels == expected_mask).all()  # bit for bit
        assert (expected[~valid] == 0).all()
        differences.append(np.abs(view.astype(int) - expected)[valid])
    assert max(difference.mean() for difference in differences) < 0.5
    assert max(difference.max() for difference in differences) <= 2


def test_views_of_noise_are_antialiased_as_in_the_reference():
    rng = np.random.default_rng(0)
    for seed in range(20):
        image, mask = rng.integers(0, 256, (90, 140, 3), dtype=np.uint8), regions(seed, 90, 140)
        view, _, valid = WeakView(64)(image, mask, random.Random(seed))
        expected, _ = reference(image, mask, random.Random(seed), 64)
        assert np.abs(view.astype(int) - expected)[valid].max() <= 2


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (4, np.uint8), (3, np.uint16), (12, np.uint16)])
def test_views_keep_the_number_of_channels_and_the_type(channels, dtype):
    top, seen = np.iinfo(dtype).max, 0
    image = np.random.default_rng(0).integers(0, top, (60, 90, channels), dtype)
    image.setflags(write=False)
    for seed in range(20):
        view, labels, valid = WeakView(64)(image, None, random.Random(seed))
        assert (view.shape, view.dtype, labels.shape) == ((64, 64, channels), dtype, (64, 64))
        assert (view[~valid] == 0).all()
        seen = max(seen, int(view.max()))
    assert seen > 0.8 * top


# Distributions, beside the published pipeline in PIL ------------------------------------------------------------------

COUNT, ALPHA = 800, 0.001  # seeds are fixed; a correct view would fail for one in a thousand choices of them


def measured(views, size):
    """Infer scale, offsets, flip and padding from views of an image whose values are its coordinates."""
    found = []
    for view, valid in views:
        pixels = view.astype(float)[: valid.any(1).sum()][:, valid.any(0)]
        step = np.diff(pixels[2, 2:-2, 0]).mean() / 2  # source pixels per pixel of the view
        left, top = pixels[:, :, 0].min() / 2, pixels[:, :, 1].min() / 4
        found.append((1 / abs(step), left, top, step < 0, (~valid).sum() / size**2))
    return dict(zip(("scale", "left", "top", "flipped", "padding"), np.array(found).T, strict=True))


def coordinates(height=60, width=100):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([2 * x, 4 * y, np.zeros_like(x)], axis=2).astype(np.uint8)


def own_views(size, count=COUNT, scale=(0.5, 2.0)):
    for seed in range(count):
        view, _, valid = WeakView(size, scale)(coordinates(), None, random.Random(seed))
        yield view, valid


def reference_views(size, count=COUNT):
    image = Image.fromarray(coordinates())
    for seed in range(count):
        random.seed(10**6 + seed)
        view, mask = reference_weak_view(image, Image.new("L", image.size), size, 254)
        yield np.asarray(view), np.asarray(mask) != 254


@pytest.fixture(scope="module", params=[40, 72])
def both(request):
    """Views smaller than every resized image, and views that are padded half of the time."""
    state = random.getstate()
    found = measured(own_views(request.param), request.param), measured(reference_views(request.param), request.param)
    random.setstate(state)
    return found


@pytest.mark.parametrize("what", ["scale", "left", "top", "padding"])
def test_scale_crop_and_padding_are_distributed_as_in_the_reference(both, what):
    own, expected = both
    assert stats.ks_2samp(own[what], expected[what]).pvalue > ALPHA


@pytest.mark.parametrize("what", ["left", "top", "padding"])
def test_crop_and_padding_depend_on_the_scale_as_in_the_reference(both, what):
    own, expected = (views[what][views["scale"] > 1.3] for views in both)
    assert stats.ks_2samp(own, expected).pvalue > ALPHA


def test_flips_are_as_frequent_as_in_the_reference_whatever_the_scale(both):
    for large in (True, False):
        tables = [np.bincount(views["flipped"][(views["scale"] > 1.25) == large].astype(int)) for views in both]
        assert stats.chi2_contingency(tables).pvalue > ALPHA
        assert stats.binomtest(int(tables[0][1]), int(tables[0].sum())).pvalue > ALPHA


def test_scale_is_uniform_over_its_range():
    scale = measured(own_views(64), 64)["scale"]
    assert stats.kstest(scale, stats.uniform(0.5, 1.5).cdf).pvalue > ALPHA
    assert scale.min() == pytest.approx(0.5, abs=0.05)
    assert scale.max() == pytest.approx(2.0, abs=0.05)


def test_crops_are_uniform_to_both_edges_and_independent_of_each_other():
    views = measured(own_views(40, scale=(1.0, 1.0)), 40)
    for offset, most in ((views["left"], 60), (views["top"], 20)):
        counts = np.bincount(offset.round().astype(int), minlength=most + 1)
        assert len(counts) == most + 1
        assert stats.chisquare(counts).pvalue > ALPHA
    assert abs(np.corrcoef(views["left"], views["top"])[0, 1]) < 0.15


def test_the_comparison_of_distributions_detects_another_scale(both):
    own = measured(own_views(40, count=300, scale=(0.7, 1.8)), 40)["scale"]
    assert stats.ks_2samp(own, both[1]["scale"]).pvalue < ALPHA


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_can_be_switched_off_and_on(flip):
    image = smooth(3, 50, 50)
    for seed in range(10):
        view, *_ = WeakView(50, (1.0, 1.0), flip=flip)(image, None, random.Random(seed))
        assert (view == (image[:, ::-1] if flip else image)).all()


def test_input_and_global_generators_are_not_changed():
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
        ({"crop_size": 32}, "expected loader.crop_size from 33 to 8192 pixels, but got 32"),
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
