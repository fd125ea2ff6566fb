"""Train with images that `mlpmatch_pl.suggest` chose, and with random ones.

    MLPMATCH_DATA=/path/to/data python -m benchmarks.suggest --out runs/suggest --datasets voc_animals

``suggested_20`` has 20 images, chosen without a checkpoint, and ``suggested_40`` 20 more, chosen with that of the first
training. All trainings of a dataset have the same number of steps. A run that was stopped continues, and a finished one
is skipped; ``benchmarks/results/suggest`` holds the mIoU of the last validation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import yaml

from benchmarks.loader import machine
from benchmarks.study.__main__ import STUDY, compose_run, overrides_of
from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.engine.build import build_data

RESULTS = Path(__file__).parent / "results" / "suggest"
METHOD = "supervised_averaged"
RANDOM = (30, 50)
STEPS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for lists and run folders")
    parser.add_argument("--datasets", nargs="+", default=["voc_animals", "camvid"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MLPMATCH_STUDY": str(arguments.out.resolve() / "data")}
    for dataset in arguments.datasets:
        comparison = Comparison(dataset, arguments.out.resolve() / dataset)
        for seed in arguments.seeds:
            comparison.suggested(seed)
            for count in sorted(RANDOM, reverse=True):
                comparison.random(count, seed)


class Comparison:
    """The trainings of a dataset."""

    def __init__(self, dataset: str, out: Path) -> None:
        self.out, self.result = out, RESULTS / f"{dataset}.json"
        study = yaml.safe_load(STUDY.read_text())
        self.overrides = [*overrides_of(study, dataset, METHOD), "dataset.labeled=null", f"schedule.steps={STEPS}"]
        if dataset == "voc_animals":
            self.overrides.append("dataset.unlabeled=null")
        data: SegmentationData = build_data(compose_run(self.overrides)["dataset"])
        self.names = sorted(data.train.name(index) for index in data.labeled_indices)
        self.pool = out / "pool"
        for name in self.names:  # without the validation images
            link = self.pool / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(Path(data.train.root).resolve() / name)  # type: ignore[attr-defined]

    def suggested(self, seed: int) -> None:
        """Train with 20 suggested images, then with 20 more."""
        first = self.suggest(
            "first", f"backbone.pretrained={os.environ['MLPMATCH_DATA']}/weights/timm_mobilenetv2_100.pth"
        )
        run = self.train("suggested_20", first, seed)
        checkpoint = run / "checkpoints" / "last.ckpt"
        second = self.suggest(f"second_s{seed}", f"checkpoint={checkpoint}")
        self.train("suggested_40", [*first, *second], seed)

    def random(self, count: int, seed: int) -> None:
        """Train with random images."""
        self.train(f"random_{count}", random.Random(seed).sample(self.names, count), seed)

    def suggest(self, name: str, *options: str) -> list[str]:
        """Return suggested images."""
        path = self.out / name / "suggested.txt"
        if not path.is_file():
            command(path.parent, "suggest", "count=20", f"output={path.parent}", *options)
        return [line.partition("\t")[0] for line in path.read_text().splitlines()]

    def train(self, choice: str, names: list[str], seed: int) -> Path:
        """Train with these labels, and add the result to the others; returns the run folder."""
        folder = self.out / f"{choice}_s{seed}"
        listed = folder.with_suffix(".txt")
        listed.write_text("\n".join(names))
        own = [f"dataset.labeled={listed}", f"seed={seed}", f"hydra.run.dir={folder}", "resume=auto"]
        if not (folder / "metrics.json").is_file():
            command(folder, "train", *self.overrides, *own, "trainer.enable_progress_bar=false")
        score = json.loads((folder / "metrics.json").read_text())["last"]["val/miou"]
        known = json.loads(self.result.read_text()) if self.result.is_file() else {}
        known |= {"steps": STEPS, "images": len(self.names), "machine": machine()}
        known.setdefault("miou", {}).setdefault(choice, {})[str(seed)] = round(score, 4)
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.result.write_text(json.dumps(known, indent=1) + "\n")
        return folder


def command(folder: Path, name: str, *arguments: str) -> None:
    print(f"{time.strftime('%H:%M')} {name} {folder}", flush=True)
    done = subprocess.run(
        ["nice", "-n", "10", sys.executable, "-m", f"mlpmatch_pl.{name}", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
