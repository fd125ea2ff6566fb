"""Files that want to do harm, given to the real commands: nothing is executed, nothing else is read, memory is kept."""

import ast
import io
import json
import os
import pickle
import resource
import signal
import socket
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, compose_train
from PIL import Image
from safetensors.torch import save_file

import mlpmatch_pl
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.readers.image import MAX_PIXELS, ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.validation import validate_dataset
from mlpmatch_pl.engine.build import read_config
from mlpmatch_pl.engine.resume import find_start
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.predictor import load
from mlpmatch_pl.segmentor.weights import read_state_dict
from mlpmatch_pl.utils.checkpoint import read_checkpoint
from mlpmatch_pl.utils.errors import UserError

SECRET = "0123456789abcdef0123456789abcdef01234567"  # as long as a key of W&B


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def content() -> dict:
    """A small checkpoint of a training."""
    module = MLPMatch(3, backbone="test_resnet", decoder={"channels": 8})
    return {"global_step": 1, "hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}


@pytest.fixture
def little_memory():
    """No more than 1 GiB beyond what the process has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def command(command):
    """Run a command's main in this process; return its exit code and what it printed."""

    def run(name: str, *arguments: str) -> tuple[int, str]:
        code, printed, errors = command(name, *arguments)
        return code, printed + errors

    return run


COMMANDS = {
    "resume": ("train", *TINY, "hydra.run.dir=run", "resume={file}"),
    "init_weights": ("train", *TINY, "hydra.run.dir=run", "init_weights={file}"),
    "pretrained": ("train", *TINY, "hydra.run.dir=run", "backbone.pretrained={file}"),
    "predict": ("predict", "checkpoint={file}", "input=photo.png", "output=out"),
    "evaluate": ("evaluate", "checkpoint={file}", "output=out", "dataset=shapes"),
    "export": ("export", "checkpoint={file}", "format=safetensors"),
}


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("how", COMMANDS)
def test_code_in_a_checkpoint_never_runs(command, content, tmp_path, how, form):
    marker, file = tmp_path / "marker", tmp_path / "evil.ckpt"
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    evil = content | {"callbacks": Bomb(marker)}
    if form == "torch":
        torch.save(evil, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(marker)))
    with suppress(RuntimeError):  # the attack is real: an unsafe reader runs it
        torch.load(file, weights_only=False)
    assert marker.exists()
    marker.unlink()

    code, printed = command(*(word.format(file=file) for word in COMMANDS[how]))
    assert code == 1
    assert "error: expected " in printed
    assert str(file) in printed
    assert not marker.exists()
    assert {path.name for path in tmp_path.rglob("*")} <= {"evil.ckpt", "photo.png", "run", "out", "train.log",
                                                           "evaluate.log"}  # fmt: skip  # Hydra's own


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10**9, "class_names": None},
        {"num_classes": 10**6, "class_names": ["x"] * 10**6},
        {"num_classes": -1},
        {"num_classes": "3"},
        {"decoder": {"channels": 10**9}},
        {"decoder": {"channels": 4000}},
        {"decoder": {"channels": "8"}},
        {"decoder": "os.system"},
        {"decoder": {"atrous_rates": [1] * 10**5}},
        {"decoder": {"atrous_rates": [10**9, 1, 1]}},
        {"in_chans": 10**7, "mean": [0.0] * 10**5, "std": [1.0] * 10**5},
        {"mean": [float("nan")] * 3},
        {"std": [0.0] * 3},
        {"backbone": "hf-hub:evil/model"},
        {"backbone": "local-dir:/etc"},
        {"backbone": "resnet50"},
        {"backbone": {"_target_": "os.system"}},
        {"method": {"_target_": "os.system", "command": "true"}},
        {"method": {"name": "mlpmatch", "strong_weights": "abc"}},
        {"criterion": {"name": "ce", "class_weights": [1.0] * 10**6}},
        {"output_stride": 2**40},
        {"palette": 3},
        {"palette": [[]]},
        {"palette": [[0, 0, 256]]},
        {"palette": [[0, 0, 0]] * 9},
    ],
    ids=lambda change: " ".join(f"{key}={str(value)[:20]}" for key, value in change.items()),
)
def test_hostile_arguments_in_a_checkpoint_are_a_sentence_without_memory_or_network(
    content, tmp_path, monkeypatch, little_memory, change
):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was used"))
    torch.save(content | {"hyper_parameters": content["hyper_parameters"] | change}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt do not"):
        load(tmp_path / "evil.ckpt")


def test_a_checkpoint_reads_no_other_file_and_calls_nothing(content, tmp_path, monkeypatch):
    asked = {"pretrained": str(tmp_path / "other.pth"), "_instantiator": "os.system", "_class_path": "os.system"}
    torch.save(content | {"hyper_parameters": content["hyper_parameters"] | asked}, tmp_path / "evil.ckpt")
    read = []
    monkeypatch.setattr("mlpmatch_pl.segmentor.weights.read_state_dict", read.append)
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it was called"))
    predictor = load(tmp_path / "evil.ckpt")
    assert not read
    assert predictor.predict(np.zeros((34, 34, 3), np.uint8)).shape == (34, 34)


def test_checkpoints_that_would_unpack_to_gigabytes_are_refused(content, tmp_path, little_memory):
    torch.save(content, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "zipped.ckpt", "w", zipfile.ZIP_DEFLATED) as zipped,
    ):
        for entry in plain.infolist():
            with zipped.open(entry.filename, "w", force_zip64=True) as part:
                part.write(plain.read(entry))
    wide = {name: tensor.new_zeros(()).expand(10**5, 10**5) for name, tensor in content["state_dict"].items()}
    torch.save(content | {"state_dict": wide}, tmp_path / "expanded.ckpt")
    assert read_checkpoint(tmp_path / "plain.ckpt")["global_step"] == 1
    for name in ("zipped", "expanded"):
        with pytest.raises(UserError, match=f"{name}.ckpt cannot be read as one"):
            load(tmp_path / f"{name}.ckpt")
    with pytest.raises(UserError, match=r"zipped.ckpt, but it cannot be read"):
        read_state_dict(tmp_path / "zipped.ckpt")


