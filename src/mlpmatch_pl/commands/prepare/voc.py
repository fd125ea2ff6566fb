"""PASCAL VOC 2012 with the masks of SBD, together the "augmented" set of 10,582 training images.

VOC's own masks (2,913, train and val) are kept. Images that only SBD annotates get its mask, converted to a PNG with
the same palette; the images are in VOC's ``JPEGImages`` already, because SBD annotates VOC 2011. SBD masks have no void
border.
"""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath

from mlpmatch_pl.commands.prepare.download import Archive, Workspace
from mlpmatch_pl.commands.prepare.files import (
    compare_count,
    convert,
    list_members,
    missing_files,
    names_in,
    read_members,
    unpack,
    write_new,
)
from mlpmatch_pl.utils.errors import UserError

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


def build(workspace: Workspace) -> None:
    """Unpack VOC, convert SBD's masks, and write ``train_aug.txt`` last."""
    if _find_voc_problems(workspace.root):
        unpack(workspace.get(VOC), workspace.root, _relocate)
    convert_sbd(workspace, workspace.get(SBD))
    workspace.discard((VOC, SBD))


def convert_sbd(workspace: Workspace, archive: Path) -> None:
    """Write the masks that only SBD has, and the list of all training images.

    Raises:
        UserError: If the archive is not SBD, or a mask and its image differ in size.
    """
    root, members = workspace.root, list_members(archive)
    sbd = {PurePosixPath(name).stem: name for name in members if PurePosixPath(name).match("dataset/cls/[!.]*.mat")}
    lists = [f"benchmark_RELEASE/dataset/{part}.txt" for part in ("train", "val")]
    if not sbd or not members.keys() >= set(lists):
        raise UserError(
            f"expected SBD's masks (cls/*.mat), train.txt and val.txt in {archive}, but found other files; "
            f"download {SBD.name} again"
        )
    train, val = _read_list(root, "train"), _read_list(root, "val")
    # VOC's own masks are finer and have void borders: an image of its lists never gets SBD's.
    wanted = [sbd[name] for name in sbd.keys() - {*train, *val} - names_in(root / "SegmentationClass", ".png")]
    contents = dict(read_members(archive, {*wanted, *lists}))
    tasks = [(contents[name], root / "JPEGImages" / f"{PurePosixPath(name).stem}.jpg") for name in wanted]
    convert("converting SBD masks", sbd_to_png, tasks, workspace.num_workers)
    listed = [contents[name].decode().split() for name in lists]
    names = sorted({*train, *listed[0], *listed[1]} - set(val))
    write_new(root / _LISTS / "train_aug.txt", "".join(f"{name}\n" for name in names).encode())


def sbd_to_png(task: tuple[bytes, Path]) -> tuple[Path, bytes]:
    """Convert a mask.

    Args:
        task: Content of the .mat file, and path of the image that it belongs to.

    Returns:
        Path and content of a palette PNG with the class ids 0..20.

    Raises:
        UserError: If the sizes differ, or the file is no mask of SBD.
    """
    from PIL import Image
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    from mlpmatch_pl.utils.palette import default_palette

    content, image = task
    try:
        ids = loadmat(io.BytesIO(content), variable_names=["GTcls"])["GTcls"][0, 0]["Segmentation"].astype("uint8")
    except (KeyError, IndexError, ValueError, TypeError, MatReadError) as error:
        raise UserError(
            f"expected GTcls.Segmentation in SBD's mask for {image.name}, but found none ({error}); "
            f"download {SBD.name} again"
        ) from error
    mask = Image.fromarray(ids)
    if image.is_file():
        with Image.open(image) as photo:
            if photo.size != mask.size:
                raise UserError(
                    f"expected SBD's mask for {image} to have its size {photo.size}, but found {mask.size}; "
                    "the image has changed: delete it and run the same command again"
                )
    mask.putpalette([value for color in default_palette(256) for value in color])
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return image.parents[1] / "SegmentationClass" / f"{image.stem}.png", buffer.getvalue()


def find_problems(root: Path) -> list[str]:
    """Compare a folder with VOC's lists and ``train_aug.txt``."""
    if problems := _find_voc_problems(root):
        return problems
    if not (root / _LISTS / "train_aug.txt").is_file():
        return [f"{_LISTS}/train_aug.txt missing: SBD is not converted"]
    return _check_list(root, "train_aug")


def summarize(root: Path) -> str:
    """Count the images for training and validation."""
    counts = {name: len(_read_list(root, name)) for name in COUNTS}
    return (
        f"{counts['train_aug']:,} training images with masks ({counts['train']:,} of them VOC's own), "
        f"{counts['val']:,} validation images"
    )


def _find_voc_problems(root: Path) -> list[str]:
    missing = [
        f"{_LISTS}/{name}.txt missing" for name in ("train", "val") if not (root / _LISTS / f"{name}.txt").is_file()
    ]
    return missing or [*_check_list(root, "train"), *_check_list(root, "val")]


def _check_list(root: Path, name: str) -> list[str]:
    names, images, masks = (
        _read_list(root, name),
        names_in(root / "JPEGImages", ".jpg"),
        names_in(root / "SegmentationClass", ".png"),
    )
    return [
        *compare_count(f"images in {name}.txt", len(names), COUNTS[name]),
        *missing_files("image", [f"JPEGImages/{name}.jpg" for name in names if name not in images]),
        *missing_files("mask", [f"SegmentationClass/{name}.png" for name in names if name not in masks]),
    ]


def _read_list(root: Path, name: str) -> list[str]:
    return (root / _LISTS / f"{name}.txt").read_text(encoding="utf-8").split()


def _relocate(name: str) -> str | None:
    inside = name.partition("VOCdevkit/VOC2012/")[2]
    return inside if inside.startswith(("JPEGImages/", "SegmentationClass/", "ImageSets/")) else None
