"""Schedules of lambda and of the learning rate, and the length of training."""

import math
from types import SimpleNamespace

import pytest
import torch

from mlpmatch_pl import UserError
from mlpmatch_pl.methods.schedules import TrainingLength, check_decay, lr_schedule, volatile_weight


def weight(schedule, epoch=0, step=0, epochs=80, steps=800):
    return volatile_weight(schedule, 0.25, epoch=epoch, epochs=epochs, step=step, steps=steps)


@pytest.mark.parametrize(
    ("schedule", "start", "middle", "end"),
    [
        ("linear_epoch", 0.0, 0.125, 0.25 * 79 / 80),
        ("linear_step", 0.0, 0.125 + 0.25 * 5 / 800, 0.25 * 799 / 800),
        ("constant", 0.25, 0.25, 0.25),
        ("off", 0.0, 0.0, 0.0),
    ],
)
def test_lambda_follows_its_schedule(schedule, start, middle, end):
    values = [weight(schedule), weight(schedule, epoch=40, step=405), weight(schedule, epoch=79, step=799)]
    assert values == pytest.approx([start, middle, end], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear_epoch", "linear_step", "constant", "off"])
def test_lambda_stays_in_its_range(schedule):
    for epoch, step in [(0, 0), (80, 800), (500, 5000)]:
        assert 0 <= weight(schedule, epoch, step) <= 0.25
    assert weight(schedule, epochs=0, steps=0) in (0, 0.25)


@pytest.mark.parametrize(("schedule", "unit"), [("linear_epoch", "epochs"), ("linear_step", "steps")])
def test_a_schedule_asks_for_the_length_it_needs(schedule, unit):
    known = {"epochs": 80, "steps": 800}
    assert weight(schedule, **{name: value for name, value in known.items() if name == unit}) == 0
    message = f"expected a known number of training {unit} for method.lambda_schedule={schedule}.* set max_{unit} of"
    with pytest.raises(UserError, match=message):
        weight(schedule, **{unit: None})
    assert weight("constant", epochs=None, steps=None) == 0.25


@pytest.mark.parametrize("late", [False, True])
def test_poly_decay_lags_one_step_if_late(late):
    factors = [*map(lr_schedule(10, "poly", power=0.9, late=late), range(15))]
    assert factors[:11] == [(1 - max(step - late, 0) / 10) ** 0.9 for step in range(11)]  # to the bit
    assert factors[11:] == [0.0] * 4
    assert lr_schedule(0, "poly")(0) == 1.0


def test_cosine_decay_and_warmup_equal_torchs_schedulers():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        expected = cosine.get_last_lr()[0]
        assert lr_schedule(20, "cosine")(step) == pytest.approx(expected)
        assert lr_schedule(20, "cosine", warmup_steps=4)(step) == pytest.approx(expected * min((step + 1) / 4, 1))
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize(
    ("decay", "own"),
    [
        ({"name": "OneCycleLR", "max_lr": 1, "pct_start": 0.5}, {"total_steps": 20}),
        ({"name": "CosineAnnealingWarmRestarts", "T_0": 5}, {}),
        ({"name": "ExponentialLR", "gamma": 0.8}, {}),
        ("CosineAnnealingLR", {"T_max": 20}),
        ({"name": "PolynomialLR", "total_iters": 7}, {}),
    ],
)
def test_schedulers_of_torch_by_name_scale_all_learning_rates(decay, own):
    """OneCycleLR is given the optimizer's own rates as its maxima, instead of 1."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 1.0)], momentum=0.9)
    spec = {"name": decay} if isinstance(decay, str) else decay
    arguments = {key: value for key, value in (spec | own).items() if key != "name"}
    if "max_lr" in arguments:
        arguments["max_lr"] = [0.1, 1.0]
    scheduler = getattr(torch.optim.lr_scheduler, spec["name"])(optimizer, **arguments)
    factor = lr_schedule(20, decay)
    for step in range(20):
        assert scheduler.get_last_lr() == pytest.approx([0.1 * factor(step), factor(step)])
        optimizer.step()
        if step < 19:  # OneCycleLR ends there
            scheduler.step()


def test_a_scheduler_of_timm_counts_optimizer_steps():
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    options = {"lr_min": 0.1, "warmup_t": 4, "warmup_lr_init": 0.2}
    scheduler = CosineLRScheduler(
        optimizer, t_initial=20, t_in_epochs=False, lr_min=0.05, warmup_t=4, warmup_lr_init=0.1
    )
    factor = lr_schedule(20, {"name": "CosineLRScheduler", **options})
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * factor(step))
        scheduler.step_update(step + 1)


def test_a_scheduler_that_is_unknown_or_refuses_its_arguments():
    with pytest.raises(UserError, match=r"expected schedule\.decay as poly, .*OneCycel.*Did you mean OneCycleLR"):
        check_decay({"name": "OneCycel"})
    for name in ("linear", "ReduceLROnPlateau", None):
        with pytest.raises(UserError, match=r"needs no metric"):
            check_decay(name or {})
    with pytest.raises(UserError, match=r"expected a scheduler with arguments that it takes, but StepLR refuses"):
        lr_schedule(4, {"name": "StepLR", "size": 2})


@pytest.mark.parametrize(
    ("estimated", "batches", "max_epochs", "accumulated", "expected"),
    [
        (60, 20, 3, 1, TrainingLength(60, 3)),
        (30, 20, 3, 2, TrainingLength(30, 3)),
        (25, 20, -1, 1, TrainingLength(25, 2)),  # max_steps within the second epoch
        (6, 3, 3, 2, TrainingLength(6, 3)),  # the last step of an epoch has fewer batches
        (4, math.inf, None, 1, TrainingLength(4, None)),  # a loader without length, max_steps
        (-1, math.inf, 2, 1, TrainingLength(None, 2)),  # a loader without length, max_epochs
        (math.inf, 20, -1, 1, TrainingLength(None, None)),  # endless
    ],
)
def test_the_length_is_read_from_the_trainer(estimated, batches, max_epochs, accumulated, expected):
    trainer = SimpleNamespace(
        estimated_stepping_batches=estimated,
        num_training_batches=batches,
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulated,
    )
    assert TrainingLength.of(trainer) == expected


def test_an_unknown_number_of_steps_is_asked_for():
    assert TrainingLength(steps=10).required_steps() == 10
    with pytest.raises(UserError, match=r"expected a known number of training steps .* set max_steps of the Trainer"):
        TrainingLength(epochs=3).required_steps()
