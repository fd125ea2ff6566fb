"""Images of a data set through the network: read ahead in threads, batched by size, counted on the device.

Letters: N images of the data set, B images of a batch, C classes, H and W pixels.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.evaluation.boundary import boundary_counts, boundary_width
from mlpmatch_pl.evaluation.confusion import image_confusion_matrices
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference, predict_logits
from mlpmatch_pl.utils.cpu import reader_threads
from mlpmatch_pl.utils.errors import UserError

BATCH_PIXELS = 2_000_000  # of a batch, where its size is not given: ten images of VOC, one of Cityscapes
WAITING_PIXELS = 32_000_000  # of images that wait for others of their size: 128 MB with their masks
Sample = dict[str, Any]  # of `EvalDataset`


@dataclass(frozen=True)
class Counts:
    """What is counted over a data set.

    Attributes:
        confusion_CC: Confusion matrix, int64, on the CPU like the rest.
        boundary_3C: See `mlpmatch_pl.evaluation.boundary.boundary_counts`; None where it was not asked for.
        miou_N: Each image's mean IoU over the classes in its truth or prediction, (N,); NaN where nothing counts.
    """

    confusion_CC: Tensor
    boundary_3C: Tensor | None
    miou_N: Tensor


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a segmentor on a data set, with the same result for any batch size and number of workers.

    Args:
        inference: How probabilities are inferred.
        boundary: Distance of the boundary IoU, as a share of the diagonal; None for none.
        batch_size: Images of one size in a pass; as many as have 2 megapixels together on a GPU, and 1 on a CPU, if
            left out.
        num_workers: Threads that read; the cores that this process may use, up to 8, if left out; 0 for none.

    Raises:
        UserError: If a number is out of range.

    Example:
        >>> from mlpmatch_pl import Segmentor
        >>> from mlpmatch_pl.data.datasets.shapes import Shapes
        >>> segmentor = Segmentor(6, "test_resnet", decoder_channels=8).eval()
        >>> images = EvalDataset(Shapes("test", count=3), 6, 255)
        >>> counts = Evaluator(batch_size=2, num_workers=0)(segmentor, images)
        >>> int(counts.confusion_CC.sum()) == 3 * 64 * 64, counts.boundary_3C is None, counts.miou_N.shape
        (True, True, torch.Size([3]))
    """

    inference: SlidingWindowInference = field(default_factory=SlidingWindowInference)
    boundary: float | None = None
    batch_size: int | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("num_workers", self.num_workers, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UserError(f"expected {name} as a whole number from {least}, or null, but got {value!r}")
        if self.boundary is not None:
            boundary_width(1, 1, self.boundary)  # refuses a distance that is none

    @torch.no_grad()
    def __call__(
        self, segmentor: nn.Module, images: EvalDataset, on_batch: Callable[[int], Any] = lambda count: None
    ) -> Counts:
        """Evaluate.

        Args:
            segmentor: Maps images to logits; in eval mode, on the device to use.
            images: The data set.
            on_batch: Told the number of images that are done, after each batch.
        """
        device = next(segmentor.parameters()).device
        tally = _Tally(len(images), images.num_classes, self.boundary, device)
        # On a CPU larger batches are slower: measured, their activations leave its cache.
        batch_size = self.batch_size or (1 if device.type == "cpu" else None)
        for batch in same_size_batches(read_ahead(images, self._workers()), batch_size):
            image_BCHW, mask_BHW = (_stacked(batch, key, device) for key in ("image", "mask"))
            tally.add([sample["index"] for sample in batch], self.label(segmentor, image_BCHW), mask_BHW)
            on_batch(len(batch))
        return tally.counts()

    def label(self, segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
        """Return the class of every pixel, (B, H, W)."""
        if (
            self.inference == SlidingWindowInference()
        ):  # nothing is averaged: logits have the same order, without softmax
            return predict_logits(segmentor, image_BCHW).argmax(dim=1)
        return self.inference(segmentor, image_BCHW).argmax(dim=1)

    def _workers(self) -> int:
        return reader_threads() if self.num_workers is None else self.num_workers


class _Tally:
    """Sums on the device; CUDA waits once a batch, where it counts."""

    def __init__(self, count: int, num_classes: int, boundary: float | None, device: torch.device) -> None:
        self.num_classes, self.boundary = num_classes, boundary
        self.confusion_CC = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
        self.boundary_3C = torch.zeros(3, num_classes, dtype=torch.long, device=device)
        self.miou_N = torch.full((count,), torch.nan)
        self._parts: list[tuple[list[int], Tensor]] = []

    def add(self, indices: list[int], label_BHW: Tensor, mask_BHW: Tensor) -> None:
        matrices_BCC = image_confusion_matrices(label_BHW, mask_BHW, self.num_classes)
        self.confusion_CC += matrices_BCC.sum(0)
        self._parts.append((indices, _image_miou(matrices_BCC)))
        if self.boundary is not None:
            self.boundary_3C += boundary_counts(label_BHW, mask_BHW, self.num_classes, self.boundary)

    def counts(self) -> Counts:
        for indices, miou_B in self._parts:
            self.miou_N[indices] = miou_B.cpu()
        boundary_3C = None if self.boundary is None else self.boundary_3C.cpu()
        return Counts(self.confusion_CC.cpu(), boundary_3C, self.miou_N)


def read_ahead(images: EvalDataset, num_workers: int) -> Iterator[Sample]:
    """Read images in order, some ahead, in threads: decoding releases the interpreter's lock.

    Args:
        images: The data set.
        num_workers: Threads; with 0, each image is read when it is asked for.
    """
    if not num_workers:
        yield from (images[index] for index in range(len(images)))
        return
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque[Future[Sample]] = deque()
        try:
            for index in range(len(images)):
                pending.append(pool.submit(images.__getitem__, index))
                if len(pending) > 4 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # where an image cannot be read
                future.cancel()


def same_size_batches(samples: Iterable[Sample], batch_size: int | None) -> Iterator[list[Sample]]:
    """Group samples by the size of their images.

    A batch is given out when it is full, the one with the most pixels also when too many wait, and the rest at the end.

    Args:
        samples: With ``image`` (channels, H, W).
        batch_size: Samples of a batch; as many as have 2 megapixels together, if None.

    Example:
        >>> samples = [{"image": torch.zeros(3, height, 8)} for height in (5, 6, 5, 5)]
        >>> [[sample["image"].shape[1] for sample in batch] for batch in same_size_batches(samples, 2)]
        [[5, 5], [6], [5]]
    """
    waiting: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    pixels = 0
    for sample in samples:
        height, width = sample["image"].shape[1:]
        waiting[height, width].append(sample)
        pixels += height * width
        full = len(waiting[height, width]) >= (batch_size or max(BATCH_PIXELS // (height * width), 1))
        if full or pixels > WAITING_PIXELS:
            size = (height, width) if full else max(waiting, key=lambda size: len(waiting[size]) * size[0] * size[1])
            batch = waiting.pop(size)
            pixels -= len(batch) * size[0] * size[1]
            yield batch
    yield from waiting.values()


def _stacked(batch: list[Sample], key: str, device: torch.device) -> Tensor:
    stacked = torch.stack([sample[key] for sample in batch])
    return stacked.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else stacked.to(device)


def _image_miou(matrices_BCC: Tensor) -> Tensor:
    hit_BC = matrices_BCC.diagonal(dim1=1, dim2=2)
    truth_BC, predicted_BC = matrices_BCC.sum(2), matrices_BCC.sum(1)
    return (hit_BC / (truth_BC + predicted_BC - hit_BC)).nanmean(dim=1)
