"""Reports of two real runs, and of run folders that are written file by file."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import yaml
from helpers import TINY, compose_config, run_command
from helpers.processes import run_forked
from PIL import Image

from mlpmatch_pl.commands.report.plots import COLORS, curve_plots, method_color, score_plot, series_styles
from mlpmatch_pl.commands.report.run import Options, print_table, write_report
from mlpmatch_pl.commands.report.runs import find_run_folders, read_curves, read_runs
from mlpmatch_pl.commands.report.tables import Cell, Table, group_runs, score_table
from mlpmatch_pl.report import named_folders, report
from mlpmatch_pl.utils.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"
CURVES = "epoch,step,train/loss,val/miou\n0,3,1.5,\n0,3,,0.25\n1,7,1.2,\n1,7,,0.5\n"


def make_run(
    folder: Path, seed=0, miou=0.5, method="supervised", curves="", overrides=(), scores=(), **changes
) -> Path:
    """Write a finished run; keyword arguments with ``__`` are configuration keys, the others parts of splits.json."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "dataset": {"_target_": "mlpmatch_pl.data.datasets.shapes.shapes"},
        "method": {"name": method},
        "schedule": {"steps": 8, "lr": 0.1},
        "backbone": {"name": "small", "output_stride": 8},
    }
    for key in [key for key in changes if "__" in key]:
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = changes.pop(key)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    labeled = {"split": "4 (seed 0)", "count": 4, "sha256": "a" * 64} | changes.pop("labeled", {})
    lists = {use: {"split": "all", "count": 3, "sha256": "e" * 64} for use in ("unlabeled", "val", "test")}
    (folder / "splits.json").write_text(json.dumps({"labeled": labeled, **lists, **changes}))
    result = {
        "steps": 8, "seconds": 60, "device": "CPU", "versions": {"mlpmatch_pl": "1"}, "evaluated_on": "test",
        "best": {"val/miou": miou}, "test": {"test/miou": miou, "test/iou/disk": miou, **dict(scores)},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(result))
    (folder / "metrics.csv").write_text(curves)
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def report_of(folder: Path, **options) -> bool:
    """Report everything below a folder to the folder ``out`` beside it."""
    return write_report(Options((str(folder),), folder.parent / "out", overwrite=True, **options))


def summary_of(folder: Path, **options) -> list[dict[str, str]]:
    report_of(folder, **options)
    return read_csv(folder.parent / "out" / "summary.csv")


def groups_of(folder: Path):
    return group_runs(read_runs(find_run_folders([folder]))[0])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two real runs, and their report in ``out dir`` by the real command, which imports neither torch nor Lightning."""
    folder = tmp_path_factory.mktemp("sweep")
    axes = ("method=supervised,mlpmatch", "trainer.log_every_n_steps=1")
    done = run_forked("-m", *axes, *TINY, f"hydra.sweep.dir={folder / 'all'}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"compare the runs: python -m mlpmatch_pl.report {folder / 'all'}\n")
    code = (
        "import sys; from mlpmatch_pl.report import main; sys.argv = ['report', 'all', 'output=out dir']; main();"
        "assert not {'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Runs: 2 finished;" in done.stdout
    assert f"wrote {Path('out dir/report.html')}\n" in done.stdout
    return folder


def embedded(text: str, alternative: str) -> list[np.ndarray]:
    """Return the pictures of the page that have an alternative text."""
    uris = re.findall(rf'alt="{alternative}" src="data:image/webp;base64,(.*?)"', text)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")) for uri in uris]


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


def test_the_page_of_real_runs_holds_everything_and_asks_for_no_other_file(sweep):
    text, elements = (sweep / "out dir" / "report.html").read_text(), Elements()
    elements.feed(text)
    assert not elements.open
    pictures = [source for source in elements.sources if not source.startswith("#")]
    assert all(source.startswith("data:image/webp;base64,") for source in pictures)
    assert len(pictures) == 2 * (1 + 1 + 2) + 2  # of two images: image, truth and two predictions; confusion matrices
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    plots = {path.name: path.read_text() for path in (sweep / "out dir").glob("*.svg")}
    assert all(plot in text for plot in plots.values())
    del plots["miou_shapes.svg"]
    assert {name.split("_", 4)[4]: COLORS["supervised"] in svg for name, svg in plots.items()} == {
        "miou.svg": True, "loss.svg": True, "loss_x.svg": True, "loss_s.svg": False, "loss_fp.svg": False,
        "loss_u_np.svg": False, "loss_x_np.svg": False, "confident_ratio.svg": False, "lambda_np.svg": True,
    }  # fmt: skip
    for row in read_csv(sweep / "out dir" / "runs.csv"):
        (folder,) = (sweep / "all").glob(f"*_{row['method']}_*")
        assert (row["run"], row["finished"]) == (f"all/{folder.name}", "yes")
        assert f"method={row['method']}" in row["overrides"].split()
        expected = json.loads((folder / "metrics.json").read_text())["test"]
        assert {f"test/{key}": float(row[key]) for key in ("miou", "acc", "iou/cross")}.items() <= expected.items()


def test_predictions_of_one_image_are_side_by_side(sweep):
    """What the page shows is what is drawn in the run folders' sheets, the baseline first."""
    text = (sweep / "out dir" / "report.html").read_text()
    for index, method in enumerate(("supervised", "mlpmatch")):
        (folder,) = (sweep / "all").glob(f"*_{method}_*")
        for path in sorted((folder / "predictions").glob("*.png")):
            sheet = np.array(Image.open(path).convert("RGB"))
            truth, prediction = (sheet[22 : 22 + 320, left : left + 320] for left in (8 + 328, 8 + 2 * 328))
            assert np.array_equal(embedded(text, f"truth of {path.stem}")[0], truth)
            assert np.array_equal(embedded(text, f"prediction for {path.stem}")[index], prediction)


