"""Equal runs are equal to the last bit: over processes, numbers of workers, and ways to start workers."""

import hashlib

import pytest
import torch
from helpers import TINY, compose_train, run_command

from mlpmatch_pl.train import train

RUN = (*TINY[:-1], "schedule.steps=8", "callbacks.predictions=null")


def weights(folder):
    state = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    content = b"".join(value.numpy().tobytes() for value in state.values())
    return hashlib.sha256(content).hexdigest()


def final_weights(tmp_path, name, *overrides):
    folder = tmp_path / name
    folder.mkdir()
    result = run_command(*overrides, "hydra.run.dir=run", cwd=folder, timeout=500)
    assert result.returncode == 0, result.stderr
    return weights(folder)


@pytest.mark.slow
def test_processes_and_numbers_of_workers_change_nothing(tmp_path):
    # OHEM is the loss that sorts.
    options = ("trainer.deterministic=true", "objective.criterion.name=ohem", "+objective.criterion.min_kept=500")
    first = final_weights(tmp_path, "0", *RUN, *options)
    assert final_weights(tmp_path, "1", *RUN, *options, "loader.num_workers=1") == first
    assert final_weights(tmp_path, "3", *RUN, *options, "loader.num_workers=3") == first


@pytest.mark.slow
def test_spawned_workers_of_the_command_give_the_same_weights(tmp_path, folder_root, classes):
    options = (
        *(key for key in RUN if not key.startswith("dataset.")),
        *("dataset=folder", f"dataset.root={folder_root}", f"dataset.classes=[{','.join(classes)}]", "dataset.val=2"),
        *("loader.crop_size=33", "loader.batch_size=2", "loader.eval_batch_size=1", "loader.on_bad_image=skip"),
        "loader.strong=[{name: ColorJitter, p: 0.8}, {name: RandomGamma, p: 0.5}, {name: GaussNoise, p: 0.5}]",
        f"loader.cache={tmp_path / 'cache'}",
    )
    train(compose_train(*options, output_dir=tmp_path / "here" / "run"))
    spawned = final_weights(
        tmp_path, "spawned", *options, "loader.num_workers=2", "loader.multiprocessing_context=spawn"
    )
    assert spawned == weights(tmp_path / "here")
