import hashlib
import importlib
import re

import numpy as np
import pytest
from helpers import compose_train
from helpers.images import save_image, save_mask
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from mlpmatch_pl.data.datasets import base as benchmark
from mlpmatch_pl.data.datasets.ade20k import ade20k
from mlpmatch_pl.data.datasets.camvid import camvid
from mlpmatch_pl.data.datasets.cityscapes import CityscapesMasks, cityscapes
from mlpmatch_pl.data.datasets.coco import coco
from mlpmatch_pl.data.datasets.published import PUBLISHED, PublishedList
from mlpmatch_pl.data.datasets.voc import voc
from mlpmatch_pl.engine.run_folder import save_lists
from mlpmatch_pl.utils.errors import UserError

SIZE = (16, 24)
CLASSES = {"voc": 21, "cityscapes": 19, "coco": 81, "ade20k": 150, "camvid": 11}

# Of cityscapesScripts' table of labels: the ids that the benchmark evaluates.
CITYSCAPES_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


def names(source, indices=None):
    return [source.name(index) for index in (range(len(source)) if indices is None else indices)]


def sentence(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def noise(most, seed=0):
    return np.random.default_rng(seed).integers(0, most, SIZE, np.uint8, endpoint=True)


def save_pair(image, mask, ids, palette=False):
    save_image(image, np.zeros((*SIZE, 3), np.uint8))
    save_mask(mask, ids, palette)


def read_all(data, sizes=None):
    """Read every file that a run reads: images and masks agree in size, masks hold classes and the ignore index."""
    jobs = [(data.train, index) for index in data.labeled_indices]
    jobs += [(source, index) for source in (data.val, data.test) if source for index in range(len(source))]
    assert jobs
    for source, index in jobs:
        image, mask = source.image(index), source.mask(index)
        assert (image.dtype, image.shape) == (np.uint8, (*mask.shape, 3))
        assert sizes is None or mask.shape in sizes
        assert set(np.unique(mask).tolist()) <= {*range(len(data.class_names)), 255}
    assert all(data.train.image(index).ndim == 3 for index in data.unlabeled)


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))  # without end of the last line, as some published lists


# What is known of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CLASSES)
def test_what_is_known_of_a_data_set_fits_together(key):
    info = importlib.import_module(f"mlpmatch_pl.data.datasets.{key}").INFO
    assert info.key == key
    assert len(info.class_names) == len(set(info.class_names)) == CLASSES[key]
    assert len(info.palette) in (0, CLASSES[key])
    assert len(set(info.palette)) == len(info.palette)
    assert all(0 <= value <= 255 for color in info.palette for value in color)
    assert all((info.title, info.license, info.citation))
    assert re.fullmatch(r"https?://\S+", info.homepage)


def test_lists_are_published_for_known_data_sets_only():
    assert set(PUBLISHED) <= set(CLASSES)


@pytest.mark.parametrize("key", CLASSES)
def test_a_configuration_finds_its_data_set(key, tmp_path):
    cfg = compose_train(f"dataset={key}", f"dataset.root={tmp_path}", output_dir=tmp_path)
    node = OmegaConf.to_container(cfg, resolve=True)["dataset"]
    with pytest.raises(Exception, match=f"python -m mlpmatch_pl.prepare dataset={key} root=") as caught:
        instantiate(node, _convert_="all")
    assert isinstance(caught.value.__cause__, UserError)


# VOC ------------------------------------------------------------------------------------------------------------------

VOC_SETS = {"train": range(4), "train_aug": range(10), "val": range(10, 13)}


def voc_lines(indices):
    return [f"JPEGImages/2007_{index:06d}.jpg SegmentationClass/2007_{index:06d}.png" for index in indices]


def voc_images(indices):
    return [f"JPEGImages/2007_{index:06d}.jpg" for index in indices]


@pytest.fixture
def make_voc(tmp_path):
    def make(inside=""):
        base = tmp_path / inside
        for index in range(13):
            ids = noise(20, seed=index)
            ids[0] = 255
            save_pair(
                base / f"JPEGImages/2007_{index:06d}.jpg", base / f"SegmentationClass/2007_{index:06d}.png", ids, True
            )
        for name, indices in VOC_SETS.items():
            write(base / f"ImageSets/Segmentation/{name}.txt", [f"2007_{index:06d}" for index in indices])
        return base

    return make


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_found_in_its_usual_places(make_voc, tmp_path, inside):
    make_voc(inside)
    data = voc(str(tmp_path))
    assert list(data.labeled.names) == names(data.train) == voc_images(range(10))
    assert names(data.val) == voc_images(range(10, 13))
    assert (data.test, data.unlabeled, data.ignore_index) == (None, (), 255)
    expected = noise(20, seed=11)
    expected[0] = 255
    assert (data.val.mask(1) == expected).all()
    read_all(data, {SIZE})


