"""Reports of real runs, and of their folders with changed configuration, broken files and half-written logs."""

import base64
import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from helpers import TINY, compose_config, run_command
from omegaconf import OmegaConf
from PIL import Image

from mlpmatch_pl.commands.report.plots import COLORS, curve_plots, method_color, score_plot, series_styles
from mlpmatch_pl.commands.report.run import Options, Report, write_report
from mlpmatch_pl.commands.report.runs import find_run_folders, read_curves, read_run
from mlpmatch_pl.commands.report.tables import Cell, Table, group_runs, percent, score_table, summary_csv
from mlpmatch_pl.report import named_folders, report
from mlpmatch_pl.utils.errors import UserError

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Four real runs: two methods, two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    axes = ("method=supervised,mlpmatch", "seed=0,1", "trainer.log_every_n_steps=1")
    done = run_command("-m", *axes, *TINY, f"hydra.sweep.dir={folder / 'all'}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"compare the runs: python -m mlpmatch_pl.report {folder / 'all'}\n")
    return folder / "all"


@pytest.fixture
def make_run(sweep, tmp_path):
    """A factory of run folders: a copy of a real one, with another seed, mIoU, configuration or labeled list.

    Pictures and, unless asked for, curves are left out, as drawing them takes most of the time of a report.
    """

    def make(name: str, seed: int = 0, miou: float = 0.5, method: str = "supervised", curves=False, **changes) -> Path:
        folder = tmp_path / "runs" / name
        (source,) = sweep.glob(f"*_{method}_4_s0")
        left_out = ("checkpoints", "predictions", "*.png", *([] if curves else ["metrics.csv"]))
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*left_out))
        config = OmegaConf.load(folder / "config.yaml")
        config.seed = seed
        for key, value in changes.items():
            if "__" in key:
                OmegaConf.update(config, key.replace("__", ".", 1), value, force_add=True)
        OmegaConf.save(config, folder / "config.yaml")
        edit_json(folder / "metrics.json", lambda content: content["test"].update({"test/miou": miou}))
        labeled = {"split": "4 (seed 0)", "sha256": "a" * 64}
        labeled |= {key: changes[key] for key in ("split", "sha256", "count") if key in changes}
        edit_json(folder / "splits.json", lambda content: content["labeled"].update(labeled))
        return folder

    return make


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def report_of(folder: Path, **options) -> Report:
    """Report everything below a folder to the folder ``out`` beside it."""
    return write_report(Options((str(folder),), folder.parent / "out", overwrite=True, **options))


def summary_of(folder: Path, **options) -> list[dict[str, str]]:
    """Return the rows of summary.csv for everything below a folder."""
    return list(csv.DictReader(io.StringIO(summary_csv(groups_of(folder, **options)))))


def groups_of(folder: Path, **options):
    return group_runs([read_run(path) for path in find_run_folders([folder])], **options)


@pytest.fixture(scope="module")
def page(sweep) -> Path:
    """The report of the sweep, by the real command."""
    done = run_command(str(sweep), "output=out dir", cwd=sweep.parent, module="mlpmatch_pl.report")
    assert done.returncode == 0, done.stderr
    assert "Runs: 4 finished;" in done.stdout
    assert f"wrote {Path('out dir/report.html')}\n" in done.stdout
    return sweep.parent / "out dir"