@pytest.mark.parametrize("header", [struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"{}" * 9, b"\0" * 4])
def test_broken_safetensors_are_refused(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(header)
    with pytest.raises(UserError, match="cannot be read"):
        read_state_dict(tmp_path / "a.safetensors")


def test_metadata_of_safetensors_is_not_looked_at(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"__class__": "os.system", "x": "y" * 10**6})
    assert read_state_dict(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


# --- configurations of run folders --------------------------------------------------------------------------------

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


@pytest.mark.parametrize("bomb", [ALIASES, "a: " + "[" * 10**5], ids=["aliases", "depth"])
@pytest.mark.parametrize("name", ["evaluate", "report"])
def test_a_configuration_that_expands_is_refused(command, content, tmp_path, little_memory, bomb, name):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(content, run / "checkpoints" / "best.ckpt")
    shapes = (
        "dataset: {_target_: mlpmatch_pl.data.datasets.shapes.shapes, labeled: '${a9}'}\nmethod: {name: x}\nseed: 0\n"
    )
    (run / "config.yaml").write_text(bomb + "\n" + shapes)
    (run / "splits.json").write_text("{}")
    arguments = ["checkpoint=run/checkpoints/best.ckpt", "output=out"] if name == "evaluate" else ["run"]
    code, printed = command(name, *arguments)
    assert code == 1
    assert "config.yaml" in printed
    assert "Traceback" not in printed
    assert len(printed) < 2000


def test_a_configuration_of_a_run_folder_executes_nothing_through_the_command(command, content, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(content, run / "checkpoints" / "best.ckpt")
    for target in ("os.system", "mlpmatch_pl.data.datasets.shapes.cv2.os.system"):
        (run / "config.yaml").write_text(f"dataset: {{_target_: {target}, command: touch {tmp_path}/marker}}\n")
        code, printed = command("evaluate", "checkpoint=run/checkpoints/best.ckpt", "output=out")
        assert code == 1
        assert f"but it calls {target}" in printed
    assert not (tmp_path / "marker").exists()


def test_a_configuration_of_a_run_folder_does_not_read_the_environment(command, content, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    value = "${oc.env:WANDB_API_KEY}"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(content, run / "checkpoints" / "best.ckpt")
    dataset = f"{{_target_: mlpmatch_pl.data.datasets.folder.folder, root: '{value}', classes: [a, b, c]}}"
    (run / "config.yaml").write_text(f"seed: 0\ndataset: {dataset}\nmethod: {{name: '{value}'}}\n")
    (run / "splits.json").write_text('{"labeled": {"split": "1/8", "count": 3, "sha256": "0"}}')
    code, printed = command("evaluate", "checkpoint=run/checkpoints/best.ckpt", "output=out")
    assert code == 1
    assert "expected a value for dataset.root in " in printed
    assert "set it, as in dataset.root=" in printed
    code, reported = command("report", "run")
    assert code == 0, reported
    written = [
        path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.suffix in (".html", ".csv", ".md")
    ]
    assert len(written) >= 3
    assert any("${oc.env:WANDB_API_KEY}" in text for text in written)  # as in the file
    assert SECRET not in printed + reported + "".join(written)


def test_names_in_a_report_are_text_not_markup(command, tmp_path):
    evil = "<script>alert(1)</script>"
    run = tmp_path / "<img src=x onerror=alert(1)>"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"seed: 0\nmethod: {{name: '{evil}'}}\ndataset: {{_target_: 'x.{evil}', labeled: '{evil}'}}\n"
    )
    split = {"split": evil, "count": 3, "sha256": evil}
    (run / "splits.json").write_text(json.dumps({"labeled": split, "val": split, "unlabeled": split}))
    (run / "metrics.csv").write_text(f'epoch,step,train/loss,val/miou,"val/iou/{evil}"\n0,0,1.5,0.5,0.5\n')
    metrics = {"val/miou": 0.5, "test/miou": 0.5, f"test/iou/{evil}": 0.5}
    result = {"steps": 1, "test": metrics, "last": metrics, "best": {"val/miou": 0.5, "checkpoint": evil}}
    result |= dict.fromkeys(("evaluated_on", "method", "seed", "device"), evil)
    (run / "metrics.json").write_text(json.dumps(result))
    _, printed = command("report", run.name)
    pages = list(tmp_path.rglob("*.html"))
    assert pages, printed
    for page in [*pages, *tmp_path.rglob("*.svg")]:
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text
        assert "<img src=x" not in text
    assert "&lt;script&gt;" in pages[0].read_text(encoding="utf-8")


# --- lists, images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
@pytest.mark.parametrize("line", ["../outside.png", "images/../../outside.png", "images/../images/../../outside.png"])
def test_a_list_does_not_lead_out_of_the_folder(folder_root, classes, name, line):
    Image.new("RGB", (40, 40)).save(folder_root.parent / "outside.png")
    (folder_root / name).write_text(("image\n" if name.endswith("csv") else "") + line + "\n")
    with pytest.raises(UserError, match=r"expected paths below .*, but found '.*outside\.png'"):
        folder(str(folder_root), classes, unlabeled=name)


def test_a_listed_file_that_is_no_image_is_named_and_nothing_of_it_is_shown(folder_root, classes, tmp_path):
    (tmp_path / "secret.txt").write_text("password=hunter2")
    (folder_root / "images" / "link.png").symlink_to(tmp_path / "secret.txt")
    for line in (str(tmp_path / "secret.txt"), "images/link.png"):
        (folder_root / "list.txt").write_text(line)
        data = folder(str(folder_root), classes, unlabeled="list.txt")
        with pytest.raises(UserError, match="cannot read the image") as caught:
            data.train.image(data.unlabeled[0])
        assert "hunter2" not in str(caught.value)


@pytest.fixture
def limited():
    """No more than 20 seconds: reading a pipe would wait forever."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_among_the_images_are_not_waited_for_and_links_are_followed(folder_root, classes, tmp_path, limited):
    before = folder(str(folder_root), classes)
    for kind in ("images", "masks"):
        os.mkfifo(folder_root / kind / "z.png")
        (folder_root / kind / "device.png").symlink_to("/dev/zero")
    Image.new("RGB", (60, 60)).save(tmp_path / "outside.png")
    (folder_root / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    data = folder(str(folder_root), classes)
    assert validate_dataset(data, 33)
    names = {data.train.name(index) for index in range(len(data.train))}
    assert names - {before.train.name(index) for index in range(len(before.train))} == {"images/link.png"}
    (folder_root / "images" / "nothing.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(UserError, match=r"cannot read the image .*nothing\.png"):
        validate_dataset(folder(str(folder_root), classes), 33)


def test_pipes_in_a_run_folder_are_not_waited_for(command, tmp_path, limited):
    run = tmp_path / "run"
    for name in ("predictions", "checkpoints"):
        (run / name).mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\nmethod: {name: a}\ndataset: {_target_: x.y}\n")
    (run / "splits.json").write_text('{"labeled": {"split": "1/8", "count": 3, "sha256": "0"}}')
    for name in ("predictions/epoch_1.png", "metrics.csv", "metrics.json", "checkpoints/last.ckpt"):
        os.mkfifo(run / name)
    assert command("report", "run")[0] == 0
    assert find_start("auto", run, first=False).checkpoint is None


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, color: int) -> bytes:
    """Return a PNG file of zeros, complete where it is small."""
    row = b"\0" * (1 + width * (3 if color == 2 else 1))
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(min(height, 200))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _stretched(suffix: str) -> bytes:
    """Return an image file whose header claims 60000 x 60000 pixels (a TIFF file 60000 x 60000 of one byte each)."""
    file = io.BytesIO()
    Image.new("RGB", (48, 32)).save(file, {"jpg": "JPEG", "bmp": "BMP", "tif": "TIFF"}[suffix])
    data = bytearray(file.getvalue())
    if suffix == "jpg":
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = struct.pack(">HH", 60000, 60000)
    elif suffix == "bmp":
        data[18:26] = struct.pack("<ii", 60000, 60000)
    else:
        for tag in (256, 257):
            place = data.index(struct.pack("<HHI", tag, 4 if struct.pack("<HHI", tag, 4, 1) in data else 3, 1))
            data[place : place + 12] = struct.pack("<HHII", tag, 4, 1, 60000)
    return bytes(data)


BOMBS = {
    "rgb.png": lambda: _png(60000, 60000, 2),
    "gray.png": lambda: _png(60000, 60000, 0),
    "just_too_large.png": lambda: _png(13400, 13400, 2),
    "a.jpg": lambda: _stretched("jpg"),
    "a.bmp": lambda: _stretched("bmp"),
    "a.tif": lambda: _stretched("tif"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_images_that_unpack_to_gigabytes_are_refused_by_their_header(tmp_path, little_memory, name):
    assert MAX_PIXELS < 13400**2
    (tmp_path / name).write_bytes(BOMBS[name]())
    for read in (ImageReader(3), ImageReader(1), ImageReader(2), MaskReader()):
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)
        limit = f"at most {MAX_PIXELS:,} pixels" in str(caught.value) or "decompression bomb" in str(caught.value)
        assert limit or not isinstance(read, ImageReader), str(caught.value)


def test_an_image_below_the_limit_is_read(tmp_path):
    Image.new("L", (3000, 2000)).save(tmp_path / "a.png")
    assert ImageReader(3)(tmp_path / "a.png").shape == (2000, 3000, 3)


# --- secrets, the source ------------------------------------------------------------------------------------------


def test_the_key_of_wandb_is_nowhere(command, tmp_path, monkeypatch):
    for key, value in {"WANDB_API_KEY": SECRET, "HOME": str(tmp_path / "home"), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    options = (*TINY, "logger=wandb", "logger.wandb.mode=offline")
    code, printed = command("train", *options, "hydra.run.dir=good")
    assert code == 0, printed
    code, refused = command("train", *options, f"+logger.wandb.api_key={SECRET}", "hydra.run.dir=as_an_override")
    assert code == 1
    assert SECRET not in printed + refused
    assert list((tmp_path / "good" / "wandb").glob("offline-run-*/*.wandb"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    for path in tmp_path.rglob("*.ckpt"):
        with zipfile.ZipFile(path) as archive:
            assert all(SECRET.encode() not in archive.read(entry) for entry in archive.infolist())


def test_nothing_in_the_source_unpickles_evaluates_or_starts_a_shell():
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
                 "np.load", "MLPMatch.load_from_checkpoint"}  # fmt: skip
    files = sorted(Path(mlpmatch_pl.__file__).parent.rglob("*.py"))
    assert len(files) > 80
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"pickle", "dill", "marshal", "shelve", "joblib", "subprocess"}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{path}: {ast.unparse(node)}"
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only", "True") == "True", path
                assert ast.unparse(node.func) != "torch.load" or "weights_only" in given, path


# --- types of values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("loader.scale=2", "expected loader.scale as a list, but got 2"),
        ("loader.scale=[1]", "expected loader.scale as a longer list, but got [1]"),
        ("loader.batch_size=abc", "expected loader.batch_size as an integer, but got 'abc'"),
        ("loader.batch_size=true", "expected loader.batch_size as an integer, but got true"),
        ("schedule.lr=fast", "expected schedule.lr as a number, but got 'fast'"),
        ("schedule.lr=nan", "expected schedule.lr as a finite number, but got nan"),
        ("trainer.precision=bf16-mixd", "Did you mean bf16-mixed"),
        ("trainer.accelerator=tpo", "expected options of trainer that Lightning takes"),
        ("dataset.labeled=[1]", "expected dataset.labeled as "),
        ("dataset._target_=os.nothing", "expected dataset._target_ as the path of a function or class"),
        ("objective.criterion.name=3", "expected a criterion of ce, ohem, dice, but got '3'"),
        ("objective=4", "expected objective as a mapping of keys to values, but got 4"),
        ("+objective.criterion.min_kpt=4", "no key objective.criterion.min_kpt. Did you mean min_kept"),
        ("~schedule.lr", "expected a value for schedule.lr, but the configuration lacks it"),
        ("callbacks.predictions.num_images=null", "num_images as an integer, but got null"),
        ("method.cutmix.area=[0.1]", "expected method.cutmix.area as a longer list, but got [0.1]"),
        ("loader.strong=[1]", "expected loader.strong[0] as a mapping of keys to values, but got 1"),
        ("seed=-1", "expected seed as an integer from 0 to 4294967295, but got -1"),
    ],
)
def test_a_value_of_another_type_is_one_line_and_writes_nothing(command, tmp_path, override, sentence):
    code, printed = command("train", *TINY, override, "hydra.run.dir=run")
    assert code == 1
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["run"])  # Hydra's own


def test_numbers_stand_for_texts_where_texts_are_meant(tmp_path):
    config = read_config(
        compose_train("dataset=folder", "dataset.root=2019", "dataset.classes=[0,road]", output_dir=tmp_path)
    )
    assert (config["dataset"]["root"], config["dataset"]["classes"]) == ("2019", ["0", "road"])
    assert config["loader"]["batch_size"] == 8
