"""Predict the class of each pixel of image files with a trained network.

    python -m mlpmatch_pl.predict checkpoint=runs/x/checkpoints/best.ckpt input=photos output=predictions
    python -m mlpmatch_pl.predict checkpoint=best.ckpt input='photos/**/*.jpg' output=masks save=index
    python -m mlpmatch_pl.predict checkpoint=best.ckpt input=a.jpg output=p inference.mode=slide inference.window=513

In Python: ``mlpmatch_pl.load("best.ckpt").predict("a.jpg")``. Heavy imports are inside `predict`, so that ``--help``
and ``--cfg job`` are fast.
"""

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.commands.cli import guarded_job, literal_paths, run_command


def predict(cfg: DictConfig) -> None:
    """Predict with a composed configuration.

    Args:
        cfg: As composed from ``conf/predict.yaml``.

    Raises:
        UserError: If the configuration is wrong, before anything is written, or at the end if images were skipped.
    """
    from mlpmatch_pl.commands.predict.run import PredictOptions, run
    from mlpmatch_pl.utils.validation import read_options

    run(read_options(PredictOptions, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.conf", config_name="predict")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    with guarded_job("predict"):
        try:
            predict(cfg)
        except KeyboardInterrupt:
            print("interrupted; finished predictions are kept", file=sys.stderr)
            sys.exit(130)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1, an interruption with 130."""
    sys.argv[1:] = literal_paths(sys.argv[1:])
    run_command("predict", _hydra_main)


if __name__ == "__main__":
    main()
