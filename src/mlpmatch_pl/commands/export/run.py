"""Export a checkpoint, and compare the file with the checkpoint before it gets its final name."""

from __future__ import annotations

import json
import logging
import os
import shutil
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import mlpmatch_pl
from mlpmatch_pl.commands.evaluate.dataset import run_folder_of
from mlpmatch_pl.commands.export.formats import DTYPES, FORMATS, InputDtype, Model, Name, Returns
from mlpmatch_pl.commands.export.int8 import int8_path, write_int8
from mlpmatch_pl.evaluation.sliding_window import SMALLEST
from mlpmatch_pl.predictor import Predictor, Weights, load
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_OUTPUT, refuse_overwrite

log = logging.getLogger(__name__)

PARITY = (
    (1, SMALLEST, SMALLEST),
    (3, 47, 78),
    (1, 128, 50),
    (2, 161, 131),
    (1, 112, 224),
)  # batch, height, width; other sizes than the traced example; the last is not padded to patches of 14 or 16 pixels
TOLERANCE = 1e-4  # relative to the largest output, or to 1; float32 sums in another order differ by about 1e-6
CARD_PICTURES = 3
ROUNDING = 4  # a difference up to this multiple of the checkpoint's own rounding error is accepted as well
ARGUMENTS = ("num_classes", "backbone", "in_chans", "output_stride", "decoder", "pos_embed", "mean", "std")


@dataclass(frozen=True)
class ExportOptions:
    """The configuration of ``python -m mlpmatch_pl.export``.

    Attributes:
        checkpoint: Checkpoint of a training run.
        format: ``onnx``, ``torch_export``, ``safetensors`` or ``hub``, a folder for the Hugging Face Hub.
        output: File or folder to write; None for the checkpoint's path with the suffix of the format.
        returns: ``logits`` or ``probabilities``; ``logits`` for safetensors and hub, which contain weights only.
        input_dtype: ``float32`` or ``uint8``: dtype of the images, with values as stored.
        overwrite: Whether existing files are replaced.
        weights: ``teacher`` or ``student``; None for the teacher if there is one.
        int8: Whether ``onnx`` also writes an 8-bit file and compares both on the run's own images.
        license: License of the weights in the model card of ``hub``, as the Hub names licenses.

    Raises:
        UserError: If the options contradict each other.

    Example:
        >>> ExportOptions(Path("run/best.ckpt"), "onnx").path.as_posix()
        'run/best.onnx'
        >>> ExportOptions(Path("run/best.ckpt"), "onnx", output=Path("model.pt2"))
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected an output with the suffix .onnx for format=onnx, but got ...
    """

    checkpoint: Path
    format: Name = "onnx"
    output: Path | None = None
    returns: Returns = "logits"
    input_dtype: InputDtype = "float32"
    overwrite: bool = False
    weights: Weights | None = None
    int8: bool = False
    license: str | None = None

    def __post_init__(self) -> None:
        suffix = FORMATS[self.format].suffixes[0]
        if suffix and self.path.suffix != suffix:
            raise UserError(
                f"expected an output with the suffix {suffix} for format={self.format}, but got {self.path}; "
                "change output or format"
            )
        if self.license is not None and self.format != "hub":
            raise UserError(f"expected format=hub with license={self.license}, but got {self.format}; omit license")
        if self.int8 and self.format != "onnx":
            raise UserError(f"expected format=onnx with int8=true, but got {self.format}; omit int8")
        if self.format in ("safetensors", "hub") and self.returns != "logits":
            raise UserError(
                f"expected returns=logits for format={self.format}, which contains weights only, but got "
                f"{self.returns}; omit it, or choose another format"
            )

    @property
    def path(self) -> Path:
        """The file to write."""
        return self.output or self.checkpoint.with_suffix(FORMATS[self.format].suffixes[0])


