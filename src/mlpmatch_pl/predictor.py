"""A module out of a checkpoint that may come from anywhere: nothing in it is trusted.

`torch.load` with ``weights_only=True`` keeps code out. Here the arguments are checked as well: their types, that they
name no other file, and that the network which they describe is the one whose weights are in the file, before any
memory is allocated for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from mlpmatch_pl.data.dataset import image_tensor
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.evaluation.folding import for_inference
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.checkpoint import read_checkpoint
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import default_palette
from mlpmatch_pl.utils.validation import fit, parameters

_CLASSIFIER = "segmentor.decoder.classifier.weight"


def restore(path: Path) -> MLPMatch:
    """Build the module that a checkpoint describes, with its weights, on the CPU.

    Raises:
        UserError: If the file is broken or no checkpoint of a training, or its arguments and its weights do not fit.
    """
    content = read_checkpoint(path)
    try:
        arguments, state = _arguments(content["hyper_parameters"]), dict(content["state_dict"])
        if len(state[_CLASSIFIER]) != arguments["num_classes"]:
            raise UserError(f"it has weights for {len(state[_CLASSIFIER])} classes")
        with torch.device("meta"):  # shapes without memory
            outline = MLPMatch(**arguments).state_dict()
        _require_fit(state, outline)
        module = MLPMatch(**arguments)
        module.load_state_dict(state)
    except Exception as error:  # values that nobody expects make the constructors raise nearly anything
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(
            f"expected a checkpoint whose arguments and weights fit together, but those of {path} do not ({reason}); "
            "name a file that mlpmatch_pl.train has written"
        ) from error
    return module


def _arguments(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the module's arguments; no other file is read, and nothing downloaded, whatever is asked for."""
    types, _ = parameters(MLPMatch)
    known = {key: value for key, value in hparams.items() if key in types and key != "pretrained"}
    return {key: fit(key, value, types[key]) for key, value in known.items()}


