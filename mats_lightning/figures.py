"""Results of merge methods on many tasks: figures."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mats_lightning.files import write_atomically
from mats_lightning.report import INDIVIDUAL, Row, average, individual_row, quotients

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR_RANGE = 0.4  # around 1: what is worse looks alike, so that the good methods differ


def plot_scores(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw a table of the scores in colour, methods by tasks, beside bars of their averages.

    The colour is the score relative to "individual", white at 1, so that easy and hard tasks
    compare; without that row it is the score itself. The format follows the suffix of `path`
    (png, pdf, svg, ...). Raises as `print_table` does, and ModuleNotFoundError where matplotlib
    is missing.
    """
    individual = individual_row(rows)
    tasks = list(rows[0].scores)
    scores = np.array([[row.scores[task] for task in tasks] for row in rows])  # (rows, tasks)
    averages = [average(row) for row in rows]
    figure = _figure(width=4.6 + 0.8 * len(tasks), height=1.6 + 0.36 * len(rows))
    table, bars = figure.subplots(1, 2, sharey=True, width_ratios=[0.8 * len(tasks), 2.4])

    if individual is None:
        image = table.imshow(scores, cmap="Blues", aspect="auto")
        figure.colorbar(image, ax=bars, label="score")
    else:
        shares = np.array([list(quotients(row.scores, individual.scores).values()) for row in rows])
        limits = {"vmin": 1 - COLOUR_RANGE, "vmax": 1 + COLOUR_RANGE}
        image = table.imshow(shares, cmap="RdBu", aspect="auto", **limits)
        scale = figure.colorbar(image, ax=bars, label="score / individual", extend="min")
        scale.ax.set_ylim(limits["vmin"], max(1.0, np.nanmax(shares)))
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
    labelled: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike[str]
) -> None:
    """Draw how a solver converged: {label: {block: residuals}}.

    The residuals of a block are |b - C theta| / |b| at the start and after each iteration.
    For each label the median over its blocks at each iteration, a band between the quartiles, and
    each block as a faint line; the residual's axis is logarithmic. A block that stopped before
    others counts with its last residual from there on. Blocks without residuals (solved in closed
    form) are not drawn; the legend says how many are.

    Raises ValueError where there is no residual at all, and ModuleNotFoundError where matplotlib
    is missing.
    """
    curves = {
        label: [list(residuals) for residuals in blocks.values() if len(residuals)]
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
