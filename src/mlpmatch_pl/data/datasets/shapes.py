"""Generated scenes of textured shapes that occlude each other. No files, no download.

A class has an outline, a pattern and a range of hues that overlaps those of its neighbors. The color, brightness and
direction of the light, the background and distracting lines vary from image to image, more than a few labeled scenes
show. Each image is a function of (seed, part, index), and equal on all machines.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.base import Image, Mask, SegmentationData
from mlpmatch_pl.data.splits import Choice, choose, is_path, read_split
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import derive_seed

CLASS_NAMES = ("background", "disk", "square", "triangle", "star", "cross")
PALETTE = ((40, 40, 40), (230, 80, 70), (70, 140, 230), (90, 190, 90), (240, 190, 60), (170, 90, 200))
MAX_SCENES, MAX_SIZE = 1_000_000, 4096  # scenes are drawn on demand and kept in memory
HUE_SPREAD = 0.09  # of the color circle; classes are 0.2 apart
Array = NDArray[Any]


class Shapes:
    """Generated scenes, see `mlpmatch_pl.data.base.ImageSource`.

    Args:
        part: Name of the part (train, val, test); each part has its own scenes.
        count: Number of images.
        size: Height and width in pixels.
        seed: Seed of all scenes.

    Example:
        >>> scenes = Shapes("train", count=2, size=64)
        >>> scenes.image(0).shape, scenes.mask(0).shape, int(scenes.mask(0).max()) < len(CLASS_NAMES)
        ((64, 64, 3), (64, 64), True)
    """

    def __init__(self, part: str, count: int, size: int = 64, seed: int = 0) -> None:
        self.part, self.count, self.size, self.seed = part, count, size, seed
        self._drawn: dict[int, tuple[Image, Mask]] = {}

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Return a name such as ``train_0007``."""
        return f"{self.part}_{index:04d}"

    def has_mask(self, index: int) -> bool:
        """Return True: all scenes have a mask."""
        return True

    def image(self, index: int) -> Image:
        """Draw a scene, uint8, (size, size, 3), RGB."""
        return self._scene(index)[0]

    def mask(self, index: int) -> Mask:
        """Draw the mask of a scene, uint8, (size, size)."""
        return self._scene(index)[1]

    def _scene(self, index: int) -> tuple[Image, Mask]:
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        return self._drawn[index]

    def _draw(self, index: int) -> tuple[Image, Mask]:
        rng = np.random.default_rng(derive_seed(self.seed, "shapes", self.part, index))
        pixels, mask = _background(rng, self.size), np.zeros((self.size, self.size), np.uint8)
        for _ in range(rng.integers(3, 7)):
            _add_object(rng, pixels, mask)
        pixels *= _light(rng, self.size)[..., None] * rng.uniform(0.65, 1.35, 3)
        pixels += rng.normal(0, 0.04, pixels.shape)
        return (pixels.clip(0, 1) * 255).astype(np.uint8), mask


def shapes(
    labeled: Choice = 20,
    train: int = 480,
    val: int = 60,
    test: int = 120,
    size: int = 64,
    split_seed: int = 0,
) -> SegmentationData:
    """Return the generated dataset.

    Args:
        labeled: Fraction, count or list file of the training images whose masks are used.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        size: Height and width in pixels, at least 33.
        split_seed: Seed of the choice of the labeled images.

    Raises:
        UserError: If a number is out of range.
    """
    if not all(1 <= count <= MAX_SCENES for count in (train, val, test)) or not 33 <= size <= MAX_SIZE:
        raise UserError(
            f"expected 1 to {MAX_SCENES:,} images per part of 33 to {MAX_SIZE} pixels, but got train={train}, "
            f"val={val}, test={test}, size={size}"
        )
    source = Shapes("train", train, size)
    names = [source.name(index) for index in range(train)]
    split = read_split(str(labeled), names) if is_path(labeled) else choose(names, labeled, split_seed)
    taken = set(split.names)
    return SegmentationData(
        class_names=CLASS_NAMES,
        train=source,
        labeled=split,
        unlabeled=tuple(index for index in range(train) if source.name(index) not in taken),
        val=Shapes("val", val, size),
        test=Shapes("test", test, size),
        palette=PALETTE,
    )


