"""Trainings and validations that test_ddp.py compares over processes: ``python -m helpers.ddp_job FOLDER DEVICES``."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.dataset import EvalDataset, LabeledDataset, UnlabeledDataset
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.perturbation import FeaturePerturbation, NetworkPerturbation

BATCH, EPOCHS, STEPS = 6, 2, 4  # a global batch; steps in total
WHOLE, PADDED = (1.0, 1.5), (0.4, 0.8)  # scales of images of 48 pixels in crops of 33
# A process pairs images and drops channels within its share of a batch, so V2's flipped partner and complementary
# dropout give two processes other pairs and channels than one. Views of the same image do not depend on the share.
RUNS = {
    "mlpmatch": ({"name": "mlpmatch", "partner": "same_image"}, WHOLE),
    "teacher": ({"name": "mlpmatch_burn_in", "burn_in": 0.25, "partner": "same_image"}, WHOLE),
    "supervised": ({"name": "supervised"}, WHOLE),
    "transformer": ({"name": "mlpmatch_v2", "partner": "same_image", "strong_dropout": "none"}, WHOLE),
    "mlpmatch, padded": ({"name": "mlpmatch", "partner": "same_image"}, PADDED),
    "supervised, padded": ({"name": "supervised"}, PADDED),
}
TRANSFORMER = {"backbone": "test_vit", "decoder": {"name": "dpt", "channels": 8}}
COUNTS = (2, 3, 5, 7)  # validation images
LABELED, TRAIN, VAL, RECORDED_EPOCHS = 5, 17, 5, 3  # for `record`


class InShares(MLPMatch):
    """One process that computes what several do: the mean of the losses of their shares of a batch."""

    shares = 1

    def training_step(self, batch, batch_idx):
        parts = [apply_to_collection(batch, Tensor, lambda t, i=i: t[i :: self.shares]) for i in range(self.shares)]
        return torch.stack([MLPMatch.training_step(self, part, batch_idx) for part in parts]).mean()


class Curve(Callback):
    """Freezes BatchNorm, whose statistics are each process's own on the CPU, and records the mean of the losses."""

    def __init__(self):
        self.losses = []

    def on_train_start(self, trainer, pl_module):
        pl_module.segmentor.eval()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


class SeenInValidation(Callback):
    """Records the BatchNorm statistics that this process validates with."""

    def on_validation_epoch_end(self, trainer, pl_module):
        self.buffers = [float(buffer.double().sum()) for buffer in pl_module.buffers()]


def drop_every_second_channel(self, feature_BDHW, generator):
    return feature_BDHW * (2 * (torch.arange(feature_BDHW.shape[1]) % 2))[:, None, None]


def trainer_of(devices, **options):
    return Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        log_every_n_steps=1, **{"use_distributed_sampler": False, **options},
    )  # fmt: skip


def module_of(method, kind=MLPMatch):
    torch.manual_seed(0)
    name = method["name"] if isinstance(method, dict) else method
    network = TRANSFORMER if name == "mlpmatch_v2" else {"backbone": "test_resnet", "decoder": {"channels": 8}}
    return kind(6, method=method, lr=0.05, confidence_threshold=0.2, **network)


def datamodule_of(devices, scale=WHOLE, count=3, method="mlpmatch"):
    data = shapes(labeled=5, train=17, val=count, test=count, size=48)
    return SemiSupervisedDataModule(
        data, crop_size=33, batch_size=BATCH // devices, scale=scale, method=method, num_workers=0,
    )  # fmt: skip


def train(run, devices, shares=1):
    """Return the losses of all steps and the sum of each weight's absolute values at the end."""
    method, scale = RUNS[run]
    drop, FeaturePerturbation._drop = FeaturePerturbation._drop, drop_every_second_channel  # else a matter of the rank
    module, curve = module_of(method, InShares), Curve()
    module.shares = shares
    datamodule = datamodule_of(devices, scale, method=method)
    options = {"max_epochs": EPOCHS, "limit_val_batches": 0, "precision": "64-true", "callbacks": [curve]}
    trainer_of(devices, **options).fit(module, datamodule=datamodule)
    FeaturePerturbation._drop = drop
    return {"losses": curve.losses, "weights": [float(weight.detach().abs().sum()) for weight in module.parameters()]}


