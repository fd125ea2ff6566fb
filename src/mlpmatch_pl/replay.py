"""Repeat the training step at which a loss was not finite.

    python -m mlpmatch_pl.replay runs/mine/nonfinite/step_13

The folder, which the training wrote, holds the batch and the weights before the step; the data are not needed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import guarded

if TYPE_CHECKING:
    from mlpmatch_pl.callbacks.kept_step import KeptStep


def replay(folder: Path) -> dict[str, float]:
    """Repeat the step in a folder, print its terms beside those that were recorded, and return them.

    Args:
        folder: As `mlpmatch_pl.callbacks.finite_loss.FiniteLoss` wrote it.

    Raises:
        UserError: If the folder holds no step, or its files do not belong together.
    """
    from mlpmatch_pl.callbacks.kept_step import KeptStep

    step, module, report = KeptStep.load(folder)
    repeated, layer = step.repeat(module)
    print("\n".join([*_described(step, report), f"first layer whose output is not finite: {layer or 'none'}", ""]))
    print("\n".join([*_table(step.terms, repeated), _verdict(step, repeated)]))
    return repeated


def _described(step: "KeptStep", report: Mapping[str, Any]) -> list[str]:
    """Say what the step was, and what it is repeated on."""
    weights, here = report["weights_not_finite"], step.place.here()
    elsewhere = "" if here == step.place else f": there is no {step.device} here"
    return [
        f"step {report['step']} of epoch {report['epoch']}, {step.place}; repeated {here}{elsewhere}",
        *(f"{half}: {', '.join(names)}" for half, names in report["images"].items()),
        f"weights before the step: {'not finite in ' + ', '.join(weights) if weights else 'all finite'}",
    ]


def _table(recorded: Mapping[str, float], repeated: Mapping[str, float]) -> list[str]:
    rows = [f"{name:<6} {value:>13.7g} {repeated[name]:>13.7g}" for name, value in recorded.items()]
    return [f"{'term':<6} {'recorded':>13} {'repeated':>13}", *rows]


def _verdict(step: "KeptStep", repeated: Mapping[str, float]) -> str:
    from mlpmatch_pl.callbacks.kept_step import same

    if step.place.here() != step.place:
        return f"not compared to the last bit: {step.precision} on {step.device} rounds, and overflows, elsewhere"
    different = [name for name, value in step.terms.items() if not same(value, repeated[name])]
    if not different:
        return "all terms are the same, to the last bit"
    fewer = f" (with {step.threads_here} threads, not {step.threads})" if step.threads_here != step.threads else ""
    return f"different: {', '.join(different)}{fewer}"


def main() -> None:
    """Run the command; a folder without a step ends with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        "python -m mlpmatch_pl.replay", description="Repeat the training step at which a loss was not finite."
    )
    parser.add_argument("folder", metavar="FOLDER", help="as in runs/mine/nonfinite/step_13", type=Path)
    folder = parser.parse_args().folder
    with guarded("train"):
        replay(folder)


if __name__ == "__main__":
    main()
