"""Export a checkpoint as ONNX, torch.export program, or plain weights.

    python -m mlpmatch_pl.export checkpoint=runs/.../checkpoints/best.ckpt                      # best.onnx beside it
    python -m mlpmatch_pl.export checkpoint=best.ckpt format=torch_export output=model.pt2 returns=probabilities
    python -m mlpmatch_pl.export checkpoint=best.ckpt format=safetensors output=weights.safetensors

The exported model includes normalization and upsampling: it takes images with values as stored, and its output has
their size. The file is compared with the checkpoint before it gets its final name.
"""

import sys
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.commands.cli import guarded_job, literal_paths, run_command

if TYPE_CHECKING:
    from mlpmatch_pl.commands.export.run import Parity


def export(cfg: DictConfig) -> "Parity":
    """Export with a composed configuration.

    Args:
        cfg: As composed from ``conf/export.yaml``.

    Returns:
        How the file compares with the checkpoint.

    Raises:
        UserError: If the configuration is wrong, a package is missing, the checkpoint cannot be read, a file exists
            already, or the file differs from the checkpoint.
    """
    from mlpmatch_pl.commands.export.run import ExportOptions, export_checkpoint
    from mlpmatch_pl.utils.validation import read_options

    return export_checkpoint(
        read_options(ExportOptions, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    )


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.conf", config_name="export")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    with guarded_job("export"):
        export(cfg)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    sys.argv[1:] = literal_paths(sys.argv[1:])
    run_command("export", _hydra_main)


if __name__ == "__main__":
    main()
