"""The confusion matrix and its scores against loops over pixels and against torchmetrics.

Letters: B images, C classes, H and W pixels; rows are the truth.
"""

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCohenKappa, MulticlassJaccardIndex

from mlpmatch_pl import UserError
from mlpmatch_pl.evaluation import ConfusionMatrix, Scores, confusion_matrix
from mlpmatch_pl.evaluation.confusion import check_absent, image_confusion_matrices

C = 5
ABSENT = 3  # neither in the truth nor in the prediction


def random_pair(seed=0, absent=None, mask_dtype=torch.uint8):
    rng = torch.Generator().manual_seed(seed)
    mask_BHW = torch.randint(0, C, (2, 7, 9), generator=rng)
    wrong_BHW = torch.rand(mask_BHW.shape, generator=rng) < 0.4
    prediction_BHW = mask_BHW.where(~wrong_BHW, torch.randint(0, C, mask_BHW.shape, generator=rng))
    if absent is not None:
        mask_BHW[mask_BHW == absent] = 0
        prediction_BHW[prediction_BHW == absent] = 0
    mask_BHW[torch.rand(mask_BHW.shape, generator=rng) < 0.2] = 255
    return prediction_BHW, mask_BHW.to(mask_dtype)


def plain_counts(prediction_BHW, mask_BHW):
    counts = np.zeros((C, C), dtype=np.int64)
    for truth, prediction in zip(mask_BHW.numpy().flat, prediction_BHW.numpy().flat, strict=True):
        if 0 <= truth < C:
            counts[truth, prediction] += 1
    return counts


def plain_scores(counts):
    """IoU, Dice and recall by class, and the accuracy; NaN where there is nothing to divide by."""
    iou, dice, recall = [], [], []
    for c in range(C):
        hit = int(counts[c, c])
        truth = sum(int(counts[c, k]) for k in range(C))
        predicted = sum(int(counts[k, c]) for k in range(C))
        union = truth + predicted - hit
        iou.append(hit / union if union else math.nan)
        dice.append(2 * hit / (truth + predicted) if union else math.nan)
        recall.append(hit / truth if truth else math.nan)
    return iou, dice, recall, sum(int(counts[c, c]) for c in range(C)) / int(counts.sum())


@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_a_loop(seed, mask_dtype):
    prediction, mask = random_pair(seed, mask_dtype=mask_dtype)
    counts_CC = confusion_matrix(prediction, mask, C)
    assert counts_CC.dtype == torch.int64
    np.testing.assert_array_equal(counts_CC.numpy(), plain_counts(prediction, mask))


@pytest.mark.parametrize("value", [-1, C, 200, 255])
def test_values_outside_the_classes_are_ignored(value):
    prediction, mask = random_pair(mask_dtype=torch.int64)
    assert confusion_matrix(prediction, torch.full_like(mask, value), C).sum() == 0
    mask[mask == 255] = value
    np.testing.assert_array_equal(confusion_matrix(prediction, mask, C).numpy(), plain_counts(prediction, mask))


@pytest.mark.parametrize("absent", [None, ABSENT])
@pytest.mark.parametrize("rule", ["exclude", "zero"])
def test_scores_equal_a_loop(absent, rule):
    counts = plain_counts(*random_pair(1, absent))
    iou, dice, recall, accuracy = plain_scores(counts)
    scores = Scores.of(torch.tensor(counts), rule)
    assert scores.iou_C.tolist() == pytest.approx(iou, nan_ok=True)
    assert scores.dice_C.tolist() == pytest.approx(dice, nan_ok=True)
    assert scores.recall_C.tolist() == pytest.approx(recall, nan_ok=True)
    assert scores.support_C.tolist() == counts.sum(axis=1).tolist()
    assert scores.accuracy == pytest.approx(accuracy)
    assert math.isnan(iou[ABSENT]) == (absent is not None)
    for mean, values in ((scores.miou, iou), (scores.dice, dice)):
        present = [value for value in values if not math.isnan(value)]
        assert mean == pytest.approx(sum(present) / (C if rule == "zero" else len(present)))


@pytest.mark.parametrize("absent", [None, ABSENT])
def test_kappa_and_frequency_weighted_iou_equal_a_loop_over_pixels(absent):
    prediction, mask = random_pair(4, absent)
    scores = Scores.of(confusion_matrix(prediction, mask, C))
    pixels = [
        (truth, guess) for truth, guess in zip(mask.flatten().tolist(), prediction.flatten().tolist(), strict=True)
        if truth != 255
    ]  # fmt: skip
    agreed = sum(truth == guess for truth, guess in pixels) / len(pixels)
    by_chance, weighted = 0.0, 0.0
    for c in range(C):
        true, guessed = (sum(pair[side] == c for pair in pixels) for side in (0, 1))
        either, both = (sum(test(truth == c, guess == c) for truth, guess in pixels) for test in (max, min))
        by_chance += true / len(pixels) * guessed / len(pixels)
        weighted += true / len(pixels) * both / either if true else 0
    assert scores.kappa == pytest.approx((agreed - by_chance) / (1 - by_chance))
    assert scores.fw_iou == pytest.approx(weighted)


