"""Encoders against timm's own features, plain bypasses, and two separate passes instead of a fork.

`BackboneTester` holds the checks for every family; a new family is one subclass of it.
"""

import copy
import functools
import gc
import re

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import EdgeResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from mlpmatch_pl import Segmentor, UserError
from mlpmatch_pl.perturbation import bypass, has_shortcut
from mlpmatch_pl.segmentor import Encoder

IMAGE = torch.randn(2, 3, 33, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_encoder(backbone, **options):
    """Return a random encoder in which every block matters: timm initializes residual branches to zero."""
    torch.manual_seed(0)
    encoder = Encoder(backbone, **options).eval()
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return encoder


@functools.cache
def shared_encoder(backbone):
    return make_encoder(backbone).double()


def timm_features(encoder, backbone, image_BCHW, **options):
    """Return the features of timm's own ``features_only`` model with the encoder's weights."""
    model = timm.create_model(backbone, features_only=True, in_chans=image_BCHW.shape[1], **options).eval()
    assert not model.load_state_dict(encoder.model.state_dict(), strict=False).missing_keys
    levels = model.to(image_BCHW.dtype)(image_BCHW)
    return levels[model.feature_info.reduction().index(4)], levels[-1]


def random_loss(levels, seed):
    rng = torch.Generator().manual_seed(seed)
    return sum((level * torch.randn(level.shape, generator=rng, dtype=level.dtype)).mean() for level in levels)


class BackboneTester:
    """Checks for one backbone.

    Attributes:
        backbone: Name of the timm model.
        stages: Indices of the blocks that can be deactivated, by stage.
        first_convolution: Module that takes the image.
        output_strides: Output strides that the family supports.
    """

    backbone: str
    stages: tuple[tuple[int, ...], ...]
    first_convolution: str
    output_strides = (8, 16, 32)

    def plain_bypass(self, block, x):
        """Return what a deactivated block should return."""
        raise NotImplementedError

    @pytest.fixture
    def shared(self):
        """An encoder that tests leave as it is."""
        return shared_encoder(self.backbone)

    @pytest.fixture
    def encoder(self, shared):
        return copy.deepcopy(shared)

    @property
    def candidates(self):
        return [index for stage in self.stages for index in stage]

    @torch.no_grad()
    def test_features_have_the_strides_and_channels_of_timms_model(self):
        for output_stride in self.output_strides:
            encoder, image = make_encoder(self.backbone, output_stride=output_stride), IMAGE.float()
            levels = encoder(image).levels
            expected = timm_features(encoder, self.backbone, image, output_stride=output_stride)
            for level, reference, stride, channels in zip(
                levels, expected, (4, output_stride), encoder.channels, strict=True
            ):
                assert torch.equal(level, reference)
                assert tuple(level.shape) == (2, channels, -(-33 // stride), -(-41 // stride))

    @torch.no_grad()
    def test_number_of_channels(self):
        for in_chans in (1, 5):
            encoder, image = make_encoder(self.backbone, in_chans=in_chans), torch.randn(1, in_chans, 33, 33)
            expected = timm_features(encoder, self.backbone, image, output_stride=16)
            assert all(map(torch.equal, encoder(image).levels, expected))

    def test_stages_list_the_blocks_that_can_be_deactivated(self, shared):
        assert shared.stages == [list(stage) for stage in self.stages]
        assert self.candidates == [i for i, block in enumerate(shared.blocks) if has_shortcut(block)]

    @torch.no_grad()
    def test_each_deactivated_block_is_bypassed(self, shared):
        x, inputs = shared._family.stem(shared.model, IMAGE[:1]), []
        for block in shared.blocks:
            inputs.append(x)
            x = block(x)
        for index in self.candidates:
            y = self.plain_bypass(shared.blocks[index], inputs[index])
            for block in shared.blocks[index + 1 :]:
                y = block(y)
            assert torch.equal(shared(IMAGE[:1], frozenset({index})).levels[-1], y), index
            assert not torch.allclose(y, x), index

    @torch.no_grad()
    def test_all_blocks_can_be_deactivated_together(self, shared):
        x = shared._family.stem(shared.model, IMAGE[:1])
        for index, block in enumerate(shared.blocks):
            x = self.plain_bypass(block, x) if index in self.candidates else block(x)
        assert torch.equal(shared(IMAGE[:1], frozenset(self.candidates)).levels[-1], x)

    @pytest.mark.parametrize("kind", ["two blocks", "a stage"])
    def test_forked_pass_equals_two_passes(self, encoder, kind):
        encoder.train()
        deactivated = frozenset(self.stages[1] if kind == "a stage" else {self.candidates[1], self.candidates[-1]})
        forked = encoder.forward_forked(IMAGE, deactivated)
        separate = encoder(IMAGE), encoder(IMAGE, deactivated)
        for one, other in zip(forked, separate, strict=True):
            assert all(map(torch.equal, one.levels, other.levels))
        assert not torch.allclose(forked[0].levels[-1], forked[1].levels[-1])

        grads, expected = (
            torch.autograd.grad(
                random_loss(plain.levels, 0) + random_loss(perturbed.levels, 1), list(encoder.parameters())
            )
            for plain, perturbed in (forked, separate)
        )
        scale = max(grad.abs().max() for grad in expected).item()
        for grad, reference in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, reference, rtol=1e-7, atol=1e-9 * scale)

    def test_forked_pass_without_deactivated_blocks_is_one_pass(self, shared):
        plain, perturbed = shared.forward_forked(IMAGE, frozenset())
        assert plain is perturbed
        assert all(map(torch.equal, plain.levels, shared(IMAGE).levels))

    def test_forked_pass_runs_the_shared_part_once(self, encoder):
        encoder.train()
        calls = [0] * len(encoder.blocks)
        for index, block in enumerate(encoder.blocks):
            block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
        fork, other = self.candidates[1], self.candidates[-1]
        encoder.forward_forked(IMAGE, frozenset({fork, other}))
        assert calls == [1 if index < fork or index in (fork, other) else 2 for index in range(len(calls))]
        counters = [norm.num_batches_tracked.item() for norm in encoder.modules() if isinstance(norm, nn.BatchNorm2d)]
        assert counters[0] == 1
        assert set(counters) == {1, 2}

    def test_context_surrounds_the_unshared_part_of_the_perturbed_pass(self, encoder):
        inside, calls = [], []

        class Context:
            def __enter__(self):
                inside.append(True)

            def __exit__(self, *error):
                inside.clear()

        for index, block in enumerate(encoder.blocks):
            block.register_forward_hook(lambda *_, index=index: calls.append((index, bool(inside))))
        fork, indices = self.candidates[-1], range(len(encoder.blocks))
        encoder.forward_forked(IMAGE, frozenset({fork}), Context())
        assert calls == [*((index, False) for index in indices), *((index, True) for index in indices[fork + 1 :])]

    def test_every_parameter_has_a_gradient(self):
        segmentor = Segmentor(3, backbone=self.backbone, decoder_channels=8).train()
        segmentor(torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)).square().mean().backward()
        assert [name for name, parameter in segmentor.named_parameters() if parameter.grad is None] == []

    def test_pretrained_weights_load_from_a_file(self, tmp_path, shared):
        state = timm.create_model(self.backbone).state_dict()
        torch.save({"state_dict": state}, tmp_path / "weights.pth")
        loaded = Encoder(self.backbone, pretrained=str(tmp_path / "weights.pth")).model.state_dict()
        assert loaded.keys() == shared.model.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in loaded.items())

        gray = Encoder(self.backbone, pretrained=str(tmp_path / "weights.pth"), in_chans=1).model
        first = f"{self.first_convolution}.weight"
        torch.testing.assert_close(gray.state_dict()[first], state[first].sum(dim=1, keepdim=True))


