"""Cityscapes: the archives need an account, so the user downloads them; they are unpacked and verified here."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mlpmatch_pl.commands.prepare.download import Archive, Workspace
from mlpmatch_pl.commands.prepare.files import compare_count, missing_files, names_in, unpack

IMAGES = Archive("leftImg8bit_trainvaltest.zip")
MASKS = Archive("gtFine_trainvaltest.zip")
COUNTS = {"train": 2975, "val": 500, "test": 1525}

_LABELED = ("train", "val")  # the masks of test are not public: its files hold only a frame of the ignore value
_IMAGE_ENDING = "_leftImg8bit.png"
_MASK_ENDINGS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


def build(workspace: Workspace) -> None:
    """Unpack what is missing from the archives that the user has downloaded.

    Raises:
        UserError: If an archive is missing; instructions to get it are printed.
    """
    root = workspace.root
    instructions = (
        "Cityscapes cannot be downloaded without an account:\n"
        "  1. register at https://www.cityscapes-dataset.com/register/ and log in\n"
        f"  2. download {IMAGES.name} (11 GB) and {MASKS.name} (241 MB)\n"
        f"     from https://www.cityscapes-dataset.com/downloads/\n"
        f"  3. put both files, as they are, into {workspace.archive_folder}\n"
        "  4. run the same command again (archives=<folder> reads them from another folder)"
    )
    needed = []
    if any(len(names) != COUNTS[split] for split, names in _image_names(root).items()):
        needed.append((workspace.get(IMAGES, instructions), _select("leftImg8bit/", (_IMAGE_ENDING,))))
    if any(len(names) != COUNTS[split] for split, names in _mask_names(root).items()):
        needed.append((workspace.get(MASKS, instructions), _select("gtFine/", _MASK_ENDINGS)))
    for path, relocate in needed:
        unpack(path, root, relocate)


def find_problems(root: Path) -> list[str]:
    """Compare the number of images of each split, and the names of masks and images."""
    images, masks = _image_names(root), _mask_names(root)
    problems = []
    for split, count in COUNTS.items():
        problems += compare_count(f"images in leftImg8bit/{split}", len(images[split]), count)
    for split in _LABELED:
        lacking = images[split] - masks[split]
        problems += missing_files("mask", [f"gtFine/{split}/{name}{_MASK_ENDINGS[1]}" for name in lacking])
        lacking = masks[split] - images[split]
        problems += missing_files("image", [f"leftImg8bit/{split}/{name}{_IMAGE_ENDING}" for name in lacking])
    return problems


def summarize(root: Path) -> str:
    """Count the images of each split."""
    counts = ", ".join(f"{len(names):,} images for {split}" for split, names in _image_names(root).items())
    return f"{counts}; masks for train and val"


def _select(folder: str, endings: tuple[str, ...]) -> Callable[[str], str | None]:
    return lambda name: name if name.startswith(folder) and name.endswith(endings) else None


def _image_names(root: Path) -> dict[str, set[str]]:
    """Return the names of the images, such as ``city/city_000000_000019``, by split."""
    return {split: set(_names(root / "leftImg8bit" / split, _IMAGE_ENDING)) for split in COUNTS}


def _mask_names(root: Path) -> dict[str, set[str]]:
    """Return the names of the images that have a mask, of either kind, by split."""
    folders = {split: root / "gtFine" / split for split in _LABELED}
    return {split: {n for ending in _MASK_ENDINGS for n in _names(folder, ending)} for split, folder in folders.items()}


def _names(folder: Path, ending: str) -> Iterator[str]:
    for city in sorted(folder.iterdir()) if folder.is_dir() else ():
        for name in names_in(city, ending):
            yield f"{city.name}/{name}"
