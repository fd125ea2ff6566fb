"""Image files to load: a folder in VOC's layout, or images of Cityscapes' size made from it."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 2048, 1024
PNG_BYTES = (2.0e6, 2.6e6)  # size of most files of Cityscapes
NOISE = (0.5, 0.75, 1.0, 1.5, 2.0, 2.5)  # standard deviations to try, in gray levels
CLASSES = 19

Pair = tuple[Path, Path]


def voc_pairs(root: Path, count: int) -> list[Pair]:
    """Return the first pairs of a folder with JPEGImages and SegmentationClass."""
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    pairs = [(path, masks / f"{path.stem}.png") for path in sorted(images.glob("*.jpg"))]
    found = [pair for pair in pairs if pair[1].is_file()][:count]
    if not found:
        raise SystemExit(f"expected pairs of images and masks in {images} and {masks}, but found none; set --root")
    return found


def make_cityscapes_pairs(photos: list[Pair], folder: Path, count: int) -> list[Pair]:
    """Enlarge photos to 2048 x 1024 and add sensor noise until the PNG files are as large as those of Cityscapes."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    pairs: list[Pair] = []
    for number, (image, mask) in enumerate(photos):
        pixels, labels = np.asarray(Image.open(image).convert("RGB")), np.asarray(Image.open(mask))
        height = pixels.shape[1] // 2  # crop to the aspect ratio of Cityscapes
        if height > len(pixels) or (content := encode(enlarge(pixels[:height]), number)) is None:
            continue
        pair = (folder / "images" / f"{number:04d}.png", folder / "masks" / f"{number:04d}.png")
        pair[0].write_bytes(content)
        ids = np.where(labels == 255, 255, labels % CLASSES).astype(np.uint8)[:height]
        Image.fromarray(cv2.resize(ids, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST_EXACT)).save(pair[1])
        pairs.append(pair)
        if len(pairs) == count:
            return pairs
    raise SystemExit(f"expected {count} photos to make images of Cityscapes' size from, but found {len(pairs)}")


def enlarge(pixels: np.ndarray) -> np.ndarray:
    large = cv2.resize(pixels.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(large, (0, 0), 1.5)  # hides JPEG blocks


def encode(pixels: np.ndarray, seed: int) -> bytes | None:
    """Return a PNG file of the size of Cityscapes' files, or None if no amount of noise gives one."""
    noise = np.random.default_rng(seed).standard_normal((HEIGHT, WIDTH, 1), np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 0.8)  # noise of neighboring pixels is correlated
    noise = noise[..., None] / noise.std()
    for deviation in NOISE:
        file = io.BytesIO()
        Image.fromarray(np.rint(pixels + deviation * noise).clip(0, 255).astype(np.uint8)).save(file, "PNG")
        if PNG_BYTES[0] <= len(file.getvalue()) <= PNG_BYTES[1]:
            return file.getvalue()
    return None
