"""Loader workers exit when the main process does, and not before."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import subprocess
import sys
import time

from mlpmatch_pl import SemiSupervisedDataModule, shapes

if __name__ == "__main__":
    data = shapes(labeled=8, train=40, size=48)
    datamodule = SemiSupervisedDataModule(
        data, crop_size=48, batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1]
    )
    datamodule.setup("fit")
    loader = datamodule.train_dataloader().iterables["unlabeled"]
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker
    workers = [str(worker.pid) for worker in batches._workers]
    for name in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *workers], check=True)
        time.sleep(0.2)
    print(sum(1 for _ in batches), [worker.is_alive() for worker in batches._workers])
    raise RuntimeError("the end, while the iterator still exists")
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_survive_signals_and_exit_with_the_main_process(tmp_path, context):
    script = tmp_path / "loads.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, script, context], capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["14", "[True]"]
    assert result.stderr.strip().splitlines()[-1] == "RuntimeError: the end, while the iterator still exists"
    assert result.returncode == 1
