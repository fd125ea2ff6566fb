from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, compose_train
from lightning.pytorch import Trainer

from mlpmatch_pl.engine.build import build_datamodule, build_module, read_config
from mlpmatch_pl.engine.resume import Start
from mlpmatch_pl.engine.short_training import ShortTraining, set_steps
from mlpmatch_pl.engine.trainer import build_trainer
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError

STEP, BURN_IN_STEP, VALIDATION_BATCH = 0.4, 0.1, 0.2  # seconds


def configure(tmp_path, *overrides):
    """A configuration in minutes, and its data module."""
    minutes = ["schedule.steps=null", "schedule.epochs=null", "schedule.minutes=1"]
    config = read_config(compose_train(*TINY, *minutes, *overrides, output_dir=tmp_path))
    return config, build_datamodule(config, resolve_method(config["method"]))


@pytest.fixture
def timed(monkeypatch):
    """Steps and validations take the time above."""

    def fit(self, module, batches, burn_in, **limits):
        wait = 0.1 * (BURN_IN_STEP if burn_in else STEP)
        return SimpleNamespace(seconds=lambda warmup: (wait, 9 * wait))

    monkeypatch.setattr(ShortTraining, "fit", fit)
    monkeypatch.setattr(ShortTraining, "validate", lambda self, module, batches: VALIDATION_BATCH)


@pytest.mark.parametrize("burn_in", [0.0, 0.5])
def test_steps_and_validations_fill_the_minutes(timed, tmp_path, burn_in):
    config, datamodule = configure(tmp_path, f"method.burn_in={burn_in}")
    steps = set_steps(config, tmp_path, datamodule, Start())["schedule"]["steps"]
    step = burn_in * BURN_IN_STEP + (1 - burn_in) * STEP
    validations = 20  # of many short epochs
    expected = (60 - validations * len(datamodule.val_dataloader()) * VALIDATION_BATCH) / step
    assert steps == pytest.approx(expected, rel=0.05)
    assert datamodule.method.burn_in == burn_in


def test_a_slow_validation_takes_at_most_half_of_the_time(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(ShortTraining, "validate", lambda self, module, batches: 1000.0)
    config, datamodule = configure(tmp_path)
    steps = set_steps(config, tmp_path, datamodule, Start())["schedule"]["steps"]
    assert steps == pytest.approx(30 / STEP, abs=1)


def test_a_resumed_training_keeps_its_steps_unless_the_minutes_change(timed, tmp_path):
    config, datamodule = configure(tmp_path)
    for minutes, kept in ((1, True), (2, False)):
        start = Start(length={"minutes": minutes, "steps": 7, "epochs": 1, "every": 1})
        assert (set_steps(config, tmp_path, datamodule, start)["schedule"]["steps"] == 7) == kept


@pytest.mark.parametrize("overrides", [["schedule.minutes=0"], ["schedule.steps=5"], ["schedule.epochs=5"]])
def test_one_length_is_expected(timed, tmp_path, overrides):
    config, datamodule = configure(tmp_path, *overrides)
    with pytest.raises(UserError, match=r"expected schedule.minutes above 0 and no other length"):
        set_steps(config, tmp_path, datamodule, Start())


def test_without_minutes_nothing_is_timed(tmp_path):
    config, datamodule = configure(tmp_path, "schedule.minutes=null", "schedule.steps=3")
    assert set_steps(config, tmp_path, datamodule, Start()) is config


def test_real_steps_are_timed_and_leave_no_trace(tmp_path):
    config, datamodule = configure(tmp_path, "schedule.minutes=0.02", "method.burn_in=0.5")
    torch.manual_seed(0)
    steps = set_steps(config, tmp_path / "run", datamodule, Start())["schedule"]["steps"]
    assert 1 <= steps < 100
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("minutes", "noted"), [(1, False), (0.1, True)])
def test_few_steps_are_noted(timed, tmp_path, caplog, minutes, noted):
    config, datamodule = configure(tmp_path, f"schedule.minutes={minutes}")
    steps = set_steps(config, tmp_path, datamodule, Start())["schedule"]["steps"]
    assert (f"{steps} steps are few; lower loader.batch_size=4 or loader.crop_size=48" in caplog.text) == noted


