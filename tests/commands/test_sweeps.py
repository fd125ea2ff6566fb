"""Several jobs at once: on this machine, through a cluster's launcher, and as a search."""

import json

import pytest
import yaml
from helpers import TINY
from helpers.processes import run_forked

from mlpmatch_pl.train import main

pytestmark = pytest.mark.slow
SWEEP = tuple(option for option in TINY if not option.startswith("dataset.labeled"))


def sweep(launcher, labeled, cwd):
    done = run_forked(
        "-m", *launcher, *SWEEP, f"dataset.labeled={labeled}", "method=supervised", "hydra.sweep.dir=sweep", cwd=cwd
    )
    counts = {
        folder.name: json.loads((folder / "metrics.json").read_text())["labeled"]["count"]
        for folder in (cwd / "sweep").iterdir()
        if (folder / "metrics.json").is_file()
    }
    return done, counts


def test_jobs_run_in_parallel_and_a_failed_one_leaves_the_others(tmp_path):
    done, counts = sweep(("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), "1/3,99", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: expected dataset.labeled of at most 24, the number of images with a mask to choose from, but got 99"
    )
    assert counts == {"0_shapes_supervised_1-3_s0": 8}


def test_a_job_runs_through_the_launcher_of_a_cluster(tmp_path):
    launcher = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.tasks_per_node=1")
    done, counts = sweep(launcher, "1/3", tmp_path)
    assert done.returncode == 0, done.stderr
    assert counts == {"0_shapes_supervised_1-3_s0": 8}


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
