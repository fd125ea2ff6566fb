import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mlpmatch_pl.data import cache
from mlpmatch_pl.data.cache import CachedSource
from mlpmatch_pl.data.dataset import LabeledDataset, UnlabeledDataset
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.errors import UserError


class FileIndex:
    """Images of different sizes in a folder, and how often each is decoded."""

    def __init__(self, folder, count=6, options="rgb"):
        self.folder, self.count, self.options, self.decoded = Path(folder), count, options, []
        for index in range(count):
            if not self._path(index).exists():
                rng = np.random.default_rng(index)
                Image.fromarray(rng.integers(0, 256, (40 + index, 60 - index, 3), dtype=np.uint8)).save(
                    self._path(index)
                )

    def _path(self, index):
        return self.folder / f"{index}.png"

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index}.png"

    def stamp(self, index):
        status = self._path(index).stat()
        return f"{status.st_size} {status.st_mtime_ns} {self.options}"

    def image(self, index):
        self.decoded.append(("image", index))
        return np.asarray(Image.open(self._path(index)))

    def mask(self, index):
        self.decoded.append(("mask", index))
        return (np.asarray(Image.open(self._path(index)))[..., 0] % 3).copy()


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return FileIndex(folder)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "caches" / "files.cache"


def reasons(caplog):
    return [record.getMessage().split(": ", 1)[1] for record in caplog.records if "building" in record.getMessage()]


def assert_equal(cached, files):
    for index in range(len(files)):
        assert cached.name(index) == files.name(index)
        assert (cached.image(index) == files.image(index)).all()
        assert (cached.mask(index) == files.mask(index)).all()


def test_cache_gives_what_the_source_gives_and_decodes_it_once(files, path):
    cached = CachedSource(files, path, masked=range(6))
    assert len(cached) == 6
    assert_equal(cached, files)
    files.decoded.clear()
    again = CachedSource(files, path, masked=range(6))
    for _ in range(2):
        [(again.image(index), again.mask(index)) for index in range(6)]
    assert files.decoded == []


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint8, 4), (np.uint16, 1), (np.uint16, 12)])
def test_types_and_channels_are_kept(files, path, dtype, channels):
    images = [np.random.default_rng(i).integers(0, 2**16, (9 + i, 7, channels)).astype(dtype) for i in range(6)]
    files.image = lambda index: images[index][:, ::-1]  # not contiguous
    cached = CachedSource(files, path)
    for index, image in enumerate(images):
        found = cached.image(index)
        assert (found.dtype, found.shape) == (dtype, image.shape)
        assert (found == image[:, ::-1]).all()
        assert found.flags.c_contiguous


def test_what_comes_from_the_cache_cannot_be_written_to(files, path):
    cached = CachedSource(files, path, masked=range(6))
    for pixels in (cached.image(0), cached.mask(0)):
        with pytest.raises(ValueError, match="read-only"):
            pixels[0] = 0


def test_only_what_is_asked_for_is_kept_and_the_rest_comes_from_the_source(files, path):
    cached = CachedSource(files, path, indices=[1, 4], masked=[4])
    assert set(files.decoded) == {("image", 1), ("image", 4), ("mask", 4)}
    small = path.stat().st_size
    assert_equal(cached, files)
    files.decoded.clear()
    cached.image(1), cached.mask(4)
    assert files.decoded == []
    cached.image(0), cached.mask(1)
    assert files.decoded == [("image", 0), ("mask", 1)]
    CachedSource(files, path, masked=range(6))
    assert path.stat().st_size > 2 * small


def touch(files, path):
    image = files._path(3)
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))


def replace(files, path):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(files._path(2))


def change_options(files, path):
    files.options = "bgr"


def cut_off(files, path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_a_little(files, path):
    path.write_bytes(path.read_bytes()[:10])


def empty(files, path):
    path.write_bytes(b"")


def overwrite_the_end(files, path):
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))


STALE, BROKEN = "files, options or the choice of images have changed", "it is incomplete"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (touch, STALE),
        (replace, STALE),
        (change_options, STALE),
        (cut_off, BROKEN),
        (cut_to_a_little, BROKEN),
        (empty, BROKEN),
        (overwrite_the_end, BROKEN),
        (lambda files, path: path.unlink(), "there is none yet"),
    ],
)
def test_a_stale_or_broken_cache_is_built_anew_and_says_why(files, path, caplog, change, reason):
    CachedSource(files, path, masked=range(6))
    change(files, path)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert_equal(CachedSource(files, path, masked=range(6)), files)
    assert reasons(caplog) == [reason]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        CachedSource(files, path, masked=range(6))
    assert reasons(caplog) == []


@pytest.mark.parametrize("choice", [{"indices": [0, 1]}, {"masked": [0]}])
def test_another_choice_of_images_is_another_cache(files, path, caplog, choice):
    CachedSource(files, path)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        CachedSource(files, path, **choice)
    assert reasons(caplog) == [STALE]


