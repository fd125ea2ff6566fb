"""Equal runs are equal to the last bit, for any number of workers, forked or spawned."""

import hashlib

import pytest
import torch
from helpers import TINY, compose_train

from mlpmatch_pl import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.folder import folder
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
def test_spawned_workers_give_the_same_batches(folder_root, classes):
    def batches(**options):
        data = folder(str(folder_root), classes, val=2)
        datamodule = SemiSupervisedDataModule(data, crop_size=33, batch_size=2, on_bad_image="skip", **options)
        return [batch for batch, _, _ in datamodule.train_dataloader()]

    here, spawned = batches(num_workers=0), batches(num_workers=1, multiprocessing_context="spawn")
    assert len(here) == len(spawned) > 1
    for one, other in zip(here, spawned, strict=True):
        for half in ("labeled", "unlabeled"):
            assert all(torch.equal(value, other[half][key]) for key, value in one[half].items())