class Parity(NamedTuple):
    """Comparison of an exported file with its checkpoint, over several image and batch sizes.

    Attributes:
        difference: Largest absolute difference of the outputs.
        rounding: Largest absolute difference between the checkpoint's outputs in float32 and in float64.
        largest: Largest absolute output of the checkpoint.
        equal_classes: Share of pixels with the same class, 0..1.
    """

    difference: float
    rounding: float
    largest: float
    equal_classes: float


def export_checkpoint(options: ExportOptions) -> Parity:
    """Write a checkpoint in another format, compare the file with it, and log the comparison.

    Returns:
        The comparison.

    Raises:
        UserError: If a package is missing, a file exists already, the checkpoint cannot be read, or the file differs
            from the checkpoint; nothing is left behind.
    """
    form, path = FORMATS[options.format], options.path
    if missing := [package for package in form.packages if find_spec(package) is None]:
        raise UserError(
            f"expected {', '.join(missing)} to be installed for format={options.format}; run: "
            "pip install 'mlpmatch_pl[export]'"
        )
    if not options.overwrite:
        written = [path.with_suffix(suffix) if suffix else path for suffix in form.suffixes]
        refuse_overwrite(written + [int8_path(path)] * options.int8, OTHER_OUTPUT)
    predictor = load(options.checkpoint, device="cpu", weights=options.weights)
    # Channels-last weights would be traced as copies between memory formats.
    segmentor = predictor.module.segmentor.to(memory_format=torch.contiguous_format)
    config = describe(predictor, options)
    if options.format == "hub":
        config["card"] = {**run_facts(options.checkpoint), "license": options.license}
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        form.write(predictor.module, config, unfinished)
        parity = compare(segmentor, form.read(unfinished), config)
        if not parity.difference <= max(TOLERANCE * max(parity.largest, 1.0), ROUNDING * parity.rounding):
            raise UserError(
                f"expected a file with the {options.returns} of {options.checkpoint}, but in {options.format} they "
                f"differ by up to {parity.difference:.2g} (the largest is {parity.largest:.3g}), so nothing was kept; "
                "try another format or another version of PyTorch"
            )
        for file in Path(folder).iterdir():
            if file.is_dir() and (path.parent / file.name).is_dir():
                shutil.rmtree(path.parent / file.name)  # a folder replaces none that has files
            os.replace(file, path.parent / file.name)
    sizes = ", ".join(" x ".join(map(str, size)) for size in PARITY)
    size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]))
    log.info("%s: %.1f MB, from %s", path, size / 1e6, options.checkpoint)
    log.info(
        "compared with the checkpoint on images (batch x height x width) of %s: %s differ by at most %.1e (the "
        "largest is %.3g; the checkpoint's own differ from float64 by %.1e), same class for %.4f%% of the pixels",
        sizes, options.returns, parity.difference, parity.largest, parity.rounding, 100 * parity.equal_classes,
    )  # fmt: skip
    if options.int8:
        write_int8(path, predictor.module, options.checkpoint, options.input_dtype)
    return parity


def describe(predictor: Predictor, options: ExportOptions) -> dict[str, Any]:
    """Return the metadata stored in a file, as plain data.

    Returns:
        The arguments of `Segmentor` (including mean, std and in_chans), class_names, palette, bit_depth and other
        options of the reader of the training images, the file's input and output, and the version of this package.

    Raises:
        UserError: If the training images do not fit into the input dtype.
    """
    if predictor.bit_depth > 8 and options.input_dtype == "uint8":
        raise UserError(
            f"expected input_dtype=float32 for {options.checkpoint}, which was trained on {predictor.bit_depth}-bit "
            "images, but got uint8; omit it"
        )
    return {
        "segmentor": {key: _plain(predictor.module.hparams[key]) for key in ARGUMENTS},
        "class_names": list(predictor.class_names),
        "palette": _plain(predictor.colors),
        "bit_depth": predictor.bit_depth,
        "image_options": predictor.read_image.options,
        "input_dtype": options.input_dtype,
        "smallest_size": SMALLEST,
        "returns": options.returns,
        "mlpmatch_pl": mlpmatch_pl.__version__,
    }


