"""The evaluate command against a plain loop over images and pixels.

Letters: B images, C classes, H and W pixels.
"""

import csv
import json
import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
import torch
from helpers import TINY, compose_config, compose_train
from helpers.images import save_image, save_mask
from helpers.processes import run_forked
from PIL import Image

from mlpmatch_pl import MLPMatch, UserError
from mlpmatch_pl.commands.evaluate.dataset import check_compatible, open_part
from mlpmatch_pl.commands.evaluate.outputs import FILES, LONGEST_SIDE, WRONG_COLOR
from mlpmatch_pl.commands.evaluate.run import FOR_TRAINING, EvaluateOptions
from mlpmatch_pl.commands.evaluate.scores import ImageScores, lowest
from mlpmatch_pl.data.datasets.shapes import CLASS_NAMES, PALETTE, Shapes
from mlpmatch_pl.evaluate import evaluate
from mlpmatch_pl.evaluation import SlidingWindowInference
from mlpmatch_pl.evaluation.boundary import boundary_counts
from mlpmatch_pl.predictor import load
from mlpmatch_pl.train import train

NOTHING_MORE = ("evaluation.boundary=null", "evaluation.calibration=null", "worst=0")
SCENES = Shapes("test", 7, 48)  # the test images of `run`


def plain_counts(predict, source):
    """The confusion matrix of each image, pixel by pixel."""
    matrices = []
    for index in range(len(source)):
        matrices.append(np.zeros((6, 6), np.int64))
        image = torch.from_numpy(source.image(index).transpose(2, 0, 1).copy())[None]
        with torch.no_grad():
            prediction = predict(image)[0].argmax(0).numpy()
        for truth, guess in zip(source.mask(index).flat, prediction.flat, strict=True):
            if truth < 6:
                matrices[-1][truth, guess] += 1
    return matrices


def plain_iou(matrix):
    """The IoU of each class; NaN for classes in neither truth nor prediction."""
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


