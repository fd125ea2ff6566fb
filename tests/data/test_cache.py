import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.images import save_image, save_mask
from PIL import Image
from torch.utils.data import DataLoader

from mlpmatch_pl.data import cache
from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.cache import CachedSource, fill_cache, with_cache
from mlpmatch_pl.data.dataset import LabeledDataset
from mlpmatch_pl.data.datasets.folder import folder as load_folder
from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.utils.errors import UserError


class Files:
    """Images of different sizes in a folder, and which of them were decoded."""

    def __init__(self, folder, count=6):
        self.folder, self.count, self.options, self.decoded = folder, count, "rgb", set()
        rng = np.random.default_rng(0)
        for index in range(count):
            shape = (40 + index, 60 - index)
            save_image(self.path(index, "image"), rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            save_mask(self.path(index, "mask"), rng.integers(0, 3, shape, dtype=np.uint8), palette=False)

    def path(self, index, kind):
        return self.folder / kind / f"{index}.png"

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index}.png"

    def stamp(self, index):
        status = self.path(index, "image").stat()
        return f"{status.st_size} {status.st_mtime_ns} {self.options}"

    def image(self, index):
        return self._read(index, "image")

    def mask(self, index):
        return self._read(index, "mask")

    def _read(self, index, kind):
        self.decoded.add((index, kind))
        return np.asarray(Image.open(self.path(index, kind)))


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "files")


@pytest.fixture
def val(tmp_path):
    return Files(tmp_path / "val", count=1)


@pytest.fixture
def data(files, val):
    """Images 1 and 4 are labeled and 2 is unlabeled."""
    return SegmentationData(("a", "b", "c"), files, Split("two", ("1.png", "4.png")), unlabeled=(2,), val=val)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def content(source):
    return [(source.image(index).tolist(), source.mask(index).tolist()) for index in range(len(source))]


def test_arrays_equal_those_of_the_source_and_are_decoded_once(files, folder):
    folder.mkdir()
    expected = content(files)
    assert content(CachedSource(files, folder)) == expected
    files.decoded.clear()
    assert content(CachedSource(files, folder)) == expected
    assert not files.decoded


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint16, 12)])
def test_types_and_channels_are_kept(files, folder, dtype, channels):
    folder.mkdir()
    image = np.random.default_rng(0).integers(0, 2**16, (9, 7, channels)).astype(dtype)
    files.image = lambda index: image[:, ::-1]  # not contiguous
    cached = CachedSource(files, folder)
    for _ in range(2):
        found = cached.image(0)
        assert (found.dtype, found.shape) == (dtype, image.shape)
        assert (found == image[:, ::-1]).all()
    assert found.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


@pytest.mark.parametrize("unlabeled", [True, False])
def test_filling_decodes_what_a_training_reads_and_nothing_else(data, files, val, folder, unlabeled):
    fill_cache(data, folder, unlabeled)
    used = {(1, "image"), (4, "image"), (1, "mask"), (4, "mask")}
    assert files.decoded == (used | {(2, "image")} if unlabeled else used)
    assert val.decoded == {(0, "image"), (0, "mask")}
    files.decoded.clear()
    fill_cache(data, folder, unlabeled)
    assert not files.decoded


def touch(files):
    image = files.path(1, "image")
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))


def overwrite(files):
    save_image(files.path(1, "image"), np.zeros((40, 60, 3), np.uint8))


def change_options(files):
    files.options = "bgr"


@pytest.mark.parametrize(
    ("change", "again"), [(touch, {(1, "image"), (1, "mask")}), (overwrite, {(1, "image"), (1, "mask")}),
                          (change_options, {(1, "image"), (4, "image"), (2, "image"), (1, "mask"), (4, "mask")})]
)  # fmt: skip
def test_what_has_changed_is_decoded_again(data, files, folder, change, again):
    fill_cache(data, folder)
    change(files)
    files.decoded.clear()
    fill_cache(data, folder)
    assert files.decoded == again
    assert content(with_cache(data, folder).train) == content(files)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut within its header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "smaller in its header": lambda path: path.write_bytes(path.read_bytes().replace(b"(41,", b"(11,", 1)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_decoded_again(files, folder, damage):
    folder.mkdir()
    cached = CachedSource(files, folder)
    expected = cached.image(1).tolist()
    damage(cached.path(1, "image"))
    files.decoded.clear()
    assert [cached.image(1).tolist() for _ in range(2)] == [expected] * 2
    assert files.decoded == {(1, "image")}


def test_a_cache_that_cannot_be_written_during_training_is_no_error(files, folder):
    folder.write_bytes(b"a file in its place")
    assert content(CachedSource(files, folder)) == content(files)


def test_a_bad_file_stops_filling_and_leaves_no_part(data, files, folder):
    files.path(4, "image").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read 4\.png \(cannot identify image"):
        fill_cache(data, folder)
    assert not list(folder.glob("*.part"))
    fill_cache(data, folder, skip_bad=True)
    with pytest.raises(UserError, match=r"cannot read 4\.png"):
        with_cache(data, folder).train.image(4)


def test_too_little_space_is_refused(data, folder, monkeypatch):
    monkeypatch.setattr(cache, "ESTIMATE_SAMPLES", 2)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match=r"expected 0\.00 GB of free disk space for .*, but 0\.00 GB are free"):
        fill_cache(data, folder)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    fill_cache(data, folder)


def test_a_disk_that_fills_up_is_a_user_error(data, folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write the cache .* \(No space left on device\); free some space"):
        fill_cache(data, folder)
    assert list(folder.iterdir()) == []


def test_a_source_without_stamps_is_refused(folder):
    class Generated:
        def __len__(self):
            return 1

    with pytest.raises(UserError, match=r"expected files for loader\.cache, but Generated cannot tell"):
        CachedSource(Generated(), folder)


def test_workers_read_the_cache(data, files, folder):
    fill_cache(data, folder)
    cached = with_cache(data, folder).train
    assert len(pickle.dumps(cached)) < 2000

    def samples(source, workers):
        dataset = LabeledDataset(source, (1, 4), 3, WeakView(48), seed=0)
        return list(DataLoader(dataset, sampler=[(0, 0), (1, 1)], num_workers=workers))

    files.image = files.mask = None  # the workers inherit it
    found = samples(cached, 1)
    del files.image, files.mask
    for own, expected in zip(found, samples(files, 0), strict=True):
        assert all((own[key] == expected[key]).all() for key in expected)


def test_the_stamp_of_a_file_changes_with_image_mask_and_options(folder_root, classes):
    def stamp(**options):
        source = load_folder(str(folder_root), classes, val=1, **options).train
        return next(source.stamp(i) for i in range(len(source)) if source.has_mask(i))

    stamps = [stamp(), stamp(bit_depth=16), stamp(mask_values={0: 1})]
    for kind in ("images", "masks"):
        for path in (folder_root / kind).rglob("*.*"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        stamps.append(stamp())
    assert stamp() == stamps[-1]
    assert len(set(stamps)) == 5


def test_a_missing_file_has_a_stamp(folder_root, classes):
    source = load_folder(str(folder_root), classes, val=1).train
    before = source.stamp(0)
    (folder_root / source.name(0)).unlink()
    assert source.stamp(0) != before
