"""Map-style datasets: the views of an image source as samples of tensors.

Training datasets are indexed by ``(position, draw)`` as `mlpmatch_pl.data.sampler.StreamSampler` yields it: the
position of the image in the dataset, and the number of the draw, which seeds the views. The tensors are described in
`mlpmatch_pl.methods.step`.
"""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mlpmatch_pl.data.base import Image, ImageSource, require_classes, require_same_size, transparent_pixels
from mlpmatch_pl.data.readers.windows import Window
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.evaluation.sliding_window import Block, SlidingWindowInference
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import derive_seed

MAX_TRIES = 20  # if half of all files were missing, one draw in a million would find none
Sample = dict[str, Any]
OnBadImage = Literal["raise", "skip"]

log = logging.getLogger(__name__)


class TrainDataset(Dataset[Sample | None], ABC):
    """Some images of a source; one sample for each draw.

    Files are validated before training, but disks fail and files change during a run. With ``skip``, a sample whose
    image or mask cannot be read is replaced by another one, which depends on the seed and the draw only. The sample
    then lists the names of the bad images, each with an error message, under ``skipped``.

    Args:
        source: Images.
        indices: Which of them.
        seed: Seed of all draws.
        on_bad_image: ``raise`` or ``skip``.

    It is indexed by pairs of a position and the number of a draw, which seeds the views; a position alone is draw 0.

    Raises:
        UserError: When indexed, for an image that cannot be read, or with ``skip``, if 20 in a row cannot be read.
    """

    stream: str  # separates the draws of the datasets

    def __init__(self, source: ImageSource, indices: Sequence[int], seed: int, on_bad_image: OnBadImage) -> None:
        self.source, self.indices, self.seed, self.on_bad_image = source, np.asarray(indices), seed, on_bad_image

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int | None, int] | int) -> Sample | None:
        drawn, draw = item if isinstance(item, tuple) else (item, 0)
        if drawn is None:  # not used during burn-in, or after it
            return None
        skipped: list[tuple[str, str]] = []
        for position in self._candidates(drawn, draw):
            index = int(self.indices[position])
            try:
                sample = self.sample(index, draw)
            except (UserError, OSError) as error:
                name = self.source.name(index)
                # The error of a custom source need not name the image.
                known = isinstance(error, UserError)
                problem = str(error) if known else f"cannot read {name} ({error}); replace or remove it"
                if self.on_bad_image == "raise":
                    joint = ", or" if ";" in problem else ";"
                    raise UserError(f"{problem}{joint} set loader.on_bad_image=skip to train without it") from error
                skipped.append((name, problem))
            else:
                return {**sample, "skipped": skipped} if skipped else sample
        raise UserError(
            f"expected readable {self.stream} images, but {len(skipped)} of {len(self)} drawn in a row cannot be read "
            f"({skipped[-1][1]}); check that the data folder still exists"
        )

    @abstractmethod
    def sample(self, index: int, draw: int) -> Sample:
        """Read an image of the source and make the views of a draw."""

    def _candidates(self, position: int, draw: int) -> Iterator[int]:
        """Yield the position, and then its replacements."""
        yield position
        rng = random.Random(derive_seed(self.seed, self.stream, "replacement", draw))
        others = rng.sample(range(len(self)), min(MAX_TRIES, len(self)))
        yield from [other for other in others if other != position][: MAX_TRIES - 1]


class LabeledDataset(TrainDataset):
    """Weak views of labeled images: ``image`` (channels, S, S), ``mask`` (S, S) uint8, and ``index``."""

    stream = "labeled"

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        num_classes: int,
        weak: WeakView,
        seed: int,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(source, indices, seed, on_bad_image)
        self.num_classes, self.weak = num_classes, weak

    def sample(self, index: int, draw: int) -> Sample:
        """Read an image and its mask, and make the view of a draw."""
        rng = random.Random(derive_seed(self.seed, self.stream, draw))
        image, mask = self.source.image(index), self.source.mask(index)
        name = self.source.name(index)
        require_same_size(image, mask, self.source, index)
        view, mask, _ = self.weak(image, mask, rng)
        # The loss on a GPU would fail without a file name.
        require_classes(mask, name, self.num_classes, self.weak.ignore_index)
        return {"image": image_tensor(view), "mask": torch.from_numpy(mask), "index": index}


