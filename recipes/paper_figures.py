"""The figures of a setting: by iterations, by cost, by task."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench import Cell
from compare import REFERENCES
from paper_tables import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_figures"]


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