def test_a_sweep_is_averaged_over_its_seeds(sweep, page):
    expected: dict[tuple[str, ...], list[dict]] = {}
    for path in sweep.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        key = (metrics["method"], metrics["labeled"]["split"], metrics["labeled"]["sha256"])
        expected.setdefault(key, []).append(metrics["test"])
    rows = read_csv(page / "summary.csv")
    assert {(row["method"], row["labeled_list"], row["sha256"]) for row in rows} == expected.keys()
    for row in rows:
        found = expected[row["method"], row["labeled_list"], row["sha256"]]
        assert row["seeds"] == "0 1"
        for score in ("miou", "acc", "dice", "iou/background", "iou/cross"):
            values = [test[f"test/{score}"] for test in found]
            assert float(row[f"{score}_mean"]) == pytest.approx(np.mean(values))
            assert float(row[f"{score}_std"]) == pytest.approx(np.std(values, ddof=1))
            assert row[f"{score}_n"] == "2"
        values = [100 * test["test/miou"] for test in found]
        cell = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert cell in (page / "summary.md").read_text()
        assert cell in (page / "report.html").read_text()
    runs = read_csv(page / "runs.csv")
    assert sorted(row["run"] for row in runs) == sorted(str(path) for path in sweep.iterdir() if path.is_dir())
    assert {row["finished"] for row in runs} == {"yes"}
    assert {("method=mlpmatch" in row["overrides"].split(), row["method"]) for row in runs} == {
        (True, "mlpmatch"), (False, "supervised"),
    }  # fmt: skip


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href", "data", "srcset", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_asks_for_no_other_file(page):
    text, elements = (page / "report.html").read_text(), Elements()
    elements.feed(text)
    assert not elements.open
    pictures = [source for source in elements.sources if not source.startswith("#")]
    assert len(pictures) == 2 * (1 + 1 + 2) + 2  # of two images: image, truth and two predictions; confusion matrices
    for source in pictures:
        kind, _, data = source.partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.convert("RGB").width >= 200
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    svgs = list(page.glob("*.svg"))
    assert len(svgs) == 10
    assert all(path.read_text() in text for path in svgs)