def run_facts(checkpoint: Path) -> dict[str, Any]:
    """Return what a run folder says for a model card, see `mlpmatch_pl.utils.hub.HubMixin.generate_model_card`.

    Returns:
        Nothing for a checkpoint outside of the folder of a finished run.
    """
    run = run_folder_of(checkpoint)
    if run is None or not (run / "metrics.json").is_file():
        return {}
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    splits = json.loads((run / "splits.json").read_text(encoding="utf-8"))
    images = {part: "{count} ({split}, sha256 {sha256})".format(**split) for part, split in splits.items()}
    best = {} if metrics["best"]["val/miou"] is None else {"val/miou": metrics["best"]["val/miou"]}
    tested = metrics["test"] if metrics["evaluated_on"] == "test" else {}
    return {
        "data": str(config["dataset"]["_target_"]).rpartition(".")[2],
        "split": images["labeled"],
        "unlabeled": metrics["unlabeled"],
        "scores": best | tested,
        "splits": {part: images[part] for part, scores in (("val", best), ("test", tested)) if scores},
        "run": {
            "method": f"`{metrics['method']}`",
            "steps": metrics["steps"],
            "seed": metrics["seed"],
            "weights": metrics["tested"],
            "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        },
        "pictures": sorted((run / "predictions").glob("*.png"))[:CARD_PICTURES],
    }


@torch.no_grad()
def compare(segmentor: Segmentor, exported: Model, config: dict[str, Any]) -> Parity:
    """Compare a file with its checkpoint on random images of sizes that were not traced.

    Args:
        segmentor: The checkpoint's network, in eval mode.
        exported: Runs the file.
        config: See `describe`.
    """
    precise = deepcopy(segmentor).double()
    probabilities = config["returns"] == "probabilities"
    difference, rounding, largest, equal, pixels = 0.0, 0.0, 0.0, 0, 0
    for seed, size in enumerate(PARITY):
        image_BCHW = _random_image(size, seed, config)
        expected_BCHW, precise_BCHW = segmentor(image_BCHW), precise(image_BCHW)
        if probabilities:
            expected_BCHW, precise_BCHW = expected_BCHW.softmax(dim=1), precise_BCHW.softmax(dim=1)
        rounding = max(rounding, float((expected_BCHW - precise_BCHW).abs().max()))
        largest = max(largest, float(expected_BCHW.abs().max()))
        found_BCHW = exported(image_BCHW)
        if found_BCHW.shape != expected_BCHW.shape or not found_BCHW.isfinite().all():
            return Parity(float("inf"), rounding, largest, 0.0)
        difference = max(difference, float((found_BCHW - expected_BCHW).abs().max()))
        equal += int((found_BCHW.argmax(dim=1) == expected_BCHW.argmax(dim=1)).sum())
        pixels += expected_BCHW[:, 0].numel()
    return Parity(difference, rounding, largest, equal / pixels)


def _random_image(size: tuple[int, int, int], seed: int, config: dict[str, Any]) -> Tensor:
    """Draw blobs with noise over the whole value range; noise alone would average out to one class."""
    rng = torch.Generator().manual_seed(seed)
    (batch, height, width), channels = size, config["segmentor"]["in_chans"]
    blobs = torch.rand(batch, channels, height // 16 + 1, width // 16 + 1, generator=rng)
    noise = torch.rand(batch, channels, height, width, generator=rng)
    image_BCHW = 0.8 * F.interpolate(blobs, size=(height, width), mode="bilinear") + 0.2 * noise
    highest = 2 ** config["bit_depth"] - 1
    stored_BCHW: Tensor = (image_BCHW * highest).round().to(DTYPES[config["input_dtype"]])
    return stored_BCHW


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
