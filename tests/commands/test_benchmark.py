import json
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, compose_config
from helpers.processes import run_forked
from lightning.pytorch.strategies import SingleDeviceStrategy

from mlpmatch_pl.benchmark import benchmark
from mlpmatch_pl.callbacks import progress
from mlpmatch_pl.commands.benchmark import run, timing
from mlpmatch_pl.commands.benchmark.summary import advise, summarize
from mlpmatch_pl.commands.benchmark.timing import largest_batch, predicted_wait, workers_needed
from mlpmatch_pl.data.dataset import UnlabeledDataset
from mlpmatch_pl.engine import short_training
from mlpmatch_pl.engine.build import build_datamodule, read_config
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError

FEW = ("benchmark.steps=3", "benchmark.warmup=1", "benchmark.validation=1", "benchmark.loading=2")


def measure(output_dir, *overrides):
    return benchmark(compose_config("benchmark", *TINY, *FEW, *overrides, output_dir=output_dir))


# Arithmetic, against values computed by hand


@pytest.mark.parametrize(
    ("workers", "wait"),
    [
        ({"labeled": 0, "unlabeled": 0}, 8.0),  # all in the main process
        ({"labeled": 0, "unlabeled": 1}, 4.0),  # 6 during 2 + 2, and the labeled 2 are still waited for
        ({"labeled": 1, "unlabeled": 1}, 4.0),
        ({"labeled": 1, "unlabeled": 2}, 1.0),
        ({"labeled": 1, "unlabeled": 3}, 0.0),
        ({"labeled": 0, "unlabeled": 6}, 2.0),
    ],
)
def test_predicted_wait_is_that_of_a_simulated_queue(workers, wait):
    seconds, step = {"labeled": 2.0, "unlabeled": 6.0}, 2.0
    assert predicted_wait(seconds, workers, step) == pytest.approx(wait)
    assert simulated_wait(seconds, workers, step) == pytest.approx(wait, abs=0.02)


def simulated_wait(seconds, workers, step, batches=2000):
    """Batch k is loaded by worker k modulo their number, which is at most two batches of its own ahead."""
    now, waited, ready = 0.0, 0.0, {name: [0.0] * count for name, count in workers.items()}
    for batch in range(batches):
        asked = now
        for name, count in workers.items():
            if not count:
                now += seconds[name]
                continue
            worker = batch % count
            ready[name][worker] = max(ready[name][worker], now - 2 * seconds[name]) + seconds[name]
            now = max(now, ready[name][worker])
        waited += now - asked
        now += step
    return waited / batches


def test_workers_needed_are_the_fewest_that_keep_the_wait_below_five_percent():
    seconds = {"labeled": 0.2, "unlabeled": 1.2}
    assert workers_needed(seconds, 0.3) == 5  # 1 + 4: 0.3 s an unlabeled batch; 1 + 3: 0.4 s
    assert workers_needed(seconds, 0.39) == 4  # 0.01 s of waiting is within 5 %
    assert workers_needed(seconds, 100.0) == 0
    assert workers_needed(seconds, 0.001) is None


def test_largest_batch_leaves_a_tenth_of_the_memory():
    assert largest_batch((8, 13e9), (4, 7e9), 80e9) == 47  # 1 GB + 1.5 GB an image within 72 GB
    assert largest_batch((8, 13e9), (4, 7e9), 1e9) == 0
    assert largest_batch((8, 5e9), (4, 5e9), 80e9) is None


def report(
    wait=0.0, needed=2, workers=2, cores=8, validation=0.05, precision="bf16-mixed", device_bytes=80_000_000_000
):
    """A batch computes for a second; ten epochs of 100 seconds with a validation each."""
    return {
        "batch": {"labeled": 8, "unlabeled": 8, "crop_size": 321},
        "step_seconds": 1.0,
        "data_wait_seconds": wait,
        "images_per_second": 16 / (1 + wait),
        "precision": precision,
        "loading": {
            "seconds_per_batch": {"labeled": 0.5, "unlabeled": 1.5},
            "workers": {"labeled": 1, "unlabeled": workers - 1},
            "workers_needed": needed,
            "cores": cores,
        },
        "memory": {"peak_bytes": 13_000_000_000, "device_bytes": device_bytes, "largest_batch": 47},
        "total": {
            "epochs": 10, "batches_per_epoch": 100, "validations": 10, "seconds": 1000 * (1 + wait) / (1 - validation),
            "validation_share": validation,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "options", "advice"),
    [
        ({"wait": 0.5, "needed": 6}, {}, "loader.num_workers=6 (now 2)"),
        ({"wait": 0.5, "needed": 0, "workers": 0}, {}, "loader.num_workers=1 (now 0)"),
        ({"wait": 0.5, "needed": 6, "cores": 4}, {}, "loading is limited by the cores"),
        ({"wait": 0.5, "needed": 1}, {}, "loading is limited by the cores"),
        ({"wait": 0.5, "needed": None}, {}, "loading is limited by the cores"),
        # An epoch takes 100 s, a validation 50 s: 5 / (5 + 50) is a tenth at most, 5 / (5 + 40) is not.
        ({"validation": 1 / 3}, {}, "validate less often: trainer.check_val_every_n_epoch=5"),
        ({"validation": 0.99}, {}, "validate less often: trainer.check_val_every_n_epoch=10"),
        ({"validation": 0.3, "wait": 0.8}, {}, "loading is limited"),
        ({"precision": "32-true"}, {}, "use bfloat16 and channels-last: trainer=gpu"),
        ({}, {"channels_last": False}, "try trainer.channels_last=true"),
        ({}, {"compile_blocks": False}, "try trainer.compile_blocks=true"),
        ({}, {}, "only a smaller loader.crop_size or backbone"),
        ({"precision": "32-true", "device_bytes": None}, {}, "use a GPU, or try trainer.precision=bf16-mixed"),
        ({"device_bytes": None}, {"compile_blocks": False}, "only a smaller loader.crop_size or backbone"),
    ],
)
def test_advice_names_what_costs_most(figures, options, advice):
    assert advise(report(**figures), {"channels_last": True, "compile_blocks": True, **options}).startswith(advice)


