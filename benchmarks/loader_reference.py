"""The published input pipeline in plain PIL and torchvision, as a baseline for speed and distributions.

PIL resizes, pads, crops and flips the whole image, torchvision jitters PIL images, and views are normalized float
tensors. A step loads two unlabeled samples: the views, and those that CutMix takes its boxes from. Draws come from the
global generators of Python and torch.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import ColorJitter, Compose, Normalize, RandomGrayscale, ToTensor

IGNORE, PADDING = 255, 254
JITTER, JITTER_P, GRAY_P, BLUR_SIGMA, BLUR_P = (0.5, 0.5, 0.5, 0.25), 0.8, 0.2, (0.1, 2.0), 0.5

to_tensor = Compose([ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
color_jitter, gray = ColorJitter(*JITTER), RandomGrayscale(GRAY_P)


def resize(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    width, height = image.size
    long_side = random.randint(int(max(width, height) * 0.5), int(max(width, height) * 2.0))
    if height > width:
        size = (int(width * long_side / height + 0.5), long_side)
    else:
        size = (long_side, int(height * long_side / width + 0.5))
    return image.resize(size, Image.Resampling.BILINEAR), mask.resize(size, Image.Resampling.NEAREST)


def crop(image: Image.Image, mask: Image.Image, size: int, fill: int) -> tuple[Image.Image, Image.Image]:
    border = (0, 0, max(size - image.width, 0), max(size - image.height, 0))
    image, mask = ImageOps.expand(image, border, fill=0), ImageOps.expand(mask, border, fill=fill)
    x, y = random.randint(0, image.width - size), random.randint(0, image.height - size)
    box = (x, y, x + size, y + size)
    return image.crop(box), mask.crop(box)


def flip(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    if random.random() < 0.5:
        return image, mask
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def weak_view(image: Image.Image, mask: Image.Image, size: int, fill: int) -> tuple[Image.Image, Image.Image]:
    return flip(*crop(*resize(image, mask), size, fill))


def strong_view(view: Image.Image) -> Image.Image:
    if random.random() < JITTER_P:
        view = color_jitter(view)
    view = gray(view)
    if random.random() < BLUR_P:
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_SIGMA)))
    return view


def cutmix_mask(size: int) -> torch.Tensor:
    """Draw a box, (size, size) with 1 inside and 0 outside."""
    mask = torch.zeros(size, size)
    if random.random() > 0.5:
        return mask
    area = random.uniform(0.02, 0.4) * size * size
    while True:
        ratio = random.uniform(0.3, 1 / 0.3)
        width, height = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
        x, y = random.randrange(size), random.randrange(size)
        if x + width <= size and y + height <= size:
            mask[y : y + height, x : x + width] = 1
            return mask


def read_image(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


class ReferenceLabeled(Dataset):
    def __init__(self, pairs: list[tuple[Path, Path]], size: int) -> None:
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        image, mask = (path for path in self.pairs[index])
        view, labels = weak_view(read_image(image), Image.fromarray(np.array(Image.open(mask))), self.size, IGNORE)
        return {"image": to_tensor(view), "mask": torch.from_numpy(np.array(labels)).long()}


class ReferenceUnlabeled(Dataset):
    """One of the two streams of unlabeled images; a step takes a sample of each.

    The published code reads the masks of unlabeled images and discards them; this one does not read them.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], size: int, num_strong: int = 2) -> None:
        self.pairs, self.size, self.num_strong = pairs, size, num_strong

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        image = read_image(self.pairs[index][0])
        view, labels = weak_view(image, Image.new("L", image.size), self.size, PADDING)
        return {
            "weak": to_tensor(view),
            "strong": [to_tensor(strong_view(view)) for _ in range(self.num_strong)],
            "boxes": [cutmix_mask(self.size) for _ in range(self.num_strong)],
            "ignore": torch.from_numpy(np.array(labels)).long() == PADDING,
        }
