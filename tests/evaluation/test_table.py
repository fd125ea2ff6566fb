import torch

from mlpmatch_pl.evaluation import Scores
from mlpmatch_pl.evaluation.table import metrics_table

COUNTS = torch.tensor([[3, 1, 0], [0, 6, 0], [0, 0, 0]])


def row(table, name):
    return next(line for line in table.splitlines() if name in line)


def test_the_table_names_absent_classes_and_means():
    table = metrics_table(COUNTS, ["road", "sky", "moon"], "exclude", "title")
    assert "absent" in row(table, "moon")
    assert f"{100 * Scores.of(COUNTS).miou:.2f}" in row(table, "mean")
    assert "87.50" in row(table, "mean")  # recall of 3/4 and 1


def test_boundary_iou_is_an_extra_column_with_its_mean():
    boundary_C = torch.tensor([0.25, 0.5, torch.nan])
    table = metrics_table(COUNTS, ["road", "sky", "moon"], "zero", "title", boundary_C)
    assert "25.00 │" in row(table, "road")
    assert row(table, "mean").endswith("25.00 │")  # zero for the absent class
