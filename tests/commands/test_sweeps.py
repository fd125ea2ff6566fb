"""Several jobs at once: on this machine, through a cluster's launcher, and as a search."""

import json
import math
import os
import signal
import time

import pytest
import yaml
from helpers import TINY, compose_train
from helpers.processes import ForkedCommand, run_forked
from helpers.slurm import fake_slurm

from mlpmatch_pl.commands.sweep import run_job
from mlpmatch_pl.train import main

pytestmark = pytest.mark.slow
SWEEP = tuple(option for option in TINY if not option.startswith("dataset.labeled"))


def sweep(launcher, labeled, cwd, *options):
    done = run_forked(
        "-m", *launcher, *SWEEP, f"dataset.labeled={labeled}", "method=supervised", "hydra.sweep.dir=sweep", *options,
        cwd=cwd,
    )  # fmt: skip
    counts = {
        folder.name: json.loads((folder / "metrics.json").read_text())["labeled"]["count"]
        for folder in (cwd / "sweep").iterdir()
        if (folder / "metrics.json").is_file()
    }
    return done, counts


def test_jobs_run_in_parallel_and_a_failed_one_leaves_the_others(tmp_path):
    """With loading workers, which the processes of joblib have to start."""
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done, counts = sweep(launcher, "1/3,99", tmp_path, "loader.num_workers=2")
    assert done.returncode == 1
    assert "jobs in sweep: 1 finished, 1 failed\n" in done.stdout
    reason = "expected dataset.labeled of at most 24, the number of images with a mask to choose from, but got 99"
    assert f"\nfailed: sweep/1_shapes_supervised_99_s0: {reason}\n" in done.stdout
    assert counts == {"0_shapes_supervised_1-3_s0": 8}
    listed = run_forked("sweep", cwd=tmp_path, module="mlpmatch_pl.report")
    assert listed.returncode == 0, listed.stderr
    assert f"failed: {reason}" in " ".join(listed.stdout.replace("│", "").split())


def test_a_repeated_sweep_skips_finished_continues_stopped_and_repeats_failed_jobs(tmp_path):
    """The command is repeated to the letter of the advice that it prints."""
    (tmp_path / "few.txt").write_text("nothing\n")
    options = (
        "-m", *SWEEP, "dataset.labeled=4,few.txt,8", "method=supervised", "schedule.steps=12", "hydra.sweep.dir=sweep",
        "trainer.log_every_n_steps=1", "loader.num_workers=1", "loader.multiprocessing_context=fork",
    )  # fmt: skip
    first = ForkedCommand(*options, cwd=tmp_path)
    metrics = tmp_path / "sweep/2_shapes_supervised_8_s0/metrics.csv"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert first.is_running
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGTERM)
    done = first.finish()
    assert done.returncode == 143
    assert "jobs in sweep: 1 finished, 1 failed, 1 stopped\n" in done.stdout
    assert done.stdout.count("hydra.sweep.dir=sweep") == 2  # by the job, and at the end
    (tmp_path / "few.txt").write_text("\n".join(f"train_{number:04d}" for number in range(4)))
    again = run_forked(*options, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0_shapes_supervised_4_s0 is finished; skipped" in again.stdout
    assert "continuing from" in again.stdout
    assert "jobs in sweep: 3 finished\n" in again.stdout
    assert not list(tmp_path.glob("sweep/*/error.txt"))
    other = run_forked(*options, "schedule.lr=0.1", cwd=tmp_path)
    assert other.returncode == 1
    assert other.stdout.count("but its configuration differs; choose another hydra.sweep.dir") >= 3


def test_jobs_run_through_slurm(tmp_path, monkeypatch):
    """Launched as documented, with the variables of srun in the environment of a job."""
    monkeypatch.setenv("PATH", fake_slurm(tmp_path / "bin"))
    spawned = ("loader.num_workers=1", "loader.multiprocessing_context=spawn")
    done, counts = sweep(
        ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5"), "1/3,99", tmp_path, *spawned
    )
    assert "jobs in sweep: 1 finished, 1 failed\n" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1
    assert counts == {"0_shapes_supervised_1-3_s0": 8}
    outputs = list((tmp_path / "sweep/.submitit").glob("*/*_0_log.out"))
    assert any("results in " in path.read_text(encoding="utf-8") for path in outputs)


def test_a_job_without_a_validation_is_finished_without_a_score(tmp_path, caplog):
    cfg = compose_train(*TINY, "+trainer.limit_val_batches=0", output_dir=tmp_path)
    caplog.set_level("INFO")
    assert math.isnan(run_job(cfg, tmp_path))
    assert "best validation mIoU none" in caplog.text
    assert math.isnan(run_job(cfg, tmp_path))
    assert f"{tmp_path} is finished; skipped" in caplog.text


def test_a_search_maximizes_the_validation_miou(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLPMATCH_STAMP", "search")
    arguments = (
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1", "schedule.lr=interval(0.001,0.1)", *TINY, "hydra.sweep.dir=search",
    )  # fmt: skip
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    main()
    found = yaml.safe_load((tmp_path / "search/optimization_results.yaml").read_text())
    reached = [
        json.loads(path.read_text())["best"]["val/miou"] for path in (tmp_path / "search").glob("*/metrics.json")
    ]
    assert len(reached) == 2
    assert found["best_value"] == max(reached)
