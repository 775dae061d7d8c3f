"""Intermediate tasks: a target with few training rows, merged with a donor that has many.

The donor's weight is chosen on the target's validation rows, and the target's own head is used.
The donors, and the target with all of its rows, are the fine-tunes of the suite.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from bench import Bench
from cells import Cells, cells_of
from compare import Comparison, forget, steps_of
from merge_options import MethodOptions
from paper_records import Record, Table, added
from paper_seeds import Seed, Suite
from paper_settings import Intermediate
from paper_tables import method_records
from steps import Steps
from typing_extensions import override

ALONE, ALL_ROWS = "alone", "alone, all rows"


@dataclass(frozen=True)
class Group:
    """What is merged and scored on one target: nothing (`donor` None), or it and a donor."""

    target: str
    donor: str | None
    full: bool  # the target has all of its rows
    methods: Mapping[str, MethodOptions]
    cells: Cells

    @property
    def case(self) -> str:
        return f"target {self.target}" + (f", donor {self.donor}" if self.donor else "")


class TransferTable(Table):
    """The intermediate tasks of one seed: what is measured, and doing it.

    Raises ValueError for a target or donor that is no task of the suite.
    """

    def __init__(self, plan: Intermediate, seed: Seed) -> None:
        if odd := [name for name in (*plan.targets, *plan.donors) if name not in seed.tasks]:
            raise ValueError(f"intermediate: {odd[0]!r} is none of {', '.join(seed.tasks)}")
        options = replace(seed.options, train_rows=plan.few_rows, epochs=plan.few_epochs)
        self.seed, self.few, self.targets = seed, Suite(options), plan.targets
        self.groups = list(self._groups(plan))

    def _groups(self, plan: Intermediate) -> Iterator[Group]:
        full, few, options = self.seed.suite, self.few, self.seed.options
        individual = MethodOptions("individual")
        for target in plan.targets:
            for label, suite in ((ALONE, few), (ALL_ROWS, full)):
                cells = cells_of(options.output_dir, [suite.about(target)], only=target)
                yield Group(target, None, suite is full, {label: individual}, cells)
            for donor in plan.donors:
                if donor != target:
                    about = [few.about(target), full.about(donor)]
                    methods = {
                        label: weighted(method, target, donor, plan.donor_weights)
                        for label, method in plan.methods.items()
                    }
                    cells = cells_of(options.output_dir, about, only=target)
                    yield Group(target, donor, False, methods, cells)

    def records(self) -> Iterator[Record]:
        for group in self.groups:
            yield from self._of(group)

    def steps_left(self) -> tuple[int, int]:
        """How many steps there are, and how many of them are on disk."""
        counted = [steps_of(g.cells, m) for g in self.groups for m in g.methods.values()]
        return added(counted)

    @override
    def train(self, steps: Steps) -> None:
        """Those of the suite, and the targets with few rows."""
        super().train(steps)
        for target in self.targets:
            self.few.task(target, steps)
        self.few.let_go()

    def run(self, steps: Steps) -> None:
        for group in self.groups:
            if all(record.cell is not None for record in self._of(group)):
                continue
            comparison = Comparison(self._bench(group, steps))
            for label, method in group.methods.items():
                comparison.compare(f"{group.case}: {label}", method)
        self.few.let_go()

    def _of(self, group: Group) -> Iterator[Record]:
        about = {"seed": self.seed.seed, "table": "intermediate", "case": group.case}
        return method_records(group.methods, group.cells, **about)

    def _bench(self, group: Group, steps: Steps) -> Bench:
        target = (self.seed.suite if group.full else self.few).task(group.target, steps)
        donor = [] if group.donor is None else [self.seed.suite.task(group.donor, steps)]
        return Bench(
            [target, *donor],
            *self.seed.starts,
            self.seed.options.accelerator,
            group.cells,
            steps,
            only=group.target,
        )

    def forget(self) -> None:
        for group in self.groups:
            forget(group.methods, group.cells)


def weighted(
    method: MethodOptions, target: str, donor: str, donor_weights: list[float]
) -> MethodOptions:
    """The method with the donor's weight as one more thing to choose."""
    weights = [{target: round(1 - weight, 6), donor: weight} for weight in donor_weights]
    return MethodOptions(method.method, method.options, {"weights": weights, **method.grid})
