"""Map-style datasets: a source and its views, as samples of tensors.

The training datasets are indexed by ``(index, draw)``, as `mlpmatch_pl.data.sampler.StreamSampler` yields it: the
image, and the number of the draw that seeds its views. The tensors' contract is in `mlpmatch_pl.steps`.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlpmatch_pl.data.sources import Image, Source
from mlpmatch_pl.data.views import StrongView, WeakView
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.seeding import mix

Draw = tuple[int, int]


class LabeledViews(Dataset[dict[str, Tensor]]):
    """Weak views of labeled images: ``image`` (3, S, S) uint8 and ``mask`` (S, S) uint8."""

    def __init__(self, source: Source, indices: Sequence[int], weak: WeakView, seed: int) -> None:
        self.source, self.indices, self.weak, self.seed = source, np.asarray(indices), weak, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        index = int(self.indices[draw[0]])
        rng = random.Random(mix(self.seed, "labeled", draw[1]))
        view, mask, _ = self.weak(self.source.image(index), self.source.mask(index), rng)
        return {"image": image_tensor(view), "mask": torch.from_numpy(np.ascontiguousarray(mask))}


class UnlabeledViews(Dataset[dict[str, Any]]):
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
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        weak: WeakView,
        strong: StrongView,
        cutmix: CutMix,
        num_strong: int,
        second_view: bool,
        seed: int,
    ) -> None:
        self.source, self.indices, self.weak, self.strong = source, np.asarray(indices), weak, strong
        self.cutmix, self.num_strong, self.second_view, self.seed = cutmix, num_strong, second_view, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        index, seed = int(self.indices[draw[0]]), mix(self.seed, "unlabeled", draw[1])
        rng = random.Random(seed)
        self.strong.reseed(seed)
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
        view = np.ascontiguousarray(view)
        return {
            "weak": image_tensor(view),
            "strong": torch.stack([image_tensor(self.strong(view)) for _ in range(self.num_strong)]),
            "valid": torch.from_numpy(np.ascontiguousarray(valid)),
        }


class WholeImages(Dataset[dict[str, Any]]):
    """Images at their own size with their masks, for evaluation: ``image``, ``mask`` and ``index``."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = torch.from_numpy(np.ascontiguousarray(self.source.mask(index)))
        return {"image": image_tensor(self.source.image(index)), "mask": mask, "index": index}


def image_tensor(image: Image) -> Tensor:
    """Turn (H, W, 3) into (3, H, W), uint8."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
