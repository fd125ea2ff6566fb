"""ADE20K as in the scene parsing challenge of 2016.

Masks stay as published: 0 is "other", 1 to 150 are the classes.
"""

from pathlib import Path

from mlpmatch_pl.commands.prepare.archives import unpack
from mlpmatch_pl.commands.prepare.download import Archive
from mlpmatch_pl.commands.prepare.files import names_in
from mlpmatch_pl.commands.prepare.verification import compare_count, missing_files
from mlpmatch_pl.commands.prepare.workspace import Preparation, Workspace

# The host publishes no checksum; this is the one that public data loaders for the archive compare with.
ARCHIVE = Archive(
    "ADEChallengeData2016.zip",
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    md5="7328b3957e407ddae1d3cbf487f149ef",
)
COUNTS = {"training": 20210, "validation": 2000}

_PLACED = ("images/", "annotations/", "objectInfo150.txt", "sceneCategories.txt")


def build(workspace: Workspace) -> None:
    """Unpack images and masks."""
    unpack(workspace.get(ARCHIVE), workspace.root, _place)
    workspace.forget([ARCHIVE])


def find_problems(root: Path) -> list[str]:
    """Compare the numbers of images, and the masks' names with the images'."""
    problems = []
    for split, count in COUNTS.items():
        images, masks = names_in(root / "images" / split, ".jpg"), names_in(root / "annotations" / split, ".png")
        problems += compare_count(f"images in images/{split}", len(images), count)
        problems += missing_files("mask", [f"annotations/{split}/{name}.png" for name in images - masks])
    return problems


def summarize(root: Path) -> str:
    """Count what training and validation have."""
    counts = [len(names_in(root / "images" / split, ".jpg")) for split in COUNTS]
    return "{:,} training images with masks, {:,} validation images, 150 classes".format(*counts)


def _place(name: str) -> str | None:
    inside = name.partition("ADEChallengeData2016/")[2]
    return inside if inside.startswith(_PLACED) else None


PREPARATION = Preparation(build, find_problems, summarize)