@pytest.mark.parametrize(("max_seconds", "min_batches", "batches"), [(1e6, 1, 7), (0, 1, 1), (0, 3, 3)])
def test_a_timing_ends_with_its_batches_or_its_time_but_not_before_its_minimum(
    tmp_path, monkeypatch, max_seconds, min_batches, batches
):
    trained = []
    step = MLPMatch.training_step
    monkeypatch.setattr(MLPMatch, "training_step", lambda *args: trained.append(1) or step(*args))
    config, datamodule = configure(tmp_path, "schedule.minutes=null", "schedule.steps=9")
    training = ShortTraining(config, tmp_path, datamodule)
    module = build_module(config, datamodule.method, datamodule, training.trainer())
    timer = training.fit(module, batches=7, max_seconds=max_seconds, min_batches=min_batches)
    assert len(trained) == batches
    assert sum(timer.seconds(0)) > 0


def test_slow_steps_are_timed_for_a_tenth_of_the_minutes(tmp_path, monkeypatch):
    limits = []
    fit = ShortTraining.fit
    monkeypatch.setattr(ShortTraining, "fit", lambda *args, **kwargs: limits.append(kwargs) or fit(*args, **kwargs))
    config, datamodule = configure(tmp_path, "schedule.minutes=0.02", "method.burn_in=0.5")
    set_steps(config, tmp_path, datamodule, Start())
    assert limits == [{"max_seconds": pytest.approx(0.12), "min_batches": 3}] * 2


@pytest.mark.parametrize(
    ("steps", "accumulate", "epochs", "batches"),
    [(12, 1, 3, 4), (3, 1, 1, 3), (10, 1, 2, 5), (3, 2, 1, 5), (4, 2, 2, 4)],
)
def test_epochs_are_shortened_to_the_steps(tmp_path, steps, accumulate, epochs, batches):
    """Five batches are a pass over the images of TINY: 12 steps are 3 epochs of 4 batches."""
    config, datamodule = configure(tmp_path, "schedule.minutes=null", f"schedule.steps={steps}")
    assert datamodule.steps_per_epoch() == 5
    config["trainer"]["accumulate_grad_batches"] = accumulate
    trainer = build_trainer(config, tmp_path, datamodule, [])
    assert (trainer.max_epochs, datamodule.steps_per_epoch()) == (epochs, batches)
    assert len(datamodule.train_dataloader().iterables["unlabeled"]) == batches


def test_the_last_step_is_validated_if_the_validation_interval_is_given(tmp_path):
    overrides = ("schedule.minutes=null", "schedule.steps=12", "trainer.check_val_every_n_epoch=2")
    config, datamodule = configure(tmp_path, *overrides)
    trainer = build_trainer(config, tmp_path, datamodule, [])
    assert (trainer.max_epochs, datamodule.steps_per_epoch(), trainer.check_val_every_n_epoch) == (4, 3, 2)


@pytest.mark.parametrize(("every", "steps"), [("null", 6), (2, 7)])
def test_validations_of_few_long_epochs_are_counted(timed, tmp_path, monkeypatch, every, steps):
    """Three seconds are 8 steps of 0.4, in two epochs of at most 5; a validation takes 0.18 seconds."""
    monkeypatch.setattr(ShortTraining, "validate", lambda self, module, batches: 0.18)
    config, datamodule = configure(tmp_path, "schedule.minutes=0.05", f"trainer.check_val_every_n_epoch={every}")
    assert set_steps(config, tmp_path, datamodule, Start())["schedule"]["steps"] == steps


def test_steps_are_timed_in_epochs_as_long_as_possible(tmp_path, monkeypatch):
    """A training of one step has epochs of one step: each would load anew."""
    timed = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *_, datamodule: timed.append(
        (self.max_epochs, datamodule.steps_per_epoch())
    ))  # fmt: skip
    config, datamodule = configure(tmp_path, "schedule.minutes=null", "schedule.steps=1")
    ShortTraining(config, tmp_path, datamodule).fit(None, batches=6)
    assert (timed, datamodule.steps_per_epoch()) == ([(2, 5)], 1)