def test_seeds_are_averaged_and_an_absent_class_does_not_count(runs):
    for seed, iou in enumerate((0.2, float("nan"), 0.4)):
        make_run(runs / f"a{seed}", seed, 0.4 + seed / 10, scores={"test/iou/disk": iou})
    (row,) = summary_of(runs)
    assert (row["seeds"], row["miou_n"], row["iou/disk_n"]) == ("0 1 2", "3", "2")
    assert [float(row[key]) for key in ("miou_mean", "miou_std", "iou/disk_mean")] == pytest.approx([0.5, 0.1, 0.3])
    for name in ("summary.md", "report.html"):
        assert "50.00 ± 10.00" in (runs.parent / "out" / name).read_text()


def to_values(svg: ElementTree.Element, axis: str) -> np.polynomial.Polynomial:
    """Return the function from pixels to values that the ticks of an axis say."""
    ticks = [node for node in svg.iter(f"{SVG}g") if node.get("id", "").startswith(f"{axis}tick_")]
    pixels = [float(next(tick.iter(f"{SVG}use")).get(axis)) for tick in ticks]
    values = [float(next(tick.iter(f"{SVG}text")).text.replace("\N{MINUS SIGN}", "-")) for tick in ticks]
    return np.polynomial.Polynomial.fit(pixels, values, 1)


def test_points_and_error_bars_are_where_the_axis_says(runs):
    for count in (4, 8):
        for seed, miou in enumerate((0.40, 0.50, 0.66)):
            labeled = {"sha256": str(count) * 64, "count": count}
            make_run(runs / f"{count}{seed}", seed, miou - count / 100, labeled=labeled)
    groups, color = groups_of(runs), method_color("supervised")
    svg = ElementTree.fromstring(score_plot(groups, series_styles(groups)))
    to_y, painted = to_values(svg, "y"), (f"fill: {color}", f"stroke: {color}")
    marks = [use for use in svg.iter(f"{SVG}use") if all(part in use.get("style", "") for part in painted)]
    means = [100 * np.mean((0.40, 0.50, 0.66)) - count for count in (4, 8)]
    deviation = 100 * np.std((0.40, 0.50, 0.66), ddof=1)
    expected = sorted([*means, *(mean + sign * deviation for mean in means for sign in (1, -1))])
    assert sorted(to_y(float(use.get("y"))) for use in marks) == pytest.approx(expected, abs=0.05)


