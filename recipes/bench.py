"""Merge and evaluate at one point, where it is not on disk yet; and the progress of doing so."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Self, TypeVar

import lightning as L
from cells import Cells
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor

from mats_lightning import MergeModule, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Merge:
    """A merge by what decides it, in names and numbers alone, so that it can be looked up.

    Args:
        method: of MergeModule.
        options: its keyword arguments, `iterations` left out.
        counts: the iterations whose states are looked at; one run passes through all of them. A
            method without iterations has the one count 0.
        start: the merge whose state is `init`.
        statistics: settings of a pass over training rows, in place of the training's statistics.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (0,)
    start: "Merge | None" = None
    statistics: Mapping[str, Any] | None = None

    def key(self, count: int, split: str) -> dict[str, Any]:
        """Of the cell of the state after `count` iterations, on "validation" or "test" rows."""
        return {**self._key(), "iterations": count, "split": split}

    def _key(self) -> dict[str, Any]:
        key: dict[str, Any] = {"method": self.method, "options": dict(self.options)}
        if self.start is not None:
            key["start"] = self.start._key()
            if last := max(self.start.counts):  # whose state it is
                key["start"]["iterations"] = last
        if self.statistics is not None:
            key["statistics"] = dict(self.statistics)
        return key


@dataclass(frozen=True)
class Cell:
    """What was measured at one point.

    Args:
        scores: the primary metric a task.
        merge_seconds: of the merge, up to its `merge_iterations`: points that differ in their
            iterations alone share one. Of a refresh or a training: its own, without the merge.
        seconds: of the evaluation.
        residuals: block -> the solver's relative residuals, up to this cell's own iterations.
        residual: the median of their last ones over the blocks; None without.
        flops: where they were counted; then `seconds` are of what was counted.
    """

    scores: dict[str, float]
    seconds: float
    merge_seconds: float = 0.0
    merge_iterations: int = 0
    residual: float | None = None
    residuals: dict[str, list[float]] = field(default_factory=dict, repr=False)
    flops: float | None = None

    @property
    def average(self) -> float:
        return mean(self.scores.values())


def find_cell(cells: Cells, merge: Merge, count: int, split: str) -> Cell | None:
    """The cell of the state after `count` iterations, where it is on disk."""
    found = cells.find(merge.key(count, split))
    return None if found is None else Cell(**found)


Find = Callable[[Merge, int, str], Cell | None]  # (merge, count, split) -> its cell, if known


class Steps:
    """Runs steps under a bar: done / all, the time gone, and the time to go at the pace so far."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("to go: {task.fields[to_go]}"),
        )
        self._row = self._bar.add_task("", total=0, to_go="unknown")
        self._seconds, self._ran = 0.0, 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what has a bar of its own."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def expect(self, steps: int, done: int = 0) -> None:
        """This many steps more, of which some were done earlier."""
        task = self._bar.tasks[0]
        total, completed = (task.total or 0) + steps, int(task.completed) + done
        self._bar.update(self._row, total=total, completed=completed)

    def run(self, description: str, action: Callable[..., T], *arguments: Any) -> tuple[T, float]:
        """What `action` returns, and its seconds."""
        self._bar.update(self._row, description=description)
        started = time.perf_counter()
        result = action(*arguments)
        seconds = time.perf_counter() - started
        self._seconds, self._ran = self._seconds + seconds, self._ran + 1
        self._bar.advance(self._row)
        task = self._bar.tasks[0]
        left = max(0, int((task.total or 0) - task.completed)) * self._seconds / self._ran
        hours, minutes = divmod(int(left) // 60, 60)
        self._bar.update(self._row, to_go=f"{hours}:{minutes:02}:{int(left) % 60:02}")
        return result, round(seconds, 2)

    def show(self, description: str) -> None:
        """What is at work, where it is no step of its own."""
        self._bar.update(self._row, description=description)

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, soft_wrap=True)


class Bench:
    """The tasks, and one trainer to evaluate all of their merges with.

    Args:
        tasks: the fine-tuned tasks; all evaluations share their data.
        pretrained: the weights that all tasks started from, by the names of their modules.
        pretrained_heads: the head that each head group started with.
        accelerator: for merging and evaluating.
        cells: where finished measurements are looked up and kept.
        steps: what shows the progress.
        only: the task that alone is evaluated.
        collect: (task, settings) -> the path of statistics that were taken with these settings;
            for merges that ask for it.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        pretrained: Mapping[str, Tensor],
        pretrained_heads: Mapping[str, Mapping[str, Tensor]],
        accelerator: str,
        cells: Cells,
        steps: Steps,
        only: str | None = None,
        collect: Callable[[Task, Mapping[str, Any]], Path] | None = None,
    ) -> None:
        self.tasks = tasks
        self.pretrained = pretrained
        self.pretrained_heads = pretrained_heads
        self.trainer = evaluation_trainer(accelerator)
        self.cells = cells
        self.steps = steps
        self.only = only
        self._collect = collect

    def find(self, merge: Merge, count: int, split: str) -> Cell | None:
        return find_cell(self.cells, merge, count, split)

    def module(self, merge: Merge) -> MergeModule:
        """The module of a merge, which is not merged yet but for its start."""
        options = dict(merge.options)
        if merge.method == "mats":
            options["iterations"] = list(merge.counts)
        if merge.start is not None:
            options["init"] = self._start(merge.start)
        tasks = list(self.tasks)
        if merge.statistics is not None:
            if self._collect is None:
                raise ValueError(f"{merge.method}: nothing here collects {merge.statistics}")
            tasks = [
                replace(task, statistics=self._collect(task, merge.statistics)) for task in tasks
            ]
        return MergeModule(
            tasks,
            method=merge.method,
            options=options,
            pretrained=self.pretrained,
            pretrained_heads=self.pretrained_heads,
        )

    def _start(self, start: Merge) -> dict[str, Tensor]:
        """What all tasks share, in the state that `start` merges them to."""
        module = self.module(start)
        module.merge(self.trainer.strategy.root_device, progress=False)
        first = self.tasks[0]
        return {n: t for n, t in module.state_of(first.name).items() if not first.owns(n)}


