import numpy as np
import pytest
import timm
import torch
from helpers import compose_config
from helpers.checkpoints import make_module, save_checkpoint
from helpers.images import save_image, save_mask
from PIL import Image

from mlpmatch_pl.commands.cli import literal_paths
from mlpmatch_pl.commands.predict.outputs import find_images
from mlpmatch_pl.commands.suggest.run import SIDE, describe_images, find_listed
from mlpmatch_pl.commands.suggest.selection import representatives
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.predictor import Predictor
from mlpmatch_pl.suggest import suggest
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
            save_image(tmp_path / "my photos" / color / f"{number}.png", pixels.astype(np.uint8))
    return tmp_path / "my photos"


def run_suggest(photos, output, *overrides):
    arguments = literal_paths([f"input={photos}", f"output={output}"])
    return suggest(compose_config("suggest", *arguments, "backbone.name=test_resnet", *overrides))


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


def test_there_are_no_more_images_than_images():
    assert sorted(representatives(torch.rand(4, 3), 9, chosen=[2])) == [0, 1, 3]


def test_each_kind_of_image_is_suggested_once_and_the_list_can_be_trained_with(photos, weights, tmp_path, capsys):
    found = run_suggest(photos, tmp_path / "out", f"backbone.pretrained={weights}", "count=3")
    assert found[0].parent.name == "red"  # of which there are most
    assert {path.parent.name for path in found} == {"red", "green", "blue"}
    listed = (tmp_path / "out/suggested.txt").read_text().split()
    assert listed == [path.relative_to(photos).as_posix() for path in found]
    assert "3 of 15 images: " in capsys.readouterr().out
    with Image.open(tmp_path / "out/suggested.png") as sheet:
        assert sheet.width > 3 * 240
        colors = {color for _, color in sheet.resize((60, 30)).getcolors(9999)}
    for wanted in COLORS.values():
        assert min(np.abs(np.subtract(wanted, color)).max() for color in colors) < 30
    for path in photos.rglob("*.png"):
        mask = np.random.default_rng(0).integers(0, 2, Image.open(path).size[::-1]).astype(np.uint8)
        save_mask(tmp_path / "masks" / path.relative_to(photos), mask, palette=False)
    data = folder(
        str(tmp_path), ["a", "b"], images=photos.name, masks="masks", labeled=str(tmp_path / "out/suggested.txt")
    )
    assert {f"{photos.name}/{name}" for name in listed} == {data.train.name(index) for index in data.labeled_indices}


def test_images_with_labels_are_not_suggested_nor_are_images_like_them(photos, weights, tmp_path):
    for name, line in (("one.txt", "my photos/red/3.png\tmasks/red/3.png"), ("two.txt", "green/1\n")):
        (tmp_path / name).write_text(line)
    lists = f"labeled=[{tmp_path / 'one.txt'},{tmp_path / 'two.txt'}]"
    (found,) = run_suggest(photos, tmp_path / "out", f"backbone.pretrained={weights}", lists, "count=1")
    assert found.parent.name == "blue"


def test_with_a_checkpoint_the_lists_of_its_run_count_and_uncertain_images_come_first(photos, tmp_path):
    module = make_module(class_names=["a", "b", "c", "d"], palette=[[0, 0, 0]] * 4).eval()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    checkpoint = save_checkpoint(module, tmp_path / "run/checkpoints/best.ckpt")
    (tmp_path / "run/labeled.txt").write_text("images/red/0.png\tmasks/red/0.png\nred/1.png\tx.png\n")
    (tmp_path / "run/val.txt").write_text("green/0.png\tx.png\n")
    images = find_images(str(photos), tmp_path / "out")
    described = describe_images(Predictor(module), images)
    for image in images[:3]:
        with torch.no_grad():
            pixels = torch.from_numpy(np.array(Image.open(image.path))).permute(2, 0, 1)[None]
            probability = module(pixels).softmax(1)
            features = module.segmentor.encode(pixels).levels[-1].mean((2, 3))[0]
        torch.testing.assert_close(described[image].features_D, features)
        entropy = -(probability * probability.log()).sum(1).mean().item()
        assert described[image].entropy == pytest.approx(entropy, rel=1e-4)
    entropies = np.array([one.entropy for one in described.values()])
    assert entropies.std() > 0.01
    rows = [index for index, image in enumerate(images) if image.name in ("red/1", "green/0")]
    features = np.stack([one.features_D.numpy() for one in described.values()]).astype(np.float64)
    expected = plain_choice(features, 4, rows, entropies)
    found = run_suggest(photos, tmp_path / "out", f"checkpoint={checkpoint}", "count=4")
    assert found == [images[index].path for index in expected]


