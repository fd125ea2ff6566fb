"""Several processes from the command line: by Lightning, torchrun and srun, on one machine and on two; one that dies.

A second machine is a second torchrun on this one; srun is what it would put into the environment.
"""

import csv
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, compose_train, run_command
from helpers.processes import ForkedCommand, free_port, run_forked
from lightning.pytorch import Trainer

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.distributed import is_first_process, time_stamp
from mlpmatch_pl.utils.errors import UserError

RUN = (
    *TINY, "schedule.steps=10", "loader.batch_size=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
)  # fmt: skip
"""Two epochs of five steps."""
FILES = {
    "checkpoints/best.ckpt", "checkpoints/last-1.ckpt", "checkpoints/last.ckpt", "config.yaml", "confusion_test.png",
    "confusion_val.png", "labeled.txt", "metrics.csv", "metrics.json", "overrides.yaml", "predictions/test_0000.png",
    "predictions/test_0002.png", "splits.json", "train.log", "val.txt",
}  # fmt: skip
SRUN = {
    "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}  # fmt: skip
"""What srun puts into the environment of the first of two tasks."""
PORT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
PAGE = Path(__file__).parents[2] / "docs" / "multi_gpu.md"


def start(folder, command):
    clean = {key: value for key, value in os.environ.items() if key != "MLPMATCH_STAMP"}
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env={**clean, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def apart(starts):
    """Start processes in different seconds, so that their times differ."""
    processes = []
    for begin in starts:
        processes.append(begin())
        time.sleep(1.1)
    return processes


def by_torchrun_on_two_machines(folder):
    """Return the exit codes and what all have printed."""
    port, train = free_port(), ("-m", "mlpmatch_pl.train", *RUN, "trainer.num_nodes=2")
    shared = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}")
    nodes = (("torch.distributed.run", *shared, f"--node_rank={node}", *train) for node in range(2))
    processes = apart([lambda node=node: start(folder, node) for node in nodes])
    outputs = [process.communicate(timeout=240) for process in processes]
    return [process.returncode for process in processes], *map("".join, zip(*outputs, strict=True))


def by_srun(folder, *options):
    shared = {**SRUN, "MASTER_PORT": str(free_port())}
    command = (*RUN, "trainer.devices=2", *options)
    tasks = ({**shared, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2))
    processes = apart([lambda task=task: ForkedCommand(*command, cwd=folder, **task) for task in tasks])
    done = [process.finish() for process in processes]
    outputs = [(task.stdout, task.stderr) for task in done]
    return [task.returncode for task in done], *map("".join, zip(*outputs, strict=True))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two processes by torchrun: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("straight")
    codes, out, err = by_torchrun_on_two_machines(folder)
    assert codes == [0, 0], err
    (run,) = (folder / "runs").iterdir()
    return run, out


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def last_rows(run):
    """Return the lines of metrics.csv, the last of those that were repeated after a resume."""
    with (run / "metrics.csv").open(newline="") as file:
        return {(row["step"], bool(row["train/loss"]), bool(row["val/miou"])): row for row in csv.DictReader(file)}


def assert_same_run(run, other):
    assert last_rows(run) == last_rows(other)
    mine, others = weights(run), weights(other)
    assert all(torch.equal(mine[name], others[name]) for name in others)


def written(run):
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_machines_write_one_folder_and_one_log(straight):
    run, out = straight
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_shapes_mlpmatch_s0", run.name)
    assert written(run) == FILES
    lines = [line for line in out.splitlines() if line]
    assert len(set(lines)) == len(lines)
    assert "2 processes; BatchNorm over each one's own images, as SyncBatchNorm needs GPUs" in out


@pytest.mark.slow
def test_the_best_checkpoint_has_the_metric_it_was_chosen_by(straight):
    """Although each process has its own images for BatchNorm's running statistics."""
    run, _ = straight
    module = MLPMatch.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    data = shapes(labeled=4, train=24, val=5, test=3, size=48)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    one = trainer.validate(module, datamodule=SemiSupervisedDataModule(data, crop_size=48), verbose=False)[0]
    best = json.loads((run / "metrics.json").read_text())["best"]
    assert best["val/miou"] == pytest.approx(one["val/miou"], rel=1e-6)


DYING = """
import os
import signal

from lightning.pytorch import Callback


class Dies(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_rank == 1 and trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_if_a_process_is_killed_the_other_ends_with_one_sentence_and_the_run_resumes(straight, tmp_path):
    """Started by Lightning, resumed by srun, it is the run of torchrun."""
    (tmp_path / "dying.py").write_text(DYING)
    options = ("hydra.run.dir=run", "resume=auto", "callbacks.checkpoint.every_n_steps=3")
    began = time.monotonic()
    died = run_forked(*RUN, "trainer.devices=2", *options, "+callbacks.dies._target_=dying.Dies", cwd=tmp_path)
    assert time.monotonic() - began < 120
    assert died.returncode == 1
    assert "error: expected all 2 processes to keep running, but another one died" in died.stderr
    assert "Traceback" not in died.stderr
    codes, out, err = by_srun(tmp_path, *options)
    assert codes == [0, 0], err
    assert out.count("continuing from ") == out.count("2 processes; BatchNorm") == out.count("results in ") == 1
    assert_same_run(tmp_path / "run", straight[0])


@pytest.mark.parametrize(
    ("environment", "devices", "sentence"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"},
            1,
            r"`devices=1` and `num_nodes=1` in Lightning, but .* does not match the world size \(2\)",
        ),
        (
            {"LOCAL_RANK": "1"},
            1,
            "expected WORLD_SIZE, MASTER_ADDR, MASTER_PORT beside LOCAL_RANK=1 in the environment",
        ),
        (
            {"LOCAL_RANK": "0"},
            2,
            "expected WORLD_SIZE, MASTER_ADDR, MASTER_PORT beside LOCAL_RANK=0 in the environment",
        ),
        (
            {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            2,
            "expected RANK from 0 to below WORLD_SIZE=2, but got 3; start the processes with torchrun, or remove",
        ),
        (
            {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "9",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
            2,
            "expected torchrun at 127.0.0.1:9, as MASTER_ADDR and MASTER_PORT say, but nothing listens there; start",
        ),
        (
            {"NODE_RANK": "1"},
            1,
            "expected NODE_RANK=0, as trainer.devices=1 and trainer.num_nodes=1 say, but",
        ),
        ({**PORT, "RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2, "expected RANK=1, as trainer.devices=2"),
        (
            {**PORT, "LOCAL_RANK": "2", "WORLD_SIZE": "3"},
            2,
            "expected LOCAL_RANK=0 or 1, as .* has 2; change",
        ),
        ({**PORT, "LOCAL_RANK": "0", "WORLD_SIZE": "3"}, 2, "expected WORLD_SIZE=2, as .* has 3; change"),
        (
            {name: value for name, value in SRUN.items() if name != "SLURM_NTASKS_PER_NODE"},
            2,
            "expected the number of tasks per node beside 2 tasks of srun, .* use srun --ntasks-per-node",
        ),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "4"}, 2, "`devices=2` in Lightning, but .*`--ntasks-per-node=4`"),
        ({**SRUN, "SLURM_NNODES": "2"}, 2, "`num_nodes=1` in Lightning, but .*`--nodes=2`"),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}, 2, "`devices=2` in Lightning, but .*"),
    ],
)
def test_another_number_of_processes_than_configured_is_refused(
    environment, devices, sentence, tmp_path, monkeypatch, request
):
    request.addfinalizer(lambda: logging.getLogger("mlpmatch_pl").setLevel(logging.NOTSET))  # of other processes
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    cfg = compose_train(*RUN, f"trainer.devices={devices}", output_dir=tmp_path / "run")
    with pytest.raises(UserError, match=sentence):
        train(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "1", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
        ({**SRUN, "SLURM_NODEID": "1"}, False),
        ({**SRUN, "SLURM_LOCALID": "1"}, False),
        ({**SRUN, "SLURM_LOCALID": "1", "SLURM_JOB_NAME": "interactive"}, True),
    ],
)
def test_the_first_process_is_known_before_the_processes_are_connected(environment, first, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert is_first_process() == first


def test_a_single_process_is_stamped_with_the_time_and_its_job():
    """The jobs of an array may start in the same second."""
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "4711"}
    for environment, end in (({}, ""), (job, "_job4711"), ({**job, "SLURM_STEP_ID": "2"}, r"_job4711\.2")):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d" + end, time_stamp(environment))


def commands_of_the_page():
    text = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if "-m mlpmatch_pl.train" in line]
    return [line.partition("mlpmatch_pl.train")[2] for line in lines]


def test_there_are_commands_in_the_page():
    assert len(commands_of_the_page()) >= 5


@pytest.mark.parametrize("arguments", commands_of_the_page())
def test_every_training_in_the_page_composes(arguments):
    values = [part for part in shlex.split(arguments) if not part.startswith(("-", "hydra"))]
    compose_train(*[re.sub(r"=([^\[,]+),.*", r"=\1", value) for value in values], output_dir=Path("out"))


LEFT_OVER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_what_an_ended_torchrun_has_left_over_is_refused_before_the_run_folder_is_named(tmp_path):
    left = {**LEFT_OVER, "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
    began = time.monotonic()
    done = run_forked(*RUN, "trainer.devices=2", cwd=tmp_path, **left, TORCHELASTIC_USE_AGENT_STORE="True")
    assert time.monotonic() - began < 60  # instead of minutes
    assert done.returncode == 1
    assert re.fullmatch(r"error: expected torchrun at 127.0.0.1:\d+, .*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_process_that_waits_for_others_says_where(tmp_path):
    port = str(free_port())
    waiting = ForkedCommand(*RUN, "trainer.devices=2", cwd=tmp_path, **LEFT_OVER, MASTER_PORT=port)
    said, deadline = f"waiting for the other processes at 127.0.0.1:{port}", time.monotonic() + 60
    while said not in (text := "".join(path.read_text() for path in tmp_path.glob("runs/*/train.log"))):
        assert waiting.is_running, text
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    os.kill(waiting.pid, signal.SIGKILL)
    waiting.finish()


def test_a_slurm_job_without_srun_starts_its_own_processes(tmp_path):
    job = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    done = run_command(*RUN, "trainer.devices=2", "hydra.run.dir=run", cwd=tmp_path, timeout=120, **job)
    assert done.returncode == 0, done.stderr
    assert "2 processes; BatchNorm" in done.stdout