class UnlabeledDataset(TrainDataset):
    """Weak and strong views of unlabeled images; masks are never read.

    A sample has ``weak`` (channels, S, S), ``strong`` (``num_strong``, channels, S, S), ``valid`` (S, S), ``boxes``
    (``num_strong``, 4) and ``index``.

    Args:
        source: Images.
        indices: Which of them.
        weak: The weak view.
        strong: The strong view, applied ``num_strong`` times to the weak one.
        cutmix: Draws the boxes.
        num_strong: Number of strong views.
        second_view: Whether a sample contains a second view of its image, under ``partner``, to paste from.
        seed: Seed of all draws.
        on_bad_image: ``raise`` or ``skip``, see `TrainDataset`.
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
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(source, indices, seed, on_bad_image)
        self.weak, self.strong, self.cutmix = weak, strong, cutmix
        self.num_strong, self.second_view = num_strong, second_view

    def sample(self, index: int, draw: int) -> Sample:
        """Read an image and make the views of a draw."""
        rng = random.Random(derive_seed(self.seed, self.stream, draw))
        image, hidden = self.source.image(index), transparent_pixels(self.source, index)
        sample: Sample = self._views(image, hidden, rng)
        size = self.weak.crop_size
        sample["boxes"] = torch.tensor([self.cutmix.box(rng, size, size) for _ in range(self.num_strong)])
        sample["index"] = index
        if self.second_view:
            sample["partner"] = self._views(image, hidden, rng)
        return sample

    def _views(self, image: Image, hidden: NDArray[np.bool_] | None, rng: random.Random) -> Sample:
        view, hidden_view, valid = self.weak(image, None if hidden is None else hidden.astype(np.uint8), rng)
        if hidden is not None:  # transparent pixels get no pseudo-labels
            valid &= hidden_view == 0
        return {
            "weak": image_tensor(view),
            "strong": torch.stack([image_tensor(self.strong(view, rng)) for _ in range(self.num_strong)]),
            "valid": torch.from_numpy(valid),
        }


class EvalDataset(Dataset[Sample]):
    """Images at their own size with their masks, for evaluation: ``image``, ``mask`` and ``index``.

    Args:
        source: Images.
        num_classes: Number of classes.
        ignore_index: Mask value of ignored pixels.
        inference: How they are inferred. With sliding windows, a large TIFF file is as many samples as it has blocks,
            see `SlidingWindowInference.blocks`: ``image`` is what the windows cover, ``mask`` that of the block, and
            ``inner`` where the block lies in the image.

    Attributes:
        samples: Index of the image of each sample, and its size and block if it is one.
    """

    def __init__(
        self, source: ImageSource, num_classes: int, ignore_index: int, inference: SlidingWindowInference | None = None
    ) -> None:
        self.source, self.num_classes, self.ignore_index = source, num_classes, ignore_index
        self.samples: list[tuple[int, tuple[int, int], Block | None]] = []
        tiff_size = getattr(source, "tiff_size", None) if inference and inference.window else None
        for index in range(len(source)):
            size: tuple[int, int] = (tiff_size and tiff_size(index)) or (0, 0)
            blocks: Sequence[Block | None] = inference.blocks(*size) if inference else []
            self.samples += [(index, size, block) for block in blocks or [None]]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Sample:
        index, size, block = self.samples[position]
        name = self.source.name(index)
        if block is None:
            image, mask, inner = self.source.image(index), self.source.mask(index), {}
            require_same_size(image, mask, self.source, index)
        else:
            source: Any = self.source  # reads windows
            image = source.image(index, Window(block.read_rows, block.read_columns, size))
            mask = source.mask(index, Window(block.rows, block.columns, size))
            inner = {"inner": torch.tensor(block.inner)}
        require_classes(mask, name, self.num_classes, self.ignore_index)
        return {"image": image_tensor(image), "mask": torch.from_numpy(mask.copy()), "index": index, **inner}


class SkippedImages:
    """Counts the samples that were replaced because their image or mask could not be read.

    Attributes:
        counts: Number of replaced samples by the name of the bad image.

    Example:
        >>> skipped = SkippedImages()
        >>> skipped.pop_from({"image": 0, "skipped": [("a.png", "cannot read a.png"), ("a.png", "cannot read a.png")]})
        {'image': 0}
        >>> skipped.counts
        Counter({'a.png': 2})
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pop_from(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the entries of a batch, log each image once, and return the batch without them."""
        for name, problem in batch.get("skipped", ()):
            if name not in self.counts:
                log.warning("skipped (loader.on_bad_image=skip): %s", problem)
            self.counts[name] += 1
        return {key: value for key, value in batch.items() if key != "skipped"}

    def report(self) -> dict[str, int]:
        """Return the number of replaced samples and of bad images over all processes; log them if there are any."""
        gathered = [self.counts]
        if torch.distributed.is_initialized():
            gathered *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, self.counts)
        counts = sum(gathered, Counter[str]())
        if counts:
            names = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
            log.warning("%d samples were replaced because of bad images: %s", counts.total(), names)
        return {"draws": counts.total(), "images": len(counts)}


def collate(samples: list[Sample | None]) -> Sample:
    """Collate samples as PyTorch does, and collect the bad images that they replace, if any; draws left out are None.

    Returns:
        The batch; empty if all draws were left out.
    """
    loaded = [sample for sample in samples if sample is not None]
    skipped = [entry for sample in loaded for entry in sample.pop("skipped", ())]
    batch: Sample = default_collate(loaded) if loaded else {}
    return {**batch, "skipped": skipped} if skipped else batch


def image_tensor(image: Image) -> Tensor:
    """Turn (H, W, channels) into (channels, H, W): uint8, or int32 for 16 bits, as few operations support uint16."""
    pixels = image if image.dtype == np.uint8 else image.astype(np.int32)
    planes = np.empty((pixels.shape[2], *pixels.shape[:2]), pixels.dtype)
    cv2.split(pixels, list(planes))  # several times faster than numpy's transpose
    return torch.from_numpy(planes)
