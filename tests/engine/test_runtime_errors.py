"""What the machine lacks while a training runs: one sentence each, from the real command."""

import pytest
import torch
from helpers import TINY, compose_train, run_command

from mlpmatch_pl import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.engine.runtime_errors import translate_errors
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError

SCRIPT = """
import os
import resource
import signal

import torch
from lightning.pytorch import Callback


class After(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 2:
            self.happen(trainer)


class DeviceIsFull(After):
    def happen(self, trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class MachineIsFull(After):
    def happen(self, trainer):
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20, resource.RLIM_INFINITY))
        torch.ones(2**28).sum()


class WorkerIsKilled(After):
    def happen(self, trainer):
        loader = trainer.train_dataloader["unlabeled"]
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
"""
NO_MEMORY = (
    "error: expected steps of 4 labeled and 4 unlabeled images of 48 x 48 pixels, and whole validation images, to "
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "options", "message"),
    [
        (
            "MachineIsFull",
            [],
            NO_MEMORY + "fit into the memory of the machine, but it ran out; halve loader.batch_size",
        ),
        (
            "WorkerIsKilled",
            ["loader.num_workers=2", "schedule.steps=200"],
            "error: expected the processes that load images to live, but process ",
        ),
    ],
)
def test_the_command_says_in_a_line_what_to_lower(tmp_path, fault, options, message):
    (tmp_path / "faulty.py").write_text(SCRIPT)
    arguments = [*TINY, "hydra.run.dir=run", f"+callbacks.fault._target_=faulty.{fault}", *options]
    result = run_command(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(message)


def test_a_full_gpu_ends_a_training_with_what_to_lower(tmp_path, monkeypatch):
    (tmp_path / "faulty_gpu.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = compose_train(*TINY, "+callbacks.fault._target_=faulty_gpu.DeviceIsFull", output_dir=tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(cfg)
    assert f"error: {caught.value}".startswith(NO_MEMORY + "fit into the memory of the GPU, but it ran out; halve")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are "
                "out of shared memory. Please try to raise your shared memory limit."
            ),
            "expected room in shared memory .* --shm-size",
        ),
        (
            RuntimeError("unable to write to file </torch_12_3456_0>: No space left on device (28)"),
            "expected room in shared memory",
        ),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "but process 12, 13 was killed"),
        (
            RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
            "expected to open more files, .*ulimit -n",
        ),
        (
            RuntimeError(
                "nll_loss2d_forward_out_cuda_template does not have a deterministic implementation, but you set"
            ),
            "but nll_loss2d_forward_out_cuda_template does not on this device; set trainer.deterministic=warn",
        ),
        (OSError(12, "Cannot allocate memory"), "memory of the machine"),
        (MemoryError(), "memory of the machine"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory of the GPU"),
    ],
)
def test_every_lack_has_its_sentence(error, expected):
    datamodule = SemiSupervisedDataModule(shapes(labeled=2, train=8), crop_size=33, batch_size=2)
    with pytest.raises(UserError, match=expected), translate_errors(datamodule):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(28, "No space left on device")])
def test_other_errors_pass(error):
    datamodule = SemiSupervisedDataModule(shapes(labeled=2, train=8), crop_size=33, batch_size=2)
    with pytest.raises(type(error)) as caught, translate_errors(datamodule):
        raise error
    assert caught.value is error


def test_a_batch_of_one_is_not_to_be_halved():
    datamodule = SemiSupervisedDataModule(shapes(labeled=2, train=8), crop_size=33, batch_size=1)
    with pytest.raises(UserError) as caught, translate_errors(datamodule):
        raise MemoryError
    assert "halve" not in str(caught.value)
    assert "lower loader.crop_size" in str(caught.value)
