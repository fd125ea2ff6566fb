import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from helpers import TINY, compose_config, run_command
from helpers.images import save_mask
from lightning.pytorch.strategies import SingleDeviceStrategy

from mlpmatch_pl.benchmark import benchmark
from mlpmatch_pl.callbacks import progress
from mlpmatch_pl.commands.benchmark import clock, fitting, loading, run
from mlpmatch_pl.commands.benchmark import report as wording
from mlpmatch_pl.commands.benchmark.advice import (
    Hardware,
    Loading,
    compute_sentence,
    first_to_fix,
    optimizer_sentence,
    rarer_validation,
    sentence,
    shares,
    workers_sentence,
)
from mlpmatch_pl.commands.benchmark.clock import PARTS
from mlpmatch_pl.commands.benchmark.figures import Schedule, spread_of_parts, whole_schedule
from mlpmatch_pl.commands.benchmark.loading import predicted_wait, workers_needed
from mlpmatch_pl.commands.benchmark.memory import MemoryLine
from mlpmatch_pl.data.dataset import UnlabeledDataset
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError

FEW = ("benchmark.steps=4", "benchmark.warmup=1", "benchmark.validation=1", "benchmark.loading=2")


def measure(output_dir, *overrides):
    return benchmark(compose_config("benchmark", *TINY, *FEW, *overrides, output_dir=output_dir))


# Arithmetic, against values computed by hand --------------------------------------------------------------------------


def test_parts_are_summed_by_batch_before_they_are_summarized():
    rows = [[1.0, 0.0, 2.0, 3.0, 0.0], [0.0, 0.0, 2.0, 3.0, 4.0]]
    spread = spread_of_parts(rows)
    assert list(spread) == [*PARTS, "batch"]
    assert (spread["data wait"].mean, spread["data wait"].median) == (0.5, 0.5)
    assert spread["batch"].mean == pytest.approx(7.5)
    assert (spread["batch"].low, spread["batch"].high) == pytest.approx((6.3, 8.7))  # linear between 6 and 9
    assert sum(spread[name].mean for name in PARTS) == pytest.approx(spread["batch"].mean)


@pytest.mark.parametrize(
    ("workers", "wait"),
    [
        ({"labeled": 0, "unlabeled": 0}, 8.0),  # all in the main process
        ({"labeled": 0, "unlabeled": 1}, 4.0),  # 6 beside 2 + 2, and the labeled 2 are still waited for
        ({"labeled": 1, "unlabeled": 1}, 4.0),
        ({"labeled": 1, "unlabeled": 2}, 1.0),
        ({"labeled": 1, "unlabeled": 3}, 0.0),
        ({"labeled": 0, "unlabeled": 6}, 2.0),
    ],
)
def test_the_predicted_wait_is_that_of_a_simulated_queue(workers, wait):
    seconds, step = {"labeled": 2.0, "unlabeled": 6.0}, 2.0
    assert predicted_wait(seconds, workers, step) == pytest.approx(wait)
    assert simulated_wait(seconds, workers, step) == pytest.approx(wait, abs=0.02)


def simulated_wait(seconds, workers, step, batches=2000):
    """Batch k is loaded by worker k modulo their number, which starts it two batches of its own ahead at most."""
    now, waited, ready = 0.0, 0.0, {name: [0.0] * count for name, count in workers.items()}
    for batch in range(batches):
        asked = now
        for name, count in workers.items():
            if not count:
                now += seconds[name]
                continue
            place = batch % count
            done = max(ready[name][place], now - 2 * seconds[name]) + seconds[name]
            ready[name][place] = done
            now = max(now, done)
        waited += now - asked
        now += step
    return waited / batches


def test_the_workers_needed_are_the_least_that_keep_the_wait_under_five_percent():
    seconds = {"labeled": 0.2, "unlabeled": 1.2}
    assert workers_needed(seconds, 0.3) == 5  # 1 + 4: 0.3 s an unlabeled batch; 1 + 3: 0.4 s
    assert workers_needed(seconds, 0.39) == 4  # 0.01 s of waiting is within 5 %
    assert workers_needed(seconds, 100.0) == 0
    assert workers_needed(seconds, 0.001) is None


