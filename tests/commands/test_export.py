"""Exported files against the checkpoint they come from, run by onnxruntime, torch.export and a bare Segmentor."""

import json
import shutil
import stat
import zipfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import compose_config, run_command
from helpers.processes import run_forked
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import AvgPool2dSame, Conv2dSame, RotaryEmbeddingDinoV3
from torch import nn
from torch.export import Dim

from mlpmatch_pl import MLPMatch, UserError
from mlpmatch_pl.commands.export import run as exporting_module
from mlpmatch_pl.commands.export.formats import (
    EXAMPLE,
    FORMATS,
    ExportedModel,
    RotaryPositions,
    SamePadding,
    replace_sized_layers,
)
from mlpmatch_pl.commands.export.int8 import write_int8
from mlpmatch_pl.commands.export.run import (
    PARITY,
    TOLERANCE,
    ExportOptions,
    Parity,
    compare,
    describe,
    export_checkpoint,
)
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.export import export
from mlpmatch_pl.predictor import load
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.segmentor.families import dinov2_positions
from mlpmatch_pl.segmentor.weights import load_published
from mlpmatch_pl.utils.validation import read_options

NAMES, PALETTE = ["ground", "road", "sky"], [[0, 0, 0], [250, 0, 10], [0, 20, 240]]
SIZES = ((1, 33, 200), (5, 70, 33), (2, 65, 97), (1, 111, 96))  # batch, height, width


def make_checkpoint(path: Path, backbone="test_resnet", in_chans=3, decoder=None, **options) -> Path:
    torch.manual_seed(0)
    module = MLPMatch(
        3, backbone=backbone, in_chans=in_chans, mean=[100.0, 120.0, 90.0][:in_chans],
        std=[50.0, 60.0, 70.0][:in_chans], decoder=decoder or {"channels": 8},
        **{"class_names": NAMES, "palette": PALETTE, **options},
    )  # fmt: skip
    calibrate(module.segmentor, in_chans)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=path.parent,
    )  # fmt: skip
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@torch.no_grad()
def calibrate(segmentor, in_chans):
    """Give BatchNorm the statistics of images, as after a training: those that it starts with hide mistakes."""
    norms = [module for module in segmentor.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    segmentor.train()
    for _ in range(2):
        segmentor(random_image((4, 65, 65), in_chans))
    segmentor.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt")


@pytest.fixture(scope="module")
def onnx_file(checkpoint):
    pytest.importorskip("onnxscript")
    export_checkpoint(ExportOptions(checkpoint, "onnx"))
    return checkpoint.with_suffix(".onnx")


def random_image(size, in_chans=3, dtype=torch.float32, highest=256):
    batch, height, width = size
    return torch.randint(0, highest, (batch, in_chans, height, width)).to(dtype)


@pytest.fixture(scope="module")
def program_file(tmp_path_factory):
    """A program with gray uint8 input, probabilities and output stride 32, beside its checkpoint."""
    path = make_checkpoint(tmp_path_factory.mktemp("gray") / "gray.ckpt", in_chans=1, output_stride=32)
    options = ExportOptions(path, "torch_export", returns="probabilities", input_dtype="uint8")
    parity = export_checkpoint(options)
    assert parity.difference < 1e-4
    assert parity.largest <= 1
    assert parity.equal_classes > 0.999
    return options.path


def run_onnx(file, image_BCHW):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image_BCHW.numpy()})[0])


def assert_same(expected, found):
    assert expected.shape == found.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(expected.argmax(dim=1).unique()) > 1  # a prediction of one class would compare too little


@torch.no_grad()
def test_onnx_gives_the_logits_of_the_checkpoint_for_any_size(checkpoint, onnx_file):
    module = load(checkpoint, device="cpu").module
    for size in SIZES:
        image = random_image(size)
        assert_same(module(image), run_onnx(onnx_file, image))


def test_the_onnx_file_names_its_dimensions_and_describes_itself(onnx_file):
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx_file, full_check=True)
    model = onnx.load(onnx_file)
    for value, channels in ((model.graph.input[0], 3), (model.graph.output[0], len(NAMES))):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dims == ["batch", channels, "height", "width"]
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("image", "logits")
    props = {prop.key: json.loads(prop.value) for prop in model.metadata_props}
    assert (props["class_names"], props["palette"], props["bit_depth"]) == (NAMES, PALETTE, 8)
    assert (props["returns"], props["input_dtype"], props["smallest_size"]) == ("logits", "float32", 33)
    assert props["segmentor"]["mean"] == [100.0, 120.0, 90.0]
    assert props["segmentor"]["std"] == [50.0, 60.0, 70.0]
    assert props["segmentor"]["in_chans"] == 3


