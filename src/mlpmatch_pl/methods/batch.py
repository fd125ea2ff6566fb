"""The batch contract: what a training batch must hold for a method. Checks names and shapes, never values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
