"""The encoder against timm's own features, plain bypasses, and two independent passes instead of a fork."""

import copy
import gc
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from mlpmatch_pl import NetworkPerturbation, Segmentor, UserError
from mlpmatch_pl.perturbation import bypass, has_shortcut
from mlpmatch_pl.segmentor import Encoder

BACKBONES = ["test_resnet", "resnet18", "resnet50s", "mobilenetv2_100", "efficientnet_lite0"]
RESNETS, INVERTED = BACKBONES[:3], BACKBONES[3:]
OUTPUT_STRIDES = [8, 16, 32]
SAMPLERS = {
    "single_block": {},
    "single_stage": {},
    "stage_bernoulli": {"p": 0.5},
    "n_blocks": {"k": 2},
    "block_bernoulli": {"p": 0.3},
}


def randomize(module):
    """Give BatchNorm weights and statistics of its own: timm starts residual branches at zero, which hides them."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module


def make_encoder(backbone, **options):
    torch.manual_seed(0)
    return randomize(Encoder(backbone, **options)).eval()


@pytest.fixture(scope="module")
def encoders():
    """One encoder a backbone, float64; tests copy or leave them as they are."""
    return {backbone: make_encoder(backbone).double() for backbone in BACKBONES}


def timm_features(encoder, backbone, image_BCHW, output_stride):
    options = {"in_chans": image_BCHW.shape[1], "output_stride": output_stride, "features_only": True}
    model = timm.create_model(backbone, **options).eval()
    assert not model.load_state_dict(encoder.model.state_dict(), strict=False).missing_keys
    levels = model(image_BCHW)
    return levels[model.feature_info.reduction().index(4)], levels[-1]


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_features_are_timms_own(backbone, output_stride):
    encoder = make_encoder(backbone, output_stride=output_stride)
    for size in [(33, 33), (65, 81)]:
        image_BCHW = torch.randn(1, 3, *size)
        levels = encoder(image_BCHW).levels
        for level, expected in zip(levels, timm_features(encoder, backbone, image_BCHW, output_stride), strict=True):
            assert torch.equal(level, expected)
        assert levels[0].shape[2:] == tuple(-(-side // 4) for side in size)
        assert levels[1].shape[2:] == tuple(-(-side // output_stride) for side in size)
        assert tuple(level.shape[1] for level in levels) == encoder.channels


@pytest.mark.parametrize("size", [321, 801])
@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
@torch.no_grad()
def test_features_are_timms_own_at_the_papers_crops(size, output_stride):
    encoder, image_BCHW = make_encoder("test_resnet", output_stride=output_stride), torch.randn(1, 3, size, size)
    levels = encoder(image_BCHW).levels
    for level, expected in zip(levels, timm_features(encoder, "test_resnet", image_BCHW, output_stride), strict=True):
        assert torch.equal(level, expected)
    assert levels[1].shape[-1] == -(-size // output_stride)


@pytest.mark.parametrize("in_chans", [1, 5])
@pytest.mark.parametrize("backbone", ["test_resnet", "resnet50s", "mobilenetv2_100"])
@torch.no_grad()
def test_other_numbers_of_channels(backbone, in_chans):
    encoder, image_BCHW = make_encoder(backbone, in_chans=in_chans), torch.randn(1, in_chans, 33, 33)
    levels = encoder(image_BCHW).levels
    for level, expected in zip(levels, timm_features(encoder, backbone, image_BCHW, 16), strict=True):
        assert torch.equal(level, expected)


def plain_bypass(block, x):
    if isinstance(block, BasicBlock | Bottleneck):
        return F.relu(x if block.downsample is None else block.downsample(x), inplace=False)
    return x


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_deactivated_blocks_are_bypassed(encoders, backbone):
    encoder, image_BCHW = encoders[backbone], torch.randn(1, 3, 33, 33, dtype=torch.float64)
    x = encoder._family.stem(encoder.model, image_BCHW)
    entering = []
    for block in encoder.blocks:
        entering.append(x)
        x = block(x)
    plain = encoder(image_BCHW).levels
    candidates = [index for stage in encoder.stages for index in stage]
    for first in candidates:
        y = plain_bypass(encoder.blocks[first], entering[first])
        for block in encoder.blocks[first + 1 :]:
            y = block(y)
        perturbed = encoder(image_BCHW, frozenset({first})).levels
        torch.testing.assert_close(perturbed[-1], y, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(perturbed[-1], plain[-1]), first
    every = encoder._family.stem(encoder.model, image_BCHW)
    for index, block in enumerate(encoder.blocks):
        every = plain_bypass(block, every) if index in candidates else block(every)
    torch.testing.assert_close(encoder(image_BCHW, frozenset(candidates)).levels[-1], every, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backbone", INVERTED)
@torch.no_grad()
def test_only_inverted_residuals_with_a_shortcut_are_candidates(encoders, backbone):
    encoder, same_shape = encoders[backbone], []
    x = encoder._family.stem(encoder.model, torch.randn(1, 3, 65, 65, dtype=torch.float64))
    for index, block in enumerate(encoder.blocks):
        y = block(x)
        same_shape += [index] if y.shape == x.shape else []
        x = y
    assert [index for stage in encoder.stages for index in stage] == same_shape
    assert 0 < len(same_shape) < len(encoder.blocks)
    assert all(encoder.stages)


@pytest.mark.parametrize(
    ("backbone", "sizes"), [("test_resnet", [1, 1, 1, 1]), ("resnet18", [2, 2, 2, 2]), ("resnet50s", [3, 4, 6, 3])]
)
def test_every_resnet_block_is_a_candidate_of_its_stage(encoders, backbone, sizes):
    stages = encoders[backbone].stages
    assert [len(stage) for stage in stages] == sizes
    assert [index for stage in stages for index in stage] == list(range(sum(sizes)))
    assert all(has_shortcut(block) for block in encoders[backbone].blocks)


@pytest.mark.parametrize("block", [BasicBlock(4, 4), Bottleneck(16, 4)], ids=lambda block: type(block).__name__)
def test_bypass_applies_the_activation_and_leaves_its_input(block):
    x = torch.randn(1, block.conv1.in_channels, 3, 3)
    before = x.clone()
    assert torch.equal(bypass(block, x), before.clamp_min(0))
    assert torch.equal(x, before)
    assert (before < 0).any()


def test_bypass_keeps_the_projection_and_leaves_its_input():
    projection = nn.Conv2d(4, 16, 1)
    x = torch.randn(1, 4, 3, 3)
    before = x.clone()
    y = bypass(Bottleneck(4, 4, downsample=projection), x)
    torch.testing.assert_close(y, projection(before).clamp_min(0))
    assert torch.equal(x, before)


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


def test_own_block_takes_part_once_registered(registered_block):
    encoder = make_encoder("test_resnet")
    encoder.model.layer3.append(registered_block())
    image_BCHW = torch.randn(1, 3, 33, 33)
    assert encoder.stages == [[0], [1], [2, 3], [4]]
    plain, perturbed = encoder.forward_forked(image_BCHW, frozenset({3}))
    original = make_encoder("test_resnet")(image_BCHW)
    assert torch.equal(perturbed.levels[-1], original.levels[-1])
    assert not torch.equal(plain.levels[-1], original.levels[-1])


def test_block_without_a_rule_is_no_candidate_and_cannot_be_bypassed():
    assert not has_shortcut(OwnBlock())
    with pytest.raises(TypeError, match="no bypass is registered for OwnBlock; register one with @bypass"):
        bypass(OwnBlock(), torch.zeros(1))
    encoder = make_encoder("test_resnet")
    encoder.model.layer3.append(OwnBlock())
    assert encoder.stages == [[0], [1], [2], [4]]


@pytest.mark.parametrize(
    ("backbone", "output_stride", "sentence"),
    [
        ("resnet5O", 16, "expected the name of a timm model as backbone, but got 'resnet5O'. Did you mean resnet50"),
        ("zzzzzz", 16, "expected the name of a timm model as backbone, but got 'zzzzzz'."),
        (
            "convnext_atto",
            32,
            "expected a backbone of the ResNet or inverted-residual families, but convnext_atto is of another; "
            "try resnet50, resnet101s, mobilenetv2_100 or efficientnet_lite0",
        ),
        ("test_resnet", 4, "expected an output stride of 8, 16 or 32, but got 4"),
        ("test_resnet", 64, "expected an output stride of 8, 16 or 32, but got 64"),
    ],
)
def test_wrong_backbones_are_refused_by_one_sentence(backbone, output_stride, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        Encoder(backbone, output_stride=output_stride)
    assert "\n" not in str(error.value)


def test_family_without_output_stride_is_refused_by_one_sentence():
    with pytest.raises(UserError, match="but vit_tiny_patch16_224 is of another") as error:
        Encoder("vit_tiny_patch16_224")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_parameter_is_without_gradient(backbone):
    torch.manual_seed(0)
    segmentor = Segmentor(3, backbone=backbone, decoder_channels=8).train()
    segmentor(torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)).square().mean().backward()
    assert [name for name, parameter in segmentor.named_parameters() if parameter.grad is None] == []


def random_loss(levels, seed):
    rng = torch.Generator().manual_seed(seed)
    return sum(
        (level * torch.randn(level.shape, generator=rng, dtype=level.dtype)).sum() / level.numel() for level in levels
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "backbone", [*(b for b in BACKBONES if b != "resnet50s"), pytest.param("resnet50s", marks=pytest.mark.slow)]
)
def test_forked_forward_is_two_full_passes(encoders, backbone, sampler):
    encoder = copy.deepcopy(encoders[backbone]).train()
    perturbation = NetworkPerturbation(sampler, seed=1, **SAMPLERS[sampler])
    deactivated = next(filter(None, (perturbation.draw(encoder.stages, step) for step in range(50))))
    image_BCHW = torch.randn(2, 3, 33, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    forked = encoder.forward_forked(image_BCHW, deactivated)
    separate = encoder(image_BCHW), encoder(image_BCHW, deactivated)

    losses = []
    for passes in (forked, separate):
        losses.append(sum(random_loss(features.levels, seed) for seed, features in enumerate(passes)))
    for one, other in zip(forked, separate, strict=True):
        for level, expected in zip(one.levels, other.levels, strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(forked[0].levels[-1], forked[1].levels[-1])
    parameters = list(encoder.parameters())
    grads, expected = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    scale = max(grad.abs().max() for grad in expected)
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-7, atol=float(scale) * 1e-11)


@pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv2_100"])
def test_nothing_deactivated_gives_the_same_object_twice(encoders, backbone):
    image_BCHW = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    plain, perturbed = encoders[backbone].forward_forked(image_BCHW, frozenset())
    assert plain is perturbed
    for level, expected in zip(plain.levels, encoders[backbone](image_BCHW).levels, strict=True):
        assert torch.equal(level, expected)


@pytest.mark.parametrize(
    ("backbone", "deactivated"),
    [("test_resnet", {0}), ("test_resnet", {3}), ("resnet18", {2, 5}), ("mobilenetv2_100", {5, 8})],
)
def test_fork_runs_the_prefix_once(encoders, backbone, deactivated):
    encoder, calls = copy.deepcopy(encoders[backbone]).train(), {}
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.update({index: calls.get(index, 0) + 1}))
    encoder.forward_forked(torch.randn(2, 3, 33, 33, dtype=torch.float64), frozenset(deactivated))
    fork = min(deactivated)
    expected = {i: 1 if i < fork or i in deactivated else 2 for i in range(len(encoder.blocks))}
    assert calls == expected
    assert encoder.model.bn1.num_batches_tracked == 1


def test_fork_updates_running_statistics_of_the_prefix_once(encoders):
    forked, once, twice = (copy.deepcopy(encoders["resnet18"]).train() for _ in range(3))
    image_BCHW = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    forked.forward_forked(image_BCHW, frozenset({4}))
    once(image_BCHW)
    twice(image_BCHW)
    twice(image_BCHW, frozenset({4}))
    for name, value in forked.state_dict().items():
        prefix = not name.startswith(("model.layer3", "model.layer4"))
        torch.testing.assert_close(value, (once if prefix else twice).state_dict()[name], msg=name)
    assert not torch.equal(once.model.bn1.running_mean, twice.model.bn1.running_mean)


def test_perturbed_context_surrounds_only_the_perturbed_part(encoders):
    encoder, inside, calls = copy.deepcopy(encoders["resnet18"]), [], []

    class Context:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *error):
            inside.clear()

    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append((index, bool(inside))))
    encoder.forward_forked(torch.randn(1, 3, 33, 33, dtype=torch.float64), frozenset({6}), Context())
    assert calls == [*((index, False) for index in range(8)), (7, True)]
