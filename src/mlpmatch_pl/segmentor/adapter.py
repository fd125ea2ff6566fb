"""Networks of other packages and your own, for the same training steps as `Segmentor`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.perturbation.network import Branch, Unit, block_of, bypass, deactivate, find_blocks
from mlpmatch_pl.segmentor.blocks import eval_mode
from mlpmatch_pl.segmentor.encoder import Features
from mlpmatch_pl.segmentor.segmentor import Segmentor
from mlpmatch_pl.utils.errors import UserError


class Network(Protocol):
    """What a network needs to be trained with all perturbations.

    Models of segmentation_models_pytorch and torchvision's segmentation models need none of it: `NetworkAdapter` knows
    their parts.
    """

    def encode(self, image_BCHW: Tensor) -> Sequence[Tensor]:
        """Return feature maps (B, D, H, W) of normalized images; their channels are dropped as feature perturbation."""

    def decode(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits (B, num_classes, h, w) for images of a size; they are interpolated to it."""

    def blocks(self) -> Sequence[Sequence[nn.Module]]:
        """Return the residual blocks that may be deactivated, grouped by stage, see `find_blocks`."""


class NetworkAdapter(Segmentor):
    """Gives a network the interface of `Segmentor`: normalization, and passes with perturbed features and blocks.

    The network gets images normalized by ``mean`` and ``std``. A deactivated network runs a pass of its own: it shares
    nothing with the plain one.

    Args:
        network: A model of segmentation_models_pytorch, a segmentation model of torchvision (whose auxiliary classifier
            is removed), or a module with the methods of `Network`.
        num_classes: Number of classes, background included.
        in_chans: Number of image channels.
        mean: Mean of each channel, for values as stored.
        std: Standard deviation of each channel, for values as stored.

    Raises:
        UserError: If the network is of none of these kinds, refuses an image or has another number of classes, or mean
            and std have another length than ``in_chans``.

    Example:
        >>> from torchvision.models.segmentation import fcn_resnet50
        >>> network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=4)
        >>> adapter = NetworkAdapter(network, 4, 3, (124.0, 116.0, 104.0), (58.0, 57.0, 57.0)).eval()
        >>> tuple(adapter(torch.zeros(1, 3, 40, 50, dtype=torch.uint8)).shape), len(adapter.encoder.stages)
        ((1, 4, 40, 50), 4)
    """

    def __init__(
        self, network: nn.Module, num_classes: int, in_chans: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        nn.Module.__init__(self)  # not that of Segmentor, which builds other parts
        self.network = network
        view = _view(network)
        self.view: Any
        object.__setattr__(self, "view", view)  # it may be the network, which must not be registered twice
        self.encoder = EncoderView(view, network)  # type: ignore[assignment]
        self.decoder = DecoderView(self.encoder, network)  # type: ignore[assignment, arg-type]
        self.set_normalization(mean, std, in_chans)
        name = type(network).__name__
        try:
            with torch.no_grad(), eval_mode(self):
                logits_BCHW: Tensor = self(torch.zeros(1, in_chans, 128, 128))
        except Exception as error:
            raise UserError(
                f"expected a network that takes images of any size, but {name} refuses one of 128x128 pixels "
                f"({type(error).__name__}: {' '.join(str(error).split())}); wrap it in a module with the methods "
                "encode, decode and blocks, see mlpmatch_pl.segmentor.adapter"
            ) from error
        found = logits_BCHW.shape[1]
        if found != num_classes:
            raise UserError(f"expected a network with {num_classes} classes, but {name} has {found}")

    def encode(self, image_BCHW: Tensor, deactivated: frozenset[Unit] = frozenset()) -> Features:
        """Return features of images, with the given blocks deactivated.

        Raises:
            UserError: If single branches of blocks are to be deactivated.
        """
        if any(isinstance(unit, Branch) for unit in deactivated):
            raise UserError(
                "expected whole blocks to deactivate in a network of your own, but got branches; choose another "
                "method.network_perturbation.sampler, such as single_block"
            )
        with deactivate(self.encoder.blocks[block_of(unit)] for unit in deactivated):
            return Features(tuple(self.view.encode(self.normalize(image_BCHW))))

    def encode_forked(
        self,
        image_BCHW: Tensor,
        deactivated: frozenset[Unit],
        perturbed_context: AbstractContextManager[None] | None = None,
        perturbed_images: slice = slice(None),
    ) -> tuple[Features, Features]:
        """Return plain and perturbed features, see `Encoder.forward_forked`."""
        plain = self.encode(image_BCHW)
        if not deactivated:
            return plain, plain[perturbed_images]
        with perturbed_context or nullcontext():
            return plain, self.encode(image_BCHW[perturbed_images], deactivated)

    def decode(self, features: Features, size: Sequence[int]) -> Tensor:
        """Return logits of the given size, (B, num_classes, *size)."""
        logits_BCHW: Tensor = self.view.decode(features.levels, size)
        if logits_BCHW.shape[2:] == tuple(size):
            return logits_BCHW
        return F.interpolate(logits_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


class EncoderView:
    """The part of a network that is trained with the encoder's learning rate, and its blocks.

    Attributes:
        model: The encoder of the network; all of it if it has none.
        blocks: The blocks that may be deactivated.
        stages: Their indices by stage.
    """

    def __init__(self, view: Any, network: nn.Module) -> None:
        self.model: nn.Module = getattr(view, "encoder", network)
        stages = [list(stage) for stage in view.blocks() if len(stage)]
        self.blocks = [block for stage in stages for block in stage]
        self.stages: list[list[int]] = []
        for stage in stages:
            first = sum(map(len, self.stages))
            self.stages.append([*range(first, first + len(stage))])

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the encoder."""
        return self.model.parameters()


class DecoderView:
    """The rest of a network, trained with the decoder's learning rate."""

    def __init__(self, encoder: EncoderView, network: nn.Module) -> None:
        self.encoder, self.network = encoder, network

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that are not the encoder's."""
        encoders = set(map(id, self.encoder.parameters()))
        return (parameter for parameter in self.network.parameters() if id(parameter) not in encoders)


class _SmpView:
    """segmentation_models_pytorch: images are padded to a multiple of the encoder's output stride."""

    def __init__(self, network: Any) -> None:
        with suppress(ImportError):  # another package may use the same names of attributes
            from segmentation_models_pytorch.encoders.mix_transformer import Block

            bypass.register(Block, lambda block, x_BDHW: x_BDHW)
        self.network, self.encoder = network, network.encoder

    def _padded(self, size: Sequence[int]) -> list[int]:
        stride = self.encoder.output_stride
        return [math.ceil(side / stride) * stride for side in size]

    def encode(self, image_BCHW: Tensor) -> Sequence[Tensor]:
        height, width = image_BCHW.shape[2:]
        padded = self._padded((height, width))
        image_BCHW = F.pad(image_BCHW, (0, padded[1] - width, 0, padded[0] - height), mode="replicate")
        return self.encoder(image_BCHW)[1:]  # type: ignore[no-any-return]  # without the image

    def decode(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        padded = self._padded(size)
        image = features[0].new_empty(len(features[0]), 0, *padded)  # decoders read its size at most
        logits = self.network.segmentation_head(self.network.decoder([image, *features]))
        logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
        return logits[..., : size[0], : size[1]]

    def blocks(self) -> list[list[nn.Module]]:
        return _by_stage(self.encoder)


class _TorchvisionView:
    """torchvision's segmentation models: a backbone that returns a mapping, and a classifier."""

    def __init__(self, network: Any) -> None:
        if getattr(network, "aux_classifier", None) is not None:
            network.aux_classifier = None  # without a loss, DDP would miss its gradients
            network.backbone.return_layers = {
                layer: name for layer, name in network.backbone.return_layers.items() if name != "aux"
            }
        self.network, self.encoder = network, network.backbone
        self.names = [*network.backbone.return_layers.values()]

    def encode(self, image_BCHW: Tensor) -> Sequence[Tensor]:
        return [*self.encoder(image_BCHW).values()]

    def decode(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        named = dict(zip(self.names, features, strict=True))
        return self.network.classifier(named.get("out", named))  # type: ignore[no-any-return]

    def blocks(self) -> list[list[nn.Module]]:
        return _by_stage(self.encoder)


def _by_stage(model: nn.Module) -> list[list[nn.Module]]:
    """Group the blocks that may be deactivated by the module that holds them."""
    stages: dict[str, list[nn.Module]] = {}
    for name, block in find_blocks(model).items():
        stages.setdefault(name.rpartition(".")[0], []).append(block)
    return [*stages.values()]


_KINDS: Mapping[tuple[str, ...], Any] = {
    ("encode", "decode", "blocks"): lambda network: network,
    ("encoder", "decoder", "segmentation_head"): _SmpView,
    ("backbone", "classifier"): _TorchvisionView,
}


def _view(network: nn.Module) -> Any:
    for attributes, view in _KINDS.items():
        if all(hasattr(network, attribute) for attribute in attributes):
            return view(network)
    raise UserError(
        "expected a network with the methods encode, decode and blocks, a model of segmentation_models_pytorch or a "
        f"segmentation model of torchvision, but got {type(network).__name__}; see mlpmatch_pl.segmentor.adapter"
    )
