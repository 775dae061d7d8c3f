"""Tables are read back cell by cell; of figures, what they drew is looked up."""

import csv
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from rich.console import Console

from mats_lightning.figures import plot_residuals, plot_scores, plot_seconds
from mats_lightning.report import (
    Row,
    average,
    print_table,
    relative,
    write_csv,
    write_markdown,
)

INDIVIDUAL = Row("individual", "", {"trec": 0.8, "sms": 1.0, "nyt": 0.5})
MERGED = Row("mats kfac", "iterations 20", {"trec": 0.6, "sms": 0.9, "nyt": 0.5})
AVERAGE = Row("average", "", {"nyt": 0.25, "sms": 0.4, "trec": 0.4})  # in another order
ROWS = [INDIVIDUAL, MERGED, AVERAGE]
HEADER = ["method", "settings", "trec", "sms", "nyt", "average", "relative"]
CELLS = [  # worked out by hand
    ["individual", "", "0.800", "1.000", "0.500", "0.767", "1.000"],
    ["mats kfac", "iterations 20", "0.600", "0.900", "0.500", "0.667", "0.883"],
    ["average", "", "0.400", "0.400", "0.250", "0.350", "0.467"],
]
OUTPUTS: list[Callable[[Sequence[Row], Path], None]] = [
    lambda rows, path: print_table(rows, "title", Console(file=io.StringIO())),
    write_markdown,
    write_csv,
    lambda rows, path: plot_scores(rows, path.with_suffix(".png")),
]
output = pytest.mark.parametrize("write", OUTPUTS, ids=["print", "markdown", "csv", "plot"])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures = []
    save = Figure.savefig

    def recorded(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", recorded)
    return figures


def printed(rows: Sequence[Row], width: int = 200) -> list[str]:
    file = io.StringIO()
    print_table(rows, "Scores [test]", Console(file=file, width=width))
    return file.getvalue().splitlines()


def test_average_and_relative() -> None:
    assert average(MERGED) == pytest.approx(2.0 / 3)
    assert relative(MERGED.scores, INDIVIDUAL.scores) == pytest.approx((0.75 + 0.9 + 1.0) / 3)
    assert relative(AVERAGE.scores, INDIVIDUAL.scores) == pytest.approx((0.5 + 0.4 + 0.5) / 3)
    assert relative(INDIVIDUAL.scores, INDIVIDUAL.scores) == 1.0


@pytest.mark.parametrize("width", [80, 20, 200])
def test_printed_table_is_whole_on_any_console(width: int) -> None:
    title, *lines = printed(ROWS, width)
    assert title.strip() == "Scores [test]"
    cells = [[cell.strip() for cell in line[1:-1].split("│")] for line in lines if "│" in line]
    assert cells == CELLS
    (header,) = (line for line in lines if "trec" in line)
    assert [cell.strip() for cell in header[1:-1].split("┃")] == HEADER


def test_printed_names_are_no_markup() -> None:
    rows = [Row("[bold]ties[/bold]", "[0.2]", {"[task]": 1.0})]
    text = "\n".join(printed(rows))
    for name in ("[bold]ties[/bold]", "[0.2]", "[task]"):
        assert name in text


def test_markdown(tmp_path: Path) -> None:
    write_markdown(ROWS, tmp_path / "new" / "table.md")
    lines = (tmp_path / "new" / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert cells[0] == HEADER
    assert cells[1] == [":--"] * 2 + ["--:"] * 5
    assert cells[2:] == CELLS


def test_markdown_escapes_what_would_end_a_cell(tmp_path: Path) -> None:
    write_markdown([Row("a|b", "", {"t": 1.0})], tmp_path / "table.md")
    assert r"| a\|b |" in (tmp_path / "table.md").read_text()


def test_csv_has_all_digits(tmp_path: Path) -> None:
    third = Row("third", "a, b", {"trec": 1 / 3, "sms": 0.1, "nyt": 0.7})
    write_csv([INDIVIDUAL, third], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == HEADER
    assert second["settings"] == "a, b"
    assert {task: float(second[task]) for task in third.scores} == third.scores
    assert float(second["average"]) == average(third)
    assert float(second["relative"]) == relative(third.scores, INDIVIDUAL.scores)


def test_without_individual_there_is_no_relative_column(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    rows = [MERGED, AVERAGE]
    assert not any("relative" in line for line in printed(rows))
    write_csv(rows, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == ",".join(HEADER[:-1])
    plot_scores(rows, tmp_path / "scores.png")
    assert drawn[0].axes[-1].get_ylabel() == "score"


@output
def test_rows_of_unequal_tasks_are_named(
    tmp_path: Path, write: Callable[[Sequence[Row], Path], None]
) -> None:
    other = Row("ties", "", {"trec": 0.5, "sms": 0.5})
    expected = r"'ties' and 'individual' are of unequal tasks: \['sms', 'trec'\] and \['nyt'"
    with pytest.raises(ValueError, match=expected):
        write([*ROWS, other], tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@output
@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows to report"),
        ([Row("ties", "", {})], "'ties' has no scores"),
        ([INDIVIDUAL, INDIVIDUAL], "2 rows have the method 'individual'"),
        (
            [Row("individual", "", {"trec": 0.0}), Row("ties", "", {"trec": 0.5})],
            "individual score is 0 on trec",
        ),
    ],
    ids=["no rows", "no scores", "two individual", "zero"],
)
def test_rows_that_make_no_table(
    tmp_path: Path, write: Callable[[Sequence[Row], Path], None], rows: list[Row], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(rows, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_scores_of_other_tasks() -> None:
    other = Row("ties", "", {"trec": 1.0})
    with pytest.raises(ValueError, match="'ties' and 'individual' are of unequal tasks"):
        print_table([INDIVIDUAL, other], "title")
    for scores, individual in ((INDIVIDUAL.scores, other.scores), ({}, {})):
        with pytest.raises(ValueError, match="of unequal tasks, or of none"):
            relative(scores, individual)


def test_plot_of_scores_shows_every_number(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_scores(ROWS, tmp_path / "scores.png")
    table, bars, scale = drawn[0].axes
    texts = {text.get_position(): text.get_text() for text in table.texts}
    assert texts == {(j, i): CELLS[i][2 + j] for i in range(3) for j in range(3)}
    assert [label.get_text() for label in table.get_xticklabels()] == HEADER[2:5]
    assert [label.get_text() for label in table.get_yticklabels()] == [row[0] for row in CELLS]
    assert [bar.get_width() for bar in bars.containers[0]] == [average(row) for row in ROWS]
    assert [text.get_text() for text in bars.texts] == [row[5] for row in CELLS]
    assert scale.get_ylabel() == "score / individual"
    colours = table.images[0].get_array()
    assert colours is not None
    expected = np.array([[1, 1, 1], [0.75, 0.9, 1], [0.5, 0.4, 0.5]])
    np.testing.assert_allclose(colours, expected)
    np.testing.assert_array_equal(bars.lines[0].get_xdata(), average(INDIVIDUAL))
    pixels = image.imread(tmp_path / "scores.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_plot_tells_two_rows_of_a_method_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [Row("ties", "density 0.1", {"a": 0.5}), Row("ties", "density 0.2", {"a": math.nan})]
    plot_scores(rows, tmp_path / "scores.svg")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["ties, density 0.1", "ties, density 0.2"]
    assert drawn[0].axes[0].texts[1].get_color() == "black"  # nan stands on white
    assert (tmp_path / "scores.svg").read_text().startswith("<?xml")


def test_plot_of_residuals(tmp_path: Path, drawn: list[Figure]) -> None:
    plain = {
        "q": [1.0, 0.5, 0.25],
        "k": [1.0, 0.1],  # stopped early: 0.1 from there on
        "v": [1.0, 0.3, 0.2],
        "bias": [],
    }
    plot_residuals({"plain": plain, "direct": {"a": []}}, tmp_path / "residuals.png")
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "iteration"
    assert "relative residual" in axes.get_ylabel()
    *single, median = axes.lines
    assert [list(np.asarray(line.get_ydata())) for line in single] == [
        [1.0, 0.5, 0.25],
        [1.0, 0.1],
        [1.0, 0.3, 0.2],
    ]
    np.testing.assert_array_equal(median.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(median.get_ydata(), [1.0, 0.3, 0.2])
    (band,) = axes.collections
    corners = {
        (round(float(x)), round(float(y), 6)) for x, y in np.asarray(band.get_paths()[0].vertices)
    }
    assert corners == {(0, 1.0), (1, 0.2), (1, 0.4), (2, 0.15), (2, 0.225)}
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain: median of 3 blocks"]
    assert image.imread(tmp_path / "residuals.png").shape[0] > 300


def test_plot_of_seconds(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = {"refresh": [(0.0, 0.7), (60.0, 0.8)], "training": [(90.0, 0.85)]}
    plot_seconds(curves, tmp_path / "seconds.png", individual=0.9)
    (axes,) = drawn[0].axes
    found = [list(zip(*map(np.asarray, line.get_data()), strict=True)) for line in axes.lines[:2]]
    assert found == list(curves.values())
    assert list(np.asarray(axes.lines[2].get_ydata())) == [0.9, 0.9]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [*curves, "individual"]
    assert image.imread(tmp_path / "seconds.png").shape[0] > 300
    with pytest.raises(ValueError, match="no points to draw"):
        plot_seconds({"refresh": []}, tmp_path / "none.png")


def test_plot_of_a_residual_that_is_zero(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_residuals({"exact": {"a": [1.0, 0.0], "b": [1.0, 1e-9]}}, tmp_path / "r.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert 0 < low < 1e-9 < 1 < high


@pytest.mark.parametrize("labelled", [{}, {"plain": {}}, {"plain": {"bias": []}}])
def test_no_residuals(tmp_path: Path, labelled: dict[str, dict[str, list[float]]]) -> None:
    with pytest.raises(ValueError, match=f"labels: {', '.join(labelled) or 'none'}"):
        plot_residuals(labelled, tmp_path / "residuals.png")


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.png"
    path.write_text("old")

    def half(figure: Figure, file: Path, **options: object) -> None:
        file.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        plot_scores(ROWS, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mats_lightning\[recipes\]'"):
        plot_scores(ROWS, tmp_path / "scores.png")
