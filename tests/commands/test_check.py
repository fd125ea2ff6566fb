import json

import numpy as np
import pytest
import tifffile
from helpers import TINY, compose_config
from helpers.images import save_image, save_mask
from helpers.processes import run_forked
from PIL import Image

from mlpmatch_pl.check import check
from mlpmatch_pl.utils.errors import UserError

FOLDER = ("dataset=folder", "dataset.classes=[background,road,sky]", "dataset.val=1", "loader.crop_size=40")
FEW = ("loader.batch_size=2", "loader.unlabeled_batch_size=3")


def listed(path):
    return [line.split("\t")[0] for line in path.read_text().splitlines()]


def run_check(output_dir, *overrides):
    return check(compose_config("check", *overrides, output_dir=output_dir))


def test_the_report_agrees_with_an_independent_count(folder_root, tmp_path):
    report = run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={folder_root}")
    assert report == json.loads((tmp_path / "out/check.json").read_text())
    names = {part: listed(tmp_path / f"out/{part}.txt") for part in ("labeled", "val")}
    assert {part: report["sets"][part]["count"] for part in names} == {"labeled": 4, "val": 1}
    assert report["sets"]["unlabeled"]["count"] == 3
    pixels, images = dict.fromkeys(range(256), 0), dict.fromkeys(range(256), 0)
    for name in names["labeled"]:
        stem = name.rpartition("/")[2].partition(".")[0]
        mask = np.array(Image.open(next((folder_root / "masks").rglob(f"{stem}.png"))))
        for value, count in zip(*np.unique(mask, return_counts=True), strict=True):
            pixels[int(value)] += int(count)
            images[int(value)] += 1
    classes = report["sets"]["labeled"]["classes"]
    for value, name in enumerate(("background", "road", "sky")):
        assert classes[name]["pixels"] == pixels[value]
        assert classes[name]["images"] == images[value]
        assert classes[name]["share"] == pytest.approx(pixels[value] / sum(pixels.values()), abs=1e-6)
    assert classes["ignored"]["pixels"] == pixels[255]
    sizes = report["sets"]["unlabeled"]["sizes"]
    assert sizes == {"44x55": 1, "40x58": 1, "36x61": 1}


def test_mean_and_standard_deviation_are_those_of_all_training_pixels(folder_root, tmp_path):
    report = run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={folder_root}")
    held_out = listed(tmp_path / "out/val.txt")
    paths = [
        path for path in (folder_root / "images").rglob("*.*g") if str(path.relative_to(folder_root)) not in held_out
    ]
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in paths]).astype(float)
    assert report["channels"]["images"] == 7
    # JPEG decoders may differ by a level
    np.testing.assert_allclose(report["channels"]["mean"], pixels.mean(0), atol=0.3)
    np.testing.assert_allclose(report["channels"]["std"], pixels.std(0), atol=0.3)


def test_the_picture_shows_labeled_and_unlabeled_views_and_the_legend(folder_root, tmp_path):
    run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={folder_root}")
    with Image.open(tmp_path / "out/views.png") as sheet:
        rows = (1 + 3) * (224 + 30)  # 2 labeled images in a row and 3 rows of unlabeled ones, each with titles
        assert sheet.width == 6 * (224 + 8) + 8  # weak, two strong before and after CutMix, valid
        assert rows < sheet.height < rows + 60


def test_a_supervised_method_draws_labeled_views_only(folder_root, tmp_path):
    run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={folder_root}", "method=supervised")
    with Image.open(tmp_path / "out/views.png") as sheet:
        assert sheet.width == 6 * (224 + 8) + 8
        assert sheet.height < 3 * (224 + 30)  # four labeled images in two rows


def test_errors_are_counted_after_everything_is_written(folder_root, tmp_path):
    for name in ("images/img6.jpg", "images/img3.png"):
        (folder_root / name).write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={folder_root}")
    assert str(caught.value) == (
        f"expected data without errors, but found 2; correct what {tmp_path / 'out'}/check.json lists"
    )
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert sorted(report["errors"]) == [
        f"cannot read the image {folder_root / name}: it is damaged or not an image; replace or remove it"
        for name in ("images/img3.png", "images/img6.jpg")
    ]
    assert not (tmp_path / "out/views.png").exists()


@pytest.mark.parametrize("held", ["config.yaml", "splits.json", "check.json", "labeled.txt", "val.txt", "views.png"])
def test_a_folder_of_a_run_or_an_earlier_check_is_refused_and_unchanged(held, tmp_path):
    (tmp_path / held).write_text("mine")
    with pytest.raises(UserError, match=f"new files only, but .*{held} exists; choose another folder by hydra.run.dir"):
        run_check(tmp_path, *TINY)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(held, "mine")]


def test_images_left_out_are_a_warning(folder_root, tmp_path):
    names = sorted(str(path.relative_to(folder_root)) for path in (folder_root / "images").rglob("*.*g"))
    (folder_root / "unlabeled.txt").write_text("\n".join(names))
    (folder_root / "val.txt").write_text("images/img0.jpg masks/img0.png")
    options = ("dataset.unlabeled=unlabeled.txt", "dataset.val=val.txt")
    report = run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={folder_root}", *options)
    assert (
        "images/img0.jpg is a training image and a validation or test image (1 in total); it is "
        "removed from the training images"
    ) in report["warnings"]