def test_memory_is_a_line_and_a_tenth_is_left():
    line = MemoryLine.through((8, 13e9), (4, 7e9))
    assert (line.fixed, line.per_image) == (1e9, 1.5e9)
    assert line.largest_batch(80e9) == 47  # (72 - 1) / 1.5
    assert line.largest_batch(1e9) == 0
    assert MemoryLine.through((8, 5e9), (4, 5e9)).largest_batch(80e9) is None


def plan(training=900.0, validation=100.0):
    return Schedule(epochs=10, batches=100, validations=10, training=training, validation=validation)


def test_a_schedule_adds_up():
    schedule = whole_schedule(80, 50, every=3, batch=0.25, validation_batches=40, validation_batch=0.5)
    assert schedule.batches == 4000
    assert schedule.training == 1000
    assert schedule.validations == 26
    assert schedule.validation == 26 * 20
    assert schedule.validation_share == pytest.approx(520 / 1520)


def test_rarer_validation_brings_it_to_a_tenth():
    schedule = plan(training=100.0, validation=50.0)  # 10 s an epoch, 5 s a validation
    assert rarer_validation(schedule) == 5  # 5 / (5 + 50) is a tenth at most; 5 / (5 + 40) is not
    assert rarer_validation(plan(training=1.0, validation=1000.0)) == 10  # never more than the epochs


@pytest.mark.parametrize(
    ("seconds", "wait", "validation", "part", "words"),
    [
        (
            (0.0, 0.01, 0.3, 0.6, 0.01),
            0.5,
            10.0,
            "data wait",
            "waited for in 35 % of the time: try loader.num_workers=6",
        ),
        ((0.0, 0.4, 0.3, 0.6, 0.01), 0.0, 10.0, "transfer", "the transfer to the device takes 31 %"),
        ((0.0, 0.01, 0.3, 0.6, 0.5), 0.0, 10.0, "optimizer", "trainer.accumulate_grad_batches"),
        ((0.0, 0.01, 0.3, 0.6, 0.01), 0.0, 900.0, "validation", "trainer.check_val_every_n_epoch=9 brings"),
        ((0.0, 0.01, 0.3, 0.6, 0.01), 0.0, 10.0, "compute", "forward and backward take 98 %"),
    ],
)
def test_the_part_that_costs_most_is_named_with_what_to_try(seconds, wait, validation, part, words):
    found, schedule = Loading(wait, 2, 6, 8), plan(validation=validation)
    part_shares = shares(dict(zip(PARTS, seconds, strict=True)), found, schedule)
    assert first_to_fix(part_shares) == part
    said = sentence(part, part_shares, found, schedule, hardware(precision="32-true"))
    assert words in said


def test_advice_on_workers_knows_the_cores():
    assert workers_sentence(Loading(1.0, 2, 6, 8)) == "try loader.num_workers=6 (now 2)"
    assert "more than the 4 cores here, so try loader.cache=FOLDER" in workers_sentence(Loading(1.0, 2, 6, 4))
    assert "2 workers would do on cores of their own" in workers_sentence(Loading(1.0, 2, 1, 2))
    assert workers_sentence(Loading(1.0, 2, None, 4)).startswith("not even 64 workers keep up")
    assert workers_sentence(Loading(1.0, 0, 0, 2)) == "try loader.num_workers=1 (now 0)"


def test_advice_on_computing_knows_what_is_used_already():
    assert "trainer=gpu" in compute_sentence(hardware(precision="32-true"))
    assert compute_sentence(hardware(compile_blocks=True)) == "try trainer.channels_last=true"
    assert compute_sentence(hardware(channels_last=True)) == "try trainer.compile_blocks=true"
    everything = compute_sentence(hardware(channels_last=True, compile_blocks=True))
    assert everything.startswith("a smaller loader.crop_size")
    assert "trainer." not in everything
    assert compute_sentence(hardware("cpu", "32-true")).startswith("try trainer.precision=bf16-mixed; ")
    assert compute_sentence(hardware("cpu", "bf16-mixed")).startswith("a smaller loader.crop_size")