def test_files_contain_no_path_of_this_machine(onnx_file, program_file):
    with zipfile.ZipFile(program_file) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    for content in (onnx_file.read_bytes(), *contents):
        assert b"segmentor.py" not in content
        assert str(Path(__file__).parents[2]).encode() not in content


@torch.no_grad()
def test_torch_export_gives_probabilities_describes_itself_and_refuses_small_images(program_file):
    extra = {"config.json": ""}
    program = torch.export.load(program_file, extra_files=extra).module()
    module = load(program_file.with_suffix(".ckpt"), device="cpu").module
    for size in SIZES:
        image = random_image(size, 1, torch.uint8)
        probability = program(image)
        assert_same(module(image).softmax(dim=1), probability)
        torch.testing.assert_close(probability.sum(dim=1), torch.ones(size))
    assert json.loads(extra["config.json"])["class_names"] == NAMES
    with pytest.raises(AssertionError, match="33"):
        program(random_image((1, 32, 40), 1, torch.uint8))


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
@torch.no_grad()
def test_a_transformer_that_pads_its_images_is_exported_for_sizes_with_and_without_padding(form, tmp_path):
    pytest.importorskip("onnxscript")
    decoder = {"name": "dpt", "channels": 12, "level_channels": [8, 8, 16, 16]}
    path = make_checkpoint(tmp_path / "best.ckpt", "test_vit", decoder=decoder)
    options = ExportOptions(path, form)
    export_checkpoint(options)
    module, exported = load(path, device="cpu").module, FORMATS[form].read(options.path)
    for size in (*SIZES, (1, 64, 96), (3, 48, 50), (2, 100, 80)):  # patches have 16 pixels
        image = random_image(size)
        assert_same(module(image), exported(image))


@torch.no_grad()
def test_safetensors_load_in_three_lines_and_as_weights_to_start_from(checkpoint, tmp_path):
    file = tmp_path / "weights.safetensors"
    parity = export_checkpoint(ExportOptions(checkpoint, "safetensors", file))
    assert (parity.difference, parity.equal_classes) == (0, 1)

    config = json.loads(file.with_suffix(".json").read_text())
    segmentor = Segmentor(**config["segmentor"]).eval()
    segmentor.load_state_dict(load_file(file))

    image, module = random_image((2, 40, 51)), load(checkpoint, device="cpu").module
    assert_same(module(image), segmentor(image))
    with safe_open(file, "pt") as content:
        assert json.loads(content.metadata()["config"]) == config
    assert (config["class_names"], config["palette"]) == (NAMES, PALETTE)
    assert file.stat().st_mode & stat.S_IRGRP == file.with_suffix(".json").stat().st_mode & stat.S_IRGRP
    other = Segmentor(3, "test_resnet", decoder={"channels": 8}, mean=config["segmentor"]["mean"],
                      std=config["segmentor"]["std"]).eval()  # fmt: skip
    load_published(other, file)
    assert torch.equal(other(image), segmentor(image))


def test_a_checkpoint_without_colors_gets_default_ones(tmp_path):
    path = make_checkpoint(tmp_path / "best.ckpt", palette=None, class_names=None)
    config = describe(load(path, device="cpu"), ExportOptions(path))
    assert config["palette"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert config["class_names"] == ["0", "1", "2"]
    assert config == json.loads(json.dumps(config))


def test_sixteen_bit_images_go_in_as_float32_only(tmp_path):
    options = {"orientation": "ignore", "bands": [4]}
    path = make_checkpoint(tmp_path / "best.ckpt", in_chans=1, bit_depth=16, image_options=options)
    assert describe(load(path, "cpu"), ExportOptions(path, "safetensors"))["image_options"] == options
    assert export_checkpoint(ExportOptions(path, "safetensors")).largest > 0
    with pytest.raises(UserError, match=r"expected input_dtype=float32 .* 16-bit images, but got uint8"):
        export_checkpoint(ExportOptions(path, "safetensors", input_dtype="uint8", overwrite=True))


def wrong_write(module, config, file):
    changed = deepcopy(module)
    with torch.no_grad():
        changed.segmentor.decoder.classifier.bias[1] += 0.01
    FORMATS["safetensors"].write(changed, config, file)


def test_a_file_that_differs_is_refused_and_the_existing_file_kept(checkpoint, tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"an earlier one")
    monkeypatch.setattr(
        exporting_module, "FORMATS", {**FORMATS, "safetensors": replace(FORMATS["safetensors"], write=wrong_write)}
    )
    with pytest.raises(
        UserError, match=r"with the logits of .*best\.ckpt, but in safetensors they differ by up to 0\.01 .* nothing"
    ):
        export_checkpoint(ExportOptions(checkpoint, "safetensors", file, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == b"an earlier one"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda logits: logits, 0),
        (lambda logits: logits + 0.5, 0.5),
        (lambda logits: logits[..., :-1], float("inf")),
        (lambda logits: logits * float("nan"), float("inf")),
    ],
)
@torch.no_grad()
def test_the_comparison_finds_differences(change, difference, checkpoint):
    predictor = load(checkpoint, device="cpu")
    segmentor, sizes = predictor.module.segmentor, []

    def exported(image_BCHW):
        sizes.append((len(image_BCHW), *image_BCHW.shape[2:]))
        return change(segmentor(image_BCHW))

    parity = compare(segmentor, exported, describe(predictor, ExportOptions(checkpoint)))
    assert parity.difference == pytest.approx(difference, abs=1e-5)
    assert parity.difference == 0 or parity.difference > 100 * TOLERANCE
    assert 0 < parity.rounding < 1e-5 * parity.largest
    assert EXAMPLE not in sizes
    if np.isfinite(difference):
        assert tuple(sizes) == PARITY
        assert parity.equal_classes == 1  # a constant added to all classes changes none