class Opened:
    """A merge on the bench: it is merged when one of its cells is missing, and not before."""

    def __init__(self, bench: Bench, merge: Merge, label: str) -> None:
        self._bench, self._merge, self._label = bench, merge, label
        self._module: MergeModule | None = None
        self._seconds = 0.0

    def module(self, count: int | None = None) -> MergeModule:
        """Merged now, if it is not yet; with a `count` to the state after it alone."""
        if self._module is None:
            if count is not None:
                self._merge = replace(self._merge, counts=(count,))
            if self._merge.statistics is not None:
                self._bench.steps.show(f"{self._label}: statistics")
            self._module = self._bench.module(self._merge)
            device = self._bench.trainer.strategy.root_device
            what = f"{self._label}: merge"
            _, self._seconds = self._bench.steps.run(what, self._module.merge, device, False)
        return self._module

    def keep_only(self, count: int) -> None:
        """Let go of the other states, where any are there."""
        if self._module is not None:
            self._module.use(count, only=True)

    def cell(self, count: int, split: str, alone: bool = False) -> Cell:
        """From disk or measured now; `alone`: a merge that it needs stops at this count."""
        bench = self._bench
        found = bench.find(self._merge, count, split)
        if found is not None:
            return found
        module = self.module(count if alone else None)
        module.use(count)  # in the tasks' modules, where another merge may be
        run = bench.trainer.test if split == "test" else bench.trainer.validate
        scores, seconds = bench.steps.run(
            f"{self._label}: {split}", evaluate, module, run, bench.only
        )
        curves = {n: b.residuals for n, b in module.blocks.items() if b.residuals}
        cell = Cell(
            scores,
            seconds,
            self._seconds,
            max(self._merge.counts),
            median(curve[-1] for curve in curves.values()) if curves else None,
            {n: _short(curve) for n, curve in curves.items()},
        )
        bench.cells.keep(self._merge.key(count, split), asdict(cell))
        return cell


def _short(curve: Sequence[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in curve]


def evaluation_trainer(accelerator: str) -> L.Trainer:
    """A trainer for `validate` and `test` on one device, which says nothing."""
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def evaluate(
    module: MergeModule, run: Callable[..., Any], only: str | None = None
) -> dict[str, float]:
    """The tasks' primary metrics, or that of `only`; `run` is a trainer's `validate` or `test`."""
    if only is None:
        run(module, verbose=False)
        return dict(module.scores)
    task = module.tasks[only]  # in whose module the merged weights are
    (metrics,) = run(task.module, task.data, verbose=False)
    return {only: float(metrics[task.metric])}