class TestResNet(BackboneTester):
    backbone, stages, first_convolution = "test_resnet", ((0,), (1,), (2,), (3,)), "conv1.0"

    def plain_bypass(self, block, x):
        return (x if block.downsample is None else block.downsample(x)).clamp_min(0)


class TestMobileNetV2(BackboneTester):
    backbone, first_convolution = "mobilenetv2_100", "conv_stem"
    stages = ((2,), (4, 5), (7, 8, 9), (11, 12), (14, 15))

    def plain_bypass(self, block, x):
        return x


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50s", "efficientnet_lite0"])
@torch.no_grad()
def test_larger_backbones_have_timms_features(backbone):
    encoder, image = make_encoder(backbone), IMAGE[:1].float()
    assert all(map(torch.equal, encoder(image).levels, timm_features(encoder, backbone, image, output_stride=16)))


@pytest.mark.parametrize("size", [321, 801])
@torch.no_grad()
def test_features_at_the_papers_crop_sizes(size):
    encoder, image = make_encoder("test_resnet"), torch.randn(1, 3, size, size)
    levels = encoder(image).levels
    assert all(map(torch.equal, levels, timm_features(encoder, "test_resnet", image, output_stride=16)))
    assert [level.shape[-1] for level in levels] == [-(-size // 4), -(-size // 16)]


@pytest.mark.parametrize(
    "block",
    [BasicBlock(4, 4), Bottleneck(16, 4), Bottleneck(4, 4, downsample=nn.Conv2d(4, 16, 1)), EdgeResidual(4, 4)],
    ids=["basic", "bottleneck", "projection", "edge"],
)
def test_bypass_does_not_modify_its_input(block):
    convolution = next(child for child in block.modules() if isinstance(child, nn.Conv2d))
    x = torch.randn(1, convolution.in_channels, 3, 3)
    before = x.clone()
    bypass(block, x)
    assert torch.equal(x, before)
    assert (before < 0).any()


class OwnBlock(nn.Module):
    def forward(self, x):
        return x + 1


@pytest.fixture
def registered_block():
    @bypass.register
    def _(block: OwnBlock, x):
        return x

    yield OwnBlock
    gc.get_referents(bypass.registry)[0].pop(OwnBlock)  # singledispatch cannot unregister
    bypass._clear_cache()
    has_shortcut._clear_cache()


def test_registered_blocks_can_be_deactivated(registered_block):
    encoder = make_encoder("test_resnet")
    encoder.model.layer3.append(registered_block())
    assert encoder.stages == [[0], [1], [2, 3], [4]]
    plain, perturbed = encoder.forward_forked(IMAGE.float(), frozenset({3}))
    original = make_encoder("test_resnet")(IMAGE.float())
    assert torch.equal(perturbed.levels[-1], original.levels[-1])
    assert not torch.equal(plain.levels[-1], original.levels[-1])


def test_unregistered_blocks_cannot_be_deactivated():
    assert not has_shortcut(OwnBlock())
    with pytest.raises(TypeError, match="no bypass is registered for OwnBlock; register one with @bypass"):
        bypass(OwnBlock(), torch.zeros(1))
    encoder = make_encoder("test_resnet")
    encoder.model.layer3.append(OwnBlock())
    assert encoder.stages == [[0], [1], [2], [4]]


@pytest.mark.parametrize(
    ("backbone", "output_stride", "message"),
    [
        ("resnet5O", 16, "expected the name of a timm model as backbone, but got 'resnet5O'. Did you mean resnet50"),
        ("zzzzzz", 16, "expected the name of a timm model as backbone, but got 'zzzzzz'."),
        ("convnext_atto", 32, "expected a backbone of the ResNet or inverted-residual families, but got convnext_atto"),
        ("test_resnet", 4, "expected an output stride of 8, 16 or 32, but got 4"),
        ("efficientnet_lite0", 64, "expected an output stride of 8, 16 or 32, but got 64"),
    ],
)
def test_wrong_backbones_are_refused(backbone, output_stride, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Encoder(backbone, output_stride=output_stride)
    assert "\n" not in str(error.value)
