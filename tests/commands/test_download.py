import hashlib
import io
import os
import shutil
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from helpers.archives import run_server, write_tar, write_zip

from mlpmatch_pl.commands.prepare import download as download_module
from mlpmatch_pl.commands.prepare.download import ATTEMPTS, Archive, Workspace, download
from mlpmatch_pl.commands.prepare.files import names_in, unpack, write_new
from mlpmatch_pl.utils.errors import UserError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_module, "FIRST_WAIT", 0.0)


@pytest.fixture
def server():
    with run_server() as running:
        running.files["/some/data.bin"] = CONTENT
        yield running


@pytest.fixture
def fetch(server, tmp_path):
    """Download the file of the server into the folder ``out``."""
    path = tmp_path / "out" / "data.bin"

    def run(url=f"{server.url}/some/data.bin"):
        download(url, path, f"md5:{MD5}")
        return path

    return run


@pytest.mark.parametrize("trouble", ["none", "cuts", "failures", "redirect"])
def test_download_is_complete_and_retried_after_trouble(server, fetch, trouble):
    server.redirects["/old"] = f"{server.url}/some/data.bin"
    server.cuts, server.failures = 2 * (trouble == "cuts"), 2 * (trouble == "failures")
    path = fetch(f"{server.url}/old") if trouble == "redirect" else fetch()
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["data.bin"]
    assert len(server.requests) == {"none": 1, "redirect": 2}.get(trouble, 3)


def test_remains_of_a_killed_download_are_removed(fetch, tmp_path):
    (tmp_path / "out/data.bin.part").mkdir(parents=True)
    (tmp_path / "out/data.bin.part/tmp1").write_bytes(b"half")
    fetch()
    assert os.listdir(tmp_path / "out") == ["data.bin"]


@pytest.mark.parametrize(
    ("trouble", "sentence", "requests"),
    [
        ("failures", f"connection failed {ATTEMPTS} times", ATTEMPTS),
        ("cuts", f"connection failed {ATTEMPTS} times", ATTEMPTS),
        ("missing", "the server answers 404", 1),
        ("changed", f"to have the checksum md5:{MD5}, but it has another one", 1),
        ("file redirect", "file:///etc/hostname", ATTEMPTS),
    ],
)
def test_failed_download_is_one_sentence_and_leaves_no_file(server, fetch, tmp_path, trouble, sentence, requests):
    server.cuts, server.failures = 100 * (trouble == "cuts"), 100 * (trouble == "failures")
    if trouble == "missing":
        server.files.clear()
    if trouble == "changed":
        server.files["/some/data.bin"] = CONTENT[:-1] + b"?"
    if trouble == "file redirect":
        server.redirects["/some/data.bin"] = "file:///etc/hostname"
    with pytest.raises(UserError, match=sentence):
        fetch()
    assert len(server.requests) == requests
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_refused_connection_is_one_sentence(tmp_path):
    with run_server() as closed:
        url = closed.url
    with pytest.raises(UserError, match=r"connection failed 5 times \(\[Errno \d+\] Connection refused\); run"):
        download(f"{url}/a.bin", tmp_path / "a.bin")


def test_archive_is_downloaded_once_from_the_mirror_and_discarded(server, tmp_path):
    archive = Archive("data.bin", "https://example.org/some/data.bin", MD5)
    workspace = Workspace(root=tmp_path, mirror=server.url)
    path = workspace.get(archive)
    assert (path.read_bytes(), workspace.get(archive)) == (CONTENT, path)
    assert server.requests == ["/some/data.bin"]
    Workspace(root=tmp_path, keep_archives=True).discard([archive])
    assert path.exists()
    workspace.discard([archive])
    assert list(tmp_path.iterdir()) == []


def test_existing_archive_with_another_checksum_is_named_and_kept(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"data\.bin to have the md5 checksum {MD5}, but found [0-9a-f]{{32}}; "):
        Workspace(root=tmp_path / "root", archives=tmp_path).get(Archive("data.bin", server.url, MD5))
    assert (tmp_path / "data.bin").read_bytes() == b"mine"
    assert server.requests == []


def test_full_disk_is_found_before_the_download(server, tmp_path, monkeypatch):
    little = shutil.disk_usage(tmp_path)._replace(free=len(CONTENT))  # the archive, but not its content beside it
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(UserError, match=r"expected 6\.0 MB of free space .* but there are 3\.0 MB"):
        Workspace(root=tmp_path).get(Archive("data.bin", f"{server.url}/some/data.bin", MD5))
    assert server.requests == []


def relocate(name):
    return name if name.startswith("data/") else None