def test_the_comparison_counts_pixels_of_another_class(checkpoint):
    predictor = load(checkpoint, device="cpu")
    segmentor = predictor.module.segmentor
    counted = []

    def exported(image_BCHW):
        logits = segmentor(image_BCHW)
        rolled = logits.clone()
        rolled[..., :10, :] = rolled[..., :10, :].roll(1, dims=1)
        counted.append((logits[:, 0, :10].numel(), logits[:, 0].numel()))
        return rolled

    with torch.no_grad():
        parity = compare(segmentor, exported, describe(predictor, ExportOptions(checkpoint)))
    changed, pixels = (sum(column) for column in zip(*counted, strict=True))
    assert parity.equal_classes == 1 - changed / pixels


@pytest.mark.parametrize(("rounding", "accepted"), [(1e-6, False), (2e-3, True)])
def test_a_difference_within_the_rounding_error_is_accepted(rounding, accepted, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting_module, "compare", lambda *_: Parity(3e-3, rounding, 1.0, 1.0))
    options = ExportOptions(checkpoint, "safetensors", tmp_path / "weights.safetensors")
    if accepted:
        export_checkpoint(options)
    else:
        with pytest.raises(UserError, match=r"differ by up to 0\.003"):
            export_checkpoint(options)
    assert options.path.exists() == accepted


def test_files_are_overwritten_only_if_asked(checkpoint, tmp_path):
    for existing in ("weights.safetensors", "weights.json"):
        folder = tmp_path / existing
        folder.mkdir()
        (folder / existing).write_text("mine")
        options = ExportOptions(checkpoint, "safetensors", folder / "weights.safetensors")
        with pytest.raises(UserError, match=f"new files only, but .*{existing} exists; .*, or set overwrite=true"):
            export_checkpoint(options)
        assert (folder / existing).read_text() == "mine"
        export_checkpoint(replace(options, overwrite=True))
        assert (folder / existing).read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onxx"}, "expected format as 'onnx', 'torch_export', 'safetensors' or 'hub', but got 'onxx'"),
        ({"license": "mit"}, "expected format=hub with license=mit, but got onnx; omit license"),
        ({"format": "hub", "int8": True}, "expected format=onnx with int8=true, but got hub; omit int8"),
        ({"input_dtype": "float16"}, "expected input_dtype as 'float32' or 'uint8', but got 'float16'. Did you mean"),
        ({"output": "a.pt2"}, r"expected an output with the suffix .onnx for format=onnx, but got a.pt2; change"),
        ({"format": "safetensors", "returns": "probabilities"}, "expected returns=logits for format=safetensors"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        read_options(ExportOptions, {"checkpoint": "best.ckpt", **options})
    assert str(caught.value).startswith(message)


def test_missing_packages_are_named_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(exporting_module, "find_spec", lambda name: None if name.startswith("onnx") else name)
    with pytest.raises(UserError) as caught:
        export_checkpoint(ExportOptions(Path("none.ckpt"), "onnx"))
    assert str(caught.value) == (
        "expected onnx, onnxscript, onnxruntime to be installed for format=onnx; run: pip install 'mlpmatch_pl[export]'"
    )


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt does not exist"):
        export_checkpoint(ExportOptions(tmp_path / "none.ckpt", "torch_export"))
    (tmp_path / "broken.ckpt").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"broken\.ckpt cannot be read"):
        export_checkpoint(ExportOptions(tmp_path / "broken.ckpt", "torch_export"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.ckpt"]


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1)])
def test_integer_padding_equals_timm(kernel_size, stride, dilation):
    torch.manual_seed(0)
    same = Conv2dSame(2, 4, kernel_size, stride, dilation=dilation, bias=True)
    plain = nn.Conv2d(2, 4, kernel_size, stride, dilation=dilation)
    plain.load_state_dict(same.state_dict())
    padding = SamePadding(same.kernel_size, same.stride, same.dilation)
    for height, width in ((6, 7), (7, 6), (9, 12), (1, 2)):
        x = torch.rand(1, 2, height, width)
        torch.testing.assert_close(plain(padding(x)), same(x))


