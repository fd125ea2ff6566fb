"""A module out of a checkpoint that may come from anywhere: nothing in it is trusted.

`torch.load` with ``weights_only=True`` keeps code out. Here the arguments are checked as well: their types, that they
name no other file, and that the network which they describe is the one whose weights are in the file, before any
memory is allocated for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlpmatch_pl.annotations import fit, parameters
from mlpmatch_pl.checkpoint_files import read_checkpoint
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.module import MLPMatch

_CLASSIFIER = "segmentor.decoder.classifier.weight"


def restore(path: Path) -> MLPMatch:
    """Build the module that a checkpoint describes, with its weights, on the CPU.

    Raises:
        UserError: If the file is broken or no checkpoint of a training, or its arguments and its weights do not fit.
    """
    content = read_checkpoint(path)
    try:
        arguments, state = _arguments(content["hyper_parameters"]), dict(content["state_dict"])
        if len(state[_CLASSIFIER]) != arguments["num_classes"]:
            raise UserError(f"it has weights for {len(state[_CLASSIFIER])} classes")
        with torch.device("meta"):  # shapes without memory
            outline = MLPMatch(**arguments).state_dict()
        _require_fit(state, outline)
        module = MLPMatch(**arguments)
        module.load_state_dict(state)
    except Exception as error:  # values that nobody expects make the constructors raise nearly anything
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(
            f"expected a checkpoint whose arguments and weights fit together, but those of {path} do not ({reason}); "
            "name a file that mlpmatch_pl.train has written"
        ) from error
    return module


def _arguments(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the module's arguments; no other file is read, and nothing downloaded, whatever is asked for."""
    types, _ = parameters(MLPMatch)
    known = {key: value for key, value in hparams.items() if key in types and key != "pretrained"}
    return {key: fit(key, value, types[key]) for key, value in known.items()}


def _require_fit(state: Mapping[str, Tensor], outline: Mapping[str, Tensor]) -> None:
    if different := sorted(state.keys() ^ outline.keys()):
        raise UserError(f"{different[0]} is only in one of the two, of {len(different)} such tensors")
    for name, tensor in outline.items():
        if state[name].shape != tensor.shape:
            raise UserError(f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
