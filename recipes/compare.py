"""Merge by every method, choose its settings on validation rows, and test what was chosen."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from bench import Bench, Opened
from cells import Cell, Cells, Merge
from merge_options import MethodOptions

from mats_lightning.lora import BASE
from mats_lightning.merging.models import names_with
from mats_lightning.merging.results import objective_kinds
from mats_lightning.methods import REFERENCES, STATISTICS, Method
from mats_lightning.report import Row

INDIVIDUAL = {"individual": MethodOptions("individual")}  # the line above all others


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
    # seconds of all merges (points that differ only in `iterations` share one); None where a cell
    # is of another grid's merge, which ran to other iterations
    merge_seconds: float | None
    test_seconds: float
    # block -> its residuals, of the merge's last iteration
    blocks: Mapping[str, list[float]] = field(repr=False)

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
        line = f"{line}, {self.chosen.average:.3f} on validation (the best of {points})"
        return line if seconds is None else f"{line}, {seconds:.0f} s of merging"

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


def check_fit(
    methods: Mapping[str, MethodOptions], names: Sequence[str], kinds: Sequence[str] | None
) -> None:
    """Whether the methods can merge models of parameters with these names.

    `kinds` are the statistics that are taken; None: all. Products of LoRA's factors have the names
    of the weights that they are added to.

    Raises ValueError for methods and options that do not exist, for options that are missing, for
    an expression in `averaged` that no name has, for a method whose statistics are not taken, and
    for `lora_rank` without factors.
    """
    factor = ".lora_A."
    products = [f"{name.partition(factor)[0]}{BASE}" for name in names if factor in name]
    for label, method in methods.items():
        for merge in merges_of(method):
            try:
                Method.of(merge.method, merge.options)
            except ValueError as error:
                raise ValueError(f"methods: {label!r}: {error}") from error
            needed: Sequence[str] = STATISTICS.get(method.method, ())
            if method.method == "mats":
                needed = objective_kinds(merge.options.get("objective", "kfac"))
            of_products = merge.options.get("lora_rank") is not None
            merged = products if of_products else names
            try:
                if of_products and not products:
                    raise ValueError("lora_rank is for LoRA adapters, and these models have none")
                names_with(merge.options.get("averaged", ()), merged, "averaged")
                if kinds is not None and needed and not {*needed} & {*kinds, "identity"}:
                    raise ValueError(
                        f"it needs the statistic {' or '.join(needed)}, and of these models"
                        f" {' and '.join(kinds)} are taken: choose a method for these"
                    )
            except ValueError as error:
                raise ValueError(
                    f"methods: {label!r}: {error}. Methods that fit adapters and networks of"
                    " convolutions are in recipes/paper: run recipes/paper.py with --setting"
                    " text_ia3, text_lora or convolutions, or take them from there"
                ) from error


def choose(cells: Cells, merges: Sequence[Merge]) -> tuple[Merge, int, Cell] | None:
    """The point that is best on validation, the first of equals; None while a cell is missing."""
    points = [(merge, count) for merge in merges for count in merge.counts]
    found = [(*point, cells.find(*point, "validation")) for point in points]
    known = [(merge, count, cell) for merge, count, cell in found if cell is not None]
    if len(known) < len(found):
        return None
    return max(known, key=lambda point: point[2].average)


def seconds_of(merge: Merge, cells: Iterable[Cell]) -> float | None:
    """Of the merge with all of its iterations; None where these cells do not tell."""
    own = [c.merge_seconds for c in cells if c.merge_iterations == max(merge.counts)]
    return max(own, default=None)


def forget(methods: Mapping[str, MethodOptions], cells: Cells) -> None:
    """Drop what was measured of these methods, to measure it again."""
    for method in methods.values():
        for merge in merges_of(method):
            splits = ("validation", "test")
            cells.forget(merge.key(n, split) for n in merge.counts for split in splits)


def steps_of(cells: Cells, method: MethodOptions) -> tuple[int, int]:
    """How many steps a method takes, and how many of them are on disk.

    A step is a merge, a point of a grid on validation, or a method on test.
    """
    merges = list(merges_of(method))
    if method.method in REFERENCES:
        return 2, 0 if cells.find(merges[0], 0, "test") is None else 2
    total, done = 1, 0
    for merge in merges:
        known = sum(cells.find(merge, n, "validation") is not None for n in merge.counts)
        total += 1 + len(merge.counts)
        done += known + (known == len(merge.counts))
    if (chosen := choose(cells, merges)) is not None:
        tested = cells.find(*chosen[:2], "test") is not None
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
        methods = {**INDIVIDUAL, **methods}
        for method in methods.values():
            self.bench.steps.expect(*steps_of(self.bench.cells, method))
        return [self.compare(label, method) for label, method in methods.items()]

    def compare(self, label: str, method: MethodOptions) -> Outcome:
        """One method: all points of its grid on validation, and the best of them on test."""
        attempts: list[Attempt] = []
        kept: tuple[Attempt, Opened, Cell | None] | None = None
        merge_seconds: list[float | None] = []
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
                merge_seconds.append(seconds_of(merge, cells))
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
            None if None in merge_seconds else round(sum(filter(None, merge_seconds)), 2),
            tested.seconds,
            dict(curves),
        )
        better = self.best is None or chosen.average > self.best[0].chosen.average
        if method.method not in REFERENCES and better:
            self.best = outcome, opened
        self.bench.steps.say(outcome.line)
        return outcome


def _settings(merge: Merge, count: int) -> dict[str, Any]:
    return {**merge.options, "iterations": count} if count else dict(merge.options)
