"""The tables of a setting for one seed: what each needs to be measured, and doing it.

A table is an object with four methods: `records`, what is on disk and what is missing, in the same
order whether it is finished or not; `steps_left`, how far it is; `run`; and `forget`. That of the
methods is here; starts and ablations, refreshes, the cost and the intermediate tasks are in files
of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench import Opened
from cells import Cell, Cells, Merge
from compare import INDIVIDUAL, Comparison, choose, forget, merges_of, steps_of
from merge_options import MethodOptions
from paper_seeds import Seed
from paper_settings import Setting
from steps import Steps

from mats_lightning.joint import REFERENCES


@dataclass(frozen=True)
class Record:
    """One line of the long table; `cell` is None where it has not been measured.

    `case` tells tables in a table apart: the target and the donor of intermediate tasks.
    """

    seed: int
    table: str
    case: str
    label: str
    settings: str
    iterations: int
    split: str
    cell: Cell | None

    @property
    def is_training(self) -> bool:
        """Whether it is a rival of the refresh."""
        return self.table == "refresh" and self.label.startswith("trained ")

    @property
    def words(self) -> str:
        count = f"iterations {self.iterations}" if self.iterations else ""
        return ", ".join(filter(None, (self.settings, count)))


class Table(Protocol):
    """What paper.py does with any table of one seed."""

    def records(self) -> Iterator[Record]: ...

    def steps_left(self) -> tuple[int, int]:
        """How many steps it takes, and how many of them are on disk."""
        ...

    def run(self, steps: Steps) -> None:
        """Measure what is missing."""
        ...

    def forget(self) -> None:
        """Drop its cells, to measure them again."""
        ...


def described(options: Mapping[str, Any]) -> str:
    """Options in words: "scale 0.4, averaged embeddings"."""

    def said(value: Any) -> str:
        if isinstance(value, Mapping):
            return " ".join(f"{name} {said(entry)}" for name, entry in value.items())
        if isinstance(value, list):
            return " ".join(map(said, value)) or "nothing"
        return str(value)

    return ", ".join(f"{name} {said(value)}" for name, value in options.items())


def method_records(
    methods: Mapping[str, MethodOptions], cells: Cells, seed: int, table: str, case: str = ""
) -> Iterator[Record]:
    """Each point of each grid on validation, and what is best there on test."""
    for label, method in methods.items():

        def record(
            split: str,
            merge: Merge,
            count: int,
            label: str = label,
            grid: Mapping[str, Any] = method.grid,
        ) -> Record:
            tried = {name: value for name, value in merge.options.items() if name in grid}
            cell = cells.find(merge, count, split)
            return Record(seed, table, case, label, described(tried), count, split, cell)

        merges = list(merges_of(method))
        if method.method in REFERENCES:
            yield record("test", merges[0], 0)
            continue
        for merge in merges:
            for count in merge.counts:
                yield record("validation", merge, count)
        if (chosen := choose(cells, merges)) is not None:
            yield record("test", *chosen[:2])
        else:
            yield Record(seed, table, case, label, "not chosen yet", 0, "test", None)


def merge_seconds(tested: Record, records: Sequence[Record]) -> float | None:
    """Of the merge that was chosen, with all iterations of its grid; None where it is not told.

    What was chosen may have been merged again to be tested, to the chosen iterations alone, so the
    seconds are those of its last point on validation rows. Multitask training has its own.
    """
    point = ("seed", "table", "case", "label", "settings")
    validated = [
        record
        for record in records
        if record.split == "validation"
        and all(getattr(record, name) == getattr(tested, name) for name in point)
    ]
    last = max(validated, key=lambda record: record.iterations, default=tested)
    if last.cell is None or last.cell.merge_iterations != last.iterations:
        return None
    return last.cell.merge_seconds


def chosen_point(cells: Cells, method: MethodOptions) -> tuple[Merge, int] | None:
    """What these validation cells choose of the method, where all of them are there.

    A method that has but one point needs none.
    """
    merges = list(merges_of(method))
    if len(merges) == len(merges[0].counts) == 1:
        return merges[0], merges[0].counts[0]
    chosen = choose(cells, merges)
    return None if chosen is None else chosen[:2]


class MethodTable:
    """All methods, chosen on validation rows of the first seed and tested; multitask training.

    Args:
        setting: the file.
        seed: whose fine-tunes are merged.
        first: the seed that chooses; None where it is `seed` itself.
    """

    def __init__(self, setting: Setting, seed: Seed, first: Seed | None = None) -> None:
        self.seed, self.first, self.multitask = seed, first, setting.multitask
        self.methods = {**INDIVIDUAL, **setting.methods}

    def records(self) -> Iterator[Record]:
        number = self.seed.seed
        if self.first is None:
            yield from method_records(self.methods, self.seed.cells, number, "methods")
        else:
            for label, method in self.methods.items():
                yield self._tested(label, method)
        if self.multitask:
            cell = self.seed.cells.at(self.seed.multitask_key)
            yield Record(number, "methods", "", "multitask", "", 0, "test", cell)

    def _points(self, first: Seed) -> dict[str, tuple[Merge, int]]:
        """All of them, or an error."""
        points = {}
        for label, method in self.methods.items():
            if (point := chosen_point(first.cells, method)) is None:
                raise ValueError(
                    f"{label}: seed {self.seed.seed} tests what seed {first.seed} chose on its"
                    f" validation rows, and that is not measured yet: run seed {first.seed}"
                )
            points[label] = point
        return points

    def _tested(self, label: str, method: MethodOptions) -> Record:
        """One method at a later seed."""
        assert self.first is not None
        point = chosen_point(self.first.cells, method)
        about = (self.seed.seed, "methods", "", label)
        if point is None:
            return Record(*about, "not chosen yet", 0, "test", None)
        merge, count = point
        tried = {name: value for name, value in merge.options.items() if name in method.grid}
        return Record(*about, described(tried), count, "test", self.seed.cells.find(*point, "test"))

    def steps_left(self) -> tuple[int, int]:
        if self.first is None:
            counted = [steps_of(self.seed.cells, method) for method in self.methods.values()]
        else:
            done = [self._tested(*entry).cell is not None for entry in self.methods.items()]
            counted = [(2, 2 * tested) for tested in done]
        if self.multitask:
            counted.append((1, int(self.seed.cells.at(self.seed.multitask_key) is not None)))
        return added(counted)

    def run(self, steps: Steps) -> None:
        points = {} if self.first is None else self._points(self.first)  # before any training
        bench = self.seed.bench(steps)
        if self.first is None:
            comparison = Comparison(bench)
            for label, method in self.methods.items():
                comparison.compare(label, method)
        for label, (merge, count) in points.items():
            cell = Opened(bench, merge, label).cell(count, "test", alone=True)
            steps.say(f"{label}: {cell.average:.3f} on test")
        if self.multitask and self.seed.cells.at(self.seed.multitask_key) is None:
            self.seed.measure_multitask(steps)

    def forget(self) -> None:
        forget(self.methods, self.seed.cells)
        self.seed.cells.forget([self.seed.multitask_key])


def added(counted: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(total for total, _ in counted), sum(done for _, done in counted)
