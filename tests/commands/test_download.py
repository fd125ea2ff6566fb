import hashlib
import io
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from helpers.archives import run_server, write_tar, write_zip

from mlpmatch_pl.commands.prepare import download as download_module
from mlpmatch_pl.commands.prepare.archives import list_members, unpack
from mlpmatch_pl.commands.prepare.download import ATTEMPTS, Archive, download, fetch_bytes
from mlpmatch_pl.commands.prepare.files import names_in, write_new
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
def archive(server):
    return Archive("data.bin", f"{server.url}/some/data.bin", MD5)


def test_a_download_arrives_whole_and_is_not_repeated(server, archive, tmp_path):
    path = download(archive, tmp_path)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.bin"]
    assert download(archive, tmp_path) == path
    assert server.requests == [("/some/data.bin", None)]


def test_a_cut_connection_is_resumed_from_where_it_broke(server, archive, tmp_path):
    server.cuts = 2
    assert download(archive, tmp_path).read_bytes() == CONTENT
    half, three_quarters = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    assert [asked for _, asked in server.requests] == [None, f"bytes={half}-", f"bytes={three_quarters}-"]


def test_the_part_of_a_killed_run_is_resumed(server, archive, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1_000_000])
    assert download(archive, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=1000000-"]


def test_a_part_that_lacks_nothing_but_its_name_is_taken(server, archive, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert download(archive, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_too_long_is_of_another_file_and_starts_again(server, archive, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"more")
    assert download(archive, tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server, archive, tmp_path, capsys):
    server.ranges, server.cuts = False, 1
    assert download(archive, tmp_path).read_bytes() == CONTENT
    assert "cannot resume" in capsys.readouterr().out


def test_a_wrong_checksum_names_file_expected_and_found_and_leaves_no_part(server, archive, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    server.files["/some/data.bin"] = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=r"expected data\.bin .* md5") as caught:
        download(archive, tmp_path)
    assert MD5 in str(caught.value)
    assert hashlib.md5(server.files["/some/data.bin"]).hexdigest() in str(caught.value)
    assert list(tmp_path.iterdir()) == [mine]


def test_a_wrong_file_of_the_users_is_named_and_kept(server, archive, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="damaged or another version"):
        download(archive, tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"
    assert server.requests == []


def test_a_passing_failure_of_the_server_is_tried_again(server, archive, tmp_path):
    server.failures = 2
    assert download(archive, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_lasting_failure_ends_after_some_attempts(server, archive, tmp_path):
    server.failures = 100
    with pytest.raises(UserError, match=f"failed {ATTEMPTS} times in a row"):
        download(archive, tmp_path)
    assert len(server.requests) == ATTEMPTS


def test_attempts_without_a_new_byte_are_counted_and_what_arrived_is_kept(server, archive, tmp_path):
    server.ranges, server.cuts = False, 100
    with pytest.raises(UserError, match=r"after 1\.5 MB, which are kept"):
        download(archive, tmp_path)
    assert len(server.requests) == ATTEMPTS
    assert (tmp_path / "data.bin.part").stat().st_size == len(CONTENT) // 2


def test_a_missing_file_is_said_at_once(server, tmp_path):
    with pytest.raises(UserError, match="the server answers 404"):
        download(Archive("no.bin", f"{server.url}/no.bin"), tmp_path)
    assert len(server.requests) == 1


def test_nobody_listening_is_a_failed_connection(tmp_path):
    with run_server() as closed:
        url = closed.url
    with pytest.raises(UserError, match=r"connection failed 5 times in a row \(.*refused\)"):
        download(Archive("a.bin", f"{url}/a.bin"), tmp_path)


def test_redirects_are_followed_with_their_range(server, archive, tmp_path):
    server.redirects["/old"] = f"{server.url}/some/data.bin"
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:5])
    moved = Archive("data.bin", f"{server.url}/old", MD5)
    assert download(moved, tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/old", "bytes=5-"), ("/some/data.bin", "bytes=5-")]


def test_redirects_to_files_of_this_machine_are_refused(server, tmp_path):
    server.redirects["/old"] = "file:///etc/hostname"
    with pytest.raises(UserError, match="file:///etc/hostname"):
        download(Archive("a.bin", f"{server.url}/old"), tmp_path)


def test_a_redirect_from_https_to_http_is_refused():
    request = namedtuple("Request", "full_url")("https://example.org/a")
    with pytest.raises(UserError, match=r"expected https://example\.org/a to lead to an https address"):
        download_module._SafeRedirects().redirect_request(request, None, 302, "", {}, "http://example.org/a")


def test_a_mirror_takes_the_place_of_the_host(server, tmp_path):
    archive = Archive("data.bin", "https://example.org/some/data.bin", MD5)
    assert download(archive, tmp_path, mirror=server.url).read_bytes() == CONTENT


def test_a_small_file_that_is_cut_is_fetched_again(server):
    server.cuts = 1
    assert fetch_bytes(f"{server.url}/some/data.bin") == CONTENT


def test_a_full_disk_is_seen_before_the_download(server, archive, tmp_path, monkeypatch):
    little = shutil.disk_usage(tmp_path)._replace(free=len(CONTENT))  # the archive, but not its content beside it
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(UserError, match=r"expected 6\.0 MB of free space .* only 3\.0 MB"):
        download(archive, tmp_path)
    assert not (tmp_path / "data.bin").exists()


def place(name):
    return name if name.startswith("data/") else None


def add_tar_member(path, info, content=b""):
    with tarfile.open(path, "a") as archive:
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


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
        tar_info("data/fifo", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_a_tar_with_an_unsafe_member_is_refused_before_anything_is_written(info, tmp_path):
    path = write_tar(tmp_path / "in" / "a.tar", {"data/a.txt": b"a"})
    add_tar_member(path, info)
    with pytest.raises(UserError) as caught:
        unpack(path, tmp_path / "out", place)
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
        ("data/device", stat.S_IFCHR),
    ],
)
def test_a_zip_with_an_unsafe_member_is_refused_before_anything_is_written(name, mode, tmp_path):
    path = write_zip(tmp_path / "in" / "a.zip", {"data/a.txt": b"a"})
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.filename, info.external_attr = name, (mode | 0o644) << 16
        archive.writestr(info, b"/etc")
    with pytest.raises(UserError) as caught:
        unpack(path, tmp_path / "out", place)
    assert repr(name) in str(caught.value)
    assert {entry.name for entry in tmp_path.rglob("*")} == {"in", "a.zip"}


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_wanted_members_are_unpacked_and_a_second_time_nothing_is(write, tmp_path):
    path = write(tmp_path / "a", {"./data/a.txt": b"a", "data/sub/b.txt": b"bb", "other/c.txt": b"c"})
    assert unpack(path, tmp_path / "out", place) == 2
    assert (tmp_path / "out/data/a.txt").read_bytes() == b"a"
    assert (tmp_path / "out/data/sub/b.txt").read_bytes() == b"bb"
    assert not (tmp_path / "out/other").exists()
    assert unpack(path, tmp_path / "out", place) == 0


def test_an_interrupted_unpacking_leaves_whole_files_only_and_goes_on(tmp_path, monkeypatch):
    files = {f"data/{i}.txt": bytes([i]) * 1000 for i in range(5)}
    path, out = write_tar(tmp_path / "a.tar", files), tmp_path / "out"
    written = []

    def interrupted(target, content):
        if len(written) == 2:
            target.with_name(target.name + ".part").write_bytes(content[:500])  # as a kill leaves it
            raise KeyboardInterrupt
        written.append(target)
        return write_new(target, content)

    monkeypatch.setattr("mlpmatch_pl.commands.prepare.archives.write_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, out, place)
    assert names_in(out / "data", ".txt") == {"0", "1"}
    monkeypatch.undo()
    before = (out / "data/0.txt").stat().st_mtime_ns
    assert unpack(path, out, place) == 3
    assert (out / "data/0.txt").stat().st_mtime_ns == before
    assert {f"data/{p.name}": p.read_bytes() for p in (out / "data").iterdir()} == files


def test_another_file_in_the_way_is_named_and_kept_before_anything_is_written(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"data/a.txt": b"a", "data/b.txt": b"b"})
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/b.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"b\.txt, or the same file, but another one is there, which is kept"):
        unpack(path, tmp_path / "out", place)
    assert (tmp_path / "out/data/b.txt").read_bytes() == b"mine"
    assert not (tmp_path / "out/data/a.txt").exists()


def test_a_full_disk_is_seen_before_unpacking(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {"data/a.bin": bytes(5_000_000)})
    little = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(UserError, match=r"expected 5\.0 MB of free space in .* for the content of a\.zip"):
        unpack(path, tmp_path / "out", place)
    assert not (tmp_path / "out").exists()


def test_another_archive_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"other/c.txt": b"c"})
    with pytest.raises(UserError, match=r"found none among its 1 files \(the first is other/c\.txt\)"):
        unpack(path, tmp_path / "out", place)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_a_damaged_archive_is_named(suffix, tmp_path):
    files = {f"data/{i}.bin": np.random.default_rng(i).bytes(5000) for i in range(4)}
    path = tmp_path / f"a.{suffix}"
    write_zip(path, files) if suffix == "zip" else write_tar(path, files, "w:gz" if suffix == "tar.gz" else "w")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"expected a whole tar or zip archive, but .* is damaged"):
        unpack(path, tmp_path / "out", place)
    path.write_bytes(b"<html>log in</html>")
    with pytest.raises(UserError, match="is damaged"):
        list_members(path)


def test_write_new_writes_once_and_never_over_another_file(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    assert write_new(path, b"one")
    assert not write_new(path, b"one")
    with pytest.raises(UserError, match="which is kept"):
        write_new(path, b"two")
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_empty_files_do_not_count(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").write_bytes(b"b")
    (tmp_path / "c.png.part").write_bytes(b"c")
    assert names_in(tmp_path, ".png") == {"b"}
    assert names_in(tmp_path / "missing", ".png") == set()
