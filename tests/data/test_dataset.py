import hashlib
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from mlpmatch_pl.data.dataset import EvalDataset, LabeledDataset, UnlabeledDataset
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.shapes import Shapes
from mlpmatch_pl.data.files import FileSource
from mlpmatch_pl.data.sampler import StreamSampler
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.perturbation import CutMix

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
    assert [dataset[place, 0]["index"] for place in (0, 1)] == [2, 0]


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
    for place in range(len(dataset)):
        sample = dataset[place, place]
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


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_samples import digest, labeled, unlabeled
dataset = unlabeled(second_view=True)
print(json.dumps([[digest(dataset[i, d]), digest(labeled()[i, d])] for i, d in ((0, 0), (2, 11), (1, 10**9))]))
"""


def test_another_process_gives_the_same_samples(request):
    command = [sys.executable, "-c", SCRIPT, str(request.path.parent)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    dataset = unlabeled(second_view=True)
    draws = ((0, 0), (2, 11), (1, 10**9))
    assert json.loads(output) == [[digest(dataset[draw]), digest(labeled()[draw])] for draw in draws]


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
    plain = loaded(make(), 0, epochs=(0, 1))
    assert loaded(make(), 1, epochs=(0, 1)) == plain
    assert loaded(make(), 2, epochs=(0, 1)) == plain


@pytest.mark.parametrize("make", [labeled, unlabeled])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_view_of_an_image_comes_twice_over_workers_and_epochs(make, num_workers):
    epochs = loaded(make(indices=[0]), num_workers, epochs=(0, 1, 2), batch_size=1)
    views = [json.dumps(sample) for epoch in epochs for sample in epoch]
    assert len(views) == len(set(views)) == 24
