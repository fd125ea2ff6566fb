from types import SimpleNamespace

import pytest

from mlpmatch_pl.callbacks import progress
from mlpmatch_pl.callbacks.progress import ProcessorTime


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "process_time", lambda: clock.seconds)
    return clock


def train_a_batch(callback, clock, seconds):
    clock.seconds += seconds
    callback.on_train_batch_end(None, None, None, None, 0)


def test_steps_of_all_starts_count_and_validations_do_not(clock):
    first = ProcessorTime()
    first.on_train_start(None, None)
    train_a_batch(first, clock, 2)
    clock.seconds += 50  # a validation
    first.on_validation_end(None, None)
    train_a_batch(first, clock, 3)
    assert first.seconds == 5

    clock.seconds = 7.0  # another process
    resumed = ProcessorTime()
    resumed.load_state_dict(first.state_dict())
    resumed.on_train_start(None, None)
    train_a_batch(resumed, clock, 4)
    assert resumed.seconds == 9