def test_voc_that_is_not_there_is_explained(tmp_path):
    assert sentence(voc, str(tmp_path)) == (
        f"expected PASCAL VOC 2012 with the folder JPEGImages in {tmp_path}, but it does not exist; get it with "
        f"'python -m mlpmatch_pl.prepare dataset=voc root={tmp_path}', or set dataset.root"
    )


def test_voc_trains_on_its_own_set_where_asked_to(make_voc):
    base = make_voc()
    assert names(voc(str(base), image_set="train").train) == voc_images(range(4))
    (base / "ImageSets/Segmentation/train_aug.txt").unlink()
    assert sentence(voc, str(base)) == (
        f"expected the list {base}/ImageSets/Segmentation/train_aug.txt, but it does not exist; make it with "
        f"'python -m mlpmatch_pl.prepare dataset=voc root={base}', or set dataset.image_set=train"
    )


def test_voc_masks_may_be_in_colors(make_voc):
    base = make_voc()
    before = [voc(str(base)).train.mask(index) for index in range(10)]
    for path in (base / "SegmentationClass").iterdir():
        ids = np.array(Image.open(path))
        # VOC's color map, bit by bit: bit 3 n + c of the id is bit 7 - n of channel c.
        colors = np.zeros((256, 3), np.uint8)
        for value, channel, bit in np.ndindex(256, 3, 3):
            colors[value, channel] |= (value >> (3 * bit + channel) & 1) << (7 - bit)
        ids[ids == 255] = 0
        save_image(path, colors[ids])
    for index, mask in enumerate(before):
        assert (voc(str(base)).train.mask(index) == np.where(mask == 255, 0, mask)).all()


def test_voc_void_borders_may_be_in_colors_too(make_voc):
    base = make_voc()
    path = base / "SegmentationClass/2007_000000.png"
    before = voc(str(base)).train.mask(0)
    colors = np.array([*benchmark_info("voc").palette], np.uint8)
    save_image(path, np.where((before == 255)[..., None], np.uint8([224, 224, 192]), colors[before % 255]))
    assert (voc(str(base)).train.mask(0) == before).all()


def benchmark_info(key):
    return importlib.import_module(f"mlpmatch_pl.data.datasets.{key}").INFO


@pytest.mark.parametrize(
    ("labeled", "folder"), [(92, "92"), ("92", "92"), ("blended/1-16", "1_16"), ("u2pl/1-16", "u2pl_1_16")]
)
@pytest.mark.parametrize("inside", ["", "VOCdevkit/VOC2012"])
def test_a_published_list_is_found_by_its_name(make_voc, tmp_path, labeled, folder, inside):
    base = make_voc(inside)
    write(base / f"splits/{folder}/labeled.txt", voc_lines([7, 2]))
    write(base / f"splits/{folder}/unlabeled.txt", voc_lines([0, 1, 3, 4, 5, 6, 8, 9]))
    for path in (base / "SegmentationClass").glob("*_00000[013]*"):
        path.unlink()  # masks of unlabeled images need not be there
    data = voc(str(tmp_path), labeled=labeled)
    assert data.labeled.names == tuple(voc_images([7, 2]))
    assert names(data.train, data.unlabeled) == voc_images([0, 1, 3, 4, 5, 6, 8, 9])
    assert names(data.train, data.labeled_indices) == voc_images([7, 2])
    assert data.labeled.label == f"voc/{labeled}, changed: not the published list"


def test_a_published_list_as_published_is_called_by_its_name_alone(make_voc, monkeypatch):
    base = make_voc()
    path = base / "splits/tiny/labeled.txt"
    write(path, voc_lines([7, 2]))
    write(base / "splits/tiny/unlabeled.txt", voc_lines([0, 1]))
    hashes = [
        hashlib.sha256((path.parent / name).read_bytes()).hexdigest() for name in ("labeled.txt", "unlabeled.txt")
    ]
    monkeypatch.setattr(benchmark, "published_list", lambda key, choice: PublishedList("92", "tiny", *hashes))
    assert voc(str(base), labeled=92).labeled.label == "voc/92"
    path.write_text(path.read_text() + "\n")
    changed = voc(str(base), labeled=92).labeled
    assert changed.label == "voc/92, changed: not the published list"
    assert changed.names == tuple(voc_images([7, 2]))


