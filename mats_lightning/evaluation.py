"""TaskEvaluation: `trainer.test` of several tasks at once, each by its own module's step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from mats_lightning.passes import call_step
from mats_lightning.report import relative
from mats_lightning.tasks import Task

# hooks of a task's module that would run in its own test or validation, and do not in ours
NOT_RUN = tuple(
    f"on_{stage}_{hook}"
    for stage in ("test", "validation")
    for hook in ("start", "end", "batch_start", "batch_end")
)


class TaskEvaluation(pl.LightningModule):
    """Runs every task's own step on its own data, with what is in its module now.

    Reports "<task>/<metric>", "average" (of the tasks' primary metrics) and, when `individual` is
    given, "relative" (the mean of score / individual); `scores` has the primary metrics.

    Arguments:
        tasks: by their name.
        individual: task -> primary metric of its own model.
    """

    def __init__(
        self, tasks: Mapping[str, Task], individual: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self.modules_of_tasks = nn.ModuleList(task.module for task in tasks.values())
        self.scores: dict[str, float] = {}  # task -> primary metric, of the last run
        self._evaluated = self.tasks  # by a run: all of them, or one
        self._individual = dict(individual) if individual is not None else None
        self._check_individual()

    def _check_individual(self) -> None:
        if self._individual is None:
            return
        if odd := sorted(set(self._individual) ^ set(self.tasks)):
            raise ValueError(
                f"individual: '{odd[0]}' is no task, or is missing; the tasks are"
                f" {', '.join(self.tasks)}"
            )
        if zero := [name for name, score in self._individual.items() if not score]:
            raise ValueError(
                f"individual: '{zero[0]}' has the score 0, and nothing is relative to that; leave"
                " individual out, or name another metric in Task(metric=...)"
            )

    @contextmanager
    def only(self, task: str) -> Iterator[None]:
        """Within, a trainer evaluates this task alone, with what its module has in it now."""
        self._evaluated = {task: self.tasks[task]}
        try:
            yield
        finally:
            self._evaluated = self.tasks

    @override
    def setup(self, stage: str) -> None:
        for task in self._evaluated.values():
            for hook in NOT_RUN:
                if is_overridden(hook, task.module):
                    rank_zero_warn(
                        f"task '{task.name}': {type(task.module).__name__}.{hook} does not run in a"
                        f" {type(self).__name__}; do what it does in an epoch hook"
                    )
            with self._speaking_for(task):
                task.module.setup(stage)

    @override
    def test_dataloader(self) -> list[Any]:
        return self._loaders("test")

    @override
    def val_dataloader(self) -> list[Any]:
        return self._loaders("validate")

    def _loaders(self, stage: str) -> list[Any]:
        return [task.dataloader(stage, self.trainer) for task in self._evaluated.values()]

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step("test_step", batch, batch_idx, dataloader_idx)

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step("validation_step", batch, batch_idx, dataloader_idx)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._transfer("on_before_batch_transfer", dataloader_idx, batch)

    @override
    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return self._transfer("transfer_batch_to_device", dataloader_idx, batch, device)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._transfer("on_after_batch_transfer", dataloader_idx, batch)

    def _transfer(self, hook: str, dataloader_idx: int, *arguments: Any) -> Any:
        """As Lightning does it: the data module's hook where it has one, or else the module's."""
        task = list(self._evaluated.values())[dataloader_idx]
        of_data = isinstance(task.data, pl.LightningDataModule) and is_overridden(hook, task.data)
        with self._speaking_for(task):
            return getattr(task.data if of_data else task.module, hook)(*arguments, 0)

    def _step(self, hook: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        task = list(self._evaluated.values())[dataloader_idx]
        with self._speaking_for(task):
            call_step(getattr(task.module, hook), batch, batch_idx)

    @override
    def on_test_epoch_start(self) -> None:
        self._each("on_test_epoch_start")

    @override
    def on_validation_epoch_start(self) -> None:
        self._each("on_validation_epoch_start")

    @override
    def on_test_epoch_end(self) -> None:
        self._each("on_test_epoch_end")
        self._log_scores()

    @override
    def on_validation_epoch_end(self) -> None:
        self._each("on_validation_epoch_end")
        self._log_scores()

    def _each(self, hook: str) -> None:
        for task in self._evaluated.values():
            with self._speaking_for(task):
                getattr(task.module, hook)()

    @contextmanager
    def _speaking_for(self, task: Task) -> Iterator[None]:
        """A task's module sees our trainer, and what it logs is logged by us, under its name."""
        module = task.module
        module.trainer = self.trainer
        module.log = partial(self._log_for, task.name)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.log
            module.trainer = None

    def _log_for(self, task: str, name: str, value: Any, *args: Any, **options: Any) -> None:
        options["add_dataloader_idx"] = False  # the name is unique without it
        self.log(f"{task}/{name}", value, *args, **options)

    def _log_scores(self) -> None:
        logged = self.trainer.callback_metrics
        scores = {}
        for name, task in self._evaluated.items():
            key = f"{name}/{task.metric}"
            if key not in logged:
                theirs = [k.removeprefix(f"{name}/") for k in logged if k.startswith(f"{name}/")]
                raise ValueError(
                    f"task '{name}' did not log its primary metric '{task.metric}'; it logged"
                    f" {', '.join(theirs) or 'nothing'}; say which in Task(metric=...), or see that"
                    " its loader gives batches"
                )
            scores[name] = float(logged[key])
        self.scores = scores
        self.log("average", sum(scores.values()) / len(scores))
        if self._individual is not None:
            individual = {name: self._individual[name] for name in scores}
            self.log("relative", relative(scores, individual))


def quiet_trainer(**options: Any) -> pl.Trainer:
    """Its own tables and files aside. What a module keeps of a validation can train afterwards."""
    return pl.Trainer(
        **{"devices": 1, **options},
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        inference_mode=False,
    )
