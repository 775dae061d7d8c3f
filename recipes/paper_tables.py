"""What each table of a setting needs to be measured, how far that is, and doing it.

A table is a list of records, each of one cell: `records` makes them from what is on disk, in
the same order whether it is finished or not, and `run` measures the cells that are missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import Bench, Cell, Find, Merge, Opened
from compare import REFERENCES, Comparison, choose, merges_of, steps_of
from merge_options import MethodOptions
from paper_seeds import Seed
from paper_settings import Ablations, Setting, Starts

__all__ = [
    "Line",
    "Record",
    "described",
    "forget",
    "method_records",
    "records",
    "run",
    "steps_left",
]


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
    def words(self) -> str:
        count = f"iterations {self.iterations}" if self.iterations else ""
        return ", ".join(filter(None, (self.settings, count)))


@dataclass(frozen=True)
class Line:
    """A merge of `starts` or `ablations`; None where it depends on a choice not made yet."""

    label: str
    settings: str
    merge: Merge | None
    counts: tuple[int, ...]


def described(options: Mapping[str, Any]) -> str:
    """Options in words: "scale 0.4, averaged embeddings"."""

    def said(value: Any) -> str:
        if isinstance(value, Mapping):
            return " ".join(f"{name} {said(entry)}" for name, entry in value.items())
        if isinstance(value, list):
            return " ".join(map(said, value)) or "nothing"
        return str(value)

    return ", ".join(f"{name} {said(value)}" for name, value in options.items())


# -- methods -------------------------------------------------------------------------------------


def all_methods(setting: Setting) -> dict[str, MethodOptions]:
    return {"individual": MethodOptions("individual"), **setting.methods}


def method_records(
    methods: Mapping[str, MethodOptions], find: Find, seed: int, table: str, case: str = ""
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
            tried = {n: v for n, v in merge.options.items() if n in grid}
            cell = find(merge, count, split)
            return Record(seed, table, case, label, described(tried), count, split, cell)

        merges = list(merges_of(method))
        if method.method in REFERENCES:
            yield record("test", merges[0], 0)
            continue
        for merge in merges:
            for count in merge.counts:
                yield record("validation", merge, count)
        if (chosen := choose(find, merges)) is not None:
            yield record("test", *chosen[:2])
        else:
            yield Record(seed, table, case, label, "not chosen yet", 0, "test", None)


def multitask_record(setting: Setting, seed: Seed) -> Iterator[Record]:
    if setting.multitask:
        yield Record(seed.seed, "methods", "", "multitask", "", 0, "test", seed.multitask_cell())


def run_methods(setting: Setting, seed: Seed, bench: Bench) -> None:
    comparison = Comparison(bench)
    for label, method in all_methods(setting).items():
        comparison.compare(label, method)
    if setting.multitask and seed.multitask_cell() is None:
        seed.measure_multitask(bench.steps)


# -- starts and ablations ------------------------------------------------------------------------


def start_lines(setting: Setting, starts: Starts, seed: Seed) -> Iterator[Line]:
    """Objectives x solvers x starts."""
    for objective in starts.objectives:
        for solver, how in starts.solvers.items():
            for label in starts.labels:
                options = {"objective": objective, **starts.options, **how.options}
                counts = tuple(how.iterations)
                chosen = choose_start(setting.methods[label], seed)
                merge = None
                if isinstance(chosen, str):
                    merge = Merge("mats", {**options, "init": chosen}, counts)
                elif chosen is not None:
                    merge = Merge("mats", options, counts, start=chosen)
                yield Line(f"{objective}, {solver}", f"start {label}", merge, counts)


def choose_start(method: MethodOptions, seed: Seed) -> Merge | str | None:
    """The start as `init` takes it by name, or the merge that was chosen; None if none is yet."""
    if method.method in ("average", "pretrained"):
        return method.method
    chosen = choose(seed.find, list(merges_of(method)))
    if chosen is None:
        return None
    merge, count, _ = chosen
    return Merge(merge.method, merge.options, (count,), merge.start, merge.statistics)


def ablation_lines(ablations: Ablations) -> Iterator[Line]:
    """Each baseline, and behind it what is changed of it."""
    for name, method in ablations.baselines.items():
        (merge,) = merges_of(method)
        yield Line(name, "", merge, merge.counts)
        for change in ablations.changes:
            if change.baseline == name:
                changed = Merge(
                    merge.method,
                    {**merge.options, **change.options},
                    merge.counts,
                    statistics=change.statistics,
                )
                yield Line(name, change.label, changed, merge.counts)


def lines_of(table: str, setting: Setting, seed: Seed) -> list[Line]:
    if table == "starts" and setting.starts is not None:
        return list(start_lines(setting, setting.starts, seed))
    if table == "ablations" and setting.ablations is not None:
        return list(ablation_lines(setting.ablations))
    return []


def line_records(table: str, setting: Setting, seed: Seed) -> Iterator[Record]:
    for line in lines_of(table, setting, seed):
        for count in line.counts:
            cell = seed.find(line.merge, count, "validation") if line.merge is not None else None
            yield Record(seed.seed, table, "", line.label, line.settings, count, "validation", cell)


def choices(setting: Setting, seed: Seed) -> list[tuple[str, Merge]]:
    """The merges of `methods` that the starts are chosen from, by their label."""
    labels = setting.starts.labels if setting.starts is not None else []
    found = [(label, setting.methods[label]) for label in labels]
    return [(n, merge) for n, m in found if m.method not in REFERENCES for merge in merges_of(m)]


def run_lines(table: str, setting: Setting, seed: Seed, bench: Bench) -> None:
    if table == "starts":
        for label, merge in choices(setting, seed):
            measure(bench, label, merge)
    for line in lines_of(table, setting, seed):
        assert line.merge is not None  # its start is chosen by now
        measure(bench, ", ".join(filter(None, (line.label, line.settings))), line.merge)


def measure(bench: Bench, label: str, merge: Merge) -> None:
    """All counts of one merge, on validation rows."""
    opened = Opened(bench, merge, label)
    for count in merge.counts:
        opened.cell(count, "validation")


# -- all of them ---------------------------------------------------------------------------------


def records(table: str, setting: Setting, seed: Seed) -> list[Record]:
    """The cells of a table of one seed, as far as they are on disk."""
    if table == "methods":
        found = method_records(all_methods(setting), seed.find, seed.seed, table)
        return [*found, *multitask_record(setting, seed)]
    return list(line_records(table, setting, seed))


def run(table: str, setting: Setting, seed: Seed, bench: Bench) -> None:
    """Measure what is missing of a table."""
    if table == "methods":
        run_methods(setting, seed, bench)
    else:
        run_lines(table, setting, seed, bench)


def steps_left(tables: Sequence[str], setting: Setting, seed: Seed) -> tuple[int, int]:
    """How many steps the tables take for one seed, and how many of them are on disk."""
    counted = []
    if "methods" in tables:
        counted += [steps_of(seed.find, method) for method in all_methods(setting).values()]
        counted += [(1, seed.multitask_cell() is not None)] * setting.multitask
    lines = [line for table in tables for line in lines_of(table, setting, seed)]
    merges = [(line.merge, line.counts) for line in lines]
    if "starts" in tables and "methods" not in tables:
        merges += [(merge, merge.counts) for _, merge in choices(setting, seed)]
    for merge, counts in merges:
        known = sum(
            merge is not None and seed.find(merge, n, "validation") is not None for n in counts
        )
        counted.append((1 + len(counts), known + (known == len(counts))))
    return sum(total for total, _ in counted), sum(done for _, done in counted)


def forget(table: str, setting: Setting, seed: Seed) -> None:
    """Drop the cells of a table, to measure them again."""
    if table == "methods":
        merges = [m for method in all_methods(setting).values() for m in merges_of(method)]
        seed.cells.forget([seed.multitask_key])
        splits = ["validation", "test"]
    else:
        merges = [line.merge for line in lines_of(table, setting, seed) if line.merge is not None]
        splits = ["validation"]
    for merge in merges:
        seed.cells.forget(merge.key(n, split) for n in merge.counts for split in splits)