def test_the_curve_of_a_group_is_the_mean_and_long_curves_are_thinned(runs, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "path.simplify", False)
    values = np.random.default_rng(0).random((2, 1000))
    for seed in (0, 1):
        lines = [f"{step // 200},{step},{value!r}\n" for step, value in enumerate(map(float, values[seed]))]
        folder = make_run(runs / str(seed), seed, curves="".join(["epoch,step,val/miou\n", *lines]))
        result = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(result | {"steps": 1000}))
    groups = groups_of(runs)
    svg = ElementTree.fromstring(curve_plots(groups, series_styles(groups))["val/miou"])
    lines = [path for path in svg.iter(f"{SVG}path") if f"stroke: {COLORS['supervised']}" in path.get("style", "")]
    points = max((re.findall(r"[ML] (\S+) (\S+)", path.get("d")) for path in lines), key=len)
    drawn = np.array(points, float)
    expected = values.mean(axis=0).reshape(200, 5).mean(axis=1)
    assert len(drawn) == 200
    assert to_values(svg, "y")(drawn[:, 1]) == pytest.approx(expected, abs=1e-3)


def test_the_best_is_marked_with_its_gain_over_supervised(runs):
    for method, miou in (("mlpmatch", 0.55), ("supervised", 0.40), ("mlpmatch_official", 0.50)):
        make_run(runs / method, 0, miou, method)
    make_run(runs / "elsewhere", 0, 0.9, labeled={"sha256": "b" * 64, "count": 8})
    table = score_table(groups_of(runs))
    column = table.columns.index("mIoU %")
    assert [row[column] for row in table.rows] == [
        Cell("40.00"), Cell("55.00", best=True, gain="+15.00"), Cell("50.00", gain="+10.00"), Cell("90.00"),
    ]  # fmt: skip
    assert "| **55.00 (+15.00)** |" in table.markdown()


@pytest.mark.parametrize("key", ["schedule__lr", "trainer__devices", "method__scale"])
def test_runs_with_other_settings_are_not_averaged(runs, key):
    for name, miou, changes in (("a", 0.4, {}), ("b", 0.6, {}), ("c", 0.8, {key: 2})):
        make_run(runs / name, int(name == "b"), miou, **changes)
    rows = {row["seeds"]: row for row in summary_of(runs)}
    assert (rows["0 1"]["miou_n"], float(rows["0 1"]["miou_mean"])) == ("2", pytest.approx(0.5))
    assert rows["0"][key.replace("__", ".")] == "2"


def test_settings_that_cannot_change_a_result_do_not_separate_runs(runs):
    make_run(runs / "a", 0)
    make_run(runs / "b", 1, loader__num_workers=3, logger__tensorboard=True, schedule__lr=0.1)
    make_run(runs / "c", 2, trainer__accelerator="cpu", callbacks__predictions={"num_images": 1}, dataset__split_seed=0)
    assert [row["seeds"] for row in summary_of(runs)] == ["0 1 2"]


def test_lists_are_compared_by_hash_and_split_seeds_pooled_only_when_asked(runs):
    make_run(runs / "a", 0, 0.4, labeled={"split": "4 (seed 0)"})
    make_run(runs / "b", 1, 0.4, labeled={"split": "/data/my/lists/4.txt"})
    make_run(runs / "c", 0, 0.6, labeled={"split": "4 (seed 1)", "sha256": "b" * 64})
    make_run(runs / "d", 2, 0.9, test={"split": "all", "count": 3, "sha256": "f" * 64}, labeled={"sha256": "c" * 64})
    rows = summary_of(runs)
    assert [(row["sha256"][0], row["miou_n"], row["test list"][0]) for row in rows] == [
        ("a", "2", "e"), ("c", "1", "f"), ("b", "1", "e"),
    ]  # fmt: skip
    (runs / "b" / "splits.json").unlink()
    (pooled,) = [row for row in summary_of(runs, pool_splits=True) if row["miou_n"] == "2"]
    assert (pooled["labeled_list"], pooled["sha256"]) == ("4 (several seeds)", f"{'a' * 64} {'b' * 64}")


def test_series_are_named_and_drawn_by_method_and_differing_settings(runs):
    make_run(runs / "a", backbone__name="large", backbone__output_stride=16)
    make_run(runs / "b", method="mlpmatch", method__lambda_max=0.0)
    make_run(runs / "c", method="mlpmatch", method__lambda_max=0.25)
    groups = groups_of(runs)
    assert list(groups["series"]) == [
        "supervised, backbone.name=large",
        "mlpmatch, backbone.name=small, method.lambda_max=0",
        "mlpmatch, backbone.name=small, method.lambda_max=0.25",
    ]
    styles = series_styles(groups)
    assert [styles[name]["color"] for name in groups["series"]] == [COLORS[name] for name in groups["method"]]
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 3


