"""Prediction with a trained network, loaded from a checkpoint of any origin.

`torch.load` with ``weights_only=True`` executes no code from the file. The arguments stored in it are checked as well:
their types, that they refer to no other file, and that the network they describe matches the weights, before memory is
allocated for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

from mlpmatch_pl.data.dataset import image_tensor
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.evaluation import SlidingWindowInference
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.checkpoint import read_checkpoint
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.hub import STUDENT, TEACHER, read_folder
from mlpmatch_pl.utils.palette import default_palette
from mlpmatch_pl.utils.validation import validate

AnyImage = str | Path | PILImage.Image | NDArray[Any] | Tensor
Weights = Literal["teacher", "student"]
MAX_CLASSES = 256  # that fit into uint8
_CLASSIFIER = "segmentor.decoder.classifier.weight"


class Predictor:
    """Predicts images of any size with a trained network.

    Args:
        module: The network; it is set to eval mode.
        inference: Whole images if omitted.

    Attributes:
        module: The network.
        inference: How probabilities are inferred.
        class_names: A name for each class.
        colors: An RGB color for each class.
        in_chans: Number of image channels the network expects.
        bit_depth: Bits per channel of these images, 8 or 16.
        read_image: Reads image files as those of the training were read.

    Raises:
        UserError: If the network has more than 256 classes.

    Example:
        >>> predictor = Predictor(MLPMatch(3, backbone="test_resnet", decoder={"channels": 8}))
        >>> label_HW = predictor.predict(np.zeros((40, 50, 3), np.uint8))
        >>> label_HW.shape, label_HW.dtype, predictor.colors
        ((40, 50), dtype('uint8'), ((0, 0, 0), (128, 0, 0), (0, 128, 0)))
    """

    def __init__(self, module: MLPMatch, inference: SlidingWindowInference | None = None) -> None:
        self.module, self.inference = module.eval(), inference or SlidingWindowInference()
        self.class_names = tuple(module.class_names)
        if len(self.class_names) > MAX_CLASSES:
            raise UserError(
                f"expected at most {MAX_CLASSES} classes, which fit into 8 bits, but the network has "
                f"{len(self.class_names)}; call the module itself"
            )
        palette = module.hparams.get("palette") or default_palette(len(self.class_names))
        self.colors: tuple[tuple[int, int, int], ...] = tuple((red, green, blue) for red, green, blue in palette)
        self.in_chans: int = module.hparams["in_chans"]
        self.bit_depth: int = module.hparams.get("bit_depth", 8)
        options = module.hparams.get("image_options") or {}
        self.read_image = ImageReader(
            self.in_chans,
            self.bit_depth,
            **{key: options[key] for key in ("orientation", "bands", "channel_axis") if key in options},
        )

    def predict(self, image: AnyImage) -> NDArray[np.uint8]:
        """Return the class of each pixel.

        Args:
            image: See `infer`.

        Returns:
            uint8, (H, W).

        Raises:
            UserError: If the image cannot be read, or is not of the kind the network expects.
        """
        label: NDArray[np.uint8] = self.infer(image).argmax(dim=0).to(torch.uint8).cpu().numpy()
        return label

    def probabilities(self, image: AnyImage) -> NDArray[np.float32]:
        """Return the probability of each class at each pixel.

        Args:
            image: See `infer`.

        Returns:
            float32, (C, H, W).

        Raises:
            UserError: If the image cannot be read, or is not of the kind the network expects.
        """
        probability: NDArray[np.float32] = self.infer(image).cpu().numpy()
        return probability

    def infer(self, image: AnyImage) -> Tensor:
        """Return the probability of each class at each pixel, on the network's device.

        Args:
            image: A file; a PIL image; an array, (H, W) or (H, W, in_chans), RGB; or a tensor, (in_chans, H, W).
                Arrays and tensors are uint8, or uint16 for a network trained on 16-bit images (tensors also int32),
                with values as stored in image files: nothing is rescaled. Gray images become RGB if the network
                expects RGB, and the alpha channel of files and PIL images is dropped. The orientation tag of files
                and PIL images is applied, unless the training ignored it (``dataset.orientation=ignore``).

        Returns:
            float32, (C, H, W).

        Raises:
            UserError: If the image cannot be read, or is not of the kind the network expects.
        """
        image_1CHW = self.image_tensor(image)[None].to(self.module.device)
        return self.inference(self.module.segmentor, image_1CHW)[0]

    def image_tensor(self, image: AnyImage) -> Tensor:
        """Convert an image to the network's input: (in_chans, H, W), uint8, or int32 for 16 bits.

        Args:
            image: See `infer`.

        Raises:
            UserError: If the image cannot be read, or is not of the kind the network expects.
        """
        if isinstance(image, Tensor):
            return self._checked(image, channel_axis=0)
        if isinstance(image, str | Path):
            pixels: NDArray[Any] = self.read_image(image)
        elif isinstance(image, PILImage.Image):
            turned = ImageOps.exif_transpose(image) if self.read_image.orientation == "apply" else image
            pixels = _from_pillow(turned, self.in_chans)
        elif isinstance(image, np.ndarray):
            pixels = image[..., None] if image.ndim == 2 else image
        else:
            raise UserError(
                f"expected an image as path, PIL image, array or tensor, but got {type(image).__name__}; convert it"
            )
        return self._checked(pixels, channel_axis=2)

    def _checked(self, pixels: NDArray[Any] | Tensor, channel_axis: int) -> Tensor:
        """Refuse pixels of another shape or dtype, and move the channels first."""
        dtype = str(pixels.dtype).removeprefix("torch.") if isinstance(pixels, Tensor) else pixels.dtype.name
        accepted = ["uint8"] if self.bit_depth == 8 else ["uint16"]
        if self.bit_depth == 16 and isinstance(pixels, Tensor):
            accepted.append("int32")  # few operations of torch support uint16
        shape = tuple(pixels.shape)
        channels = shape[channel_axis] if len(shape) == 3 and min(shape) > 0 else 0
        gray_for_rgb = channels == 1 and self.in_chans == 3
        if dtype not in accepted or not (channels == self.in_chans or gray_for_rgb):
            axes = f"({self.in_chans}, H, W)" if channel_axis == 0 else f"(H, W, {self.in_chans})"
            raise UserError(
                f"expected {'a tensor' if channel_axis == 0 else 'an array'} {axes} of {' or '.join(accepted)} with "
                f"values as in image files, but got {shape} of {dtype}; convert it"
            )
        if isinstance(pixels, Tensor):
            tensor = pixels if self.bit_depth == 8 else pixels.to(torch.int32)
        else:
            tensor = image_tensor(np.ascontiguousarray(pixels))
        return tensor.expand(self.in_chans, -1, -1) if gray_for_rgb else tensor


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    inference: SlidingWindowInference | None = None,
    weights: Weights | None = None,
) -> Predictor:
    """Load a checkpoint written by a training run for prediction.

    Nothing in the file is executed (``weights_only=True``).

    Args:
        path: The checkpoint, for example ``runs/x/checkpoints/best.ckpt``, or a folder written by ``format=hub``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` is the first CUDA device, or the CPU if there is none.
        inference: Whole images if omitted.
        weights: ``teacher`` or ``student``, for a method with a teacher. Default: the teacher if there is one.

    Returns:
        The predictor, in eval mode on the device.

    Raises:
        UserError: If the file does not exist or is not a checkpoint of a training run, or there is no such device or
            teacher.

    Example:
        >>> load("runs/none/best.ckpt")
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected a checkpoint, but runs/none/best.ckpt does not exist; ...
    """
    return Predictor(restore(Path(path).expanduser(), weights).to(resolve_device(device)), inference)


def restore(path: Path, weights: Weights | None = None) -> MLPMatch:
    """Build the module that a checkpoint describes, with its weights, on the CPU, for prediction.

    It holds one network: the teacher if there is one, unless ``weights`` is ``student``. Its method is then
    ``supervised``; use `MLPMatch.load_from_checkpoint` to train it further.

    Raises:
        UserError: If the file does not exist, is broken or not a checkpoint of a training run, its arguments and
            weights do not match, it has no teacher and ``weights`` asks for it, or ``weights`` is something else.
    """
    if weights not in (None, *get_args(Weights)):
        raise UserError(f"expected weights as {' or '.join(get_args(Weights))}, or None, but got {weights!r}")
    if not path.exists():
        raise UserError(
            f"expected a checkpoint, but {path} does not exist; name a file such as checkpoints/best.ckpt in a run "
            "folder"
        )
    content = read_folder(path) if path.is_dir() else read_checkpoint(path)
    if own := content["hyper_parameters"].get("segmentor"):
        raise UserError(
            f"expected a network of this package, but {path} holds another one, {own}; build it, and use "
            "Predictor(MLPMatch.load_from_checkpoint(path, segmentor=network)) in Python"
        )
    types = get_type_hints(MLPMatch.__init__)
    try:
        # Without "pretrained", no other file is read and nothing is downloaded, whatever the arguments say. Nor does a
        # prediction need the optimizer's package.
        arguments = {
            key: validate(types[key], value, key)
            for key, value in content["hyper_parameters"].items()
            if key in types and key not in ("pretrained", "optimizer")
        }
        state = _one_network(content["state_dict"], weights)
        if len(state) < len(content["state_dict"]):
            arguments["method"] = "supervised"  # with one network, a method that needs a teacher cannot be built
        if len(state[_CLASSIFIER]) != arguments["num_classes"]:
            raise UserError(f"it has weights for {len(state[_CLASSIFIER])} classes")
        with torch.device("meta"):  # shapes without memory
            expected = MLPMatch(**arguments).state_dict()
        if different := sorted(state.keys() ^ expected.keys()):
            raise UserError(f"{len(different)} tensors are in only one of the two, the first is {different[0]}")
        for name, tensor in expected.items():
            if state[name].shape != tensor.shape:
                raise UserError(f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
        module = MLPMatch(**arguments)
        module.load_state_dict(state)
    except Exception as error:  # with arbitrary values the constructors raise nearly anything
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(
            f"expected a checkpoint whose arguments and weights match, but those of {path} do not ({reason}); name a "
            "file written by mlpmatch_pl.train"
        ) from error
    if weights == "teacher" and not any(name.startswith(TEACHER) for name in content["state_dict"]):
        raise UserError(f"expected a checkpoint with a teacher for weights=teacher, but {path} has none; omit weights")
    # 10 % faster on the CPU, where channels last saves conversions between layouts. Folding BatchNorm into the
    # convolutions gave 3 to 4 % more, and is not worth its code.
    return module.to(memory_format=torch.channels_last)


def _one_network(state: Mapping[str, Tensor], weights: Weights | None) -> dict[str, Tensor]:
    """Return the weights of the teacher or the student as those of the segmentor."""
    averaged = {name: tensor for name, tensor in state.items() if name.startswith(TEACHER)}
    kept = {name: tensor for name, tensor in state.items() if name not in averaged}
    if weights != "student":
        kept |= {STUDENT + name.removeprefix(TEACHER): tensor for name, tensor in averaged.items()}
    return kept


def resolve_device(device: str | torch.device) -> torch.device:
    """Return a device that exists; ``auto`` is the first CUDA device, or the CPU if there is none.

    Raises:
        UserError: If this machine does not have the device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"expected device as auto, or one that this machine has, but got {device} ({reason}); set device=auto"
        ) from error


def _from_pillow(image: PILImage.Image, in_chans: int) -> NDArray[Any]:
    """Return (H, W, channels): RGB if the network expects RGB, otherwise according to the image's mode."""
    if image.mode == "I":  # Pillow's mode for 16-bit gray in some files
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
