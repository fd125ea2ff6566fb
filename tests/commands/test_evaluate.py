"""The command evaluate against a plain loop over images and pixels.

Letters: B images, C classes, H and W pixels.
"""

import csv
import json
import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import TINY, compose_config, run_command
from PIL import Image
from torch import nn

from mlpmatch_pl import MLPMatch, UserError
from mlpmatch_pl.commands.evaluate.dataset import open_part, require_fit
from mlpmatch_pl.commands.evaluate.loop import Counts, Evaluator, read_ahead, same_size_batches
from mlpmatch_pl.commands.evaluate.options import Options
from mlpmatch_pl.commands.evaluate.outputs import FILES, LONGEST_SIDE, WRONG_COLOR, worst_images
from mlpmatch_pl.commands.evaluate.run import FOR_TRAINING
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.data.datasets.shapes import CLASS_NAMES, PALETTE, Shapes
from mlpmatch_pl.evaluate import evaluate
from mlpmatch_pl.evaluation.boundary import boundary_counts, boundary_iou
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference

SIZES = ((20, 31), (31, 20), (20, 31), (8, 9), (20, 31))
C = 4


class Noise:
    """A source of images of several sizes; every fifth pixel of a mask is ignored."""

    def __init__(self, count=11, broken=None):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def name(self, index):
        return f"noise/{index}.png"

    def image(self, index):
        if index == self.broken:
            raise UserError(f"cannot read the image noise/{index}.png")
        return np.random.default_rng(index).integers(0, 256, (*SIZES[index % 5], 3), np.uint8)

    def mask(self, index):
        rng = np.random.default_rng(1000 + index)
        mask = self.image(index).mean(2).astype(np.uint8) // 64
        mask = np.where(rng.random(mask.shape) < 0.3, rng.integers(0, C, mask.shape), mask)
        return np.where(rng.random(mask.shape) < 0.2, 255, mask).astype(np.uint8)


class NearestLevel(nn.Module):
    """Each pixel's class by its brightness: no sum depends on the batch, so counts must be equal."""

    def __init__(self):
        super().__init__()
        self.level_C = nn.Parameter(torch.tensor([60.0, 110.0, 140.0, 170.0]))

    def forward(self, image_BCHW):
        return -(image_BCHW.float().mean(1, keepdim=True) - self.level_C[:, None, None]).abs() / 50


def plain_counts(predict, source, num_classes):
    """Confusion matrix of each image, pixel by pixel."""
    matrices = []
    for index in range(len(source)):
        matrices.append(np.zeros((num_classes, num_classes), np.int64))
        image = torch.from_numpy(source.image(index).transpose(2, 0, 1).copy())[None]
        with torch.no_grad():
            prediction = predict(image)[0].argmax(0).numpy()
        for truth, guess in zip(source.mask(index).flat, prediction.flat, strict=True):
            if truth < num_classes:
                matrices[-1][truth, guess] += 1
    return matrices


def plain_iou(matrix):
    """IoU of each class; NaN for those in neither truth nor prediction."""
    iou = []
    for c in range(len(matrix)):
        union = matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]
        iou.append(matrix[c, c] / union if union else math.nan)
    return iou


