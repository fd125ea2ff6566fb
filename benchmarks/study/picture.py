"""Draw the same test images under several methods, from the pictures in their run folders.

    python -m benchmarks.study.picture docs/methods.png runs/supervised runs/unimatch runs/mlpmatch

Titles have the test mIoU of the runs.
"""

import json
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import ImageColor

from mlpmatch_pl.visualization.panels import read_panels, sheet_of

IMAGES, WIDTH = 4, 150  # number of test images, width of a panel


def main() -> None:
    draw(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))


def draw(target: Path, runs: list[Path]) -> None:
    """Draw a row for each image: the image, its truth, and the prediction of each run."""
    names = sorted(path.name for path in (runs[0] / "predictions").glob("test_*.png"))[:IMAGES]
    rows = []
    for name in names:
        panels, classes = read_panels(runs[0] / "predictions" / name)
        row = {title: np.asarray(panels[title]) for title in ("image", "truth")}
        for run in runs:
            row[title_of(run)] = np.asarray(read_panels(run / "predictions" / name)[0]["prediction"])
        rows.append({title: pixels[::2, ::2] for title, pixels in row.items()})  # enlarged for titles
    colors = [ImageColor.getrgb(color)[:3] for color in classes.values()]
    sheet_of(rows, list(classes), colors, WIDTH).save(target, optimize=True)


def title_of(run: Path) -> str:
    """Return the method of a run with its mIoU."""
    method = yaml.safe_load((run / "config.yaml").read_text())["method"]["name"]
    return f"{method} {100 * json.loads((run / 'metrics.json').read_text())['test']['test/miou']:.0f} %"


if __name__ == "__main__":
    main()
