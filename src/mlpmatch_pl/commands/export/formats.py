"""Export formats of a segmentor: how a file is written, and how it is run.

The smallest image is 33 x 33 pixels: at output stride 32 a smaller one has a single pixel of features, and torch.export
treats a size of 1 as constant. Pad smaller images by repeating their border, as
`mlpmatch_pl.evaluation.predict_logits` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from timm.layers import AvgPool2dSame, Conv2dSame, RotaryEmbeddingDinoV3
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mlpmatch_pl.evaluation.sliding_window import SMALLEST
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.segmentor import Segmentor

EXAMPLE = (2, 65, 97)  # batch, height, width; torch.export would treat a batch size of 1 as constant
Name = Literal["onnx", "torch_export", "safetensors", "hub"]
Returns = Literal["logits", "probabilities"]
InputDtype = Literal["float32", "uint8"]
DTYPES: dict[InputDtype, torch.dtype] = {"float32": torch.float32, "uint8": torch.uint8}
Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffixes: Suffix of the file, then of files written beside it; empty for a folder.
        packages: Packages needed beyond this package's dependencies.
        write: Writes a module and its config (see `mlpmatch_pl.commands.export.run.describe`) to a file.
        read: Returns a function that runs a written file.
    """

    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    write: Callable[[MLPMatch, dict[str, Any], Path], None]
    read: Callable[[Path], Model]


