import errno
import os
import pickle
import resource
import signal
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mlpmatch_pl.callbacks.checkpoints import AtomicCheckpointIO
from mlpmatch_pl.utils.checkpoint import is_whole, read_checkpoint, write_checkpoint
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write, remove_unfinished

CONTENT = {
    "global_step": 7,
    "hyper_parameters": {"lr": 0.1, "names": ["a", "b"]},
    "state_dict": {"weight": torch.arange(40, dtype=torch.float32), "steps": torch.tensor(3)},
}


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(CONTENT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.fixture
def small_files():
    """The system refuses files above 100 kB, as a full disk or a quota would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def same(one, two):
    return pickle.dumps([one["global_step"], one["hyper_parameters"]]) == pickle.dumps(
        [two["global_step"], two["hyper_parameters"]]
    ) and all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in CONTENT["state_dict"])


def test_a_checkpoint_is_read_as_it_was_written(checkpoint):
    assert same(read_checkpoint(checkpoint), CONTENT)


def test_every_truncation_is_found(checkpoint):
    content = checkpoint.read_bytes()
    for length in [*range(0, len(content), 29), len(content) - 1]:
        checkpoint.write_bytes(content[:length])
        assert not is_whole(checkpoint)
        with pytest.raises(UserError, match=r"expected a training checkpoint, but .*last\.ckpt cannot be read"):
            read_checkpoint(checkpoint)


def test_every_flipped_bit_is_found_or_changes_nothing(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    found = 0
    for position in range(0, len(content), 13):
        content[position] ^= 1 << position % 8
        checkpoint.write_bytes(content)
        try:
            assert same(read_checkpoint(checkpoint), CONTENT)
        except UserError:
            found += 1
        content[position] ^= 1 << position % 8
    assert found > 30


def test_torch_alone_would_not_find_a_flipped_bit_in_a_weight(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[content.index(CONTENT["state_dict"]["weight"].numpy().tobytes()) + 30] ^= 1
    checkpoint.write_bytes(content)
    assert not same(torch.load(checkpoint, weights_only=True), CONTENT)
    assert not is_whole(checkpoint)


def test_a_folder_or_a_pickle_bomb_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Bomb()))
    torch.save({**CONTENT, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    for name in ("folder", "pickle", "bomb"):
        with pytest.raises(UserError, match=f"{name}.ckpt cannot be read as one"):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt", weights_only=False)
    assert not (tmp_path / "exploded").exists()


def test_the_last_checkpoint_before_is_kept(checkpoint):
    write_checkpoint({**CONTENT, "global_step": 8}, checkpoint)
    write_checkpoint({**CONTENT, "global_step": 9}, checkpoint)
    steps = {path.name: read_checkpoint(path)["global_step"] for path in checkpoint.parent.iterdir()}
    assert steps == {"last.ckpt": 9, "last-1.ckpt": 8}


def test_without_hard_links_the_one_before_is_copied(checkpoint, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "no hard links here")

    def look(path, target):
        assert is_whole(checkpoint)  # at every moment
        os.replace(path, target)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", look)
    write_checkpoint({**CONTENT, "global_step": 8}, checkpoint)
    assert read_checkpoint(checkpoint)["global_step"] == 8
    assert read_checkpoint(checkpoint.with_name("last-1.ckpt"))["global_step"] == 7


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_disk_that_cannot_sync_folders_is_no_error(number, passes, tmp_path, monkeypatch):
    sync = os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "folder")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with nullcontext() if passes else pytest.raises(OSError, match="folder"):
        atomic_write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_full_disk_leaves_the_file_before_and_says_how_much_is_missing(checkpoint, small_files):
    large = {**CONTENT, "state_dict": {"weight": torch.zeros(500_000)}}
    with pytest.raises(UserError, match=r"expected 1\.9 MiB of free space for .*last\.ckpt, but the disk is full"):
        write_checkpoint(large, checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert same(read_checkpoint(checkpoint), CONTENT)


def test_a_write_that_fails_otherwise_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "broken disk")

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        atomic_write(tmp_path / "file", "after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "before"}


def test_what_killed_writers_left_is_removed(checkpoint):
    checkpoint.with_name("last.ckpt.unfinished").write_bytes(b"half")
    remove_unfinished(checkpoint.parent)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
