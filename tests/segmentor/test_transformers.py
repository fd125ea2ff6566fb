"""Decoders and weights of UniMatch V2 against plain transcriptions of its description; DINOv2's positions."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from mlpmatch_pl import MLPMatch, Segmentor, UserError
from mlpmatch_pl.segmentor import DPT, Encoder, Features, Linear
from mlpmatch_pl.segmentor.families import dinov2_positions
from mlpmatch_pl.segmentor.weights import load_published

CLASSES, IMAGENET = 5, ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def dinov2_shapes(width, depth, positions, patch):
    """Names and shapes in Meta's DINOv2 files."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, positions, width), "mask_token": (1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= {f"norm.{part}": (width,) for part in ("weight", "bias")}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for block in (f"blocks.{index}" for index in range(depth)):
        shapes |= {f"{block}.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{block}.ls{i}.gamma": (width,) for i in (1, 2)}
        for name, shape in layers.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return shapes


def dpt_shapes(width, channels, widths, num_classes):
    """Names and shapes of the head in UniMatch V2's checkpoints."""
    weights = {f"projects.{i}": (wide, width, 1, 1) for i, wide in enumerate(widths)}
    weights |= {"resize_layers.0": (widths[0], widths[0], 4, 4), "resize_layers.1": (widths[1], widths[1], 2, 2)}
    weights |= {"resize_layers.3": (widths[3], widths[3], 3, 3)}
    for i in range(1, 5):
        block = f"scratch.refinenet{i}"
        weights |= {f"{block}.out_conv": (channels, channels, 1, 1)}
        weights |= {f"{block}.resConfUnit{u}.conv{c}": (channels, channels, 3, 3) for u in (1, 2) for c in (1, 2)}
    weights |= {
        "scratch.output_conv.0": (channels, channels, 3, 3),
        "scratch.output_conv.2": (num_classes, channels, 1, 1),
    }
    shapes = {f"head.{name}.weight": shape for name, shape in weights.items()}
    shapes |= {
        f"head.{name}.bias": (shape[1] if "resize_layers.0" in name else shape[0],) for name, shape in weights.items()
    }
    return shapes | {f"head.scratch.layer{i + 1}_rn.weight": (channels, wide, 3, 3) for i, wide in enumerate(widths)}


def random_state(shapes, scale=0.3):
    rng = torch.Generator().manual_seed(0)
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def plain_dpt(state, maps):
    """The head as unimatch_v2.md describes it, step by step."""

    def conv(x, name, **options):
        return F.conv2d(x, state[f"head.{name}.weight"], state.get(f"head.{name}.bias"), **options)

    def transposed(x, name, stride):
        return F.conv_transpose2d(x, state[f"head.{name}.weight"], state[f"head.{name}.bias"], stride=stride)

    def up(x, size):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)

    def unit(x, name):
        return x + conv(F.relu(conv(F.relu(x), f"{name}.conv1", padding=1)), f"{name}.conv2", padding=1)

    x = [conv(tap, f"projects.{k}") for k, tap in enumerate(maps)]
    x = [transposed(x[0], "resize_layers.0", 4), transposed(x[1], "resize_layers.1", 2), x[2],
         conv(x[3], "resize_layers.3", stride=2, padding=1)]  # fmt: skip
    r1, r2, r3, r4 = (conv(tap, f"scratch.layer{k}_rn", padding=1) for k, tap in enumerate(x, 1))
    net = "scratch.refinenet"
    p = conv(up(unit(r4, f"{net}4.resConfUnit2"), r3.shape[2:]), f"{net}4.out_conv")
    for k, tap, size in ((3, r3, r2.shape[2:]), (2, r2, r1.shape[2:]), (1, r1, [2 * side for side in r1.shape[2:]])):
        p = unit(p + unit(tap, f"{net}{k}.resConfUnit1"), f"{net}{k}.resConfUnit2")
        p = conv(up(p, size), f"{net}{k}.out_conv")
    return conv(F.relu(conv(p, "scratch.output_conv.0", padding=1)), "scratch.output_conv.2")


def save_published(state, path):
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 59}, path)
    return path


