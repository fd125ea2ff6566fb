"""What only a CUDA device can show; benchmarks/gpu.sh runs it there."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic steps; read at its first use

import pytest
import torch
from lightning.pytorch import Trainer

from mlpmatch_pl import MLPMatch, Segmentor, SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.evaluation.folding import for_inference
from mlpmatch_pl.methods.method import total_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
METHODS = ("mlpmatch", "mlpmatch_official", "unimatch", "fixmatch", "supervised")


def batch_on(device: str, num_strong: int, size: int = 65, count: int = 2) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)

    def images(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

    def views() -> dict:
        valid = torch.ones(count, size, size, dtype=torch.bool, device=device)
        return {
            "weak": images(count, 3, size, size),
            "strong": images(count, num_strong, 3, size, size),
            "valid": valid,
        }

    labeled = {"image": images(count, 3, size, size), "mask": images(count, size, size) % 5}
    if not num_strong:
        return labeled, {}
    boxes = torch.tensor([5, 10, 40, 50], device=device).expand(count, num_strong, 4)
    return labeled, {**views(), "boxes": boxes, "partner": views()}


def make(method: str, **options) -> MLPMatch:
    torch.manual_seed(0)
    return MLPMatch(
        5, method=method, backbone="test_resnet", decoder_channels=16, confidence_threshold=0.0, **options
    ).train()


@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in METHODS]
    + [
        ("mlpmatch", {"criterion": {"name": "ohem", "min_kept": 100}}),
        ("mlpmatch", {"criterion": {"name": "ce", "class_weights": [1.0] * 5, "dice_weight": 1.0}}),
        ("mlpmatch", {"activation_checkpointing": True}),
    ],
)
def test_a_step_never_waits_for_the_device(method, options):
    module = make(method, **options).cuda()
    labeled, unlabeled = batch_on("cuda", len(module.method.strong_weights))
    module.step(labeled, unlabeled, 0)  # cudnn chooses its algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        total_loss(module.step(labeled, unlabeled, 1).terms, module.method, 0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NeverWaits(MLPMatch):
    """Forbids to wait for the device in a training step, logging included."""

    def training_step(self, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")
        try:
            return super().training_step(batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_logging_never_waits_for_the_device():
    data = shapes(labeled=4, train=16, val=2, test=2, size=48)
    datamodule = SemiSupervisedDataModule(data, crop_size=48, batch_size=4, num_workers=0)
    module = NeverWaits(num_classes=6, backbone="test_resnet", output_stride=8, decoder_channels=16)
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
def test_options_for_speed_and_memory_keep_the_loss(options):
    modules = [make("mlpmatch", channels_last=True, **some).cuda() for some in ({}, options)]
    labeled, unlabeled = batch_on("cuda", 2)
    draw, stages = modules[0].step.network_perturbations["np"].draw, modules[0].segmentor.encoder.stages
    steps = {draw(stages, number): number for number in range(32)}  # one for each block
    assert len(steps) == len(modules[0].segmentor.encoder.blocks)
    for number in steps.values():
        losses = []
        for module in modules:
            with torch.autocast("cuda", torch.bfloat16):
                loss = total_loss(module.step(labeled, unlabeled, number).terms, module.method, 0.1)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # bfloat16 has three digits


@pytest.fixture
def deterministic():
    """As trainer.deterministic=true: what has no deterministic algorithm is refused."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "criterion",
    [{"name": "ce"}, {"name": "ce", "class_weights": [1.0] * 5}, {"name": "ohem", "min_kept": 100}, {"name": "dice"}],
    ids=str,
)
def test_a_deterministic_step_is_possible(criterion, deterministic):
    gradients = []
    for _ in range(2):
        module = make("mlpmatch", criterion=criterion).cuda()
        labeled, unlabeled = batch_on("cuda", 2)
        total_loss(module.step(labeled, unlabeled, 0).terms, module.method, 0.1).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_batchnorm_is_folded_although_the_device_rounds_float32():
    segmentor = Segmentor(5, "resnet50s", decoder_channels=16).eval().cuda()
    image_1CHW = torch.arange(3 * 65 * 65, device="cuda").reshape(1, 3, 65, 65) % 256
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        folded = for_inference(segmentor, image_1CHW)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert {parameter.device.type for parameter in folded.parameters()} == {"cuda"}


@pytest.mark.parametrize("method", ["unimatch", "supervised"])
def test_the_loss_is_that_of_the_cpu(method):
    losses = []
    for device in ("cpu", "cuda"):
        module = make(method).double().to(device)
        module.step.feature_perturbations = {}  # its channels come from the device's own generator
        labeled, unlabeled = batch_on(device, len(module.method.strong_weights))
        losses.append(total_loss(module.step(labeled, unlabeled, 3).terms, module.method, 0.1).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_bfloat16_and_channels_last_keep_float32_confidences_and_the_format():
    module = make("mlpmatch", channels_last=True).cuda()
    labeled, unlabeled = batch_on("cuda", 2)
    with torch.autocast("cuda", torch.bfloat16):
        result = module.step(labeled, unlabeled, 0)
        level = module.segmentor.encode(labeled["image"]).levels[-1]
    assert result.pseudo.confidence_BHW.dtype == torch.float32
    assert level.dtype == torch.bfloat16
    assert level.is_contiguous(memory_format=torch.channels_last)
