"""The results of a setting from its records: long CSV, tables in Markdown, figures.

What has not been measured stands there as "missing". A score of several seeds is their mean, with
the lowest and the highest of them behind it.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench import Cell
from compare import REFERENCES
from paper_tables import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MISSING", "markdown_of", "write_figures", "write_long"]

MISSING = "missing"
FIXED = ("seed", "table", "case", "label", "settings", "iterations", "split", "status")
MEASURED = (
    "average",
    "relative",
    "merge_seconds",
    "merge_iterations",
    "evaluation_seconds",
    "residual",
)


# -- the long table ------------------------------------------------------------------------------


def write_long(records: Sequence[Record], tasks: Sequence[str], path: Path) -> None:
    """A line a cell: which it is, whether it is "measured" or "missing", the scores, the seconds.

    `relative` is the mean over tasks of the score over that of the individual models, of the same
    seed, on test rows. `merge_seconds` are of the whole merge, to `merge_iterations`.
    """
    individual = {
        record.seed: record.cell
        for record in records
        if record.table == "methods" and record.label == "individual"
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*FIXED, *tasks, *MEASURED])
        writer.writeheader()
        for record in records:
            row: dict[str, Any] = {name: getattr(record, name) for name in FIXED[:-1]}
            row["status"] = MISSING if record.cell is None else "measured"
            if record.cell is not None:
                row |= measured(record, individual.get(record.seed))
            writer.writerow(row)
    temporary.replace(path)


def measured(record: Record, individual: Cell | None) -> dict[str, Any]:
    cell = record.cell
    assert cell is not None
    row: dict[str, Any] = {**cell.scores, "average": cell.average}
    row["evaluation_seconds"] = cell.seconds
    if cell.merge_seconds:
        row["merge_seconds"] = cell.merge_seconds
    if cell.merge_iterations:
        row["merge_iterations"] = cell.merge_iterations
    if cell.residual is not None:
        row["residual"] = cell.residual
    if individual is not None and record.split == "test" and record.table == "methods":
        row["relative"] = relative(cell, individual)
    return row


def relative(cell: Cell, individual: Cell) -> float:
    """Mean over tasks of score / individual score."""
    return mean(cell.scores[name] / score for name, score in individual.scores.items())


# -- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
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


def spread(values: Sequence[float | None]) -> str:
    """Mean (lowest to highest), and of how many where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    text = f"{mean(known):.3f}"
    if len(known) > 1:
        text += f" ({min(known):.3f} to {max(known):.3f})"
    return text if len(known) == len(values) else f"{text}, {len(values) - len(known)} {MISSING}"


def method_tables(records: Sequence[Record], tasks: Sequence[str]) -> list[Table]:
    """Test scores over the seeds, then of each seed."""
    tested = [r for r in records if r.table == "methods" and r.split == "test"]
    seeds = sorted({record.seed for record in tested})
    labels = list(dict.fromkeys(record.label for record in tested))
    of = {(record.seed, record.label): record for record in tested}

    def each(label: str, value: Callable[[Cell, int], float | None]) -> list[float | None]:
        cells = [(of[seed, label].cell, seed) for seed in seeds]
        return [None if cell is None else value(cell, seed) for cell, seed in cells]

    def to_individual(cell: Cell, seed: int) -> float | None:
        individual = of[seed, "individual"].cell
        return None if individual is None else relative(cell, individual)

    lines = [["method", *tasks, "average", "relative"]]
    for label in labels:
        scores = [spread(each(label, score_on(task))) for task in tasks]
        averages = spread(each(label, lambda cell, seed: cell.average))
        lines.append([label, *scores, averages, spread(each(label, to_individual))])
    text = (
        f"Test rows; settings chosen on validation rows; seeds {', '.join(map(str, seeds))}: mean "
        "(lowest to highest). relative: the mean over tasks of score / individual."
    )
    tables = [Table("Methods", text, lines)]
    for seed in seeds:
        lines = [["method", "settings", *tasks, "average", "relative", "s of merging"]]
        for label in labels:
            record = of[seed, label]
            numbers = [MISSING] * (len(tasks) + 3)
            if (cell := record.cell) is not None:
                own = to_individual(cell, seed)
                numbers = [f"{cell.scores[task]:.3f}" for task in tasks]
                numbers += [f"{cell.average:.3f}", MISSING if own is None else f"{own:.3f}"]
                numbers.append(f"{cell.merge_seconds:.1f}")
            lines.append([label, record.words, *numbers])
        text = (
            "Test rows. The seconds are of the merge, up to the last iterations of its grid, or of "
            "multitask training."
        )
        tables.append(Table(f"Methods, seed {seed}", text, lines))
    return tables


def score_on(task: str) -> Callable[[Cell, int], float | None]:
    return lambda cell, seed: cell.scores[task]