def test_summary_has_the_figures():
    lines = summarize({**report(wait=0.25), "advice": "none"})
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "12.8 images/s: 1000 ms a batch of 8 + 8 images of 321 px, 250 ms waiting for data (20%)",
        "2000 ms a batch in one process: 2 workers needed (loader.num_workers=2, 8 cores)",
        "peak 13.0 GB of 80.0 GB; up to loader.batch_size=47 fits",
        "about 21:56 for 10 epochs of 100 batches, 5% of it validation",
        "none",
    ]


# Measuring


class Clock:
    """Time that passes only where a test says so: exact on a machine of any speed."""

    def __init__(self, monkeypatch):
        self.seconds, self.monkeypatch = 0.0, monkeypatch
        monkeypatch.setattr(short_training, "now", lambda device: self.seconds)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.seconds))

    def delay(self, owner, name, seconds):
        """Let every call of a method take some seconds."""
        method = getattr(owner, name)

        def slow(*args, **kwargs):
            self.seconds += seconds
            return method(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_everything_is_counted_where_it_belongs(tmp_path, clock):
    clock.delay(UnlabeledDataset, "__getitem__", 0.01)  # 4 a batch
    clock.delay(SingleDeviceStrategy, "batch_to_device", 0.02)
    clock.delay(MLPMatch, "training_step", 0.3)
    clock.delay(MLPMatch, "backward", 0.5)
    clock.delay(torch.optim.SGD, "step", 0.1)
    clock.delay(MLPMatch, "validation_step", 2.0)
    result = measure(tmp_path)
    assert result["data_wait_seconds"] == pytest.approx(0.06)  # with the transfer
    assert result["step_seconds"] == pytest.approx(0.9)
    assert result["images_per_second"] == pytest.approx(8 / 0.96)
    assert result["loading"]["seconds_per_batch"] == pytest.approx({"labeled": 0.0, "unlabeled": 0.04})
    assert result["total"]["seconds"] == pytest.approx(5 * 0.96 + 2.02)  # one validation of one batch
    assert result["total"]["validation_share"] == pytest.approx(2.02 / (5 * 0.96 + 2.02))
    assert result == json.loads((tmp_path / "benchmark.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


def test_the_total_has_the_cheaper_steps_of_the_burn_in(tmp_path, clock):
    clock.delay(UnlabeledDataset, "__getitem__", 0.01)  # 4 a batch, none during burn-in
    clock.delay(MLPMatch, "training_step", 0.3)
    result = measure(tmp_path, "method.burn_in=0.25")
    assert result["step_seconds"] + result["data_wait_seconds"] == pytest.approx(0.34)
    assert result["total"]["seconds"] == pytest.approx(5 * (0.25 * 0.3 + 0.75 * 0.34))


def test_batches_loaded_ahead_do_not_hide_slow_workers(tmp_path, clock):
    clock.delay(UnlabeledDataset, "__getitem__", 0.2)  # in the workers, this clock does not run
    clock.delay(MLPMatch, "training_step", 0.3)
    result = measure(tmp_path, "loader.num_workers=2")
    assert result["loading"]["workers"] == {"labeled": 1, "unlabeled": 1}
    assert result["loading"]["workers_needed"] == 4  # 1 for the labeled images, and 0.8 s / 3 for the others
    assert result["data_wait_seconds"] == pytest.approx(0.5)  # 0.8 s a batch in one worker, during a step of 0.3 s
    assert result["total"]["seconds"] == pytest.approx(5 * 0.8)


def test_slow_loading_is_measured_in_real_time(tmp_path, monkeypatch, caplog):
    getitem = UnlabeledDataset.__getitem__

    def slow(self, draw):
        time.sleep(0.05)
        return getitem(self, draw)

    monkeypatch.setattr(UnlabeledDataset, "__getitem__", slow)
    monkeypatch.setattr(progress, "MIN_WAIT_SECONDS", 0)
    result = measure(
        tmp_path, "trainer.accumulate_grad_batches=2", "loader.unlabeled_batch_size=6", "schedule.steps=12"
    )
    assert result["batch"] == {"labeled": 4, "unlabeled": 6, "crop_size": 48}
    assert result["data_wait_seconds"] >= 6 * 0.05
    assert result["loading"]["seconds_per_batch"]["unlabeled"] >= 6 * 0.05
    assert result["step_seconds"] > 0
    # 20 unlabeled images in batches of 6: 4 batches, 2 optimizer steps an epoch, so 6 epochs are 12 steps.
    assert (result["total"]["epochs"], result["total"]["batches_per_epoch"]) == (6, 4)
    assert "spent waiting for data" not in caplog.text  # the warning of train, which names this command


def test_supervised_batches_hold_labeled_images_alone(tmp_path):
    result = measure(tmp_path, "method=supervised")
    assert (result["batch"]["labeled"], result["batch"]["unlabeled"]) == (8, 0)
    assert "a batch of 8 labeled images of 48 px" in summarize(result)[0]
    assert result["memory"]["peak_bytes"] > 2**27


def test_batch_that_does_not_fit_is_answered_with_one_that_does(tmp_path, monkeypatch):
    step = MLPMatch.training_step

    def limited(self, batch, batch_idx):
        if len(batch["labeled"]["image"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MLPMatch, "training_step", limited)
    with pytest.raises(UserError) as caught:
        measure(tmp_path, "loader.batch_size=8", "trainer.accumulate_grad_batches=3")
    assert str(caught.value) == (
        "expected batches of loader.batch_size=8 to fit into memory, but they do not; "
        "use loader.batch_size=2 trainer.accumulate_grad_batches=12"
    )
    assert list(tmp_path.iterdir()) == []


def test_memory_is_measured_for_a_second_batch_size_with_momentum(tmp_path, monkeypatch):
    """On a GPU of 80 GB, of which a batch takes 2 GB and an image 1 GB."""
    images, momentum = [], []
    step, update = MLPMatch.training_step, torch.optim.SGD.step

    def noted_step(self, batch, batch_idx):
        images.append(len(batch["labeled"]["image"]))
        return step(self, batch, batch_idx)

    def noted_update(self, closure=None):
        loss = update(self, closure)
        momentum.append(len(self.state) > 0 and all("momentum_buffer" in state for state in self.state.values()))
        return loss

    def read_peak(self, trainer, pl_module):
        self.peak_bytes = int((2 + images[-1]) * 1e9)

    monkeypatch.setattr(MLPMatch, "training_step", noted_step)
    monkeypatch.setattr(torch.optim.SGD, "step", noted_update)
    monkeypatch.setattr(short_training.StepTimer, "on_train_end", read_peak)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    cfg = compose_config("benchmark", *TINY, "trainer.accumulate_grad_batches=3", output_dir=tmp_path)
    config = read_config(cfg, "benchmark")
    short = run.MeasuredTraining(config, tmp_path, build_datamodule(config, resolve_method(config["method"])))
    module = MLPMatch(6, backbone="test_resnet", decoder={"channels": 8}, lr=0.01)
    memory = short.memory(module, int(6e9), torch.device("cuda"))
    assert memory == {"peak_bytes": 6e9, "device_bytes": 80e9, "largest_batch": 70}
    assert images == [2] * 6
    assert momentum == [True, True]


@pytest.mark.gpu
def test_gpu_memory_predicts_the_largest_batch(tmp_path):
    result = measure(tmp_path, "trainer=gpu", "loader.batch_size=8", "benchmark.steps=8")
    memory = result["memory"]
    assert 0 < memory["peak_bytes"] < memory["device_bytes"]
    assert memory["largest_batch"] > 8


# The command


def test_command_prints_the_figures_and_writes_only_its_own_files(tmp_path):
    done = run_forked(*TINY, *FEW, "hydra.run.dir=out", cwd=tmp_path, module="mlpmatch_pl.benchmark")
    assert done.returncode == 0, done.stderr
    for words in ("images/s", "worker", "peak", "epochs of 5 batches", "advice"):
        assert words in done.stdout
    assert done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmark.json", "benchmark.log"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_figures_are_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "benchmark.json").write_text("{}")
    monkeypatch.setattr(run.MeasuredTraining, "fit", None)  # measuring would fail
    with pytest.raises(UserError, match=r"benchmark\.json exists"):
        measure(tmp_path)
    assert (tmp_path / "benchmark.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.devices=2", "expected one device, but got 2 processes; use trainer.devices=1"),
        ("benchmark.steps=0", "expected benchmark.steps to be an integer >= 1, but got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(override, words, tmp_path):
    with pytest.raises(UserError, match=words):
        measure(tmp_path, "trainer.accelerator=cpu", override)
    assert list(tmp_path.iterdir()) == []
