"""Merge and evaluate at one point, where it is not on disk yet."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from cells import Cell, Cells, Merge
from steps import Steps
from torch import Tensor

from mats_lightning import MergeModule, Task
from mats_lightning.evaluation import quiet_trainer


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
        self.trainer = quiet_trainer(accelerator=accelerator)
        self.cells = cells
        self.steps = steps
        self.only = only
        self._collect = collect

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
        return module.shared_state()


class Opened:
    """A merge on the bench: it is merged when one of its cells is missing, and not before."""

    def __init__(self, bench: Bench, merge: Merge, label: str) -> None:
        self._bench, self.merge, self._label = bench, merge, label
        self._module: MergeModule | None = None
        self._seconds = 0.0

    def module(self, count: int | None = None) -> MergeModule:
        """Merged now, if it is not yet; with a `count` to the state after it alone."""
        if self._module is None:
            if count is not None:
                self.merge = replace(self.merge, counts=(count,))
            if self.merge.statistics is not None:
                self._bench.steps.show(f"{self._label}: statistics")
            self._module = self._bench.module(self.merge)
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
        found = bench.cells.find(self.merge, count, split)
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
            max(self.merge.counts),
            median(curve[-1] for curve in curves.values()) if curves else None,
            {n: _short(curve) for n, curve in curves.items()},
        )
        bench.cells.keep(self.merge.key(count, split), cell)
        return cell


def _short(curve: Sequence[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in curve]


def evaluate(
    module: MergeModule, run: Callable[..., Any], only: str | None = None
) -> dict[str, float]:
    """The tasks' primary metrics, or that of `only`; `run` is a trainer's `validate` or `test`."""
    with nullcontext() if only is None else module.only(only):
        run(module, verbose=False)
    return dict(module.scores)
