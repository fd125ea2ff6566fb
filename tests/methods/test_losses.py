"""Losses against loops over pixels in float64, and pseudo-labels against a plain softmax.

Letters: B images, C classes, H and W pixels.
"""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlpmatch_pl import UserError
from mlpmatch_pl.methods.losses import (
    build_criterion,
    consistency_loss,
    cross_entropy,
    dice_loss,
    ohem_cross_entropy,
)
from mlpmatch_pl.methods.pseudo_labels import PseudoLabels

B, C, H, W = 2, 4, 5, 6
WEIGHTS_C = (0.5, 2.0, 0.0, 1.25)
MASKS = ["random", "one_class", "one_pixel", "nothing_ignored"]


def random_logits(seed=0, scale=2.0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(B, C, H, W, dtype=torch.float64, generator=rng) * scale).requires_grad_()


def random_mask(kind="random", ignore_index=255, dtype=torch.uint8):
    rng = torch.Generator().manual_seed(7)
    mask_BHW = torch.randint(0, C, (B, H, W), generator=rng)
    if kind == "one_class":
        mask_BHW[:] = 3
    if kind != "nothing_ignored":
        mask_BHW[torch.rand(B, H, W, generator=rng) < 0.3] = ignore_index
    if kind == "one_pixel":
        mask_BHW[:] = ignore_index
        mask_BHW[1, 2, 3] = 1
    return mask_BHW.to(dtype)


def pixels(mask_BHW, ignore_index=255):
    """Yield (image, row, column) and class of every pixel that is not ignored."""
    mask = mask_BHW.numpy()
    for position in np.ndindex(*mask.shape):
        if mask[position] != ignore_index:
            yield position, int(mask[position])


def plain_probabilities(logits_BCHW):
    exp = np.exp(logits_BCHW.astype(np.float64))
    return exp / exp.sum(axis=1, keepdims=True)


def plain_cross_entropy(logits_BCHW, mask_BHW, ignore_index=255, weights=None):
    total = weight_sum = 0.0
    probability = plain_probabilities(logits_BCHW)
    for (b, y, x), label in pixels(mask_BHW, ignore_index):
        weight = 1.0 if weights is None else weights[label]
        total -= weight * math.log(probability[b, label, y, x])
        weight_sum += weight
    return total / weight_sum


def plain_ohem(logits_BCHW, mask_BHW, ignore_index=255, threshold=0.7, min_kept=10):
    probability = plain_probabilities(logits_BCHW)
    truth = [probability[b, label, y, x] for (b, y, x), label in pixels(mask_BHW, ignore_index)]
    if len(truth) >= min_kept:
        limit = max(threshold, sorted(truth)[min_kept - 1])
        truth = [p for p in truth if p <= limit]
    return -sum(math.log(p) for p in truth) / len(truth)


def plain_dice(logits_BCHW, mask_BHW, ignore_index=255):
    probability = plain_probabilities(logits_BCHW)
    labels = list(pixels(mask_BHW, ignore_index))
    missed = []
    for c in {label for _, label in labels}:
        overlap = sum(probability[b, c, y, x] for (b, y, x), label in labels if label == c)
        size = sum(probability[b, c, y, x] + (label == c) for (b, y, x), label in labels)
        missed.append(1 - 2 * overlap / size)
    return sum(missed) / len(missed)


def plain_consistency(logits_BCHW, pseudo, threshold):
    probability, total = plain_probabilities(logits_BCHW), 0.0
    label, confidence, valid = (part.numpy() for part in (pseudo.label_BHW, pseudo.confidence_BHW, pseudo.valid_BHW))
    for b, y, x in np.ndindex(*label.shape):
        if valid[b, y, x] and confidence[b, y, x] >= threshold:
            total -= math.log(probability[b, label[b, y, x], y, x])
    return total / valid.sum()


def finite_differences(function, logits_BCHW, epsilon=1e-5):
    grad = np.zeros_like(logits_BCHW)
    for position in np.ndindex(*logits_BCHW.shape):
        values = []
        for sign in (1, -1):
            moved = logits_BCHW.copy()
            moved[position] += sign * epsilon
            values.append(function(moved))
        grad[position] = (values[0] - values[1]) / (2 * epsilon)
    return grad