def read_confusion(folder):
    return np.array([row[1:] for row in read_csv(folder / "confusion.csv")[1:]], np.int64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training run on the embedded data: 7 test images of 48 pixels."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(compose_train(*TINY, "dataset.test=7", "loader.eval_batch_size=1", output_dir=folder))
    return folder


def run_evaluate(run, output, *overrides):
    checkpoint = f"checkpoint='{run / 'checkpoints/best.ckpt'}'"
    return evaluate(compose_config("evaluate", checkpoint, f"output='{output}'", "num_workers=0", *overrides))


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """The folder of an evaluation of the run on its own test images."""
    folder = tmp_path_factory.mktemp("evaluated")
    run_evaluate(run, folder)
    return folder


def test_scores_are_those_that_the_run_reported(run, evaluated):
    result = json.loads((evaluated / "metrics.json").read_text())
    own = json.loads((run / "metrics.json").read_text())["test"]
    assert (result["part"], result["count"], result["same_as_run"]) == ("test", 7, True)
    assert result["sha256"] == json.loads((run / "splits.json").read_text())["test"]["sha256"]
    assert result["options"]["inference"]["mode"] == "whole"
    assert (result["options"]["absent"], result["options"]["boundary"]) == ("exclude", 0.02)
    for key in ("miou", "acc", "dice"):
        assert result["metrics"][key] == pytest.approx(own[f"test/{key}"], abs=1e-3)  # memory formats round differently


def test_files_hold_what_a_plain_loop_counts(run, evaluated):
    module = MLPMatch.load_from_checkpoint(run / "checkpoints/best.ckpt", weights_only=True).eval()
    matrices = plain_counts(module, SCENES)
    confusion = read_csv(evaluated / "confusion.csv")
    assert confusion[0][1:] == [row[0] for row in confusion[1:]] == list(CLASS_NAMES)
    written = read_confusion(evaluated)
    assert np.abs(written - sum(matrices)).sum() <= 0.001 * written.sum()  # pixels between two classes
    assert written.sum() == 7 * 48 * 48
    classes = {row["class"]: row for row in csv.DictReader((evaluated / "classes.csv").open())}
    for c, (name, iou) in enumerate(zip(CLASS_NAMES, plain_iou(written), strict=True)):
        assert float(classes[name]["iou"]) == pytest.approx(iou)
        assert int(classes[name]["support"]) == written[c].sum()
        assert float(classes[name]["recall"]) == pytest.approx(written[c, c] / written[c].sum())
    images = read_csv(evaluated / "images.csv")
    assert [row[0] for row in images[1:]] == [SCENES.name(index) for index in range(7)]
    expected = [mean(plain_iou(matrix)) for matrix in matrices]
    assert [float(row[1]) for row in images[1:]] == pytest.approx(expected, abs=2e-3)
    assert sorted(path.name for path in evaluated.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("overrides", "inference"),
    [
        ((), SlidingWindowInference()),
        (  # where probabilities are averaged
            ("inference.mode=slide", "inference.window=40", "inference.flip=true"),
            SlidingWindowInference("slide", window=40, flip=True),
        ),
    ],
)
def test_confidences_of_all_pixels_are_compared_with_the_truth(overrides, inference, run, tmp_path):
    run_evaluate(run, tmp_path, *overrides, "evaluation.calibration=10000", "evaluation.boundary=null", "worst=0")
    found = json.loads((tmp_path / "metrics.json").read_text())["calibration"]
    predictor = load(run / "checkpoints/best.ckpt", "cpu", inference)
    confidence, right = [], []
    for index in range(7):
        probability, mask = predictor.probabilities(SCENES.image(index)), SCENES.mask(index)
        confidence += probability.max(0)[mask < 6].tolist()
        right += (probability.argmax(0) == mask)[mask < 6].tolist()
    bins = np.minimum((np.array(confidence) * 15).astype(int), 14)
    gaps = [abs(np.mean((np.array(confidence) - right)[bins == b])) * (bins == b).mean() for b in set(bins.tolist())]
    assert found["pixels"] == len(right)
    assert found["ece"] == pytest.approx(sum(gaps), abs=1e-3)
    assert found["fitted_ece"] < found["ece"]
    with Image.open(tmp_path / "reliability.png") as picture:
        assert picture.mode == "RGB"


def test_worst_images_come_first_and_are_drawn(evaluated):
    result = json.loads((evaluated / "metrics.json").read_text())
    scores = {name: float(miou) for name, miou in read_csv(evaluated / "images.csv")[1:]}
    assert [worst["image"] for worst in result["worst"]] == sorted(scores, key=scores.get)
    with Image.open(evaluated / "worst.png") as sheet:
        rows = 7 * (320 + 30)  # enlarged to 320 pixels, with title and margin
        assert rows < sheet.height < rows + 80
        colors = {color for _, color in sheet.getcolors(sheet.width * sheet.height)}
    assert {WRONG_COLOR, *PALETTE} <= colors


def test_large_images_are_shrunk_in_the_worst_images(run, tmp_path):
    run_evaluate(run, tmp_path, "+dataset.size=700", "+dataset.test=1", "worst=1")
    with Image.open(tmp_path / "worst.png") as sheet:
        assert sheet.width == 4 * (LONGEST_SIDE + 8) + 8


def test_windows_scales_and_flips_are_those_of_a_plain_loop(run, tmp_path):
    options = ("inference.mode=slide", "inference.window=33", "inference.scales=[1.0,1.5]", "inference.flip=true")
    run_evaluate(run, tmp_path, *options, "batch_size=3", *NOTHING_MORE)
    module = MLPMatch.load_from_checkpoint(run / "checkpoints/best.ckpt", weights_only=True).eval()
    inference = SlidingWindowInference("slide", window=33, scales=(1.0, 1.5), flip=True)
    expected = sum(plain_counts(lambda image: inference(module.segmentor, image), SCENES))
    assert np.abs(read_confusion(tmp_path) - expected).sum() <= 0.001 * expected.sum()
    assert np.abs(sum(plain_counts(module, SCENES)) - expected).sum() > 0.01 * expected.sum()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*FILES} - {"worst.png", "reliability.png"})
    assert "boundary_iou" not in json.loads((tmp_path / "metrics.json").read_text())["metrics"]


def test_a_large_tiff_is_scored_in_blocks_as_in_one_piece(run, tmp_path, monkeypatch, caplog):
    for index in range(2):
        scene = Shapes("test", 7, 150 if index else 48)
        for part, pixels in (("images", scene.image(index)), ("masks", scene.mask(index))):
            (tmp_path / part).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / part / f"{index}.tif", pixels, tile=(64, 48), compression="zlib")
    options = ("dataset=folder", f"dataset.root='{tmp_path}'", SHAPES, "inference.mode=slide", "inference.window=48")
    whole = run_evaluate(run, tmp_path / "whole", *options, "evaluation.boundary=null")
    monkeypatch.setattr(SlidingWindowInference.blocks, "__defaults__", (64,))
    blocks = run_evaluate(run, tmp_path / "blocks", *options)
    assert "no boundary IoU, as 1 large images are read in blocks" in caplog.text
    difference = np.abs(read_confusion(tmp_path / "blocks") - read_confusion(tmp_path / "whole")).sum()
    assert difference <= 1e-4 * read_confusion(tmp_path / "whole").sum()
    assert read_confusion(tmp_path / "blocks").sum() == 150**2 + 48**2
    assert blocks["count"] == whole["count"] == 2
    assert [worst["miou"] for worst in blocks["worst"]] == pytest.approx(
        [worst["miou"] for worst in whole["worst"]], abs=1e-3
    )
    with Image.open(tmp_path / "blocks/worst.png") as sheet, Image.open(tmp_path / "whole/worst.png") as both:
        assert sheet.height < both.height  # without the large one