def test_unfinished_and_refused_runs_are_listed_and_not_averaged(runs, capsys):
    make_run(runs / "a", curves=CURVES, overrides=["seed=0", "x=1"])
    (make_run(runs / "b", 1, curves=f"{CURVES}2,99,0.2,0.", overrides=["seed=1", "x=1"]) / "metrics.json").unlink()
    make_run(runs / "c", 2, curves=f"{CURVES}2,11,0.9,\n")  # resumed after its end
    (runs / "d").mkdir()
    (runs / "d" / "train.log").touch()
    dataset = {"dataset___target_": "mlpmatch_pl.data.datasets.folder.folder", "dataset__root": "/data/fields"}
    make_run(runs / "e", **dataset)
    assert report_of(runs)
    printed = capsys.readouterr().out
    assert "Runs: 3 finished, 1 without" not in printed
    assert "Runs: 2 finished, 2 without a result, 1 problems;" in printed
    rows = read_csv(runs.parent / "out" / "summary.csv")
    assert [(row["dataset"], row["seeds"]) for row in rows] == [("fields", "0"), ("shapes", "0")]
    markdown = (runs.parent / "out" / "summary.md").read_text()
    assert f"| {runs / 'd'} | has no config.yaml: the job was refused or has not begun |" in markdown
    assert re.search(
        rf"{runs / 'b'} .* 1 \| seed=1 x=1 \| 8 of 8 \| - \| 50.00 \| last written 0.\d min ago \|", markdown
    )
    assert re.search(rf"{runs / 'c'} .* 2 \|  \| 12 of 8 \| - \|", markdown)


def test_broken_files_are_named_and_everything_else_is_reported(runs):
    cases = [  # the last column: whether the run keeps its result; the confusion matrix is that of the first run
        ("confusion_test.png", "no picture", "confusion_test.png is broken", True),
        ("config.yaml", "seed: [", "config.yaml is broken", False),
        ("config.yaml", "just words", "config.yaml is broken: expected keys and values", False),
        ("config.yaml", "seed: 1", "config.yaml is broken: lacks 'dataset._target_'", False),
        ("splits.json", "{}", "splits.json is broken: lacks 'labeled'", False),
        ("splits.json", "[" * 10**5, "splits.json is broken", False),
        ("metrics.json", '{"test": {"test/miou"', "metrics.json is broken", False),
        ("metrics.json", "[]", "metrics.json is broken", False),
        ("metrics.csv", "step,val/miou\n4,0.5\n9,1,1\n14,0.5\n", "metrics.csv is broken", True),
        (
            "metrics.csv",
            "step,val/miou\n4,0.5,1\n",
            "metrics.csv is broken: expected lines as long as the header",
            True,
        ),
        ("metrics.csv", "step,val/miou\n4,half\n", "metrics.csv is broken", True),
        ("metrics.csv", "epoch,val/miou\n4,1\n", "metrics.csv is broken: line 1 has no column step", True),
        ("overrides.yaml", "3", "overrides.yaml is broken", True),
        ("predictions/x.png", "no picture", "predictions/x.png is broken", True),
    ]
    for seed, (name, content, _, _) in enumerate(cases):
        (make_run(runs / f"broken{seed}", seed) / "predictions").mkdir()
        (runs / f"broken{seed}" / name).write_text(content)
    assert not report_of(runs)
    problems = (runs.parent / "out" / "summary.md").read_text().partition("### Problems")[2].splitlines()
    for seed, (_, _, sentence, _) in enumerate(cases):
        found = [line for line in problems if line.startswith(f"| {runs / f'broken{seed}'} | ")]
        assert [sentence in line for line in found] == [True], sentence
    (row,) = read_csv(runs.parent / "out" / "summary.csv")
    assert row["seeds"].split() == [str(seed) for seed, (*_, kept) in enumerate(cases) if kept]


def test_a_table_that_is_too_wide_is_not_printed(capsys):
    for columns in (40, 8):
        print_table(Table("table", ("a",) * columns, ((Cell("12.34"),) * columns,), range(columns)))
    printed = capsys.readouterr().out
    assert "table: too wide for the terminal, see report.html or summary.md\n" in printed
    assert printed.count("12.34") == 8


def test_each_run_is_found_once_and_nothing_else(runs):
    found = [make_run(runs / name) for name in ("10_b", "2_a")]
    for other in (".hydra", "wandb/offline-run/files", "checkpoints"):
        make_run(found[0] / other)
    given = [runs, found[0], runs / ".." / "runs", found[0] / "config.yaml"]
    assert [path.resolve() for path in find_run_folders(given)] == [found[1], found[0]]