def assert_value_and_gradient(loss, logits_BCHW, plain):
    numbers = logits_BCHW.detach().numpy()
    assert loss.item() == pytest.approx(plain(numbers), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits_BCHW)
    np.testing.assert_allclose(grad.numpy(), finite_differences(plain, numbers), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("kind", MASKS)
def test_cross_entropy_is_the_mean_over_pixels_that_are_not_ignored(kind, dtype):
    logits, mask = random_logits(), random_mask(kind, dtype=dtype)
    assert_value_and_gradient(cross_entropy(logits, mask), logits, lambda z: plain_cross_entropy(z, mask))


@pytest.mark.parametrize("kind", MASKS)
def test_weighted_cross_entropy_is_the_weighted_mean(kind):
    logits, mask = random_logits(), random_mask(kind)
    loss = cross_entropy(logits, mask, class_weights_C=torch.tensor(WEIGHTS_C, dtype=torch.float64))
    assert_value_and_gradient(loss, logits, lambda z: plain_cross_entropy(z, mask, weights=WEIGHTS_C))


def test_class_weights_are_read_from_the_options():
    logits, mask = random_logits(), random_mask()
    loss = build_criterion({"name": "ce", "class_weights": list(WEIGHTS_C)}, C).double()(logits, mask)
    assert loss.item() == pytest.approx(plain_cross_entropy(logits.detach().numpy(), mask, weights=WEIGHTS_C))


@pytest.mark.parametrize("name", ["ce", "ohem", "dice"])
@pytest.mark.parametrize("ignore_index", [-1, 254])
def test_ignore_index_is_configurable(name, ignore_index):
    logits, mask = random_logits(), random_mask(ignore_index=ignore_index, dtype=torch.int64)
    plain = {"ce": plain_cross_entropy, "ohem": plain_ohem, "dice": plain_dice}[name]
    spec = {"name": name, "min_kept": 10} if name == "ohem" else name
    loss = build_criterion(spec, C, ignore_index)(logits, mask)
    assert loss.item() == pytest.approx(plain(logits.detach().numpy(), mask, ignore_index))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 3), (0.05, 20), (0.0, 1), (0.3, 15), (0.5, 10_000)])
def test_ohem_is_the_mean_over_hard_pixels(kind, threshold, min_kept):
    logits, mask = random_logits(), random_mask(kind)
    loss = ohem_cross_entropy(logits, mask, threshold=threshold, min_kept=min_kept)
    assert_value_and_gradient(loss, logits, lambda z: plain_ohem(z, mask, 255, threshold, min_kept))


