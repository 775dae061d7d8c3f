"""Results of merge methods on many tasks: tables and figures.

A score is the task's primary metric, higher being better. The row whose method is "individual"
holds the scores of the models before merging, each on its own task; the others are related to it.
Every file is written under a temporary name and renamed, so a kill leaves the old one or the new.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from mats_lightning.files import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INDIVIDUAL = "individual"
COLOUR_RANGE = 0.4  # around 1: what is worse looks alike, so that the good methods differ


@dataclass(frozen=True)
class Row:
    """One method's results: its settings in words, and {task: score}."""

    method: str
    settings: str
    scores: dict[str, float]


class Residuals(Protocol):
    """A solver's evidence: |b - C theta| / |b| at the start and after each iteration."""

    @property
    def residuals(self) -> Sequence[float]: ...


def average(row: Row) -> float:
    """Mean of the row's scores. Raises ValueError for a row without scores."""
    if not row.scores:
        raise ValueError(f"row {row.method!r} has no scores: expected one a task")
    return sum(row.scores.values()) / len(row.scores)


def relative(row: Row, individual_row: Row) -> float:
    """Mean over tasks of score / individual score: 1 where merging costs nothing.

    Raises ValueError for rows of unequal tasks and for an individual score of zero.
    """
    return average(Row(row.method, row.settings, _quotients(row, individual_row)))


def print_table(rows: Sequence[Row], title: str, console: Console | None = None) -> None:
    """Print method, settings, a score a task and their average, a line a row.

    Where one row is "individual", a last column has the average relative to it. A table wider
    than the console is printed in longer lines; nothing is cut. Raises ValueError for no rows,
    rows of unequal tasks or without scores, two rows "individual", or a score of 0 in it.
    """
    header, *lines = _cells(rows, digits=3)
    console = console or Console()
    table = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="left" if number < 2 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    wide = console.options.update(max_width=10_000)
    table.width = Measurement.get(console, wide, table).maximum
    console.print(table, soft_wrap=True)


def write_markdown(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write the table of `print_table` as GitHub's Markdown. Raises as that does."""
    header, *lines = _cells(rows, digits=3)
    rule = [":--", ":--"] + ["--:"] * (len(header) - 2)
    text = "".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n"
        for line in [header, rule, *lines]
    )
    write_text(Path(path), text)


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write the table of `print_table` as CSV, with all digits. Raises as that does."""
    text = io.StringIO()
    csv.writer(text).writerows(_cells(rows, digits=None))
    write_text(Path(path), text.getvalue(), newline="")


def plot_scores(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw a table of the scores in colour, methods by tasks, beside bars of their averages.

    The colour is the score relative to "individual", white at 1, so that easy and hard tasks
    compare; without that row it is the score itself. The format follows the suffix of `path`
    (png, pdf, svg, ...). Raises as `print_table` does, and ModuleNotFoundError where matplotlib
    is missing.
    """
    individual = _individual(rows)
    tasks = list(rows[0].scores)
    scores = np.array([[row.scores[task] for task in tasks] for row in rows])  # (rows, tasks)
    averages = [average(row) for row in rows]
    figure = _figure(width=4.6 + 0.8 * len(tasks), height=1.6 + 0.36 * len(rows))
    table, bars = figure.subplots(1, 2, sharey=True, width_ratios=[0.8 * len(tasks), 2.4])

    if individual is None:
        image = table.imshow(scores, cmap="Blues", aspect="auto")
        figure.colorbar(image, ax=bars, label="score")
    else:
        quotients = np.array([list(_quotients(row, individual).values()) for row in rows])
        limits = {"vmin": 1 - COLOUR_RANGE, "vmax": 1 + COLOUR_RANGE}
        image = table.imshow(quotients, cmap="RdBu", aspect="auto", **limits)
        scale = figure.colorbar(image, ax=bars, label="score / individual", extend="min")
        scale.ax.set_ylim(limits["vmin"], max(1.0, np.nanmax(quotients)))
        bars.axvline(average(individual), color="black", linewidth=1, linestyle="--")
        bars.set_xlabel("dashed: individual")
    rgba = np.asarray(image.to_rgba(image.get_array()))  # (rows, tasks, 4); nan is transparent
    lightness = rgba[..., :3] @ [0.3, 0.6, 0.1] + 1 - rgba[..., 3]
    for (i, j), score in np.ndenumerate(scores):
        ink = "black" if lightness[i, j] > 0.5 else "white"
        table.text(j, i, f"{score:.3f}", ha="center", va="center", color=ink)
    table.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", rotation_mode="anchor")
    table.set_yticks(range(len(rows)), _labels(rows))
    table.set_title("score by task")
    table.tick_params(length=0)
    table.spines[:].set_visible(False)

    drawn = bars.barh(range(len(rows)), averages, color="0.45", height=0.7)
    bars.bar_label(drawn, fmt="%.3f", label_type="center", color="white")
    bars.set_title("average")
    bars.tick_params(axis="y", length=0)
    bars.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_residuals(
    labelled: Mapping[str, Mapping[str, Residuals]], path: str | os.PathLike[str]
) -> None:
    """Draw how a solver converged: {label: {block: object with `.residuals`}}.

    For each label the median over its blocks at each iteration, a band between the quartiles, and
    each block as a faint line; the residual's axis is logarithmic. A block that stopped before
    others counts with its last residual from there on. Blocks without residuals (solved in closed
    form) are not drawn; the legend says how many are.

    Raises ValueError where there is no residual at all, and ModuleNotFoundError where matplotlib
    is missing.
    """
    curves = {
        label: [list(block.residuals) for block in blocks.values() if len(block.residuals)]
        for label, blocks in labelled.items()
    }
    if not any(curves.values()):
        raise ValueError(
            f"no residuals to draw (labels: {', '.join(labelled) or 'none'}): expected at least "
            "one block that was solved by iteration"
        )
    figure = _figure(width=7.5, height=4.8)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for number, (label, lines) in enumerate(curves.items()):
        if lines:
            _draw_curves(axes, lines, f"{label}: median of {len(lines)} blocks", f"C{number}")
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("relative residual |b - Cθ| / |b|")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", frameon=False)
    _save(figure, path)


