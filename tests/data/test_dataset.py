import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule
from mlpmatch_pl.data.dataset import MAX_TRIES, EvalDataset, LabeledDataset, SkippedImages, UnlabeledDataset
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.shapes import Shapes, shapes
from mlpmatch_pl.data.files import FileSource
from mlpmatch_pl.data.sampler import StreamSampler
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.errors import UserError

SIZE = 40


def unlabeled(seed=0, num_strong=2, second_view=False, indices=range(3), strong=None, p=0.5):
    weak, source = WeakView(SIZE), Shapes("train", 3, 48)
    return UnlabeledDataset(
        source, list(indices), weak, strong or StrongView(), CutMix(p=p), num_strong, second_view, seed
    )


def labeled(seed=0, indices=range(3)):
    return LabeledDataset(Shapes("train", 3, 48), list(indices), 6, WeakView(SIZE), seed)


def digest(sample):
    if isinstance(sample, dict):
        return {key: digest(value) for key, value in sample.items()}
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest() if torch.is_tensor(sample) else sample


def described(sample):
    return {
        key: described(value) if isinstance(value, dict) else (tuple(value.shape), value.dtype)
        for key, value in sample.items()
        if key != "index"
    }


VIEWS = {
    "weak": ((3, SIZE, SIZE), torch.uint8),
    "strong": ((2, 3, SIZE, SIZE), torch.uint8),
    "valid": ((SIZE, SIZE), torch.bool),
}


def test_labeled_sample_keeps_the_contract():
    assert described(labeled()[0, 0]) == {
        "image": ((3, SIZE, SIZE), torch.uint8),
        "mask": ((SIZE, SIZE), torch.uint8),
    }


@pytest.mark.parametrize("second_view", [False, True])
def test_unlabeled_sample_keeps_the_contract_and_has_a_partner_only_when_asked(second_view):
    sample = unlabeled(second_view=second_view)[1, 7]
    expected = {**VIEWS, "boxes": ((2, 4), torch.int64)}
    assert described(sample) == ({**expected, "partner": VIEWS} if second_view else expected)
    assert sample["index"] == 1


def test_whole_image_sample_keeps_the_contract():
    source = Shapes("val", 2, 48)
    sample = EvalDataset(source, 6, 255)[1]
    assert described(sample) == {"image": ((3, 48, 48), torch.uint8), "mask": ((48, 48), torch.uint8)}
    assert sample["index"] == 1
    assert (sample["image"].numpy() == source.image(1).transpose(2, 0, 1)).all()
    assert (sample["mask"].numpy() == source.mask(1)).all()


def test_index_of_a_sample_counts_in_the_source_not_in_the_choice():
    dataset = unlabeled(indices=[2, 0])
    assert len(dataset) == 2
    assert [dataset[position, 0]["index"] for position in (0, 1)] == [2, 0]


def test_the_two_strong_views_differ_in_every_sample():
    dataset = unlabeled(strong=StrongView([{"name": "ColorJitter", "p": 1.0}]))
    for draw in range(30):
        first, second = dataset[draw % 3, draw]["strong"]
        assert not torch.equal(first, second)


def test_the_boxes_of_a_sample_differ_and_lie_in_the_view():
    dataset = unlabeled(p=1.0)
    for draw in range(30):
        boxes = dataset[0, draw]["boxes"]
        assert boxes[0].tolist() != boxes[1].tolist()
        assert (boxes >= 0).all()
        assert (boxes <= SIZE).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()


def test_strong_views_are_of_the_weak_view():
    sample = unlabeled(strong=StrongView([]), second_view=True)[0, 3]
    for views in (sample, sample["partner"]):
        assert all(torch.equal(view, views["weak"]) for view in views["strong"])


def test_weak_views_and_partners_take_different_crops_of_the_same_image():
    dataset = unlabeled(second_view=True)
    pairs = [(sample["weak"], sample["partner"]["weak"]) for sample in (dataset[0, draw] for draw in range(10))]
    assert not any(torch.equal(*pair) for pair in pairs)


def test_unlabeled_samples_have_no_mask_and_read_none(folder_root, classes, monkeypatch):
    data = folder(str(folder_root), classes, labeled=1, val=1)
    monkeypatch.setattr(FileSource, "mask", lambda self, index: pytest.fail("a mask was read"))
    dataset = UnlabeledDataset(
        data.train, data.unlabeled, WeakView(SIZE), StrongView(), CutMix(), 2, second_view=True, seed=0
    )
    assert data.train.pair(data.unlabeled[0]).mask
    for position in range(len(dataset)):
        sample = dataset[position, position]
        assert set(sample) == {"weak", "strong", "valid", "boxes", "index", "partner"}
        assert set(sample["partner"]) == {"weak", "strong", "valid"}


