"""Tables in the terminal."""

import sys

from rich.console import Console
from rich.table import Table as RichTable

from mlpmatch_pl.commands.report.tables import Table

_FEW = 8  # columns of numbers that are always shown


def show(table: Table) -> None:
    """Print a table, or say where it is, if many columns (of classes) are too wide; pipes take 200 characters.

    Args:
        table: The table.
    """
    rich = RichTable(title=table.title, title_justify="left")
    first_number = len(table.columns) - table.numbers
    for index, column in enumerate(table.columns):
        rich.add_column(column, justify="right" if index >= first_number else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    if (
        table.numbers > _FEW
        and console.measure(rich, options=console.options.update(width=10_000)).maximum > console.width
    ):
        console.print(f"{table.title}: too wide for here, see report.html or summary.md")
    else:
        console.print(rich)