def test_a_published_list_may_have_other_unlabeled_images(make_voc):
    base = make_voc()
    write(base / "splits/92/labeled.txt", voc_lines([7]))
    write(base / "splits/92/unlabeled.txt", voc_lines([1, 2]))
    write(base / "mine.txt", voc_images([4, 5]))
    data = voc(str(base), labeled=92, unlabeled="mine.txt")
    assert names(data.train, data.unlabeled) == voc_images([4, 5])
    assert "(7 in total); it is not used" in data.notes[0]


def test_a_published_list_that_is_not_there_is_explained(make_voc):
    base = make_voc()
    assert sentence(voc, str(base), labeled="blended/1-16") == (
        f"expected the published list blended/1-16 of PASCAL VOC 2012 at {base}/splits/1_16/labeled.txt, but it does "
        f"not exist; get it with 'python -m mlpmatch_pl.prepare dataset=voc root={base} splits=unimatch data=false', "
        "or choose by fraction, as in dataset.labeled=1/8"
    )


def test_fractions_and_counts_that_are_no_published_name_are_chosen(make_voc):
    base = make_voc()
    assert len(voc(str(base), labeled="1/5").labeled.names) == 2
    data = voc(str(base), labeled=3, split_seed=4)
    assert data.labeled.label == "3 (seed 4)"
    assert len(data.unlabeled) == 7
    assert set(voc(str(base), labeled=1, split_seed=4).labeled.names) < set(data.labeled.names)


def test_validation_images_can_be_taken_out_of_the_training_images(make_voc):
    data = voc(str(make_voc()), labeled=3, val=2)
    assert len(data.val) == 2
    assert not set(names(data.val)) & {*names(data.train, data.unlabeled), *data.labeled.names}
    assert set(names(data.val)) < set(voc_images(range(10)))


# Cityscapes -----------------------------------------------------------------------------------------------------------


def cityscapes_stems():
    parts = {"train": (("aachen", 3), ("jena", 2)), "val": (("ulm", 2),)}
    return [
        f"{part}/{city}/{city}_{index:06d}" for part, all_ in parts.items() for city, n in all_ for index in range(n)
    ]


def cityscapes_line(stem):
    return f"leftImg8bit/{stem}_leftImg8bit.png gtFine/{stem}_gtFine_labelTrainIds.png"


def cityscapes_image(stem):
    return cityscapes_line(stem).split()[0]


@pytest.fixture
def make_cityscapes(tmp_path):
    """Five training and two validation images; both kinds of masks show the same."""
    train_ids = {value: label for label, value in enumerate(CITYSCAPES_IDS.values())}

    def make(*kinds):
        for seed, stem in enumerate(cityscapes_stems()):
            label_ids = noise(33, seed)
            ids = {"labelIds": label_ids, "labelTrainIds": np.vectorize(lambda v: train_ids.get(v, 255))(label_ids)}
            for kind in kinds:
                save_pair(
                    tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png",
                    tmp_path / f"gtFine/{stem}_gtFine_{kind}.png",
                    ids[kind].astype(np.uint8),
                )
        return tmp_path

    return make


def test_cityscapes_classes_are_those_of_the_ids():
    assert benchmark_info("cityscapes").class_names == tuple(CITYSCAPES_IDS)


