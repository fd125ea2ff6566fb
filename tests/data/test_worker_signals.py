"""Loader workers exit when the main process does, and not before."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


WAITS = """
import time

from mlpmatch_pl import SemiSupervisedDataModule, shapes

if __name__ == "__main__":
    data = shapes(labeled=8, train=40, size=48)
    datamodule = SemiSupervisedDataModule(
        data, crop_size=48, batch_size=2, num_workers=2, multiprocessing_context="forkserver"
    )
    iterator = iter(datamodule.train_dataloader().iterables["unlabeled"])
    next(iterator)
    print(*[worker.pid for worker in iterator._workers], flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_of_a_forkserver_exit_when_the_main_process_is_killed(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    main = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    workers = [Path("/proc", pid) for pid in main.stdout.readline().split()]
    assert workers
    assert all(worker.exists() for worker in workers)
    os.kill(main.pid, signal.SIGKILL)
    main.wait()
    for _ in range(100):
        if not any(worker.exists() for worker in workers):
            return
        time.sleep(0.1)
    pytest.fail("the workers are still there")
