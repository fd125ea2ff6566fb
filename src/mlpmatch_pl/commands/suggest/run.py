"""From a folder of images to a list of those to label next, and a picture of them."""

from __future__ import annotations

import io
import posixpath
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlpmatch_pl.commands.predict.outputs import ImageFile, find_images, write_file
from mlpmatch_pl.commands.suggest.selection import representatives
from mlpmatch_pl.evaluation.sliding_window import SMALLEST
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.predictor import Predictor, load, resolve_device
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import refuse_overwrite
from mlpmatch_pl.utils.prefetch import ordered_map
from mlpmatch_pl.utils.progress import progress, say
from mlpmatch_pl.visualization.panels import contact_sheet, to_rgb

LIST, PICTURE = "suggested.txt", "suggested.png"
LARGEST = 20_000  # images that are compared with each other; their similarities need 1.6 GB
SIDE = 1024  # longer side at which images are compared
THREADS, AHEAD = 4, 8  # that decode; images decoded before the one in the network


@dataclass(frozen=True)
class SuggestOptions:
    """The configuration of ``python -m mlpmatch_pl.suggest``.

    Attributes:
        input: A folder or a glob pattern.
        count: How many images to suggest.
        labeled: List files of images that have labels; None for those of the checkpoint's run.
        checkpoint: Checkpoint of a training run; None for an encoder with ImageNet weights.
        backbone: This encoder: ``name``, ``pretrained`` and other arguments of `mlpmatch_pl.segmentor.Segmentor`.
        output: Folder to write to.
        overwrite: Whether to replace existing files.
        device: See `mlpmatch_pl.predictor.load`.

    Raises:
        UserError: If the count is not positive, or an encoder without weights is to compare images.
    """

    input: Path
    count: int
    labeled: tuple[Path, ...] | Path | None
    checkpoint: Path | None
    backbone: dict[str, Any]
    output: Path
    overwrite: bool
    device: str

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"expected count of at least 1, but got {self.count}")
        pretrained = self.backbone.get("pretrained")
        if self.checkpoint is None and pretrained in (False, "auto"):
            raise UserError(
                f"expected weights to compare images with, but backbone.pretrained={str(pretrained).lower()} may leave "
                "the encoder without; set backbone.pretrained=true or a file of weights, or checkpoint"
            )

    def lists(self) -> list[Path]:
        """Return the list files of images with labels."""
        if self.labeled is None:
            folder = self.checkpoint.parent.parent if self.checkpoint else None
            return [path for path in (folder / "labeled.txt", folder / "val.txt") if path.is_file()] if folder else []
        return [self.labeled] if isinstance(self.labeled, Path) else list(self.labeled)