@pytest.mark.parametrize(
    "kinds", [("labelTrainIds",), ("labelIds",), ("labelIds", "labelTrainIds")], ids=lambda kinds: "+".join(kinds)
)
def test_cityscapes_masks_are_equal_from_either_kind_of_files(make_cityscapes, kinds):
    data = cityscapes(str(make_cityscapes(*kinds)))
    stems = cityscapes_stems()
    assert names(data.train) == [cityscapes_image(stem) for stem in stems[:5]]
    assert names(data.val) == [cityscapes_image(stem) for stem in stems[5:]]
    for source, first in ((data.train, 0), (data.val, 5)):
        for index in range(len(source)):
            assert ("labelTrainIds" in source.pair(index).mask) == ("labelTrainIds" in kinds)
            mask, ids = source.mask(index), noise(33, seed=first + index)
            for label, value in enumerate(CITYSCAPES_IDS.values()):
                assert ((mask == label) == (ids == value)).all()
            assert ((mask == 255) == ~np.isin(ids, list(CITYSCAPES_IDS.values()))).all()
    read_all(data, {SIZE})


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_lists_that_name_train_ids_find_either_kind(make_cityscapes, kind):
    root, stems = make_cityscapes(kind), cityscapes_stems()
    write(root / "splits/1_16/labeled.txt", map(cityscapes_line, stems[1:3]))
    write(root / "splits/1_16/unlabeled.txt", [cityscapes_line(stem) for stem in (stems[0], *stems[3:5])])
    write(root / "val.txt", map(cityscapes_line, stems[5:]))
    data = cityscapes(str(root), labeled="1-16", val="val.txt")
    assert data.labeled.label == "cityscapes/1-16, changed: not the published list"
    assert list(data.labeled.names) == [cityscapes_image(stem) for stem in stems[1:3]]
    assert {data.train.pair(index).mask.rpartition("_")[2] for index in data.labeled_indices} == {f"{kind}.png"}
    assert {data.val.pair(index).mask.rpartition("_")[2] for index in range(2)} == {f"{kind}.png"}
    assert (data.train.mask(data.labeled_indices[0]) == cityscapes(str(root)).train.mask(1)).all()
    read_all(data, {SIZE})


def test_cityscapes_training_images_without_mask_are_unlabeled(make_cityscapes):
    root = make_cityscapes("labelIds")
    (root / "gtFine/train/jena/jena_000001_gtFine_labelIds.png").unlink()
    data = cityscapes(str(root))
    assert names(data.train, data.unlabeled) == ["leftImg8bit/train/jena/jena_000001_leftImg8bit.png"]
    (root / "gtFine/val/ulm/ulm_000001_gtFine_labelIds.png").unlink()
    assert sentence(cityscapes, str(root)) == (
        "expected a mask for every validation image, but leftImg8bit/val/ulm/ulm_000001_leftImg8bit.png has none (1 in "
        "total); add gtFine/val"
    )


def test_cityscapes_without_images_is_explained(tmp_path):
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    assert sentence(cityscapes, str(tmp_path)) == (
        f"expected images *_leftImg8bit.png in {tmp_path}/leftImg8bit/train/<city>, but found none"
    )


def test_cityscapes_masks_are_told_apart_by_their_reader():
    assert CityscapesMasks().describe() != CityscapesMasks.__mro__[1]().describe()


# COCO, ADE20K, CamVid -------------------------------------------------------------------------------------------------


@pytest.fixture
def make_coco(tmp_path):
    for part, count in (("train2017", 4), ("val2017", 3)):
        for index in range(count):
            stem = f"{index + (100 if part == 'val2017' else 0):012d}"
            save_pair(tmp_path / f"{part}/{stem}.jpg", tmp_path / f"masks/{part}/{stem}.png", noise(80, seed=index))
    return tmp_path


def test_coco_is_read_in_its_layout(make_coco):
    (make_coco / "masks/train2017/000000000002.png").unlink()
    (make_coco / "masks/val2017/000000000101.png").unlink()
    data = coco(str(make_coco))
    assert names(data.train) == [f"train2017/{index:012d}.jpg" for index in range(4)]
    assert names(data.train, data.unlabeled) == ["train2017/000000000002.jpg"]
    assert names(data.val) == ["val2017/000000000100.jpg", "val2017/000000000102.jpg"]
    assert (data.train.mask(3) == noise(80, seed=3)).all()
    assert (data.val.mask(1) == noise(80, seed=2)).all()
    read_all(data, {SIZE})


def test_masks_and_lists_of_coco_may_be_flat_or_in_folders(make_coco):
    flat, foldered = (f"train2017/000000000002.jpg masks/{part}000000000002.png" for part in ("", "train2017/"))
    plain = coco(str(make_coco), labeled=1)
    for moved in (False, True):
        if moved:  # as UniMatch gives them
            for path in [*(make_coco / "masks").rglob("*.png")]:
                path.rename(make_coco / "masks" / path.name)
            for name in ("train2017", "val2017"):
                (make_coco / "masks" / name).rmdir()
        for line in (flat, foldered):
            (make_coco / "list.txt").write_text(line)
            data = coco(str(make_coco), labeled="list.txt")
            assert data.labeled.names == ("train2017/000000000002.jpg",)
            assert data.train.mask(data.labeled_indices[0]).ndim == 2
        assert len(coco(str(make_coco)).val) == len(plain.val)


