"""Write small images and masks."""

from pathlib import Path

import numpy as np
from PIL import Image

from mlpmatch_pl.utils.palette import default_palette


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def save_mask(path: Path, mask: np.ndarray, palette: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(np.array(default_palette(256), np.uint8).tobytes())  # L becomes P; ids stay
    image.save(path)
