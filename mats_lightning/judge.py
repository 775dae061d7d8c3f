"""What decides in a refresh: the tasks' scores on validation rows, and their losses there."""

import time
from collections.abc import Callable
from itertools import islice
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len

from mats_lightning.batches import BatchSizeFn, count_examples
from mats_lightning.evaluation import quiet_trainer
from mats_lightning.module import MergeModule
from mats_lightning.passes import LossFn, evaluating, to_device, value_of_loss
from mats_lightning.task_modules import on_device


class Judge:
    """Validates a module with what is in it; where losses decide, takes them too.

    Args:
        trainer: that validates; heads are scored by a quiet one of the same kind.
        loss_fn_of: task -> (module, batch) -> loss, or None for the module's own; it is asked each
            time, and let go of. None where scores decide.
        batch_size_fn: batch -> its number of rows.
    """

    def __init__(
        self,
        module: MergeModule,
        trainer: pl.Trainer,
        loss_fn_of: Callable[[str], LossFn | None] | None,
        batch_size_fn: BatchSizeFn | None = None,
    ) -> None:
        self.module, self.trainer = module, trainer
        self.loss_fn_of, self.batch_size_fn = loss_fn_of, batch_size_fn
        self.losses: dict[str, float] = {}  # task -> loss, of the last validation
        self._loaders = {
            name: task.dataloader("validate", trainer) for name, task in module.tasks.items()
        }
        device = trainer.strategy.root_device
        self._quiet = quiet_trainer(  # no logger or callback hears of each head that is tried
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=trainer.precision,
            limit_val_batches=trainer.limit_val_batches,
        )

    @property
    def judged(self) -> float:
        """The number that decides: the mean loss where losses do, or else the mean score."""
        return mean((self.losses or self.module.scores).values())

    def batches(self, task: str) -> int | None:
        """How many batches a task validates on; None for all of a loader without a length."""
        count, limit = sized_len(self._loaders[task]), self.trainer.limit_val_batches
        if isinstance(limit, int):
            return limit if count is None else min(limit, count)
        return None if count is None else int(count * (1.0 if limit is None else limit))

    def validate(self) -> float:
        """Puts the scores into the module and takes the losses; the seconds that it took.

        Raises ValueError where no batch was run, for a loss that is no scalar, and for batches
        whose rows cannot be counted.
        """
        started = time.perf_counter()
        self.module.scores = {}
        loop = self.trainer.validate_loop
        usual, loop.inference_mode = loop.inference_mode, False  # tensors that it leaves must train
        try:
            self.trainer.validate(self.module, verbose=False)
        finally:
            loop.inference_mode = usual
        if not self.module.scores:
            raise ValueError(
                "validation has run no batch, and it decides what a refresh keeps: give the tasks"
                " validation rows, and a trainer without limit_val_batches=0"
            )
        if self.loss_fn_of is not None:
            self.losses = {
                task: self._loss(task, self.loss_fn_of(task)) for task in self.module.tasks
            }
        return time.perf_counter() - started

    def score(self, task: str) -> float:
        """Of one task's module alone, as it is now; it stays on the trainer's device."""
        with self.module.only(task):
            self._quiet.validate(self.module, verbose=False)
        self.module.tasks[task].module.to(self.trainer.strategy.root_device)
        return self.module.scores[task]

    def _loss(self, name: str, loss_fn: LossFn | None) -> float:
        """The mean over the rows."""
        task, total, rows = self.module.tasks[name], 0.0, 0
        device = self.trainer.strategy.root_device
        with on_device(task, self.trainer), evaluating(task.module), torch.no_grad():
            for index, batch in enumerate(islice(self._loaders[name], self.batches(name))):
                moved = to_device(task.module, batch, device)
                loss = value_of_loss(task.module, moved, index, loss_fn)
                size = self._rows_in(moved)
                total, rows = total + loss.item() * size, rows + size
        return total / rows

    def _rows_in(self, batch: Any) -> int:
        try:
            return count_examples(batch, self.batch_size_fn)
        except ValueError as error:
            raise ValueError(
                f"{error}, in statistics_options with by='solving'; or let scores judge,"
                " RefreshPlan(judge='score')"
            ) from error
