"""Load weights: pretrained encoders, and the checkpoints published for UniMatch and MLPMatch.

Files are not trusted: only tensors and plain values are unpickled.
"""

import logging
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from mlpmatch_pl.utils.checkpoint import refuse_inflated
from mlpmatch_pl.utils.errors import UserError

log = logging.getLogger(__name__)

# Names in the published state dicts -> names here. Names within the encoder are timm's for UniMatch and MLPMatch, and
# DINOv2's for UniMatch V2, which `_convert` translates.
PUBLISHED_NAMES = (
    (r"^module\.", ""),
    (r"^backbone\.", "encoder.model."),
    (r"^head\.b([0-3])\.", r"decoder.aspp.branches.\1."),
    (r"^head\.b4\.gap\.1\.", "decoder.aspp.pooling.0."),
    (r"^head\.b4\.gap\.2\.", "decoder.aspp.pooling.1."),
    (r"^head\.project\.", "decoder.aspp.project."),
    (r"^(reduce|fuse|classifier)\.", r"decoder.\1."),
    (r"^head\.projects\.", "decoder.project."),
    (r"^head\.resize_layers\.", "decoder.resize."),
    (r"^head\.scratch\.output_conv\.0\.", "decoder.smooth."),
    (r"^head\.scratch\.output_conv\.2\.", "decoder.classifier."),
    *((rf"^head\.scratch\.layer{level + 1}_rn\.", f"decoder.reduce.{level}.") for level in range(4)),
    *((rf"^head\.scratch\.refinenet{level + 1}\.", f"decoder.fuse.{level}.") for level in range(4)),
    (r"(?<=\.)resConfUnit1\.", "lateral."),
    (r"(?<=\.)resConfUnit2\.", "refine."),
    (r"(?<=\.)out_conv\.", "out."),
)
# In such files beside the segmentor: classifiers of the encoder, and the teacher of a training checkpoint.
PUBLISHED_BESIDE = ("encoder.model.fc.", "encoder.model.head.", "encoder.model.classifier.", "teacher.")
# Published checkpoints hold the best score as a numpy scalar, from numpy 1 or 2.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    _scalar,
    np.dtype,
    np.dtypes.Float64DType,
]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` or torch file, without executing code from it.

    Also finds it under the keys ``model``, ``state_dict`` and ``ema``.

    Raises:
        UserError: If the file does not exist or is not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"expected a file with weights, but {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        refuse_inflated(path)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise nearly anything for a corrupt file
        raise UserError(
            f"expected a state dict of tensors in {path}, but it cannot be read ({type(error).__name__}); the file is "
            "corrupt, or holds objects other than tensors and plain values"
        ) from error
    for key in ("model", "state_dict", "ema"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"expected a state dict of tensors in {path}, but found {type(content).__name__}")
    return dict(content)


def load_pretrained(
    model: nn.Module, backbone: str, pretrained: bool | str, in_chans: int, skip: tuple[str, ...]
) -> None:
    """Load the weights of a timm model, from timm or from a local file, and log a report.

    Args:
        model: The timm model.
        backbone: Its name.
        pretrained: True for timm's weights; ``auto`` for these, or a note and random weights if they cannot be had; or
            the path of a local file.
        in_chans: Number of image channels, to which the first convolution is adapted.
        skip: Modules of the model that the encoder does not use.

    Raises:
        UserError: If the weights cannot be downloaded or read, or are of another architecture.
    """
    local = isinstance(pretrained, str) and pretrained != "auto"
    source = str(pretrained) if local else f"timm {backbone}"
    try:
        state = read_state_dict(source) if local else _download(backbone, in_chans)
    except UserError as error:
        if pretrained != "auto":
            raise
        log.warning("note: %s; the training starts from random weights, which needs many more images", error)
        return
    state = _convert(state, model)
    first = next(name for name, parameter in model.named_parameters() if parameter.dim() == 4)
    if first in state and state[first].shape[1] != in_chans:
        state[first] = adapt_input_conv(in_chans, state[first])
    state = {name: value for name, value in state.items() if not name.startswith(skip)}
    expected = {name for name in model.state_dict() if not name.startswith(skip)}
    load_reported(model, state, expected, source)


def load_published(segmentor: nn.Module, path: str | Path) -> None:
    """Load a ``.pth`` file of UniMatch, UniMatch V2 or MLPMatch, or a state dict of a `Segmentor`, into a segmentor.

    A training checkpoint gives the student. A classifier for another number of classes is not loaded, which is logged.

    Raises:
        UserError: If the file does not exist or is of another architecture.
    """
    state = {}
    for name, value in read_state_dict(path).items():
        for pattern, replacement in PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        state[name.removeprefix("segmentor.")] = value
    prefix = "encoder.model."
    state = {name: value for name, value in state.items() if not name.startswith(PUBLISHED_BESIDE)}
    encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if not name.startswith(prefix)}
    state |= {prefix + name: value for name, value in _convert(encoder, segmentor.get_submodule(prefix[:-1])).items()}
    load_reported(segmentor, state, set(segmentor.state_dict()), str(path), optional=("decoder.classifier",))


def load_reported(
    model: nn.Module, state: Mapping[str, Tensor], expected: set[str], source: str, optional: tuple[str, ...] = ()
) -> None:
    """Load a state dict into a model and log the number of loaded tensors and the names that do not fit.

    Args:
        model: The model.
        state: The state dict.
        expected: Names that the state dict should have.
        source: Where it comes from, for messages.
        optional: Prefixes of names that may be missing or of another shape.

    Raises:
        UserError: If other names are missing or of another shape, or there are more; the model is not modified.
    """
    own = model.state_dict()
    misfits = {
        # Files of old torch versions lack these counters.
        "missing": sorted(name for name in expected - set(state) if not name.endswith("num_batches_tracked")),
        "of another shape": sorted(name for name in expected & set(state) if own[name].shape != state[name].shape),
        "unexpected": sorted(set(state) - expected),
    }
    loaded = {name: state[name] for name in expected & set(state) if name not in misfits["of another shape"]}
    log.info("weights from %s: loaded %d of %d tensors", source, len(loaded), len(expected))
    for problem, names in misfits.items():
        log.info("  %s: %s", problem, ", ".join(names) or "none")
    refused = {
        problem: [name for name in names if not (optional and name.startswith(optional))]
        for problem, names in misfits.items()
    }
    if found := [f"{problem} ({len(names)}, such as {names[0]})" for problem, names in refused.items() if names]:
        raise UserError(
            f"expected weights of the configured architecture, but tensors in {source} are {' and '.join(found)}; "
            "check backbone.name" + (", or remove the unexpected ones from the file" if refused["unexpected"] else "")
        )
    model.load_state_dict({**own, **loaded})


def _convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translate the names in an original state dict, such as Meta's of DINOv2 and DINOv3, to those of timm."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(convert(state, model)) if convert and state else state
    except Exception:  # not a state dict of this family: the report says what is missing
        return state


def _download(backbone: str, in_chans: int) -> dict[str, Tensor]:
    import requests
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import ENDPOINT

    try:
        hub_id = timm.get_pretrained_cfg(backbone).hf_hub_id
        cached = hub_id and try_to_load_from_cache(hub_id, "model.safetensors")
        if not isinstance(cached, str):
            with suppress(requests.exceptions.SSLError):  # the hub may know other certificates
                requests.head(ENDPOINT, timeout=10)  # fails at once without a connection: the hub tries for 50 seconds
        overlay = {"pretrained_cfg_overlay": {"file": cached}} if isinstance(cached, str) else {}
        model = timm.create_model(backbone, pretrained=True, in_chans=in_chans, **overlay)
        state: dict[str, Tensor] = model.state_dict()
        return state
    except Exception as error:
        reason = f"no connection to {ENDPOINT}" if isinstance(error, requests.ConnectionError) else type(error).__name__
        raise UserError(
            f"could not download timm's weights of {backbone} ({reason}); set backbone.pretrained to a local file "
            "(backbone.pretrained=weights.pth) or to false"
        ) from error