@torch.no_grad()
def test_a_published_v2_checkpoint_gives_the_logits_of_a_plain_model(tmp_path):
    backbone = {k: v for k, v in timm.create_model("test_vit").state_dict().items() if not k.startswith("head")}
    shapes = {f"backbone.{name}": tuple(value.shape) for name, value in backbone.items()}
    state = random_state(shapes | dpt_shapes(64, 12, (8, 16, 32, 64), CLASSES))
    decoder = {"name": "dpt", "channels": 12, "level_channels": [8, 16, 32, 64]}
    segmentor = Segmentor(CLASSES, "test_vit", decoder=decoder).double().eval()
    load_published(segmentor, save_published(state, tmp_path / "v2.pth"))

    state = {name: value.double() for name, value in state.items()}
    model = timm.create_model("test_vit", dynamic_img_size=True, num_classes=0).double().eval()
    model.load_state_dict({name.removeprefix("backbone."): v for name, v in state.items() if "backbone" in name})
    image_BCHW = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in IMAGENET)
    maps = model.forward_intermediates((image_BCHW - mean) / std, [0, 2, 3, 5], norm=True, intermediates_only=True)
    logits = F.interpolate(plain_dpt(state, maps), size=(48, 80), mode="bilinear", align_corners=True)
    torch.testing.assert_close(segmentor(image_BCHW), logits, rtol=1e-6, atol=1e-6 * logits.abs().max().item())
    assert logits.std() > 0.01


@pytest.mark.parametrize(
    ("backbone", "width", "channels", "parameters"),
    [("vit_small_patch14_dinov2", 384, 64, 24_795_637), ("vit_base_patch14_dinov2", 768, 128, 97_528_789)],
)
def test_parameters_are_those_of_unimatch_v2(backbone, width, channels, parameters):
    with torch.device("meta"):
        segmentor = Segmentor(21, backbone, decoder="dpt")
    count = sum(parameter.numel() for parameter in segmentor.parameters())
    assert count + width == parameters  # DINOv2's mask token, which V2 counts, is for pretraining
    never_run = sum(parameter.numel() for parameter in segmentor.parameters() if not parameter.requires_grad)
    assert never_run == 2 * (9 * channels * channels + channels)


def test_v2s_small_network_loads_strictly(tmp_path):
    shapes = {f"backbone.{name}": shape for name, shape in dinov2_shapes(384, 12, 1370, 14).items()}
    state = random_state(shapes | dpt_shapes(384, 64, (48, 96, 192, 384), 21))
    assert sum(value.numel() for value in state.values()) == 24_795_637
    segmentor = Segmentor(21, "vit_small_patch14_dinov2", decoder="dpt")
    load_published(segmentor, save_published(state, tmp_path / "v2.pth"))
    loaded = segmentor.state_dict()
    assert torch.equal(loaded["encoder.model.blocks.11.ls2.gamma"], state["backbone.blocks.11.ls2.gamma"])
    unit = "head.scratch.refinenet4.resConfUnit1.conv2.weight"  # never run, but published
    assert torch.equal(loaded["decoder.fuse.3.lateral.conv2.weight"], state[unit])

    torch.save(
        {name.removeprefix("backbone."): v for name, v in state.items() if "backbone" in name}, tmp_path / "m.pth"
    )
    encoder = Encoder("vit_small_patch14_dinov2", pretrained=str(tmp_path / "m.pth"))  # Meta's file
    assert all(torch.equal(value, loaded[f"encoder.{name}"]) for name, value in encoder.state_dict().items())

    del state["backbone.blocks.3.attn.proj.bias"]
    with pytest.raises(UserError, match=r"are missing \(1, such as encoder.model.blocks.3.attn.proj.bias\); check"):
        load_published(segmentor, save_published(state, tmp_path / "broken.pth"))


def bicubic(coordinate):
    """The weights of four pixels around a coordinate, with a = -0.75 as in torch."""
    a, weights = -0.75, {}
    for pixel in range(math.floor(coordinate) - 1, math.floor(coordinate) + 3):
        d = abs(coordinate - pixel)
        inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weights[pixel] = inner if d <= 1 else outer
    return weights


def plain_matrix(size, side):
    """The matrix that resizes ``side`` pixels to ``size``, scaled by (size + 0.1) / side."""
    matrix = torch.zeros(size, side, dtype=torch.float64)
    for row in range(size):
        for pixel, weight in bicubic((row + 0.5) * side / (size + 0.1) - 0.5).items():
            matrix[row, min(max(pixel, 0), side - 1)] += weight
    return matrix


