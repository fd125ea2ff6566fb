"""PASCAL VOC 2012 with the masks of SBD, together the "augmented" set of 10,582 training images.

VOC's own masks (2,913, train and val) stay as they are. Images that only SBD has a mask for get it, converted to the
same palette PNG; they are in VOC's ``JPEGImages`` already, because SBD annotates images of VOC 2011. SBD masks have no
void border.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mlpmatch_pl.commands.prepare.archives import list_members, read_members, unpack
from mlpmatch_pl.commands.prepare.download import Archive
from mlpmatch_pl.commands.prepare.files import names_in, write_new
from mlpmatch_pl.commands.prepare.verification import compare_count, missing_files
from mlpmatch_pl.commands.prepare.workspace import Preparation, Workspace
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import progress, say

VOC = Archive(
    "VOCtrainval_11-May-2012.tar",
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
)
SBD = Archive(
    "benchmark.tgz",
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
)
COUNTS = {"train": 1464, "val": 1449, "train_aug": 10582}

_LISTS = "ImageSets/Segmentation"
_PLACED = ("JPEGImages/", "SegmentationClass/", "ImageSets/")


def build(workspace: Workspace) -> None:
    """Unpack VOC, convert SBD's masks, and write ``train_aug.txt`` last."""
    root = workspace.root
    if _find_voc_problems(root):
        unpack(workspace.get(VOC), root, _voc_place)
    convert_sbd(workspace, workspace.get(SBD))
    workspace.forget((VOC, SBD))


def convert_sbd(workspace: Workspace, archive: Path) -> None:
    """Write the masks that only SBD has, and the list of all training images.

    Raises:
        UserError: If the archive is not SBD, or a mask has another size than its image.
    """
    from mlpmatch_pl.utils.palette import default_palette

    root = workspace.root
    sbd = {PurePosixPath(member.name).stem: member.name for member in list_members(archive) if _is_mask(member.name)}
    lists = {name: text.decode().split() for name, text in _read_lists(archive)}
    if not sbd or set(lists) != {"train", "val"}:
        raise UserError(
            f"expected SBD's masks (cls/*.mat) and its train.txt and val.txt in {archive}, but they are not all there; "
            "it is another archive: get it again"
        )
    train, val = read_list(root, "train"), read_list(root, "val")
    # VOC's own masks have void borders and are finer: an image of its lists never gets SBD's.
    wanted = set(sbd) - set(train) - set(val) - names_in(root / "SegmentationClass", ".png")
    contents = read_members(archive, {sbd[name] for name in wanted})
    palette = [value for color in default_palette(256) for value in color]
    tasks = ((content, str(_image(root, PurePosixPath(name).stem)), palette) for name, content in contents)
    with progress("converting SBD masks", len(wanted)) as advance:
        for image, png in workspace.convert(sbd_to_png, tasks):
            write_new(root / "SegmentationClass" / f"{Path(image).stem}.png", png)
            advance(1)
    names = train_aug_names(train, val, [*lists["train"], *lists["val"]])
    if len(names) != COUNTS["train_aug"]:
        say(f"expected {COUNTS['train_aug']:,} training images of VOC and SBD together, found {len(names):,}")
    write_new(root / _LISTS / "train_aug.txt", "".join(f"{name}\n" for name in names).encode())


def train_aug_names(voc_train: list[str], voc_val: list[str], sbd: list[str]) -> list[str]:
    """Unite the training images, and leave out all that VOC validates on.

    Example:
        >>> train_aug_names(["b"], ["c"], ["a", "b", "c"])
        ['a', 'b']
    """
    return sorted(({*voc_train, *sbd}) - set(voc_val))


def sbd_to_png(task: tuple[bytes, str, list[int]]) -> tuple[str, bytes]:
    """Convert a mask.

    Args:
        task: Content of the .mat file, the path of the image that it belongs to, and the palette (768 numbers).

    Returns:
        The path of the image, and the content of a palette PNG with the ids 0..20.

    Raises:
        UserError: If the sizes differ, or the file is no mask of SBD.
    """
    from PIL import Image
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    content, image, palette = task
    try:
        ids = loadmat(io.BytesIO(content), variable_names=["GTcls"])["GTcls"][0, 0]["Segmentation"].astype("uint8")
    except (KeyError, IndexError, ValueError, TypeError, MatReadError) as error:
        raise UserError(
            f"expected GTcls.Segmentation in SBD's mask for {Path(image).name}, but found none ({error}); "
            f"get {SBD.name} again"
        ) from error
    mask = Image.fromarray(ids)
    if Path(image).is_file():
        with Image.open(image) as photo:
            if photo.size != mask.size:
                raise UserError(
                    f"expected SBD's mask for {image} to have its size {photo.size}, but found {mask.size}; "
                    "the image was changed: delete it and run the same command again"
                )
    mask.putpalette(palette)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return image, buffer.getvalue()


def find_problems(root: Path) -> list[str]:
    """Compare a folder with VOC's lists and ``train_aug.txt``."""
    problems = _find_voc_problems(root)
    if problems:
        return problems
    if not (root / _LISTS / "train_aug.txt").is_file():
        return [f"{_LISTS}/train_aug.txt missing: SBD is not converted"]
    names = read_list(root, "train_aug")
    return [
        *compare_count("images in train_aug.txt", len(names), COUNTS["train_aug"]),
        *_find_missing(root, names),
    ]


def summarize(root: Path) -> str:
    """Count what training and validation have."""
    counts = {name: len(read_list(root, name)) for name in ("train_aug", "train", "val")}
    return (
        f"{counts['train_aug']:,} training images with masks ({counts['train']:,} of them VOC's own), "
        f"{counts['val']:,} validation images"
    )


def read_list(root: Path, name: str) -> list[str]:
    """Read a list of ``ImageSets/Segmentation``."""
    return (root / _LISTS / f"{name}.txt").read_text(encoding="utf-8").split()


def _find_voc_problems(root: Path) -> list[str]:
    lists = [name for name in ("train", "val") if not (root / _LISTS / f"{name}.txt").is_file()]
    if lists:
        return [f"{_LISTS}/{name}.txt missing" for name in lists]
    names = {name: read_list(root, name) for name in ("train", "val")}
    counts = [
        problem for name in names for problem in compare_count(f"images in {name}.txt", len(names[name]), COUNTS[name])
    ]
    return [*counts, *_find_missing(root, [*names["train"], *names["val"]])]


def _find_missing(root: Path, names: list[str]) -> list[str]:
    images, masks = names_in(root / "JPEGImages", ".jpg"), names_in(root / "SegmentationClass", ".png")
    return [
        *missing_files("image", [f"JPEGImages/{name}.jpg" for name in names if name not in images]),
        *missing_files("mask", [f"SegmentationClass/{name}.png" for name in names if name not in masks]),
    ]


def _image(root: Path, name: str) -> Path:
    return root / "JPEGImages" / f"{name}.jpg"


def _voc_place(name: str) -> str | None:
    inside = name.partition("VOCdevkit/VOC2012/")[2]
    return inside if inside.startswith(_PLACED) else None


def _is_mask(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".mat" and path.parts[-3:-1] == ("dataset", "cls") and not path.name.startswith(".")


def _read_lists(archive: Path) -> Iterator[tuple[str, bytes]]:
    for name, content in read_members(archive, {f"benchmark_RELEASE/dataset/{part}.txt" for part in ("train", "val")}):
        yield PurePosixPath(name).stem, content


PREPARATION = Preparation(build, find_problems, summarize)
