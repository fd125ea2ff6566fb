from types import SimpleNamespace

import torch

from mlpmatch_pl.callbacks.progress import DataWait, Throughput


def test_throughput_counts_images_and_the_time_left(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("mlpmatch_pl.callbacks.progress.time.monotonic", lambda: next(clock))
    throughput = Throughput(16, DataWait())
    assert throughput.describe(step=4, steps=100) == {}
    assert throughput.describe(step=24, steps=100) == {"img/s": "32.0", "data": "0%", "left": "0:38"}


def test_waiting_for_data_is_measured_without_validation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mlpmatch_pl.utils.timing.time.perf_counter", lambda: now[0])
    wait, module = DataWait(), SimpleNamespace(device=torch.device("cpu"))
    assert wait.share == 0

    def after(seconds, hook, *arguments):
        now[0] += seconds
        hook(None, module, *arguments)

    after(50, wait.on_train_epoch_start)  # what comes before does not count
    after(2, wait.on_train_batch_start, None, 0)
    after(6, wait.on_train_batch_end, None, None, 0)
    assert wait.share == 0.25
    after(70, wait.on_validation_end)
    after(1, wait.on_train_batch_start, None, 1)
    after(3, wait.on_train_batch_end, None, None, 1)
    assert wait.share == 0.25
    after(30, wait.on_train_epoch_start)
    after(12, wait.on_train_batch_start, None, 0)
    assert wait.share == 15 / 24
