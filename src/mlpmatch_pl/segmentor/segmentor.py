"""The segmentation network: normalization, encoder, decoder, upsampling."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.perturbation.network import Unit
from mlpmatch_pl.segmentor.decoder import Decoder
from mlpmatch_pl.segmentor.deeplabv3plus import DeepLabV3Plus
from mlpmatch_pl.segmentor.dpt import DPT
from mlpmatch_pl.segmentor.encoder import Encoder, Features
from mlpmatch_pl.segmentor.linear import Linear
from mlpmatch_pl.utils.errors import UserError, require_choice
from mlpmatch_pl.utils.validation import arguments_type, validate

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of RGB values from 0 to 255
IMAGENET_STD = (58.395, 57.12, 57.375)
DECODERS: Mapping[str, type[Decoder]] = {"deeplabv3plus": DeepLabV3Plus, "dpt": DPT, "linear": Linear}


class Segmentor(nn.Module):
    """A timm encoder with a decoder.

    It takes images as stored, with values from 0 to 255 (or 65535) in any dtype, and normalizes them itself, so that
    training, prediction and export always agree.

    Args:
        num_classes: Number of classes.
        backbone: Name of a timm model, see `Encoder`.
        pretrained: True for timm's weights, ``auto`` for these or random ones without a connection, or the path of a
            local state dict of the encoder.
        in_chans: Number of image channels.
        output_stride: 8, 16 or 32.
        decoder: Name of a decoder (``deeplabv3plus``, ``dpt``, ``linear``), or a mapping with its ``name`` and options,
            see `DeepLabV3Plus`, `DPT` and `Linear`.
        pos_embed: ``timm`` or ``dinov2``, see `Encoder`.
        frozen: Train the decoder alone.
        mean: Mean of each channel, for values as stored.
        std: Standard deviation of each channel, for values as stored.
        compile_blocks: Compile each block of the encoder for training.
        activation_checkpointing: Keep only the inputs of the encoder's blocks for the backward pass.

    Raises:
        UserError: If an argument is out of range, or the length of mean or std is not ``in_chans``.

    Example:
        >>> segmentor = Segmentor(5, backbone="test_resnet", decoder={"channels": 16}).eval()
        >>> tuple(segmentor(torch.zeros(2, 3, 65, 81, dtype=torch.uint8)).shape)
        (2, 5, 65, 81)
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50s",
        pretrained: bool | str = False,
        in_chans: int = 3,
        output_stride: int = 16,
        decoder: str | Mapping[str, Any] = "deeplabv3plus",
        pos_embed: str = "timm",
        frozen: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"expected at least 2 classes, background included, but got {num_classes}")
        self.set_normalization(mean, std, in_chans)
        options = resolve_decoder(decoder)
        build_decoder = DECODERS[options.pop("name")]
        self.encoder = Encoder(
            backbone, pretrained, in_chans, output_stride, pos_embed, build_decoder.levels, frozen, compile_blocks,
            activation_checkpointing,
        )  # fmt: skip
        self.decoder = build_decoder(self.encoder.channels, num_classes, **options)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits.

        Args:
            image_BCHW: Images, (B, in_chans, H, W), values as stored, any dtype, H and W at least 33.

        Returns:
            Logits at the images' size, (B, num_classes, H, W).
        """
        return self.decode(self.encode(image_BCHW), image_BCHW.shape[2:])

    def encode(self, image_BCHW: Tensor, deactivated: frozenset[Unit] = frozenset()) -> Features:
        """Return features of images, with the given blocks deactivated."""
        return self.encoder(self.normalize(image_BCHW), deactivated)  # type: ignore[no-any-return]

    def encode_forked(
        self,
        image_BCHW: Tensor,
        deactivated: frozenset[Unit],
        perturbed_context: AbstractContextManager[None] | None = None,
        perturbed_images: slice = slice(None),
    ) -> tuple[Features, Features]:
        """Return plain and perturbed features, see `Encoder.forward_forked`."""
        image_BCHW = self.normalize(image_BCHW)
        return self.encoder.forward_forked(image_BCHW, deactivated, perturbed_context, perturbed_images)

    def decode(self, features: Features, size: Sequence[int]) -> Tensor:
        """Return logits of the given size, upsampled bilinearly with aligned corners, (B, num_classes, *size)."""
        padded = self.encoder.padded(size)
        logits_BCHW = F.interpolate(self.decoder(features), size=padded, mode="bilinear", align_corners=True)
        return logits_BCHW if self.encoder.multiple == 1 else logits_BCHW[..., : size[0], : size[1]]

    def set_normalization(self, mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
        """Set mean and standard deviation of the channels, which `normalize` uses.

        Raises:
            UserError: If there is not one of each for every channel.
        """
        if len(mean) != in_chans or len(std) != in_chans:
            raise UserError(
                f"expected mean and std with a value for each of the {in_chans} channels, "
                f"but got {len(mean)} and {len(std)} values; set backbone.mean and backbone.std, which "
                "'python -m mlpmatch_pl.check' prints"
            )
        self.register_buffer("mean_C11", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def normalize(self, image_BCHW: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation, in the dtype of the weights."""
        return (image_BCHW.to(self.mean_C11.dtype) - self.mean_C11) / self.std_C11


def resolve_decoder(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a decoder.

    Args:
        spec: A name in `DECODERS`, or a mapping with a ``name`` and the options that differ from the defaults.

    Raises:
        UserError: If the name or an option is unknown.

    Example:
        >>> resolve_decoder({"name": "dpt", "channels": 32})
        {'name': 'dpt', 'channels': 32, 'level_channels': None}
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = require_choice("decoder.name", options.pop("name", "deeplabv3plus"), list(DECODERS))
    build_decoder = partial(DECODERS[name], (), 2)
    values = validate(arguments_type(build_decoder), options, "decoder")
    values = {
        key: values.get(key, option.default) for key, option in inspect.signature(build_decoder).parameters.items()
    }
    return {"name": name} | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