def tar_info(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "info",
    [
        tar_info("../evil.txt"),
        tar_info("data/../../evil.txt"),
        tar_info("/tmp/evil.txt"),
        tar_info("C:/evil.txt"),
        tar_info("data\\..\\evil.txt"),
        tar_info("data/link", tarfile.SYMTYPE, "/etc"),
        tar_info("data/hard", tarfile.LNKTYPE, "data/a.txt"),
        tar_info("data/device", tarfile.CHRTYPE),
    ],
    ids=lambda info: info.name,
)
def test_unsafe_tar_is_refused_before_anything_is_written(info, tmp_path):
    path = write_tar(tmp_path / "in" / "a.tar", {"data/a.txt": b"a"})
    with tarfile.open(path, "a") as archive:
        archive.addfile(info, io.BytesIO())
    with pytest.raises(UserError) as caught:
        unpack(path, tmp_path / "out", relocate)
    assert repr(info.name) in str(caught.value)
    assert "nothing was unpacked" in str(caught.value)
    assert {entry.name for entry in tmp_path.rglob("*")} == {"in", "a.tar"}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../evil.txt", stat.S_IFREG),
        ("data/../../evil.txt", 0),
        ("/tmp/evil.txt", stat.S_IFREG),
        ("data\\..\\..\\evil.txt", 0),
        ("data/link", stat.S_IFLNK),
    ],
)
def test_unsafe_zip_is_refused_before_anything_is_written(name, mode, tmp_path):
    path = write_zip(tmp_path / "in" / "a.zip", {"data/a.txt": b"a"})
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.filename, info.external_attr = name, (mode | 0o644) << 16
        archive.writestr(info, b"/etc")
    with pytest.raises(UserError) as caught:
        unpack(path, tmp_path / "out", relocate)
    assert repr(name) in str(caught.value)
    assert {entry.name for entry in tmp_path.rglob("*")} == {"in", "a.zip"}


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_wanted_members_are_unpacked_once(write, tmp_path):
    path = write(tmp_path / "a", {"./data/a.txt": b"a", "data/sub/b.txt": b"bb", "other/c.txt": b"c"})
    assert unpack(path, tmp_path / "out", relocate) == 2
    assert (tmp_path / "out/data/a.txt").read_bytes() == b"a"
    assert (tmp_path / "out/data/sub/b.txt").read_bytes() == b"bb"
    assert not (tmp_path / "out/other").exists()
    assert unpack(path, tmp_path / "out", relocate) == 0


def test_interrupted_unpacking_leaves_complete_files_and_continues(tmp_path, monkeypatch):
    files = {f"data/{i}.txt": bytes([i]) * 1000 for i in range(5)}
    path, out = write_tar(tmp_path / "a.tar", files), tmp_path / "out"
    written = []

    def interrupted(target, content):
        if len(written) == 2:
            target.with_name(target.name + ".part").write_bytes(content[:500])  # as a kill leaves it
            raise KeyboardInterrupt
        written.append(target)
        write_new(target, content)

    monkeypatch.setattr("mlpmatch_pl.commands.prepare.files.write_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, out, relocate)
    monkeypatch.undo()
    assert names_in(out / "data", ".txt") == {"0", "1"}
    (out / "data/1.txt").write_bytes(b"")  # as a power cut leaves it
    before = (out / "data/0.txt").stat().st_mtime_ns
    assert unpack(path, out, relocate) == 4
    assert (out / "data/0.txt").stat().st_mtime_ns == before
    assert {f"data/{p.name}": p.read_bytes() for p in (out / "data").iterdir()} == files


def test_different_file_is_named_and_kept_before_anything_is_written(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"data/a.txt": b"a", "data/b.txt": b"b"})
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/b.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"b\.txt, but a different file exists there; move it away"):
        unpack(path, tmp_path / "out", relocate)
    with pytest.raises(UserError, match="a different file exists there"):
        write_new(tmp_path / "out/data/b.txt", b"new!")
    assert (tmp_path / "out/data/b.txt").read_bytes() == b"mine"
    assert not (tmp_path / "out/data/a.txt").exists()


def test_full_disk_is_found_before_unpacking(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {"data/a.bin": bytes(5_000_000)})
    little = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(UserError, match=r"expected 5\.0 MB of free space in .* for the content of a\.zip"):
        unpack(path, tmp_path / "out", relocate)
    assert not (tmp_path / "out").exists()


def test_other_archive_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"other/c.txt": b"c"})
    with pytest.raises(UserError, match=r"it holds 1 other files \(other/c\.txt\); it is another archive"):
        unpack(path, tmp_path / "out", relocate)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_damaged_archive_is_named(suffix, tmp_path):
    files = {f"data/{i}.bin": np.random.default_rng(i).bytes(5000) for i in range(4)}
    path = tmp_path / f"a.{suffix}"
    write_zip(path, files) if suffix == "zip" else write_tar(path, files, "w:gz" if suffix == "tar.gz" else "w")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>log in</html>"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"expected a complete tar or zip archive, but .* is damaged"):
            unpack(path, tmp_path / "out", relocate)


def test_empty_and_partial_files_do_not_count(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").write_bytes(b"b")
    (tmp_path / "c.png.part").write_bytes(b"c")
    assert names_in(tmp_path, ".png") == {"b"}
    assert names_in(tmp_path / "missing", ".png") == set()
