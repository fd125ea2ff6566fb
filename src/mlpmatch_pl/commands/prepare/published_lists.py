"""UniMatch's lists of labeled images, each verified against the hash of the published file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlpmatch_pl.commands.prepare.download import Workspace, download, mirrored
from mlpmatch_pl.commands.prepare.files import different_file, list_members, read_members, write_new
from mlpmatch_pl.data.datasets.published import PUBLISHED, VAL_SHA256, is_original
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import progress, say

REPOSITORY = "LiheYoung/UniMatch"
COMMIT = "0324f3dd4a22128105a5eb135d2586c0bb3cc647"
FOLDERS = {"voc": "pascal", "cityscapes": "cityscapes"}  # UniMatch's names below its folder splits/


def list_hashes(dataset: str) -> dict[str, str]:
    """Return the sha256 of every published list of a dataset, by its path below ``splits/``.

    Example:
        >>> sorted(list_hashes("cityscapes"))[:2]
        ['1_16/labeled.txt', '1_16/unlabeled.txt']
    """
    hashes = {"val.txt": VAL_SHA256[dataset]}
    for entry in PUBLISHED[dataset].values():
        hashes[f"{entry.folder}/labeled.txt"] = entry.labeled_sha256
        hashes[f"{entry.folder}/unlabeled.txt"] = entry.unlabeled_sha256
    return hashes


def fetch_lists(workspace: Workspace, dataset: str) -> int:
    """Put the lists of a dataset into ``splits/`` below its root, skipping those that exist.

    Returns:
        The number of lists.

    Raises:
        UserError: If a different file of the same name exists (checked before the first download), or a list is
            missing or not the published one.
    """
    folder, hashes = workspace.root / "splits", list_hashes(dataset)
    missing = [name for name in hashes if not (folder / name).exists()]
    for name in hashes.keys() - set(missing):
        if not is_original(folder / name, hashes[name]):
            raise different_file(folder / name)
    if not missing:
        return len(hashes)
    local = None if workspace.archives is None else _read_local(workspace.archives, dataset)
    with progress(f"fetching UniMatch's lists for {dataset}", len(missing)) as advance:
        for name in missing:
            if local is None:
                url = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/splits/{FOLDERS[dataset]}/{name}"
                download(mirrored(url, workspace.mirror), folder / name, f"sha256:{hashes[name]}")
            elif name in local and hashlib.sha256(local[name]).hexdigest() == hashes[name]:
                write_new(folder / name, local[name])
            else:
                raise UserError(
                    f"expected UniMatch's list {name} in {workspace.archives} with the sha256 {hashes[name]}, but it "
                    f"is {'different' if name in local else 'missing'}; copy the original of commit {COMMIT[:7]}, with "
                    "its line endings"
                )
            advance(1)
    return len(hashes)


def _read_local(archives: Path, dataset: str) -> dict[str, bytes]:
    """Read the lists of a local folder, clone or zip archive of UniMatch's repository."""
    for folder in (archives, archives / "splits", *(path / "splits" for path in sorted(archives.glob("UniMatch*")))):
        if (source := folder / FOLDERS[dataset]).is_dir():
            say(f"reading UniMatch's lists from {source}")
            return {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.txt")}
    for path in sorted(archives.glob("UniMatch*.zip")):
        say(f"reading UniMatch's lists from {path}")
        # Below UniMatch-<commit>/; the repository has another splits/ deeper down.
        members = {name: name.split("/", 3) for name in list_members(path)}
        wanted = {name: parts[3] for name, parts in members.items() if parts[1:3] == ["splits", FOLDERS[dataset]]}
        return {wanted[name]: content for name, content in read_members(path, wanted)}
    raise UserError(
        f"expected UniMatch's lists in {archives}, as folders pascal/ and cityscapes/ or as its repository's zip "
        "archive UniMatch*.zip, but found neither; put them there, or leave archives out to download them"
    )
