"""The table of scores printed at the end of a run."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import Tensor

from mlpmatch_pl.evaluation import Scores
from mlpmatch_pl.evaluation.confusion import Absent, class_mean


def metrics_table(
    counts_CC: Tensor, class_names: Sequence[str], absent: Absent, title: str, boundary_C: Tensor | None = None
) -> str:
    """Format IoU, Dice, recall and share of the pixels for each class, and their means.

    Args:
        counts_CC: Confusion matrix, (C, C).
        class_names: Names of the classes.
        absent: ``exclude`` or ``zero``, see `mlpmatch_pl.evaluation.Scores`.
        title: Title of the table.
        boundary_C: Boundary IoU of each class, (C,), as an extra column.

    Example:
        >>> import torch
        >>> print(metrics_table(torch.tensor([[3, 1], [0, 4]]), ["a", "b"], "exclude", "t").splitlines()[4])
        │ a     │ 75.00 │  85.71 │    75.00 │     50.0 │
    """
    scores = Scores.of(counts_CC, absent)
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for column in ("IoU %", "Dice %", "recall %", "pixels %"):
        table.add_column(column, justify="right")
    share_C = scores.support_C / scores.support_C.sum().clamp_min(1)
    rows = zip(class_names, scores.iou_C, scores.dice_C, scores.recall_C, share_C, strict=True)
    cells = [
        [name, _percent(iou), _percent(dice), _percent(recall), f"{100 * float(share):.1f}"]
        for name, iou, dice, recall, share in rows
    ]
    means = ["mean", *map(_percent, (scores.miou, scores.dice, class_mean(scores.recall_C, absent))), ""]
    if boundary_C is not None:
        table.add_column("boundary IoU %", justify="right")
        for row, boundary in zip([*cells, means], [*boundary_C, class_mean(boundary_C, absent)], strict=True):
            row.append(_percent(boundary))
    for row in cells:
        table.add_row(*row)
    table.add_section()
    table.add_row(*means)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _percent(value: Tensor | float) -> str:
    number = float(value)
    return f"{100 * number:.2f}" if number == number else "absent"
