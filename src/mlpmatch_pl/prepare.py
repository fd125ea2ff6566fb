"""Download, convert and verify a benchmark dataset, or draw masks from what an annotation tool exports.

Rerun an interrupted command to continue. Cityscapes needs a registration; the command says how to get its archives.

Examples:
    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc
    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc splits=unimatch    # and the published lists
    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc archives=/usb      # offline
    python -m mlpmatch_pl.prepare dataset=cityscapes root=/data/cityscapes
    python -m mlpmatch_pl.prepare dataset=annotations root=my_photos annotations=export.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpmatch_pl.commands.cli import plain, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def prepare(cfg: DictConfig) -> None:
    """Prepare the dataset that a composed configuration names.

    Args:
        cfg: As composed from ``commands/prepare/prepare.yaml``.

    Raises:
        UserError: If the configuration is wrong, or a file is unavailable, damaged or missing at the end.
    """
    from mlpmatch_pl.commands.prepare.run import Options, prepare_dataset
    from mlpmatch_pl.utils.validation import read_options

    prepare_dataset(read_options(Options, plain(cfg)))


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    run_command("prepare", prepare, __doc__)


if __name__ == "__main__":
    main()
