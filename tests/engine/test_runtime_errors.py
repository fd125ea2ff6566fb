"""Errors of the machine: one sentence each."""

import os
import signal

import pytest
import torch
from helpers import TINY, compose_train
from lightning.pytorch import Callback

from mlpmatch_pl import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.engine.runtime_errors import translate_errors
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError


class After(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 2:
            self.happen(trainer)


class DeviceIsFull(After):
    def happen(self, trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class WorkerIsKilled(After):
    def happen(self, trainer):
        loader = trainer.train_dataloader["unlabeled"]
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)


NO_MEMORY = "expected steps of 4 labeled and 4 unlabeled images of 48 x 48 pixels, and whole validation images, to "


@pytest.mark.parametrize(
    ("fault", "options", "sentence"),
    [
        (
            "DeviceIsFull",
            (),
            NO_MEMORY + "fit into the memory of the GPU, but it ran out; halve loader.batch",
        ),
        (
            "WorkerIsKilled",
            ("loader.num_workers=2", "schedule.steps=200"),
            "expected the loading workers to keep running, but process ",
        ),
    ],
)
def test_a_training_ends_with_one_sentence(fault, options, sentence, tmp_path):
    add = f"+callbacks.fault._target_=test_runtime_errors.{fault}"
    with pytest.raises(UserError) as caught:
        train(compose_train(*TINY, add, *options, output_dir=tmp_path / "run"))
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are "
                "out of shared memory. Please try to raise your shared memory limit."
            ),
            "expected room for batches in shared memory .* --shm-size",
        ),
        (
            RuntimeError("unable to write to file </torch_12_3456_0>: No space left on device (28)"),
            "expected room for batches in shared memory",
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
            "but nll_loss2d_.* has no deterministic implementation on this device; set trainer.deterministic=warn",
        ),
        (OSError(12, "Cannot allocate memory"), "memory of the machine"),
        (MemoryError(), "memory of the machine"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory of the GPU"),
    ],
)
def test_each_error_has_its_sentence(error, expected):
    datamodule = SemiSupervisedDataModule(shapes(labeled=2, train=8), crop_size=33, batch_size=2)
    with pytest.raises(UserError, match=expected), translate_errors(datamodule):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(28, "No space left on device")])
def test_other_errors_pass(error):
    datamodule = SemiSupervisedDataModule(shapes(labeled=2, train=8), crop_size=33, batch_size=2)
    with pytest.raises(type(error)) as caught, translate_errors(datamodule):
        raise error
    assert caught.value is error


def test_a_batch_of_one_cannot_be_halved():
    datamodule = SemiSupervisedDataModule(shapes(labeled=2, train=8), crop_size=33, batch_size=1)
    with pytest.raises(UserError) as caught, translate_errors(datamodule):
        raise MemoryError
    assert "halve" not in str(caught.value)
    assert "lower loader.crop_size" in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_lost_process_is_one_sentence(message):
    datamodule = SemiSupervisedDataModule(shapes(labeled=2, train=8), crop_size=33, batch_size=2)
    lost = "expected all 2 processes to keep running, but another one died or does not answer .* resume=auto"
    with pytest.raises(UserError, match=lost), translate_errors(datamodule, processes=2):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match=r"gloo|NCCL"), translate_errors(datamodule):
        raise RuntimeError(message)
