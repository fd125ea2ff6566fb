"""Map-style datasets: a source and its views, as samples of tensors.

The training datasets are indexed by ``(index, draw)``, as `mlpmatch_pl.data.sampler.StreamSampler` yields it: the
image, and the number of the draw that seeds its views. The tensors' contract is in `mlpmatch_pl.methods.step`;
`mlpmatch_pl.data.bad_images` handles images that cannot be read.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlpmatch_pl.data.bad_images import Draw, Policy, raise_bad
from mlpmatch_pl.data.base import Image, ImageSource, require_classes, require_same_size
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.seeding import derive_seed


class Views(Dataset[dict[str, Any]], ABC):
    """Some images of a source, a sample for each draw.

    Args:
        source: Images.
        indices: Which of them.
        seed: Seed of all draws.
        on_bad_image: What is done about an image that cannot be read.
    """

    stream: str  # names the draws

    def __init__(self, source: ImageSource, indices: Sequence[int], seed: int, on_bad_image: Policy) -> None:
        self.source, self.indices, self.seed, self.on_bad_image = source, np.asarray(indices), seed, on_bad_image

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self.on_bad_image(self, draw)

    def name(self, place: int) -> str:
        """Return the name of an image."""
        return self.source.name(int(self.indices[place]))

    @abstractmethod
    def sample(self, place: int, number: int) -> dict[str, Any]:
        """Read an image and make the views of a draw."""


class LabeledDataset(Views):
    """Weak views of labeled images: ``image`` (channels, S, S), ``mask`` (S, S) uint8, and ``index``."""

    stream = "labeled"

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        num_classes: int,
        weak: WeakView,
        seed: int,
        on_bad_image: Policy = raise_bad,
    ) -> None:
        super().__init__(source, indices, seed, on_bad_image)
        self.num_classes, self.weak = num_classes, weak

    def sample(self, place: int, number: int) -> dict[str, Any]:
        """Read an image and its mask, and make the view of a draw."""
        index = int(self.indices[place])
        rng = random.Random(derive_seed(self.seed, self.stream, number))
        image, truth = self.source.image(index), self.source.mask(index)
        # Only a part of a large data set has been checked before; the device would fail without a name.
        name = self.source.name(index)
        require_same_size(image, truth, name)
        view, mask, _ = self.weak(image, truth, rng)
        require_classes(mask, name, self.num_classes, self.weak.ignore_index)
        return {"image": image_tensor(view), "mask": torch.from_numpy(mask), "index": index}


class UnlabeledDataset(Views):
    """Weak and strong views of unlabeled images; masks are never read.

    Args:
        source: Images.
        indices: Which of them.
        weak: The weak view.
        strong: The strong view, applied anew for each of them.
        cutmix: Draws the boxes.
        num_strong: Number of strong views.
        second_view: Whether a sample brings a second view of its image, as CutMix partner.
        seed: Seed of all draws.
        on_bad_image: What is done about an image that cannot be read.
    """

    stream = "unlabeled"

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        weak: WeakView,
        strong: StrongView,
        cutmix: CutMix,
        num_strong: int,
        second_view: bool,
        seed: int,
        on_bad_image: Policy = raise_bad,
    ) -> None:
        super().__init__(source, indices, seed, on_bad_image)
        self.weak, self.strong, self.cutmix = weak, strong, cutmix
        self.num_strong, self.second_view = num_strong, second_view

    def sample(self, place: int, number: int) -> dict[str, Any]:
        """Read an image, and make the views of a draw."""
        index = int(self.indices[place])
        rng = random.Random(derive_seed(self.seed, self.stream, number))
        image = self.source.image(index)
        sample: dict[str, Any] = self._views(image, rng)
        size = self.weak.crop_size
        sample["boxes"] = torch.tensor([self.cutmix.box(rng, size, size) for _ in range(self.num_strong)])
        sample["index"] = index
        if self.second_view:
            sample["partner"] = self._views(image, rng)
        return sample

    def _views(self, image: Image, rng: random.Random) -> dict[str, Tensor]:
        view, _, valid = self.weak(image, None, rng)
        return {
            "weak": image_tensor(view),
            "strong": torch.stack([image_tensor(self.strong(view, rng)) for _ in range(self.num_strong)]),
            "valid": torch.from_numpy(valid),
        }


class EvalDataset(Dataset[dict[str, Any]]):
    """Images at their own size with their masks, for evaluation: ``image``, ``mask`` and ``index``."""

    def __init__(self, source: ImageSource, num_classes: int, ignore_index: int) -> None:
        self.source, self.num_classes, self.ignore_index = source, num_classes, ignore_index

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = self.source.image(index), self.source.mask(index)
        require_same_size(image, mask, self.source.name(index))
        require_classes(mask, self.source.name(index), self.num_classes, self.ignore_index)
        return {"image": image_tensor(image), "mask": torch.from_numpy(mask.copy()), "index": index}


def image_tensor(image: Image) -> Tensor:
    """Turn (H, W, channels) into (channels, H, W): uint8, or int32 for 16 bits, as few operations know uint16."""
    pixels = image if image.dtype == np.uint8 else image.astype(np.int32)
    planes = np.empty((pixels.shape[2], *pixels.shape[:2]), pixels.dtype)
    cv2.split(pixels, list(planes))  # several times faster than numpy's transpose
    return torch.from_numpy(planes)
