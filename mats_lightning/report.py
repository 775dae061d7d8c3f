"""Results of merge methods on many tasks: tables.

A score is the task's primary metric, higher being better. The row whose method is "individual"
holds the scores of the models before merging, each on its own task; the others are related to it.
Every file is written under a temporary name and renamed, so a kill leaves the old one or the new.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from mats_lightning.files import write_text

INDIVIDUAL = "individual"


@dataclass(frozen=True)
class Row:
    """One method's results: its settings in words, and {task: score}."""

    method: str
    settings: str
    scores: dict[str, float]


def average(row: Row) -> float:
    """Mean of the row's scores. Raises ValueError for a row without scores."""
    if not row.scores:
        raise ValueError(f"row {row.method!r} has no scores: expected one a task")
    return sum(row.scores.values()) / len(row.scores)


def relative(scores: Mapping[str, float], individual: Mapping[str, float]) -> float:
    """Mean over tasks of score / individual score: 1 where merging costs nothing.

    Raises ValueError as `quotients` does.
    """
    found = quotients(scores, individual)
    return sum(found.values()) / len(found)


def quotients(scores: Mapping[str, float], individual: Mapping[str, float]) -> dict[str, float]:
    """task -> score / individual score.

    Raises ValueError for no tasks, unequal ones, and an individual score of zero.
    """
    if scores.keys() != individual.keys() or not scores:
        raise ValueError(
            f"these scores are of unequal tasks, or of none: {sorted(scores)} and"
            f" {sorted(individual)}. Evaluate both on the same tasks"
        )
    if zero := [task for task, score in individual.items() if score == 0]:
        raise ValueError(
            f"the individual score is 0 on {', '.join(zero)}, so no score is relative to it. Leave "
            "the task out, or take a metric that is above 0"
        )
    return {task: scores[task] / score for task, score in individual.items()}


def print_table(rows: Sequence[Row], title: str, console: Console | None = None) -> None:
    """Print method, settings, a score a task and their average, a line a row.

    Where one row is "individual", a last column has the average relative to it. A table wider
    than the console is printed in longer lines; nothing is cut. Raises ValueError for no rows,
    rows of unequal tasks or without scores, two rows "individual", or a score of 0 in it.
    """
    header, *lines = _cells(rows, digits=3)
    console = console or Console()
    table = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="left" if number < 2 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    wide = console.options.update(max_width=10_000)
    table.width = Measurement.get(console, wide, table).maximum
    console.print(table, soft_wrap=True)


def write_markdown(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write the table of `print_table` as GitHub's Markdown. Raises as that does."""
    header, *lines = _cells(rows, digits=3)
    rule = [":--", ":--"] + ["--:"] * (len(header) - 2)
    text = "".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n"
        for line in [header, rule, *lines]
    )
    write_text(Path(path), text)


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write the table of `print_table` as CSV, with all digits. Raises as that does."""
    text = io.StringIO()
    csv.writer(text).writerows(_cells(rows, digits=None))
    write_text(Path(path), text.getvalue(), newline="")


def individual_row(rows: Sequence[Row]) -> Row | None:
    """The row of reference, after the checks that every table and figure needs."""
    if not rows:
        raise ValueError("no rows to report: expected one a method")
    for row in rows:
        if row.scores.keys() != rows[0].scores.keys():
            raise ValueError(
                f"rows {row.method!r} and {rows[0].method!r} are of unequal tasks:"
                f" {sorted(row.scores)} and {sorted(rows[0].scores)}. Evaluate both on the same"
                " tasks"
            )
    found = [row for row in rows if row.method == INDIVIDUAL]
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} rows have the method {INDIVIDUAL!r}; expected at most one, to which the "
            "others are related. Give the others another name"
        )
    return found[0] if found else None


def _cells(rows: Sequence[Row], digits: int | None) -> list[list[str]]:
    """The header and the rows as text; numbers are rounded to `digits`, None keeps them all."""
    individual = individual_row(rows)
    tasks = list(rows[0].scores)
    lines = [["method", "settings", *tasks, "average"] + ["relative"] * (individual is not None)]
    for row in rows:
        numbers = [*(row.scores[task] for task in tasks), average(row)]
        if individual is not None:
            numbers.append(relative(row.scores, individual.scores))
        cells = [str(number) if digits is None else f"{number:.{digits}f}" for number in numbers]
        lines.append([row.method, row.settings, *cells])
    return lines
