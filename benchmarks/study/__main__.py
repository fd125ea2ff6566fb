"""Train every method on every dataset of study.yaml for the same processor time, one thread a run.

    MLPMATCH_DATA=/path/to/data python -m benchmarks.study --out runs/study --datasets aerial

A run that was stopped continues, and a finished one is skipped. ``benchmarks/results/study`` holds the results: the
number of steps of each method, measured before the first run of a dataset, and for each run its scores, its curve, its
processor seconds and its overrides. `benchmarks.study.tables` puts them into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from hydra import compose, initialize_config_module
from PIL import Image

from benchmarks.loader import machine
from mlpmatch_pl.engine.build import build_datamodule, read_config
from mlpmatch_pl.engine.short_training import using_method
from mlpmatch_pl.evaluation import ConfusionMatrix, Scores
from mlpmatch_pl.methods.method import Method, resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.predictor import load

RESULTS = Path(__file__).parents[1] / "results" / "study"
STUDY = Path(__file__).with_name("study.yaml")
WARMUP, TIMED, ROUNDS = 1, 4, 5  # steps, steps a round, rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--part", choices=("comparison", "ablation"), default="comparison")
    parser.add_argument("--datasets", nargs="*", help="default: all, in the order of study.yaml")
    parser.add_argument("--methods", nargs="*", help="default: all, in the order of study.yaml")
    parser.add_argument("--seeds", nargs="*", type=int, help="default: those of study.yaml")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MLPMATCH_STUDY": str(arguments.out.resolve() / "data")}
    torch.set_num_threads(1)
    if "MLPMATCH_DATA" in os.environ:
        halve_aerial(arguments.out / "data" / "aerial")
    study = yaml.safe_load(STUDY.read_text())
    part = study["parts"][arguments.part]
    methods = arguments.methods or list(part["methods"])
    for dataset in arguments.datasets or part["datasets"]:
        overrides = {method: overrides_of(study, dataset, method) for method in methods}
        minutes = study["datasets"][dataset]["minutes"]
        steps = measure_steps(RESULTS / dataset / "steps.json", minutes, overrides)
        for seed, method in product(arguments.seeds or study["seeds"], methods):
            own = [*overrides[method], f"schedule.steps={steps[method]}", f"seed={seed}"]
            train(dataset, method, own, arguments.out)


def overrides_of(study: dict[str, Any], dataset: str, method: str) -> list[str]:
    """Return the overrides of a method on a dataset, without its number of steps and its seed."""
    settings = study["datasets"][dataset]
    methods = {name: own for part in study["parts"].values() for name, own in part["methods"].items()}
    shared = [*study["shared"], *(study["photos"] if settings.get("photos", True) else ())]
    return [*shared, *settings["overrides"], *methods[method], *settings["methods"].get(method, [])]


def halve_aerial(target: Path) -> None:
    """Write the aerial images in half their size."""
    source = Path(os.environ["MLPMATCH_DATA"]) / "drone_aerial"
    if (target / "splits").is_dir():
        return
    for kind, resample in (("images", Image.Resampling.BOX), ("masks", Image.Resampling.NEAREST)):
        (target / kind).mkdir(parents=True, exist_ok=True)
        for path in (source / kind).iterdir():
            with Image.open(path) as image:
                half = image.resize((image.width // 2, image.height // 2), resample)
            half.save(target / kind / f"{path.stem}.png")
    (target / "splits").mkdir()
    for path in (source / "splits").iterdir():
        (target / "splits" / path.name).write_text(path.read_text().replace(".jpg", ".png"))


def measure_steps(path: Path, minutes: float, overrides: dict[str, list[str]]) -> dict[str, int]:
    """Return the number of steps of each method that take the minutes, measured once and then read from a file.

    Methods take turns, and the fastest round counts: other work on the machine makes steps slower, never faster.
    """
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    timers = {method: StepTimer(own) for method, own in overrides.items() if method not in known}
    rounds = [{method: timer.seconds() for method, timer in timers.items()} for _ in range(ROUNDS if timers else 0)]
    for method in timers:
        seconds = min(times[method] for times in rounds)
        known[method] = {
            "minutes": minutes, "step_seconds": round(seconds, 4), "steps": round(60 * minutes / seconds)
        }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n")
    return {method: int(known[method]["steps"]) for method in overrides}


class StepTimer:
    """Times the steps of a method, loading included."""

    def __init__(self, overrides: list[str]) -> None:
        config = compose_run([*overrides, "schedule.steps=1"])
        self.method = resolve_method(config["method"])
        self.datamodule = build_datamodule(config, self.method)
        backbone = dict(config["backbone"])
        self.module = MLPMatch(
            len(self.datamodule.data.class_names),
            method={**config["method"], "lambda_schedule": "constant"},  # without a length; its steps cost the same
            backbone=backbone.pop("name"), **backbone, decoder=config["decoder"], **config["objective"],
            lr=0.001, power=0,
        )  # fmt: skip
        self.optimizer = self.module.configure_optimizers()["optimizer"]

    def seconds(self) -> float:
        """Return the mean processor seconds of a step, over burn-in and the time after it."""
        after = self._measure(self.method)  # without a Trainer there is no burn-in
        if not self.method.burn_in:
            return after
        burning_in = self._measure(resolve_method("supervised"))
        return self.method.burn_in * burning_in + (1 - self.method.burn_in) * after

    def _measure(self, phase: Method) -> float:
        with using_method(self.datamodule, phase):
            batches, marks = iter(self.datamodule.train_dataloader()), []
            for step in range(WARMUP + TIMED):
                marks.append(time.process_time())
                batch = next(batches)[0]
                self.optimizer.zero_grad()
                self.module.training_step(batch, step).backward()
                self.optimizer.step()
            return (time.process_time() - marks[WARMUP]) / TIMED


def train(dataset: str, method: str, overrides: list[str], out: Path) -> None:
    """Train a run to its end, and add its result to the others."""
    name = f"{dataset}/{method.replace(' ', '-')}_s{overrides[-1].partition('=')[2]}"
    result, folder = RESULTS / f"{name}.json", out / name
    if result.is_file():
        return
    print(f"{time.strftime('%H:%M')} {name}", flush=True)
    arguments = [*overrides, f"hydra.run.dir={folder}", "resume=auto", "trainer.enable_progress_bar=false"]
    command = ["nice", "-n", "10", sys.executable, "-m", "mlpmatch_pl.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    content = result_of(folder, method, overrides)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{time.strftime('%H:%M')} {name} best validation mIoU {content['best']['val/miou']:.4f}", flush=True)


def result_of(folder: Path, method: str, overrides: list[str]) -> dict[str, Any]:
    """Return what is kept of a finished run: its scores, its validation curve and how it was trained."""
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = ["seed", "labeled", "unlabeled", "steps", "processor_seconds", "best", "last"]
    if metrics["evaluated_on"] == "test":  # otherwise there are no test images, and it is the best validation again
        kept += ["test", "tested"]
    metrics["best"].pop("checkpoint")
    rows = pd.read_csv(folder / "metrics.csv").dropna(subset="val/miou")
    columns = [column for column in ("step", "val/miou", "val/student_miou") if column in rows]
    return {
        "method": method,
        **{key: metrics[key] for key in kept},
        "fit": labeled_miou(folder, overrides),
        "curve": rows[columns].round(4).to_dict(orient="list"),
        "overrides": [override for override in overrides if "=$" not in override],
        "machine": machine(),
    }


def labeled_miou(folder: Path, overrides: list[str]) -> float:
    """Return the mIoU on the labeled images at the end of a training: how closely the network fits them."""
    predictor = load(folder / "checkpoints" / "last.ckpt")
    data = build_datamodule(compose_run(overrides), predictor.module.method).data
    counts = ConfusionMatrix(len(data.class_names))
    for index in data.labeled_indices:
        prediction = torch.from_numpy(predictor.predict(data.train.image(index)))
        counts.update(prediction[None], torch.from_numpy(data.train.mask(index).copy())[None])
    return round(Scores.of(counts.compute()).miou, 4)


def compose_run(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_module("mlpmatch_pl.conf", version_base="1.3"):
        return read_config(compose("train", [*overrides, "output_dir=."]))


if __name__ == "__main__":
    main()
