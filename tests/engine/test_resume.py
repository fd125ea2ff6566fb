"""Stopped, killed and changed runs that are resumed, compared with a run that was left alone."""

import csv
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, compose_train
from helpers.processes import ForkedCommand, run_forked
from lightning.pytorch import Callback

from mlpmatch_pl.callbacks.checkpoints import LastCheckpoint
from mlpmatch_pl.callbacks.stop_signals import Stopped
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.engine import run_folder
from mlpmatch_pl.engine.resume import find_start, read_start
from mlpmatch_pl.engine.run_folder import check_splits, run_lock
from mlpmatch_pl.engine.trainer import length_of_training
from mlpmatch_pl.methods.schedules import lr_schedule
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError

RUN = (*TINY, "schedule.steps=10", "trainer.log_every_n_steps=1", "resume=auto")  # two epochs of five steps
SILENT = ("callbacks.predictions=null", "callbacks.confusion=null")


class SendSignal(Callback):
    """Sends this process a signal in a hook of an epoch, at a batch."""

    def __init__(self, hook, epoch=0, batch=0, signum=signal.SIGTERM):
        def send(trainer, module, *arguments, **named):
            if trainer.current_epoch == epoch and (not arguments or batch in arguments):
                os.kill(os.getpid(), signum)

        setattr(self, hook, send)


class Crash(Callback):
    """Ends a training with nothing saved, before the second batch of its second epoch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise RuntimeError("crashed")


class Truncate(Callback):
    """Cuts off the best checkpoint at the end of the training."""

    def on_train_end(self, trainer, module):
        path = Path(trainer.checkpoint_callback.best_model_path)
        path.write_bytes(path.read_bytes()[:-1000])


def add(kind, **arguments):
    values = "".join(f",{key}:{value}" for key, value in arguments.items())
    return f"+callbacks.added={{_target_:test_resume.{kind}{values}}}"


def run(folder, *overrides):
    return train(compose_train(*RUN, *overrides, output_dir=folder))


def copy(folder, to):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def checkpoint(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def differing(one, two):
    return [key for key in one["state_dict"] if not torch.equal(one["state_dict"][key], two["state_dict"][key])]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def values(folder):
    """Return the rows of metrics.csv by step and kind, the last of those that were repeated."""
    found = {}
    for row in rows(folder):
        filled = {key: value for key, value in row.items() if value}
        found[(int(row["step"]), *sorted(filled))] = filled
    return found


def assert_same_run(folder, straight):
    for name in ("last", "best"):
        assert differing(checkpoint(straight, name), checkpoint(folder, name)) == []
    assert values(folder) == values(straight)
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (folder, straight))
    for key in ("steps", "last", "test"):
        assert ours[key] == theirs[key]
    assert ours["best"]["val/miou"] == theirs["best"]["val/miou"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


def test_processor_seconds_are_those_of_the_last_checkpoint_although_the_best_is_tested(tmp_path):
    metrics = run(tmp_path, "callbacks.checkpoint.monitor=train/lr")  # the first is the best
    best, last = (checkpoint(tmp_path, name)["callbacks"]["ProcessorTime"]["seconds"] for name in ("best", "last"))
    assert best < metrics["processor_seconds"] == round(last, 1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in the middle of its second epoch, after seven steps of ten."""
    folder, saved, save = tmp_path_factory.mktemp("stopped"), [], LastCheckpoint._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LastCheckpoint, "_save", lambda self, trainer: saved.append(trainer.global_step) or save(self, trainer)
        )
        stop = add("SendSignal", hook="on_train_batch_start", epoch=1, batch=1)
        with pytest.raises(Stopped):
            run(folder, stop, "callbacks.checkpoint.every_n_steps=2", *SILENT)
    assert saved == [2, 4, 5, 6, 7]  # every second step, after the epoch, and at the stop
    return folder


