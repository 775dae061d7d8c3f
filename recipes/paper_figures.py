"""The figures of a setting: by iterations, by cost, by task, by the seconds of a refresh."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean

from cells import Cell
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter
from paper_records import Record, individual_cells, merge_seconds

from mats_lightning.files import write_atomically
from mats_lightning.report import relative

STYLES = ("--", "-", ":", "-.")  # of the solvers, in their order
MARKERS = "os^DvPX<>pdh1234"


def write_figures(
    records: Sequence[Record], tasks: Sequence[str], folder: Path, name: str
) -> list[Path]:
    """Those that something has been measured for; those of earlier measurements go."""
    draw: dict[str, Callable[[], Figure | None]] = {
        "iterations": lambda: by_iterations(records),
        "cost": lambda: by_cost(records),
        "tasks": lambda: by_task(records, tasks),
        "refresh": lambda: by_seconds(records),
    }
    written = []
    for kind, make in draw.items():
        path = folder / f"{name}-{kind}.png"
        figure = make()
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        write_atomically(path, partial(figure.savefig, format="png", dpi=160))
        written.append(path)
    return written


def by_iterations(records: Sequence[Record]) -> Figure | None:
    """Validation average against iterations: a panel an objective, a colour a start."""
    found = [r for r in records if r.table == "starts" and r.cell is not None]
    if not found:
        return None
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for record in found:
        assert record.cell is not None
        objective, _, solver = record.label.partition(", ")
        points = lines.setdefault((objective, solver, record.settings), [])
        points.append((record.iterations, record.cell.average))
    objectives, solvers, starts = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    figure = Figure(figsize=(2 + 4 * len(objectives), 4.5), layout="constrained")  # no window
    panels = figure.subplots(1, len(objectives), sharey=True, squeeze=False)[0]
    for (objective, solver, start), points in lines.items():
        panels[objectives.index(objective)].plot(
            *zip(*sorted(points), strict=True),
            STYLES[solvers.index(solver) % len(STYLES)],
            marker="o",
            markersize=4,
            color=f"C{starts.index(start)}",
        )
    for objective, panel in zip(objectives, panels, strict=True):
        panel.set_title(objective)
        panel.set_xscale("log")
        panel.set_xticks(sorted({r.iterations for r in found}), minor=False)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.minorticks_off()
        panel.set_xlabel("iterations")
        tidy(panel)
    panels[0].set_ylabel("average on validation rows")
    keys = [Line2D([], [], color=f"C{n}", label=start) for n, start in enumerate(starts)]
    for number, solver in enumerate(solvers):
        (key,) = panels[0].plot([], [], STYLES[number % len(STYLES)], color="black", label=solver)
        keys.append(key)
    figure.legend(handles=keys, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def averages_of(records: Sequence[Record]) -> Mapping[str, list[Cell]]:
    """Method -> its cells on test rows, of the seeds that are there."""
    found: dict[str, list[Cell]] = {}
    for record in records:
        if record.table == "methods" and record.split == "test" and record.cell is not None:
            found.setdefault(record.label, []).append(record.cell)
    return found


def by_cost(records: Sequence[Record]) -> Figure | None:
    """Test average against seconds, of the merge or of multitask training: a point a seed."""
    found = averages_of(records)
    of_methods = (record for record in records if record.table == "methods")
    references = dict.fromkeys(record.label for record in of_methods if record.is_reference)
    merged = {name: cells for name, cells in found.items() if name not in references}
    if not merged:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(merged):
        own = [
            (max(seconds, 0.01), record.cell.average)  # the axis is logarithmic
            for record in records
            if record.table == "methods" and record.split == "test" and record.label == label
            if record.cell is not None and (seconds := merge_seconds(record, records)) is not None
        ]
        marker = MARKERS[number // 10 % len(MARKERS)]
        axes.scatter(
            [seconds for seconds, _ in own],
            [average for _, average in own],
            marker=marker,
            color=f"C{number % 10}",
            label=label,
        )
    for name, style in zip(references, cycle(("--", ":")), strict=False):
        if name in found:
            average = mean(cell.average for cell in found[name])
            axes.axhline(average, color="black", linestyle=style, linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the merge, or of multitask training")
    axes.set_ylabel("average on test rows")
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def by_seconds(records: Sequence[Record]) -> Figure | None:
    """Test scores, relative to the individual models of the same seed, against the seconds of a
    refresh or a training: means over the seeds there are, which not all lines have.

    A colour a merge, a marker a plan, a line through its rounds.
    """
    alone = individual_cells(records)
    points: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
    for record in records:
        plan = "" if record.is_training else record.settings
        shown = record.table == "refresh" or record.label == "multitask"
        if shown and record.split == "test" and record.cell and record.seed in alone:
            point = (
                record.cell.merge_seconds,
                relative(record.cell.scores, alone[record.seed].scores),
            )
            rounds = points.setdefault((record.label, plan), {})
            rounds.setdefault(record.iterations, []).append(point)
    multitask = points.pop(("multitask", ""), None)
    if not points:
        return None
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    merges, plans = (list(dict.fromkeys(names)) for names in zip(*points, strict=True))
    for (merge, plan), rounds in points.items():
        axes.plot(
            *zip(*(means(own) for _, own in sorted(rounds.items())), strict=True),
            marker=MARKERS[plans.index(plan) % len(MARKERS)],
            color=colormaps["tab20"](merges.index(merge) % 20),
            label=", ".join(filter(None, (merge, plan))),
        )
    if multitask is not None:
        (own,) = multitask.values()
        axes.plot(*means(own), "*", markersize=12, color="black", label="multitask")
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="individual")
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the refresh, or of training; the merge is not counted")
    axes.set_ylabel("test scores, relative to the individual models")
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure


def means(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean seconds, 1 at least (the axis is logarithmic), and the mean score."""
    seconds, scores = zip(*points, strict=True)
    return max(mean(seconds), 1.0), mean(scores)


def by_task(records: Sequence[Record], tasks: Sequence[str]) -> Figure | None:
    """Test scores: bars of the methods for each task, with the range over the seeds."""
    found = averages_of(records)
    if not found:
        return None
    figure = Figure(figsize=(4 + 1.6 * len(tasks), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(found)
    for number, (label, cells) in enumerate(found.items()):
        scores = [[cell.scores[task] for cell in cells] for task in tasks]
        heights = [mean(values) for values in scores]
        below = [h - min(v) for h, v in zip(heights, scores, strict=True)]
        above = [max(v) - h for h, v in zip(heights, scores, strict=True)]
        axes.bar(
            [place + (number + 0.5) * width for place in range(len(tasks))],
            heights,
            width,
            yerr=[below, above] if len(cells) > 1 else None,
            error_kw={"linewidth": 0.6},
            color=colormaps["nipy_spectral"](0.1 + 0.85 * number / len(found)),
            label=label,
        )
    axes.set_xticks([place + 0.4 for place in range(len(tasks))], tasks)
    axes.set_ylabel("score on test rows")
    tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis="y")