def test_predictions_of_one_image_are_side_by_side(sweep, page):
    """What the page shows is what is drawn in the run folders' sheets."""
    text = (page / "report.html").read_text()
    for run in sorted(sweep.glob("*_s0")):
        for sheet in sorted((run / "predictions").glob("*.png")):
            (uri,) = re.findall(rf'alt="truth of {sheet.stem}" src="data:image/webp;base64,(.*?)"', text)
            with Image.open(io.BytesIO(base64.b64decode(uri))) as truth, Image.open(sheet) as drawn:
                expected = np.array(drawn.convert("RGB"))[22 : 22 + 320, 8 + 328 : 8 + 328 + 320]
                assert np.array_equal(np.array(truth.convert("RGB")), expected)
            predictions = re.findall(rf'alt="prediction for {sheet.stem}" src="data:image/webp;base64,(.*?)"', text)
            shown = [np.array(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")) for uri in predictions]
            expected = np.array(Image.open(sheet).convert("RGB"))[22 : 22 + 320, 8 + 2 * 328 : 8 + 2 * 328 + 320]
            assert np.array_equal(shown["mlpmatch" in run.name], expected)  # supervised comes first


def test_curves_show_validation_every_loss_term_and_the_confident_ratio(page):
    plots = {path.stem.split("_", 4)[4]: path.read_text() for path in page.glob("curves_shapes_4_*.svg")}
    assert plots.keys() == {
        "miou", "loss", "loss_fp", "loss_s", "loss_u_np", "loss_x", "loss_x_np", "confident_ratio", "lambda_np",
    }  # fmt: skip
    assert COLORS["mlpmatch"] in plots["loss_fp"]
    assert COLORS["supervised"] not in plots["loss_fp"]


def to_values(svg: ElementTree.Element, axis: str) -> np.polynomial.Polynomial:
    """Return the function from pixels to values that the ticks of an axis say."""
    ticks = [node for node in svg.iter(f"{SVG}g") if node.get("id", "").startswith(f"{axis}tick_")]
    pixels = [float(next(tick.iter(f"{SVG}use")).get(axis)) for tick in ticks]
    values = [float(next(tick.iter(f"{SVG}text")).text.replace("\N{MINUS SIGN}", "-")) for tick in ticks]
    return np.polynomial.Polynomial.fit(pixels, values, 1)


def test_points_and_error_bars_are_where_the_axis_says(make_run, tmp_path):
    for count in (4, 8):
        for seed, miou in enumerate((0.40, 0.50, 0.66)):
            make_run(f"{count}{seed}", seed, miou - count / 100, split=f"{count}", sha256=str(count) * 64, count=count)
    groups = groups_of(tmp_path / "runs")
    svg = ElementTree.fromstring(score_plot(groups, series_styles(groups)))
    to_y = to_values(svg, "y")
    color = method_color("supervised")
    dots = [
        to_y(float(use.get("y")))
        for use in svg.iter(f"{SVG}use")
        if f"fill: {color}" in use.get("style", "") and f"stroke: {color}" in use.get("style", "")
    ]
    means = [100 * np.mean((0.40, 0.50, 0.66)) - count for count in (4, 8)]
    deviation = 100 * np.std((0.40, 0.50, 0.66), ddof=1)
    expected = sorted([*means, *(mean + sign * deviation for mean in means for sign in (1, -1))])
    assert sorted(dots) == pytest.approx(expected, abs=0.05)


def test_the_curve_of_a_group_is_the_mean_and_long_curves_are_thinned(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "path.simplify", False)
    values = np.random.default_rng(0).random((2, 1000))
    for seed in (0, 1):
        frame = pd.DataFrame({"epoch": 0, "step": range(1000), "val/miou": values[seed]})
        path = make_run(str(seed), seed) / "metrics.csv"
        frame.to_csv(path, index=False)
        edit_json(path.with_name("metrics.json"), lambda content: content.update(steps=1000))
    groups = groups_of(tmp_path / "runs")
    svg = ElementTree.fromstring(curve_plots(groups, series_styles(groups))["val/miou"])
    lines = [
        path for path in svg.iter(f"{SVG}path") if f"stroke: {method_color('supervised')}" in path.get("style", "")
    ]
    points = [re.findall(r"[ML] (\S+) (\S+)", path.get("d")) for path in lines]
    (line,) = [np.array(found, float) for found in points if len(found) == 200]
    expected = values.mean(axis=0).reshape(200, 5).mean(axis=1)
    assert to_values(svg, "y")(line[:, 1]) == pytest.approx(expected, abs=1e-3)


def test_the_best_is_marked_with_its_gain_over_supervised(make_run, tmp_path):
    for method, miou in (("mlpmatch", 0.55), ("supervised", 0.40), ("mlpmatch_official", 0.50)):
        run = make_run(method, 0, miou)
        config = OmegaConf.load(run / "config.yaml")
        config.method.name = method
        OmegaConf.save(config, run / "config.yaml")
    make_run("elsewhere", 0, 0.9, split="8", sha256="b" * 64, count=8)
    table = score_table(groups_of(tmp_path / "runs"))
    column = table.columns.index("mIoU %")
    assert [row[column] for row in table.rows] == [
        Cell("40.00"), Cell("55.00", best=True, gain="+15.00"), Cell("50.00", gain="+10.00"), Cell("90.00"),
    ]  # fmt: skip
    assert "| **55.00 (+15.00)** |" in table.markdown()


@pytest.mark.parametrize("key", ["schedule__lr", "trainer__devices", "init_weights__x", "method__scale"])
def test_runs_with_other_settings_are_not_averaged(make_run, tmp_path, key):
    make_run("a", 0, 0.4)
    make_run("b", 1, 0.6)
    make_run("c", 0, 0.8, **{key: 2})
    rows = summary_of(tmp_path / "runs")
    assert sorted((row["miou_n"], row["seeds"], float(row["miou_mean"])) for row in rows) == [
        ("1", "0", pytest.approx(0.8)), ("2", "0 1", pytest.approx(0.5)),
    ]  # fmt: skip
    assert {row[key.replace("__", ".", 1)] for row in rows if row["miou_n"] == "1"} == {"2"}


def test_settings_that_cannot_change_a_result_do_not_separate_runs(make_run, tmp_path):
    make_run("a", 0, 0.4)
    make_run("b", 1, 0.6, loader__num_workers=3, logger__tensorboard=True, schedule__momentum=0.9)
    make_run("c", 2, 0.8, trainer__accelerator="cpu", callbacks__predictions={"num_images": 1}, dataset__split_seed=0)
    (row,) = summary_of(tmp_path / "runs")
    assert (row["seeds"], float(row["miou_mean"])) == ("0 1 2", pytest.approx(0.6))


def test_a_folder_dataset_is_called_by_its_folder(make_run):
    changes = {"dataset___target_": "mlpmatch_pl.data.datasets.folder.folder", "dataset__root": "/data/fields"}
    run = read_run(make_run("a", split="/data/fields/lists/16.txt", **changes))
    assert run.dataset == "fields"
    (group,) = group_runs([run])
    assert (group.label, run.lists["labeled"].label) == (".../lists/16.txt", "/data/fields/lists/16.txt")


def test_lists_are_compared_by_hash_not_by_name(make_run, tmp_path):
    make_run("a", 0, 0.4, split="1/16", sha256="a" * 64)
    make_run("b", 1, 0.5, split="lists/1-16.txt", sha256="a" * 64)
    make_run("c", 0, 0.8, split="1/16", sha256="b" * 64)
    other = make_run("d", 2, 0.6, split="1/16", sha256="a" * 64)
    edit_json(other / "splits.json", lambda content: content["test"].update(sha256="f" * 64))
    rows = summary_of(tmp_path / "runs")
    found = [(row["labeled_list"], row["sha256"][0], row["miou_n"], row["test list"][0] == "f") for row in rows]
    assert sorted(found) == [("1/16", "a", "1", True), ("1/16", "a", "2", False), ("1/16", "b", "1", False)]


def test_split_seeds_are_pooled_only_when_asked(make_run, tmp_path):
    for seed, miou in enumerate((0.4, 0.6)):
        folder = make_run(f"a{seed}", 0, miou, split=f"4 (seed {seed})", sha256=str(seed) * 64)
        edit_json(folder / "splits.json", lambda content, s=seed: content["unlabeled"].update(sha256=str(s) * 64))
    make_run("listed", 0, 0.9, split="4.txt", sha256="c" * 64)
    assert [row["miou_n"] for row in summary_of(tmp_path / "runs")] == ["1", "1", "1"]
    rows = {row["labeled_list"]: row for row in summary_of(tmp_path / "runs", pool_splits=True)}
    assert rows.keys() == {"4 (several seeds)", "4.txt"}
    assert float(rows["4 (several seeds)"]["miou_std"]) == pytest.approx(statistics.stdev((0.4, 0.6)))
    assert rows["4 (several seeds)"]["sha256"] == f"{'0' * 64} {'1' * 64}"


def test_a_name_represents_the_keys_it_determines(make_run, tmp_path):
    make_run("a", backbone__name="resnet50", backbone__output_stride=16)
    make_run("b")
    (first, second) = groups_of(tmp_path / "runs")
    assert [dict(first.settings), dict(second.settings)] == [
        {"backbone.name": "resnet50"}, {"backbone.name": "test_resnet"},
    ]  # fmt: skip


def test_methods_differ_only_by_their_name(make_run, tmp_path):
    make_run("a")
    make_run("b", method="mlpmatch")
    make_run("c", method="mlpmatch", method__lambda_max=0.0)
    groups = groups_of(tmp_path / "runs")
    assert [group.series for group in groups] == [
        "supervised", "mlpmatch, method.lambda_max=0", "mlpmatch, method.lambda_max=0.25",
    ]  # fmt: skip
    styles = series_styles(groups)
    assert styles["supervised"]["color"] == COLORS["supervised"]
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 3


def test_an_unfinished_run_is_listed_and_not_averaged(make_run, tmp_path):
    make_run("a", 0, 0.4)
    running = make_run("b", 1, curves=True)
    (running / "metrics.json").unlink()
    curves = read_curves(running / "metrics.csv")
    with (running / "metrics.csv").open("a") as file:
        file.write("9,99,0.2,0.")  # being written
    result = report_of(tmp_path / "runs")
    (row,) = read_csv(tmp_path / "out" / "summary.csv")
    assert row["seeds"] == "0"
    assert result.summary.startswith("Runs: 1 finished, 1 without a result;")
    (line,) = [line for line in (tmp_path / "out" / "summary.md").read_text().splitlines() if str(running) in line]
    val = curves["val/miou"].dropna()
    assert line.endswith(f"| 5 of 5 | {percent(val[-1:])} | {100 * val.max():.2f} | 0 min ago |")


def test_a_run_that_was_resumed_after_its_end_is_unfinished(make_run):
    folder = make_run("a", curves=True)
    assert read_run(folder).finished
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    with (folder / "metrics.csv").open("a") as file:
        file.write(",".join({"step": "30", "val/miou": "0.5"}.get(name, "") for name in header) + "\n")
    assert not read_run(folder).finished


def test_only_broken_runs(make_run, tmp_path, capsys):
    (make_run("a") / "config.yaml").write_text("a: [")
    cfg = compose_config("report", f"runs={tmp_path / 'runs'}", f"output={tmp_path / 'out'}")
    assert not report(cfg)
    printed = capsys.readouterr()
    assert "config.yaml is broken" in printed.out
    assert "Runs: 1 not readable;" in printed.out
    assert printed.err == "error: some files are broken, see the table of problems\n"
    assert read_csv(tmp_path / "out" / "summary.csv") == []


@pytest.mark.parametrize(
    ("name", "content", "sentence", "averaged"),
    [
        ("config.yaml", "seed: [", "config.yaml is broken", 1),
        ("config.yaml", "just words", "config.yaml is broken: expected keys and values", 1),
        ("config.yaml", "seed: 1", "config.yaml is broken: lacks 'dataset._target_'", 1),
        ("splits.json", "{}", "splits.json is broken: lacks 'labeled'", 1),
        ("splits.json", "[" * 10**5, "splits.json is broken", 1),
        ("metrics.json", '{"test": {"test/miou"', "metrics.json is broken", 1),
        ("metrics.json", "[]", "metrics.json is broken", 1),
        ("metrics.csv", "step,val/miou\n4,0.5\n9,1,1\n14,0.5\n", "metrics.csv is broken", 2),
        ("metrics.csv", "step,val/miou\n4,0.5,1\n", "metrics.csv is broken: expected lines as long as the header", 2),
        ("metrics.csv", "step,val/miou\n,0.5\n", "metrics.csv is broken: expected lines", 2),
        ("metrics.csv", "step,val/miou\n4,half\n", "metrics.csv is broken", 2),
        ("metrics.csv", "epoch,val/miou\n4,1\n", "metrics.csv is broken: line 1 has no column step", 2),
        ("overrides.yaml", "3", "overrides.yaml is broken", 2),
        ("predictions/x.png", "no picture", "predictions/x.png is broken", 2),
        ("confusion_test.png", "no picture", "confusion_test.png is broken", 2),
    ],
)
def test_broken_files_are_named_and_everything_else_is_reported(make_run, tmp_path, name, content, sentence, averaged):
    broken = make_run("a", 0, 0.4)
    make_run("b", 1, 0.6)
    (broken / "predictions").mkdir()
    (broken / name).write_text(content)
    assert report_of(tmp_path / "runs").broken
    markdown = (tmp_path / "out" / "summary.md").read_text()
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {broken} | ") and sentence in line]
    assert line in markdown.partition("### Problems")[2]
    (row,) = read_csv(tmp_path / "out" / "summary.csv")
    assert row["miou_n"] == str(averaged)


def test_a_refused_job_is_listed(make_run, tmp_path):
    make_run("a")
    refused = tmp_path / "runs" / "1_shapes"
    refused.mkdir()
    (refused / "train.log").touch()
    result = report_of(tmp_path / "runs")
    assert not result.broken
    assert result.summary.startswith("Runs: 1 finished, 1 refused or not begun;")
    expected = f"| {refused} | has no config.yaml: the job was refused or has not begun |"
    assert expected in (tmp_path / "out" / "summary.md").read_text()


def test_a_table_that_is_too_wide_is_not_printed(capsys):
    for columns in (40, 10):
        table = Table("table", ("a",) * columns, ((Cell("12.34 ± 5.67"),) * columns,), range(columns))
        Report("summary", (table,), (), broken=False).show()
    printed = capsys.readouterr().out
    assert "table: too wide for the terminal, see report.html or summary.md\n" in printed
    assert printed.count("12.34 ± 5.67") == 10


def test_an_absent_class_does_not_count(make_run, tmp_path):
    for seed, iou in enumerate((0.2, float("nan"), 0.4)):
        folder = make_run(f"a{seed}", seed)
        edit_json(folder / "metrics.json", lambda content, iou=iou: content["test"].update({"test/iou/disk": iou}))
    (row,) = summary_of(tmp_path / "runs")
    assert (float(row["iou/disk_mean"]), row["iou/disk_n"], row["miou_n"]) == (pytest.approx(0.3), "2", "3")


def test_each_run_is_found_once_and_nothing_else(make_run, tmp_path):
    runs = [make_run(name) for name in ("10_b", "2_a")]
    for other in (".hydra", "wandb/offline-run/files", "checkpoints"):
        (runs[0] / other).mkdir(parents=True)
        for name in ("config.yaml", "splits.json"):
            shutil.copy(runs[0] / name, runs[0] / other / name)
    (tmp_path / "runs" / "notes.txt").touch()
    given = [tmp_path / "runs", runs[0], tmp_path / "runs" / ".." / "runs", tmp_path / "runs" / "notes.txt"]
    assert [path.resolve() for path in find_run_folders(given)] == [runs[1], runs[0]]


def test_a_resumed_run_counts_its_later_steps(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/miou\n0,4,5,\n0,4,,0.1\n1,9,4,\n1,14,3,\n1,9,2,\n1,9,,0.3\n2,14,1,\n")
    curves = read_curves(path)
    assert curves["train/loss"].to_dict() == {4: 5, 9: 2, 14: 1}
    assert curves["val/miou"].dropna().to_dict() == {4: 0.1, 9: 0.3}
    path.write_text("step,train/loss\n4,5\n99,1\n9,2\n")  # a longer numbering before the resume
    assert read_curves(path)["train/loss"].to_dict() == {4: 5, 9: 2}


def test_a_report_is_overwritten_only_when_asked(make_run, tmp_path):
    make_run("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    options = Options((str(tmp_path / "runs"),), tmp_path / "out")
    write_report(options)
    (tmp_path / "out" / "curves_gone_1_aaaaaaaa.svg").touch()
    with pytest.raises(UserError, match=r"expected to write new files only, but .*report.html exists .*overwrite=true"):
        write_report(options)
    report_of(tmp_path / "runs")
    assert not (tmp_path / "out" / "curves_gone_1_aaaaaaaa.svg").exists()
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["runs=gone"], "expected folders of runs, but gone does not exist"),
        (["runs=."], "expected run folders in or below ., but there is none"),
        (["runs=.", "num_images=-1"], "expected num_images of at least 0, but got -1"),
        (["runs=.", "overwrite=yes"], "expected overwrite as true or false, but got 'yes'"),
        (["runs=.", "num_images=few"], "expected num_images as .*, but got 'few'"),
        (["runs=.", "output=file"], "expected output as a folder, but file is a file"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=sentence):
        report(compose_config("report", *overrides))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_may_come_without_a_key_and_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1,seed=0").mkdir()
    (argument, quoted) = named_folders(["lr=0.1,seed=0", "a (b)", "output=it's"])
    cfg = compose_config("report", argument, quoted)
    assert (cfg.runs, cfg.output) == (["lr=0.1,seed=0", "a (b)"], "it's")


def test_names_from_files_are_text_everywhere(make_run, tmp_path):
    outside = {"sha256": "../../x", "curves": True}
    make_run("a", split='<b> & "4" | x', method__name="<i>$x^", schedule__note="=HYPERLINK(1)", **outside)
    make_run("b", schedule__note="-1")
    report_of(tmp_path / "runs")
    text = (tmp_path / "out" / "report.html").read_text()
    Elements().feed(text)
    assert "<b> &" not in text
    assert "<i>$" not in text
    assert '| <b> & "4" \\| x |' in (tmp_path / "out" / "summary.md").read_text()
    plots = list((tmp_path / "out").glob("*.svg"))
    assert len(plots) > 1
    for path in plots:
        ElementTree.fromstring(path.read_text())
    assert {row["schedule.note"] for row in read_csv(tmp_path / "out" / "runs.csv")} == {"'=HYPERLINK(1)", "-1"}


def test_the_command_prints_one_line_for_wrong_input(tmp_path):
    done = run_command("gone", cwd=tmp_path, module="mlpmatch_pl.report")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: expected folders of runs, but gone does not exist; name a folder such as runs\n"


def test_reporting_needs_neither_torch_nor_lightning(make_run, tmp_path):
    make_run("a")
    code = """
import sys
import mlpmatch_pl.report
from mlpmatch_pl.commands.report.run import Options, write_report
write_report(Options(("runs",), __import__("pathlib").Path("out")))
assert not {"torch", "lightning", "matplotlib.pyplot"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
