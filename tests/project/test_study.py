"""The study in benchmarks/: its configurations, and the tables made of its results. Its trainings take a day."""

import json
import statistics
from dataclasses import asdict

import pytest
import yaml
from helpers import TINY, compose_train
from PIL import Image

from benchmarks.study import picture, tables
from benchmarks.study.__main__ import STUDY, overrides_of, result_of
from mlpmatch_pl.engine.build import read_config
from mlpmatch_pl.methods.method import PRESETS, resolve_method
from mlpmatch_pl.train import train

SETTINGS = yaml.safe_load(STUDY.read_text())
MIOU = {"supervised": [0.50, 0.53], "mlpmatch_burn_in": [0.55]}


METHODS = [name for part in SETTINGS["parts"].values() for name in part["methods"]]
DATASETS = dict.fromkeys(
    ("supervised_averaged", "mlpmatch_burn_in", "all_labels"), SETTINGS["parts"]["comparison"]["datasets"]
)


@pytest.mark.parametrize(
    ("dataset", "method"),
    [(dataset, method) for method in METHODS for dataset in DATASETS.get(method, ["shapes"])],
)
def test_every_run_composes(dataset, method, monkeypatch, tmp_path):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    monkeypatch.setenv("MLPMATCH_STUDY", "study")
    overrides = overrides_of(SETTINGS, dataset, method)
    config = read_config(compose_train(*overrides, "schedule.steps=1", output_dir=tmp_path))
    resolved = resolve_method(config["method"])
    preset = {"all_labels": "supervised"}.get(method, method.partition(" ")[0].removesuffix("_averaged"))
    assert resolved.name == preset
    assert (json.dumps(asdict(resolved)) != json.dumps(asdict(PRESETS[preset]))) == (method != preset)
    assert method in tables.COLORS or preset in tables.COLORS
    assert (config["dataset"]["labeled"] in (None, "1/1")) == (method == "all_labels")


def test_a_result_has_test_scores_only_of_test_images(tmp_path, monkeypatch):
    folder, overrides = tmp_path / "run", [*TINY, "method=supervised"]
    train(compose_train(*overrides, output_dir=folder))
    result = result_of(folder, "supervised", overrides)
    assert {"test", "tested"} <= result.keys()
    assert result["curve"]["val/miou"][-1] == pytest.approx(result["last"]["val/miou"], abs=1e-4)
    assert 0 < result["fit"] <= 1
    picture.draw(tmp_path / "methods.png", [folder])
    with Image.open(tmp_path / "methods.png") as sheet:
        assert sheet.width > 3 * picture.WIDTH  # image, truth, prediction
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"evaluated_on": "val"}))
    assert not {"test", "tested"} & result_of(folder, "supervised", overrides).keys()


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "study" / "aerial").mkdir(parents=True)
    for method, scores in MIOU.items():
        for seed, miou in enumerate(scores):
            write_run(tmp_path, method, seed, miou)
    names = (*MIOU, "mlpmatch_burn_in volatile term")
    timed = {name: {"minutes": 2, "step_seconds": 6.0, "steps": 20} for name in names}
    (tmp_path / "results" / "study" / "aerial" / "steps.json").write_text(json.dumps(timed))
    return tmp_path


def write_run(folder, method, seed, miou):
    run = {
        "method": method, "seed": seed, "steps": 20, "processor_seconds": 150, "best": {"val/miou": miou}, "fit": 0.9,
        "test": {"test/miou": miou / 2}, "curve": {"step": [9, 19], "val/miou": [miou, miou - 0.1]},
    }  # fmt: skip
    (folder / "results" / "study" / "aerial" / f"{method}_s{seed}.json").write_text(json.dumps(run))


def test_tables_have_the_mean_and_the_range_over_seeds(results):
    page = results / "page.md"
    page.write_text("before\n<!-- comparison: study/aerial -->\nold\n<!-- end -->\nafter\n")
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


def test_sets_without_test_images_have_no_test_column(results):
    for path in (results / "results" / "study" / "aerial").glob("*_s*.json"):
        run = json.loads(path.read_text())
        del run["test"]
        path.write_text(json.dumps(run))
    header = tables.filled("<!-- comparison: study/aerial -->\n<!-- end -->").splitlines()[2]
    assert header == "| method | seeds | steps | minutes | validation, best | validation, last |"


def test_a_curve_ends_at_the_minutes_of_its_run(results):
    curve = tables.read_runs("study/aerial")["curve"].iloc[0]
    assert curve.index.tolist() == pytest.approx([0.9, 1.9])  # without the time of validation


def test_an_ablation_is_compared_with_its_method_on_the_same_seeds(results):
    name = "mlpmatch_burn_in volatile term"
    for seed, miou in enumerate((0.57, 0.20)):  # the method has no second seed
        write_run(results, name, seed, miou)
    row = tables.filled("<!-- ablation: study/aerial -->\n<!-- end -->").splitlines()[-3]
    assert row == "| `mlpmatch_burn_in` | volatile term | 1 | 57.0 | +2.0 | 47.0 | +2.0 | 28.5 | +1.0 |"


def test_dynamics_compare_trainings_with_and_without_the_volatile_term(results):
    write_run(results, "mlpmatch_burn_in volatile term", 0, 0.57)
    rows = tables.filled("<!-- dynamics: study/aerial -->\n<!-- end -->").splitlines()[4:6]
    assert rows == [
        "| mlpmatch_burn_in volatile term | 1 | 90.0 | 43.0 | 0.9 | 0.0 |",
        "| mlpmatch_burn_in | 1 | 90.0 | 45.0 | 0.9 | 0.0 |",
    ]


def test_suggested_labels_are_compared_with_random_ones(results):
    choices = {"random_30": 0.3, "suggested_20": 0.29, "random_50": 0.4, "suggested_40": 0.41}
    miou = {choice: {"0": value, "1": value + 0.02} for choice, value in choices.items()}
    (results / "results" / "suggest.json").write_text(json.dumps({"miou": miou}))
    rows = tables.filled("<!-- suggestions: suggest -->\n<!-- end -->").splitlines()[4:8]
    assert rows[0] == "| 30 random | 2 | 31.0 (30.0 to 32.0) |"
    assert rows[3] == "| 40 suggested | 2 | 42.0 (41.0 to 43.0) |"