def test_coco_without_masks_is_explained(make_coco):
    for path in (make_coco / "masks/train2017").iterdir():
        path.unlink()
    assert sentence(coco, str(make_coco)) == (
        f"expected files in {make_coco}/masks/train2017, but found none; get them with "
        f"'python -m mlpmatch_pl.prepare dataset=coco root={make_coco}'"
    )


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016"])
def test_ade20k_is_read_in_its_layout_and_zero_does_not_count(tmp_path, inside):
    base, every = tmp_path / inside, (np.arange(SIZE[0] * SIZE[1]) % 151).astype(np.uint8).reshape(SIZE)
    for part, stem in (("training", "ADE_train_00000001"), ("training", "ADE_train_00000002"), ("validation", "v1")):
        save_pair(base / f"images/{part}/{stem}.jpg", base / f"annotations/{part}/{stem}.png", every)
    data = ade20k(str(tmp_path))
    assert names(data.train) == ["images/training/ADE_train_00000001.jpg", "images/training/ADE_train_00000002.jpg"]
    assert names(data.val) == ["images/validation/v1.jpg"]
    expected = every.astype(int) - 1
    expected[every == 0] = 255
    assert (data.train.mask(0) == expected).all()
    assert set(np.unique(expected)) == {*range(150), 255}
    read_all(data, {SIZE})
    save_mask(base / "annotations/validation/v1.png", np.full(SIZE, 151, np.uint8), palette=False)
    assert f"but {base}/annotations/validation/v1.png has 151;" in sentence(data.val.mask, 0)


def test_ade20k_without_annotations_is_explained(tmp_path):
    (tmp_path / "annotations/training").mkdir(parents=True)
    assert sentence(ade20k, str(tmp_path)) == (
        f"expected files in {tmp_path}/annotations/training, but found none; get them with "
        f"'python -m mlpmatch_pl.prepare dataset=ade20k root={tmp_path}'"
    )


@pytest.fixture
def make_camvid(tmp_path):
    for part, indices in {"train": range(4), "val": range(4, 6), "test": range(6, 9)}.items():
        for index in indices:
            stem = f"{part}/0001TP_{index:06d}"
            save_pair(tmp_path / f"images/{stem}.png", tmp_path / f"masks/{stem}.png", noise(10, seed=index))
        lines = [f"images/{part}/0001TP_{i:06d}.png masks/{part}/0001TP_{i:06d}.png" for i in indices]
        write(tmp_path / f"splits/{part}.txt", lines)
    return tmp_path


def test_camvid_is_read_by_its_lists(make_camvid):
    data = camvid(str(make_camvid), labeled="1/2")
    assert [len(data.train), len(data.labeled.names), len(data.unlabeled), len(data.val), len(data.test)] == [
        4,
        2,
        2,
        2,
        3,
    ]
    assert (data.test.mask(2) == noise(10, seed=8)).all()
    read_all(data, {SIZE})


# Lists that a run saves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True], ids=["with masks", "bare names"])
@pytest.mark.parametrize("key", ["voc", "cityscapes", "coco", "camvid"])
def test_the_lists_that_a_run_saves_give_another_run_the_same_sets(key, bare, request):
    root, load = {
        "voc": lambda: (request.getfixturevalue("make_voc")(), voc),
        "cityscapes": lambda: (request.getfixturevalue("make_cityscapes")("labelIds", "labelTrainIds"), cityscapes),
        "coco": lambda: (request.getfixturevalue("make_coco"), coco),
        "camvid": lambda: (request.getfixturevalue("make_camvid"), camvid),
    }[key]()
    first = load(str(root), labeled=2)
    save_lists(root, first)
    if bare:
        write(root / "labeled.txt", first.labeled.names)
        write(root / "val.txt", names(first.val))
    again = load(str(root), labeled="labeled.txt", val="val.txt")
    assert again.labeled.sha256 == first.labeled.sha256
    assert names(again.val) == names(first.val)
    assert sorted(names(again.train, again.unlabeled)) == sorted(names(first.train, first.unlabeled))
    assert all((again.val.mask(index) == first.val.mask(index)).all() for index in range(len(first.val)))
    read_all(again, {SIZE})


# Real files -----------------------------------------------------------------------------------------------------------