def test_padding_is_marked_and_ignored():
    found = 0
    dataset, masks = unlabeled(), labeled()
    for draw in range(20):
        sample = dataset[0, draw]
        padding = ~sample["valid"]
        found += int(padding.sum())
        assert (sample["weak"][:, padding] == 0).all()
        mask = masks[0, draw]
        assert (mask["image"][:, mask["mask"] == 255] == 0).all()
    assert found > 0


def test_labeled_and_unlabeled_draws_of_one_number_are_independent():
    plain = unlabeled()
    same = [torch.equal(labeled(seed=0)[0, draw]["image"], plain[0, draw]["weak"]) for draw in range(20)]
    assert sum(same) == 0


@pytest.mark.parametrize("make", [labeled, unlabeled])
def test_a_sample_is_a_function_of_seed_index_and_draw(make):
    dataset = make(seed=1)
    first = digest(dataset[1, 5])
    dataset[0, 1], dataset[2, 9]
    assert digest(dataset[1, 5]) == first == digest(make(seed=1)[1, 5])
    others = [dataset[2, 5], dataset[1, 6], make(seed=2)[1, 5]]
    assert all(digest(other) != first for other in others)


@pytest.mark.parametrize("make", [labeled, unlabeled])
def test_global_generators_do_not_matter(make):
    torch.manual_seed(1)
    first = digest(make()[0, 3])
    torch.manual_seed(2)
    assert digest(make()[0, 3]) == first


def loaded(dataset, num_workers, epochs=(0,), batch_size=2):
    sampler = StreamSampler(len(dataset), 8, seed=3)
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = DataLoader(dataset, batch_size, sampler=sampler, **options)
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append([digest(batch) for batch in loader])
    return [[{**batch, "index": None} for batch in epoch] for epoch in found]


@pytest.mark.parametrize("make", [labeled, unlabeled])
def test_any_number_of_workers_gives_the_same_samples_in_every_epoch(make):
    assert loaded(make(), 2, epochs=(0, 1)) == loaded(make(), 0, epochs=(0, 1))


@pytest.mark.parametrize("make", [labeled, unlabeled])
def test_no_view_of_an_image_is_repeated_over_workers_and_epochs(make):
    epochs = loaded(make(indices=[0]), 2, epochs=(0, 1, 2), batch_size=1)
    views = [json.dumps(sample) for epoch in epochs for sample in epoch]
    assert len(views) == len(set(views)) == 24


# Bad images -----------------------------------------------------------------------------------------------------------


def resize(path):
    Image.open(path).resize((70, 71), Image.Resampling.NEAREST).save(path)


def deepen(path):
    Image.fromarray(np.full((40, 64), 40_000, np.uint16)).save(path, format="png")


def replace_with_folder(path):
    path.unlink()
    path.mkdir()


UNREADABLE = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(500)),
    "a folder": replace_with_folder,
    "16-bit": deepen,
}
OF_A_PAIR = {**UNREADABLE, "another size": resize}
BAD = [
    *(("unlabeled", "image", name, change) for name, change in UNREADABLE.items()),
    *(("labeled", "image", name, change) for name, change in OF_A_PAIR.items()),
    *(("labeled", "mask", name, change) for name, change in OF_A_PAIR.items()),
    ("labeled", "mask", "unknown class", lambda path: Image.new("L", (64, 40), 7).save(path)),
]


@pytest.fixture
def make_datamodule(make_folder, classes):
    """Ten images; three labeled and two validation images have masks."""
    root = make_folder(count=10, masked=5)

    def make(on_bad_image="raise", **options):
        options = {"crop_size": 33, "batch_size": 2, "num_workers": 0, "seed": 1, **options}
        return SemiSupervisedDataModule(folder(str(root), classes, val=2), on_bad_image=on_bad_image, **options)

    return make


def file_of(datamodule, part, kind="image"):
    """Return the file of the first image of a part."""
    data = datamodule.data
    source = data.val if part == "val" else data.train
    index = {"labeled": data.labeled_indices, "unlabeled": data.unlabeled, "val": (0,)}[part][0]
    return Path(source.root, getattr(source.pair(index), kind))


def training_set(datamodule, part):
    return datamodule.train_dataloader().iterables[part].dataset


@pytest.mark.parametrize(("part", "kind", "name", "change"), BAD, ids=[" ".join(case[:3]) for case in BAD])
def test_a_bad_file_is_named_or_replaced(make_datamodule, part, kind, name, change):
    strict, good = (training_set(make_datamodule(policy), part) for policy in ("raise", "skip"))
    path = file_of(make_datamodule(), part, kind)
    change(path)
    with pytest.raises(UserError, match=path.stem) as caught:
        strict[0, 5]
    assert str(caught.value).endswith("set loader.on_bad_image=skip to train without it")
    assert "\n" not in str(caught.value)
    sample = good[0, 5]
    ((skipped, problem),) = sample.pop("skipped")
    assert Path(skipped).stem == path.stem
    assert str(caught.value).startswith(problem)
    assert set(sample) == set(good[1, 5])


