"""Several jobs at once: on this machine, through a cluster's launcher, and as a search."""

import json

import pytest
import yaml
from helpers import TINY, run_command

pytestmark = pytest.mark.slow
SWEEP = tuple(option for option in TINY if not option.startswith("dataset.labeled"))


@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.tasks_per_node=1"),
    ],
    ids=["joblib", "submitit"],
)
def test_jobs_run_in_parallel_and_a_failed_one_leaves_the_others(launcher, tmp_path):
    done = run_command(
        "-m", *launcher, *SWEEP, "dataset.labeled=1/3,99", "method=supervised", "hydra.sweep.dir=sweep", cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: expected dataset.labeled of at most 24, the number of images with a mask to choose from, but got 99"
    )
    counts = {
        folder.name: json.loads((folder / "metrics.json").read_text())["labeled"]["count"]
        for folder in (tmp_path / "sweep").iterdir()
        if (folder / "metrics.json").is_file()
    }
    assert counts == {"0_shapes_supervised_1-3_s0": 8}


def test_a_search_maximizes_the_validation_miou(tmp_path):
    done = run_command(
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1", "schedule.lr=interval(0.001,0.1)", *TINY, "hydra.sweep.dir=search", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "search/optimization_results.yaml").read_text())
    reached = [
        json.loads(path.read_text())["best"]["val/miou"] for path in (tmp_path / "search").glob("*/metrics.json")
    ]
    assert len(reached) == 2
    assert found["best_value"] == max(reached)
