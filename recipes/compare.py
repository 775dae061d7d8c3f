"""Merge by every method, choose its settings on validation rows, and test what was chosen."""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import lightning as L
from merge_options import MethodOptions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn
from torch import Tensor

from mats_lightning import MergeModule, Task
from mats_lightning.report import Row

__all__ = ["Attempt", "Comparison", "Outcome"]

NOT_A_MERGE = ("individual", "pretrained")  # rows to compare with, not to export


@dataclass(frozen=True)
class Attempt:
    """One point of a method's grid, evaluated on the validation slices."""

    settings: dict[str, Any]
    scores: dict[str, float]
    merge_seconds: float | None  # None where an earlier attempt's merge passed through this one
    evaluation_seconds: float

    @property
    def average(self) -> float:
        return mean(self.scores.values())


@dataclass(frozen=True)
class Outcome:
    """One line of the table: the attempt that was best on validation, and its scores on test."""

    label: str
    method: str
    chosen: Attempt
    scores: dict[str, float]
    test_seconds: float
    attempts: list[Attempt]
    blocks: Mapping[str, Any]  # the merge's report a block, of its last iteration

    @property
    def row(self) -> Row:
        """Numbers and flags as the settings: words, such as an objective, are in the label."""
        settings = self.chosen.settings.items()
        words = [f"{name} {value}" for name, value in settings if isinstance(value, int | float)]
        return Row(self.label, ", ".join(words), self.scores)

    def as_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "method": self.method,
            "chosen": self.chosen.settings,
            "validation_average": self.chosen.average,
            "test_scores": self.scores,
            "test_average": mean(self.scores.values()),
            "test_seconds": self.test_seconds,
            "attempts": [asdict(attempt) for attempt in self.attempts],
        }


class Comparison:
    """Runs one method after the other over the same tasks, with one trainer for all evaluations.

    It holds at most three merges at a time: the best of all so far (`best`, to be exported), the
    best of the method at work, and the one that is being evaluated.

    Args:
        tasks: the fine-tuned tasks; their rows are tokenised once.
        pretrained: the weights that all tasks started from, by the names of their modules.
        pretrained_heads: the head that each head group started with.
        accelerator: for the evaluations.
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
        self.trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        self.individual: dict[str, float] | None = None
        self.best: tuple[MergeModule, Attempt] | None = None

    def run(self, methods: Mapping[str, MethodOptions]) -> list[Outcome]:
        """The outcomes of the individual models, then of each method under its label."""
        methods = {"individual": MethodOptions("individual"), **methods}
        evaluations = sum(method.size() + 1 for method in methods.values())
        outcomes = []
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ) as progress:
            bar = progress.add_task("", total=evaluations)
            for label, method in methods.items():
                progress.update(bar, description=label)
                outcomes.append(self._compare(label, method, lambda: progress.advance(bar)))
                if method.method == "individual":
                    self.individual = outcomes[-1].scores
                gc.collect()  # a module and its hooks refer to each other: free them now
        return outcomes

    def _compare(self, label, method, advance):
        attempts: list[Attempt] = []
        best: tuple[MergeModule, Attempt] | None = None
        for options, counts in method.merges():
            module = MergeModule(
                self.tasks,
                method=method.method,
                options=options,
                pretrained=self.pretrained,
                pretrained_heads=self.pretrained_heads,
                individual=self.individual,
            )