def test_a_build_that_fails_leaves_nothing_and_keeps_the_old_cache(files, path):
    CachedSource(files, path)
    before = path.read_bytes()
    files.options = "changed"
    files._path(5).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read 5\.png for the cache \(cannot identify image"):
        CachedSource(files, path)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_cache import FileIndex
from mlpmatch_pl.data.cache import CachedSource
class Slow(FileIndex):
    def image(self, index):
        if index == 5 and len(self.decoded) > 6:  # the first ones estimate the size
            print("nearly", flush=True)
            time.sleep(60)
        return super().image(index)
CachedSource(Slow(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_is_not_taken_for_whole(files, path, request, number):
    arguments = [str(request.path.parent), str(files.folder), str(path)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"nearly\n"
    process.send_signal(number)
    if number == signal.SIGINT:  # waits for the image that is being decoded
        time.sleep(0.5)
        process.kill()
    process.communicate(timeout=60)
    assert not path.exists()
    assert_equal(CachedSource(files, path, masked=range(6)), files)


def test_what_a_killed_build_left_is_removed_by_a_later_one_but_not_a_running_ones(files, path):
    path.parent.mkdir()
    old, running = (path.with_name(f"{path.name}.{name}.part") for name in ("old", "running"))
    old.write_bytes(b"x")
    running.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    CachedSource(files, path)
    assert sorted(path.parent.iterdir()) == sorted([path, running])


def test_too_little_room_is_refused_before_anything_is_written(files, path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=20_000))
    with pytest.raises(UserError) as caught:
        CachedSource(files, path)
    assert str(caught.value) == (
        f"expected 0.00 GB of free disk for the cache {path}, but 0.00 GB are free; "
        "make room, choose another folder by loader.cache, or set loader.cache=null"
    )
    assert list(path.parent.iterdir()) == []


def test_room_is_estimated_from_some_of_the_images(files):
    exact = sum(files.image(index).nbytes + cache.ALIGNMENT for index in range(6))
    jobs = [(index % 6, False) for index in range(600)]
    files.decoded.clear()
    assert cache._estimate(files, jobs) == pytest.approx(100 * exact, rel=0.02)
    assert len(files.decoded) <= 2 * cache.SAMPLED


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(files, path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_arrays", full)
    with pytest.raises(
        UserError, match=r"cannot write the cache .*files\.cache \(No space left on device\); make room"
    ):
        CachedSource(files, path)


def test_a_source_without_stamps_is_refused(path):
    class Generated:
        def __len__(self):
            return 1

    with pytest.raises(UserError, match=r"expected files for loader\.cache, but Generated has no stamps"):
        CachedSource(Generated(), path)


def test_few_images_are_decoded_ahead_of_the_disk(files, monkeypatch):
    monkeypatch.setattr(cache, "reader_threads", lambda: 1)
    written = cache._decoded(files, [(index % 6, False) for index in range(100)])
    next(written)
    time.sleep(0.2)
    assert len(files.decoded) <= 6
    written.close()


def test_the_object_pickles_small_and_opens_the_file_anew(files, path):
    cached = CachedSource(files, path, masked=range(6))
    cached.image(0)
    pickled = pickle.dumps(cached)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    again.source.decoded.clear()
    assert (again.image(3) == cached.image(3)).all()
    assert again.source.decoded == []


def test_a_worker_refuses_a_cache_that_was_replaced_meanwhile(files, path):
    pickled = pickle.dumps(CachedSource(files, path))
    CachedSource(files, path, indices=[0])
    with pytest.raises(UserError, match=r"expected the cache .* as this run made it, but files, options or the choice"):
        pickle.loads(pickled).image(3)


def build(folder, path, results):
    cached = CachedSource(FileIndex(folder), Path(path))
    results.put(int(sum(cached.image(index).sum() for index in range(6))))


@pytest.mark.slow
def test_processes_that_build_at_the_same_time_do_not_disturb_each_other(files, path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=build, args=(files.folder, path, results)) for _ in range(2)]
    [process.start() for process in processes]
    expected = int(sum(files.image(index).sum() for index in range(6)))
    assert [results.get(timeout=120) for _ in processes] == [expected] * 2
    [process.join(60) for process in processes]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_views_of_cached_images_equal_those_of_the_files_in_workers(files, path, context):
    cached = CachedSource(files, path, masked=range(6))

    def loaded(source, workers):
        labeled = LabeledDataset(source, range(6), 3, WeakView(48), seed=0)
        unlabeled = UnlabeledDataset(source, range(6), WeakView(48), StrongView(), CutMix(), 2, False, seed=0)
        options = {"multiprocessing_context": context} if workers else {}
        draws = [(index, index) for index in range(6)]
        for dataset in (labeled, unlabeled):
            yield from DataLoader(dataset, sampler=draws, num_workers=workers, **options)

    pairs = list(zip(loaded(cached, 1), loaded(files, 0), strict=True))
    assert len(pairs) == 12
    for own, expected in pairs:
        assert all((own[key] == expected[key]).all() for key in expected)