def logits_of(probabilities):
    """Return logits of two classes for a row of pixels, from the probabilities of class 0."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p, 1 - p]).log()[None, :, None]


@pytest.mark.parametrize(
    ("threshold", "min_kept", "kept"),
    [
        (0.7, 1, [0.1, 0.2, 0.5, 0.6]),  # the threshold is above the first smallest
        (0.3, 3, [0.1, 0.2, 0.5]),  # the third smallest is above the threshold
        (0.3, 2, [0.1, 0.2]),
        (0.0, 1, [0.1]),
        (0.3, 6, [0.1, 0.2, 0.5, 0.6, 0.8, 0.9]),  # exactly min_kept pixels
        (0.3, 7, [0.1, 0.2, 0.5, 0.6, 0.8, 0.9]),  # fewer than min_kept: all valid pixels
    ],
)
def test_ohem_limit_is_the_larger_of_the_threshold_and_the_kth_probability(threshold, min_kept, kept):
    logits = logits_of([0.9, 0.1, 0.5, 0.8, 0.01, 0.2, 0.6, 0.02])
    mask = torch.tensor([[[0, 0, 0, 0, 255, 0, 0, 255]]])  # the smallest probabilities are ignored
    loss = ohem_cross_entropy(logits, mask, threshold=threshold, min_kept=min_kept)
    assert loss.item() == pytest.approx(-sum(map(math.log, kept)) / len(kept))


@pytest.mark.parametrize("kind", MASKS)
def test_dice_is_the_mean_over_the_classes_in_the_masks(kind):
    logits, mask = random_logits(), random_mask(kind)
    assert_value_and_gradient(dice_loss(logits, mask), logits, lambda z: plain_dice(z, mask))


@pytest.mark.parametrize("name", ["ce", "ohem"])
def test_dice_weight_adds_a_weighted_dice_loss(name):
    logits, mask = random_logits(), random_mask()
    options = {"min_kept": 10} if name == "ohem" else {}
    alone, dice = (build_criterion({"name": kind, **extra}, C) for kind, extra in ((name, options), ("dice", {})))
    both = build_criterion({"name": name, "dice_weight": 0.3, **options}, C)
    torch.testing.assert_close(both(logits, mask), alone(logits, mask) + 0.3 * dice(logits, mask))


CRITERIA = ["ce", "ohem", "dice", {"name": "ce", "class_weights": list(WEIGHTS_C)}, {"name": "ohem", "dice_weight": 1}]


@pytest.mark.parametrize("spec", CRITERIA, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_are_zero_with_zero_gradient_if_all_pixels_are_ignored(spec, scale):
    logits = random_logits(scale=scale)
    loss = build_criterion(spec, C).double()(logits, torch.full((B, H, W), 255, dtype=torch.uint8))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_losses_are_zero_with_zero_gradient_if_all_pixels_have_weight_zero():
    logits = random_logits()
    weights = torch.tensor(WEIGHTS_C, dtype=torch.float64)
    loss = cross_entropy(logits, torch.full((B, H, W), 2), class_weights_C=weights)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


class Operations(TorchDispatchMode):
    """Records all operations and their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func.overloadpacket).removeprefix("aten."), args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", CRITERIA, ids=str)
def test_losses_use_operations_that_are_deterministic_on_a_gpu(spec):
    """trainer.deterministic=true refuses kthvalue and torch's own reduction of the cross entropy."""
    logits = random_logits()
    with Operations() as operations:
        build_criterion(spec, C).double()(logits, random_mask()).backward()
    assert len(operations.seen) > 5
    assert "kthvalue" not in dict(operations.seen)
    summed = [arguments[3] for name, arguments in operations.seen if name == "nll_loss2d_forward"]
    assert all(reduction == 0 for reduction in summed)  # 0: none


@pytest.mark.parametrize("spec", CRITERIA, ids=str)
def test_large_logits_give_finite_losses_and_gradients(spec):
    logits = (random_logits().detach() * 1e3).float().requires_grad_()
    loss = build_criterion(spec, C)(logits, random_mask())
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert grad.isfinite().all()


def random_pseudo(seed=1):
    rng = torch.Generator().manual_seed(seed)
    return PseudoLabels(
        torch.randint(0, C, (B, H, W), generator=rng),
        torch.rand(B, H, W, generator=rng, dtype=torch.float64),
        torch.rand(B, H, W, generator=rng) < 0.7,
    )


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95])
def test_consistency_loss_is_divided_by_the_number_of_valid_pixels(threshold):
    logits, pseudo = random_logits(), random_pseudo()
    loss = consistency_loss(logits, pseudo, threshold)
    assert_value_and_gradient(loss, logits, lambda z: plain_consistency(z, pseudo, threshold))


def test_a_confidence_equal_to_the_threshold_counts():
    logits, pseudo = random_logits(), random_pseudo()
    pseudo.confidence_BHW[:] = 0.75
    assert consistency_loss(logits, pseudo, 0.75) > 0
    assert consistency_loss(logits, pseudo, math.nextafter(0.75, 1)) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.95])
