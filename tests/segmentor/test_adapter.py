"""Networks of torchvision and your own, trained with all perturbations."""

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import make_batch
from timm.models.resnest import ResNestBottleneck
from timm.models.sknet import SelectiveKernelBasic, SelectiveKernelBottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn
from torchvision.models import convnext, efficientnet, mnasnet, regnet, resnet18, swin_transformer
from torchvision.models.resnet import BasicBlock
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large
from torchvision.models.vision_transformer import EncoderBlock

import mlpmatch_pl
from mlpmatch_pl import MLPMatch, UserError
from mlpmatch_pl.perturbation.network import bypass, deactivate, find_blocks
from mlpmatch_pl.segmentor import NetworkAdapter

MEAN, STD = (124.0, 116.0, 104.0), (58.0, 57.0, 57.0)


class OwnNetwork(nn.Module):
    """Two residual blocks, and the methods that the protocol names."""

    def __init__(self, classes=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), BasicBlock(8, 8), BasicBlock(8, 8))
        self.head = nn.Conv2d(8, classes, 1)

    def encode(self, image):
        return [self.encoder(image)]

    def decode(self, features, size):
        return self.head(features[0])

    def blocks(self):
        return [self.encoder[1:]]


def torchvision_network(build, **options):
    torch.manual_seed(0)
    return build(weights=None, weights_backbone=None, num_classes=3, **options)


@pytest.mark.parametrize(
    ("build", "options"), [(deeplabv3_mobilenet_v3_large, {"aux_loss": True}), (lraspp_mobilenet_v3_large, {})]
)
def test_torchvisions_networks_predict_as_they_do_themselves(build, options):
    network = torchvision_network(build, **options)
    plain = copy.deepcopy(network).eval()
    adapter = NetworkAdapter(network, 3, 3, MEAN, STD).eval()
    image = torch.randint(0, 255, (2, 3, 50, 70), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        assert torch.allclose(adapter(image), plain((image - mean) / std)["out"], atol=1e-5)
        bypassed = min(adapter.encoder.stages[0])
        name, block = [*find_blocks(plain.backbone).items()][bypassed]
        block.forward = lambda x: x  # these blocks have an identity shortcut
        assert torch.allclose(
            adapter.decode(adapter.encode(image, frozenset({bypassed})), (50, 70)),
            plain((image - mean) / std)["out"],
            atol=1e-5,
        ), name


def test_torchvisions_blocks_are_bypassed():
    network, x = resnet18().eval().layer2, torch.rand(1, 64, 9, 9)
    with deactivate(network):
        assert torch.equal(network(x), F.relu(network[0].downsample(x)))


def small_blocks():
    """Blocks of other packages, each with a shape of its input, by an identity or a projected shortcut."""
    narrow, norm = partial(efficientnet.MBConvConfig, 4, 3, 1, 8, 8, 1), nn.BatchNorm2d
    fused = efficientnet.FusedMBConvConfig(4, 3, 1, 8, 8, 1)
    map_BDHW, map_BHWD = (2, 8, 8, 8), (2, 8, 8, 8)
    window = {"input_resolution": (8, 8), "num_heads": 2, "window_size": 4}
    yield convnext.CNBlock(8, 0.5, 0.0), map_BDHW
    yield efficientnet.MBConv(narrow(), 0.0, norm), map_BDHW
    yield efficientnet.FusedMBConv(fused, 0.0, norm), map_BDHW
    yield mnasnet._InvertedResidual(8, 8, 3, 1, 2), map_BDHW
    yield regnet.ResBottleneckBlock(8, 8, 1, norm, nn.ReLU, 8), map_BDHW
    yield regnet.ResBottleneckBlock(8, 16, 2, norm, nn.ReLU, 8), map_BDHW
    yield EncoderBlock(2, 8, 16, 0.0, 0.0), (2, 5, 8)
    yield swin_transformer.SwinTransformerBlock(8, 2, [4, 4], [2, 2]), map_BHWD
    yield swin_transformer.SwinTransformerBlockV2(8, 2, [4, 4], [2, 2]), map_BHWD
    yield SwinTransformerBlock(8, **window), map_BHWD
    yield SwinTransformerV2Block(8, **window), map_BHWD
    yield ResNestBottleneck(8, 2), map_BDHW
    yield SelectiveKernelBasic(8, 8), map_BDHW
    yield SelectiveKernelBottleneck(8, 2), map_BDHW


@pytest.mark.parametrize(
    ("block", "shape"), [pytest.param(*case, id=type(case[0]).__name__) for case in small_blocks()]
)
def test_a_bypassed_block_is_one_whose_residual_branch_adds_zero(block, shape):
    torch.manual_seed(0)
    x_B = torch.randn(shape)
    assert find_blocks(block)[""] is block
    before = block.eval()(x_B)
    for name, parameter in block.named_parameters():
        if not name.startswith(("proj", "downsample")):
            nn.init.zeros_(parameter)
    bypassed = bypass(block, x_B)
    assert torch.equal(bypassed, block(x_B))
    assert not torch.equal(bypassed, before)


def test_forked_features_are_those_of_a_pass_with_the_blocks_deactivated():
    torch.manual_seed(0)
    adapter = NetworkAdapter(OwnNetwork(), 3, 3, MEAN, STD).eval()
    image, deactivated = torch.rand(3, 3, 40, 40) * 255, frozenset({1})
    with torch.no_grad():
        plain, perturbed = adapter.encode_forked(image, deactivated, perturbed_images=slice(1, 3))
        assert torch.equal(plain.levels[0], adapter.encode(image).levels[0])
        assert torch.equal(perturbed.levels[0], adapter.encode(image[1:], deactivated).levels[0])
    assert not torch.allclose(perturbed.levels[0], plain.levels[0][1:])


@pytest.mark.parametrize("method", ["mlpmatch", "mlpmatch_official", "unimatch"])
def test_a_network_of_ones_own_is_trained_with_all_perturbations(method):
    module = MLPMatch(3, segmentor=OwnNetwork(), method=method, lr=0.01, lr_multi=5.0)
    module.set_length(10, 1)
    encoder, decoder = module.configure_optimizers()["optimizer"].param_groups
    assert [len(group["params"]) for group in (encoder, decoder)] == [14, 2]
    assert (encoder["initial_lr"], decoder["initial_lr"]) == (0.01, 0.05)
    with pytest.warns(UserWarning, match="reference is not registered"):
        module.training_step(make_batch(2, 2, size=(33, 33), classes=3), 0).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (resnet18(), "with the methods encode, decode and blocks, a model of segmentation_models_pytorch or"),
        (OwnNetwork(classes=4), "expected a network with 3 classes, but OwnNetwork has 4"),
    ],
)
def test_other_networks_are_refused(network, message):
    with pytest.raises(UserError, match=re.escape(message)):
        MLPMatch(3, segmentor=network)