def test_large_images_are_compared_at_a_smaller_size_and_tiny_ones_at_a_larger_one(tmp_path):
    save_image(tmp_path / "large.png", np.full((30, 4000, 3), 99, np.uint8))
    save_image(tmp_path / "tiny.png", np.full((3, 2, 3), 99, np.uint8))
    sizes = []
    predictor = Predictor(make_module())
    encode = predictor.module.segmentor.encode
    predictor.module.segmentor.encode = lambda image: sizes.append(tuple(image.shape[2:])) or encode(image)
    describe_images(predictor, find_images(str(tmp_path), tmp_path / "out"))
    assert sizes == [(33, SIDE), (33, 33)]


def test_a_broken_image_is_named_and_left_out(photos, weights, tmp_path, capsys):
    (photos / "blue/0.png").write_bytes(b"broken")
    assert len(run_suggest(photos, tmp_path / "out", f"backbone.pretrained={weights}", "count=14")) == 14
    assert "blue/0.png" in capsys.readouterr().err
    assert "0.png" not in [line for line in (tmp_path / "out/suggested.txt").read_text().split() if "blue" in line]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["count=0"], "expected count of at least 1, but got 0"),
        (["count=16"], "expected at least count=16 images without labels in .*, but 0 of 15 have labels"),
        (["backbone.pretrained=auto"], "expected weights to compare images with, but backbone.pretrained=auto may"),
        (["labeled=none.txt"], "expected a list of images that have labels, but none.txt does not exist"),
        (["labeled=pyproject.toml"], "expected images of input in pyproject.toml, but it names none of the 15"),
        (["checkpoint=none.ckpt", "count=1"], "expected a checkpoint, but none.ckpt does not exist"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(overrides, sentence, photos, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run_suggest(photos, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def test_existing_files_are_kept(photos, weights, tmp_path):
    (tmp_path / "suggested.txt").write_text("mine")
    with pytest.raises(UserError, match=r"suggested\.txt exists"):
        run_suggest(photos, tmp_path, f"backbone.pretrained={weights}", "count=1")
    run_suggest(photos, tmp_path, f"backbone.pretrained={weights}", "count=1", "overwrite=true")
    assert (tmp_path / "suggested.txt").read_text() != "mine"


def test_of_very_many_images_some_are_compared(photos, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mlpmatch_pl.commands.suggest.run.LARGEST", 6)
    assert len(run_suggest(photos, tmp_path / "out", f"backbone.pretrained={weights}", "count=6")) == 6
    assert "15 images are too many to compare; 6 of them, chosen at random, are" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["day/a b.jpg", "root/day/a b.png\tmasks/day/a b.png", "day\\a b", "/day/a b.jpg"])
def test_a_list_names_images_in_many_ways(line, tmp_path):
    for name in ("day/a b.jpg", "night/a b.jpg"):
        save_image(tmp_path / "root" / name, np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "list.txt").write_text(f"{line}\n\n")
    images = find_images(str(tmp_path / "root"), tmp_path / "out")
    assert [image.name for image in find_listed(images, [tmp_path / "list.txt"])] == ["day/a b"]
