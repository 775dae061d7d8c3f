"""The results of a setting as a long table, a line a cell, in CSV.

What has not been measured stands there as "missing".
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import Cell
from paper_records import Record, individual_cells

from mats_lightning.files import write_text
from mats_lightning.report import relative

MISSING = "missing"
FIXED = ("seed", "table", "case", "label", "settings", "iterations", "split", "status")
RELATIVE = ("methods", "refresh")  # tables of all tasks
MEASURED = (
    "average",
    "relative",
    "merge_seconds",
    "merge_iterations",
    "evaluation_seconds",
    "residual",
    "flops",
    "seconds",
)


def write_long(records: Sequence[Record], tasks: Sequence[str], path: Path) -> None:
    """A line a cell: which it is, whether it is "measured" or "missing", the scores, the seconds.

    `relative` is the mean over tasks of the score over that of the individual models, of the same
    seed, on test rows. `merge_seconds` are of the whole merge, to `merge_iterations`; in the
    table "refresh" they are of the refresh or the training, without the merge. `seconds` are
    of what the table of the cost counts.
    """
    individual = individual_cells(records)
    rows = []
    for record in records:
        row: dict[str, Any] = {name: getattr(record, name) for name in FIXED[:-1]}
        row["status"] = MISSING if record.cell is None else "measured"
        if record.cell is not None:
            row |= measured(record, individual.get(record.seed))
        rows.append(row)

    text = io.StringIO()
    writer = csv.DictWriter(text, [*FIXED, *tasks, *MEASURED])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue(), newline="")


def read_long(path: Path, tasks: Sequence[str]) -> dict[tuple[str, ...], Cell]:
    """What `write_long` wrote as measured, by the names of its records; without residual curves.

    Raises ValueError for no file, one of other tasks, and two lines of one name.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    cells: dict[tuple[str, ...], Cell] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header, expected = reader.fieldnames, [*FIXED, *tasks, *MEASURED]
        if header != expected:
            raise ValueError(f"{path}: expected the columns {expected}, found {header}")
        for row in reader:
            name = tuple(row[part] for part in FIXED[:-1])
            if row["status"] == MISSING:
                continue
            if name in cells:
                raise ValueError(f"{path}: two lines are of {', '.join(filter(None, name))}")
            cells[name] = Cell(
                {task: float(row[task]) for task in tasks if row[task]},
                float(row["evaluation_seconds"] or row["seconds"] or 0),
                float(row["merge_seconds"] or 0),
                int(row["merge_iterations"] or 0),
                residual=float(row["residual"]) if row["residual"] else None,
                flops=float(row["flops"]) if row["flops"] else None,
            )
    return cells


def measured(record: Record, individual: Cell | None) -> dict[str, Any]:
    cell = record.cell
    assert cell is not None
    row: dict[str, Any] = {**cell.scores, "residual": cell.residual, "flops": cell.flops}
    if cell.scores:
        row["average"] = cell.average
    if cell.seconds:  # refreshes have none of their own
        row["evaluation_seconds" if cell.flops is None else "seconds"] = cell.seconds
    if cell.merge_seconds:
        row["merge_seconds"] = cell.merge_seconds
    if cell.merge_iterations:
        row["merge_iterations"] = cell.merge_iterations
    if individual is not None and record.split == "test" and record.table in RELATIVE:
        row["relative"] = relative(cell.scores, individual.scores)
    return row
