"""UniMatch's lists of labeled images, each compared with the hash of what was published."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from mlpmatch_pl.commands.prepare.archives import list_members, read_members
from mlpmatch_pl.commands.prepare.download import fetch_bytes, mirrored
from mlpmatch_pl.commands.prepare.files import other_file, write_new
from mlpmatch_pl.commands.prepare.workspace import Workspace
from mlpmatch_pl.data.datasets.published import PUBLISHED, VAL_SHA256, is_original
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import progress, say

REPOSITORY = "LiheYoung/UniMatch"
COMMIT = "0324f3dd4a22128105a5eb135d2586c0bb3cc647"
FOLDERS = {"voc": "pascal", "cityscapes": "cityscapes"}
"""What UniMatch calls the data sets, below its folder splits/."""

Reader = Callable[[str], bytes | None]
"""Gives the content of a file below the repository's folder splits/, or None where there is none."""


def list_hashes(dataset: str) -> dict[str, str]:
    """Return the sha256 of every published list of a data set, by its path below ``splits/``.

    Example:
        >>> sorted(list_hashes("cityscapes"))[:2]
        ['1_16/labeled.txt', '1_16/unlabeled.txt']
    """
    hashes = {"val.txt": VAL_SHA256[dataset]}
    for entry in PUBLISHED[dataset].values():
        hashes[f"{entry.folder}/labeled.txt"] = entry.labeled_sha256
        hashes[f"{entry.folder}/unlabeled.txt"] = entry.unlabeled_sha256
    return hashes


def fetch_lists(workspace: Workspace) -> int:
    """Put the lists of a data set into ``splits/`` below its root.

    Returns:
        The number of files written; 0 where all were there.

    Raises:
        UserError: If another file of the same name is there (all are looked at before the first is fetched), or a list
            cannot be had, or is not the published one.
    """
    dataset, folder = workspace.options.dataset, workspace.root / "splits"
    missing = {name: sha256 for name, sha256 in list_hashes(dataset).items() if not (folder / name).exists()}
    for name, sha256 in list_hashes(dataset).items():
        if name not in missing and not is_original(folder / name, sha256):
            raise other_file(folder / name)
    if not missing:
        return 0
    read = find_reader(workspace)
    with progress(f"fetching UniMatch's lists for {dataset}", len(missing)) as advance:
        for name, sha256 in missing.items():
            write_new(folder / name, _verified(read(f"{FOLDERS[dataset]}/{name}"), name, sha256))
            advance(1)
    return len(missing)


def find_reader(workspace: Workspace) -> Reader:
    """Choose where lists are read: a folder or zip archive of UniMatch's among the archives, else the network."""
    archives = workspace.options.archives
    if archives is None:
        mirror = workspace.options.mirror
        base = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/splits"
        return lambda name: fetch_bytes(mirrored(f"{base}/{name}", mirror))
    for folder in (archives, archives / "splits", *(path / "splits" for path in sorted(archives.glob("UniMatch*")))):
        if (folder / FOLDERS[workspace.options.dataset]).is_dir():
            return _folder_reader(folder)
    zips = sorted(archives.glob("UniMatch*.zip"))
    if zips:
        return _zip_reader(zips[0])
    raise UserError(
        f"expected UniMatch's lists in {archives}, as folders pascal/ and cityscapes/ or as its repository's zip "
        "archive UniMatch*.zip, but they are not there; put them there, or leave archives out to download them"
    )


def _verified(content: bytes | None, name: str, sha256: str) -> bytes:
    found = "nothing" if content is None else hashlib.sha256(content).hexdigest()
    if content is None or found != sha256:
        raise UserError(
            f"expected UniMatch's list {name} with the sha256 {sha256}, but found {found}; "
            f"take the files of commit {COMMIT[:7]}, unchanged down to the ends of lines"
        )
    return content


def _folder_reader(folder: Path) -> Reader:
    say(f"taking UniMatch's lists from {folder}")
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def _zip_reader(path: Path) -> Reader:
    say(f"taking UniMatch's lists from {path}")
    # The first folder is UniMatch-<commit>/; the repository has another splits/ deeper down.
    members = {
        member.name.partition("/")[2].removeprefix("splits/"): member.name
        for member in list_members(path)
        if member.name.partition("/")[2].startswith("splits/")
    }
    contents = dict(read_members(path, set(members.values())))
    return lambda name: contents[members[name]] if name in members else None