def test_results_are_overwritten_only_if_asked(run, evaluated, tmp_path):
    with pytest.raises(UserError, match=r"new files only, but .*metrics\.json exists \(and 6 more\); .*overwrite=true"):
        run_evaluate(run, evaluated)
    (tmp_path / "metrics.json").write_text("mine")
    run_evaluate(run, tmp_path, "overwrite=true", "worst=0")
    assert json.loads((tmp_path / "metrics.json").read_text())["count"] == 7


def test_validation_images_and_other_images_of_the_same_dataset(run, tmp_path, caplog):
    caplog.set_level("INFO")
    result = run_evaluate(run, tmp_path / "val", "part=val")
    assert (result["part"], result["count"], result["same_as_run"]) == ("val", 5, True)
    assert "not the run's" not in caplog.text
    fit = run_evaluate(run, tmp_path / "train", "part=train", "worst=1")
    assert (fit["part"], fit["same_as_run"]) == ("train", True)
    assert [line.partition(",")[0] for line in (tmp_path / "train/images.csv").read_text().splitlines()[1:]] == (
        (run / "labeled.txt").read_text().splitlines()
    )
    changed = run_evaluate(run, tmp_path / "changed", "+dataset.test=2")
    assert (changed["count"], changed["same_as_run"]) == (2, False)
    assert "these are not the run's test images" in caplog.text
    with pytest.raises(UserError, match=r"keys of the dataset in .*config\.yaml, but it has no tset\. Did you mean"):
        run_evaluate(run, tmp_path / "typo", "+dataset.tset=2")


def test_another_dataset_with_images_of_several_sizes(run, make_folder, tmp_path):
    root = make_folder(masked=8)
    other = ("dataset=folder", f"dataset.root='{root}'", f"dataset.classes=[{','.join(CLASS_NAMES)}]", "dataset.val=6")
    result = run_evaluate(run, tmp_path / "out", *other)
    assert (result["part"], result["count"], result["same_as_run"]) == ("val", 6, None)
    assert result["classes"]["cross"]["support"] == 0
    with pytest.raises(UserError, match="images of one size for batch_size greater than 1"):
        run_evaluate(run, tmp_path / "batches", *other, "batch_size=2")
    with pytest.raises(UserError, match=r"expected test images for part=test, but the dataset has none"):
        run_evaluate(run, tmp_path / "test", *other, "part=test")
    for image in (root / "images").rglob("*.*"):
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the image .*img\d"):
        run_evaluate(run, tmp_path / "broken", *other)
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == ["out"]


@pytest.mark.parametrize("name", ["ade20k", "camvid", "cityscapes", "coco", "folder", "shapes", "voc"])
def test_training_options_of_a_dataset_are_left_out(name, monkeypatch):
    monkeypatch.setenv("MLPMATCH_DATA", "data")
    extra = set(compose_config("evaluate", f"dataset={name}")) - set(EvaluateOptions.__dataclass_fields__)
    assert extra <= set(FOR_TRAINING)


def test_a_chosen_dataset_is_evaluated(run, tmp_path):
    result = run_evaluate(run, tmp_path / "out", "dataset=shapes", "dataset.test=2", "dataset.size=40")
    assert (result["part"], result["count"], result["same_as_run"]) == ("test", 2, None)
    with pytest.raises(UserError, match=r"the configuration has no key loader\."):
        run_evaluate(run, tmp_path / "none", "+loader.batch_size=2")


