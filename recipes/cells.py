"""Finished measurements on disk, so that a comparison that is stopped goes on where it was.

    <output_dir>/cells/3f0c2a9d51b7e684.json        one measurement: its key, and what was found

The name is a digest of the key, which names all that decides the result: the fine-tunes, by their
folders and the ids of their trainings, the rows they are evaluated on, the method, the options that
are said, the number of iterations, the split, and the version of mats_lightning. Within one version
it does not see a change in the code or of a default: use `--again` then.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from train_tasks import training_of, write_json

from mats_lightning import Task
from mats_lightning.sidecar import versions


@dataclass(frozen=True)
class Merge:
    """A merge by what decides it, in names and numbers alone, so that it can be looked up.

    Args:
        method: of MergeModule.
        options: its keyword arguments, `iterations` left out.
        counts: the iterations whose states are looked at; one run passes through all of them. A
            method without iterations has the one count 0.
        start: the merge whose state is `init`.
        statistics: settings of a pass over training rows, in place of the training's statistics.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (0,)
    start: "Merge | None" = None
    statistics: Mapping[str, Any] | None = None

    def key(self, count: int, split: str) -> dict[str, Any]:
        """Of the cell of the state after `count` iterations, on "validation" or "test" rows."""
        return {**self._key(), "iterations": count, "split": split}

    def _key(self) -> dict[str, Any]:
        key: dict[str, Any] = {"method": self.method, "options": dict(self.options)}
        if self.start is not None:
            key["start"] = self.start._key()
            if last := max(self.start.counts):  # whose state it is
                key["start"]["iterations"] = last
        if self.statistics is not None:
            key["statistics"] = dict(self.statistics)
        return key


@dataclass(frozen=True)
class Cell:
    """What was measured at one point.

    Args:
        scores: the primary metric a task.
        merge_seconds: of the merge, up to its `merge_iterations`: points that differ in their
            iterations alone share one. Of a refresh or a training: its own, without the merge.
        seconds: of the evaluation.
        residuals: block -> the solver's relative residuals, up to this cell's own iterations.
        residual: the median of their last ones over the blocks; None without.
        flops: where they were counted; then `seconds` are of what was counted.
    """

    scores: dict[str, float]
    seconds: float
    merge_seconds: float = 0.0
    merge_iterations: int = 0
    residual: float | None = None
    residuals: dict[str, list[float]] = field(default_factory=dict, repr=False)
    flops: float | None = None

    @property
    def average(self) -> float:
        return mean(self.scores.values())


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

    def at(self, key: Mapping[str, Any] | None) -> Cell | None:
        """The cell of this key; None where it is not on disk yet, or the key is not known yet."""
        if key is None or not (path := self._path(key)).exists():
            return None
        return Cell(**json.loads(path.read_text(encoding="utf-8"))["found"])

    def find(self, merge: Merge, count: int, split: str) -> Cell | None:
        """The cell of the state after `count` iterations, where it is on disk."""
        return self.at(merge.key(count, split))

    def keep(self, key: Mapping[str, Any], cell: Cell) -> None:
        write_json(self._path(key), {"key": {**self.about, **key}, "found": asdict(cell)})

    def slot(self, key: Mapping[str, Any] | None) -> dict[str, Any]:
        """`cell` and `keep` of a Record: what is at this key, and what puts a cell there."""
        return {"cell": self.at(key), "keep": None if key is None else partial(self.keep, key)}

    def forget(self, keys: Iterable[Mapping[str, Any]]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Mapping[str, Any]) -> Path:
        about = self.about
        if hidden := sorted(about.keys() & key.keys()):
            raise ValueError(f"key: {hidden[0]!r} is what all cells have in common")
        text = json.dumps({**about, **key}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def cells_of(
    output_dir: Path, finetunes: Sequence[tuple[Path, str]], only: str | None = None
) -> Cells:
    """Those of merges of these fine-tunes.

    Args:
        output_dir: of the comparison.
        finetunes: their folders, and digests of the rows that they are evaluated on.
        only: the task that alone is scored.
    """
    folders, rows = zip(*finetunes, strict=True)
    about: dict[str, Any] = {"rows": list(rows)}
    if only is not None:
        about["only"] = only
    return Cells(output_dir / "cells", folders, about)


def cells_of_tasks(output_dir: Path, tasks: Sequence[Task]) -> Cells:
    """The same, of tasks that are trained."""
    about = [(Path(task.checkpoint).parent, rows_digest(task.data)) for task in tasks]
    return cells_of(output_dir, about)


def rows_digest(data: Any) -> str:
    """Of the validation and test rows of a LabelledData: their inputs and labels."""
    digest = hashlib.sha256()
    for split in ("validation", "test"):
        rows = [(data.key(row), row["label"]) for row in data.rows[split]]
        digest.update(f"{split} {rows!r}".encode())
    return digest.hexdigest()[:16]