@pytest.mark.parametrize("seed", range(2))
def test_kappa_equals_torchmetrics(seed):
    prediction, mask = random_pair(seed, mask_dtype=torch.int64)
    reference = MulticlassCohenKappa(C, ignore_index=255, validate_args=False)(prediction, mask)
    assert Scores.of(confusion_matrix(prediction, mask, C)).kappa == pytest.approx(reference.item(), abs=1e-6)


def test_kappa_of_random_guesses_is_zero_and_of_a_single_class_undefined():
    assert Scores.of(torch.tensor([[4, 4], [4, 4]])).kappa == 0
    assert math.isnan(Scores.of(torch.tensor([[7, 0], [0, 0]])).kappa)


def test_matrices_per_image_are_those_of_single_images():
    prediction, mask = random_pair(2)
    matrices_BCC = image_confusion_matrices(prediction, mask, C)
    assert matrices_BCC.dtype == torch.int64
    for one, guess, truth in zip(matrices_BCC, prediction, mask, strict=True):
        np.testing.assert_array_equal(one.numpy(), plain_counts(guess[None], truth[None]))


def test_class_that_is_only_predicted_scores_zero():
    scores = Scores.of(torch.tensor([[2, 1], [0, 0]]))
    assert scores.iou_C.tolist() == pytest.approx([2 / 3, 0])
    assert scores.miou == pytest.approx(1 / 3)
    assert math.isnan(scores.recall_C[1])


@pytest.mark.parametrize("absent", [None, ABSENT])
@pytest.mark.parametrize("seed", range(3))
def test_iou_equals_torchmetrics(seed, absent):
    reference = MulticlassJaccardIndex(C, ignore_index=255, average="none", validate_args=False)
    metric = ConfusionMatrix(C)
    for batch in range(3):
        prediction, mask = random_pair(10 * seed + batch, absent, torch.int64)
        metric.update(prediction, mask)
        reference.update(prediction, mask)
    iou_C = Scores.of(metric.compute()).iou_C.nan_to_num(0)  # torchmetrics counts absent classes zero
    torch.testing.assert_close(iou_C, reference.compute().double(), rtol=1e-6, atol=1e-7)


def test_counts_beyond_32_bits_stay_exact():
    metric = ConfusionMatrix(2)
    metric.counts_CC += torch.tensor([[2**31 - 1, 1], [2**53, 3]])
    metric.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, dtype=torch.uint8))
    assert metric.compute().dtype == torch.int64
    assert metric.compute().tolist() == [[2**31 + 3, 1], [2**53, 3]]


def test_scores_are_computed_in_float64():
    scores = Scores.of(torch.tensor([[2**31, 1], [0, 1]]))
    assert scores.iou_C.dtype == torch.float64
    assert scores.iou_C[0].item() == 2**31 / (2**31 + 1)
    assert scores.accuracy < 1


def test_metric_accumulates_over_batches_and_resets():
    pairs, metric = [random_pair(seed) for seed in range(3)], ConfusionMatrix(C)
    for pair in pairs:
        metric.update(*pair)
    np.testing.assert_array_equal(metric.compute().numpy(), sum(plain_counts(*pair) for pair in pairs))
    metric.reset()
    assert metric.compute().sum() == 0
    metric.update(*pairs[0])
    np.testing.assert_array_equal(metric.compute().numpy(), plain_counts(*pairs[0]))


def test_computed_counts_do_not_change_with_the_next_epoch():
    metric = ConfusionMatrix(C)
    metric.update(*random_pair(0))
    counts_CC = metric.compute()
    before = counts_CC.clone()
    metric.reset()
    metric.update(*random_pair(1))
    assert torch.equal(counts_CC, before)


def test_names_of_scores():
    scores = Scores.of(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])).as_dict(["sky", "road", "tree"])
    assert scores == pytest.approx(
        {"miou": 0.775, "acc": 7 / 8, "dice": (6 / 7 + 8 / 9) / 2, "iou/sky": 0.75, "iou/road": 0.8}
    )


def test_without_pixels_there_are_no_scores():
    assert Scores.of(torch.zeros(2, 2, dtype=torch.long)).as_dict(["a", "b"]) == {}


def test_unknown_rule_for_absent_classes_is_refused():
    assert [check_absent(rule) for rule in ("exclude", "zero")] == ["exclude", "zero"]
    with pytest.raises(UserError, match="absent as exclude or zero, but got 'drop'"):
        check_absent("drop")
