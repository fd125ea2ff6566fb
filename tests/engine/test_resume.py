import csv
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, compose_train, run_command
from lightning.pytorch import Callback

from mlpmatch_pl.callbacks.checkpoints import LastCheckpoint
from mlpmatch_pl.callbacks.stop_signals import Stopped
from mlpmatch_pl.engine.resume import find_start, read_start
from mlpmatch_pl.engine.trainer import length_of_training
from mlpmatch_pl.methods.schedules import poly_decay
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.run_lock import LOCK, run_lock

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


class Raise(Callback):
    """Ends a training as a kill does, with nothing saved, before the second batch of its second epoch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise RuntimeError("killed")


class Truncate(Callback):
    """Cuts off the best checkpoint when the training is over."""

    def on_train_end(self, trainer, module):
        path = Path(trainer.checkpoint_callback.best_model_path)
        path.write_bytes(path.read_bytes()[:-1000])


def add(kind):
    return f"+callbacks.added={{_target_:test_resume.{kind}}}"


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


def test_an_epoch_that_a_signal_ended_keeps_its_best_checkpoint(tmp_path, caplog):
    """Its validation is the only one, and a resume does not repeat it."""
    one_epoch = ("schedule.epochs=1", "schedule.steps=null")
    expected = run(tmp_path / "straight", *one_epoch)
    with pytest.raises(Stopped):
        run(tmp_path / "run", *one_epoch, *send("on_validation_end", epoch=0))
    assert not (tmp_path / "run" / "checkpoints" / "last-1.ckpt").exists()  # last.ckpt was written once
    resumed = run(tmp_path / "run", *one_epoch)
    assert differing(checkpoint(tmp_path / "straight", "best"), checkpoint(tmp_path / "run", "best")) == []
    assert resumed["best"]["val/miou"] == expected["best"]["val/miou"]
    assert resumed["test"] == expected["test"]


@pytest.mark.parametrize(
    ("hook", "epoch", "saved"),
    [("on_train_start", 0, []), ("on_train_end", 2, ["best.ckpt", "last-1.ckpt", "last.ckpt"])],
    ids=["before-the-first-step", "after-the-last"],
)
def test_a_signal_outside_of_the_steps_is_not_swallowed(hook, epoch, saved, straight, tmp_path, caplog):
    """Before the first step it comes to Lightning, which would end with exit code 0."""
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stopped:
        run(tmp_path, *send(hook, epoch=epoch))
    assert stopped.value.code == 143
    assert f"SIGTERM: stopped after step {10 if saved else 0}; go on" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == saved
    resumed = run(tmp_path)
    assert resumed["test"] == straight[1]["test"]
    assert differing(checkpoint(straight[0]), checkpoint(tmp_path)) == []


def test_a_validation_between_accumulated_batches_is_not_the_place_to_stop(tmp_path):
    options = ("+trainer.val_check_interval=3", "trainer.accumulate_grad_batches=2", "dataset.train=28")
    run(tmp_path / "straight", *options)
    with pytest.raises(Stopped):
        run(tmp_path / "run", *options, *send("on_validation_batch_start", epoch=0, batch=0))
    run(tmp_path / "run", *options)
    assert differing(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "run")) == []


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
    assert checkpoint(tmp_path, "last-1")["global_step"] == 5  # the broken one has not taken its place
    assert "last_aside-1.ckpt" in names(tmp_path)


def test_a_broken_best_checkpoint_is_not_tested(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = run(tmp_path, "schedule.steps=5", add("Truncate"))
    assert "best.ckpt is broken; testing the last weights instead" in caplog.text
    assert (metrics["tested"], metrics["best"]["checkpoint"]) == ("last weights", None)
    assert 0 <= metrics["test"]["test/miou"] <= 1


def test_a_finished_run_that_is_extended_has_no_result_until_its_own(straight, tmp_path):
    """Its steps are fewer than those of the result before, as the batches are twice as large."""
    folder, longer = copy(straight[0], tmp_path), ("schedule.epochs=3", "schedule.steps=null", "loader.batch_size=8")
    with pytest.raises(Stopped):
        run(folder, *longer, *send("on_test_batch_start", epoch=3, batch=0))
    assert not (folder / "metrics.json").exists()
    assert json.loads((folder / "metrics-1.json").read_text())["steps"] == 10
    assert run(folder, *longer)["steps"] == 9
    with pytest.raises(UserError, match="has finished all 3"):
        run(folder, *longer)


def test_going_back_to_an_older_checkpoint_survives_a_kill(straight, tmp_path):
    """Into the same folder, and out of another one."""
    older, slow = straight[0] / "checkpoints" / "last-1.ckpt", "schedule.lr=0.01"
    expected = run(tmp_path / "expected", f"resume={older}", slow)
    assert expected["steps"] == 10
    inside = copy(straight[0], tmp_path / "inside")
    (inside / "checkpoints" / "best.ckpt").write_bytes((inside / "checkpoints" / "last.ckpt").read_bytes())
    for folder, chosen in ((inside, inside / "checkpoints" / "last-1.ckpt"), (tmp_path / "outside", older)):
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, f"resume={chosen}", slow, add("Raise"))
        start = find_start("auto", folder)
        assert (start.checkpoint.name, start.step) == ("last.ckpt", 5)
        run(folder, slow)
        assert differing(checkpoint(tmp_path / "expected"), checkpoint(folder)) == []
        steps = [int(row["step"]) for row in rows(folder) if row["train/loss"]]
        assert steps == list(range(0 if folder == inside else 4, 10))
    assert names(inside) == ["best.ckpt", "best_aside-1.ckpt", "last-1.ckpt", "last.ckpt", "last_aside-1.ckpt"]
    assert differing(checkpoint(straight[0]), checkpoint(inside, "last_aside-1")) == []


def test_a_schedule_in_steps_keeps_its_epochs_while_it_is_not_changed(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, *send("on_train_batch_start", epoch=0, batch=2))
    metrics = run(tmp_path, "loader.batch_size=8")  # three steps an epoch; ten would be four epochs
    state = checkpoint(tmp_path)
    assert (metrics["steps"], state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]) == (6, 2)
    for row in rows(tmp_path):
        if row["train/lr"] and int(row["step"]) >= 3:
            assert float(row["train/lr"]) == pytest.approx(0.05 * poly_decay(int(row["step"]), 6, 0.9, late=False))
    before = {"steps": 10, "epochs": 2, "every": 1}
    assert length_of_training({"epochs": None, "steps": 10}, 3, before) == (2, 1)
    assert length_of_training({"epochs": None, "steps": 12}, 3, before) == (4, 1)


def test_fewer_epochs_than_are_trained_are_refused(straight):
    with pytest.raises(UserError, match=r"within the schedule's 1 epochs, but .*last\.ckpt has trained 2; raise"):
        run(straight[0], "schedule.epochs=1", "schedule.steps=null")


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path):
    folder, (reader, writer) = tmp_path / "run", os.pipe()
    if not (other := os.fork()):
        with run_lock(folder):
            os.write(writer, b"claimed")
            time.sleep(60)
    try:
        assert os.read(reader, 7) == b"claimed"
        with pytest.raises(UserError, match=rf"{folder} is in use by process {other} on .*; wait for its end"):
            run(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    with run_lock(folder):  # the lock went with its process
        assert f"process {os.getpid()} " in (folder / LOCK).read_text()
    assert list(folder.iterdir()) == []


def test_where_there_are_no_locks_the_run_goes_on(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with run_lock(tmp_path), run_lock(tmp_path):
        pass


def test_a_limit_of_time_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"but got trainer\.max_time; let a signal end a run whose time is limited"):
        run(tmp_path, "+trainer.max_time='00:00:10:00'")
    assert list(tmp_path.iterdir()) == []


def test_other_classes_and_broken_files_of_the_run_are_refused_in_a_sentence(straight, tmp_path):
    folder, longer = copy(straight[0], tmp_path), "schedule.steps=15"
    splits = folder / "splits.json"
    whole = splits.read_text()
    for broken in ("[]", '{"labeled": 3}', '{"labeled": {}}', "{"):
        splits.write_text(broken)
        with pytest.raises(UserError, match=r"expected the images of the run in .*splits\.json, but it is broken"):
            run(folder, longer)
    splits.write_text(whole)
    (folder / "metrics.json").write_text('{"steps": "x"}')
    with pytest.raises(UserError, match="has finished all 2"):
        run(folder)
    content = checkpoint(folder)
    before = content["hyper_parameters"]["class_names"]
    content["hyper_parameters"]["class_names"] = [*before[1:], before[0]]
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=rf"expected the classes .*, in this order, but got {before[0]}, "):
        run(folder, longer)


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


def test_rows_of_an_earlier_number_of_steps_outlive_every_later_resume(tmp_path):
    epochs, fewer = ("schedule.epochs=4", "schedule.steps=null"), "loader.batch_size=8"  # 5 steps in an epoch, then 3
    with pytest.raises(Stopped):
        run(tmp_path, *epochs, *send("on_train_batch_start", epoch=2, batch=1))
    with pytest.raises(Stopped):
        run(tmp_path, *epochs, fewer, *send("on_train_batch_start", epoch=2, batch=1))
    assert checkpoint(tmp_path)["global_step"] == 8
    run(tmp_path, *epochs, fewer)
    for kind, steps in (
        ("train/loss", ((0, range(5)), (1, range(5, 10)), (2, (10, 11, 7, 8)), (3, (9, 10, 11)))),
        ("val/miou", ((0, (4,)), (1, (9,)), (2, (8,)), (3, (11,)))),
    ):
        found = [(int(row["epoch"]), int(row["step"])) for row in rows(tmp_path) if row[kind]]
        assert found == [(epoch, step) for epoch, numbers in steps for step in numbers]


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
