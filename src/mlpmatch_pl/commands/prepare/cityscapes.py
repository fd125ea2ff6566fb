"""Cityscapes: its archives need an account, so a user fetches them, and this unpacks and verifies."""

from collections.abc import Iterator
from pathlib import Path

from mlpmatch_pl.commands.prepare.archives import unpack
from mlpmatch_pl.commands.prepare.download import Archive
from mlpmatch_pl.commands.prepare.files import names_in
from mlpmatch_pl.commands.prepare.verification import compare_count, missing_files
from mlpmatch_pl.commands.prepare.workspace import Preparation, Workspace

IMAGES = Archive("leftImg8bit_trainvaltest.zip")
MASKS = Archive("gtFine_trainvaltest.zip")
COUNTS = {"train": 2975, "val": 500, "test": 1525}

_LABELED = ("train", "val")  # the masks of test are not public; its files hold only a frame of "ignore"
_IMAGE_ENDING = "_leftImg8bit.png"
_MASK_ENDINGS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


def build(workspace: Workspace) -> None:
    """Unpack the archives that the user fetched, for what is not there yet.

    Raises:
        UserError: If an archive is needed and not there; the steps to get it are printed.
    """
    root = workspace.root
    images, masks = image_names(root), mask_names(root)
    needed = []
    if any(len(images[split]) != COUNTS[split] for split in COUNTS):
        needed.append((IMAGES, _image_place))
    if any(len(masks[split]) != COUNTS[split] for split in _LABELED):
        needed.append((MASKS, _mask_place))
    paths = [(workspace.get(archive, manual_steps(workspace)), place) for archive, place in needed]
    for path, place in paths:
        unpack(path, root, place)


def manual_steps(workspace: Workspace) -> str:
    """Say how to get the archives by hand."""
    where = workspace.options.archives or workspace.downloads
    return (
        "Cityscapes cannot be downloaded without an account:\n"
        "  1. register at https://www.cityscapes-dataset.com/register/ and log in\n"
        f"  2. download {IMAGES.name} (11 GB) and {MASKS.name} (241 MB)\n"
        f"     from https://www.cityscapes-dataset.com/downloads/\n"
        f"  3. put both files, as they are, into {where}\n"
        "  4. run the same command again (archives=<folder> takes them from another folder)"
    )


def image_names(root: Path) -> dict[str, set[str]]:
    """Return the names of the images, as ``city/city_000000_000019``, by split."""
    return {split: set(_names(root / "leftImg8bit" / split, _IMAGE_ENDING)) for split in COUNTS}


def mask_names(root: Path) -> dict[str, set[str]]:
    """Return the names of the images that have a mask, of either kind, by split."""
    return {
        split: {name for ending in _MASK_ENDINGS for name in _names(root / "gtFine" / split, ending)}
        for split in _LABELED
    }


def find_problems(root: Path) -> list[str]:
    """Compare the numbers of images by split, and the masks' names with the images'."""
    images, masks = image_names(root), mask_names(root)
    problems = []
    for split, count in COUNTS.items():
        problems += compare_count(f"images in leftImg8bit/{split}", len(images[split]), count)
    for split in _LABELED:
        names = [f"gtFine/{split}/{name}{_MASK_ENDINGS[1]}" for name in images[split] - masks[split]]
        problems += missing_files("mask", names)
        without = [f"leftImg8bit/{split}/{name}{_IMAGE_ENDING}" for name in masks[split] - images[split]]
        problems += missing_files("image", without)
    return problems


def summarize(root: Path) -> str:
    """Count the images of each split."""
    images = image_names(root)
    return ", ".join(f"{len(images[split]):,} images for {split}" for split in COUNTS) + "; masks for train and val"


def _names(folder: Path, ending: str) -> Iterator[str]:
    for city in sorted(folder.iterdir()) if folder.is_dir() else ():
        for name in names_in(city, ending):
            yield f"{city.name}/{name}"


def _image_place(name: str) -> str | None:
    return name if name.startswith("leftImg8bit/") and name.endswith(_IMAGE_ENDING) else None


def _mask_place(name: str) -> str | None:
    return name if name.startswith("gtFine/") and name.endswith(_MASK_ENDINGS) else None


PREPARATION = Preparation(build, find_problems, summarize)