@pytest.mark.slow
@torch.no_grad()
def test_integer_padding_stays_dynamic_in_both_formats(tmp_path):
    """As in the tf_ models of timm, whose strided convolutions pad by the size of their input."""
    pytest.importorskip("onnxscript")
    same = nn.Sequential(Conv2dSame(3, 4, 5, 2), AvgPool2dSame(2, 2)).eval()
    plain = deepcopy(same)
    replace_sized_layers(plain)
    sizes = {0: Dim("batch", min=1), 2: Dim("height", min=33), 3: Dim("width", min=33)}
    program = torch.export.export(plain, (torch.rand(2, 3, 65, 97),), dynamic_shapes=(sizes,))
    torch.export.save(program, tmp_path / "m.pt2")
    torch.onnx.export(program, f=tmp_path / "m.onnx", dynamo=True, input_names=["image"], verbose=False)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for size in ((1, 3, 34, 35), (3, 3, 36, 37), (2, 3, 40, 33)):
        image = torch.rand(size)
        torch.testing.assert_close(loaded(image), same(image))
        torch.testing.assert_close(run_onnx(tmp_path / "m.onnx", image), same(image))


class Positions(nn.Module):
    """What a transformer with DINOv2's or DINOv3's positions computes from the size of its input."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 4 * 4, 3, generator=torch.Generator().manual_seed(0)))
        self.rope = RotaryEmbeddingDinoV3(dim=8)

    def forward(self, x_BCHW):
        size = x_BCHW.shape[2:]
        return dinov2_positions(self.pos_embed, *size), self.rope.get_embed(size)


@torch.no_grad()
def test_positions_are_exported_for_any_size_that_of_the_pretraining_included(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    plain, exported = Positions(), Positions()
    replace_sized_layers(exported)
    assert isinstance(exported.rope, RotaryPositions)
    size = {2: Dim("height", min=2), 3: Dim("width", min=2)}
    program = torch.export.export(exported, (torch.rand(1, 1, 5, 8),), dynamic_shapes=(size,))
    torch.onnx.export(program, f=tmp_path / "m.onnx", dynamo=True, input_names=["image"], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for height, width in ((4, 4), (4, 5), (7, 9), (2, 31)):
        image = torch.rand(1, 1, height, width)
        for found in (program.module()(image), map(torch.from_numpy, session.run(None, {"image": image.numpy()}))):
            for part, expected in zip(found, plain(image), strict=True):
                torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_model_is_copied_and_its_same_padding_replaced(checkpoint):
    segmentor = load(checkpoint, device="cpu").module.segmentor
    segmentor.encoder.model.layer1[0].conv1 = Conv2dSame(32, 32, 3, bias=False)
    kinds = [type(module) for module in segmentor.modules()]
    assert AvgPool2dSame in kinds
    exported = ExportedModel(segmentor, "logits")
    assert not {AvgPool2dSame, Conv2dSame} & {type(module) for module in exported.modules()}
    assert [type(module) for module in segmentor.modules()] == kinds
    image = random_image((2, 50, 61))
    torch.testing.assert_close(exported(image), segmentor(image))


def test_the_configuration_exports_beside_the_checkpoint(tmp_path):
    path = make_checkpoint(tmp_path / "best.ckpt")
    cfg = compose_config("export", f"checkpoint={path}", "format=safetensors")
    assert export(cfg).difference == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.ckpt", "best.json", "best.safetensors"]


@pytest.mark.slow
def test_the_command_prints_the_comparison(checkpoint, tmp_path):
    arguments = (f"checkpoint={checkpoint}", "format=safetensors", "output=out/model.safetensors")
    done = run_forked(*arguments, cwd=tmp_path, module="mlpmatch_pl.export")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first.startswith("out/model.safetensors: ")
    assert "1 x 33 x 33, 3 x 47 x 78" in second
    assert second.endswith("same class for 100.0000% of the pixels")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]


def test_help_comes_without_heavy_imports(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    done = run_command("--help", cwd=tmp_path, module="mlpmatch_pl.export", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert all(key in done.stdout for key in ExportOptions.__dataclass_fields__)


def test_a_hub_folder_has_the_weights_and_a_card_of_the_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    metrics = {
        "method": "mlpmatch", "seed": 3, "steps": 70, "unlabeled": 90, "tested": "best checkpoint",
        "evaluated_on": "test", "best": {"val/miou": 0.5},
        "test": {"test/miou": 0.375, "test/iou/road": 0.25}, "versions": {"torch": "9.9"},
    }  # fmt: skip
    (run / "predictions").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "config.yaml").write_text("dataset: {_target_: mlpmatch_pl.data.datasets.camvid.camvid}")
    parts = {"labeled": (4, "1/8", "a1b2"), "val": (101, "validation", "c3d4"), "test": (233, "test", "e5f6")}
    splits = {part: dict(zip(("count", "split", "sha256"), values, strict=True)) for part, values in parts.items()}
    (run / "splits.json").write_text(json.dumps(splits))
    for number in range(5):
        (run / "predictions" / f"{number}.png").write_bytes(b"picture")
    path = make_checkpoint(run / "checkpoints" / "best.ckpt")
    options = {"format": "hub", "output": tmp_path / "my.model", "license": "cc-by-4.0"}
    monkeypatch.chdir(path.parent)
    assert export_checkpoint(ExportOptions(Path(path.name), **options)).difference == 0
    names = {file.name for file in (tmp_path / "my.model").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "0.png", "1.png", "2.png"}
    card = (tmp_path / "my.model" / "README.md").read_text()
    for text in (
        "license: cc-by-4.0", "| dataset | camvid |", "| labeled images | 4 (1/8, sha256 a1b2) |", "| steps | 70 |",
        "| unlabeled images | 90 |", "| val/miou | 50.00 |", "| test/miou | 37.50 |", "| test/iou/road | 25.00 |",
        "](2.png)", "ground, road", "- `val`: 101 (validation, sha256 c3d4)\n- `test`: 233 (test, sha256 e5f6)\n",
    ):  # fmt: skip
        assert text in card
    with pytest.raises(UserError, match=r"my\.model"):
        export_checkpoint(ExportOptions(path, **options))
    (tmp_path / "my.model" / "old.png").touch()
    export_checkpoint(ExportOptions(path, **options, overwrite=True))
    assert {file.name for file in (tmp_path / "my.model").iterdir()} == names


def test_int8_is_compared_with_float32_on_the_images_of_the_run(onnx_file, make_folder, tmp_path, caplog):
    pytest.importorskip("onnxruntime")
    root = make_folder(count=6, masked=6)
    dataset = {"_target_": "mlpmatch_pl.data.datasets.folder.folder", "root": str(root), "classes": NAMES, "val": 0.5}
    (tmp_path / "config.yaml").write_text(json.dumps({"dataset": dataset}))
    checkpoint = shutil.copy(onnx_file.with_suffix(".ckpt"), tmp_path)
    file = Path(shutil.copy(onnx_file, tmp_path / "model.onnx"))
    with caplog.at_level("INFO"):
        plain, small = write_int8(file, load(checkpoint, device="cpu").module, Path(checkpoint), "float32")
    assert small.megabytes < plain.megabytes / 2
    data = folder(str(root), NAMES, val=0.5)
    for path, score in ((file, plain), (tmp_path / "model.int8.onnx", small)):
        counts = torch.zeros(3, 3, dtype=torch.long)
        for index in range(len(data.val)):
            image, mask = data.val.image(index), torch.from_numpy(data.val.mask(index).copy())
            label = run_onnx(path, torch.from_numpy(image).permute(2, 0, 1)[None].float()).argmax(1)[0]
            for truth, found in zip(mask.flatten().tolist(), label.flatten().tolist(), strict=True):
                if truth < 3:
                    counts[truth, found] += 1
        hit = counts.diag().double()
        assert score.miou == pytest.approx((hit / (counts.sum(0) + counts.sum(1) - hit)).nanmean().item())
        assert f"{path}: {score.megabytes:.1f} MB, mIoU {100 * score.miou:.2f} %" in caplog.text
