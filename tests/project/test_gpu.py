"""Tests that need a CUDA device; benchmarks/gpu.sh runs them."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic steps; cuBLAS reads it at its first use

import pytest
import torch
from helpers.batches import make_batch
from lightning.pytorch import Trainer

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.methods.method import PRESETS, total_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CLASSES = 5


def make(method: str, **options) -> MLPMatch:
    torch.manual_seed(0)
    return MLPMatch(
        CLASSES, method=method, backbone="test_resnet", decoder={"channels": 16}, confidence_threshold=0.0, **options
    ).train()


def loss_of(module: MLPMatch, step: int = 0) -> torch.Tensor:
    """Return the loss of one step on the module's device."""
    views = len(module.method.strong_weights)
    batch = make_batch(2, 2, views, (65, 65), CLASSES, device=str(module.device))
    return total_loss(module.step(batch["labeled"], batch.get("unlabeled", {}), step).terms, module.method, 0.1)


@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in PRESETS]
    + [
        ("mlpmatch", {"criterion": {"name": "ohem", "min_kept": 100}}),
        ("mlpmatch", {"criterion": {"name": "ce", "class_weights": [1.0] * 5, "dice_weight": 1.0}}),
        ("mlpmatch", {"activation_checkpointing": True}),
    ],
)
def test_a_step_does_not_synchronize_with_the_device(method, options):
    module = make(method, **options).cuda()
    views = len(module.method.strong_weights)
    batch = make_batch(2, 2, views, (65, 65), CLASSES, device="cuda")
    halves = batch["labeled"], batch.get("unlabeled", {})
    module.step(*halves, 0)  # cuDNN selects its algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        total_loss(module.step(*halves, 1).terms, module.method, 0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NeverSynchronizes(MLPMatch):
    """Forbids synchronization in a training step, logging included."""

    def training_step(self, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")
        try:
            return super().training_step(batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_logging_does_not_synchronize_with_the_device():
    data = shapes(labeled=4, train=16, val=2, test=2, size=48)
    datamodule = SemiSupervisedDataModule(data, crop_size=48, batch_size=4, num_workers=0)
    module = NeverSynchronizes(num_classes=6, backbone="test_resnet", output_stride=8, decoder={"channels": 16})
    trainer = Trainer(max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(module, datamodule)
    assert trainer.global_step > 1


@pytest.mark.parametrize(
    "options",
    [
        {"compile_blocks": True},
        {"activation_checkpointing": True},
        {"compile_blocks": True, "activation_checkpointing": True},
    ],
    ids=" and ".join,
)
def test_speed_and_memory_options_keep_the_loss(options):
    modules = [make("mlpmatch", channels_last=True, **some).cuda() for some in ({}, options)]
    draw, stages = modules[0].step.network_perturbations["np"].draw, modules[0].segmentor.encoder.stages
    steps = {draw(stages, step): step for step in range(32)}  # one for each block
    assert len(steps) == len(modules[0].segmentor.encoder.blocks)
    for step in steps.values():
        losses = []
        for module in modules:
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(module, step)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # bfloat16 has three digits


@pytest.fixture
def deterministic():
    """Like trainer.deterministic=true: operations without a deterministic algorithm raise an error."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "criterion",
    [{"name": "ce"}, {"name": "ce", "class_weights": [1.0] * 5}, {"name": "ohem", "min_kept": 100}, {"name": "dice"}],
    ids=str,
)
def test_steps_can_be_deterministic(criterion, deterministic):
    gradients = []
    for _ in range(2):
        module = make("mlpmatch", criterion=criterion).cuda()
        loss_of(module).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", ["unimatch", "supervised"])
def test_the_loss_equals_that_on_a_cpu(method):
    losses = []
    for device in ("cpu", "cuda"):
        module = make(method).double().to(device)
        module.step.feature_perturbations = {}  # its draws come from the device's generator
        losses.append(loss_of(module, 3).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_confidences_are_float32_and_features_channels_last_in_bfloat16():
    module = make("mlpmatch", channels_last=True).cuda()
    batch = make_batch(2, 2, 2, (65, 65), CLASSES, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        result = module.step(batch["labeled"], batch["unlabeled"], 0)
        level = module.segmentor.encode(batch["labeled"]["image"]).levels[-1]
    assert result.pseudo.confidence_BHW.dtype == torch.float32
    assert level.dtype == torch.bfloat16
    assert level.is_contiguous(memory_format=torch.channels_last)