def evaluate(count, devices):
    """Return the confusion matrices of validation and test, and the mean IoUs."""
    trainer, module, datamodule = trainer_of(devices), module_of("mlpmatch"), datamodule_of(devices, count=count)
    val = trainer.validate(module, datamodule=datamodule, verbose=False)[0]
    counts = module.last_counts_CC.tolist()
    test = trainer.test(module, datamodule=datamodule, verbose=False)[0]
    return {"val": counts, "test": module.last_counts_CC.tolist(), "miou": [val["val/miou"], test["test/miou"]]}


def validate_while_training(folder, devices):
    """Train with BatchNorm, and return the last validation and the seeds of the channel dropout."""
    seeds, drop = [], FeaturePerturbation._drop

    def spy(self, feature_BDHW, generator):
        seeds.append(generator.initial_seed())
        return drop(self, feature_BDHW, generator)

    FeaturePerturbation._drop = spy
    module, seen = module_of("mlpmatch"), SeenInValidation()
    for norm in (child for child in module.modules() if isinstance(child, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0  # the statistics of the last batch alone, which are not those of another process
    trainer = trainer_of(devices, max_epochs=EPOCHS, callbacks=[seen])
    trainer.fit(module, datamodule=datamodule_of(devices, count=7))
    trainer.save_checkpoint(Path(folder, "last.ckpt"))
    FeaturePerturbation._drop = drop
    return {"counts": module.last_counts_CC.tolist(), "buffers": seen.buffers, "seeds": seeds}


def recording(seen):
    """Record which samples are read and which blocks are deactivated."""
    patch = pytest.MonkeyPatch()
    for cls in (LabeledDataset, UnlabeledDataset, EvalDataset):

        def spy(self, key, cls=cls, read=cls.__getitem__):
            seen[cls.__name__].append(key)
            return read(self, key)

        patch.setattr(cls, "__getitem__", spy)

    def spy_draw(self, stages, step, draw=NetworkPerturbation.draw):
        blocks = draw(self, stages, step)
        seen["blocks"].append([step, sorted(blocks)])
        return blocks

    patch.setattr(NetworkPerturbation, "draw", spy_draw)
    return patch


def record(devices):
    """Validate and train, and return what was read, drawn and measured."""
    seen = {"LabeledDataset": [], "UnlabeledDataset": [], "EvalDataset": [], "blocks": []}
    torch.manual_seed(0)
    module = MLPMatch(6, backbone="test_resnet", decoder={"channels": 8}, lr=0.01)
    data = shapes(labeled=LABELED, train=TRAIN, val=VAL, test=1, size=48)
    datamodule = SemiSupervisedDataModule(data, crop_size=33, batch_size=4 // devices, num_workers=0)
    options = {"use_distributed_sampler": True, "inference_mode": False, "max_epochs": RECORDED_EPOCHS}
    trainer = trainer_of(devices, **options)
    patch = recording(seen)
    try:
        before = digest(module.parameters())
        metrics = trainer.validate(module, datamodule=datamodule, verbose=False)[0]
        validated = list(seen["EvalDataset"])
        seen["EvalDataset"].clear()
        trainer.fit(module, datamodule=datamodule)
    finally:
        patch.undo()
    return {
        **seen, "validated": validated, "metrics": metrics, "before": before, "after": digest(module.parameters()),
        "steps": trainer.global_step, "counts": module.last_counts_CC.tolist(),
        "samplers": [type(loader.sampler).__name__ for loader in trainer.train_dataloader.values()],
    }  # fmt: skip


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def main(folder, devices):
    torch.set_num_threads(1)
    result = {
        "recorded": record(devices),
        "runs": {run: train(run, devices) for run in RUNS},
        "evaluations": {count: evaluate(count, devices) for count in COUNTS if count >= devices},
        "validated": validate_while_training(folder, devices),
    }
    Path(folder, f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
