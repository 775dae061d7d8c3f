"""What is on disk of a setting, and what is missing: records, and the tables that give them.

Tables are in paper_tables.py (the methods), paper_lines.py (starts and ablations),
paper_refresh.py, paper_cost.py and paper_intermediate.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cells import Cell
from compare import INDIVIDUAL
from paper_seeds import Seed
from steps import Steps


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the long table.

    Args:
        seed: of the fine-tunes.
        table: its name in the setting.
        case: tells tables in a table apart: the target and the donor of intermediate tasks.
        label: of the method.
        settings: in words.
        iterations: 0 for what has none.
        split: "validation" or "test"; "" for what has none.
        cell: None where it has not been measured.
        keep: puts a cell in its place; None where what it would be of is not chosen yet.
        is_reference: it merges nothing.
    """

    seed: int
    table: str
    case: str = ""
    label: str
    settings: str = ""
    iterations: int = 0
    split: str = ""
    cell: Cell | None = None
    keep: Callable[[Cell], None] | None = field(default=None, repr=False, compare=False)
    is_reference: bool = False

    @property
    def name(self) -> tuple[str, ...]:
        """What no other line of a setting has."""
        parts = (self.seed, self.table, self.case, self.label, self.settings)
        return (*map(str, (*parts, self.iterations)), self.split)

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

    seed: Seed

    def records(self) -> Iterator[Record]:
        """What is on disk and what is missing, in the same order whether it is finished or not."""
        ...

    def steps_left(self) -> tuple[int, int]:
        """How many steps it takes, and how many of them are on disk."""
        ...

    def train(self, steps: Steps) -> None:
        """The fine-tunes that its cells are of, where they are missing."""
        self.seed.bench(steps)

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


def individual_cells(records: Sequence[Record]) -> dict[int, Cell]:
    """seed -> the test scores of the individual models, where they are measured."""
    return {
        record.seed: record.cell
        for record in records
        if record.table == "methods" and record.label in INDIVIDUAL and record.cell is not None
    }


def added(counted: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(total for total, _ in counted), sum(done for _, done in counted)
