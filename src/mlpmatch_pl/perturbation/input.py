"""Input perturbation of a batch: CutMix boxes and partners.

The weak and strong views are made per sample, in `mlpmatch_pl.data.transforms.weak` and `strong`.
"""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import derive_seed


@dataclass(frozen=True)
class CutMix:
    """Draws the boxes that images take from their partners. The defaults are UniMatch's.

    Args:
        p: Probability of a box.
        area: Range of the box's area, as a fraction of the image.
        ratio: Range of the box's height / width, drawn uniformly.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> y0, x0, y1, x1 = CutMix(p=1.0).box(random.Random(0), 100, 100)
        >>> 0 <= y0 < y1 <= 100 and 0 <= x0 < x1 <= 100
        True
        >>> CutMix(p=0.0).box(random.Random(0), 100, 100)
        (0, 0, 0, 0)
    """

    p: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise UserError(f"expected CutMix p between 0 and 1, but got {self.p}")
        if not 0 < self.area[0] <= self.area[1] <= 0.8:  # larger boxes rarely fit
            raise UserError(f"expected CutMix area as 0 < low <= high <= 0.8, but got {list(self.area)}")
        low, high = self.ratio
        if not 0 < low <= high or self.area[1] * low > 1 or self.area[1] / high > 1:
            raise UserError(
                f"expected CutMix ratios for which a box of area {self.area[1]} fits, but got {list(self.ratio)}"
            )

    def box(self, rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw (y0, x0, y1, x1) in pixels, with exclusive ends; all 0 for no box."""
        if rng.random() >= self.p:
            return 0, 0, 0, 0
        area = rng.uniform(*self.area) * height * width
        for attempt in itertools.count(1):  # until a box fits, as in the authors' code
            if attempt % 1000 == 0:  # a narrow image may have no room for a box of this area
                area /= 2
            ratio = rng.uniform(*self.ratio)
            box_width, box_height = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
            x0, y0 = rng.randrange(width), rng.randrange(height)
            if x0 + box_width <= width and y0 + box_height <= height:
                return y0, x0, y0 + box_height, x0 + box_width
        raise AssertionError("unreachable: attempts are endless")


def inside_boxes(boxes_B4: Tensor, height: int, width: int) -> Tensor:
    """Convert boxes to masks, without synchronizing with the device.

    Args:
        boxes_B4: Boxes (y0, x0, y1, x1) with exclusive ends, int64, (B, 4).
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        bool, (B, H, W): True inside the box.

    Example:
        >>> inside_boxes(torch.tensor([[0, 1, 2, 3]]), 3, 4).int().tolist()
        [[[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]]
    """
    y_H1 = torch.arange(height, device=boxes_B4.device)[:, None]
    x_1W = torch.arange(width, device=boxes_B4.device)[None, :]
    y0, x0, y1, x1 = boxes_B4[:, :, None, None].unbind(1)
    return (y_H1 >= y0) & (y_H1 < y1) & (x_1W >= x0) & (x_1W < x1)


def partner_shift(batch_size: int, seed: int, step: int) -> int:
    """Return the shift by which a batch is rolled to give every image a different one as its partner.

    Args:
        batch_size: Number of unlabeled images in the batch, at least 2.
        seed: Seed of all random draws.
        step: Training step.

    Returns:
        A shift from 1 to ``batch_size - 1``. Batches are shuffled, so rolling pairs images at random.

    Raises:
        UserError: If the batch has fewer than two images.

    Example:
        >>> partner_shift(2, seed=0, step=0)
        1
    """
    require_partner(batch_size)
    return random.Random(derive_seed(seed, "partner", step)).randrange(1, batch_size)


def require_partner(batch_size: int) -> None:
    """Check that a batch has a partner for every image.

    Args:
        batch_size: Number of unlabeled images in the batch.

    Raises:
        UserError: If the batch has fewer than two images.
    """
    if batch_size < 2:
        raise UserError(
            "expected at least 2 unlabeled images in a batch, so that CutMix has a different image as partner, "
            f"but got {batch_size}; raise loader.unlabeled_batch_size or use method.partner=same_image"
        )