def test_statistics_of_16_bit_images_with_many_channels(tmp_path, classes):
    rng, root = np.random.default_rng(0), tmp_path / "data"
    stack = rng.integers(0, 60000, (5, 44, 40, 7)).astype(np.uint16)
    for index, image in enumerate(stack):
        (root / "images").mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root / f"images/{index}.tif", image, photometric="minisblack", planarconfig="contig")
        if index < 3:
            save_mask(root / f"masks/{index}.png", rng.integers(0, 3, (44, 40)).astype(np.uint8), palette=False)
    options = ("dataset.in_chans=7", "dataset.bit_depth=16", "dataset.val=1")
    report = run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={root}", *options)
    (held_out,) = listed(tmp_path / "out/val.txt")
    kept = np.delete(stack, int(held_out[-5]), axis=0).reshape(-1, 7).astype(float)
    np.testing.assert_allclose(report["channels"]["mean"], kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(report["channels"]["std"], kept.std(0), rtol=1e-6)
    assert (tmp_path / "out/views.png").exists()


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_ends_with_zero_on_good_data(tmp_path):
    done = run_forked(*TINY, "hydra.run.dir=out", cwd=tmp_path, module="mlpmatch_pl.check")
    assert done.returncode == 0, done.stderr
    assert "mean and standard deviation of the training images: backbone.mean=[" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "check.json", "check.log", "labeled.txt", "val.txt", "views.png",
    ]  # fmt: skip
    assert "warnings" in json.loads((tmp_path / "out/check.json").read_text())


def test_the_command_ends_with_one_on_bad_data_and_names_the_file(folder_root, command):
    (folder_root / "images/img6.jpg").write_bytes(b"no image")
    code, output, errors = command("check", *FOLDER, f"dataset.root={folder_root}", "hydra.run.dir=out")
    assert code == 1
    assert f"error: cannot read the image {folder_root / 'images/img6.jpg'}" in output
    assert errors.startswith("error: expected data without errors, but found 1;")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dataset=folder", "dataset.root=none", "dataset.classes=[a,b]"], "expected dataset.root to be a folder"),
        (["dataset.lableed=3"], "Did you mean dataset.labeled"),
        (["dataset.labeled=1_8"], "write dataset.labeled=1/8"),
    ],
)
def test_wrong_arguments_are_explained_in_one_line(arguments, sentence, command):
    code, _, errors = command("check", *arguments)
    assert code == 1
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_training_is_named_in_one_line(folder_root, command, monkeypatch, workers):
    """Only a part of a large dataset is read before the first step."""
    monkeypatch.setattr("mlpmatch_pl.data.datamodule.validate_dataset", lambda *arguments: set())
    save_image(folder_root / "images/wide.png", np.zeros((50, 60, 3), np.uint8))
    save_mask(folder_root / "masks/wide.png", np.full((50, 60), 9, np.uint8), palette=False)
    (folder_root / "labeled.txt").write_text("images/wide.png masks/wide.png")
    (folder_root / "val.txt").write_text("images/img0.jpg masks/img0.png")
    code, _, errors = command(
        "train", *FOLDER, f"dataset.root={folder_root}", "dataset.labeled=labeled.txt", "dataset.val=val.txt",
        f"loader.num_workers={workers}", "loader.batch_size=2", "backbone=tiny", "hydra.run.dir=out",
    )  # fmt: skip
    assert code == 1
    assert errors.strip().splitlines()[-1] == (
        "error: expected mask values 0..2 or 255 (ignore), but the mask of images/wide.png has 9; correct the mask, "
        "dataset.classes or dataset.ignore_index, or map the values by dataset.mask_values, or set "
        "loader.on_bad_image=skip to train without it"
    )


def test_fully_labeled_data_are_read_although_the_method_needs_unlabeled_images(make_folder, tmp_path):
    root = make_folder(count=5)
    report = run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={root}")
    assert report["errors"] == []
    assert any("use method=supervised; train refuses method=mlpmatch" in warning for warning in report["warnings"])


def test_masks_with_errors_are_not_said_to_lack_classes(make_folder, tmp_path):
    root = make_folder()
    for path in (root / "masks").rglob("*.png"):
        save_mask(path, np.full((3, 3), 99, np.uint8), palette=False)
    with pytest.raises(UserError):
        run_check(tmp_path / "out", *FOLDER, *FEW, f"dataset.root={root}")
    errors = json.loads((tmp_path / "out/check.json").read_text())["errors"]
    assert len(errors) == 5
    assert not any("two classes" in error for error in errors)


def test_missing_classes_name_the_option_that_covers_them(make_folder, tmp_path):
    root = make_folder(count=12, masked=11)
    for number, path in enumerate(sorted((root / "masks").rglob("*.png"))):
        mask = np.zeros(np.asarray(Image.open(path)).shape, np.uint8)
        mask[9:] = 1 if number else 2
        save_mask(path, mask, palette=False)
    report = run_check(
        tmp_path / "out", *FOLDER, *FEW, f"dataset.root={root}", "dataset.labeled=2", "loader.crop_size=33"
    )
    assert any("dataset.cover_classes=true" in warning for warning in report["warnings"])