def _background(rng: np.random.Generator, size: int) -> Array:
    """Blend two colors with smooth noise, and draw lines that belong to the background."""
    coarse = rng.random((4, 4), dtype=np.float32)
    blend = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)[..., None].clip(0, 1)
    first, second = rng.random(3), rng.random(3)
    pixels = np.ascontiguousarray(blend * first + (1 - blend) * second, dtype=np.float32)
    for _ in range(rng.integers(4, 10)):
        start, end = (tuple(map(int, rng.integers(0, size, 2))) for _ in range(2))
        cv2.line(pixels, start, end, rng.random(3).tolist(), int(rng.integers(1, 3)))
    return pixels


def _light(rng: np.random.Generator, size: int) -> Array:
    """Return a brightness ramp across the image, in [0.5, 1.2]."""
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    ramp: Array = 0.85 + depth * (np.cos(angle) * x + np.sin(angle) * y)
    return ramp


def _add_object(rng: np.random.Generator, pixels: Array, mask: Mask) -> None:
    """Paint an object over the scene."""
    size = len(mask)
    label = int(rng.integers(1, len(CLASS_NAMES)))
    center, radius = rng.uniform(0.1 * size, 0.9 * size, 2), rng.uniform(0.14, 0.28) * size
    angle = rng.uniform(0, 2 * np.pi)
    inside = np.zeros_like(mask)
    points = OUTLINES[label - 1] @ _rotation(angle).T * radius + center
    cv2.fillPoly(inside, [points.round().astype(np.int32)], 1)
    pattern = PATTERNS[label - 1](*_pattern_axes(rng, size, center))[..., None]
    first, second = _colors(rng, label)
    where = inside.astype(bool)
    pixels[where] = (pattern * first + (1 - pattern) * second)[where]
    mask[where] = label


def _colors(rng: np.random.Generator, label: int) -> tuple[Array, Array]:
    """Draw a light and a dark color around the hue of the class."""
    hue = (label / (len(CLASS_NAMES) - 1) + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1
    light = colorsys.hsv_to_rgb(hue, rng.uniform(0.3, 0.9), rng.uniform(0.7, 1.0))
    dark = colorsys.hsv_to_rgb(hue, rng.uniform(0.3, 0.9), rng.uniform(0.15, 0.5))
    return np.array(light), np.array(dark)


def _rotation(angle: float) -> Array:
    matrix: Array = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return matrix


def _pattern_axes(rng: np.random.Generator, size: int, center: Array) -> tuple[Array, Array]:
    """Return rotated coordinates around the object, in periods of its pattern."""
    period = rng.uniform(0.11, 0.16) * size
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    rotation = _rotation(rng.uniform(0, 2 * np.pi)) / period
    x, y = x - center[0], y - center[1]
    return rotation[0, 0] * x + rotation[0, 1] * y, rotation[1, 0] * x + rotation[1, 1] * y


def _polygon(radii: Sequence[float], offset: float = 0.0) -> Array:
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False) + offset
    points: Array = np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]
    return points


_ARM = 0.36
OUTLINES: tuple[Array, ...] = (
    _polygon([1.0] * 40),
    _polygon([1.1] * 4),
    _polygon([1.25] * 3),
    _polygon([1.25, 0.5] * 5),
    np.array(
        [(1, _ARM), (_ARM, _ARM), (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
         (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM)]
    ) * 1.1,
)  # fmt: skip

PATTERNS: tuple[Callable[[Array, Array], Array], ...] = (
    lambda u, v: (np.hypot(u, v) % 1 < 0.5).astype(np.float32),  # disk: rings
    lambda u, v: ((np.floor(u * 1.5) + np.floor(v * 1.5)) % 2).astype(np.float32),  # square: checks
    lambda u, v: (u % 1 < 0.5).astype(np.float32),  # triangle: stripes
    lambda u, v: (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3).astype(np.float32),  # star: dots
    lambda u, v: ((u % 1 < 0.25) | (v % 1 < 0.25)).astype(np.float32),  # cross: grid
)
