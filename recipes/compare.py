"""Merge by every method, choose its settings on validation rows, and test what was chosen."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any, NamedTuple

from bench import Bench, Cell, Find, Merge, Opened
from merge_options import MethodOptions

from mats_lightning.report import Row

__all__ = [
    "REFERENCES",
    "Attempt",
    "Comparison",
    "Outcome",
    "choose",
    "merges_of",
    "steps_of",
    "words",
]

REFERENCES = ("individual", "pretrained")  # rows to compare with: nothing is merged


class Curve(NamedTuple):
    """A block's relative residuals, as plot_residuals takes them."""

    residuals: list[float]


@dataclass(frozen=True)
class Attempt:
    """One point of a method's grid, on the validation slices; references have no scores there."""

    settings: dict[str, Any]
    scores: dict[str, float]
    seconds: float

    @property
    def average(self) -> float:
        return mean(self.scores.values()) if self.scores else float("nan")

    @property
    def iterations(self) -> int:
        """What `MergeModule.use` takes: 0 for a method without iterations."""
        return int(self.settings.get("iterations", 0))


@dataclass(frozen=True)
class Outcome:
    """One line of the table: the attempt that was best on validation, and its scores on test."""

    label: str
    method: str
    chosen: Attempt
    scores: dict[str, float]
    attempts: list[Attempt]
    merge_seconds: float  # of all merges; points that differ in `iterations` alone share one
    test_seconds: float
    blocks: Mapping[str, Curve] = field(repr=False)  # of the merge's last iteration

    @property
    def row(self) -> Row:
        """The label says which objective and preconditioner; the settings are the numbers."""
        return Row(self.label, words(self.chosen.settings), self.scores)

    @property
    def line(self) -> str:
        points, seconds = len(self.attempts), self.merge_seconds
        line = f"{self.label}: {mean(self.scores.values()):.3f} on test"
        if self.method in REFERENCES:
            return line
        return (
            f"{line}, {self.chosen.average:.3f} on validation (the best of {points}), "
            f"{seconds:.0f} s of merging"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "method": self.method,
            "settings": self.chosen.settings,
            "validation_average": self.chosen.average if self.chosen.scores else None,
            "test_average": mean(self.scores.values()),
            "test_scores": self.scores,
            "merge_seconds": self.merge_seconds,
            "test_seconds": self.test_seconds,
            "grid": [asdict(attempt) for attempt in self.attempts],
        }


def words(settings: Mapping[str, Any]) -> str:
    """The numbers among the settings, as a table shows them."""
    return ", ".join(f"{n} {v}" for n, v in settings.items() if isinstance(v, int | float))


def merges_of(method: MethodOptions) -> Iterator[Merge]:
    """The merges that a method's grid needs.

    Raises ValueError for mats without a number of iterations.
    """
    for options, counts in method.merges():
        if method.method == "mats" and "iterations" not in options:
            raise ValueError(f"mats with {options}: say iterations, in options or grid")
        options.pop("iterations", None)
        yield Merge(method.method, options, tuple(counts))


def choose(find: Find, merges: Sequence[Merge]) -> tuple[Merge, int, Cell] | None:
    """The point that is best on validation, the first of equals; None while a cell is missing."""
    points = [(merge, count) for merge in merges for count in merge.counts]
    found = [(*point, find(*point, "validation")) for point in points]
    known = [(merge, count, cell) for merge, count, cell in found if cell is not None]
    if len(known) < len(found):
        return None
    return max(known, key=lambda point: point[2].average)


def steps_of(find: Find, method: MethodOptions) -> tuple[int, int]:
    """How many steps a method takes, and how many of them are on disk.

    A step is a merge, a point of a grid on validation, or a method on test.
    """
    merges = list(merges_of(method))
    if method.method in REFERENCES:
        return 2, 0 if find(merges[0], 0, "test") is None else 2
    total, done = 1, 0
    for merge in merges:
        known = sum(find(merge, n, "validation") is not None for n in merge.counts)
        total += 1 + len(merge.counts)
        done += known + (known == len(merge.counts))
    if (chosen := choose(find, merges)) is not None:
        tested = find(*chosen[:2], "test") is not None
        done += 1 if tested else -1  # what was chosen is merged again
    return total, done


class Comparison:
    """Runs the methods one after the other over the tasks of a bench.

    What is on disk is neither merged nor evaluated again. Merges are dropped as soon as a better
    one is known: the best of all (`best`), the best of the method at work and the newest are in
    memory, no others, and but for the newest one state of each.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.best: tuple[Outcome, Opened] | None = None

    def run(self, methods: Mapping[str, MethodOptions]) -> list[Outcome]:
        """The outcomes of the individual models, then of each method under its label."""
        methods = {"individual": MethodOptions("individual"), **methods}
        for method in methods.values():
            self.bench.steps.expect(*steps_of(self.bench.find, method))
        return [self.compare(label, method) for label, method in methods.items()]

    def compare(self, label: str, method: MethodOptions) -> Outcome:
        """One method: all points of its grid on validation, and the best of them on test."""
        attempts: list[Attempt] = []
        kept: tuple[Attempt, Opened, Cell | None] | None = None
        merge_seconds = 0.0
        for merge in merges_of(method):
            opened = Opened(self.bench, merge, label)
            if method.method in REFERENCES:
                cells, tried = [], [Attempt({}, {}, 0.0)]
            else:
                cells = [opened.cell(count, "validation") for count in merge.counts]
                tried = [
                    Attempt(_settings(merge, count), cell.scores, cell.seconds)
                    for count, cell in zip(merge.counts, cells, strict=True)
                ]
                merge_seconds += max(cell.merge_seconds for cell in cells)
            attempts += tried
            best = max(tried, key=lambda attempt: attempt.average)
            if kept is None or best.average > kept[0].average:
                last = cells[merge.counts.index(max(merge.counts))] if cells else None
                kept = best, opened, last
                opened.keep_only(best.iterations)
        assert kept is not None
        chosen, opened, last = kept
        tested = opened.cell(chosen.iterations, "test", alone=True)
        curves = last.residuals if last is not None else {}
        outcome = Outcome(
            label,
            method.method,
            chosen,
            tested.scores,
            attempts,
            round(merge_seconds, 2),
            tested.seconds,
            {name: Curve(curve) for name, curve in curves.items()},
        )
        better = self.best is None or chosen.average > self.best[0].chosen.average
        if method.method not in REFERENCES and better:
            self.best = outcome, opened
        self.bench.steps.say(outcome.line)
        return outcome


def _settings(merge: Merge, count: int) -> dict[str, Any]:
    return {**merge.options, "iterations": count} if count else dict(merge.options)