def mean(values):
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on the embedded data: 7 test images of 48 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = (*TINY, "dataset.test=7", "loader.eval_batch_size=1", f"hydra.run.dir={folder / 'run'}")
    done = run_command(*overrides, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def run_evaluate(run, output, *overrides):
    checkpoint = f"checkpoint='{run / 'checkpoints/best.ckpt'}'"
    return evaluate(compose_config("evaluate", checkpoint, f"output='{output}'", "num_workers=0", *overrides))


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The folder of an evaluation of the run on its own test images."""
    folder = tmp_path_factory.mktemp("evaluated")
    run_evaluate(trained, folder)
    return folder


def test_the_scores_are_those_that_the_run_itself_reported(trained, evaluated):
    result = json.loads((evaluated / "metrics.json").read_text())
    own = json.loads((trained / "metrics.json").read_text())["test"]
    assert (result["part"], result["count"], result["same_as_run"]) == ("test", 7, True)
    assert result["sha256"] == json.loads((trained / "splits.json").read_text())["test"]["sha256"]
    assert result["options"] == {
        "inference": {
            "mode": "whole", "window": None, "stride": None, "window_batch": 4, "scales": [1.0], "flip": False
        },
        "absent": "exclude",
        "boundary": 0.02,
    }  # fmt: skip
    for key in ("miou", "acc", "dice"):
        assert result["metrics"][key] == pytest.approx(own[f"test/{key}"], abs=1e-3)  # batches may round differently


def test_the_files_hold_what_a_plain_loop_counts(trained, evaluated):
    module = MLPMatch.load_from_checkpoint(trained / "checkpoints/best.ckpt", weights_only=True).eval()
    scenes = Shapes("test", 7, 48)
    matrices = plain_counts(module, scenes, 6)
    total = sum(matrices)
    confusion = read_csv(evaluated / "confusion.csv")
    assert confusion[0][1:] == [row[0] for row in confusion[1:]] == list(CLASS_NAMES)
    written = np.array([row[1:] for row in confusion[1:]], np.int64)
    assert np.abs(written - total).sum() <= 4  # pixels on which batches of other sizes round differently
    assert written.sum() == 7 * 48 * 48
    classes = {row["class"]: row for row in csv.DictReader((evaluated / "classes.csv").open())}
    for c, (name, iou) in enumerate(zip(CLASS_NAMES, plain_iou(written), strict=True)):
        assert float(classes[name]["iou"]) == pytest.approx(iou)
        assert int(classes[name]["support"]) == written[c].sum()
        assert float(classes[name]["recall"]) == pytest.approx(written[c, c] / written[c].sum())
    images = read_csv(evaluated / "images.csv")
    assert [row[0] for row in images[1:]] == [scenes.name(index) for index in range(7)]
    expected = [mean(plain_iou(matrix)) for matrix in matrices]
    assert [float(row[1]) for row in images[1:]] == pytest.approx(expected, abs=2e-3)
    assert sorted(path.name for path in evaluated.iterdir()) == sorted(FILES)


def test_the_worst_images_come_first_and_are_drawn(evaluated):
    result = json.loads((evaluated / "metrics.json").read_text())
    scores = {name: float(miou) for name, miou in read_csv(evaluated / "images.csv")[1:]}
    assert [worst["image"] for worst in result["worst"]] == sorted(scores, key=scores.get)
    with Image.open(evaluated / "worst.png") as sheet:
        rows = 7 * (320 + 30)  # enlarged to 320 pixels, with title and margin
        assert rows < sheet.height < rows + 80
        colors = {color for _, color in sheet.getcolors(sheet.width * sheet.height)}
    assert {WRONG_COLOR, *PALETTE} <= colors


def test_results_are_never_written_over_unless_told(trained, evaluated, tmp_path):
    before = {path: path.read_bytes() for path in evaluated.iterdir()}
    with pytest.raises(UserError, match=r"new files only, but .*metrics\.json exists \(and 5 more\); .*overwrite=true"):
        run_evaluate(trained, evaluated)
    for word in ("no", "off", "0", "2"):  # texts and numbers are no yes, as Hydra passes them
        with pytest.raises(UserError, match="expected overwrite as true or false, but got "):
            run_evaluate(trained, evaluated, f"overwrite={word}")
    assert {path: path.read_bytes() for path in evaluated.iterdir()} == before
    (tmp_path / "metrics.json").write_text("mine")
    run_evaluate(trained, tmp_path, "overwrite=true", "worst=0", "evaluation.boundary=null")
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert "boundary_iou" not in result["metrics"]
    assert not (tmp_path / "worst.png").exists()


def test_validation_images_or_other_ones_are_evaluated_when_asked_for(trained, tmp_path, caplog):
    result = run_evaluate(trained, tmp_path / "val", "part=val")
    assert (result["part"], result["count"], result["same_as_run"]) == ("val", 5, True)
    assert not [record for record in caplog.records if "not the images" in record.message]
    caplog.set_level("INFO")
    changed = run_evaluate(trained, tmp_path / "changed", "+dataset.test=2")
    assert (changed["count"], changed["same_as_run"]) == (2, False)
    assert [record for record in caplog.records if "not the images that the run had for test" in record.message]
    with pytest.raises(UserError, match=r"keys of the dataset in .*config\.yaml, but it has no tset\. Did you mean"):
        run_evaluate(trained, tmp_path / "typo", "+dataset.tset=2")


def test_images_of_one_s_own_and_of_several_sizes_are_evaluated(trained, make_folder, tmp_path):
    root = make_folder(masked=8)
    lists = ("dataset=folder", f"dataset.root='{root}'", f"dataset.classes=[{','.join(CLASS_NAMES)}]", "dataset.val=6")
    result = run_evaluate(trained, tmp_path / "out", *lists)
    assert (result["part"], result["count"], result["same_as_run"]) == ("val", 6, None)
    matrix = np.array([row[1:] for row in read_csv(tmp_path / "out/confusion.csv")[1:]], np.int64)
    pixels = sum(int((np.array(Image.open(path)) != 255).sum()) for path in (root / "masks").rglob("*.png"))
    assert 0 < matrix.sum() < pixels
    assert result["classes"]["cross"]["support"] == 0
    with pytest.raises(UserError, match=r"expected test images for part=test, but the data have none"):
        run_evaluate(trained, tmp_path / "test", *lists, "part=test")


def test_a_data_set_that_brings_options_for_training_is_evaluated_on(trained, tmp_path):
    result = run_evaluate(trained, tmp_path / "out", "dataset=shapes", "dataset.test=2", "dataset.size=40")
    assert (result["part"], result["count"], result["same_as_run"]) == ("test", 2, None)
    with pytest.raises(UserError, match=r"the configuration has no key loader\."):
        run_evaluate(trained, tmp_path / "none", "+loader.batch_size=2")


@pytest.mark.parametrize("name", ["ade20k", "camvid", "cityscapes", "coco", "folder", "shapes", "voc"])
def test_what_a_data_set_sets_for_training_is_known_to_evaluate(name, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    brought = set(compose_config("evaluate", f"dataset={name}")) - set(Options.__dataclass_fields__)
    assert brought <= set(FOR_TRAINING)


def test_memory_that_runs_out_is_a_sentence_and_another_error_is_none(trained, tmp_path, monkeypatch):
    for text, kind in (("DefaultCPUAllocator: can't allocate memory", UserError), ("a defect", RuntimeError)):
        monkeypatch.setattr(Evaluator, "label", Mock(side_effect=RuntimeError(text)))
        with pytest.raises(kind, match="the memory is large enough for" if kind is UserError else text):
            run_evaluate(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_with_other_classes_or_channels_are_refused(trained, folder_root, tmp_path):
    root = f"dataset.root='{folder_root}'"
    with pytest.raises(UserError, match=r"data with 6 classes, as .*best\.ckpt was trained on, but they have 2"):
        run_evaluate(trained, tmp_path, "dataset=folder", root, "dataset.classes=[a,b]")
    classes = f"dataset.classes=[{','.join(CLASS_NAMES).replace('cross', 'blob')}]"
    with pytest.raises(UserError, match=r"but where it has 'cross' they have 'blob'"):
        run_evaluate(trained, tmp_path, "dataset=folder", root, classes)
    data = open_part(trained / "checkpoints/best.ckpt", None, None).data
    options = {"backbone": "test_resnet", "decoder_channels": 8}
    require_fit(MLPMatch(6, **options), data, Path("a.ckpt"))  # its classes have no names
    four = MLPMatch(6, **options, in_chans=4, mean=[0] * 4, std=[1] * 4)
    with pytest.raises(UserError, match=r"images of 4 channels, as a\.ckpt was trained on, but the data have 3"):
        require_fit(four, data, Path("a.ckpt"))
    with pytest.raises(UserError, match=r"images of 16 bits a channel, as a\.ckpt was trained on, but the data have 8"):
        require_fit(MLPMatch(6, **options, bit_depth=16), data, Path("a.ckpt"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("part=train", "part as 'val' or 'test' or null, but got 'train'"),
        ("worst=-1", "worst as a number of images from 0, but got -1"),
        ("worst=true", "worst as a whole number, but got true"),
        ("batch_size=0", "batch_size as a whole number from 1, or null, but got 0"),
        ("num_workers=-1", "num_workers as a whole number from 0, or null, but got -1"),
        ("evaluation.boundary=2", "evaluation.boundary as a share of the diagonal"),
        ("num_workers=two", "num_workers as a whole number or null, but got 'two'"),
        ("evaluation.boundary=abc", "evaluation.boundary as a number or null, but got 'abc'"),
        ("evaluation=null", "evaluation as a mapping of keys to values, but got null"),
        ("evaluation.absent=drop", "evaluation.absent as 'exclude' or 'zero' or null, but got 'drop'"),
        ("inference.flip=1", "inference.flip as true or false, but got 1"),
        ("+foo=1", r"no key foo\."),
        ("+inference.wndow=3", r"no key inference\.wndow\. Did you mean window"),
        ("checkpoint=''", "checkpoint as a path, but got ''"),
        ("inference.mode=slide", r"expected inference\.window"),
        ("checkpoint=nowhere.ckpt", r"nowhere\.ckpt does not exist"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(trained, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        run_evaluate(trained, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "target", ["os.system", "mlpmatch_pl.data.cache.shutil.rmtree", "mlpmatch_pl.utils.errors.suggest"]
)
def test_a_run_s_configuration_cannot_call_anything_but_a_data_set(tmp_path, target):
    (tmp_path / "config.yaml").write_text(f"dataset:\n  _target_: {target}\n  root: {tmp_path}/marker\n")
    with pytest.raises(UserError, match=rf"a dataset of mlpmatch_pl in .*config\.yaml, but it calls {target}"):
        open_part(tmp_path / "checkpoints/best.ckpt", None, None)
    nested = "dataset:\n  _target_: mlpmatch_pl.data.datasets.shapes.shapes\n  size:\n    _target_: os.getpid\n"
    (tmp_path / "config.yaml").write_text(nested)
    with pytest.raises(UserError, match="expected a dataset of mlpmatch_pl"):
        open_part(tmp_path / "best.ckpt", None, None)


def test_a_checkpoint_without_its_run_needs_data_to_be_named(tmp_path):
    with pytest.raises(UserError, match=r"expected the run's config\.yaml .* none; name the data"):
        open_part(tmp_path / "checkpoints/best.ckpt", None, None)
    part = open_part(tmp_path / "best.ckpt", {"_target_": "mlpmatch_pl.data.datasets.shapes.shapes", "test": 3}, "test")
    assert (part.split["count"], part.same_as_run, len(part.source)) == (3, None, 3)
    (tmp_path / "config.yaml").write_text("{broken")
    with pytest.raises(UserError, match="cannot read the run's configuration"):
        open_part(tmp_path / "best.ckpt", None, None)


@pytest.mark.slow
def test_the_command_prints_the_table_and_takes_keys_of_the_run_s_data(trained, tmp_path):
    checkpoint = f"checkpoint={trained / 'checkpoints/best.ckpt'}"
    done = run_command(checkpoint, "dataset.test=3", "output=out", cwd=tmp_path, module="mlpmatch_pl.evaluate")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/metrics.json").read_text())
    assert result["count"] == 3
    assert f"mIoU {result['metrics']['miou']:.4f} (mean of" in done.stdout
    assert "│ background │" in done.stdout
    again = run_command(checkpoint, "output=out", cwd=tmp_path, module="mlpmatch_pl.evaluate")
    assert again.returncode == 1
    assert again.stderr.startswith("error: expected to write new files only, but ")
    assert len(again.stderr.splitlines()) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_are_those_of_a_plain_loop_for_any_batch_and_workers(batch_size, num_workers):
    source, segmentor = Noise(), NearestLevel()
    evaluator = Evaluator(boundary=0.05, batch_size=batch_size, num_workers=num_workers)
    done = []
    counts = evaluator(segmentor, EvalDataset(source, C, 255), done.append)
    matrices = plain_counts(segmentor, source, C)
    np.testing.assert_array_equal(counts.confusion_CC.numpy(), sum(matrices))
    expected = [mean(plain_iou(matrix)) for matrix in matrices]
    assert counts.miou_N.tolist() == pytest.approx(expected, rel=1e-5)
    assert sum(done) == len(source)
    bands = torch.zeros(3, C, dtype=torch.long)
    for index in range(len(source)):
        image = torch.from_numpy(source.image(index).transpose(2, 0, 1).copy())[None]
        mask = torch.from_numpy(source.mask(index))[None]
        bands += boundary_counts(segmentor(image).argmax(1), mask, C, 0.05)
    assert torch.equal(counts.boundary_3C, bands)
    assert not boundary_iou(bands).isnan().any()


@pytest.mark.parametrize(
    "inference",
    [SlidingWindowInference("slide", window=12, stride=7), SlidingWindowInference(scales=(0.5, 1.0), flip=True)],
    ids=["slide", "tta"],
)
def test_windows_scales_and_flips_are_used(inference):
    source, segmentor = Noise(6), NearestLevel()
    counts = Evaluator(inference, batch_size=4, num_workers=0)(segmentor, EvalDataset(source, C, 255))
    expected = sum(plain_counts(lambda image: inference(segmentor, image), source, C))
    assert np.abs(counts.confusion_CC.numpy() - expected).sum() <= 2
    if inference.flip:
        assert (counts.confusion_CC.numpy() != sum(plain_counts(segmentor, source, C))).any()


def test_an_image_in_which_nothing_counts_has_no_score_and_is_never_the_worst():
    source = Noise(3)
    source.mask = lambda index: np.full(SIZES[index], 255 if index == 1 else 0, np.uint8)
    counts = Evaluator(num_workers=0)(NearestLevel(), EvalDataset(source, C, 255))
    assert [math.isnan(miou) for miou in counts.miou_N.tolist()] == [False, True, False]
    assert sorted(worst_images(counts, 3)) == [0, 2]
    tied = Counts(counts.confusion_CC, None, torch.tensor([0.5, 0.2, 0.5, 0.2]))
    assert worst_images(tied, 3) == [1, 3, 0]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_an_image_that_cannot_be_read_ends_the_evaluation_with_its_name(num_workers):
    with pytest.raises(UserError, match=r"cannot read the image noise/7\.png"):
        list(read_ahead(EvalDataset(Noise(broken=7), C, 255), num_workers))


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_images_are_read_in_order_and_once(num_workers):
    samples = list(read_ahead(EvalDataset(Noise(40), C, 255), num_workers))
    assert [sample["index"] for sample in samples] == list(range(40))


@pytest.mark.parametrize(("batch_size", "waiting"), [(1, 10**9), (3, 10**9), (100, 1500), (None, 0)])
def test_batches_have_images_of_one_size_each_image_once_and_few_wait(monkeypatch, batch_size, waiting):
    monkeypatch.setattr("mlpmatch_pl.commands.evaluate.run.WAITING_PIXELS", waiting)
    taken, given = [], []

    def samples():
        for index in range(50):
            taken.append(index)
            yield {"image": torch.zeros(3, *SIZES[index * 7 % 5]), "index": index}

    for batch in same_size_batches(samples(), batch_size):
        assert len({sample["image"].shape for sample in batch}) == 1
        assert len(batch) <= (batch_size or 50)
        given += [sample["index"] for sample in batch]
        left = sum(math.prod(SIZES[index * 7 % 5]) for index in set(taken) - set(given))
        assert left <= waiting
    assert sorted(given) == list(range(50))


def test_a_batch_without_a_given_size_has_two_megapixels():
    samples = ({"image": torch.zeros(1, 500, 400)} for _ in range(25))
    assert [len(batch) for batch in same_size_batches(samples, None)] == [10, 10, 5]
    samples = ({"image": torch.zeros(1, 1500, 1500)} for _ in range(2))
    assert [len(batch) for batch in same_size_batches(samples, None)] == [1, 1]


def test_large_images_are_shrunk_in_the_picture_of_the_worst(trained, tmp_path):
    run_evaluate(trained, tmp_path, "+dataset.size=1000", "+dataset.test=1", "worst=1")
    with Image.open(tmp_path / "worst.png") as sheet:
        assert sheet.width == 4 * (LONGEST_SIDE + 8) + 8
