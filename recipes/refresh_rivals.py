"""What training reaches on the rows of a refresh: the rivals that it must be held against."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from statistics import mean
from typing import Any

import lightning as L
import torch
from classifier import Classifier
from labelled_data import LabelledData
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from merge_options import Options
from multitask_model import Interleaved, MultitaskClassifier, accuracies
from process import return_memory
from torch.utils.data import DataLoader
from train_tasks import task_module
from typing_extensions import override

from mats_lightning import MergeModule, RefreshPlan, Task
from mats_lightning.batches import first_rows
from mats_lightning.evaluation import quiet_trainer

WARM_UP = 0.1  # of all steps, or of the time


@dataclass(frozen=True)
class Rival:
    """What a training reached: the primary metric a task, on validation rows; and its model."""

    validated: dict[str, float]
    seconds: float
    steps: int
    model: MultitaskClassifier
    tasks: Sequence[Task]
    tester: L.Trainer

    @property
    def average(self) -> float:
        """On validation rows."""
        return mean(self.validated.values())

    def tested(self) -> dict[str, float]:
        """The same on test rows, measured now."""
        return accuracies(self.model, rows_of(self.tasks), self.tester.test)


@dataclass(frozen=True)
class Start:
    """Training goes on from the merge that is in the module, under its heads, for some seconds."""

    module: MergeModule
    seconds: float


class TimedClassifier(MultitaskClassifier):
    """A multitask classifier whose learning rate rises and falls by the clock.

    Over the first tenth of `seconds` it rises, over the rest it falls to zero, as it does over the
    steps of the other trainings.
    """

    def __init__(self, *args: Any, seconds: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seconds = seconds
        self.started: float | None = None

    @override
    def on_train_start(self) -> None:
        self.started = time.perf_counter()

    def rate(self, step: int) -> float:
        """The share of the highest learning rate, now."""
        gone = 0.0 if self.started is None else time.perf_counter() - self.started
        share = min(gone / self.seconds, 1.0)
        return min(share / WARM_UP, (1 - share) / (1 - WARM_UP))

    @override
    def on_train_epoch_start(self) -> None:
        """How many epochs there will be is not known."""
        torch.manual_seed(self.seed * 1000 + self.current_epoch)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        first = next(iter(self.classifiers.values()))
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=first.learning_rate, weight_decay=first.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_rival(
    options: Options,
    tasks: Sequence[Task],
    plan: RefreshPlan,
    learning_rate: float,
    start: Start | None = None,
) -> Rival:
    """All tasks together, on the rows of the plan.

    By default from before the fine-tunes, with their heads and epochs.
    """
    options = replace(options, learning_rate=learning_rate)
    if start is None:
        of = {task.name: data(task) for task in tasks}
        fresh = {task.name: task_module(options, task, of[task.name]) for task in options.task_list}
        together = MultitaskClassifier(fresh, groups(tasks), options.seed)
        return _train(options, plan, tasks, together, {"max_epochs": options.epochs})
    merged = {task.name: classifier(start.module, task) for task in tasks}
    for one in merged.values():
        one.learning_rate = learning_rate
    timed = TimedClassifier(merged, groups(tasks), options.seed, seconds=start.seconds)
    timer = Timer(timedelta(seconds=start.seconds))
    return _train(options, plan, tasks, timed, {"max_epochs": -1, "callbacks": [timer]})


def classifier(module: MergeModule, task: Task) -> Classifier:
    """The task's, with the merged weights."""
    found = module.model(task.name).train()
    assert isinstance(found, Classifier)
    return found


def rows_of(tasks: Sequence[Task]) -> dict[str, Any]:
    return {task.name: task.data for task in tasks}


def data(task: Task) -> LabelledData:
    assert isinstance(task.data, LabelledData)
    return task.data


def groups(tasks: Sequence[Task]) -> dict[str, str]:
    return {task.name: task.head_group for task in tasks if task.head_group is not None}


def _train(
    options: Options,
    plan: RefreshPlan,
    tasks: Sequence[Task],
    module: MultitaskClassifier,
    limit: dict[str, Any],
) -> Rival:
    L.seed_everything(options.seed, verbose=False)
    limit = {**limit, "callbacks": [RichProgressBar(), *limit.get("callbacks", [])]}
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **limit,
    )
    loaders = [shuffled(task, plan) for task in tasks]
    started = time.perf_counter()
    trainer.fit(module, train_dataloaders=Interleaved(loaders))
    seconds, steps = time.perf_counter() - started, trainer.global_step
    del trainer
    return_memory()
    tester = quiet_trainer(accelerator=options.accelerator)
    validated = accuracies(module, rows_of(tasks), tester.validate)
    return Rival(validated, seconds, steps, module, tasks, tester)


def shuffled(task: Task, plan: RefreshPlan) -> DataLoader[Any]:
    """The rows that the refresh took its statistics from, in a new order each epoch."""
    rows = first_rows(task.dataloader("fit", None), plan.rows, plan.seed)
    return DataLoader(
        rows.dataset, batch_size=rows.batch_size, shuffle=True, collate_fn=rows.collate_fn
    )