def test_running_out_of_memory_is_one_sentence(run, tmp_path, monkeypatch):
    for message, kind in (("DefaultCPUAllocator: can't allocate memory", UserError), ("a defect", RuntimeError)):
        monkeypatch.setattr(SlidingWindowInference, "label", Mock(side_effect=RuntimeError(message)))
        with pytest.raises(kind, match="images that fit into memory" if kind is UserError else message):
            run_evaluate(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_datasets_with_other_classes_or_images_are_refused(run, folder_root, tmp_path, caplog):
    root = f"dataset.root='{folder_root}'"
    with pytest.raises(UserError, match=r"dataset with 6 classes, as .*best\.ckpt was trained on, but it has 2"):
        run_evaluate(run, tmp_path, "dataset=folder", root, "dataset.classes=[a,b]")
    data = open_part(run / "checkpoints/best.ckpt", None, None).data
    options = {"backbone": "test_resnet", "decoder": {"channels": 8}}
    with pytest.raises(UserError, match=r"but instead of 'blob' it has 'cross'"):
        check_compatible(MLPMatch(6, **options, class_names=[*CLASS_NAMES[:5], "blob"]), data, Path("a.ckpt"))
    check_compatible(MLPMatch(6, **options), data, Path("a.ckpt"))  # its classes have no names
    four = MLPMatch(6, **options, in_chans=4, mean=[0] * 4, std=[1] * 4)
    with pytest.raises(UserError, match=r"images of 4 channels, as a\.ckpt was trained on, but the dataset's have 3"):
        check_compatible(four, data, Path("a.ckpt"))
    with pytest.raises(UserError, match="images of 16 bits per channel"):
        check_compatible(MLPMatch(6, **options, bit_depth=16), data, Path("a.ckpt"))
    caplog.clear()
    check_compatible(MLPMatch(6, **options, image_options={"orientation": "ignore"}), data, Path("a.ckpt"))
    assert "read with dataset.orientation=ignore for the training, and are read with its default now" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("part=tset", "part as 'val', 'test' or 'train', but got 'tset'. Did you mean test"),
        ("worst=-1", "worst of at least 0, but got -1"),
        ("batch_size=0", "batch_size of at least 1, but got 0"),
        ("num_workers=-1", "num_workers of at least 0, but got -1"),
        ("devices=0", "devices of at least 1, but got 0"),
        ("devices=8", "at least 8 test images, one per process, but got 7"),
        ("device=cuad", "expected device as auto, or one that this machine has, but got cuad"),
        ("evaluation.boundary=2", "evaluation.boundary as a share of the diagonal"),
        ("evaluation.absent=drop", "evaluation.absent as 'exclude' or 'zero', but got 'drop'"),
        ("+inference.wndow=3", r"no key inference\.wndow\. Did you mean window"),
        ("inference.mode=slide", r"expected inference\.window"),
        ("checkpoint=nowhere.ckpt", r"nowhere\.ckpt does not exist"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(run, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        run_evaluate(run, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "target", ["os.system", "mlpmatch_pl.data.cache.shutil.rmtree", "mlpmatch_pl.utils.errors.suggest"]
)
def test_the_configuration_of_a_run_can_only_call_a_dataset(tmp_path, target):
    (tmp_path / "config.yaml").write_text(f"dataset:\n  _target_: {target}\n  root: {tmp_path}/marker\n")
    with pytest.raises(UserError, match=rf"a dataset of mlpmatch_pl in .*config\.yaml, but it calls {target}"):
        open_part(tmp_path / "checkpoints/best.ckpt", None, None)
    nested = "dataset:\n  _target_: mlpmatch_pl.data.datasets.shapes.shapes\n  size:\n    _target_: os.getpid\n"
    (tmp_path / "config.yaml").write_text(nested)
    with pytest.raises(UserError, match="expected a dataset of mlpmatch_pl"):
        open_part(tmp_path / "best.ckpt", None, None)


def test_a_run_from_before_the_datasets_moved_is_found(tmp_path):
    (tmp_path / "config.yaml").write_text("dataset:\n  _target_: mlpmatch_pl.data.shapes.shapes\n  test: 3\n")
    part = open_part(tmp_path / "checkpoints/best.ckpt", None, None)
    assert (part.part, part.split["count"], part.same_as_run) == ("test", 3, None)
    (tmp_path / "config.yaml").write_text("dataset:\n  _target_: mlpmatch_pl.data.shapes.shapes\n  test: ${env:X}\n")
    with pytest.raises(UserError, match=r"dataset\.test in .*, but found '\$\{env:X\}', which is not resolved"):
        open_part(tmp_path / "checkpoints/best.ckpt", None, None)
    assert open_part(tmp_path / "best.ckpt", {"test": 4}, None).split["count"] == 4


def test_a_checkpoint_without_its_run_needs_a_dataset(tmp_path):
    with pytest.raises(UserError, match=r"expected the run's config\.yaml .* none; name the dataset"):
        open_part(tmp_path / "checkpoints/best.ckpt", None, None)
    part = open_part(tmp_path / "best.ckpt", {"_target_": "mlpmatch_pl.data.datasets.shapes.shapes", "test": 3}, "test")
    assert (part.split["count"], part.same_as_run, len(part.images())) == (3, None, 3)
    for content, message in (("{broken", "cannot read the run's configuration"), ("seed: 1", "but it has no dataset")):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            open_part(tmp_path / "best.ckpt", None, None)


@pytest.mark.slow
def test_the_command_gives_the_same_result_in_two_processes(run, evaluated, tmp_path):
    checkpoint = f"checkpoint={run / 'checkpoints/best.ckpt'}"
    arguments = (checkpoint, "dataset.test=7", "output=out", "device=cpu", "devices=2", "num_workers=0", "worst=2")
    done = run_forked(*arguments, cwd=tmp_path, module="mlpmatch_pl.evaluate")
    assert done.returncode == 0, done.stderr
    result, alone = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", evaluated))
    assert (result["devices"], alone["devices"]) == (2, 1)
    assert (result["metrics"], result["classes"]) == (alone["metrics"], alone["classes"])
    assert result["worst"] == alone["worst"][:2]
    for name in ("images.csv", "confusion.csv"):
        assert read_csv(tmp_path / "out" / name) == read_csv(evaluated / name)
    assert done.stdout.count(f"mIoU {result['metrics']['miou']:.4f} (mean of") == 1
    assert "│ background │" in done.stdout


def test_image_scores_are_those_of_a_plain_loop_and_images_without_pixels_have_none():
    rng = np.random.default_rng(0)
    mask, label = rng.integers(0, 4, (5, 9, 11)), torch.from_numpy(rng.integers(0, 4, (5, 9, 11)))
    mask[rng.random(mask.shape) < 0.2] = 255
    mask[3] = 255
    mask = torch.from_numpy(mask.astype(np.uint8))
    metric = ImageScores(5, 4, boundary=0.1)
    for batch in ([4, 1], [0], [2, 3]):
        metric.update(label[batch], mask[batch], torch.tensor(batch))
    miou_N, boundary_3C = metric.compute()
    for index in range(5):
        matrix = np.zeros((4, 4), np.int64)
        for truth, guess in zip(mask[index].flatten().tolist(), label[index].flatten().tolist(), strict=True):
            if truth < 4:
                matrix[truth, guess] += 1
        if index == 3:
            assert miou_N[index].isnan()
        else:
            assert miou_N[index].item() == pytest.approx(mean(plain_iou(matrix)))
    assert torch.equal(boundary_3C, boundary_counts(label, mask, 4, 0.1))
    assert sorted(lowest(miou_N, 5)) == [0, 1, 2, 4]
    assert lowest(torch.tensor([0.5, 0.2, 0.5, 0.2]), 3) == [1, 3, 0]


SHAPES = f"dataset.classes=[{','.join(CLASS_NAMES)}]"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 9 images and masks, and one image without mask."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(10):
        save_image(root / f"images/p{index}.png", SCENES.image(index % 7))
        if index < 9:
            save_mask(root / f"masks/p{index}.png", SCENES.mask(index % 7), palette=False)
    (root / "val.txt").write_text("images/p0.png masks/p0.png\nimages/p1.png masks/p1.png\n")
    return root


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ((), 9),
        (("dataset.val=.",), 9),
        (("dataset.test=.",), 9),
        (("dataset.val=val.txt",), 2),
        (("part=val",), 2),
        (("dataset.val=3",), 3),
        ((r"dataset.group_by=p\d",), 9),
    ],
)
def test_a_folder_is_scored_whole_unless_the_options_say_which_images(run, photos, tmp_path, options, count):
    result = run_evaluate(run, tmp_path, "dataset=folder", f"dataset.root={photos}", SHAPES, *options)
    assert result["count"] == count


def test_a_folder_whose_palettes_differ_is_refused(run, photos, tmp_path):
    for index in range(9):
        (tmp_path / "data/masks").mkdir(parents=True, exist_ok=True)
        with Image.open(photos / f"masks/p{index}.png") as mask:
            mask.putpalette(range(30) if index else range(30, 0, -1))
            mask.save(tmp_path / f"data/masks/p{index}.png")
    (tmp_path / "data/images").symlink_to(photos / "images")
    with pytest.raises(
        UserError, match=r"expected masks with the same palette, but 0 is .* set dataset.palette to the"
    ):
        run_evaluate(run, tmp_path / "out", "dataset=folder", f"dataset.root={tmp_path / 'data'}", SHAPES)
