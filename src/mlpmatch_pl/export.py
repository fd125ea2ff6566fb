"""Export a checkpoint to ONNX, torch.export, safetensors or a Hub folder, and compare the file with the checkpoint.

Normalization and upsampling are part of the exported network: images go in as stored, and results have their size.
Batch, height and width are dynamic, from 1 x 33 x 33.

Examples:
    python -m mlpmatch_pl.export checkpoint=runs/x/checkpoints/best.ckpt                # best.onnx beside it
    python -m mlpmatch_pl.export checkpoint=best.ckpt format=torch_export output=model.pt2 returns=probabilities
    python -m mlpmatch_pl.export checkpoint=best.ckpt format=safetensors output=weights.safetensors
    python -m mlpmatch_pl.export checkpoint=runs/x/checkpoints/best.ckpt format=hub output=model license=cc-by-nc-4.0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpmatch_pl.commands.cli import plain, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mlpmatch_pl.commands.export.run import Parity


def export(cfg: DictConfig) -> Parity:
    """Export the checkpoint that a composed configuration names.

    Args:
        cfg: As composed from ``conf/export.yaml``.

    Returns:
        How the file compares with the checkpoint.

    Raises:
        UserError: If the configuration is wrong, a package is missing, the checkpoint cannot be read, a file exists, or
            the exported network differs from the checkpoint.
    """
    from mlpmatch_pl.commands.export.run import ExportOptions, export_checkpoint
    from mlpmatch_pl.utils.validation import read_options

    return export_checkpoint(read_options(ExportOptions, plain(cfg)))


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    run_command("export", export, __doc__)


if __name__ == "__main__":
    main()
