"""Batches that fit a method are accepted, and others are refused with the name of the tensor."""

import re

import pytest
from helpers.batches import make_batch

from mlpmatch_pl import UserError
from mlpmatch_pl.methods.batch import BatchValidator, split_batch
from mlpmatch_pl.methods.method import PRESETS, resolve_method

BATCH = make_batch(2, 2, size=(33, 33))


def validate(method, *batches):
    validator = BatchValidator(resolve_method(method), channels=3)
    for batch in batches:
        validator(*split_batch(batch))


def without(half, key):
    return {**BATCH, half: {name: value for name, value in BATCH[half].items() if name != key}}


@pytest.mark.parametrize("method", PRESETS)
def test_batches_of_the_method_are_accepted(method):
    views = len(PRESETS[method].strong_weights)
    validate(method, *(make_batch(labeled, 3, views, size) for labeled, size in ((2, (33, 41)), (4, (65, 65)))))


@pytest.mark.parametrize(
    ("method", "batch", "message"),
    [
        ("unimatch", make_batch(2, 2, 1, (33, 33)), "expected unlabeled.strong of shape (2, 2, 3, 33, 33) in batches "
         "for method unimatch, but got (2, 1, 3, 33, 33); build SemiSupervisedDataModule with the module's method"),
        ("fixmatch", BATCH, "expected unlabeled.strong of shape (2, 1, 3, 33, 33) in batches for method fixmatch"),
        ("unimatch", {"labeled": BATCH["labeled"]}, "expected unlabeled.weak of shape (U, 3, 33, 33) in batches for "
         "method unimatch, but it is missing"),
        ("supervised", BATCH, "expected labeled images only for method supervised, but the batch has unlabeled ones"),
        ("mlpmatch_official", without("unlabeled", "partner"), "expected unlabeled.partner.weak of shape"),
        ("unimatch", without("labeled", "mask"), "expected labeled.mask of shape (2, 33, 33)"),
        ("unimatch", {"image": BATCH["labeled"]["image"]}, "expected labeled.image of shape (B, 3, H, W)"),
        ("supervised", {"labeled": {name: value[:, :1] for name, value in BATCH["labeled"].items() if name != "index"}},
         "expected labeled.image of shape (B, 3, H, W) in batches for method supervised, but got (2, 1, 33, 33)"),
        ("unimatch", [BATCH], "expected a training batch of {'labeled': ..., 'unlabeled': ...}, but got a list"),
    ],
)  # fmt: skip
def test_other_batches_are_refused(method, batch, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        validate(method, batch)
    assert "\n" not in str(error.value)


def test_a_wrong_batch_is_refused_after_right_ones():
    with pytest.raises(UserError, match=r"expected unlabeled\.strong of shape"):
        validate("unimatch", BATCH, BATCH, make_batch(2, 2, 1, (33, 33)))


@pytest.mark.parametrize(
    ("method", "sizes", "message"),
    [
        ("supervised", (2, 0), None),
        ("supervised", (1, 0), "a batch has 1 labeled and 0 unlabeled images; raise loader.batch_size"),
        ("supervised", (1, 0, 2), None),  # SyncBatchNorm on two devices
        ("mlpmatch", (1, 2), None),
        ("mlpmatch", (1, 1), "expected at least 2 unlabeled images in a batch"),
        ("mlpmatch_official", (1, 1), None),  # its partner is the same image
        ("fixmatch", (1, 1), "expected at least 2 images in every pass"),  # one strong view
        ("mlpmatch_burn_in", (2, 2), None),
        ({"name": "mlpmatch_burn_in", "partner": "same_image"}, (8, 1), "expected at least 2 images in every pass"),
        ({"name": "mlpmatch", "partner": "same_image", "batchnorm": "weak"}, (8, 1), "at least 2 images in every pass"),
    ],
)
def test_batch_sizes_suit_batchnorm_and_cutmix(method, sizes, message):
    if message is None:
        resolve_method(method).check_batch_sizes(*sizes)
    else:
        with pytest.raises(UserError, match=message):
            resolve_method(method).check_batch_sizes(*sizes)


def test_wrong_methods_are_refused():
    for override, message in [
        ({"scale": -1}, "expected method mlpmatch to have weights of at least 0 and lambda_max from 0 to 1"),
        ({"strong_weights": []}, "expected at least one strong view beside feature or network perturbation"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve_method({"name": "mlpmatch", **override})