@pytest.mark.parametrize("size", [(7, 9), (57, 30), (4, 37)])
def test_dinov2s_position_embedding(size):
    pos_embed = torch.randn(1, 1 + 37 * 37, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = pos_embed[0, 1:].reshape(37, 37, 6)
    rows, columns = (plain_matrix(side, 37) for side in size)
    expected = torch.einsum("yh,xw,hwd->yxd", rows, columns, square).flatten(0, 1)
    resized = dinov2_positions(pos_embed, *size)
    torch.testing.assert_close(resized[0, 1:], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    assert dinov2_positions(pos_embed, 37, 37) is pos_embed


@torch.no_grad()
def test_the_embedding_is_the_option():
    encoders = {}
    for option in ("timm", "dinov2"):
        torch.manual_seed(0)
        encoders[option] = Encoder("test_vit", pos_embed=option).eval()
    native, other = torch.rand(1, 3, 160, 160), torch.rand(1, 3, 96, 160)
    assert torch.equal(encoders["timm"](native).levels[-1], encoders["dinov2"](native).levels[-1])
    assert not torch.allclose(encoders["timm"](other).levels[-1], encoders["dinov2"](other).levels[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "test_resnet", "pos_embed": "dinov2"}, "expected a vision transformer for backbone.pos_embed=d"),
        ({"backbone": "test_vit2", "pos_embed": "dinov2"}, "expected a transformer without registers, such as vit_sm"),
        (
            {"backbone": "test_vit", "pos_embed": "dino"},
            "expected backbone.pos_embed as timm or dinov2, but got 'dino'",
        ),
        ({"decoder": "dtp"}, "expected decoder.name as deeplabv3plus, dpt or linear, but got 'dtp'. Did you mean dpt?"),
        ({"decoder": {"name": "dpt", "atrous_rates": [6]}}, "the configuration has no key decoder.atrous_rates"),
        ({"decoder": {"name": "linear", "channels": "8"}}, "expected decoder.channels as an integer, but got '8'"),
        ({"decoder": {"name": "dpt", "level_channels": [8, 8]}}, "expected decoder.level_channels as 4 numbers, but"),
        (
            {"decoder": {"name": "dpt", "level_channels": [8, 8, 8, 0]}},
            "expected decoder.level_channels from 1 to 4096",
        ),
    ],
)
def test_wrong_choices_are_refused(options, message):
    with pytest.raises(UserError) as error:
        MLPMatch(CLASSES, **{"backbone": "test_vit", **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decoder", ["deeplabv3plus", "dpt", "linear", {"name": "linear", "channels": 8}])
@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_resnet"])
def test_any_decoder_on_any_backbone_at_any_size(backbone, decoder):
    segmentor = Segmentor(CLASSES, backbone, decoder=decoder).eval()
    image = torch.randint(0, 256, (1, 3, 47, 79), dtype=torch.uint8)
    with torch.no_grad():
        logits = segmentor(image)
        padded = segmentor(F.pad(image.float(), (0, 1, 0, 1), mode="replicate").byte())
    assert logits.shape == (1, CLASSES, 47, 79)
    if backbone != "test_resnet":
        torch.testing.assert_close(logits, padded[..., :47, :79])


def test_the_maps_of_a_convolutional_network_keep_their_size():
    sides, widths = (8, 4, 2, 2), (4, 6, 8, 8)
    maps = [torch.rand(1, width, side, side) for width, side in zip(widths, sides, strict=True)]
    decoder = DPT(widths, CLASSES, channels=8)
    assert decoder(Features(tuple(maps))).shape == (1, CLASSES, 16, 16)
    assert not list(decoder.resize.parameters())


@torch.no_grad()
def test_linear_decoders_see_one_position():
    x_BDHW = torch.rand(2, 6, 3, 4)
    for decoder in (Linear([6], CLASSES), Linear([6], CLASSES, channels=7)):
        logits_BCHW = decoder(Features((x_BDHW,)))
        torch.testing.assert_close(logits_BCHW[..., 1:2, 2:3], decoder(Features((x_BDHW[..., 1:2, 2:3],))))


def test_a_frozen_encoder_keeps_its_weights_and_no_activations():
    segmentor = Segmentor(CLASSES, "test_resnet", decoder={"channels": 8}, frozen=True).train()
    before = {name: value.clone() for name, value in segmentor.encoder.state_dict().items()}
    image = torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)
    plain, perturbed = segmentor.encode_forked(image, frozenset({2}))
    assert not any(level.requires_grad for part in (plain, perturbed) for level in part.levels)
    segmentor.decode(Features.cat([plain, perturbed]), (33, 33)).square().mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in segmentor.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in segmentor.encoder.parameters())
    assert all(parameter.grad is not None for parameter in segmentor.decoder.parameters())
