"""Tables of merges that are evaluated on validation rows, with nothing to choose."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench import Bench, Opened
from cells import Merge
from compare import merges_of
from merge_options import MethodOptions
from paper_records import Record, Table, added
from paper_seeds import Seed
from paper_settings import Ablations, Setting, Starts
from paper_tables import chosen_point
from steps import Steps
from typing_extensions import override


@dataclass(frozen=True)
class Line:
    """A merge whose states are measured; None where it depends on a choice not made yet."""

    label: str
    settings: str
    merge: Merge | None
    counts: tuple[int, ...]


class LineTable(Table):
    """A table of merges that are evaluated on validation rows, with nothing to choose."""

    name: str

    def __init__(self, seed: Seed) -> None:
        self.seed = seed

    @abstractmethod
    def lines(self) -> Iterator[Line]:
        """The merges, in the order of the table."""

    def records(self) -> Iterator[Record]:
        for line in self.lines():
            for n in line.counts:
                key = None if line.merge is None else line.merge.key(n, "validation")
                yield Record(
                    seed=self.seed.seed,
                    table=self.name,
                    label=line.label,
                    settings=line.settings,
                    iterations=n,
                    split="validation",
                    **self.seed.cells.slot(key),
                )

    def steps_left(self) -> tuple[int, int]:
        return added([self._steps(line.merge, line.counts) for line in self.lines()])

    def _steps(self, merge: Merge | None, counts: tuple[int, ...]) -> tuple[int, int]:
        """One for the merge, and one for each of its counts."""
        cells = [merge and self.seed.cells.find(merge, count, "validation") for count in counts]
        known = sum(cell is not None for cell in cells)
        return 1 + len(counts), known + (known == len(counts))

    def run(self, steps: Steps) -> None:
        bench = self.seed.bench(steps)
        for line in self.lines():
            assert line.merge is not None
            measure(bench, ", ".join(filter(None, (line.label, line.settings))), line.merge)

    def forget(self) -> None:
        for line in self.lines():
            if line.merge is not None:
                if line.merge.statistics is not None:
                    self.seed.forget_collected(line.merge.statistics)
                self.seed.cells.forget(line.merge.key(n, "validation") for n in line.counts)


def measure(bench: Bench, label: str, merge: Merge) -> None:
    """All counts of one merge, on validation rows."""
    opened = Opened(bench, merge, label)
    for count in merge.counts:
        opened.cell(count, "validation")


class StartTable(LineTable):
    """Objectives x solvers x starts; the starts' settings are those chosen among the methods."""

    name = "starts"

    def __init__(self, setting: Setting, starts: Starts, seed: Seed) -> None:
        super().__init__(seed)
        self.starts = starts
        self.methods = {label: setting.methods[label] for label in starts.labels}

    @override
    def lines(self) -> Iterator[Line]:
        for objective in self.starts.objectives:
            for solver, how in self.starts.solvers.items():
                options = {"objective": objective, **self.starts.options, **how.options}
                counts = tuple(how.iterations)
                for label, method in self.methods.items():
                    merge = self._from(method, Merge("mats", options, counts))
                    yield Line(f"{objective}, {solver}", f"start {label}", merge, counts)

    def _from(self, method: MethodOptions, merge: Merge) -> Merge | None:
        """The merge with its start; None where the start's settings are not chosen yet."""
        if method.method in ("average", "pretrained"):
            return replace(merge, options={**merge.options, "init": method.method})
        point = chosen_point(self.seed.cells, method)
        if point is None:
            return None
        start, count = point
        return replace(merge, start=replace(start, counts=(count,)))

    @override
    def run(self, steps: Steps) -> None:
        bench = self.seed.bench(steps)
        for label, method in self.methods.items():
            if chosen_point(self.seed.cells, method) is None:
                for merge in merges_of(method):
                    total, done = self._steps(merge, merge.counts)
                    steps.expect(total - done)
                    measure(bench, label, merge)
        super().run(steps)


class AblationTable(LineTable):
    """Each baseline, and behind it what is changed of it."""

    name = "ablations"

    def __init__(self, ablations: Ablations, seed: Seed) -> None:
        super().__init__(seed)
        self.ablations = ablations

    @override
    def lines(self) -> Iterator[Line]:
        for name, method in self.ablations.baselines.items():
            (merge,) = merges_of(method)
            yield Line(name, "", merge, merge.counts)
            for change in self.ablations.changes:
                if change.baseline == name:
                    options = {**merge.options, **change.options}
                    changed = replace(merge, options=options, statistics=change.statistics)
                    yield Line(name, change.label, changed, merge.counts)
