"""Finished measurements on disk, so that a comparison that is stopped goes on where it was.

    <output_dir>/cells/3f0c2a9d51b7e684.json        one measurement: its key, and what was found

The name is a digest of the key, which names all that decides the result: the fine-tunes, by their
folders and the ids of their trainings, the rows they are evaluated on, the method, the options that
are said, the number of iterations, the split, and the version of mats_lightning. It does not know
of a change in the code of the same version, of a default either: then `--again` forgets the cells.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train_tasks import training_of, write_json

from mats_lightning import Task
from mats_lightning.sidecar import versions


class Cells:
    """A folder with a file a cell; each is written whole, or not at all.

    Args:
        folder: is made when it is needed.
        trainings: the folders of the fine-tunes, which may still be trained.
        about: what all cells of one comparison have in common beside them; a part of their keys.
    """

    def __init__(self, folder: Path, trainings: Sequence[Path], about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.trainings = trainings
        self._about = {"mats_lightning": versions()["mats_lightning"], **about}

    @property
    def about(self) -> dict[str, Any]:
        """What is in every key, now."""
        return {**self._about, "fine-tunes": [training_of(path) for path in self.trainings]}

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found at this key; None where it is not known yet."""
        path = self._path(key)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["found"]
        return found

    def keep(self, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        write_json(self._path(key), {"key": {**self.about, **key}, "found": found})

    def forget(self, keys: Iterable[Mapping[str, Any]]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Mapping[str, Any]) -> Path:
        about = self.about
        if hidden := sorted(about.keys() & key.keys()):
            raise ValueError(f"key: {hidden[0]!r} is what all cells have in common")
        text = json.dumps({**about, **key}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def cells_of_tasks(folder: Path, tasks: Sequence[Task]) -> Cells:
    """Those of merges of these tasks, evaluated on their rows."""
    trainings = [Path(task.checkpoint).parent for task in tasks]
    return Cells(folder, trainings, {"rows": [rows_digest(task.data) for task in tasks]})


def rows_digest(data: Any) -> str:
    """Of the validation and test rows of a LabelledData: their inputs and labels."""
    digest = hashlib.sha256()
    for split in ("validation", "test"):
        rows = [(data.key(row), row["label"]) for row in data.rows[split]]
        digest.update(f"{split} {rows!r}".encode())
    return digest.hexdigest()[:16]