def run(options: SuggestOptions) -> list[Path]:
    """Suggest images, and write their list and picture.

    Raises:
        UserError: Before anything is written.
    """
    if not options.overwrite:
        paths = (options.output / LIST, options.output / PICTURE)
        refuse_overwrite(paths, "choose another output, or set overwrite=true")
    images = _at_most(LARGEST, find_images(str(options.input), options.output))
    labeled = find_listed(images, options.lists())
    if len(images) - len(labeled) < options.count:
        raise UserError(
            f"expected at least count={options.count} images without labels in {options.input}, but "
            f"{len(labeled)} of {len(images)} have labels; lower count, or name another input"
        )
    predictor = _predictor(options)
    described = describe_images(predictor, images)
    features_ND = torch.stack([description.features_D for description in described.values()])
    weights_N = torch.tensor([description.entropy for description in described.values()])
    rows = {image: row for row, image in enumerate(described)}
    order = representatives(
        features_ND,
        options.count,
        [rows[image] for image in labeled if image in rows],
        weights_N if options.checkpoint else None,  # without one, predictions mean nothing
    )
    suggested = [list(described)[row] for row in order]
    names = [f"{image.name}{image.path.suffix}" for image in suggested]
    shown = (to_rgb(predictor.read_image(image.path)) for image in suggested)
    panels = {f"{rank}  {name}": pixels for rank, (name, pixels) in enumerate(zip(names, shown, strict=True), 1)}
    write_file(options.output / LIST, "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))
    buffer = io.BytesIO()
    contact_sheet(panels).save(buffer, format="PNG")
    write_file(options.output / PICTURE, buffer.getvalue())
    known = f", of which {len(labeled):,} have labels" if labeled else ""
    say(f"{len(order)} of {len(images):,} images{known}: {options.output / LIST} and {options.output / PICTURE}")
    return [image.path for image in suggested]


def _at_most(count: int, images: list[ImageFile]) -> list[ImageFile]:
    if len(images) <= count:
        return images
    say(f"{len(images):,} images are too many to compare; {count:,} of them, chosen at random, are")
    kept = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return [images[index] for index in sorted(kept.tolist())]


def find_listed(images: Sequence[ImageFile], lists: Sequence[Path]) -> list[ImageFile]:
    """Return the images that list files name, by a path below any folder, with or without suffix.

    Raises:
        UserError: If a list does not exist, or names none of the images.
    """
    listed: set[str] = set()
    for path in lists:
        if not path.is_file():
            raise UserError(f"expected a list of images that have labels, but {path} does not exist; correct labeled")
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        names = {
            name for line in map(str.strip, lines) if line for name in (line, line.split("\t")[0], line.split()[0])
        }
        found = {name.replace("\\", "/").lstrip("/") for name in names}
        listed |= found | {posixpath.splitext(name)[0] for name in found}
    labeled = [image for image in images if not listed.isdisjoint(_spellings(image))]
    if lists and not labeled:
        raise UserError(
            f"expected images of input in {lists[0]}, but it names none of the {len(images)}; name the folder that the "
            "list was written for, or another list in labeled"
        )
    return labeled


def _spellings(image: ImageFile) -> Iterator[str]:
    """Yield the path of an image without suffix, from each of its folders on."""
    parts = image.path.resolve().with_suffix("").parts[1:]
    for first in range(len(parts)):
        yield "/".join(parts[first:])


def _predictor(options: SuggestOptions) -> Predictor:
    if options.checkpoint:
        return load(options.checkpoint, options.device)
    backbone = dict(options.backbone)
    name = backbone.pop("name")
    module = MLPMatch(2, method="supervised", backbone=name, **backbone, decoder="linear")  # which is not used
    return Predictor(module.to(resolve_device(options.device)))


class Description(NamedTuple):
    """What images are compared by.

    Attributes:
        features_D: The mean of the encoder's last feature map.
        entropy: Mean entropy of the class probabilities over the pixels, in nats.
    """

    features_D: Tensor
    entropy: float


@torch.inference_mode()
def describe_images(predictor: Predictor, images: Sequence[ImageFile]) -> dict[ImageFile, Description]:
    """Describe all images that can be read; the others are named."""
    segmentor, described = predictor.module.segmentor, {}
    with progress("comparing", len(images)) as advance:
        for image, pixels in zip(images, ordered_map(partial(_read, predictor), images, THREADS, AHEAD), strict=True):
            advance(1)
            if isinstance(pixels, UserError):
                print(f"skipped: {pixels}", file=sys.stderr)
                continue
            features = segmentor.encode(pixels[None].to(predictor.module.device))
            probability_CHW = segmentor.decode(features, pixels.shape[1:])[0].float().softmax(dim=0)
            entropy = torch.special.entr(probability_CHW).sum(dim=0).mean()
            described[image] = Description(features.levels[-1][0].float().mean(dim=(1, 2)).cpu(), entropy.item())
    return described


def _read(predictor: Predictor, image: ImageFile) -> Tensor | UserError:
    """Read an image, with its longer side at most `SIDE`."""
    try:
        image_CHW = predictor.image_tensor(image.path)
    except UserError as error:
        return error
    factor = min(1, SIDE / max(image_CHW.shape[1:]))
    size = [max(round(side * factor), SMALLEST) for side in image_CHW.shape[1:]]
    if size == list(image_CHW.shape[1:]):
        return image_CHW
    return F.interpolate(image_CHW[None].float(), size, mode="bilinear", antialias=True)[0]
