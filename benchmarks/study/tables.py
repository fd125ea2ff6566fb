"""Insert the tables and curves of the study into a page, from benchmarks/results/study.

    python -m benchmarks.study.tables docs/results.md

A table starts with `<!-- study: DATASET -->` and ends with `<!-- end -->`. The curves are written beside the page, as
study_DATASET.png.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.study.__main__ import RESULTS

MARKED = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.S)
COLORS = dict(
    zip(
        ("supervised", "supervised_averaged", "fixmatch", "unimatch", "mlpmatch", "mlpmatch_burn_in"),
        ("#7f7f7f", "#000000", "#2ca02c", "#1f77b4", "#ff7f0e", "#d62728"),
        strict=True,
    )
)


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        fill(page)


def fill(page: Path) -> None:
    """Make the tables of a page and the figures beside it again."""
    text = page.read_text(encoding="utf-8")
    page.write_text(filled(text), encoding="utf-8")
    for match in MARKED.finditer(text):
        draw_curves(read_runs(match[2]), page.with_name(f"study_{match[2]}.png"))


def filled(text: str) -> str:
    """Return a page with its tables regenerated."""
    return MARKED.sub(lambda match: f"{match[1]}\n{table(read_runs(match[2]))}\n\n{match[3]}", text)


def read_runs(dataset: str) -> pd.DataFrame:
    """Return a row for each finished run: method, seed, steps, minutes, best, test (percent) and curve."""
    rows = []
    for path in sorted((RESULTS / dataset).glob("*_s*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        minutes = run["processor_seconds"] / 60
        curve = pd.Series(
            100 * np.array(run["curve"]["val/miou"]), minutes * np.array(run["curve"]["step"]) / run["steps"]
        )
        rows.append(
            {
                "method": path.stem.rpartition("_s")[0], "seed": run["seed"], "steps": run["steps"], "minutes": minutes,
                "best": 100 * run["best"]["val/miou"], "last": curve.iloc[-1], "test": 100 * run["test"]["test/miou"],
                "curve": curve,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def table(runs: pd.DataFrame) -> str:
    """Compare the methods: mean and range over seeds."""
    lines = [
        "| method | seeds | steps | minutes | validation, best | validation, last | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in (method for method in COLORS if method in set(runs["method"])):
        own = runs[runs["method"] == method]
        scores = " | ".join(spread(own[key]) for key in ("best", "last", "test"))
        minutes = own["minutes"].mean()
        lines.append(f"| `{method}` | {len(own)} | {own['steps'].iloc[0]} | {minutes:.1f} | {scores} |")
    return "\n".join(lines)


def spread(values: pd.Series) -> str:
    """Return the mean, with the range if there are several."""
    mean = f"{values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.1f} to {values.max():.1f})"


def draw_curves(runs: pd.DataFrame, path: Path) -> None:
    """Draw the validation mIoU against processor minutes: the mean over seeds, and their range."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, color in COLORS.items():
        curves = runs[runs["method"] == method]["curve"].tolist()
        if not curves:
            continue
        minutes = np.linspace(0, min(curve.index[-1] for curve in curves), 60)[5:]
        values = np.array([np.interp(minutes, curve.index, curve) for curve in curves])
        axes.plot(minutes, values.mean(0), color=color, label=method)
        axes.fill_between(minutes, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="processor minutes", ylabel="validation mIoU (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
