"""Boundary IoU against erosions pixel by pixel.

Letters: B images, C classes, H and W pixels.
"""

import math

import cv2
import numpy as np
import pytest
import torch

from mlpmatch_pl import UserError
from mlpmatch_pl.evaluation.boundary import boundary_counts, boundary_iou, boundary_width, near_outline

C = 4


def blobs(seed, height, width, batch=2, ignored=True):
    """Label maps of a few rectangles, and predictions that are shifted and spotted."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((batch, height, width), np.int64)
    for image in mask:
        for _ in range(5):
            y, x = rng.integers(0, height), rng.integers(0, width)
            image[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = rng.integers(0, C)
    prediction = np.roll(mask, (1, 2), (1, 2))
    prediction = np.where(rng.random(mask.shape) < 0.02, rng.integers(0, C, mask.shape), prediction)
    if ignored:
        mask[rng.random(mask.shape) < 0.03] = 255
    return torch.from_numpy(prediction), torch.from_numpy(mask)


def plain_band(region, distance):
    """Pixels of a region that are within the distance of a pixel that is not in it; none is outside of the image."""
    height, width = region.shape
    band = np.zeros_like(region)
    for y, x in zip(*np.nonzero(region), strict=True):
        for dy in range(-distance, distance + 1):
            for dx in range(-distance, distance + 1):
                inside = 0 <= y + dy < height and 0 <= x + dx < width
                if not inside or not region[y + dy, x + dx]:
                    band[y, x] = True
    return band


def plain_counts(prediction_BHW, mask_BHW, share):
    counts = np.zeros((3, C), np.int64)
    for prediction, mask in zip(prediction_BHW.numpy(), mask_BHW.numpy(), strict=True):
        distance = max(1, round(share * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
        for c in range(C):
            truth = plain_band(mask == c, distance)
            predicted = plain_band((prediction == c) & (mask < C), distance)
            counts[:, c] += truth.sum(), predicted.sum(), (truth & predicted).sum()
    return counts


@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize(("height", "width"), [(17, 23), (30, 12), (1, 9), (1, 1)])
def test_counts_equal_a_search_around_each_pixel(height, width, share):
    prediction, mask = blobs(height, height, width)
    counts = boundary_counts(prediction, mask.to(torch.uint8), C, share)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), plain_counts(prediction, mask, share))


@pytest.mark.parametrize("distance", [1, 3, 8])
def test_the_band_is_what_3x3_erosions_remove(distance):
    _, mask = blobs(3, 60, 45, batch=1, ignored=False)
    near = near_outline(mask, distance)[0].numpy()
    for c in range(C):
        region = np.pad((mask[0].numpy() == c).astype(np.uint8), 1)
        eroded = cv2.erode(region, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
        np.testing.assert_array_equal(near & (mask[0].numpy() == c), region[1:-1, 1:-1].astype(bool) & (eroded == 0))


def test_iou_is_that_of_the_sets_of_pixels_near_the_outlines():
    prediction, mask = blobs(5, 24, 31, batch=1)
    iou = boundary_iou(boundary_counts(prediction, mask, C, 0.05))
    distance = round(0.05 * math.hypot(24, 31))
    for c in range(C):
        truth = set(zip(*np.nonzero(plain_band(mask[0].numpy() == c, distance)), strict=True))
        own = (prediction[0].numpy() == c) & (mask[0].numpy() < C)
        predicted = set(zip(*np.nonzero(plain_band(own, distance)), strict=True))
        assert iou[c].item() == pytest.approx(len(truth & predicted) / len(truth | predicted))


def test_a_perfect_prediction_scores_one_despite_ignored_bands():
    _, mask = blobs(1, 40, 50)
    mask[:, 10:13] = 255
    guess = torch.where(mask == 255, torch.ones_like(mask), mask)
    iou = boundary_iou(boundary_counts(guess, mask, C))
    assert iou[~iou.isnan()].tolist() == [1.0] * int((~iou.isnan()).sum())


def test_a_shift_lowers_boundary_iou_more_than_iou():
    mask = torch.zeros(1, 100, 100, dtype=torch.long)
    mask[:, 20:80, 20:80] = 1
    shifted = mask.roll(2, 2)
    area = ((mask == 1) & (shifted == 1)).sum() / ((mask == 1) | (shifted == 1)).sum()
    assert boundary_iou(boundary_counts(shifted, mask, 2))[1] < area - 0.3


def test_absent_classes_have_no_score_and_wrongly_predicted_ones_score_zero():
    mask = torch.zeros(1, 20, 20, dtype=torch.long)
    prediction = mask.clone()
    prediction[:, :5] = 1
    iou = boundary_iou(boundary_counts(prediction, mask, 3))
    assert iou[1] == 0
    assert iou[2].isnan()


def test_counts_of_a_batch_are_the_sum_of_its_images():
    prediction, mask = blobs(8, 33, 21, batch=3)
    single = [boundary_counts(prediction[i : i + 1], mask[i : i + 1], C) for i in range(3)]
    assert torch.equal(boundary_counts(prediction, mask, C), torch.stack(single).sum(0))


def test_the_distance_is_two_percent_of_the_diagonal():
    assert [boundary_width(3, 4), boundary_width(300, 400), boundary_width(360, 480, 0.01)] == [1, 10, 6]


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 2])
def test_a_distance_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match="boundary as a share of the diagonal"):
        boundary_width(10, 10, wrong)
