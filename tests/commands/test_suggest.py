import numpy as np
import pytest
import timm
import torch
from helpers import TINY, compose_config, compose_train
from helpers.checkpoints import make_module
from helpers.images import save_image, save_mask
from hydra.errors import InstantiationException
from PIL import Image

from mlpmatch_pl.commands.cli import literal_paths
from mlpmatch_pl.commands.suggest.run import SIDE, describe_images
from mlpmatch_pl.commands.suggest.selection import representatives
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.engine.build import build_data
from mlpmatch_pl.predictor import Predictor, load
from mlpmatch_pl.suggest import suggest
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError

COLORS = {"red": (220, 30, 20), "green": (10, 200, 40), "blue": (20, 40, 230)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Nine red, three green and three blue images."""
    rng = np.random.default_rng(0)
    for color, count in (("red", 9), ("green", 3), ("blue", 3)):
        for number in range(count):
            pixels = np.clip(np.array(COLORS[color]) + rng.integers(-15, 16, (40 + number, 50, 3)), 0, 255)
            save_image(tmp_path / "my photos" / color / f"{number} of {count}.png", pixels.astype(np.uint8))
    return tmp_path / "my photos"


def run_suggest(*overrides):
    return suggest(compose_config("suggest", *literal_paths(overrides)))


def start(photos, weights, output, *overrides):
    """Suggest without a checkpoint."""
    encoder = ("backbone.name=test_resnet", f"backbone.pretrained={weights}")
    return run_suggest(f"input={photos}", f"output={output}", *encoder, *overrides)


def plain_choice(features, count, chosen, weights):
    """Try every image in each round, and add up the best similarity of every image."""
    centered = features - features.mean(axis=0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)

    def total(selected):
        best = [max([-1, *(float(centered[i] @ centered[j]) for j in selected)]) for i in range(len(features))]
        return sum(weight * value for weight, value in zip(weights, best, strict=True))

    order = []
    for _ in range(count):
        rest = [j for j in range(len(features)) if j not in (*chosen, *order)]
        order.append(max(rest, key=lambda j: total([*chosen, *order, j])))
    return order


@pytest.mark.parametrize("seed", range(8))
def test_images_are_chosen_as_by_trying_all(seed):
    rng = np.random.default_rng(seed)
    features, weights = rng.normal(size=(20, 5)), rng.random(20)
    chosen = rng.choice(20, size=seed % 4, replace=False).tolist()
    expected = plain_choice(features.copy(), 6, chosen, weights)
    assert representatives(torch.from_numpy(features), 6, chosen, torch.from_numpy(weights)) == expected


def test_all_images_are_chosen_if_count_is_larger():
    assert sorted(representatives(torch.rand(4, 3), 9, chosen=[2])) == [0, 1, 3]


def colors_of(names):
    return [name.partition("/")[0] for name in names]


def test_each_kind_of_image_is_suggested_once_and_the_list_can_be_trained_with(photos, weights, tmp_path, capsys):
    found = start(photos, weights, tmp_path / "out", "count=3")
    assert colors_of(found)[0] == "red"  # of which there are most
    assert set(colors_of(found)) == {"red", "green", "blue"}
    assert (tmp_path / "out/suggested.txt").read_text().splitlines() == found
    assert f"suggested 3 of 15 images (0 with labels): {tmp_path / 'out/suggested.txt'}" in capsys.readouterr().out
    with Image.open(tmp_path / "out/suggested.png") as sheet:
        assert sheet.width > 3 * 240
        shown = {color for _, color in sheet.resize((60, 30)).getcolors(9999)}
    for wanted in COLORS.values():
        assert min(np.abs(np.subtract(wanted, color)).max() for color in shown) < 30
    label_all(photos)
    data = folder(str(photos), ["a", "b"], images=".", masks="masks", labeled=str(tmp_path / "out/suggested.txt"))
    assert set(found) == {data.train.name(index) for index in data.labeled_indices}


def label_all(photos, names=None):
    for path in [photos / name for name in names or []] or list(photos.rglob("*.png")):
        mask = np.random.default_rng(0).integers(0, 2, Image.open(path).size[::-1]).astype(np.uint8)
        save_mask(photos / "masks" / path.relative_to(photos), mask, palette=False)


def test_images_with_masks_are_not_suggested_nor_are_masks_or_an_earlier_sheet(photos, weights, tmp_path, capsys):
    label_all(photos, ["red/3 of 9.png", "green/1 of 3.png"])
    (found,) = start(photos, weights, photos / "suggestions", "count=1")
    assert found.startswith("blue/")
    assert "suggested 1 of 15 images (2 with labels)" in capsys.readouterr().out
    everything = start(photos, weights, tmp_path / "out", "count=13")
    assert set(colors_of(everything)) == {"red", "green", "blue"}
    with pytest.raises(UserError, match="count=14 images to choose from, but 13 have no labels; lower"):
        start(photos, weights, tmp_path / "more", "count=14")


def test_folders_named_as_for_training_are_found(photos, weights, tmp_path):
    (tmp_path / "root").mkdir()
    photos.rename(tmp_path / "root/images")
    (found,) = start(tmp_path / "root", weights, tmp_path / "out", "count=1")
    assert found.startswith("images/red/")


def test_masks_beside_their_images_are_not_suggested(photos, weights, tmp_path):
    """As in the mask exports of an annotation tool, which name the classes in a file."""
    (photos / "_classes.csv").write_text("Pixel Value, Class\n0, a\n1, b\n")
    for name in ("red/3 of 9", "green/1 of 3"):
        size = Image.open(photos / f"{name}.png").size
        save_mask(photos / f"{name}_mask.png", np.zeros(size[::-1], np.uint8), palette=False)
    found = start(photos, weights, tmp_path / "out", "count=13")
    assert not [name for name in found if "_mask" in name or name in ("red/3 of 9.png", "green/1 of 3.png")]


@pytest.fixture
def trained(photos, tmp_path):
    """A checkpoint of a run with two labeled, two validation and one test image."""
    label_all(photos, ["red/0 of 9.png", "red/1 of 9.png", "green/0 of 3.png", "blue/0 of 3.png", "red/8 of 9.png"])
    (tmp_path / "test.txt").write_text("red/8 of 9.png")
    (tmp_path / "val.txt").write_text("green/0 of 3.png\nblue/0 of 3.png\n")
    train(
        compose_train(
            *[option for option in TINY if not option.startswith("dataset.")], "dataset=folder", "backbone=tiny",
            *literal_paths([f"dataset.root={photos}", f"dataset.val={tmp_path / 'val.txt'}"]),
            f"dataset.test={tmp_path / 'test.txt'}", "dataset.images=.", "dataset.masks=masks",
            "dataset.classes=[a,b]", "schedule.epochs=null", "schedule.steps=2", "loader.crop_size=33",
            "loader.batch_size=2", "loader.eval_batch_size=1",
            output_dir=tmp_path / "run",
        )
    )  # fmt: skip
    return tmp_path / "run/checkpoints/last.ckpt"


def test_with_a_checkpoint_its_unlabeled_images_are_ranked_and_uncertain_ones_count_more(trained, photos, tmp_path):
    predictor = load(trained)
    names = sorted(path.relative_to(photos).as_posix() for path in photos.glob("[rgb]*/*.png"))
    labeled, held_out = names_of(names, "red/0", "red/1"), names_of(names, "green/0", "blue/0", "red/8")
    unlabeled = [name for name in names if name not in {*labeled, *held_out}]
    features, entropies = [], []
    for name in (*labeled, *unlabeled):
        with torch.no_grad():
            pixels = torch.from_numpy(np.array(Image.open(photos / name))).permute(2, 0, 1)[None]
            probability = predictor.module(pixels).softmax(1)
            features.append(predictor.module.segmentor.encode(pixels).levels[-1].mean((2, 3))[0].numpy())
        entropies.append(-(probability * probability.log()).sum(1).mean().item())
    assert np.std(entropies) > 1e-4
    expected = plain_choice(np.stack(features).astype(np.float64), 4, [0, 1], entropies)
    found = run_suggest(f"checkpoint={trained}", f"output={tmp_path / 'out'}", "count=4")
    assert found == [[*labeled, *unlabeled][index] for index in expected]
    assert plain_choice(np.stack(features).astype(np.float64), 4, [0, 1], np.ones(12)) != expected
    with pytest.raises(UserError, match="expected at least count=11 images to choose from, but 10 have no labels"):
        run_suggest(f"checkpoint={trained}", f"output={tmp_path / 'more'}", "count=11")


def names_of(names, *beginnings):
    return [name for name in names if name.startswith(beginnings)]


def test_the_data_of_a_run_may_have_moved_and_other_photos_can_be_ranked(trained, photos, tmp_path):
    photos.rename(tmp_path / "moved")
    out = f"output={tmp_path / 'out'}"
    with pytest.raises(InstantiationException, match=r"my photos does not exist; set dataset\.root"):
        run_suggest(f"checkpoint={trained}", out, "count=1")
    (found,) = run_suggest(f"checkpoint={trained}", out, "count=1", f"+dataset.root={tmp_path / 'moved'}")
    assert (tmp_path / "moved" / found).is_file()
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(trained.read_bytes())
    (found,) = run_suggest(
        f"checkpoint={alone}", f"output={tmp_path / 'two'}", "count=1", f"input={tmp_path / 'moved'}"
    )
    assert (tmp_path / "moved" / found).is_file()
    with pytest.raises(UserError, match=r"but there is no config\.yaml; set input to a folder with images"):
        run_suggest(f"checkpoint={alone}", f"output={tmp_path / 'three'}")


def test_large_images_are_compared_at_a_smaller_size_and_tiny_ones_at_a_larger_one():
    source = Source([np.full((30, 4000, 3), 99, np.uint8), np.full((3, 2, 3), 99, np.uint8)])
    sizes = []
    predictor = Predictor(make_module())
    encode = predictor.module.segmentor.encode
    predictor.module.segmentor.encode = lambda image: sizes.append(tuple(image.shape[2:])) or encode(image)
    describe_images(predictor, source, [0, 1])
    assert sizes == [(33, SIDE), (33, 33)]


class Source(list):
    """Images without files."""

    def name(self, index):
        return str(index)

    def image(self, index):
        return self[index]


def test_a_broken_image_is_named_and_left_out(photos, weights, tmp_path, capsys):
    (photos / "blue/0 of 3.png").write_bytes(b"broken")
    assert "blue/0 of 3.png" not in start(photos, weights, tmp_path / "out", "count=14")
    assert "skipped: " in (err := capsys.readouterr().err)
    assert "blue/0 of 3.png" in err
    with pytest.raises(UserError, match="count=15 images to choose from, but 14 have no labels and can be read; lower"):
        start(photos, weights, tmp_path / "more", "count=15")
    for path in photos.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"blue/0 of 3\.png"):
        start(photos, weights, tmp_path / "none", "count=1")
    assert not (tmp_path / "more").exists()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["input=.", "count=0"], "expected count of at least 1, but got 0"),
        ([], "expected input=FOLDER with images, or the checkpoint of a run, but got neither"),
        (["input=pyproject.toml"], r"expected input to be a folder with images, but pyproject\.toml is none"),
        (["input=none"], "expected input to be a folder with images, but none is none; correct it"),
        (["input=docs/reference"], "expected images .* in .*docs/reference, but found none"),
        (["input=.", "backbone.pretrained=auto"], "expected an encoder with weights .* backbone.pretrained=auto; set"),
        (["input=.", "backbone.pretrained=null"], "expected an encoder with weights .* backbone.pretrained=None; set"),
        (["input=.", "+dataset.root=x"], "expected input or changes of a run's dataset, but got both; omit one"),
        (["checkpoint=none.ckpt"], r"expected a checkpoint, but none\.ckpt does not exist"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(overrides, sentence, weights, tmp_path):
    encoder = () if "backbone" in str(overrides) else (f"backbone.pretrained={weights}",)
    with pytest.raises(UserError, match=sentence):
        run_suggest("backbone.name=test_resnet", *encoder, f"output={tmp_path / 'out'}", *overrides)
    assert not (tmp_path / "out").exists()


def test_existing_files_are_kept(photos, weights, tmp_path):
    (tmp_path / "suggested.txt").write_text("mine")
    with pytest.raises(UserError, match=r"suggested\.txt exists"):
        start(photos, weights, tmp_path, "count=1")
    start(photos, weights, tmp_path, "count=1", "overwrite=true")
    assert (tmp_path / "suggested.txt").read_text() != "mine"


def test_of_very_many_images_some_are_compared_and_all_labeled_ones(photos, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mlpmatch_pl.commands.suggest.run.LARGEST", 6)
    label_all(photos, ["red/3 of 9.png", "green/1 of 3.png"])
    assert len(start(photos, weights, tmp_path / "out", "count=4")) == 4
    said = capsys.readouterr().out
    assert "13 unlabeled images are too many to compare; comparing 4 chosen at random" in said
    assert "suggested 4 of 6 images (2 with labels)" in said


def test_a_run_without_files_has_names(tmp_path):
    options = ("method=supervised", "schedule.steps=1")
    train(compose_train(*TINY, *options, output_dir=tmp_path / "run"))
    checkpoint = f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}"
    found = run_suggest(checkpoint, f"output={tmp_path / 'out'}", "count=2")
    assert all(name.startswith("train_") for name in found)
    lines = [*found, *(tmp_path / "run/labeled.txt").read_text().split()]
    (tmp_path / "more.txt").write_text("\n".join(lines))
    data = compose_train(*TINY, f"dataset.labeled={tmp_path / 'more.txt'}", output_dir=tmp_path / "two").dataset
    assert len(build_data(data).labeled_indices) == 6