VOC_LISTS = {
    92: "92", 183: "183", 366: "366", 732: "732", 1464: "1464",
    "blended/1-16": "1_16", "blended/1-8": "1_8", "blended/1-4": "1_4",
}  # fmt: skip


def lines(path):
    return path.read_text().splitlines()


@pytest.mark.real_data
@pytest.mark.parametrize("labeled", VOC_LISTS, ids=str)
def test_voc_files_are_read_by_lists_that_were_cut(real_data, labeled):
    root = real_data / "voc2012"
    data = voc(str(root), labeled=labeled)
    folder = root / "splits" / VOC_LISTS[labeled]
    assert [f"{name} " for name in data.labeled.names] == [
        line[: line.index(" ") + 1] for line in lines(folder / "labeled.txt")
    ]
    assert len(data.unlabeled) == len(lines(folder / "unlabeled.txt"))
    assert len(data.labeled.names) + len(data.unlabeled) == len(data.train) == 180
    assert len(data.val) == 120
    assert data.labeled.label == f"voc/{labeled}, changed: not the published list"
    assert data.notes == ()


@pytest.mark.real_data
def test_voc_files_hold_classes_and_void(real_data):
    data = voc(str(real_data / "voc2012"))
    read_all(data)
    for source in (data.train, data.val):
        for index in range(0, len(source), 10):
            with Image.open(real_data / "voc2012" / source.pair(index).mask) as file:
                assert (source.mask(index) == np.array(file)).all()


@pytest.mark.real_data
@pytest.mark.parametrize("dataset", ["voc", "cityscapes"])
def test_public_lists_are_taken_whole_and_called_by_their_names(real_data, tmp_path, dataset):
    splits = real_data / "splits" / {"voc": "pascal", "cityscapes": "cityscapes"}[dataset]
    (tmp_path / "splits").symlink_to(splits)
    every = next(iter(PUBLISHED[dataset].values())).folder
    train = [line.split() for name in ("labeled", "unlabeled") for line in lines(splits / every / f"{name}.txt")]
    held_out = [line.split() for line in lines(splits / "val.txt")]
    for name in (part for pair in (*train, *held_out) for part in pair):
        name = name.replace("labelTrainIds", "labelIds")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, pairs in (("train_aug", train), ("val", held_out)):
        write(tmp_path / f"ImageSets/Segmentation/{name}.txt", [image[11:-4] for image, _ in pairs])
    load = {"voc": voc, "cityscapes": cityscapes}[dataset]
    for entry in PUBLISHED[dataset].values():
        data = load(str(tmp_path), labeled=entry.name)
        assert data.labeled.label == f"{dataset}/{entry.name}"
        assert len(data.labeled.names) == len(lines(splits / entry.folder / "labeled.txt"))
        assert len(data.labeled.names) + len(data.unlabeled) == len(data.train) == len(train)
        assert len(data.val) == len(held_out)
        assert data.notes == ()


@pytest.mark.real_data
def test_cityscapes_label_ids_of_a_real_file_become_train_ids(real_data):
    folder = real_data / "cityscapes_fixture/gtFine/val/frankfurt"
    label_ids, train_ids = (
        folder / f"frankfurt_000000_000294_gtFine_{kind}.png" for kind in ("labelIds", "labelTrainIds")
    )
    read = CityscapesMasks()
    ids, expected = np.array(Image.open(label_ids)), np.array(Image.open(train_ids))
    assert len(np.unique(expected)) > 8
    assert (read(train_ids) == expected).all()
    # The two files were made smaller one by one, so that some pixels between two objects differ.
    assert (read(label_ids) == expected).mean() > 0.997
    names_of = {value: name for name, value in CITYSCAPES_IDS.items()}
    classes = benchmark_info("cityscapes").class_names
    for value in np.unique(ids):
        most = np.bincount(expected[ids == value]).argmax()
        assert most == (classes.index(names_of[value]) if value in names_of else 255)
        assert (read(label_ids)[ids == value] == most).all()


@pytest.mark.real_data
def test_camvid_has_its_published_sizes(real_data):
    data = camvid(str(real_data / "camvid"), labeled="1/8")
    assert [len(data.train), len(data.val), len(data.test), len(data.labeled.names)] == [367, 101, 233, 46]
    assert data.train.image(0).shape == (360, 480, 3)
    assert {len(set(names(source))) for source in (data.train, data.val, data.test)} == {367, 101, 233}
    assert set(np.unique(data.test.mask(0))) <= {*range(11), 255}
