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