def test_a_resumed_run_counts_its_later_steps(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/miou\n0,4,5,\n0,4,,0.1\n1,9,4,\n1,14,3,\n1,9,2,\n1,9,,0.3\n2,14,1,\n")
    curves = read_curves(path)
    assert curves["train/loss"].to_dict() == {4: 5, 9: 2, 14: 1}
    assert curves["val/miou"].dropna().to_dict() == {4: 0.1, 9: 0.3}
    path.write_text("step,train/loss\n4,5\n99,1\n9,2\n")  # a longer numbering before the resume
    assert read_curves(path)["train/loss"].to_dict() == {4: 5, 9: 2}


def test_a_report_is_overwritten_only_when_asked(runs, tmp_path):
    make_run(runs / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    options = Options((str(runs),), tmp_path / "out")
    write_report(options)
    (tmp_path / "out" / "curves_gone_1_aaaaaaaa.svg").touch()
    with pytest.raises(UserError, match=r"expected to write new files only, but .*report.html exists .*overwrite=true"):
        write_report(options)
    report_of(runs)
    assert not (tmp_path / "out" / "curves_gone_1_aaaaaaaa.svg").exists()
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["runs=gone"], "expected folders of runs, but gone does not exist"),
        (["runs=empty"], "expected run folders in or below empty, but there is none with a readable config.yaml"),
        (["runs=."], r"there is none .*; broken: config.yaml is broken: lacks .*; name a folder"),
        (["runs=.", "num_images=-1"], "expected num_images of at least 0, but got -1"),
        (["runs=.", "overwrite=yes"], "expected overwrite as true or false, but got 'yes'"),
        (["runs=.", "output=file"], "expected output as a folder, but file is a file"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "broken") / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=sentence):
        report(compose_config("report", *overrides))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "file"]


def test_the_confusion_matrix_is_that_of_the_scores_also_without_test_images(runs):
    folder = make_run(runs / "a")
    result = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(result | {"evaluated_on": "validation"}))
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "confusion_val.png")  # of the last weights
    Image.new("RGB", (8, 8), (0, 0, 255)).save(folder / "confusion_test.png")
    assert report_of(runs)
    page = (runs.parent / "out" / "report.html").read_text()
    (content,) = re.findall(r"data:image/\w+;base64,([^\"]+)", page)
    with Image.open(io.BytesIO(base64.b64decode(content))) as matrix:
        assert matrix.convert("RGB").getpixel((4, 4)) == (0, 0, 255)


def test_folders_may_come_without_a_key_and_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1,seed=0").mkdir()
    (argument, quoted) = named_folders(["lr=0.1,seed=0", "a (b)", "output=it's"])
    cfg = compose_config("report", argument, quoted)
    assert (cfg.runs, cfg.output) == (["lr=0.1,seed=0", "a (b)"], "it's")


def test_names_from_files_are_text_everywhere(runs, capsys):
    labeled = {"split": '<b> & "4" | x', "sha256": "../../x"}
    make_run(runs / "a", labeled=labeled, method="<i>$x^", schedule__note="=HYPERLINK(1)", curves=CURVES)
    make_run(runs / "c", schedule__note="-cmd")
    (make_run(runs / "b", schedule__note="-1") / "confusion_test.png").write_text("no picture")
    out = runs.parent / "out"
    assert not report(compose_config("report", f"runs={runs}", f"output={out}"))
    assert capsys.readouterr().err == "error: some files are broken, see the table of problems\n"
    text = (out / "report.html").read_text()
    Elements().feed(text)
    assert "<b> &" not in text
    assert "<i>$" not in text
    assert '| <b> & "4" \\| x |' in (out / "summary.md").read_text()
    plots = list(out.glob("*.svg"))
    assert len(plots) > 1
    for path in plots:
        ElementTree.fromstring(path.read_text())
    assert {row["schedule.note"] for row in read_csv(out / "runs.csv")} == {"'=HYPERLINK(1)", "'-cmd", "-1"}


def test_the_command_prints_one_line_for_wrong_input(tmp_path):
    done = run_command("gone", cwd=tmp_path, module="mlpmatch_pl.report")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: expected folders of runs, but gone does not exist; name a folder such as runs\n"
