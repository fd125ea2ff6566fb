"""What only a CUDA device can show; benchmarks/gpu.sh runs it there."""

import pytest
import torch

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.module import total_loss

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
    boxes = torch.tensor([5, 10, 40, 50], device=device).expand(count, num_strong, 4)
    return labeled, {**views(), "boxes": boxes, "partner": views()}


def make(method: str, **options) -> MLPMatch:
    torch.manual_seed(0)
    return MLPMatch(
        5, method=method, backbone="test_resnet", decoder_channels=16, confidence_threshold=0.0, **options
    ).train()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_device(method):
    module = make(method).cuda()
    labeled, unlabeled = batch_on("cuda", max(len(module.method.strong_weights), 1))
    module.step(labeled, unlabeled, 0)  # cudnn chooses its algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        total_loss(module.step(labeled, unlabeled, 1).terms, module.method, 0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["unimatch", "supervised"])
def test_the_loss_is_that_of_the_cpu(method):
    losses = []
    for device in ("cpu", "cuda"):
        module = make(method).double().to(device)
        module.step.feature_perturbations = {}  # its channels come from the device's own generator
        labeled, unlabeled = batch_on(device, max(len(module.method.strong_weights), 1))
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