def test_networks_of_segmentation_models_pytorch_are_trained_or_refused_in_one_sentence():
    smp = pytest.importorskip("segmentation_models_pytorch")
    module = MLPMatch(3, segmentor=smp.Unet("mit_b0", encoder_weights=None, classes=3), criterion="ce")
    assert [len(stage) for stage in module.segmentor.encoder.stages] == [2, 2, 2, 2]
    deep = smp.Unet("vgg11", encoder_weights=None, classes=3, encoder_depth=3, decoder_channels=(8, 8, 8))
    with pytest.raises(
        UserError, match=r"Unet has none of a known type; register .* or train it with method='unimatch'"
    ):
        MLPMatch(3, segmentor=deep)
    MLPMatch(3, segmentor=deep, method={"name": "mlpmatch", "network_perturbation": None})
    fixed = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=3)
    with pytest.raises(
        UserError, match=r"but DPT refuses one of 128x128 pixels \(AssertionError: Input height .*wrap it"
    ):
        MLPMatch(3, segmentor=fixed)


@pytest.mark.parametrize("option", ["frozen", "compile_blocks", "activation_checkpointing"])
def test_options_of_timms_encoders_are_refused(option):
    with pytest.raises(UserError, match=f"expected {option}=False for a network of your own, but got True"):
        MLPMatch(3, segmentor=OwnNetwork(), **{option: True})


def test_mean_and_std_have_a_value_for_each_channel():
    with pytest.raises(UserError, match="for each of the 3 channels, but got 2 and 3 values"):
        MLPMatch(3, segmentor=OwnNetwork(), mean=[1.0, 2.0])


def test_a_checkpoint_asks_for_its_network(tmp_path):
    from lightning.pytorch import Trainer

    module = MLPMatch(3, segmentor=OwnNetwork())
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(UserError, match=r"the network of the checkpoint, a OwnNetwork; pass it as MLPMatch.load_from"):
        MLPMatch.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    with pytest.raises(UserError, match=r"own\.ckpt holds another one, OwnNetwork; build it, and use Predictor"):
        mlpmatch_pl.load(tmp_path / "own.ckpt")
    again = MLPMatch.load_from_checkpoint(tmp_path / "own.ckpt", segmentor=OwnNetwork(), weights_only=True).eval()
    image = torch.rand(1, 3, 40, 40) * 255
    assert torch.equal(again(image), module.eval()(image))
