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

import numpy as np
import pytest
from helpers import TINY, run_command
from omegaconf import OmegaConf
from PIL import Image

from mlpmatch_pl.commands.report.groups import group_runs
from mlpmatch_pl.commands.report.metrics_csv import read_curves
from mlpmatch_pl.commands.report.plots import curve_plots, label_plot, series_names
from mlpmatch_pl.commands.report.runs import Run, find_run_folders, read_run
from mlpmatch_pl.commands.report.svg import ticks
from mlpmatch_pl.commands.report.tables import Table
from mlpmatch_pl.commands.report.terminal import show
from mlpmatch_pl.report import report
from mlpmatch_pl.utils.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Eight runs, as a user makes them: two lists, two methods, two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    values = [value for value in TINY if not value.startswith(("dataset.labeled", "schedule.steps"))]
    axes = ("dataset.labeled=4,8", "method=supervised,mlpmatch", "seed=0,1", "schedule.steps=20")
    done = run_command("-m", *axes, *values, f"hydra.sweep.dir={folder / 'all'}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"compare the runs: python -m mlpmatch_pl.report {folder / 'all'}\n")
    return folder / "all"


@pytest.fixture
def make_run(sweep, tmp_path):
    """A factory of run folders: a copy of a real one, with another seed, mIoU, configuration or lists."""

    def make(name: str, seed: int = 0, miou: float = 0.5, method: str = "supervised", **changes) -> Path:
        source = next(path.parent for path in sorted(sweep.glob("*/config.yaml")) if is_of(path, method))
        folder = tmp_path / "runs" / name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints"))
        config = OmegaConf.load(folder / "config.yaml")
        config.seed = seed
        for key, value in changes.items():
            if key not in ("label", "sha256"):
                OmegaConf.update(config, key.replace("__", ".", 1), value, force_add=True)
        OmegaConf.save(config, folder / "config.yaml")
        edit_json(folder / "metrics.json", lambda content: content["test"].update({"test/miou": miou}))
        edit_json(
            folder / "splits.json",
            lambda content: content["labeled"].update(
                {"split": changes.get("label", "4 (seed 0)"), "sha256": changes.get("sha256", "a" * 64)}
            ),
        )
        return folder

    return make


def is_of(path: Path, method: str) -> bool:
    config = OmegaConf.load(path)
    return (config.method.name, config.seed, config.dataset.labeled) == (method, 0, 4)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def summary_of(folder: Path, *options: str) -> list[dict[str, str]]:
    """Report everything below a folder, and return the rows of summary.csv."""
    output = folder.parent / "out"
    report([str(folder), f"output={output}", "overwrite=true", "pictures=0", *options])
    return read_csv(output / "summary.csv")


def test_a_sweep_is_averaged_over_its_seeds(sweep, tmp_path, capsys):
    assert report([str(sweep), f"output={tmp_path / 'out'}"]) == 0
    expected: dict[tuple[str, ...], list[dict]] = {}
    for path in sweep.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        key = (metrics["method"], metrics["labeled"]["split"], metrics["labeled"]["sha256"])
        expected.setdefault(key, []).append(metrics["test"])
    rows = read_csv(tmp_path / "out" / "summary.csv")
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
        line = next(
            line
            for line in (tmp_path / "out" / "summary.md").read_text().splitlines()
            if line.startswith(f"| {row['labeled_list']} | {row['sha256'][:8]} | {row['method']} | test | 0, 1 | ")
        )
        assert cell in line
        assert cell in capsys.readouterr().out or cell in (tmp_path / "out" / "report.html").read_text()
    runs = read_csv(tmp_path / "out" / "runs.csv")
    assert sorted(row["run"] for row in runs) == sorted(str(path) for path in sweep.iterdir() if path.is_dir())
    assert {row["finished"] for row in runs} == {"yes"}


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href", "data", "srcset", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_asks_for_no_other_file(sweep, tmp_path):
    report([str(sweep), f"output={tmp_path / 'out'}", "pictures=1"])
    text = (tmp_path / "out" / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert not page.open
    assert len(page.found) == 8
    for source in page.found:
        kind, _, data = source.partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.convert("RGB").width > 1000
    assert not re.search(r"url\(|@import|<script|<link", text)
    svgs = sorted(path.name for path in (tmp_path / "out").glob("*.svg"))
    assert [re.sub("_[0-9a-f]{8}", "", name) for name in svgs] == [
        "curves_shapes_4.svg", "curves_shapes_8.svg", "miou_shapes.svg",
    ]  # fmt: skip
    for name in svgs:
        svg = (tmp_path / "out" / name).read_text()
        ElementTree.fromstring(svg)
        assert svg in text


def test_curves_show_validation_every_loss_term_and_the_confident_ratio(sweep):
    groups = group_runs([read_run(path) for path in find_run_folders([sweep])])
    svg = ElementTree.fromstring(curve_plots(groups, series_names(groups)))
    titles = [text.text for text in svg.iter(f"{SVG}text") if text.get("font-weight") == "600"]
    assert titles == [
        "val/miou", "train/loss", "train/loss_fp", "train/loss_s", "train/loss_u_np", "train/loss_x",
        "train/loss_x_np", "train/confident_ratio", "train/lambda_np",
    ]  # fmt: skip


def test_points_and_error_bars_stand_where_the_axis_says(make_run, tmp_path):
    for seed, miou in enumerate((0.40, 0.50, 0.66)):
        make_run(f"a{seed}", seed, miou)
        make_run(f"b{seed}", seed, miou - 0.2, method="mlpmatch")
    groups = group_runs([read_run(path) for path in find_run_folders([tmp_path / "runs"])])
    svg = ElementTree.fromstring(label_plot("shapes", groups, series_names(groups)))
    marks = [text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    pixels, values = [float(mark.get("y")) - 4 for mark in marks], [float(mark.text) for mark in marks]
    to_value = np.polynomial.Polynomial.fit(pixels, values, 1)
    dots = [group for group in svg.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    for dot, scores in zip(dots, ([20, 30, 46], [40, 50, 66]), strict=True):
        assert to_value(float(dot.find(f"{SVG}circle").get("cy"))) == pytest.approx(np.mean(scores), abs=0.05)
        low, high = re.match(r"M\S+ (\S+)V([\d.]+)M", dot.find(f"{SVG}path").get("d")).groups()
        bar = to_value(float(high)) - to_value(float(low))
        assert bar == pytest.approx(2 * np.std(scores, ddof=1), abs=0.1)
        assert f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f} %, 3 runs" in dot.find(f"{SVG}title").text


@pytest.mark.parametrize(
    "key", ["schedule__lr", "loader__crop_size", "trainer__devices", "init_weights", "method__scale"]
)
def test_runs_with_other_settings_are_not_averaged(make_run, tmp_path, key):
    make_run("a", 0, 0.4)
    make_run("b", 1, 0.6)
    make_run("c", 0, 0.8, **{key: 2})
    rows = summary_of(tmp_path / "runs")
    assert sorted((row["miou_n"], row["seeds"], float(row["miou_mean"])) for row in rows) == [
        ("1", "0", pytest.approx(0.8)), ("2", "0 1", pytest.approx(0.5)),
    ]  # fmt: skip
    assert {row[key.replace("__", ".", 1)] for row in rows if row["miou_n"] == "1"} == {"2"}


def test_what_cannot_change_a_result_does_not_part_runs(make_run, tmp_path):
    make_run("a", 0, 0.4)
    make_run("b", 1, 0.6, loader__num_workers=3, logger__tensorboard=True, resume="auto", schedule__momentum=0.9)
    make_run("c", 2, 0.8, trainer__accelerator="cpu", callbacks__predictions={"num_images": 1}, dataset__split_seed=0)
    (row,) = summary_of(tmp_path / "runs")
    assert (row["seeds"], float(row["miou_mean"])) == ("0 1 2", pytest.approx(0.6))


def test_an_own_folder_is_called_by_its_name(make_run, tmp_path):
    changes = {"dataset___target_": "mlpmatch_pl.data.datasets.folder.folder", "dataset__root": "/data/fields"}
    run = read_run(make_run("a", label="/data/fields/lists/16.txt", **changes))
    assert run.dataset == "fields"
    (group,) = group_runs([run])
    assert (group.label, run.lists["labeled"].label) == (".../lists/16.txt", "/data/fields/lists/16.txt")


def test_lists_are_told_apart_by_their_hash_not_their_name(make_run, tmp_path):
    make_run("a", 0, 0.4, label="1/16", sha256="a" * 64)
    make_run("b", 1, 0.5, label="lists/1-16.txt", sha256="a" * 64)
    make_run("c", 0, 0.8, label="1/16", sha256="b" * 64)
    rows = summary_of(tmp_path / "runs")
    assert [(row["labeled_list"], row["sha256"][0], row["miou_n"]) for row in rows] == [
        ("1/16", "a", "2"), ("1/16", "b", "1"),
    ]  # fmt: skip


def test_other_test_images_part_runs(make_run, tmp_path):
    make_run("a", 0, 0.4)
    other = make_run("b", 1, 0.6)
    edit_json(other / "splits.json", lambda content: content["test"].update(sha256="f" * 64))
    rows = summary_of(tmp_path / "runs")
    assert [row["miou_n"] for row in rows] == ["1", "1"]
    assert "ffffffff" in {row["test list"] for row in rows}


def test_split_seeds_are_pooled_only_when_asked(make_run, tmp_path):
    for seed, miou in enumerate((0.4, 0.6)):
        folder = make_run(f"a{seed}", 0, miou, label=f"4 (seed {seed})", sha256=str(seed) * 64)
        edit_json(folder / "splits.json", lambda content, s=seed: content["unlabeled"].update(sha256=str(s) * 64))
    make_run("listed", 0, 0.9, label="4.txt", sha256="c" * 64)
    assert [row["miou_n"] for row in summary_of(tmp_path / "runs")] == ["1", "1", "1"]
    rows = {row["labeled_list"]: row for row in summary_of(tmp_path / "runs", "pool_splits=true")}
    assert rows.keys() == {"4 (several seeds)", "4.txt"}
    assert float(rows["4 (several seeds)"]["miou_std"]) == pytest.approx(statistics.stdev((0.4, 0.6)))
    assert rows["4 (several seeds)"]["sha256"] == f"{'0' * 64} {'1' * 64}"


def test_a_name_stands_for_the_keys_it_determines(make_run, tmp_path):
    make_run("a", backbone__name="resnet50", backbone__output_stride=16)
    make_run("b")
    (first, second) = group_runs([read_run(path) for path in find_run_folders([tmp_path / "runs"])])
    assert [dict(first.settings), dict(second.settings)] == [
        {"backbone.name": "resnet50"}, {"backbone.name": "test_resnet"},
    ]  # fmt: skip


def test_methods_differ_in_no_more_than_their_name(make_run, tmp_path):
    make_run("a")
    make_run("b", method="mlpmatch")
    make_run("c", method="mlpmatch", method__lambda_max=0.0)
    groups = group_runs([read_run(path) for path in find_run_folders([tmp_path / "runs"])])
    assert [group.series for group in groups] == [
        "mlpmatch, method.lambda_max=0", "mlpmatch, method.lambda_max=0.25", "supervised",
    ]  # fmt: skip


def test_an_unfinished_run_is_named_and_not_averaged(make_run, tmp_path, capsys):
    make_run("a", 0, 0.4)
    running = make_run("b", 1)
    (running / "metrics.json").unlink()
    curves = read_curves(running / "metrics.csv")
    with (running / "metrics.csv").open("a") as file:
        file.write("9,99,0.2,0.")  # being written
    (row,) = summary_of(tmp_path / "runs")
    assert row["seeds"] == "0"
    printed = capsys.readouterr().out
    assert "Runs: 1 finished, 1 without a result;" in printed
    (line,) = [line for line in (tmp_path / "out" / "summary.md").read_text().splitlines() if str(running) in line]
    best = 100 * max(value for _, value in curves["val/miou"])
    assert f"| 1 | 20 of 20 | {100 * curves['val/miou'][-1][1]:.2f} | {best:.2f} | 0 min ago |" in line


def test_a_run_that_goes_on_after_its_end_is_unfinished(make_run, tmp_path):
    folder = make_run("a")
    assert read_run(folder).result is not None
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    with (folder / "metrics.csv").open("a") as file:
        file.write(",".join({"step": "30", "val/miou": "0.5"}.get(name, "") for name in header) + "\n")
    assert read_run(folder).result is None


def test_only_broken_runs(make_run, tmp_path, capsys):
    (make_run("a") / "config.yaml").write_text("a: [")
    assert report([str(tmp_path / "runs"), f"output={tmp_path / 'out'}"]) == 1
    printed = capsys.readouterr().out
    assert "config.yaml is broken" in printed
    assert "Runs: 1 not readable;" in printed
    assert read_csv(tmp_path / "out" / "summary.csv") == []


@pytest.mark.parametrize(
    ("name", "content", "sentence", "averaged"),
    [
        ("config.yaml", "seed: [", "config.yaml is broken", 1),
        ("config.yaml", "just words", "config.yaml is broken", 1),
        ("config.yaml", "seed: 1", "config.yaml is broken: lacks 'dataset._target_'", 1),
        ("splits.json", "{", "splits.json is broken", 1),
        ("splits.json", "{}", "splits.json is broken: lacks 'labeled'", 1),
        ("metrics.json", '{"test": {"test/miou"', "metrics.json is broken", 1),
        ("metrics.json", "[]", "metrics.json is broken", 1),
        ("metrics.csv", "step,val/miou\n4,0.5\n9\n14,0.5\n", "metrics.csv is broken: line 3 has 1 values", 2),
        ("metrics.csv", "step,val/miou\n4,half\n", "metrics.csv is broken: line 2 is not a step and numbers", 2),
        ("predictions/test_0000.png", "no picture", "predictions/test_0000.png is broken", 2),
    ],
)
def test_broken_files_are_named_and_all_else_is_reported(make_run, tmp_path, capsys, name, content, sentence, averaged):
    make_run("a", 0, 0.4)
    broken = make_run("b", 1, 0.6)
    (broken / name).write_text(content)
    assert report([str(tmp_path / "runs"), f"output={tmp_path / 'out'}"]) == 1
    assert "error: some files are broken" in capsys.readouterr().err
    markdown = (tmp_path / "out" / "summary.md").read_text()
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {broken} | ") and sentence in line]
    assert line in markdown.partition("### Problems")[2]
    (row,) = read_csv(tmp_path / "out" / "summary.csv")
    assert row["miou_n"] == str(averaged)


def test_a_refused_job_is_named(make_run, tmp_path, capsys):
    make_run("a")
    refused = tmp_path / "runs" / "1_shapes"
    refused.mkdir()
    (refused / "train.log").touch()
    assert report([str(tmp_path / "runs"), f"output={tmp_path / 'out'}"]) == 0
    assert "Runs: 1 finished, 1 refused or not begun;" in capsys.readouterr().out
    expected = f"| {refused} | has no config.yaml: the job was refused or has not begun |"
    assert expected in (tmp_path / "out" / "summary.md").read_text()


def test_a_table_that_is_too_wide_is_not_printed(capsys):
    wide = Table("wide", ("a",) * 40, (("12.34 ± 5.67",) * 40,), numbers=40)
    show(wide)
    assert capsys.readouterr().out == "wide: too wide for here, see report.html or summary.md\n"
    show(Table("few", ("a",) * 10, (("12.34 ± 5.67",) * 10,), numbers=10))
    assert capsys.readouterr().out.count("12.34 ± 5.67") == 10


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
    assert read_curves(path) == {"train/loss": ((4, 5), (9, 2), (14, 1)), "val/miou": ((4, 0.1), (9, 0.3))}


def test_a_long_curve_is_drawn_by_means_of_equal_parts(make_run):
    run = read_run(make_run("a"))
    values = np.random.default_rng(0).random(1000)
    long = Run(run.folder, run.name, run.config, run.lists, None, {"val/miou": tuple(enumerate(values))})
    groups = group_runs([long])
    svg = ElementTree.fromstring(curve_plots(groups, series_names(groups)))
    (line,) = [path for path in svg.iter(f"{SVG}path") if path.get("stroke-linecap")]
    points = np.array([place.split() for place in line.get("d")[1:].split("L")], float)
    assert len(points) == 200
    assert np.corrcoef(points[:, 1], values.reshape(200, 5).mean(axis=1))[0, 1] == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.21), (-3, 900), (12, 1e6), (0, 3e-7)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert low - 1e-12 <= found[0] < found[-1] <= high + 1e-12
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"


def test_a_report_is_written_over_only_when_asked(make_run, tmp_path):
    make_run("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    arguments = [str(tmp_path / "runs"), f"output={tmp_path / 'out'}"]
    assert report(arguments) == 0
    (tmp_path / "out" / "curves_gone_1_aaaaaaaa.svg").touch()
    with pytest.raises(UserError, match=r"expected to write new files only, but .*report.html exists .*overwrite=true"):
        report(arguments)
    assert report([*arguments, "overwrite=true"]) == 0
    assert not (tmp_path / "out" / "curves_gone_1_aaaaaaaa.svg").exists()
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "expected a folder of runs, but got none"),
        (["gone"], "expected folders of runs, but gone does not exist"),
        (["."], "expected run folders in or below ., but there is none"),
        ([".", "outputs=x"], r"there is no option outputs, only output, .*Did you mean output\?"),
        ([".", "pictures=-1"], "expected pictures as a whole number of at least 0, but got -1"),
        ([".", "overwrite=yes"], "expected overwrite as true or false, but got 'yes'"),
        ([".", "pictures=few"], "expected pictures as a whole number, but got 'few'"),
        ([".", "output="], "expected output as a path, but got ''"),
        ([".", "output=file"], "expected output as a folder, but file is a file"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=sentence):
        report(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_may_have_an_equals_sign(make_run, tmp_path, monkeypatch):
    make_run("lr=0.1,seed=0")
    monkeypatch.chdir(tmp_path / "runs")
    assert report(["lr=0.1,seed=0", "output=../out"]) == 0


def test_names_from_files_cannot_break_the_page(make_run, tmp_path):
    make_run("a", label='<b> & "4" | x')
    report([str(tmp_path / "runs"), f"output={tmp_path / 'out'}"])
    Links().feed((tmp_path / "out" / "report.html").read_text())
    assert "<b>" not in (tmp_path / "out" / "report.html").read_text()
    assert '| <b> & "4" \\| x |' in (tmp_path / "out" / "summary.md").read_text()
    ElementTree.fromstring((tmp_path / "out" / "miou_shapes.svg").read_text())


def test_the_command_prints_one_line_for_wrong_input(tmp_path):
    done = run_command("gone", cwd=tmp_path, module="mlpmatch_pl.report")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: expected folders of runs, but gone does not exist; name a folder such as runs\n"


def test_reporting_needs_no_torch(make_run, tmp_path):
    make_run("a")
    code = f"""
import sys
from mlpmatch_pl.report import report
report([{str(tmp_path / "runs")!r}, "output=out"])
assert not {{"torch", "lightning", "hydra"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
