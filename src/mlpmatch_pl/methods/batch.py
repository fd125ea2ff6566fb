"""Whether a training batch is what the method needs. Looks at names and shapes, which are known without the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.utils.errors import UserError

Form = tuple[int | str, ...]
"""A shape in which a letter stands for any number, the same wherever it stands."""
Shape = tuple[int, ...]

_MEND = "; build SemiSupervisedDataModule with the module's method, or see mlpmatch_pl.methods.step for the format"


def split_batch(batch: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the labeled and the unlabeled half of a batch; a half that is not there is empty.

    Raises:
        UserError: If the batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        raise UserError(f"expected a training batch of {{'labeled': ..., 'unlabeled': ...}}, but got a {kind}{_MEND}")
    return batch.get("labeled", {}), batch.get("unlabeled", {})


class BatchValidator:
    """Refuses batches that do not fit a method. A shape that was let through is not looked at again.

    Args:
        method: What the batches are for.
        channels: Channels of an image.

    Example:
        >>> import torch
        >>> from mlpmatch_pl.methods.method import resolve_method
        >>> form = BatchValidator(resolve_method("supervised"), channels=3)
        >>> form({"image": torch.zeros(2, 3, 9, 9), "mask": torch.zeros(2, 9, 9)}, {})
    """

    def __init__(self, method: Method, channels: int) -> None:
        self.method = method
        self.forms = _forms(len(method.strong_weights), method.partner == "same_image", channels)
        self._fitting: dict[str, Shape] | None = None

    def __call__(self, labeled: Mapping[str, Any], unlabeled: Mapping[str, Any]) -> None:
        """Look at a batch.

        Raises:
            UserError: For the first tensor that is missing or has another shape.
        """
        shapes = _shapes({"labeled": labeled, "unlabeled": unlabeled})
        if shapes == self._fitting:
            return
        if not self.method.uses_unlabeled and unlabeled:
            raise UserError(
                f"expected labeled images only for method {self.method.name}, but the batch has unlabeled ones, which "
                f"nothing would read{_MEND}"
            )
        sizes: dict[int | str, int] = {}
        for name, form in self.forms.items():
            wanted, shape = tuple(sizes.get(size, size) for size in form), shapes.get(name)
            if not _fits(shape, wanted):
                found = "there is none" if shape is None else f"got {_text(shape)}"
                raise UserError(
                    f"expected {name} of shape {_text(wanted)} in batches for method {self.method.name}, "
                    f"but {found}{_MEND}"
                )
            sizes |= dict(zip(form, shape or (), strict=True))
        self._fitting = shapes


def _forms(views: int, second_view: bool, channels: int) -> dict[str, Form]:
    """Name the tensors of a batch; B labeled and U unlabeled images of H x W pixels."""
    forms: dict[str, Form] = {"labeled.image": ("B", channels, "H", "W"), "labeled.mask": ("B", "H", "W")}
    if views:
        of_views: dict[str, Form] = {
            "weak": ("U", channels, "H", "W"),
            "strong": ("U", views, channels, "H", "W"),
            "valid": ("U", "H", "W"),
        }
        forms |= {f"unlabeled.{name}": form for name, form in of_views.items()}
        forms["unlabeled.boxes"] = ("U", views, 4)
        if second_view:
            forms |= {f"unlabeled.partner.{name}": form for name, form in of_views.items()}
    return forms


def _shapes(part: Mapping[str, Any], prefix: str = "") -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, value in part.items():
        if isinstance(value, Mapping):
            found |= _shapes(value, f"{prefix}{name}.")
        elif hasattr(value, "shape"):
            found[prefix + name] = tuple(value.shape)
    return found


def _fits(shape: Shape | None, wanted: Form) -> bool:
    return (
        shape is not None
        and len(shape) == len(wanted)
        and all(isinstance(size, str) or size == got for size, got in zip(wanted, shape, strict=True))
    )


def _text(form: Form | Shape) -> str:
    return f"({', '.join(map(str, form))})"
