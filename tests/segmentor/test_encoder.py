"""Encoders against timm's own features, plain bypasses, and two separate passes instead of a fork.

`BackboneTester` holds the checks for every family; a new family is one subclass of it.
"""

import copy
import functools
import gc
import re
from types import MappingProxyType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._efficientnet_blocks import EdgeResidual
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from mlpmatch_pl import Segmentor, UserError
from mlpmatch_pl.perturbation import bypass, has_shortcut
from mlpmatch_pl.perturbation.network import Branch
from mlpmatch_pl.segmentor import Encoder

IMAGE = torch.randn(2, 3, 33, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PADDED = F.pad(IMAGE, (0, 7, 0, 15), mode="replicate")


def make_encoder(backbone, **options):
    """Return a random encoder in which every block matters: timm initializes residual branches to (nearly) zero."""
    torch.manual_seed(0)
    encoder = Encoder(backbone, **options).eval()
    for name, parameter in encoder.named_parameters():
        if "gamma" in name:  # layer scales
            nn.init.uniform_(parameter, 0.5, 1.5)
        if name.endswith("grn.weight"):
            nn.init.normal_(parameter)
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


def timm_features(encoder, backbone, image_BCHW, norm=False, indices=None, **options):
    """Return the first and the last of timm's own four levels, with the encoder's weights."""
    model = timm.create_model(backbone, in_chans=image_BCHW.shape[1], **options).eval()
    missing = model.load_state_dict(encoder.model.state_dict(), strict=False).missing_keys
    assert all(name.startswith(encoder._family.unused) for name in missing)
    levels = model.to(image_BCHW.dtype).forward_intermediates(image_BCHW, indices, norm=norm, intermediates_only=True)
    return levels[-4], levels[-1]


def walk(encoder, image_BCHW):
    """Return the input of each block, the output of the last one and what all blocks get beside their input."""
    x, context, _ = encoder._family.stem(encoder.model, image_BCHW)
    inputs = [x]
    for block in encoder.blocks:
        inputs.append(block(inputs[-1], *context))
    return inputs, context


def last_level(encoder, x, image_BCHW):
    return encoder._family.read(encoder.model, x, [side // 16 for side in image_BCHW.shape[2:]])


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
        multiples: To what images are padded, by output stride, if they are.
        image: An image that needs no padding.
        decoder: The decoder that goes with it.
    """

    backbone: str
    stages: tuple[tuple[int, ...], ...]
    first_convolution: str
    output_strides = (8, 16, 32)
    multiples = MappingProxyType({})
    image = IMAGE
    decoder = "deeplabv3plus"

    def timm_features(self, encoder, image_BCHW, **options):
        """Return timm's low-level and high-level features with the encoder's weights, on padded images."""
        padding = [
            padded - side
            for padded, side in zip(encoder.padded(image_BCHW.shape[2:]), image_BCHW.shape[2:], strict=True)
        ]
        image_BCHW = F.pad(image_BCHW, (0, padding[1], 0, padding[0]), mode="replicate")
        return timm_features(encoder, self.backbone, image_BCHW, **options)

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
            expected = self.timm_features(encoder, image, output_stride=output_stride)
            assert encoder.strides[-1] == output_stride
            for level, reference, stride, channels in zip(
                levels, expected, encoder.strides, encoder.channels, strict=True
            ):
                assert torch.equal(level, reference)
                sides = [
                    -(-side // self.multiples.get(output_stride, 1)) * self.multiples.get(output_stride, 1)
                    for side in (33, 41)
                ]
                assert tuple(level.shape) == (2, channels, *(-(-side // stride) for side in sides))

    @torch.no_grad()
    def test_number_of_channels(self):
        for in_chans in (1, 5):
            encoder, image = make_encoder(self.backbone, in_chans=in_chans), torch.randn(1, in_chans, 33, 33)
            expected = self.timm_features(encoder, image, output_stride=16)
            assert all(map(torch.equal, encoder(image).levels, expected))

    def test_stages_list_the_blocks_that_can_be_deactivated(self, shared):
        assert shared.stages == [list(stage) for stage in self.stages]
        assert self.candidates == [i for i, block in enumerate(shared.blocks) if has_shortcut(block)]

    @torch.no_grad()
    def test_each_deactivated_block_is_bypassed(self, shared):
        image = self.image[:1]
        inputs, context = walk(shared, image)
        for index in self.candidates:
            y = self.plain_bypass(shared.blocks[index], inputs[index])
            for block in shared.blocks[index + 1 :]:
                y = block(y, *context)
            assert not torch.allclose(y, inputs[-1]), index
            assert torch.equal(shared(image, frozenset({index})).levels[-1], last_level(shared, y, image)), index

    @torch.no_grad()
    def test_all_blocks_can_be_deactivated_together(self, shared):
        image = self.image[:1]
        inputs, context = walk(shared, image)
        x = inputs[0]
        for index, block in enumerate(shared.blocks):
            x = self.plain_bypass(block, x) if index in self.candidates else block(x, *context)
        assert torch.equal(shared(image, frozenset(self.candidates)).levels[-1], last_level(shared, x, image))

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
        for (name, _), grad, reference in zip(encoder.named_parameters(), grads, expected, strict=True):
            rtol, atol = (1e-6, 1e-6) if "pos_embed" in name else (1e-9, 1e-9)  # timm resizes it in float32
            torch.testing.assert_close(grad, reference, rtol=rtol, atol=atol * scale, msg=name)

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
        assert not counters or (counters[0] == 1 and set(counters) == {1, 2})

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
        decoder = {"name": self.decoder, "channels": 8}
        segmentor = Segmentor(3, backbone=self.backbone, decoder=decoder).train()
        segmentor(torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)).square().mean().backward()
        trained = [(name, parameter) for name, parameter in segmentor.named_parameters() if parameter.requires_grad]
        assert [name for name, parameter in trained if parameter.grad is None] == []

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


class TestConvNeXt(BackboneTester):
    backbone, stages, first_convolution = "test_convnext", ((0,), (2, 3), (5, 6, 7, 8), (10, 11)), "stem.0"
    multiples, image = {8: 8, 16: 16, 32: 32}, PADDED

    def plain_bypass(self, block, x):
        return x


class TestViT(BackboneTester):
    backbone, stages, first_convolution = "test_vit", ((0,), (1, 2), (3,), (4, 5)), "patch_embed.proj"
    output_strides, decoder = (16,), "dpt"
    multiples, image = {16: 16}, PADDED

    def timm_features(self, encoder, image_BCHW, output_stride):
        """Return the normalized outputs of two blocks."""
        indices = [stage[-1] for stage in encoder.stages]
        return super().timm_features(encoder, image_BCHW, norm=True, indices=indices, dynamic_img_size=True)

    def plain_bypass(self, block, x):
        return x

    @pytest.mark.parametrize("branch", ["attn", "mlp"])
    @torch.no_grad()
    def test_each_deactivated_branch_is_bypassed(self, shared, branch):
        """A branch is silenced by the last layer before its sum, in a copy."""
        for index in (0, 3, 5):
            silenced = copy.deepcopy(shared)
            last = {"attn": silenced.blocks[index].attn.proj, "mlp": silenced.blocks[index].mlp.fc2}[branch]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            level = shared(self.image, frozenset({Branch(index, branch)})).levels[-1]
            torch.testing.assert_close(level, silenced(self.image).levels[-1], rtol=1e-12, atol=1e-12)
            assert not torch.allclose(level, shared(self.image).levels[-1])
            assert torch.equal(
                shared.forward_forked(self.image, frozenset({Branch(index, branch)}))[1].levels[-1], level
            )


class TestEva(TestViT):
    """DINOv3's rotary positions and registers."""

    backbone, first_convolution = "vit_tiny_patch16_dinov3_qkvb", "patch_embed.proj"
    stages = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))


class TestMobileNetV2(BackboneTester):
    backbone, first_convolution = "mobilenetv2_100", "conv_stem"
    stages = ((2,), (4, 5), (7, 8, 9), (11, 12), (14, 15))

    def plain_bypass(self, block, x):
        return x


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50s", "efficientnet_lite0", "regnetx_002"])
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
    [
        BasicBlock(4, 4),
        Bottleneck(16, 4),
        Bottleneck(4, 4, downsample=nn.Conv2d(4, 16, 1)),
        EdgeResidual(4, 4),
        RegNetBottleneck(4, 4, downsample="conv1x1"),
        Bottle2neck(16, 4, norm_layer=nn.BatchNorm2d),
    ],
    ids=["basic", "bottleneck", "projection", "edge", "regnet", "res2net"],
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
        ("vgg11", 32, "expected a backbone of timm's modules resnet, res2net, efficientnet, regnet, convnext, "),
        ("test_resnet", 4, "expected an output stride of 8, 16 or 32, but got 4"),
        ("efficientnet_lite0", 64, "expected an output stride of 8, 16 or 32, but got 64"),
    ],
)
def test_wrong_backbones_are_refused(backbone, output_stride, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Encoder(backbone, output_stride=output_stride)
    assert "\n" not in str(error.value)
