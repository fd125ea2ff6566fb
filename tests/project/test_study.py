"""The study in benchmarks/: its configurations, and the tables made of its results. Its trainings take a day."""

import json
import statistics

import pytest
import yaml
from helpers import compose_train
from PIL import Image

from benchmarks.study import tables
from benchmarks.study.__main__ import STUDY
from mlpmatch_pl.engine.build import read_config

SETTINGS = yaml.safe_load(STUDY.read_text())
MIOU = {"supervised": [0.50, 0.53], "mlpmatch_burn_in": [0.55]}


@pytest.mark.parametrize("method", SETTINGS["methods"])
@pytest.mark.parametrize("dataset", SETTINGS["datasets"])
def test_every_run_composes(dataset, method, monkeypatch, tmp_path):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    monkeypatch.setenv("MLPMATCH_STUDY", "study")
    overrides = [*SETTINGS["shared"], *SETTINGS["datasets"][dataset]["overrides"], *SETTINGS["methods"][method]]
    config = read_config(compose_train(*overrides, "schedule.steps=1", output_dir=tmp_path))
    assert method.startswith(config["method"]["name"])
    assert method in tables.COLORS
    assert (config["method"]["teacher"] is not None) == (method in ("supervised_averaged", "mlpmatch_burn_in"))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "aerial").mkdir(parents=True)
    for method, scores in MIOU.items():
        for seed, miou in enumerate(scores):
            run = {
                "seed": seed, "steps": 20, "processor_seconds": 120, "best": {"val/miou": miou},
                "test": {"test/miou": miou / 2}, "curve": {"step": [9, 19], "val/miou": [miou, miou - 0.1]},
            }  # fmt: skip
            (tmp_path / "results" / "aerial" / f"{method}_s{seed}.json").write_text(json.dumps(run))
    (tmp_path / "results" / "aerial" / "steps.json").write_text("{}")
    return tmp_path


def test_tables_have_the_mean_and_the_range_over_seeds(results):
    page = results / "page.md"
    page.write_text("before\n<!-- study: aerial -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):  # filling again changes nothing
        tables.fill(page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    mean = 100 * statistics.mean(MIOU["supervised"])
    assert rows == [
        f"| `supervised` | 2 | 20 | 2.0 | {mean:.1f} (50.0 to 53.0) | {mean - 10:.1f} (40.0 to 43.0) "
        f"| {mean / 2:.1f} (25.0 to 26.5) |",
        "| `mlpmatch_burn_in` | 1 | 20 | 2.0 | 55.0 | 45.0 | 27.5 |",
    ]
    assert "old" not in page.read_text()
    with Image.open(results / "study_aerial.png") as curves:
        assert len(curves.convert("RGB").getcolors(1 << 24)) > 10


def test_a_curve_ends_at_the_minutes_of_its_run(results):
    curve = tables.read_runs("aerial")["curve"].iloc[0]
    assert curve.index.tolist() == pytest.approx([0.9, 1.9])
