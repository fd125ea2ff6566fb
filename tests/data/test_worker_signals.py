"""Loader workers exit when the main process does, and not before."""

import subprocess
import sys

import pytest

SCRIPT = """
import subprocess
import time

from mlpmatch_pl import SemiSupervisedDataModule, shapes


def batches(context):
    data = shapes(labeled=8, train=40, size=48)
    datamodule = SemiSupervisedDataModule(
        data, crop_size=48, batch_size=2, num_workers=2, multiprocessing_context=context
    )
    datamodule.setup("fit")
    return iter(datamodule.train_dataloader().iterables["unlabeled"])


if __name__ == "__main__":
    for iterator in (iterators := [batches("fork"), batches("spawn")]):
        next(iterator), next(iterator)
        workers = [str(worker.pid) for worker in iterator._workers]
        for name in ("TERM", "INT", "TERM"):
            subprocess.run(["kill", f"-{name}", *workers], check=True)
            time.sleep(0.2)
        print(sum(1 for _ in iterator), [worker.is_alive() for worker in iterator._workers])
    raise RuntimeError("the end, while the iterators still exist")
"""


@pytest.mark.slow
def test_forked_and_spawned_workers_survive_signals_and_exit_with_the_main_process(tmp_path):
    script = tmp_path / "loads.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines() == ["14 [True]", "14 [True]"]
    assert result.stderr.strip().splitlines()[-1] == "RuntimeError: the end, while the iterators still exist"
    assert result.returncode == 1
