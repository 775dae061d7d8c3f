"""The table of the methods; points of grids as records."""

from collections.abc import Iterator, Mapping
from typing import Any

from bench import Opened
from cells import Cells, Merge
from compare import INDIVIDUAL, Comparison, choose, forget, merges_of, steps_of
from merge_options import MethodOptions
from paper_records import Record, Table, added, described
from paper_seeds import Seed
from paper_settings import Setting
from steps import Steps

from mats_lightning.methods import REFERENCES


def record_of(
    cells: Cells, method: MethodOptions, point: tuple[Merge, int] | None, split: str, **about: Any
) -> Record:
    """Of a point of the method's grid; None: it is not chosen yet."""
    about |= {"split": split, "is_reference": method.method in REFERENCES}
    if point is None:
        return Record(settings="not chosen yet", **about)
    merge, count = point
    tried = {name: value for name, value in merge.options.items() if name in method.grid}
    slot = cells.slot(merge.key(count, split))
    return Record(settings=described(tried), iterations=count, **slot, **about)


def method_records(
    methods: Mapping[str, MethodOptions], cells: Cells, **about: Any
) -> Iterator[Record]:
    """Each point of each grid on validation, and what is best there on test."""
    for label, method in methods.items():
        own = {**about, "label": label}
        merges = list(merges_of(method))
        if method.method in REFERENCES:
            yield record_of(cells, method, (merges[0], 0), "test", **own)
            continue
        for merge in merges:
            for count in merge.counts:
                yield record_of(cells, method, (merge, count), "validation", **own)
        chosen = choose(cells, merges)
        point = None if chosen is None else chosen[:2]
        yield record_of(cells, method, point, "test", **own)


def chosen_point(cells: Cells, method: MethodOptions) -> tuple[Merge, int] | None:
    """What these validation cells choose of the method, where all of them are there.

    A method that has but one point needs none.
    """
    merges = list(merges_of(method))
    if len(merges) == len(merges[0].counts) == 1:
        return merges[0], merges[0].counts[0]
    chosen = choose(cells, merges)
    return None if chosen is None else chosen[:2]


class MethodTable(Table):
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
        about: dict[str, Any] = {"seed": self.seed.seed, "table": "methods"}
        if self.first is None:
            yield from method_records(self.methods, self.seed.cells, **about)
        else:
            for label, method in self.methods.items():
                yield self._tested(label, method)
        if self.multitask:
            slot = self.seed.cells.slot(self.seed.multitask_key)
            yield Record(**about, label="multitask", split="test", **slot)

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
        about: dict[str, Any] = {"seed": self.seed.seed, "table": "methods", "label": label}
        return record_of(self.seed.cells, method, point, "test", **about)

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