def _require_fit(state: Mapping[str, Tensor], outline: Mapping[str, Tensor]) -> None:
    if different := sorted(state.keys() ^ outline.keys()):
        raise UserError(f"{different[0]} is only in one of the two, of {len(different)} such tensors")
    for name, tensor in outline.items():
        if state[name].shape != tensor.shape:
            raise UserError(f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")


AnyImage = str | Path | PILImage.Image | NDArray[Any] | Tensor
MOST_CLASSES = 256  # that fit into uint8
EXAMPLE_SIZE = 65


class Predictor:
    """Predicts images of any size with a trained network.

    Args:
        module: The network; it is put into eval mode.
        inference: How images are inferred; whole, if left out.

    Attributes:
        module: The network.
        segmentor: What infers: the module's segmentor in its fastest form, see `for_inference`. It does not follow
            later changes of the module.
        inference: How images are inferred.
        class_names: A name for each class.
        colors: An RGB color for each class.
        in_chans: Channels of the images that it takes.
        bit_depth: Their bits a channel, 8 or 16.

    Raises:
        UserError: If the network has more classes than fit into 8 bits.

    Example:
        >>> predictor = Predictor(MLPMatch(3, backbone="test_resnet", decoder_channels=8))
        >>> label_HW = predictor.predict(np.zeros((40, 50, 3), np.uint8))
        >>> label_HW.shape, label_HW.dtype, predictor.colors
        ((40, 50), dtype('uint8'), ((0, 0, 0), (128, 0, 0), (0, 128, 0)))
    """

    def __init__(self, module: MLPMatch, inference: SlidingWindowInference | None = None) -> None:
        self.module, self.inference = module.eval(), inference or SlidingWindowInference()
        self.class_names = tuple(module.class_names)
        if len(self.class_names) > MOST_CLASSES:
            raise UserError(
                f"expected at most {MOST_CLASSES} classes, as many as 8 bits hold, but the network has "
                f"{len(self.class_names)}; use the module itself"
            )
        palette = module.hparams.get("palette") or default_palette(len(self.class_names))
        self.colors: tuple[tuple[int, int, int], ...] = tuple((red, green, blue) for red, green, blue in palette)
        self.in_chans: int = module.hparams["in_chans"]
        self.bit_depth: int = module.hparams.get("bit_depth", 8)
        example = torch.arange(self.in_chans * EXAMPLE_SIZE**2, device=module.device) % 256
        self.segmentor = for_inference(
            module.segmentor, example.reshape(1, self.in_chans, EXAMPLE_SIZE, EXAMPLE_SIZE).to(torch.uint8)
        )

    def predict(self, image: AnyImage) -> NDArray[np.uint8]:
        """Return the class of every pixel.

        Args:
            image: See `infer`.

        Returns:
            uint8, (H, W).

        Raises:
            UserError: If the image cannot be read, or is not of the kind that the network takes.
        """
        label: NDArray[np.uint8] = self.infer(image).argmax(dim=0).to(torch.uint8).cpu().numpy()
        return label

    def probabilities(self, image: AnyImage) -> NDArray[np.float32]:
        """Return the probability of each class at every pixel.

        Args:
            image: See `infer`.

        Returns:
            float32, (C, H, W).

        Raises:
            UserError: If the image cannot be read, or is not of the kind that the network takes.
        """
        probability: NDArray[np.float32] = self.infer(image).cpu().numpy()
        return probability

    def infer(self, image: AnyImage) -> Tensor:
        """Return the probability of each class at every pixel, on the network's device.

        Args:
            image: A file; a PIL image; an array, (H, W) or (H, W, in_chans), RGB; or a tensor, (in_chans, H, W).
                Arrays and tensors are uint8, or uint16 for a network of 16-bit images (a tensor int32, too), with
                values as the files store them: nothing is scaled. Gray becomes RGB where the network takes RGB, and
                the alpha channel of files and PIL images is left out. Files are turned as their orientation tag says,
                PIL images are not.

        Returns:
            float32, (C, H, W).

        Raises:
            UserError: If the image cannot be read, or is not of the kind that the network takes.
        """
        image_1CHW = self.image_tensor(image)[None].to(self.module.device)
        return self.inference(self.segmentor, image_1CHW)[0]

    def image_tensor(self, image: AnyImage) -> Tensor:
        """Return an image as the network takes it: (in_chans, H, W), uint8, or int32 for 16 bits.

        Args:
            image: See `infer`.

        Raises:
            UserError: If the image cannot be read, or is not of the kind that the network takes.
        """
        if isinstance(image, Tensor):
            return self._checked(image, channel_axis=0)
        if isinstance(image, str | Path):
            pixels: NDArray[Any] = ImageReader(self.in_chans, self.bit_depth)(image)
        elif isinstance(image, PILImage.Image):
            pixels = _from_pillow(image, self.in_chans)
        elif isinstance(image, np.ndarray):
            pixels = image[..., None] if image.ndim == 2 else image
        else:
            raise UserError(
                f"expected an image as path, PIL image, array or tensor, but got {type(image).__name__}; convert it"
            )
        return self._checked(pixels, channel_axis=2)

    def _checked(self, pixels: NDArray[Any] | Tensor, channel_axis: int) -> Tensor:
        """Refuse pixels of another shape or dtype, and put their channels first."""
        dtype = str(pixels.dtype).removeprefix("torch.") if isinstance(pixels, Tensor) else pixels.dtype.name
        accepted = ["uint8"] if self.bit_depth == 8 else ["uint16"]
        if self.bit_depth == 16 and isinstance(pixels, Tensor):
            accepted.append("int32")  # few operations of torch know uint16
        shape = tuple(pixels.shape)
        channels = shape[channel_axis] if len(shape) == 3 and min(shape) > 0 else 0
        grey_for_rgb = channels == 1 and self.in_chans == 3
        if dtype not in accepted or not (channels == self.in_chans or grey_for_rgb):
            axes = f"({self.in_chans}, H, W)" if channel_axis == 0 else f"(H, W, {self.in_chans})"
            raise UserError(
                f"expected {'a tensor' if channel_axis == 0 else 'an array'} {axes} of {' or '.join(accepted)} with "
                f"values as image files have them, but got {shape} of {dtype}; convert it"
            )
        if isinstance(pixels, Tensor):
            tensor = pixels if self.bit_depth == 8 else pixels.to(torch.int32)
        else:
            tensor = image_tensor(np.ascontiguousarray(pixels))
        return tensor.expand(self.in_chans, -1, -1) if grey_for_rgb else tensor


def load(
    path: str | Path, device: str | torch.device = "auto", inference: SlidingWindowInference | None = None
) -> Predictor:
    """Load a checkpoint of a training to predict with.

    Nothing in the file is executed (``weights_only=True``).

    Args:
        path: The checkpoint, as ``runs/x/checkpoints/best.ckpt``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes the first CUDA device, or the CPU if there is none.
        inference: How images are inferred; whole, if left out.

    Returns:
        The predictor, in eval mode on the device.

    Raises:
        UserError: If there is no such file, it is no checkpoint of a training, or there is no such device.

    Example:
        >>> load("runs/none/best.ckpt")
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected a checkpoint, but runs/none/best.ckpt does not exist; ...
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"expected a checkpoint, but {path} {found}; name a file such as checkpoints/best.ckpt in a run's folder"
        )
    return Predictor(_to_device(restore(path), device), inference)


def _to_device(module: MLPMatch, device: str | torch.device) -> MLPMatch:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return module.to(torch.device(device))
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"expected device as auto, or one that this machine has, but got {device} ({reason}); set device=auto"
        ) from error


def _from_pillow(image: PILImage.Image, in_chans: int) -> NDArray[Any]:
    """Return (H, W, channels): RGB where the network takes RGB, or else as the image's mode says."""
    if image.mode == "I":  # so Pillow names 16-bit gray in some files
        pixels: NDArray[Any] = np.asarray(image)
        limits = np.iinfo(np.uint16)
        fits = pixels.size and limits.min <= pixels.min() and pixels.max() <= limits.max
        pixels = pixels.astype(np.uint16) if fits else pixels
    elif image.mode == "F" or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
    elif in_chans == 3 or image.mode == "P":
        pixels = np.asarray(image.convert("RGB"))
    else:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
