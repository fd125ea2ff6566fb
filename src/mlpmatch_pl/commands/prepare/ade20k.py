"""ADE20K as in the scene parsing challenge of 2016.

Masks are kept as published: 0 is "other", 1 to 150 are the classes.
"""

from pathlib import Path

from mlpmatch_pl.commands.prepare.download import Archive, Workspace
from mlpmatch_pl.commands.prepare.files import compare_count, missing_files, names_in, unpack

# The host publishes no checksum; this is the one that other public data loaders compare with.
ARCHIVE = Archive(
    "ADEChallengeData2016.zip",
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    md5="7328b3957e407ddae1d3cbf487f149ef",
)
COUNTS = {"training": 20210, "validation": 2000}


def build(workspace: Workspace) -> None:
    """Unpack images and masks."""
    unpack(workspace.get(ARCHIVE), workspace.root, _relocate)
    workspace.discard([ARCHIVE])


def find_problems(root: Path) -> list[str]:
    """Compare the number of images, and the names of masks and images."""
    problems = []
    for split, count in COUNTS.items():
        images, masks = names_in(root / "images" / split, ".jpg"), names_in(root / "annotations" / split, ".png")
        problems += compare_count(f"images in images/{split}", len(images), count)
        problems += missing_files("mask", [f"annotations/{split}/{name}.png" for name in images - masks])
    return problems


def summarize(root: Path) -> str:
    """Count the images for training and validation."""
    counts = [len(names_in(root / "images" / split, ".jpg")) for split in COUNTS]
    return "{:,} training images with masks, {:,} validation images, 150 classes".format(*counts)


def _relocate(name: str) -> str | None:
    inside = name.partition("ADEChallengeData2016/")[2]
    wanted = ("images/", "annotations/", "objectInfo150.txt", "sceneCategories.txt")
    return inside if inside.startswith(wanted) else None
