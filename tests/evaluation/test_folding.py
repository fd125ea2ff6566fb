import copy

import pytest
import torch
from torch import nn

from mlpmatch_pl import Segmentor
from mlpmatch_pl.evaluation.folding import for_inference

IMAGE_1CHW = torch.arange(3 * 65 * 65).reshape(1, 3, 65, 65).remainder(256).to(torch.uint8)


def trained_looking(network):
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return network.eval()


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet50s", "mobilenetv2_100", "efficientnet_lite0"])
def test_every_batchnorm_of_a_segmentor_is_folded_and_the_logits_stay(backbone):
    segmentor = trained_looking(Segmentor(5, backbone, decoder_channels=16))
    before = copy.deepcopy(segmentor.state_dict())
    folded = for_inference(segmentor, IMAGE_1CHW)
    image_BCHW = torch.randint(0, 256, (2, 3, 70, 49), dtype=torch.uint8)
    assert norms(segmentor)
    assert not norms(folded)
    torch.testing.assert_close(folded(image_BCHW), segmentor(image_BCHW), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in segmentor.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in segmentor.modules())


class TwoReaders(nn.Module):
    """The convolution's output goes into its BatchNorm and around it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class SharedConv(nn.Module):
    """One convolution, used twice, with a BatchNorm for each use."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x))))


@pytest.mark.parametrize(("network", "logged"), [(TwoReaders, 1), (SharedConv, 0)])
def test_what_cannot_be_folded_is_left_alone(network, logged, caplog):
    network = trained_looking(network())
    folded = for_inference(network, torch.rand(1, 3, 8, 8))
    image_BCHW = torch.rand(2, 3, 9, 9)
    assert len(norms(folded)) == len(norms(network))
    assert [record.getMessage()[:27] for record in caplog.records] == logged * ["BatchNorm stays as it is: f"]
    torch.testing.assert_close(folded(image_BCHW), network(image_BCHW))


def test_a_batchnorm_without_running_statistics_stays():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert len(norms(for_inference(network, torch.rand(1, 3, 5, 5)))) == 1


def test_weights_that_are_no_numbers_are_no_error():
    network = trained_looking(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    network[0].weight.data[0] = torch.nan
    assert for_inference(network, torch.rand(1, 3, 5, 5))(torch.rand(1, 3, 5, 5)).isnan().any()


def rounded_to_tf32(tensor):
    """Ten bits of the mantissa, as a GPU's convolutions read float32."""
    if tensor.dtype != torch.float32:
        return tensor
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_a_device_that_rounds_float32_is_no_reason_not_to_fold(monkeypatch, caplog):
    conv2d = nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional, "conv2d", lambda x, weight, *rest: conv2d(rounded_to_tf32(x), rounded_to_tf32(weight), *rest)
    )
    segmentor = trained_looking(Segmentor(5, "resnet50s", decoder_channels=16))
    folded = for_inference(segmentor, IMAGE_1CHW)
    assert not norms(folded)
    assert not caplog.records
    expected = segmentor(IMAGE_1CHW)
    assert (folded(IMAGE_1CHW) - expected).abs().max() > 1e-3 * expected.abs().max()  # else this would show nothing


def test_what_is_compared_is_a_copy():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert {tensor.dtype for tensor in for_inference(network, torch.rand(1, 3, 5, 5)).parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