def test_a_fused_optimizer_is_advised_first_where_it_can_be_turned_on():
    assert optimizer_sentence(hardware()).startswith("try trainer.fused_optimizer=true first; a larger")
    assert optimizer_sentence(hardware(precision="32-true", clipping=True)).startswith("try trainer.fused_optimizer")
    for without in (hardware(fused_optimizer=True), hardware("cpu", "32-true"), hardware(clipping=True)):
        assert optimizer_sentence(without).startswith("a larger loader.batch_size")


@pytest.mark.parametrize(
    ("seconds", "override", "words"),
    [
        ((0, 0, 0.5, 0.5, 0), "trainer.channels_last=true", "try trainer.compile_blocks=true"),
        ((0, 0, 0.5, 0.5, 0), "trainer.compile_blocks=true", "try trainer.channels_last=true"),
        ((0, 0, 0.3, 0.4, 0.3), "trainer.compile_blocks=true", "try trainer.fused_optimizer=true first; a larger"),
        ((0, 0, 0.3, 0.4, 0.3), "trainer.fused_optimizer=true", "a larger loader.batch_size"),
        ((0, 0, 0.3, 0.4, 0.3), "trainer.gradient_clip_val=1", "a larger loader.batch_size"),
    ],
)
def test_advice_looks_at_the_configured_trainer(seconds, override, words, tmp_path):
    options = ("trainer=gpu", "trainer.channels_last=false", override)
    config = config_of(compose_config("benchmark", *options, output_dir=tmp_path))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")), precision="bf16-mixed")
    parts = spread_of_parts([seconds])
    said = run._advice(config, trainer, parts, Loading(0.0, 2, 2, 8), plan(validation=10.0))
    assert said.split(": ", 1)[1].startswith(words)


def hardware(device="cuda", precision="bf16-mixed", **used):
    off = dict.fromkeys(("channels_last", "compile_blocks", "fused_optimizer", "clipping"), False)
    return Hardware(device, precision, **(off | used))


@pytest.mark.parametrize(
    ("second", "line", "words"),
    [
        (4, MemoryLine(1e9, 1.5e9), "16 % of 80.0 GB; up to loader.batch_size=47 fits with a tenth to spare"),
        (4, MemoryLine(13e9, 0), "it does not rise with the batch (loader.batch_size=4 was tried)"),
        (6, None, "16 % of 80.0 GB; loader.batch_size=6 did not fit"),
    ],
)
def test_what_is_known_about_the_largest_batch_is_said(second, line, words, monkeypatch):
    """The figures of a GPU of 80 GB, of which the configured batch takes 13."""
    monkeypatch.setattr(run, "device_bytes", lambda device: 80_000_000_000)
    training = SimpleNamespace(
        datamodule=SimpleNamespace(batch_size=8 if second == 4 else 3), memory_line=lambda *measured: line
    )
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    memory = run._memory(training, trainer, None, 13_000_000_000)
    assert memory["second_batch"] == second
    assert words in wording._memory({"memory": json.loads(json.dumps(memory))})


