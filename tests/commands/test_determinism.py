"""Equal runs are equal to the last bit: over processes, numbers of workers, and ways to start workers."""

import hashlib

import pytest
import torch
from helpers import TINY, compose_train, run_command

from mlpmatch_pl.train import train

RUN = (*TINY[:-1], "schedule.steps=8", "callbacks.predictions=null", "callbacks.confusion=null")


def weights(run):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def test_the_number_of_workers_changes_nothing(tmp_path):
    # OHEM is the loss that sorts.
    options = ("trainer.deterministic=true", "objective.criterion.name=ohem", "+objective.criterion.min_kept=500")
    for workers in (0, 3):
        train(compose_train(*RUN, *options, f"loader.num_workers={workers}", output_dir=tmp_path / str(workers)))
    assert weights(tmp_path / "3") == weights(tmp_path / "0")


@pytest.mark.slow
def test_spawned_workers_of_another_process_give_the_same_weights(tmp_path, folder_root, classes):
    options = (
        *(key for key in RUN if not key.startswith("dataset.")),
        *("dataset=folder", f"dataset.root={folder_root}", f"dataset.classes=[{','.join(classes)}]", "dataset.val=2"),
        *("loader.crop_size=33", "loader.batch_size=2", "loader.eval_batch_size=1", "loader.on_bad_image=skip"),
        "loader.strong=[{name: ColorJitter, p: 0.8}, {name: RandomGamma, p: 0.5}, {name: GaussNoise, p: 0.5}]",
        f"loader.cache={tmp_path / 'cache'}",
    )
    train(compose_train(*options, output_dir=tmp_path / "here"))
    spawn = ("loader.num_workers=2", "loader.multiprocessing_context=spawn", "hydra.run.dir=spawned")
    result = run_command(*options, *spawn, cwd=tmp_path, timeout=500)
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path / "spawned") == weights(tmp_path / "here")
