"""The batch contract: what a training batch must hold for a method. Checks names and shapes, never values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.utils.errors import UserError

Shape = tuple[int | str, ...]
"""Sizes of a tensor. A letter is any size, the same for every tensor of the batch."""

_HINT = "; build SemiSupervisedDataModule with the module's method, or see mlpmatch_pl.methods.step for the format"


def split_batch(batch: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the labeled and the unlabeled half of a batch; a missing half is empty.

    Raises:
        UserError: If the batch is not a mapping.
    """
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        raise UserError(f"expected a training batch of {{'labeled': ..., 'unlabeled': ...}}, but got a {kind}{_HINT}")
    return batch.get("labeled", {}), batch.get("unlabeled", {})


def image_and_mask(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and masks of an evaluation batch.

    Raises:
        UserError: If the batch is not a mapping with both.
    """
    if not isinstance(batch, Mapping) or not {"image", "mask"} <= batch.keys():
        kind = f"the keys {', '.join(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise UserError(
            f"expected an evaluation batch of {{'image': (B, C, H, W), 'mask': (B, H, W)}}, but got {kind}; let the "
            "dataset return dictionaries"
        )
    return batch["image"], batch["mask"]


def image_of(batch: Any) -> Tensor:
    """Return the images of a batch to predict: a tensor, the first of a tuple, or ``image`` of a mapping.

    Raises:
        UserError: If it is none of them.
    """
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    image = batch.get("image") if isinstance(batch, Mapping) else batch
    if not isinstance(image, Tensor) or image.ndim != 4:
        found = tuple(image.shape) if isinstance(image, Tensor) else f"a {type(batch).__name__}"
        raise UserError(f"expected images (B, C, H, W) to predict, or {{'image': ...}}, but got {found}")
    return image


class BatchValidator:
    """Checks that batches have the tensors that a method needs. Shapes equal to the last batch's are accepted at once.

    Args:
        method: The method that trains on the batches.
        channels: Number of image channels.

    Example:
        >>> import torch
        >>> from mlpmatch_pl.methods.method import resolve_method
        >>> validate = BatchValidator(resolve_method("supervised"), channels=3)
        >>> validate({"image": torch.zeros(2, 3, 9, 9), "mask": torch.zeros(2, 9, 9)}, {})
    """

    def __init__(self, method: Method, channels: int) -> None:
        self.method = method
        self.expected: dict[str, Shape] = {"labeled.image": ("B", channels, "H", "W"), "labeled.mask": ("B", "H", "W")}
        if method.uses_unlabeled:
            views = len(method.strong_weights)
            for prefix in ("unlabeled", "unlabeled.partner")[: 1 + (method.partner == "same_image")]:
                self.expected |= {
                    f"{prefix}.weak": ("U", channels, "H", "W"),
                    f"{prefix}.strong": ("U", views, channels, "H", "W"),
                    f"{prefix}.valid": ("U", "H", "W"),
                }
            self.expected["unlabeled.boxes"] = ("U", views, 4)
        self._accepted: dict[str, Shape] | None = None

    def __call__(self, labeled: Mapping[str, Any], unlabeled: Mapping[str, Any]) -> None:
        """Check both halves of a batch.

        Raises:
            UserError: For the first tensor that is missing or has a wrong shape.
        """
        shapes = _shapes({"labeled": labeled, "unlabeled": unlabeled})
        if shapes == self._accepted:
            return
        method = f"method {self.method.name}"
        if unlabeled and not self.method.uses_unlabeled:
            raise UserError(f"expected labeled images only for {method}, but the batch has unlabeled ones{_HINT}")
        sizes: dict[int | str, int | str] = {}
        for name, letters in self.expected.items():
            expected, found = tuple(sizes.get(size, size) for size in letters), shapes.get(name, ())
            if not _matches(found, expected):
                got = f"got {_text(found)}" if name in shapes else "it is missing"
                raise UserError(f"expected {name} of shape {_text(expected)} in batches for {method}, but {got}{_HINT}")
            sizes |= dict(zip(letters, found, strict=True))
        self._accepted = shapes


def require_image_values(image_BCHW: Tensor, mean_C11: Tensor) -> None:
    """Refuse floating-point images that are scaled to 0..1 or normalized, which the network would normalize again.

    Args:
        image_BCHW: Images.
        mean_C11: Mean of the network; with one of at most 1, images are expected to be scaled.

    Raises:
        UserError: With the dtype and range of the values.

    Example:
        >>> import torch
        >>> require_image_values(torch.rand(1, 3, 9, 9), torch.full((3, 1, 1), 120.0))
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected images with values as stored in files, such as 0 to 255, ...
    """
    if not image_BCHW.is_floating_point() or mean_C11.max() <= 1:
        return
    low, high = (value.item() for value in image_BCHW.aminmax())
    if low < 0 or 0 < high <= 1:
        dtype = str(image_BCHW.dtype).removeprefix("torch.")
        raise UserError(
            f"expected images with values as stored in files, such as 0 to 255, but the batch has {dtype} from "
            f"{low:.2f} to {high:.2f}; do not scale or normalize images, the network does"
        )


def require_mask_values(mask_BHW: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse masks with values that are neither classes nor the ignore index.

    Raises:
        UserError: With some of the values.

    Example:
        >>> import torch
        >>> require_mask_values(torch.tensor([[[0, 1, 7, 255]]]), 2, 255)
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected mask values 0..1 or 255 (ignore), but the batch has 7; ...
    """
    wrong_BHW = ((mask_BHW < 0) | (mask_BHW >= num_classes)) & (mask_BHW != ignore_index)
    if wrong_BHW.any():
        values = sorted(set(mask_BHW[wrong_BHW].tolist()))[:5]
        raise UserError(
            f"expected mask values 0..{num_classes - 1} or {ignore_index} (ignore), but the batch has "
            f"{', '.join(map(str, values))}; correct the masks, num_classes or ignore_index"
        )


def _shapes(part: Mapping[str, Any], prefix: str = "") -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, value in part.items():
        if isinstance(value, Mapping):
            shapes |= _shapes(value, f"{prefix}{name}.")
        elif hasattr(value, "shape"):
            shapes[prefix + name] = tuple(value.shape)
    return shapes


def _matches(shape: Shape, expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(size, str) or size == found for size, found in zip(expected, shape, strict=True)
    )


def _text(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"
