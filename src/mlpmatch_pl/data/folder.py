"""Images and masks in folders or list files: one's own data, without writing a class.

    root/images/**/a.jpg     root/masks/**/a.png      paired by relative path without suffix

or list files with a line ``image mask`` (or just ``image``) each, relative to root, as UniMatch publishes them.
Masks are single-channel or palette images of class ids. Unlabeled images need no mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image as PILImage

from mlpmatch_pl.data.sources import Image, Mask, SegmentationData, class_list
from mlpmatch_pl.data.splits import Split, choose, is_list_file
from mlpmatch_pl.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
Choice = str | int | float


@dataclass(frozen=True)
class Pair:
    """An image and its mask, if it has one, as paths relative to the root."""

    image: str
    mask: str | None


class FolderSource:
    """Pairs of files below a root, see `mlpmatch_pl.data.sources.Source`."""

    def __init__(self, root: Path, pairs: Sequence[Pair]) -> None:
        self.root, self.pairs = root, tuple(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Return the image's path relative to the root."""
        return self.pairs[index].image

    def image(self, index: int) -> Image:
        """Read an image as RGB, turned as its EXIF tag says."""
        path = self.root / self.pairs[index].image
        try:  # cv2.imread cannot open every unicode path
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise UserError(f"cannot read the image {path} ({error.strerror}); replace or remove it") from error
        pixels = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
        if pixels is None:
            raise UserError(f"cannot read the image {path}: it is broken or no image; replace or remove it")
        image: Image = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        return image

    def mask(self, index: int) -> Mask:
        """Read a mask of class ids; palette indices stay indices."""
        relative = self.pairs[index].mask
        if relative is None:
            raise UserError(f"expected a mask for the image {self.name(index)}, but it has none")
        path = self.root / relative
        try:
            with PILImage.open(path) as file:
                ids = np.array(file)  # a copy: PIL's own memory is read-only
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"cannot read the mask {path} ({error}); replace or remove it") from error
        if ids.ndim != 2:
            raise UserError(
                f"expected a mask with one channel of class ids, but {path} has {ids.shape[2]} channels (mode "
                f"{file.mode}); save class ids as a grey or palette PNG"
            )
        if ids.dtype != np.uint8:  # 1-bit and 16-bit files
            if ids.dtype.kind not in "biu":
                raise UserError(f"expected whole class ids, but {path} holds {ids.dtype} values; save it as a grey PNG")
            if ids.min() < 0 or ids.max() > 255:
                raise UserError(f"expected class ids from 0 to 255, but {path} has the value {ids.max()}")
            ids = ids.astype(np.uint8)
        return ids