def start_tables(records: Sequence[Record]) -> list[Table]:
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
        tables.append(Table(f"Starts: {label}", text, lines))
    return tables


def ablation_tables(records: Sequence[Record]) -> list[Table]:
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
    return [Table("Ablations", text, lines)]


def score(cell: Cell | None) -> str:
    return MISSING if cell is None else f"{cell.average:.3f}"


def markdown_of(name: str, records: Sequence[Record], tasks: Sequence[str]) -> list[Table]:
    """All tables that there are records of."""
    tables = method_tables(records, tasks) if any(r.table == "methods" for r in records) else []
    return [*tables, *start_tables(records), *ablation_tables(records)]


# -- figures -------------------------------------------------------------------------------------


def write_figures(
    records: Sequence[Record], tasks: Sequence[str], folder: Path, name: str
) -> list[Path]:
    """Those that there are measurements for: by iterations, by cost, by task."""
    from matplotlib.figure import Figure

    drawn: dict[str, Callable[[Axes, Sequence[Record]], bool]] = {
        "iterations": draw_iterations,
        "cost": draw_cost,
        "tasks": lambda axes, found: draw_tasks(axes, found, tasks),
    }
    written = []
    for kind, draw in drawn.items():
        width = 9 if kind != "tasks" else 4 + 1.2 * len(tasks)
        figure = Figure(figsize=(width, 5), layout="constrained")  # no pyplot: no window
        axes = figure.subplots()
        path = folder / f"{name}-{kind}.png"
        if draw(axes, records):
            axes.spines[["top", "right"]].set_visible(False)
            figure.legend(loc="outside right upper", frameon=False, fontsize=8)
            temporary = path.with_name(path.name + ".part")
            figure.savefig(temporary, format="png", dpi=160)
            temporary.replace(path)
            written.append(path)
        else:
            path.unlink(missing_ok=True)  # of other measurements
    return written


def draw_iterations(axes: "Axes", records: Sequence[Record]) -> bool:
    """Validation average against iterations: a line an objective, solver and start."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.table == "starts" and record.cell is not None:
            line = lines.setdefault(f"{record.label}, {record.settings}", [])
            line.append((record.iterations, record.cell.average))
    styles = {"plain": "--", "preconditioned": "-"}
    for number, (label, points) in enumerate(lines.items()):
        style = next((s for word, s in styles.items() if f", {word}," in label), "-")
        axes.plot(*zip(*points, strict=True), style, marker="o", color=f"C{number}", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("iterations")
    axes.set_ylabel("average on validation rows")
    return bool(lines)


def averages_of(records: Sequence[Record]) -> Mapping[str, list[Cell]]:
    """Method -> its cells on test rows, of the seeds that are there."""
    found: dict[str, list[Cell]] = {}
    for record in records:
        if record.table == "methods" and record.split == "test" and record.cell is not None:
            found.setdefault(record.label, []).append(record.cell)
    return found


def draw_cost(axes: "Axes", records: Sequence[Record]) -> bool:
    """Test average against seconds: of the merge, or of multitask training."""
    found = averages_of(records)
    merged = {name: cells for name, cells in found.items() if name not in REFERENCES}
    for name, style in (("individual", "--"), ("pretrained", ":")):
        if name in found:
            average = mean(cell.average for cell in found[name])
            axes.axhline(average, color="black", linestyle=style, linewidth=1, label=name)
    for number, (label, cells) in enumerate(merged.items()):
        seconds = [max(cell.merge_seconds, 0.01) for cell in cells]
        averages = [cell.average for cell in cells]
        marker = "os^Dv*P"[number // 10 % 7]
        axes.scatter(seconds, averages, marker=marker, color=f"C{number % 10}", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the merge, or of multitask training")
    axes.set_ylabel("average on test rows")
    return bool(merged)


def draw_tasks(axes: "Axes", records: Sequence[Record], tasks: Sequence[str]) -> bool:
    """Test scores: bars of the methods for each task, with the range over the seeds."""
    found = averages_of(records)
    width = 0.8 / max(1, len(found))
    for number, (label, cells) in enumerate(found.items()):
        scores = [[cell.scores[task] for cell in cells] for task in tasks]
        heights = [mean(values) for values in scores]
        below = [h - min(v) for h, v in zip(heights, scores, strict=True)]
        above = [max(v) - h for h, v in zip(heights, scores, strict=True)]
        places = [place + number * width for place in range(len(tasks))]
        errors = [below, above] if len(cells) > 1 else None
        colour = (0.15 + 0.8 * number / max(1, len(found)),)
        axes.bar(places, heights, width, yerr=errors, label=label, color=colormap(colour[0]))
    axes.set_xticks([place + 0.4 for place in range(len(tasks))], tasks)
    axes.set_ylabel("score on test rows")
    return bool(found)


def colormap(value: float) -> Any:
    from matplotlib import colormaps

    return colormaps["nipy_spectral"](value)
