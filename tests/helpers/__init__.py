"""What several tests share: composing the real configuration, and running the real command."""

import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from omegaconf import DictConfig


class StopAfterFirstEpoch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


TINY = (
    "dataset.train=24",
    "dataset.val=5",
    "dataset.test=3",
    "dataset.labeled=4",
    "dataset.size=48",
    "loader.crop_size=48",
    "loader.batch_size=4",
    "loader.eval_batch_size=5",
    "loader.num_workers=0",
    "decoder.channels=8",
    "schedule.steps=5",
    "callbacks.predictions.num_images=2",
)
"""One epoch of five steps on the embedded data, in about two seconds."""


def compose_config(name: str, *overrides: str, output_dir: Path | None = None) -> DictConfig:
    with initialize_config_module("mlpmatch_pl.conf", version_base="1.3"):
        return compose(name, [*overrides, *([f"output_dir={output_dir}"] if output_dir else [])])


def compose_train(*overrides: str, output_dir: Path | None = None) -> DictConfig:
    return compose_config("train", *overrides, output_dir=output_dir)


def run_command(
    *arguments: str, cwd: Path, module: str = "mlpmatch_pl.train", timeout: float = 240, **environment: str
):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