def test_consistency_loss_without_valid_pixels_is_zero_with_zero_gradient(threshold):
    logits, pseudo = random_logits(), random_pseudo()
    pseudo.valid_BHW[:] = False
    loss = consistency_loss(logits, pseudo, threshold)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_pseudo_labels_are_argmax_and_maximum_of_the_softmax():
    logits, valid = random_logits(), random_pseudo().valid_BHW
    pseudo = PseudoLabels.from_logits(logits, valid)
    probability = plain_probabilities(logits.detach().numpy())
    np.testing.assert_array_equal(pseudo.label_BHW.numpy(), probability.argmax(axis=1))
    np.testing.assert_allclose(pseudo.confidence_BHW.numpy(), probability.max(axis=1), rtol=1e-12)
    assert torch.equal(pseudo.valid_BHW, valid)
    assert pseudo.label_BHW.dtype == torch.int64
    assert not pseudo.confidence_BHW.requires_grad


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_confidence_of_large_logits_is_finite(scale):
    confidence_BHW = PseudoLabels.from_logits(random_logits(scale=scale).float(), None).confidence_BHW
    assert ((confidence_BHW > 1 / C) & (confidence_BHW <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_confidence_has_float32_precision_for_half_logits(dtype):
    logits = random_logits().detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pseudo = PseudoLabels.from_logits(logits, random_pseudo().valid_BHW)
    assert pseudo.confidence_BHW.dtype == torch.float32
    probability = plain_probabilities(logits.double().numpy())
    np.testing.assert_allclose(pseudo.confidence_BHW.numpy(), probability.max(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(pseudo.label_BHW.numpy(), probability.argmax(axis=1))


PARTS = ("label_BHW", "confidence_BHW", "valid_BHW")


def test_mix_takes_all_parts_from_the_partner_inside_the_box():
    own, partner = random_pseudo(1), random_pseudo(2)
    inside = torch.rand(B, H, W, generator=torch.Generator().manual_seed(3)) < 0.5
    mixed = own.mix(partner, inside)
    for part in PARTS:
        for position in np.ndindex(B, H, W):
            source = partner if inside[position] else own
            assert getattr(mixed, part)[position] == getattr(source, part)[position]


@pytest.mark.parametrize("shift", [0, 1, 2, 5])
def test_roll_shifts_the_batch(shift):
    rng = torch.Generator().manual_seed(0)
    pseudo = PseudoLabels(
        torch.randint(0, C, (3, H, W), generator=rng),
        torch.rand(3, H, W, generator=rng),
        torch.rand(3, H, W, generator=rng) < 0.5,
    )
    for part in PARTS:
        for image in range(3):
            expected = getattr(pseudo, part)[(image - shift) % 3]
            assert torch.equal(getattr(pseudo.roll(shift), part)[image], expected)


def test_counted_pixels_are_valid_and_confident():
    pseudo, count = random_pseudo(), 0
    counted = pseudo.counted_BHW(0.5)
    for position in np.ndindex(B, H, W):
        expected = bool(pseudo.valid_BHW[position]) and float(pseudo.confidence_BHW[position]) >= 0.5
        count += expected
        assert bool(counted[position]) == expected
    ratio = count / sum(bool(pseudo.valid_BHW[position]) for position in np.ndindex(B, H, W))
    assert 0 < ratio < 1
    assert pseudo.confident_ratio(0.5).item() == pytest.approx(ratio)


def test_confident_ratio_without_valid_pixels_is_zero():
    pseudo = random_pseudo()
    pseudo.valid_BHW[:] = False
    assert pseudo.confident_ratio(0.0).item() == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cee", "expected a criterion of ce, ohem, dice, but got 'cee'. Did you mean ce?"),
        ({"name": "ohm"}, "expected a criterion of ce, ohem, dice, but got 'ohm'. Did you mean ohem?"),
        ({"name": "ce", "thresh": 0.7}, "criterion ce takes class_weights, dice_weight, but got thresh"),
        ({"name": "dice", "dice_weight": 1}, "criterion dice takes no options, but got dice_weight"),
        ({"name": "ohem", "min_kept": 0}, "expected min_kept of at least 1 pixel, but got 0"),
        ({"name": "ce", "class_weights": [1.0, 2.0]}, "expected 4 class weights, one per class, but got 2"),
    ],
)
def test_wrong_criteria_are_refused(spec, message):
    with pytest.raises(UserError) as error:
        build_criterion(spec, C)
    assert str(error.value) == message


def test_build_criterion_does_not_modify_its_options():
    spec = {"name": "ohem", "min_kept": 10, "dice_weight": 0.5}
    build_criterion(spec, C)
    assert spec == {"name": "ohem", "min_kept": 10, "dice_weight": 0.5}