@pytest.mark.parametrize(
    ("hook", "epoch", "step"),
    [
        ("on_train_start", 0, 0),  # Lightning receives it, and would end with exit code 0
        ("on_validation_batch_start", 0, 5),  # the validation is repeated
        ("on_validation_end", 0, 5),  # the validation is not repeated, and its best checkpoint is kept
        ("on_test_batch_start", 2, 10),  # only the test is repeated
    ],
)
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(straight, hook, epoch, step, tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as caught:
        run(tmp_path, add("SendSignal", hook=hook, epoch=epoch), *SILENT)
    assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (
        f"SIGTERM: stopped after step {step}; continue with the same command and hydra.run.dir={tmp_path}"
        in caplog.text
    )
    assert not (tmp_path / "metrics.json").exists()
    if step:
        assert checkpoint(tmp_path)["global_step"] == step
    run(tmp_path, *SILENT)
    assert_same_run(tmp_path, straight)


def test_a_run_stopped_within_an_epoch_resumes_bit_for_bit_also_with_workers(straight, stopped, tmp_path):
    folder = copy(stopped, tmp_path)
    assert checkpoint(folder)["global_step"] == 7
    assert checkpoint(folder, "last-1")["global_step"] == 6
    assert [int(row["step"]) for row in rows(folder) if row["train/loss"]] == list(range(7))
    run(folder, "loader.num_workers=2")
    assert_same_run(folder, straight)


@pytest.mark.slow
def test_a_run_killed_by_sigkill_resumes_bit_for_bit(straight, tmp_path):
    """The kill comes one step after a checkpoint, so that a step is repeated."""
    kill = add("SendSignal", hook="on_train_batch_start", epoch=1, batch=4, signum=9)
    options = ("callbacks.checkpoint.every_n_steps=4", "loader.num_workers=1", f"hydra.run.dir={tmp_path}/run")
    here = Path(__file__).parent
    killed = run_forked(*RUN, *options, kill, cwd=tmp_path, PYTHONPATH=f"{here}{os.pathsep}{here.parent}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint(tmp_path / "run")["global_step"] == 8
    assert max(int(row["step"]) for row in rows(tmp_path / "run")) == 8
    (tmp_path / "run" / "checkpoints" / "last.ckpt.unfinished").write_bytes(b"half")  # as if killed while writing
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("1,9,0.")
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)
    assert [int(row["step"]) for row in rows(tmp_path / "run") if row["train/loss"]] == [*range(9), 8, 9]
    assert names(tmp_path / "run") == ["best.ckpt", "last-1.ckpt", "last.ckpt"]


def test_a_validation_between_accumulated_batches_is_no_point_to_stop(tmp_path):
    options = ("+trainer.val_check_interval=3", "trainer.accumulate_grad_batches=2", "dataset.train=28", *SILENT)
    run(tmp_path / "straight", *options)
    with pytest.raises(Stopped):
        run(tmp_path / "run", *options, add("SendSignal", hook="on_validation_batch_start"))
    run(tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_the_clock_is_read_at_every_tenth_step(monkeypatch):
    last, now = LastCheckpoint("checkpoints", every_minutes=1), [0.0]
    monkeypatch.setattr("mlpmatch_pl.callbacks.checkpoints.time.monotonic", lambda: now[0])
    trainer = SimpleNamespace(global_step=9, strategy=SimpleNamespace(broadcast=lambda value: value))
    last.on_train_start(trainer, None)
    now[0] = 60.0
    assert not last._due(trainer)
    trainer.global_step = 10
    assert last._due(trainer)
    now[0] = 59.0
    assert not last._due(trainer)


@pytest.mark.parametrize("name", ["every_n_steps", "every_minutes"])
def test_an_interval_that_is_not_positive_is_refused(name):
    with pytest.raises(UserError, match=f"expected callbacks.checkpoint.{name} above 0, but got 0; null switches"):
        LastCheckpoint("checkpoints", **{name: 0})


# --- damaged checkpoints, finished runs, older checkpoints ------------------------------------------------------------


def test_a_damaged_last_checkpoint_falls_back_to_the_previous_one(straight, tmp_path, caplog):
    folder = copy(straight, tmp_path)
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    with caplog.at_level(logging.WARNING):
        start = find_start("auto", folder)
    assert (start.checkpoint.name, start.step, start.epoch) == ("last-1.ckpt", 5, 1)
    assert "last.ckpt is damaged or not a training checkpoint; trying the previous one" in caplog.text
    (folder / "metrics.json").unlink()
    run(folder, *SILENT)
    assert_same_run(folder, straight)
    assert checkpoint(folder, "last-1")["global_step"] == 5  # the damaged one has not taken its name
    assert "last_aside-1.ckpt" in names(folder)


def test_if_all_checkpoints_are_damaged_nothing_is_touched(straight, tmp_path):
    folder = copy(straight, tmp_path)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"but last\.ckpt, last-1\.ckpt, best\.ckpt are all damaged"):
        run(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_best_checkpoint_is_not_tested(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = run(tmp_path, "schedule.steps=5", add("Truncate"), *SILENT)
    assert "best.ckpt is damaged; testing the last weights instead" in caplog.text
    assert (metrics["tested"], metrics["best"]["checkpoint"]) == ("last weights", None)
    assert 0 <= metrics["test"]["test/miou"] <= 1


def test_a_finished_run_that_was_moved_is_extended(straight, tmp_path):
    folder, longer = copy(straight, tmp_path), ("schedule.epochs=3", "schedule.steps=null", *SILENT)
    with pytest.raises(UserError, match=r"last\.ckpt has finished all 2; raise schedule\.steps above 10"):
        run(folder)
    score = json.loads((folder / "metrics.json").read_text())["best"]["val/miou"]
    metrics = run(folder, *longer, "schedule.lr=0")  # learns nothing more
    assert metrics["steps"] == 15
    assert metrics["best"]["val/miou"] >= score
    assert metrics["best"]["checkpoint"] == str(folder / "checkpoints" / "best.ckpt")
    assert json.loads((folder / "metrics-1.json").read_text())["steps"] == 10
    assert (folder / "config-1.yaml").is_file()
    with pytest.raises(UserError, match="has finished all 3"):
        run(folder, *longer)


def test_resuming_from_an_older_checkpoint_survives_a_crash(straight, tmp_path):
    folder = copy(straight, tmp_path)
    (folder / "checkpoints" / "best.ckpt").write_bytes((folder / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(RuntimeError, match="crashed"):
        run(folder, f"resume={folder / 'checkpoints' / 'last-1.ckpt'}", add("Crash"), *SILENT)
    start = find_start("auto", folder)
    assert (start.checkpoint.name, start.step) == ("last.ckpt", 5)
    run(folder, *SILENT)
    assert differing(checkpoint(straight), checkpoint(folder)) == []
    assert names(folder) == ["best.ckpt", "best_aside-1.ckpt", "last-1.ckpt", "last.ckpt", "last_aside-1.ckpt"]
    assert differing(checkpoint(straight), checkpoint(folder, "last_aside-1")) == []


def test_auto_starts_from_scratch_without_a_checkpoint(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert find_start("auto", tmp_path).checkpoint is None
    assert "no checkpoint in" in caplog.text
    (tmp_path / "metrics.json").touch()
    with pytest.raises(UserError, match="holds a finished run without one"):
        find_start("auto", tmp_path)


def test_a_run_is_not_overwritten(straight, tmp_path):
    with pytest.raises(UserError, match=r"expected a new run folder, but .*best\.ckpt exists; continue that run"):
        find_start(None, straight)
    other = copy(straight, tmp_path)
    with pytest.raises(UserError, match="expected a new run folder"):
        find_start(str(straight / "checkpoints" / "last.ckpt"), other)
    assert find_start(str(other / "checkpoints" / "last-1.ckpt"), other).step == 5
    with pytest.raises(UserError, match=r"expected a checkpoint to resume from, but nowhere\.ckpt does not exist"):
        find_start("nowhere.ckpt", tmp_path / "new")


# --- another configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [(("loader.batch_size=8",), 3), (("trainer.accumulate_grad_batches=2",), 3)],
)
def test_with_other_steps_per_epoch_the_interrupted_epoch_starts_again(options, steps, stopped, tmp_path, caplog):
    folder = copy(stopped, tmp_path)
    done = len(rows(folder))
    with caplog.at_level(logging.WARNING):
        metrics = run(folder, *options, *SILENT)  # schedule.steps=10 keeps its two epochs
    assert "epoch 2 starts again at its beginning" in caplog.text
    assert metrics["steps"] == 2 * steps
    state = checkpoint(folder)
    assert state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2
    assert state["lr_schedulers"][0]["last_epoch"] == 2 * steps
    again = [row for row in rows(folder)[done:] if row["train/lr"]]
    assert [(int(row["epoch"]), int(row["step"])) for row in again] == [(1, step) for step in range(steps, 2 * steps)]
    for row in again:
        lr = 0.05 * lr_schedule(2 * steps, "poly")(int(row["step"]))
        assert float(row["train/lr"]) == pytest.approx(lr)


def test_after_a_whole_epoch_other_steps_per_epoch_repeat_nothing(straight, tmp_path, caplog):
    older = straight / "checkpoints" / "last-1.ckpt"
    with caplog.at_level(logging.WARNING):
        metrics = run(tmp_path, f"resume={older}", "loader.batch_size=8", *SILENT)
    assert "starts again" not in caplog.text
    assert metrics["steps"] == 6
    assert [int(row["step"]) for row in rows(tmp_path) if row["train/loss"]] == [3, 4, 5]


def test_a_schedule_in_steps_keeps_its_epochs_unless_it_changes():
    before = {"steps": 10, "epochs": 2, "every": 1}
    assert length_of_training({"epochs": None, "steps": 10}, 3, before) == (2, 1)
    assert length_of_training({"epochs": None, "steps": 12}, 3, before) == (4, 1)


def test_another_optimizer_is_refused(stopped, tmp_path):
    folder = copy(stopped, tmp_path)
    for override in ("optimizer=adamw", "schedule.layer_decay=0.7"):
        with pytest.raises(UserError, match=r"expected the optimizer of .*last\.ckpt, SGD with .*; load its weights"):
            run(folder, override, *SILENT)


def test_the_configured_learning_rate_is_used(stopped, tmp_path, caplog):
    folder = copy(stopped, tmp_path)
    with caplog.at_level(logging.INFO):
        run(folder, "schedule.lr=0.5", "optimizer.momentum=0.5", *SILENT)
    assert "at epoch 2 (40% of it done); the configured learning rate is used, it was 0.025" in caplog.text
    for row in rows(folder):
        if row["train/lr"]:
            step = int(row["step"])
            lr = (0.25 if step >= 7 else 0.025) * lr_schedule(10, "poly")(step)
            assert float(row["train/lr"]) == pytest.approx(lr)
    assert checkpoint(folder)["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.5
    assert (folder / "config-1.yaml").is_file()


def test_other_images_are_refused_in_the_same_folder_and_warned_of_in_a_new_one(straight, tmp_path, caplog):
    last = straight / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"expected 4 labeled images \(4 \(seed 0\), sha256 .*but got 5 "):
        run(straight, "dataset.labeled=5", "schedule.steps=15")
    with caplog.at_level(logging.WARNING):
        check_splits(last, tmp_path, shapes(labeled=5, train=24, val=5, test=3, size=48))
    assert "the checkpoint was trained with 4 labeled images" in caplog.text


def test_other_classes_and_damaged_files_of_the_run_are_refused(straight, tmp_path):
    folder, longer = copy(straight, tmp_path), "schedule.steps=15"
    splits = folder / "splits.json"
    whole = splits.read_text()
    for damaged in ("[]", '{"labeled": 3}', '{"labeled": {}}', "{"):
        splits.write_text(damaged)
        with pytest.raises(UserError, match=r"expected the images of the run in .*splits\.json, but it is damaged"):
            run(folder, longer)
    splits.write_text(whole)
    content = checkpoint(folder)
    before = content["hyper_parameters"]["class_names"]
    content["hyper_parameters"]["class_names"] = [*before[1:], before[0]]
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=rf"expected the classes .*, in this order, but got {before[0]}, "):
        run(folder, longer)


def test_fewer_epochs_than_are_trained_are_refused(straight):
    with pytest.raises(UserError, match=r"within the schedule's 1 epochs, but .*last\.ckpt has trained 2; raise"):
        run(straight, "schedule.epochs=1", "schedule.steps=null")


def test_a_time_limit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"but got trainer\.max_time; let a signal end a run whose time is limited"):
        run(tmp_path, "+trainer.max_time='00:00:10:00'")
    assert list(tmp_path.iterdir()) == []


# --- other processes --------------------------------------------------------------------------------------------------


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    folder, (reader, writer) = tmp_path / "run", os.pipe()
    if not (other := os.fork()):
        with run_lock(folder):
            os.write(writer, b"locked")
            time.sleep(60)
    try:
        assert os.read(reader, 6) == b"locked"
        with pytest.raises(UserError, match=rf"another one holds {folder}/run\.lock; wait for its end"):
            run(folder)
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    with run_lock(folder):  # the lock ended with its process
        assert (folder / "run.lock").exists()
    assert list(folder.iterdir()) == []
    with run_lock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_disk_without_locks_is_no_error(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise OSError("no locks available")

    monkeypatch.setattr(run_folder.FileLock, "acquire", refuse)
    with run_lock(tmp_path), run_lock(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "options"),
    [
        ("SIGINT", 130, ["loader.num_workers=2"]),
        ("SIGTERM", 143, ["trainer.accelerator=cpu", "trainer.devices=2"]),
    ],
    ids=["workers", "processes"],
)
def test_a_signal_to_the_whole_group_saves_and_exits(name, code, options, straight, tmp_path):
    """A terminal and a cluster signal workers and other ranks, too. The run was started by one process."""
    folder = copy(straight, tmp_path / "run")
    before = len(rows(folder))
    arguments = [*TINY, "schedule.steps=null", "schedule.epochs=90", "trainer.log_every_n_steps=1", "resume=auto"]
    process = ForkedCommand(*arguments, "hydra.run.dir=run", *options, cwd=tmp_path)
    end = time.monotonic() + 200
    while len(rows(folder)) == before:
        assert process.is_running, process.finish()
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.Signals[name])
    done = process.finish(timeout=100)
    assert done.returncode == code, done.stderr
    assert f"{name}: finishing the step, then saving" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"{name}: stopped after step " in done.stdout
    steps = 3 if name == "SIGTERM" else 5  # two processes see twice as many images in a step
    learned = {3: "learning rate 0.05 for 16", 5: "learning rate 0.025 for 8"}[steps]
    assert f"{learned} images in an optimizer step" in done.stdout
    start = read_start(folder / "checkpoints" / "last.ckpt")
    trained = [int(row["step"]) for row in rows(folder)[before:] if row["train/loss"]]
    assert trained == list(range(2 * steps, start.step))