def test_a_replacement_depends_on_seed_and_draw_only(make_datamodule):
    path = file_of(make_datamodule(), "unlabeled")
    path.write_bytes(b"")
    first, again = (training_set(make_datamodule("skip"), "unlabeled") for _ in range(2))
    again[1, 3], again[0, 9]
    assert digest(first[0, 5]) == digest(again[0, 5])
    found = [first[0, draw]["index"] for draw in range(100)]
    assert set(found) == set(first.indices.tolist()) - {int(first.indices[0])}


def test_the_search_for_a_replacement_is_bounded():
    datamodule = SemiSupervisedDataModule(shapes(labeled=3, train=60, val=2), crop_size=33, on_bad_image="skip")
    dataset, tried = training_set(datamodule, "unlabeled"), []
    dataset.source.image = lambda index: tried.append(index) or (_ for _ in ()).throw(OSError("gone"))
    with pytest.raises(UserError, match=f"but {MAX_TRIES} of 57 drawn in a row cannot be read .*check that the data"):
        dataset[3, 0]
    assert len(tried) == len(set(tried)) == MAX_TRIES


def test_a_custom_source_need_not_name_the_image(make_datamodule):
    dataset = training_set(make_datamodule(), "unlabeled")
    dataset.source.image = lambda index: (_ for _ in ()).throw(OSError("stale file handle"))
    with pytest.raises(UserError, match=r"^cannot read images/.* \(stale file handle\); replace or remove it, or set"):
        dataset[0, 0]


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_validation_image_is_never_skipped(make_datamodule, kind):
    datamodule = make_datamodule("skip")
    path = file_of(datamodule, "val", kind)
    path.unlink()
    with pytest.raises(UserError, match=path.stem):
        list(datamodule.val_dataloader())


def test_cached_images_outlive_their_files(make_datamodule, tmp_path):
    datamodule = make_datamodule(cache=str(tmp_path / "cache"))
    root = Path(datamodule.data.train.root)
    datamodule.prepare_data()
    datamodule.setup("fit")
    shutil.rmtree(root)
    assert len(list(datamodule.val_dataloader())) == 2
    assert list(datamodule.train_dataloader())


def test_validation_at_the_start_notes_what_will_be_skipped(make_datamodule, caplog):
    train, val = (file_of(make_datamodule(), part) for part in ("unlabeled", "val"))
    train.write_bytes(b"")
    with pytest.raises(UserError, match=train.name):
        make_datamodule().prepare_data()
    with caplog.at_level("WARNING"):
        make_datamodule("skip").prepare_data()
    (note,) = [record.message for record in caplog.records if "it will be skipped" in record.message]
    assert train.name in note
    val.write_bytes(b"")
    with pytest.raises(UserError, match=val.name):
        make_datamodule("skip").prepare_data()


def test_another_policy_is_refused(make_datamodule):
    with pytest.raises(UserError, match=r"loader.on_bad_image as raise or skip, but got 'skipping'\. Did you mean"):
        make_datamodule("skipping")


def fit(datamodule, path):
    """Train for two epochs; a file breaks before the first step."""
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, max_epochs=2, limit_val_batches=0, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    datamodule.prepare_data()
    path.write_bytes(b"")
    trainer.fit(MLPMatch(3, backbone="test_resnet", decoder={"channels": 8}), datamodule=datamodule)


@pytest.mark.filterwarnings("ignore")
def test_a_training_counts_and_logs_the_replaced_samples(make_datamodule, caplog):
    datamodule = make_datamodule("skip")
    sampler = datamodule.train_dataloader().iterables["unlabeled"].sampler
    expected = 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += sum(position == 0 for position, _ in sampler)
    path = file_of(datamodule, "unlabeled")
    fit(datamodule, path)
    assert datamodule.skipped.report() == {"draws": expected, "images": 1}
    assert expected > 1
    lines = [record.message for record in caplog.records if path.stem in record.message]
    assert len(lines) == 2
    assert lines[0].startswith("skipped (loader.on_bad_image=skip): cannot read the image")
    assert lines[1].startswith(f"{expected} samples were replaced because of bad images: images/")


@pytest.mark.filterwarnings("ignore")
def test_a_training_raises_the_error_of_a_worker(make_datamodule):
    datamodule = make_datamodule(num_workers=2)
    path = file_of(datamodule, "unlabeled")
    with pytest.raises(UserError, match=f"cannot read the image .*{path.stem}.* to train without it$"):
        fit(datamodule, path)


def test_the_images_of_all_processes_are_counted(monkeypatch):
    skipped = SkippedImages()
    skipped.pop_from({"skipped": [("both.png", "broken"), ("both.png", "broken"), ("0.png", "broken")]})

    def gather(gathered, counts):
        gathered[:] = [counts, Counter({"both.png": 1, "1.png": 1})]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert skipped.report() == {"draws": 5, "images": 3}