# Measuring ------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only where a test says so: exact on a machine of any speed."""

    def __init__(self, monkeypatch):
        self.seconds, self.monkeypatch = 0.0, monkeypatch
        monkeypatch.setattr(clock, "now", lambda device: self.seconds)
        monkeypatch.setattr(loading, "time", SimpleNamespace(perf_counter=lambda: self.seconds))

    def delay(self, owner, name, seconds):
        """Let every call of a method take so many seconds."""
        method = getattr(owner, name)

        def slow(*args, **kwargs):
            self.seconds += seconds
            return method(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock_of_test(monkeypatch):
    return Clock(monkeypatch)


def means(report):
    return {name: round(part["mean"], 6) for name, part in report["parts"].items()}


def test_every_part_is_measured_as_that_part(tmp_path, clock_of_test):
    clock_of_test.delay(UnlabeledDataset, "__getitem__", 0.01)  # 4 a batch
    clock_of_test.delay(SingleDeviceStrategy, "batch_to_device", 0.02)
    clock_of_test.delay(MLPMatch, "training_step", 0.3)
    clock_of_test.delay(MLPMatch, "backward", 0.5)
    clock_of_test.delay(MLPMatch, "optimizer_zero_grad", 0.05)
    clock_of_test.delay(torch.optim.lr_scheduler.LambdaLR, "step", 0.1)
    clock_of_test.delay(MLPMatch, "validation_step", 2.0)
    report = measure(tmp_path)
    assert means(report) == {
        "data wait": 0.04, "transfer": 0.02, "forward": 0.35, "backward": 0.5, "optimizer": 0.1, "batch": 1.01
    }  # fmt: skip
    assert report["loading"]["seconds_a_batch"] == pytest.approx({"labeled": 0.0, "unlabeled": 0.04})
    assert report["validation"]["seconds_a_batch"] == pytest.approx(2.02)  # with its transfer
    assert report["schedule"]["training"] == pytest.approx(5 * 1.01)
    assert report["schedule"]["validation"] == pytest.approx(2.02)  # one batch, once
    assert report["advice"].startswith("validation takes 29 % of the schedule: trainer.check_val_every_n_epoch=1")


def test_a_slow_loader_is_found_and_workers_are_advised(tmp_path, clock_of_test):
    clock_of_test.delay(UnlabeledDataset, "__getitem__", 0.2)
    clock_of_test.delay(MLPMatch, "training_step", 0.3)
    report = measure(tmp_path)
    assert means(report)["data wait"] == 0.8
    assert report["loading"]["workers_needed"] == 4  # 1 for the labeled images, and 0.8 s / 3 for the others
    words = "data is waited for in 73 % of the time: try loader.num_workers=4 (now 0)"
    assert report["advice"].startswith(words)


def test_workers_that_had_batches_ready_do_not_hide_that_they_fall_behind(tmp_path, clock_of_test):
    clock_of_test.delay(UnlabeledDataset, "__getitem__", 0.2)  # in workers this clock stands still
    clock_of_test.delay(MLPMatch, "training_step", 0.3)
    report = measure(tmp_path, "loader.num_workers=2")
    assert means(report)["data wait"] == 0
    assert report["loading"]["wait"] == pytest.approx(0.5)  # 0.8 s a batch in one worker, beside a step of 0.3 s
    assert report["advice"].startswith("data is waited for in 63 % of the time: try loader.num_workers=4 (now 2)")
    assert report["schedule"]["training"] == pytest.approx(5 * 0.8)


def test_on_real_time_a_sleeping_loader_is_waited_for(tmp_path, monkeypatch, caplog):
    getitem = UnlabeledDataset.__getitem__

    def slow(self, draw):
        time.sleep(0.05)
        return getitem(self, draw)

    monkeypatch.setattr(UnlabeledDataset, "__getitem__", slow)
    monkeypatch.setattr(progress, "SECONDS_THAT_MATTER", 0)
    report = measure(tmp_path)
    assert report["parts"]["data wait"]["low"] >= 4 * 0.05
    assert report["loading"]["seconds_a_batch"]["unlabeled"] >= 4 * 0.05
    assert min(part["low"] for name, part in report["parts"].items() if name != "transfer") > 0
    assert "waiting for data" not in caplog.text  # train says it, and names this command


def test_the_figures_agree_with_each_other(tmp_path):
    report = measure(
        tmp_path, "trainer.accumulate_grad_batches=2", "schedule.steps=12", "loader.unlabeled_batch_size=6"
    )
    assert report == json.loads((tmp_path / "benchmark.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]
    batch = report["parts"]["batch"]["mean"]
    assert report["images_per_second"] == pytest.approx(10 / batch)
    assert report["batch"] == {"labeled": 4, "unlabeled": 6, "crop_size": 48, "accumulated": 2}
    # 20 unlabeled images in batches of 6: 4 batches, 2 optimizer steps an epoch, so 6 epochs are 12 steps.
    assert report["schedule"]["epochs"] == 6
    assert report["schedule"]["batches"] == 24
    waited = report["loading"]["wait"] - report["parts"]["data wait"]["mean"]
    assert report["schedule"]["training"] == pytest.approx(24 * (batch + waited))
    rate = report["learning_rate"]
    assert (rate["images"], rate["reaching_accumulation"]) == (20, 2)
    assert rate["scaled"] == pytest.approx(0.05 * 20 / 16)


def test_supervised_batches_hold_as_many_images_and_it_is_said(tmp_path):
    report = measure(tmp_path, "method=supervised")
    assert report["batch"]["labeled"] == 8
    said = "\n".join(wording.lines(report))
    assert "batches of 8 labeled" in said
    assert "batches hold as many more labeled ones" in said
    assert "trainer.accumulate_grad_batches=2 reaches the reference" in said


@pytest.mark.parametrize("method", ["unimatch", "mlpmatch_official"])
def test_other_methods_are_measured_with_workers(method, tmp_path):
    report = measure(tmp_path, f"method={method}", "loader.num_workers=2")
    assert report["method"] == method
    assert report["loading"]["workers"] == {"labeled": 1, "unlabeled": 1}
    seconds = {name: part["mean"] for name, part in report["parts"].items()}
    assert seconds.pop("batch") == pytest.approx(sum(seconds.values()))
    assert min(seconds["forward"], seconds["backward"]) > seconds["transfer"] > 0  # on the CPU it moves nothing


def test_own_images_with_four_channels(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for index in range(8):
        tifffile.imwrite(root / f"images/{index}.tif", rng.integers(0, 255, (40, 44, 4)).astype(np.uint8))
        if index < 5:
            save_mask(root / f"masks/{index}.png", rng.integers(0, 2, (40, 44)).astype(np.uint8), palette=False)
    four = "[0.5,0.5,0.5,0.5]"
    cfg = compose_config(
        "benchmark", "dataset=folder", f"dataset.root={root}", "dataset.classes=[a,b]", "dataset.in_chans=4",
        "dataset.val=1", f"backbone.mean={four}", f"backbone.std={four}", "loader.crop_size=40", "loader.batch_size=2",
        "loader.num_workers=0", "backbone.decoder_channels=8", *FEW, output_dir=tmp_path / "out",
    )  # fmt: skip
    report = benchmark(cfg)
    assert report["images_per_second"] > 0
    assert report["validation"]["images"] == 1


def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(tmp_path, monkeypatch):
    step = MLPMatch.training_step

    def limited(self, batch, batch_idx):
        if len(batch["labeled"]["image"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MLPMatch, "training_step", limited)
    with pytest.raises(UserError) as caught:
        measure(tmp_path, "loader.batch_size=8")
    assert str(caught.value) == (
        "expected batches of loader.batch_size=8 to fit in the memory, but they do not; "
        "use loader.batch_size=2 trainer.accumulate_grad_batches=4"
    )
    with pytest.raises(UserError, match=r"use loader\.batch_size=2 trainer\.accumulate_grad_batches=12$"):
        measure(tmp_path, "loader.batch_size=8", "trainer.accumulate_grad_batches=3")
    assert list(tmp_path.iterdir()) == []


def test_the_second_batch_size_for_the_memory_is_really_used(tmp_path, monkeypatch):
    """A GPU's memory, of which a batch takes 2 GB and an image 1 GB."""
    images = []
    step = MLPMatch.training_step

    def noted(self, batch, batch_idx):
        images.append(len(batch["labeled"]["image"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MLPMatch, "training_step", noted)
    monkeypatch.setattr(fitting, "peak", lambda device, started: int((2 + images[-1]) * 1e9))
    cfg = compose_config("benchmark", *TINY, *FEW, output_dir=tmp_path)
    line = training_of(cfg, tmp_path).memory_line(module_of(cfg), 4, int(6e9))
    assert images == [2, 2]
    assert line == MemoryLine(2e9, 1e9)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_memory_of_momentum_is_measured(accumulated, tmp_path, monkeypatch):
    steps = []
    step = torch.optim.SGD.step

    def noted(self, closure=None):
        loss = step(self, closure)
        steps.append(all("momentum_buffer" in state for state in self.state.values()) and len(self.state) > 0)
        return loss

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    cfg = compose_config(
        "benchmark", *TINY, *FEW, f"trainer.accumulate_grad_batches={accumulated}", output_dir=tmp_path
    )
    training_of(cfg, tmp_path).memory_line(module_of(cfg), 4, 0)
    assert steps == [True, True]


def training_of(cfg, tmp_path):
    config = config_of(cfg)
    return fitting.Training(config, tmp_path, datamodule_of(config))


def config_of(cfg):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)


def datamodule_of(config):
    from mlpmatch_pl.engine.build import build_datamodule
    from mlpmatch_pl.methods.method import resolve_method

    return build_datamodule(config, resolve_method(config["method"]))


def module_of(cfg):
    return MLPMatch(len(cfg.dataset.get("classes") or ()) or 6, backbone="test_resnet", decoder_channels=8, lr=0.01)


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock_and_its_memory_is_a_line(tmp_path):
    report = measure(tmp_path, "trainer=gpu", "loader.batch_size=8", "benchmark.steps=8")
    assert sum(report["parts"][name]["mean"] for name in PARTS) == pytest.approx(report["parts"]["batch"]["mean"])
    memory = report["memory"]
    assert 0 < memory["peak_bytes"] < memory["device_bytes"]
    assert memory["largest_batch"] > 8


@pytest.mark.parametrize(("waited", "worked", "says"), [(20, 100, True), (20, 1000, False), (5, 20, False)])
def test_training_says_once_that_loading_was_too_slow(waited, worked, says, monkeypatch, caplog):
    seconds = iter([0, waited, waited + worked])
    monkeypatch.setattr("mlpmatch_pl.utils.timing.time.perf_counter", lambda: next(seconds))
    data_wait, trainer = progress.DataWait(), SimpleNamespace(is_global_zero=True)
    module = SimpleNamespace(device=torch.device("cpu"))
    data_wait.on_train_epoch_start(trainer, module)
    data_wait.on_train_batch_start(trainer, module, None, 0)
    data_wait.on_train_batch_end(trainer, module, None, None, 0)
    data_wait.on_fit_end(trainer, module)
    assert [record.getMessage()[:52] for record in caplog.records] == (
        ["17 % of the training time was waiting for data: pyth"] if says else []
    )


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_leaves_only_its_own_files(tmp_path):
    done = run_command(*TINY, *FEW, "hydra.run.dir=out", cwd=tmp_path, module="mlpmatch_pl.benchmark")
    assert done.returncode == 0, done.stderr
    for words in ("data wait", "images a second", "whole schedule: about", "learning rate", "first: "):
        assert words in done.stdout
    assert done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["benchmark.json", "benchmark.log"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_figures_are_not_written_over(tmp_path, monkeypatch):
    figures = tmp_path / "benchmark.json"
    figures.write_text("{}")
    monkeypatch.setattr(fitting.Training, "fit", None)  # measuring would fail
    with pytest.raises(UserError) as caught:
        measure(tmp_path)
    assert str(caught.value) == (
        f"expected to write new files only, but {figures} exists; choose another folder by hydra.run.dir"
    )
    assert figures.read_text() == "{}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.devices=2", "expected one device to measure on, but got 2 processes; use trainer.devices=1"),
        ("benchmark.steps=0", "expected benchmark.steps as a whole number from 1 on, but got 0"),
        ("benchmark.warmup=1.5", "expected benchmark.warmup as a whole number, but got 1.5"),
        ("schedule.epochs=3", "expected a positive whole schedule.epochs or schedule.steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(override, words, tmp_path):
    cfg = compose_config("benchmark", *TINY, "trainer.accelerator=cpu", override, output_dir=tmp_path)
    with pytest.raises(UserError, match=words):
        benchmark(cfg)
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_key_is_one_line(tmp_path):
    done = run_command("benchmark.step=3", cwd=tmp_path, module="mlpmatch_pl.benchmark")
    assert done.returncode == 1
    assert "Did you mean benchmark.steps" in done.stderr
    assert "Traceback" not in done.stderr
