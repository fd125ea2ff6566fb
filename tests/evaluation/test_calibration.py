import numpy as np
import pytest
import torch

from mlpmatch_pl.evaluation.calibration import BINS, CalibrationError, MiouEstimate, temper
from mlpmatch_pl.evaluation.confusion import Scores, confusion_matrix


def drawn(temperature, images=3, size=60, classes=4, seed=0):
    """Logits, and masks that are drawn from their probabilities at a temperature."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, size, size, generator=rng, dtype=torch.float64)
    probability = (logits / temperature).softmax(1).permute(0, 2, 3, 1).reshape(-1, classes)
    mask = torch.multinomial(probability, 1, generator=rng).reshape(images, size, size)
    return logits, mask


def plain_ece(logits, mask):
    """The definition, pixel by pixel."""
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    confidence, right = probability.max(1).ravel(), (probability.argmax(1) == mask).ravel()
    total = 0.0
    for number in range(BINS):
        inside = (confidence >= number / BINS) & ((confidence < (number + 1) / BINS) | (number == BINS - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return total


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_the_temperature_that_drew_the_masks_is_found(temperature):
    logits, mask = drawn(temperature)
    metric = CalibrationError(pixels=60 * 60)
    metric.update(logits, mask)
    result = metric.compute()
    assert result.temperature == pytest.approx(temperature, rel=0.06)
    assert result.ece == pytest.approx(plain_ece(logits.numpy(), mask.numpy()), abs=1e-5)
    fitted = plain_ece(logits.numpy() / result.temperature, mask.numpy())
    assert result.fitted_ece == pytest.approx(fitted, abs=1e-5)
    assert result.fitted_ece < 0.02
    assert result.count_B.sum() == mask.numel()


def test_ignored_pixels_do_not_count_and_images_are_sampled():
    logits, mask = drawn(1.0)
    whole, sampled = CalibrationError(10**6), CalibrationError(500)
    ignored = mask.clone()
    ignored[:, ::2] = 255
    whole.update(logits, ignored)
    assert whole.compute().count_B.sum() == (ignored != 255).sum()
    sampled.update(logits, ignored)
    assert sampled.compute().count_B.sum() == 3 * 500


def test_probabilities_at_a_temperature():
    logits = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(temper(logits.softmax(0), 1.7), (logits / 1.7).softmax(0))
    assert temper(logits, 1.0) is logits


def test_the_estimate_of_calibrated_probabilities_is_close_to_the_miou():
    logits, mask = drawn(1.0, size=120)
    estimate = MiouEstimate(4)
    for image in logits:
        estimate.add(image.softmax(0))
    truth = Scores.of(confusion_matrix(logits.argmax(1), mask, 4)).miou
    assert estimate.miou == pytest.approx(truth, abs=0.01)


@pytest.mark.parametrize(("share", "expected"), [(0.002, 0.998 / 2), (0.0005, 0.9995)])
def test_a_class_that_is_expected_but_predicted_nowhere_counts_as_zero(share, expected):
    """Without it, a network that never predicts poles would seem better than one that does."""
    estimate = MiouEstimate(2)
    estimate.add(torch.tensor([1 - share, share]).reshape(2, 1, 1).expand(2, 8, 8))
    assert estimate.miou == pytest.approx(expected, abs=1e-6)