class ExportedModel(nn.Module):
    """The exported model: from images with values as stored to logits or probabilities at their size.

    Args:
        segmentor: The trained network; it is copied.
        returns: ``logits`` or ``probabilities``.

    Example:
        >>> model = ExportedModel(Segmentor(5, "test_resnet", decoder={"channels": 8}), "probabilities")
        >>> model(torch.zeros(1, 3, 33, 40, dtype=torch.uint8)).sum(dim=1).allclose(torch.ones(1, 33, 40))
        True
    """

    def __init__(self, segmentor: Segmentor, returns: str) -> None:
        super().__init__()
        self.segmentor = deepcopy(segmentor).eval()
        replace_sized_layers(self.segmentor)
        self.probabilities = returns == "probabilities"

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, num_classes, H, W), float32."""
        logits: Tensor = self.segmentor(image_BCHW)
        return logits.softmax(dim=1) if self.probabilities else logits


class SamePadding(nn.Module):
    """TensorFlow's "same" zero padding, as in timm, but in integer arithmetic: torch.export.save refuses `ceil`.

    Args:
        kernel_size: Kernel size of the convolution or pooling that follows.
        stride: Its stride.
        dilation: Its dilation.

    Example:
        >>> SamePadding((3, 3), (2, 2))(torch.zeros(1, 1, 6, 7)).shape
        torch.Size([1, 1, 7, 9])
    """

    def __init__(
        self, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.windows = [((k - 1) * d + 1, s) for k, s, d in zip(kernel_size, stride, dilation, strict=True)]

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Pad so that the output size is ``ceil(size / stride)``; an odd pixel is added at the end."""
        padding: list[Any] = []
        for size, (window, stride) in zip(x_BDHW.shape[2:], self.windows, strict=True):
            outputs = (size + stride - 1) // stride  # not -(-size // stride): ONNX rounds towards zero
            total = torch.sym_max((outputs - 1) * stride + window - size, 0)
            padding = [total // 2, total - total // 2, *padding]
        return F.pad(x_BDHW, padding)


class RotaryPositions(nn.Module):
    """DINOv3's rotary positions as in timm, but for a height and width that are no constants.

    Args:
        rope: timm's layer.
    """

    def __init__(self, rope: RotaryEmbeddingDinoV3) -> None:
        super().__init__()
        self.rope = rope

    def get_embed(self, shape: Sequence[int]) -> Tensor:
        """Return sines and cosines for patches in rows and columns, (height * width, 2 * dim)."""
        axes = [2 * (torch.arange(side) + 0.5) / side - 1 for side in shape]
        coordinates_N2 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        return torch.cat(self.rope._get_pos_embed_from_coords(coordinates_N2), dim=-1)


def replace_sized_layers(module: nn.Module) -> None:
    """Replace timm's layers that compute with sizes by `RotaryPositions` or a padded plain layer, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, RotaryEmbeddingDinoV3):
            setattr(module, name, RotaryPositions(child))
        elif isinstance(child, AvgPool2dSame):
            pool = nn.AvgPool2d(child.kernel_size, child.stride)
            setattr(module, name, nn.Sequential(SamePadding(child.kernel_size, child.stride), pool))
        elif isinstance(child, Conv2dSame):
            padding = SamePadding(child.kernel_size, child.stride, child.dilation)
            conv = nn.Conv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                child.stride,
                dilation=child.dilation,
                groups=child.groups,
                bias=child.bias is not None,
            )
            conv.load_state_dict(child.state_dict())
            setattr(module, name, nn.Sequential(padding, conv))
        else:
            replace_sized_layers(child)


def trace(segmentor: Segmentor, config: dict[str, Any]) -> ExportedProgram:
    """Trace a segmentor with dynamic batch size, height and width.

    Args:
        segmentor: The trained network.
        config: See `mlpmatch_pl.commands.export.run.describe`.
    """
    batch, *size = EXAMPLE
    example = torch.zeros(batch, config["segmentor"]["in_chans"], *size, dtype=DTYPES[config["input_dtype"]])
    program = torch.export.export(
        ExportedModel(segmentor, config["returns"]),
        (example,),
        dynamic_shapes={"image_BCHW": _dynamic_sizes()},
        # Pooling in ceil mode (ResNet-D) needs inequalities that hold for every size, which torch.export cannot prove.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # otherwise the file contains paths of this machine
    _remove_assertions(program)
    return program


def _remove_assertions(program: ExportedProgram) -> None:
    """Remove torch.export's assertions, in place: guesses from the example, such as that padding adds pixels.

    The operations hold for every size, which `mlpmatch_pl.commands.export.run.compare` verifies.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _dynamic_sizes() -> dict[int, Any]:
    return {0: Dim("batch", min=1), 2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}


def _write_onnx(module: MLPMatch, config: dict[str, Any], file: Path) -> None:
    import onnx

    program = torch.onnx.export(
        trace(module.segmentor, config),
        dynamo=True,
        dynamic_shapes={"image_BCHW": _dynamic_sizes()},  # names the dimensions
        input_names=["image"],
        output_names=[config["returns"]],
        verbose=False,
    )
    assert program is not None  # never with dynamo=True
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")  # stack traces of the exporter
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in config.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def _read_onnx(file: Path) -> Model:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    return lambda image_BCHW: torch.from_numpy(session.run(None, {"image": image_BCHW.numpy()})[0])


def _write_program(module: MLPMatch, config: dict[str, Any], file: Path) -> None:
    torch.export.save(trace(module.segmentor, config), file, extra_files={"config.json": json.dumps(config)})


def _read_program(file: Path) -> Model:
    return torch.export.load(file).module()


def _write_weights(module: MLPMatch, config: dict[str, Any], file: Path) -> None:
    state = {name: value.contiguous() for name, value in module.segmentor.state_dict().items()}
    file.write_bytes(
        save(state, metadata={"config": json.dumps(config)})
    )  # save_file makes it readable for the owner only
    file.with_suffix(".json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_weights(file: Path) -> Model:
    config = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    segmentor = Segmentor(**config["segmentor"]).eval()
    segmentor.load_state_dict(load_file(file))
    return segmentor


def _write_folder(module: MLPMatch, config: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    card = dict(config["card"])
    for picture in (pictures := card.pop("pictures", [])):
        (folder / picture.name).write_bytes(picture.read_bytes())
    module.save_pretrained(folder, model_card_kwargs={**card, "pictures": [picture.name for picture in pictures]})


def _read_folder(folder: Path) -> Model:
    return MLPMatch.from_pretrained(folder).segmentor


FORMATS: dict[Name, Format] = {
    "onnx": Format((".onnx",), ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "torch_export": Format((".pt2",), (), _write_program, _read_program),
    "safetensors": Format((".safetensors", ".json"), (), _write_weights, _read_weights),
    "hub": Format(("",), (), _write_folder, _read_folder),
}
