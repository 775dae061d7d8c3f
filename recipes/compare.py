"""Merge by every method, choose its settings on validation rows, and test what was chosen."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any, TypeVar

import lightning as L
from merge_options import MethodOptions
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from mats_lightning import MergeModule, Task
from mats_lightning.report import Row

__all__ = ["Attempt", "Comparison", "Outcome", "evaluate", "evaluation_trainer"]

REFERENCES = ("individual", "pretrained")  # rows to compare with: nothing is merged

T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """One point of a method's grid, on the validation slices; references have no scores there."""

    settings: dict[str, Any]
    scores: dict[str, float]
    seconds: float

    @property
    def average(self) -> float:
        return mean(self.scores.values()) if self.scores else math.nan

    @property
    def iterations(self) -> int:
        """What `MergeModule.use` takes: 0 for a method without iterations."""
        return int(self.settings.get("iterations", 0))


@dataclass(frozen=True)
class Outcome:
    """One line of the table: the attempt that was best on validation, and its scores on test."""

    label: str
    method: str
    chosen: Attempt
    scores: dict[str, float]
    attempts: list[Attempt]
    merge_seconds: float  # of all merges; points that differ in `iterations` alone share one
    test_seconds: float
    blocks: Mapping[str, Any] = field(repr=False)  # reports of the merge's last iteration

    @property
    def row(self) -> Row:
        """The label says which objective and preconditioner; the settings are the numbers."""
        settings = self.chosen.settings.items()
        words = [f"{name} {value}" for name, value in settings if isinstance(value, int | float)]
        return Row(self.label, ", ".join(words), self.scores)

    @property
    def line(self) -> str:
        points, seconds = len(self.attempts), self.merge_seconds
        line = f"{self.label}: {mean(self.scores.values()):.3f} on test"
        if self.method in REFERENCES:
            return line
        return (
            f"{line}, {self.chosen.average:.3f} on validation (the best of {points}), "
            f"{seconds:.0f} s of merging"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "method": self.method,
            "settings": self.chosen.settings,
            "validation_average": self.chosen.average if self.chosen.scores else None,
            "test_average": mean(self.scores.values()),
            "test_scores": self.scores,
            "merge_seconds": self.merge_seconds,
            "test_seconds": self.test_seconds,
            "grid": [asdict(attempt) for attempt in self.attempts],
        }


class Comparison:
    """Runs the methods one after the other over the same tasks, with one trainer for all.

    Merges are dropped as soon as a better one is known: the best of all (`best`), the best of the
    method at work and the newest are in memory, no others, and but for the newest one state of
    each.

    Args:
        tasks: the fine-tuned tasks; all evaluations share their data.
        pretrained: the weights that all tasks started from, by the names of their modules.
        pretrained_heads: the head that each head group started with.
        accelerator: for merging and evaluating.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        pretrained: Mapping[str, Tensor],
        pretrained_heads: Mapping[str, Mapping[str, Tensor]],
        accelerator: str,
    ) -> None:
        self.tasks = tasks
        self.pretrained = pretrained
        self.pretrained_heads = pretrained_heads
        self.trainer = evaluation_trainer(accelerator)
        self.individual: dict[str, float] | None = None
        self.best: tuple[Outcome, MergeModule] | None = None

    def run(self, methods: Mapping[str, MethodOptions]) -> list[Outcome]:
        """The outcomes of the individual models, then of each method under its label."""
        methods = {"individual": MethodOptions("individual"), **methods}
        # a step is a merge, a point of a grid on validation, or a method on test
        steps = sum(
            1 + len(counts) * (m.method not in REFERENCES)
            for m in methods.values()
            for _, counts in m.merges()
        )
        outcomes = []
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("to go:"),
            TimeRemainingColumn(elapsed_when_finished=False),
        ) as self._progress:
            self._bar = self._progress.add_task("", total=steps + len(methods))
            for label, method in methods.items():
                outcomes.append(self._compare(label, method))
                self._progress.console.print(outcomes[-1].line, highlight=False, soft_wrap=True)
        return outcomes

    def _compare(self, label: str, method: MethodOptions) -> Outcome:
        attempts: list[Attempt] = []
        kept: tuple[Attempt, MergeModule, Mapping[str, Any]] | None = None
        merge_seconds = 0.0
        for options, counts in method.merges():
            module = self._module(method.method, options)
            device = self.trainer.strategy.root_device
            _, seconds = self._step(f"{label}: merge", module.merge, device, False)
            merge_seconds += seconds
            tried = [self._attempt(label, method, module, options, count) for count in counts]
            attempts += tried
            best = max(tried, key=lambda attempt: attempt.average)
            if kept is None or best.average > kept[0].average:
                module.use(max(counts))
                kept = best, module, module.blocks
                module.use(best.iterations, only=True)
        assert kept is not None
        chosen, module, blocks = kept
        module.use(chosen.iterations)  # in the tasks' modules, where the newest merge is
        scores, seconds = self._step(f"{label}: test", evaluate, module, self.trainer.test)
        outcome = Outcome(
            label, method.method, chosen, scores, attempts, merge_seconds, seconds, blocks
        )
        if method.method == "individual":
            self.individual = scores
        better = self.best is None or chosen.average > self.best[0].chosen.average
        if method.method not in REFERENCES and better:
            self.best = outcome, module
        return outcome

    def _attempt(
        self,
        label: str,
        method: MethodOptions,
        module: MergeModule,
        options: dict[str, Any],
        count: int,
    ) -> Attempt:
        settings = {**options, "iterations": count} if count else options
        module.use(count)
        if method.method in REFERENCES:
            return Attempt(settings, {}, 0.0)
        scores, seconds = self._step(
            f"{label}: validation", evaluate, module, self.trainer.validate
        )
        return Attempt(settings, scores, seconds)

    def _module(self, method: str, options: Mapping[str, Any]) -> MergeModule:
        return MergeModule(
            self.tasks,
            method=method,
            options=options,
            pretrained=self.pretrained,
            pretrained_heads=self.pretrained_heads,
            individual=self.individual,
        )

    def _step(self, description: str, action: Callable[..., T], *arguments: Any) -> tuple[T, float]:
        """What `action` returns, and its seconds; shown in the progress bar."""
        self._progress.update(self._bar, description=description)
        started = time.perf_counter()
        result = action(*arguments)
        self._progress.advance(self._bar)
        return result, round(time.perf_counter() - started, 2)


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


def evaluate(module: MergeModule, run: Callable[..., Any]) -> dict[str, float]:
    """The tasks' primary metrics; `run` is a trainer's `validate` or `test`."""
    run(module, verbose=False)
    return dict(module.scores)
