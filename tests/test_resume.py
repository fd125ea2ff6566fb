import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import TINY, compose_train, run_command
from lightning.pytorch import Callback

from mlpmatch_pl.callbacks.checkpoints import LastCheckpoint
from mlpmatch_pl.callbacks.signals import Stopped
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.module import poly_decay
from mlpmatch_pl.resume import find_start, read_start
from mlpmatch_pl.train import train

RUN = (*TINY, "schedule.steps=10", "trainer.log_every_n_steps=1", "resume=auto")  # two epochs of five steps


class SendSignal(Callback):
    """Sends this process a signal in a hook of an epoch, at a batch."""

    def __init__(self, hook, epoch=0, batch=0):
        def send(trainer, module, *arguments, **named):
            if trainer.current_epoch == epoch and (not arguments or batch in arguments):
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, hook, send)


def send(hook, **place):
    return [
        f"+callbacks.send={{_target_:test_resume.SendSignal,hook:{hook},"
        + ",".join(f"{key}:{value}" for key, value in place.items())
        + "}"
    ]


def run(folder, *overrides):
    return train(compose_train(*RUN, *overrides, output_dir=folder))


def checkpoint(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def differing(one, two):
    return [key for key in one["state_dict"] if not torch.equal(one["state_dict"][key], two["state_dict"][key])]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def values(folder):
    return [{key: value for key, value in row.items() if value} for row in rows(folder)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder)


@pytest.mark.parametrize(
    ("place", "step"),
    [
        (send("on_train_batch_start", epoch=1, batch=1), 7),  # in the middle of an epoch
        (send("on_train_batch_start", epoch=0, batch=4), 5),  # in its last batch: the validation comes first
        (send("on_validation_batch_start", epoch=0, batch=0), 5),  # in a validation, which is done again
        (send("on_validation_end", epoch=0), 5),
        (send("on_test_batch_start", epoch=2, batch=0), 10),  # the training is over, the results are not written
    ],
    ids=["step", "last-step", "validation", "after-validation", "test"],
)
def test_a_run_stopped_by_sigterm_goes_on_as_if_it_had_not_been(straight, place, step, tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stopped:
        run(tmp_path, *place)
    assert stopped.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert f"SIGTERM: stopped after step {step}; go on with the same command" in caplog.text
    assert checkpoint(tmp_path)["global_step"] == step
    assert not (tmp_path / "metrics.json").exists()
    resumed = run(tmp_path)
    folder, metrics = straight
    assert differing(checkpoint(folder), checkpoint(tmp_path)) == []
    assert differing(checkpoint(folder, "best"), checkpoint(tmp_path, "best")) == []
    assert values(tmp_path) == values(folder)
    for key in ("steps", "last", "test"):
        assert resumed[key] == metrics[key]
    assert resumed["best"]["val/miou"] == metrics["best"]["val/miou"]


def test_checkpoints_within_epochs_and_the_one_before(tmp_path, monkeypatch):
    saved, save = [], LastCheckpoint._save
    monkeypatch.setattr(
        LastCheckpoint, "_save", lambda self, trainer: (saved.append(trainer.global_step), save(self, trainer))
    )
    run(tmp_path, "callbacks.checkpoint.every_n_steps=2")
    assert saved == [2, 4, 5, 6, 8, 10]  # after epochs, and every second step that does not end one
    assert checkpoint(tmp_path)["global_step"] == 10
    assert checkpoint(tmp_path, "last-1")["global_step"] == 8


def test_checkpoints_by_time_and_none_between_accumulated_batches(tmp_path):
    run(tmp_path, "callbacks.checkpoint.every_minutes=1e-6", "schedule.steps=24", "dataset.train=52", "dataset.val=1",
        "trainer.accumulate_grad_batches=2", "callbacks.predictions.num_images=0")  # fmt: skip
    assert checkpoint(tmp_path)["global_step"] == 24
    assert checkpoint(tmp_path, "last-1")["global_step"] == 20  # time is looked at after every tenth step


@pytest.mark.parametrize("name", ["every_n_steps", "every_minutes"])
def test_an_interval_that_is_not_positive_is_refused(name):
    with pytest.raises(UserError, match=f"expected callbacks.checkpoint.{name} above 0, but got 0; null switches"):
        LastCheckpoint("checkpoints", **{name: 0})


def test_a_broken_last_checkpoint_falls_back_to_the_one_before(straight, tmp_path, caplog):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    with caplog.at_level(logging.WARNING):
        start = find_start("auto", tmp_path)
    assert (start.checkpoint, start.step, start.epoch) == (folder / "last-1.ckpt", 5, 1)
    assert "last.ckpt is broken or not a checkpoint of a training; looking for the one before" in caplog.text
    (tmp_path / "metrics.json").unlink()
    run(tmp_path)
    assert differing(checkpoint(straight[0]), checkpoint(tmp_path)) == []
    assert values(tmp_path) == values(straight[0])


def test_when_all_checkpoints_are_broken_nothing_is_touched(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"broken")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=r"but last\.ckpt, last-1\.ckpt, best\.ckpt are all broken"):
        run(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_auto_starts_anew_where_there_is_no_checkpoint_yet(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert find_start("auto", tmp_path).checkpoint is None
    assert "no checkpoint in" in caplog.text
    (tmp_path / "metrics.json").touch()
    with pytest.raises(UserError, match="holds a finished run without one"):
        find_start("auto", tmp_path)


def test_a_checkpoint_of_elsewhere_does_not_open_the_folder_of_another_run(straight, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(straight[0], other)
    with pytest.raises(UserError, match="expected a new run folder"):
        find_start(str(straight[0] / "checkpoints" / "last.ckpt"), other)
    assert find_start(str(other / "checkpoints" / "last-1.ckpt"), other).step == 5


def test_other_images_are_refused_in_the_same_folder_and_named_in_a_new_one(straight, tmp_path, caplog):
    last = straight[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"expected 4 labeled images \(4 \(seed 0\), sha256 .*but got 5 "):
        run(straight[0], "dataset.labeled=5", "schedule.steps=15")
    with caplog.at_level(logging.WARNING):
        run(tmp_path, "dataset.labeled=5", "schedule.steps=15", f"resume={last}")
    assert "the checkpoint has been trained with 4 labeled images" in caplog.text


def test_a_finished_run_has_nothing_to_resume(straight):
    with pytest.raises(UserError, match=r"last\.ckpt has finished all 2; raise schedule\.epochs"):
        run(straight[0])


def test_the_best_checkpoint_survives_a_move_of_the_folder(straight, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(straight[0], moved)
    score = straight[1]["best"]["val/miou"]
    longer = run(moved, "schedule.steps=15", "schedule.lr=0")  # learns nothing more
    assert longer["best"]["val/miou"] >= score
    best = checkpoint(moved)["callbacks"]
    (state,) = (state for key, state in best.items() if key.startswith("BestCheckpoint"))
    assert state["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")


def test_the_learning_rate_of_the_configuration_holds_at_the_place_of_the_checkpoint(tmp_path, caplog):
    with pytest.raises(Stopped):
        run(tmp_path, *send("on_train_batch_start", epoch=1, batch=0))
    with caplog.at_level(logging.INFO):
        run(tmp_path, "schedule.lr=0.5", "schedule.momentum=0.5")
    assert "epoch 2, 20 % of it done; its learning rate was 0.025, now the configuration's holds" in caplog.text
    for row in rows(tmp_path):
        if row["train/lr"]:
            step = int(row["step"])
            lr = (0.25 if step >= 6 else 0.025) * poly_decay(step, 10, 0.9, late=False)
            assert float(row["train/lr"]) == pytest.approx(lr)
    assert checkpoint(tmp_path)["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.5
    assert (tmp_path / "config-1.yaml").is_file()  # the configuration before


@pytest.mark.parametrize(
    ("options", "steps", "batch"),
    [
        (("loader.batch_size=2",), 10, 1),
        (("loader.batch_size=8",), 3, 1),
        (("trainer.accumulate_grad_batches=2",), 3, 1),
        (("loader.batch_size=2",), 10, 4),
    ],
)
def test_with_other_steps_in_an_epoch_the_place_and_the_schedule_stay(options, steps, batch, tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, *send("on_train_batch_start", epoch=0, batch=batch), "schedule.epochs=2", "schedule.steps=null")
    done = (batch + 1) / 5
    metrics = run(tmp_path, "schedule.epochs=2", "schedule.steps=null", *options)
    assert metrics["steps"] == 2 * steps
    state = checkpoint(tmp_path)
    assert state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2
    assert state["lr_schedulers"][0]["last_epoch"] == 2 * steps
    again = [row for row in rows(tmp_path) if row["train/lr"]][batch + 1 :]
    assert len(again) == 2 * steps - round(max(int(done * steps), 1) if done < 1 else steps)
    for row in again:
        lr = metrics_lr(options) * poly_decay(int(row["step"]), 2 * steps, 0.9, late=False)
        assert float(row["train/lr"]) == pytest.approx(lr)


def metrics_lr(options):
    images = {"loader.batch_size=2": 4, "loader.batch_size=8": 16, "trainer.accumulate_grad_batches=2": 16}
    return 0.05 * images[options[0]] / 16


def wait_for(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "options"),
    [
        ("SIGINT", 130, ["loader.num_workers=2"]),
        ("SIGTERM", 143, ["loader.num_workers=2"]),
        ("SIGTERM", 143, ["trainer.accelerator=cpu", "trainer.devices=2", "loader.batch_size=2"]),
    ],
)
def test_a_signal_to_the_whole_group_saves_and_exits(name, code, options, tmp_path):
    """As a terminal and a cluster do it: workers and other ranks get the signal as well."""
    arguments = [*TINY, "schedule.steps=400", "trainer.log_every_n_steps=1", "resume=auto", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "mlpmatch_pl.train", *arguments, *options]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for((tmp_path / "run" / "metrics.csv").exists, process)
    os.killpg(process.pid, signal.Signals[name])
    output, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert f"{name}: finishing the step, then saving" in errors
    assert "Traceback" not in errors
    assert f"{name}: stopped after step " in output
    start = read_start(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert start.step == len([row for row in rows(tmp_path / "run") if row["train/loss"]]) + (start.fraction != 0)


@pytest.mark.slow
def test_a_full_disk_ends_with_one_sentence_and_leaves_the_checkpoint(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    arguments = " ".join([*RUN, "schedule.steps=15", "hydra.run.dir=run"])
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 2000; exec {sys.executable} -m mlpmatch_pl.train {arguments}"], cwd=tmp_path,
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: expected 3.")
    assert "MiB of free space for " in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one_and_back(tmp_path):
    """The same images in a step keep every count; twice as many halve them, at the same epoch."""
    shared = (*TINY, "trainer.accelerator=cpu", "schedule.steps=null", "resume=auto", "hydra.run.dir=run")
    for epochs, options in ((1, ()), (2, ("trainer.devices=2",)), (3, ("loader.batch_size=8",))):
        result = run_command(*shared, f"schedule.epochs={epochs}", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        state = checkpoint(tmp_path / "run")
        steps = 5 if epochs == 1 else 3
        assert state["global_step"] == epochs * steps
        assert state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == epochs
        lr = "0.025 for 8" if epochs == 1 else "0.05 for 16"
        assert f"learning rate {lr} images in an optimizer step" in result.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 9
