"""The results of a setting from its records, as tables in Markdown.

What has not been measured stands there as "missing". A score of several seeds is their mean, with
the lowest and the highest of them behind it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from cells import Cell
from paper_long import MISSING
from paper_records import Record, individual_cells, merge_seconds

from mats_lightning.report import relative

METHODS_ON_TEST = ("methods", "test")


@dataclass(frozen=True)
class Section:
    """A heading, what to say of it, and its lines, the header first."""

    title: str
    text: str
    lines: list[list[str]]

    def __str__(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"

        header, *rest = self.lines
        rule = [":--"] + ["--:"] * (len(header) - 1)
        return f"## {self.title}\n\n{self.text}\n\n" + "".join(map(line, [header, rule, *rest]))


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean (lowest to highest), and of how many where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    text = f"{mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ({min(known):.{digits}f} to {max(known):.{digits}f})"
    return text if len(known) == len(values) else f"{text}, {len(values) - len(known)} {MISSING}"


def method_tables(records: Sequence[Record], tasks: Sequence[str]) -> list[Section]:
    """Test scores over the seeds, then of each seed."""
    tested = [r for r in records if r.table == "methods" and r.split == "test"]
    seeds = sorted({record.seed for record in tested})
    labels = list(dict.fromkeys(record.label for record in tested))
    of = {(record.seed, record.label): record for record in tested}
    individual = individual_cells(records)

    def each(label: str, value: Callable[[Cell, int], float | None]) -> list[float | None]:
        cells = [(of[seed, label].cell, seed) for seed in seeds]
        return [None if cell is None else value(cell, seed) for cell, seed in cells]

    def to_individual(cell: Cell, seed: int) -> float | None:
        return relative(cell.scores, individual[seed].scores) if seed in individual else None

    lines = [["method", *tasks, "average", "relative"]]
    for label in labels:
        scores = [spread(each(label, score_on(task))) for task in tasks]
        averages = spread(each(label, lambda cell, seed: cell.average))
        lines.append([label, *scores, averages, spread(each(label, to_individual))])
    text = (
        f"Test rows; settings chosen on validation rows of seed {seeds[0]}; seeds "
        f"{', '.join(map(str, seeds))}: mean (lowest to highest). relative: the mean over tasks of "
        "score / individual."
    )
    tables = [Section("Methods", text, lines)]
    for seed in seeds:
        lines = [["method", "settings", *tasks, "average", "relative", "s of merging"]]
        for label in labels:
            record = of[seed, label]
            numbers = [MISSING] * (len(tasks) + 3)
            if (cell := record.cell) is not None:
                own = to_individual(cell, seed)
                numbers = [f"{cell.scores[task]:.3f}" for task in tasks]
                numbers += [f"{cell.average:.3f}", MISSING if own is None else f"{own:.3f}"]
                took = merge_seconds(record, records)
                shown = MISSING if took is None else f"{took:.1f}"
                numbers.append("" if record.is_reference else shown)
            lines.append([label, record.words, *numbers])
        text = (
            "Test rows. The seconds are of the merge, with the last iterations of its grid, or of "
            "multitask training."
        )
        tables.append(Section(f"Methods, seed {seed}", text, lines))
    return tables


def score_on(task: str) -> Callable[[Cell, int], float | None]:
    return lambda cell, seed: cell.scores[task]


def refresh_tables(records: Sequence[Record], tasks: Sequence[str]) -> list[Section]:
    """Test scores after the last round, over the seeds; and each round, on validation rows."""
    found = [record for record in records if record.table == "refresh"]
    if not found:
        return []
    seeds = sorted({record.seed for record in found})
    individual = individual_cells(records)
    before = {(r.seed, r.label): r.cell for r in records if (r.table, r.split) == METHODS_ON_TEST}
    validated = {
        (r.seed, r.label, r.settings, r.iterations): r.cell for r in found if r.split != "test"
    }
    last: dict[tuple[str, str], dict[int, Record]] = {}  # the rounds follow one another
    for record in found:
        if record.split == "test":
            plan = "" if record.is_training else record.settings
            last.setdefault((record.label, plan), {})[record.seed] = record

    def of(value: Callable[..., float], cells: Iterable[Cell | None]) -> str:
        return spread([None if cell is None else value(cell) for cell in cells])

    header = ["merge", "refresh", "rounds", "before", *tasks, "average", "relative"]
    lines = [[*header, "validation", "seconds"]]
    for (label, plan), own in last.items():
        cells = [record.cell for record in own.values()]
        to_individual = [
            None
            if r.cell is None or s not in individual
            else relative(r.cell.scores, individual[s].scores)
            for s, r in own.items()
        ]
        on_validation = [
            validated.get((r.seed, r.label, r.settings, r.iterations)) for r in own.values()
        ]
        words = plan or ", ".join(dict.fromkeys(record.settings for record in own.values()))
        rounds = str(max(record.iterations for record in own.values())) if plan else ""
        earlier = of(lambda cell: cell.average, (before[s, label] for s in own)) if plan else ""
        lines.append(
            [
                *(label, words, rounds, earlier),
                *(of(lambda cell, task=task: cell.scores[task], cells) for task in tasks),
                of(lambda cell: cell.average, cells),
                spread(to_individual),
                of(lambda cell: cell.average, on_validation),
                spread([None if c is None else c.merge_seconds for c in cells], digits=0),
            ]
        )
    text = (
        "Test rows, after the last round; before: the merge's average. Rounds that make validation "
        "worse are taken back. The seconds are of the refresh or the training, without merging, "
        f"validation and tests; seeds {', '.join(map(str, seeds))}: mean (lowest to highest), of "
        f"some lines seed {seeds[0]} alone."
    )
    return [Section("Refresh", text, lines), *round_tables(found)]


def round_tables(found: Sequence[Record]) -> list[Section]:
    """The plans with rounds."""
    rounds = max(record.iterations for record in found)
    if not rounds:
        return []
    cells = {
        (r.label, r.settings, r.iterations, r.seed): r.cell for r in found if r.split != "test"
    }
    seeds = sorted({record.seed for record in found})
    lines = [["merge", "refresh", *(f"round {number}" for number in range(rounds + 1))]]
    for label, plan in dict.fromkeys((r.label, r.settings) for r in found if r.iterations):
        line = [label, plan]
        for number in range(rounds + 1):
            points = [cells[p] for s in seeds if (p := (label, plan, number, s)) in cells]
            line.append(
                spread([None if c is None else c.average for c in points]) if points else ""
            )
        lines.append(line)
    text = "Average on validation rows. A round that was taken back leaves it as it was."
    return [Section("Refresh, by round", text, lines)]


def start_tables(records: Sequence[Record]) -> list[Section]:
    """A table an objective and solver: starts by iterations."""
    found = [record for record in records if record.table == "starts"]
    tables = []
    for label in dict.fromkeys(record.label for record in found):
        own = [record for record in found if record.label == label]
        cells = {(record.settings, record.iterations): record.cell for record in own}
        counts = list(dict.fromkeys(count for _, count in cells))
        lines = [["start", *(f"{count} iterations" for count in counts)]]
        for start in dict.fromkeys(start for start, _ in cells):
            lines.append([start.removeprefix("start "), *(score(cells[start, n]) for n in counts)])
        text = f"Average on validation rows, seed {found[0].seed}."
        tables.append(Section(f"Starts: {label}", text, lines))
    return tables


def ablation_tables(records: Sequence[Record]) -> list[Section]:
    """A line a baseline, and a line a change of it."""
    found = [record for record in records if record.table == "ablations"]
    if not found:
        return []
    lines = [["baseline", "changed", "average", "difference", "median residual"]]
    baseline: Cell | None = None
    for record in found:
        cell = record.cell
        if not record.settings:
            baseline = cell
        difference = ""
        if record.settings and cell is not None and baseline is not None:
            difference = f"{cell.average - baseline.average:+.3f}"
        residual = "" if cell is None or cell.residual is None else f"{cell.residual:.1e}"
        lines.append([record.label, record.settings, score(cell), difference, residual])
    text = f"Average on validation rows, seed {found[0].seed}; one thing changed at a time."
    return [Section("Ablations", text, lines)]


def score(cell: Cell | None) -> str:
    return MISSING if cell is None else f"{cell.average:.3f}"


def cost_tables(records: Sequence[Record]) -> list[Section]:
    """A line for each thing that was counted."""
    found = [record for record in records if record.table == "cost"]
    if not found:
        return []
    lines = [["what", "settings", "TFLOP", "seconds"]]
    for record in found:
        cell = record.cell
        numbers = [MISSING, MISSING]
        if cell is not None:
            numbers = [f"{(cell.flops or 0) / 1e12:.3g}", f"{cell.seconds:.1f}"]
        lines.append([record.label, record.words, *numbers])
    text = (
        f"Of all tasks together, seed {found[0].seed}. FLOPs of matrix products and convolutions "
        "alone: decompositions and what goes over the numbers one by one are not counted."
    )
    return [Section("Cost", text, lines)]


def transfer_tables(records: Sequence[Record]) -> list[Section]:
    """A line a target and donor: the target alone, each method's best weight, all of its rows."""
    found = [r for r in records if r.table == "intermediate" and r.split == "test"]
    if not found:
        return []
    seeds = sorted({record.seed for record in found})
    of = {(record.seed, record.case, record.label): record.cell for record in found}
    pairs = [case for case in dict.fromkeys(r.case for r in found) if ", donor " in case]
    ends = ("alone", "alone, all rows")
    labels = [label for label in dict.fromkeys(r.label for r in found) if label not in ends]
    lines = [["target", "donor", ends[0], *labels, ends[1]]]
    for pair in pairs:
        target, _, donor = pair.partition(", donor ")
        cases = [(target, ends[0]), *((pair, label) for label in labels), (target, ends[1])]
        cells = [[of[seed, case, label] for seed in seeds] for case, label in cases]
        scores = [spread([None if c is None else c.average for c in column]) for column in cells]
        lines.append([target.removeprefix("target "), donor, *scores])
    text = (
        "The target's score on its test rows; the donor's weight is chosen on the target's "
        f"validation rows; seeds {', '.join(map(str, seeds))}: mean (lowest to highest)."
    )
    return [Section("Intermediate tasks", text, lines)]


def tables_in(records: Sequence[Record], tasks: Sequence[str]) -> list[Section]:
    """All tables that there are records of."""
    tables = method_tables(records, tasks) if any(r.table == "methods" for r in records) else []
    tables += refresh_tables(records, tasks)
    tables += [*start_tables(records), *ablation_tables(records), *cost_tables(records)]
    return [*tables, *transfer_tables(records)]
