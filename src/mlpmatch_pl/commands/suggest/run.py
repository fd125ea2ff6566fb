"""From unlabeled images to a list of those to label next, and a sheet of them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlpmatch_pl.commands.evaluate.dataset import check_compatible, open_run_dataset, run_folder_of
from mlpmatch_pl.commands.predict.outputs import write_file
from mlpmatch_pl.commands.suggest.selection import representatives
from mlpmatch_pl.data.base import ImageSource
from mlpmatch_pl.data.files import FileIndex, FileSource
from mlpmatch_pl.data.layout import find_layout
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.evaluation.sliding_window import SMALLEST
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.predictor import Predictor, load, resolve_device
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import refuse_overwrite
from mlpmatch_pl.utils.prefetch import ordered_map
from mlpmatch_pl.utils.progress import progress, say
from mlpmatch_pl.visualization.panels import contact_sheet, to_rgb

LIST, SHEET = "suggested.txt", "suggested.png"
LARGEST = 20_000  # images that are compared with each other; their similarities need 1.6 GB
SIDE = 1024  # longer side at which images are compared
THREADS, AHEAD = 4, 8  # that decode; images decoded before the one in the network


@dataclass(frozen=True)
class SuggestOptions:
    """The configuration of ``python -m mlpmatch_pl.suggest``.

    Attributes:
        input: A folder of images, laid out as for ``dataset=folder``; None for those of the checkpoint's run.
        checkpoint: Checkpoint of a training run; None for a pretrained encoder.
        dataset: Keys that replace those of the dataset of the checkpoint's run.
        count: How many images to suggest.
        output: Folder to write to.
        overwrite: Whether to replace existing files.
        device: See `mlpmatch_pl.predictor.load`.
        backbone: The pretrained encoder: ``name``, ``pretrained`` and other arguments of
            `mlpmatch_pl.segmentor.segmentor.Segmentor`.

    Raises:
        UserError: If the count is not positive, there are no images, or an encoder without weights is to compare them.
    """

    input: Path | None
    checkpoint: Path | None
    dataset: Mapping[str, Any] | None
    count: int
    output: Path
    overwrite: bool
    device: str
    backbone: dict[str, Any]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"expected count of at least 1, but got {self.count}")
        if self.input is None and self.checkpoint is None:
            raise UserError("expected input=FOLDER with images, or the checkpoint of a run, but got neither")
        if self.input is not None and self.dataset:
            raise UserError("expected input or changes of a run's dataset, but got both; omit one")
        if self.input is None and self.checkpoint and self.checkpoint.exists() and not run_folder_of(self.checkpoint):
            raise UserError(
                f"expected {self.checkpoint} in the folder of its run, whose images are meant, but there is no "
                "config.yaml; set input to a folder with images"
            )
        pretrained = self.backbone.get("pretrained")
        if self.checkpoint is None and (not pretrained or pretrained == "auto"):
            raise UserError(
                f"expected an encoder with weights to compare images, but got backbone.pretrained={pretrained}; set it "
                "to true or to a file of weights, or set checkpoint"
            )


class Pool(NamedTuple):
    """The images to choose from.

    Attributes:
        source: All images.
        labeled: Indices of those with labels.
        unlabeled: Indices of the others.
    """

    source: ImageSource
    labeled: Sequence[int]
    unlabeled: Sequence[int]


def run(options: SuggestOptions) -> list[str]:
    """Suggest images, and write their list and their sheet.

    Raises:
        UserError: Before anything is written.
    """
    if not options.overwrite:
        paths = (options.output / LIST, options.output / SHEET)
        refuse_overwrite(paths, "choose another output, or set overwrite=true")
    predictor = _predictor(options)
    pool = _pool(options, predictor)
    _require(options.count, len(pool.unlabeled), "have no labels")
    described = describe_images(predictor, pool.source, [*pool.labeled, *pool.unlabeled])
    _require(options.count, len(described.keys() - set(pool.labeled)), "have no labels and can be read")
    rows = {index: row for row, index in enumerate(described)}
    order = representatives(
        torch.stack([description.features_D for description in described.values()]),
        options.count,
        [rows[index] for index in pool.labeled if index in rows],
        # Without a checkpoint, predictions mean nothing.
        torch.tensor([one.entropy for one in described.values()]) if options.checkpoint else None,
    )
    suggested = [list(described)[row] for row in order]
    _write(options.output, pool.source, suggested)
    total, known = len(pool.labeled) + len(pool.unlabeled), len(pool.labeled)
    say(f"suggested {len(suggested):,} of {total:,} images ({known:,} with labels): {options.output / LIST}")
    return [pool.source.name(index) for index in suggested]


def _require(count: int, available: int, what: str) -> None:
    if available < count:
        raise UserError(f"expected at least count={count} images to choose from, but {available} {what}; lower count")


def _predictor(options: SuggestOptions) -> Predictor:
    if options.checkpoint:
        return load(options.checkpoint, options.device)
    backbone = dict(options.backbone)
    name = backbone.pop("name")
    module = MLPMatch(2, method="supervised", backbone=name, **backbone, decoder="linear")  # which is not used
    return Predictor(module.to(resolve_device(options.device)))


def _pool(options: SuggestOptions, predictor: Predictor) -> Pool:
    """Find the images; of very many, some."""
    if options.input is not None:
        pool = _folder(options.input, predictor)
    else:
        assert options.checkpoint is not None  # refused by the options
        data = open_run_dataset(options.checkpoint, options.dataset or {})
        check_compatible(predictor.module, data, options.checkpoint)
        pool = Pool(data.train, data.labeled_indices, data.unlabeled)
    room = max(LARGEST - len(pool.labeled), options.count)
    if len(pool.unlabeled) > room:
        say(f"{len(pool.unlabeled):,} unlabeled images are too many to compare; comparing {room:,} chosen at random")
        kept = torch.randperm(len(pool.unlabeled), generator=torch.Generator().manual_seed(0))[:room]
        pool = pool._replace(unlabeled=[pool.unlabeled[index] for index in sorted(kept.tolist())])
    return pool


def _folder(root: Path, predictor: Predictor) -> Pool:
    if not root.is_dir():
        raise UserError(f"expected input to be a folder with images, but {root} is none; correct it")
    images, masks = find_layout(root)
    images = images if (root / images).is_dir() else "."
    files = FileIndex([root], images, masks)
    pairs = [pair for pair in files.discover() if not _is_own_sheet(root / pair.image)]
    for note in files.notes:
        say(f"note: {note}")
    return Pool(
        FileSource(files.base, pairs, predictor.read_image, MaskReader()),
        [index for index, pair in enumerate(pairs) if pair.mask],
        [index for index, pair in enumerate(pairs) if not pair.mask],
    )


def _is_own_sheet(path: Path) -> bool:
    return path.name == SHEET and path.with_name(LIST).is_file()


class Description(NamedTuple):
    """What images are compared by.

    Attributes:
        features_D: The mean of the encoder's last feature map.
        entropy: Mean entropy of the class probabilities over the pixels, in nats.
    """

    features_D: Tensor
    entropy: float


@torch.inference_mode()
def describe_images(predictor: Predictor, source: ImageSource, indices: Sequence[int]) -> dict[int, Description]:
    """Describe all images that can be read, by their index; the others are named.

    Raises:
        UserError: If none can be read, for the reason of the first one.
    """
    segmentor, described, failures = predictor.module.segmentor, dict[int, Description](), list[UserError]()
    read = partial(_read, predictor, source)
    with progress("comparing", len(indices)) as advance:
        for index, image_CHW in zip(indices, ordered_map(read, indices, THREADS, AHEAD), strict=True):
            advance(1)
            if isinstance(image_CHW, UserError):
                failures.append(image_CHW)
                continue
            features = segmentor.encode(image_CHW[None].to(predictor.module.device))
            probability_CHW = segmentor.decode(features, image_CHW.shape[1:])[0].float().softmax(dim=0)
            entropy = torch.special.entr(probability_CHW).sum(dim=0).mean()
            described[index] = Description(features.levels[-1][0].float().mean(dim=(1, 2)).cpu(), entropy.item())
    if not described and failures:
        raise failures[0]
    for failure in failures:
        print(f"skipped: {failure}", file=sys.stderr)
    return described


def _read(predictor: Predictor, source: ImageSource, index: int) -> Tensor | UserError:
    """Read an image, with its longer side at most `SIDE`."""
    try:
        image_CHW = predictor.image_tensor(source.image(index))
    except UserError as error:
        return error
    factor = min(1, SIDE / max(image_CHW.shape[1:]))
    size = [max(round(side * factor), SMALLEST) for side in image_CHW.shape[1:]]
    if size == list(image_CHW.shape[1:]):
        return image_CHW
    return F.interpolate(image_CHW[None].float(), size, mode="bilinear", antialias=True)[0]


def _write(output: Path, source: ImageSource, suggested: Sequence[int]) -> None:
    def panels() -> Iterator[tuple[str, Any]]:
        for rank, index in enumerate(suggested, 1):
            yield f"{rank}  {source.name(index)}", to_rgb(source.image(index))

    line = getattr(source, "listing", source.name)  # a source without files has only names
    buffer = io.BytesIO()
    contact_sheet(panels()).save(buffer, format="PNG")
    write_file(output / SHEET, buffer.getvalue())
    write_file(output / LIST, "".join(f"{line(index)}\n" for index in suggested).encode("utf-8", "surrogateescape"))
