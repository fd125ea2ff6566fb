"""Processes that load images end when the main process does, and not before."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import subprocess
import sys
import time

from mlpmatch_pl import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes

if __name__ == "__main__":
    data = shapes(labeled=8, train=40, size=48)
    datamodule = SemiSupervisedDataModule(
        data, crop_size=48, batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1]
    )
    datamodule.setup("fit")
    batches = iter(datamodule.train_dataloader().iterables["unlabeled"])
    next(batches), next(batches)  # one of each worker
    workers = [str(worker.pid) for worker in batches._workers]
    if sys.argv[2] == "raise":
        raise RuntimeError("the end")
    for name in sys.argv[2:]:
        subprocess.run(["kill", f"-{name}", *workers], check=True)
        time.sleep(0.2)
    print(sum(1 for _ in batches), [worker.is_alive() for worker in batches._workers])
"""


def run_script(tmp_path, *arguments):
    script = tmp_path / "loads.py"
    script.write_text(SCRIPT)
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_end_with_a_program_that_still_holds_their_iterator(tmp_path, context):
    result = run_script(tmp_path, context, "raise")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == "RuntimeError: the end"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_outlive_signals_from_outside(tmp_path, context):
    result = run_script(tmp_path, context, "TERM", "INT", "TERM")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["14", "[True]"]
