"""Insert the tables and curves of the study into a page, from benchmarks/results.

    python -m benchmarks.study.tables docs/results.md

A table starts with `<!-- comparison: study/aerial -->`, which names a folder of results, or `ablation`, `dynamics` or
`suggestions` (a file of `benchmarks.suggest`) instead, and ends with `<!-- end -->`. The curves of a comparison are
written beside the page, as study_aerial.png.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import yaml

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.study.__main__ import STUDY

RESULTS = Path(__file__).parents[1] / "results"
PARTS = yaml.safe_load(STUDY.read_text())["parts"]
MARKED = re.compile(r"(<!-- (comparison|ablation|dynamics|suggestions): ([\w/]+) -->\n).*?(<!-- end -->)", re.S)
COLORS = dict(
    zip(
        ("supervised", "supervised_averaged", "fixmatch", "unimatch", "mlpmatch", "mlpmatch_burn_in", "all_labels"),
        ("#7f7f7f", "#000000", "#2ca02c", "#1f77b4", "#ff7f0e", "#d62728", "#9467bd"),
        strict=True,
    )
)

VOLATILE = (  # with and without
    "mlpmatch",
    "mlpmatch unlabeled network term only",
    "mlpmatch_burn_in volatile term",
    "mlpmatch_burn_in",
)


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        fill(page)


def fill(page: Path) -> None:
    """Make the tables of a page and the figures beside it again."""
    text = page.read_text(encoding="utf-8")
    page.write_text(filled(text), encoding="utf-8")
    for match in MARKED.finditer(text):
        if match[2] == "comparison":
            draw_curves(read_runs(match[3]), page.with_name(f"{match[3].replace('/', '_')}.png"))


def filled(text: str) -> str:
    """Return a page with its tables regenerated."""
    of_runs = {"comparison": comparison, "ablation": ablation, "dynamics": dynamics}

    def table(match: re.Match[str]) -> str:
        rows = suggestions(match[3]) if match[2] == "suggestions" else of_runs[match[2]](read_runs(match[3]))
        return f"{match[1]}\n{rows}\n\n{match[4]}"

    return MARKED.sub(table, text)


def read_runs(folder: str) -> pd.DataFrame:
    """Return a row for each finished run, with scores in percent and the curve of the validation mIoU over minutes.

    Minutes are the steps so far times the measured seconds of a step: validation, and other work on the machine, do not
    count. Steps of burn-in are cheaper than this mean.
    """
    timed = json.loads((RESULTS / folder / "steps.json").read_text(encoding="utf-8"))
    rows = []
    for path in sorted((RESULTS / folder).glob("*_s*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        minutes = timed[run["method"]]["step_seconds"] / 60 * np.array([*run["curve"]["step"], run["steps"]])
        curve = pd.Series(100 * np.array(run["curve"]["val/miou"]), minutes[:-1])
        rows.append(
            {
                "method": run["method"], "seed": run["seed"], "steps": run["steps"], "minutes": minutes[-1],
                "best": 100 * run["best"]["val/miou"], "last": curve.iloc[-1], "fit": 100 * run["fit"],
                "test": 100 * run["test"]["test/miou"] if "test" in run else float("nan"), "curve": curve,
                "converged": curve.index[curve >= 0.95 * curve.iloc[-1]][0],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def comparison(runs: pd.DataFrame) -> str:
    """Compare the methods: mean and range over seeds."""
    columns = ("best", "last") if runs["test"].isna().all() else ("best", "last", "test")
    names = {"best": "validation, best", "last": "validation, last", "test": "test"}
    lines = [f"| method | seeds | steps | minutes | {' | '.join(names[column] for column in columns)} |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for method in (method for method in COLORS if method in set(runs["method"])):
        own = runs[runs["method"] == method]
        scores = " | ".join(spread(own[key]) for key in columns)
        lines.append(f"| `{method}` | {len(own)} | {own['steps'].iloc[0]} | {own['minutes'].mean():.1f} | {scores} |")
    return "\n".join(lines)


def ablation(runs: pd.DataFrame) -> str:
    """Compare each ablation with its method, over the seeds that both have."""
    lines = [
        "| method | change | seeds | best validation | difference | last | difference | test | difference |",
        "|---" * 9 + "|",
    ]
    for name in PARTS["ablation"]["methods"]:
        method, _, change = name.partition(" ")
        pairs = runs[runs["method"] == name].merge(runs[runs["method"] == method], on="seed", suffixes=("", "_method"))
        if not pairs.empty:
            scores = " | ".join(
                f"{spread(pairs[key])} | {(pairs[key] - pairs[f'{key}_method']).mean():+.1f}"
                for key in ("best", "last", "test")
            )
            lines.append(f"| `{method}` | {change} | {len(pairs)} | {scores} |")
    return "\n".join(lines)


def dynamics(runs: pd.DataFrame) -> str:
    """Compare trainings with and without volatile learning."""
    lines = [
        "| method | seeds | labeled images, last | gap to validation | minutes to 95 % | range over seeds |",
        "|---|---|---|---|---|---|",
    ]
    for method in VOLATILE:
        own = runs[runs["method"] == method]
        if not own.empty:
            gap, last = own["fit"] - own["last"], own["last"]
            lines.append(
                f"| {method} | {len(own)} | {spread(own['fit'])} | {spread(gap)} | {spread(own['converged'])} "
                f"| {last.max() - last.min():.1f} |"
            )
    return "\n".join(lines)


def suggestions(name: str) -> str:
    """Compare suggested with random labels."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = ["| labels | seeds | validation, last |", "|---|---|---|"]
    for choice in ("random_30", "suggested_20", "random_50", "suggested_40"):
        kind, _, count = choice.partition("_")
        scores = pd.Series(result["miou"][choice].values()) * 100
        lines.append(f"| {count} {kind} | {len(scores)} | {spread(scores)} |")
    return "\n".join(lines)


def spread(values: pd.Series) -> str:
    """Return the mean, with the range if there are several."""
    mean = f"{values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.1f} to {values.max():.1f})"


def draw_curves(runs: pd.DataFrame, path: Path) -> None:
    """Draw the validation mIoU against minutes of training: the mean over seeds, and their range."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, color in COLORS.items():
        curves = runs[runs["method"] == method]["curve"].tolist()
        if not curves:
            continue
        measured = np.unique(np.concatenate([curve.index for curve in curves]))
        first, last = max(curve.index[0] for curve in curves), min(curve.index[-1] for curve in curves)
        minutes = measured[(measured >= first) & (measured <= last)]
        values = np.array([np.interp(minutes, curve.index, curve) for curve in curves])
        axes.plot(minutes, values.mean(0), color=color, label=method, marker="o", markersize=3)
        axes.fill_between(minutes, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="minutes of training on one core", ylabel="validation mIoU (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