def folder(
    root: str,
    classes: Sequence[str],
    images: str = "images",
    masks: str = "masks",
    train: str | None = None,
    labeled: Choice | None = None,
    unlabeled: str | None = None,
    val: Choice = 0.2,
    test: str | None = None,
    ignore_index: int = 255,
    palette: Sequence[Sequence[int]] | None = None,
    split_seed: int = 0,
) -> SegmentationData:
    """Describe a data set of files.

    Args:
        root: The folder that everything else is relative to.
        classes: Class names in the order of the mask values, background included.
        images: Folder with the images, with any sub-folders.
        masks: Folder with the masks.
        train: List file of the training images, labeled or not; every image that is not in val or test if left out.
        labeled: Fraction (``1/8``), count (``20``) or list file of the images whose masks are used; all that have a
            mask if left out.
        unlabeled: List file of images without masks; the rest of the training images if left out.
        val: Fraction or count of the images with masks, or a list file.
        test: List file to report on.
        ignore_index: Mask value of pixels that do not count.
        palette: An RGB colour for each class, for pictures.
        split_seed: Seed of choices by fraction or count.

    Raises:
        UserError: If a folder, file, list or choice is wrong. Files' contents are checked by `checks`.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(
            f"expected dataset.root to be a folder, but {base} does not exist; set dataset.root=/path/to/data"
        )
    if palette is not None and len(palette) != len(classes):
        raise UserError(f"expected {len(classes)} colours in dataset.palette, one a class, but got {len(palette)}")
    names = class_list(classes, ignore_index)
    files = Files(base, images, masks)
    test_pairs = files.with_masks(files.read_list(test), {}) if test else []
    train_pairs, val_pairs = _hold_out(files, train, labeled, unlabeled, val, test_pairs, split_seed)
    held_out = {pair.image for pair in (*val_pairs, *test_pairs)}
    train_pairs, split, rest = _select(files, train_pairs, labeled, unlabeled, split_seed, held_out)
    _refuse_overlap(split.names, val_pairs, "validation")
    _refuse_overlap(split.names, test_pairs, "test")
    return SegmentationData(
        class_names=names,
        train=FolderSource(base, train_pairs),
        labeled=split,
        unlabeled=rest,
        val=FolderSource(base, val_pairs),
        test=FolderSource(base, test_pairs) if test_pairs else None,
        ignore_index=ignore_index,
        palette=tuple((int(r), int(g), int(b)) for r, g, b in palette or ()),
    )


def _hold_out(
    files: Files,
    train: str | None,
    labeled: Choice | None,
    unlabeled: str | None,
    val: Choice,
    test: list[Pair],
    seed: int,
) -> tuple[list[Pair], list[Pair]]:
    """Return training and validation pairs; the former may still lack those of the labeled and unlabeled lists."""
    if train:
        pairs = files.read_list(train)
    elif is_list_file(labeled) and unlabeled:
        pairs = []  # the two lists are the training set
    else:
        tested = {pair.image for pair in test}
        pairs = [pair for pair in files.discover() if pair.image not in tested]
    if is_list_file(val):
        val_pairs = files.with_masks(files.read_list(str(val)), {})
        listed = {pair.image for pair in val_pairs}
        return (pairs if train else [pair for pair in pairs if pair.image not in listed]), val_pairs
    fixed = {pair.image for pair in files.read_list(str(labeled))} if is_list_file(labeled) else set()
    candidates = [pair.image for pair in pairs if pair.mask and pair.image not in fixed]
    chosen = set(choose(candidates, val, seed, "val").names)
    return [pair for pair in pairs if pair.image not in chosen], [pair for pair in pairs if pair.image in chosen]


def _select(
    files: Files, train: list[Pair], labeled: Choice | None, unlabeled: str | None, seed: int, held_out: set[str]
) -> tuple[list[Pair], Split, tuple[int, ...]]:
    """Return all training pairs, the labeled list, and the indices of the unlabeled ones."""
    pairs = {pair.image: pair for pair in train}
    if is_list_file(labeled):
        listed = files.read_list(str(labeled))
        # A list of bare names, as `Split.save` writes it, finds the masks of the training set.
        listed = files.with_masks(listed, pairs)
        if bare := [pair.image for pair in listed if not pair.mask]:
            raise UserError(f"expected a mask for every image in {labeled}, but {bare[0]} has none")
        pairs |= {pair.image: pair for pair in listed}
        split = Split(str(labeled), tuple(pair.image for pair in listed))
    else:
        masked = [name for name, pair in pairs.items() if pair.mask]
        if not masked:
            raise UserError(
                f"expected masks for some training images below {files.root / files.masks}, but none was found; "
                "a mask has its image's path and name, with its own suffix"
            )
        split = choose(masked, len(masked) if labeled is None else labeled, seed)
    taken = set(split.names)
    if unlabeled:
        extra = files.read_list(unlabeled, with_masks=False)
        pairs |= {pair.image: pair for pair in extra if pair.image not in pairs}
        wanted = {pair.image for pair in extra} - held_out
        if is_list_file(labeled) and (both := sorted(wanted & taken)):
            raise UserError(f"expected labeled and unlabeled images to differ, but {both[0]} is in both lists")
        wanted -= taken
    else:
        wanted = set(pairs) - taken - held_out
    ordered = list(pairs.values())
    return ordered, split, tuple(index for index, pair in enumerate(ordered) if pair.image in wanted)


def _refuse_overlap(labeled: Iterable[str], held_out: Iterable[Pair], what: str) -> None:
    if both := sorted(set(labeled) & {pair.image for pair in held_out}):
        raise UserError(
            f"expected labeled and {what} images to differ, but {both[0]} is in both ({len(both)} in all); "
            "remove them from one list"
        )


class Files:
    """Finds and pairs the files below a root."""

    def __init__(self, root: Path, images: str, masks: str) -> None:
        self.root, self.images, self.masks = root, images, masks

    def discover(self) -> list[Pair]:
        """Pair all images with the masks of the same relative path without suffix."""
        if not (self.root / self.images).is_dir():
            raise UserError(
                f"expected a folder with images at {self.root / self.images}, but it does not exist; "
                "set dataset.images, or give list files with dataset.train, dataset.labeled and dataset.val"
            )
        images, masks = self._by_stem(self.images), self._by_stem(self.masks)
        if not images:
            raise UserError(
                f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {self.root / self.images}, but found none"
            )
        if lonely := sorted(set(masks) - set(images)):
            raise UserError(
                f"expected an image for every mask, but {masks[lonely[0]]} has none ({len(lonely)} in all); "
                "an image and its mask have the same path below their folders, without suffix"
            )
        return [Pair(image, masks.get(stem)) for stem, image in images.items()]

    def with_masks(self, listed: list[Pair], known: Mapping[str, Pair]) -> list[Pair]:
        """Find the masks of bare names, as runs save them: among known pairs, or else by path in the mask folder."""
        if all(pair.mask for pair in listed):
            return listed
        known = known or {pair.image: pair for pair in self.discover()}
        return [pair if pair.mask else known.get(pair.image, pair) for pair in listed]

    def read_list(self, name: str, with_masks: bool = True) -> list[Pair]:
        """Read a list file, given relative to the root or to the working directory.

        Args:
            name: The list file.
            with_masks: Whether the second column is read; unlabeled images need not have the masks that it names.
        """
        path = next((path for path in (self.root / name, Path(name)) if path.is_file()), None)
        if path is None:
            raise UserError(
                f"expected a list file, but {name} exists neither in {self.root} nor in the working directory; "
                "a fraction is written 1/8, a count 92"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"expected the list {path} in UTF-8, but it is not; save it in UTF-8") from error
        pairs = [self._parse(line, path, with_masks) for line in lines if line.strip()]
        if not pairs:
            raise UserError(f"expected at least one image in the list {path}, but it is empty")
        if len({pair.image for pair in pairs}) < len(pairs):
            names = [pair.image for pair in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"expected every image once in the list {path}, but {twice} comes more than once")
        return pairs

    def _parse(self, line: str, path: Path, with_masks: bool) -> Pair:
        line = line.rstrip()
        parts = line.split("\t") if "\t" in line else line.split(" ")
        if "\t" not in line and (self.root / line).is_file():  # a bare name with spaces
            parts = [line]
        if len(parts) > 2:
            raise UserError(f"expected 'image mask' in {path}, but found {line!r}; separate names with spaces by a tab")
        parts = parts if with_masks else parts[:1]
        for part in parts:
            if PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
                raise UserError(f"expected paths below {self.root} in {path}, but found {part!r}")
            if not (self.root / part).is_file():
                raise UserError(f"expected the file {self.root / part}, which {path} lists, but it does not exist")
        # One spelling for one file, so that overlaps are found.
        image, *mask = (PurePosixPath(part).as_posix() for part in parts)
        return Pair(image, mask[0] if mask else None)

    def _by_stem(self, name: str) -> dict[str, str]:
        base = self.root / name
        found: dict[str, str] = {}
        for path in sorted(base.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or not path.is_file():
                continue
            stem = path.relative_to(base).with_suffix("").as_posix()
            if stem in found:
                raise UserError(f"expected one file named {stem} in {base}, but found {found[stem]} and {path.name}")
            found[stem] = path.relative_to(self.root).as_posix()
        return found