def plot_seconds(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str],
    individual: float | None = None,
) -> None:
    """Draw average scores against seconds: {label: [(seconds, average), ...]}.

    A dashed line is the individual models' average. Raises ValueError where there is no point at
    all, and ModuleNotFoundError where matplotlib is missing.
    """
    if not any(curves.values()):
        raise ValueError("no points to draw: expected pairs of seconds and an average")
    figure = _figure(width=6.4, height=4.2)
    axes = figure.subplots()
    for label, points in curves.items():
        seconds, scores = zip(*points, strict=True) if points else ((), ())
        axes.plot(seconds, scores, marker="o", label=label)
    if individual is not None:
        axes.axhline(individual, color="black", linewidth=1, linestyle="--", label=INDIVIDUAL)
    axes.set_xlabel("seconds")
    axes.set_ylabel("average score")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", frameon=False)
    _save(figure, path)


def _draw_curves(axes: "Axes", lines: list[list[float]], label: str, colour: str) -> None:
    length = max(map(len, lines))
    steps = np.arange(length)
    for line in lines:
        axes.plot(steps[: len(line)], line, color=colour, linewidth=0.6, alpha=0.2)
    held = np.array([line + line[-1:] * (length - len(line)) for line in lines])  # (blocks, length)
    lower, median, upper = np.quantile(held, [0.25, 0.5, 0.75], axis=0)
    axes.fill_between(steps, lower, upper, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, median, color=colour, linewidth=2, label=label)


def _individual(rows: Sequence[Row]) -> Row | None:
    """The row of reference, after the checks that every table and figure needs."""
    if not rows:
        raise ValueError("no rows to report: expected one a method")
    for row in rows:
        _check_tasks(row, rows[0])
    found = [row for row in rows if row.method == INDIVIDUAL]
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} rows have the method {INDIVIDUAL!r}; expected at most one, to which the "
            "others are related. Give the others another name"
        )
    return found[0] if found else None


def _check_tasks(row: Row, reference: Row) -> None:
    if row.scores.keys() != reference.scores.keys():
        raise ValueError(
            f"rows {row.method!r} and {reference.method!r} are of unequal tasks: "
            f"{sorted(row.scores)} and {sorted(reference.scores)}. Evaluate both on the same tasks"
        )


def _quotients(row: Row, individual: Row) -> dict[str, float]:
    _check_tasks(row, individual)
    zero = [task for task, score in individual.scores.items() if score == 0]
    if zero:
        raise ValueError(
            f"the individual score is 0 on {', '.join(zero)}, so no score is relative to it. Leave "
            "the task out, or take a metric that is above 0"
        )
    return {task: row.scores[task] / score for task, score in individual.scores.items()}


def _cells(rows: Sequence[Row], digits: int | None) -> list[list[str]]:
    """The header and the rows as text; numbers are rounded to `digits`, None keeps them all."""
    individual = _individual(rows)
    tasks = list(rows[0].scores)
    lines = [["method", "settings", *tasks, "average"] + ["relative"] * (individual is not None)]
    for row in rows:
        numbers = [*(row.scores[task] for task in tasks), average(row)]
        if individual is not None:
            numbers.append(relative(row, individual))
        cells = [str(number) if digits is None else f"{number:.{digits}f}" for number in numbers]
        lines.append([row.method, row.settings, *cells])
    return lines


def _labels(rows: Sequence[Row]) -> list[str]:
    """Methods, with their settings where the same method stands in several rows."""
    count = Counter(row.method for row in rows)
    return [
        f"{row.method}, {row.settings}" if count[row.method] > 1 and row.settings else row.method
        for row in rows
    ]


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the figures need matplotlib: pip install 'mats_lightning[recipes]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")  # no pyplot: no window, no state


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=160))
