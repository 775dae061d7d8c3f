"""What each task gives to a round of a refresh: its statistics, and its head fitted."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.progress import track
from torch import Tensor, nn

from mats_lightning.batches import count_examples, first_rows, rows_to_pick
from mats_lightning.distillation import soft_targets
from mats_lightning.heads import fit_head
from mats_lightning.joint_training import train_together
from mats_lightning.measuring import statistics_at
from mats_lightning.module import MergeModule, load_state
from mats_lightning.names import plain_name
from mats_lightning.passes import LossFn, evaluating, to_device, value_of_loss
from mats_lightning.products import lora_of
from mats_lightning.refresh_plan import RefreshPlan
from mats_lightning.rounds import Folder, State
from mats_lightning.sampled import LogitsFn
from mats_lightning.sidecar import check_belongs, load_statistics, save_statistics
from mats_lightning.statistics import Statistics
from mats_lightning.statistics.record import GRADIENT
from mats_lightning.tasks import Task

TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class TaskRounds:
    """The tasks of a module, on the rows of a plan.

    Arguments: see `refresh`; errors too, of those that its rows raise when this is made.
    """

    def __init__(
        self,
        module: MergeModule,
        plan: RefreshPlan,
        trainer: pl.Trainer,
        logits_fn: LogitsFn | None,
        loss_fn: LossFn | None,
        loaders: Mapping[str, Iterable[Any]],
        statistics_options: Mapping[str, Any],
        progress: bool,
    ) -> None:
        self.module, self.plan, self.trainer = module, plan, trainer
        self.logits_fn, self.loss_fn = logits_fn, loss_fn
        self.loaders, self.progress = loaders, progress
        self.statistics_options = statistics_options
        self.device = trainer.strategy.root_device
        self.quiet = quiet_trainer(  # tries heads; no logger or callback hears of each
            accelerator=self.device.type,
            devices=1 if self.device.index is None else [self.device.index],
            precision=trainer.precision,
            limit_val_batches=trainer.limit_val_batches,
        )
        # how many rows there are to choose from; None where batches are given
        self.choice: dict[str, int | None] = {}
        # task -> what its own model gives for batches, which come again and again
        self._targets: dict[str, dict[bytes, Tensor]] = {name: {} for name in module.tasks}
        # asked for once: a setup that splits at random gives other rows each time
        self._rows = {name: self._picked(task) for name, task in module.tasks.items()}
        self._validation = {
            name: task.dataloader("validate", trainer) for name, task in module.tasks.items()
        }

    def fit_heads(self) -> tuple[dict[str, int], dict[str, State]]:
        """Each task's own head to the weights in place: task -> iterations, task -> head."""
        fitted, heads = {}, {}
        own = self.module.own_heads()
        for name in track(own, "fitting heads", disable=not self.progress, transient=True):
            task = self.module.tasks[name]
            loss_fn, teacher = self.loss_fn, None
            trained = map(plain_name, dict(task.module.named_parameters()))
            if self.plan.labels == "teacher":
                teacher = self._teacher(task)
                loss_fn = self._soft_targets(task, teacher)
            with self._on_device(task):
                found = fit_head(
                    task.module,
                    self._rows[name],
                    [n for n in trained if n in own[name]],
                    iterations=self.plan.heads,
                    loss_fn=loss_fn,
                    score=partial(self._score, task),
                    others=[] if teacher is None else [teacher],
                )
            state = {plain_name(n): t for n, t in task.module.state_dict().items()}  # all names
            fitted[name] = found.iterations
            heads[name] = {n: state[n].detach().clone() for n in own[name]}
        return fitted, heads

    def trained(self, state: State, kept: Collection[str]) -> State:
        """The shared parameters after training from here, heads along where the plan fits them."""
        tasks = self.module.tasks
        with ExitStack() as stack:
            for task in tasks.values():
                stack.enter_context(self._with_hooks(task))
            return train_together(
                {name: task.module for name, task in tasks.items()},
                state,
                self._rows,
                heads=self.module.own_heads() if self.plan.heads else {},
                loss_fns={name: self._loss_fn(task) for name, task in tasks.items()},
                weights=self.module.task_weights,
                epochs=self.plan.epochs,
                learning_rate=self.plan.learning_rate,
                device=self.device,
                kept=kept,
                seed=self.plan.seed,
                progress=self.progress,
            )

    def losses(self) -> dict[str, float]:
        """task -> the mean over its validation rows of the loss to the plan's labels.

        Raises ValueError for a loss that is no scalar, and batches whose rows cannot be counted.
        """
        found = {}
        for name, task in self.module.tasks.items():
            loss_fn, total, rows = self._loss_fn(task), 0.0, 0
            with self._on_device(task), evaluating(task.module), torch.no_grad():
                for index, batch in enumerate(islice(self._validation[name], self.validated(name))):
                    moved = to_device(task.module, batch, self.device)
                    loss = value_of_loss(task.module, moved, index, loss_fn)
                    size = self._rows_in(moved)
                    total, rows = total + loss.item() * size, rows + size
            found[name] = total / rows
        return found

    def _rows_in(self, batch: Any) -> int:
        """Of a validation batch."""
        try:
            return count_examples(batch, self.statistics_options.get("batch_size_fn"))
        except ValueError as error:
            raise ValueError(
                f"{error}, in statistics_options with by='solving'; or let scores judge,"
                " RefreshPlan(judge='score')"
            ) from error

    def statistics(self, number: int, state: State, folder: Folder) -> list[Statistics]:
        """Of all tasks at these weights, for this round: those in the folder, or taken now."""
        return [self._statistics(number, t, state, folder) for t in self.module.tasks.values()]

    def _statistics(self, number: int, task: Task, state: State, folder: Folder) -> Statistics:
        path = folder.sidecar(number, task.name)
        if not path.exists():
            started = time.perf_counter()
            found = self._collected(task, state)
            before = folder.sidecar(number - 1, task.name)
            if self.plan.decay and before.exists():
                found = with_older(found, load_statistics(before), self.plan.decay)
            found.info["seconds"] = time.perf_counter() - started
            save_statistics(found, path)
        statistics = load_statistics(path)
        check_belongs(statistics, state, f"{path}, of a round that was interrupted")
        return statistics

    def _score(self, task: Task) -> float:
        """Of the task's module as it is now, on validation rows."""
        with self.module.only(task.name):
            self.quiet.validate(self.module, verbose=False)
        task.module.to(self.device)  # the trainer leaves it on the CPU
        return self.module.scores[task.name]

    def _loss_fn(self, task: Task) -> LossFn | None:
        """To the labels of the plan; a teacher is made for batches that are new alone."""
        if self.plan.labels == "data":
            return self.loss_fn
        return self._soft_targets(task, partial(self._teacher, task))

    def _soft_targets(self, task: Task, teacher: nn.Module | Callable[[], nn.Module]) -> LossFn:
        assert self.logits_fn is not None
        return soft_targets(teacher, self.logits_fn, self._targets[task.name])

    def _teacher(self, task: Task) -> nn.Module:
        """The task's own model, on the device."""
        shared = (self.trainer, task.data)  # that hooks of the module hold, and nobody copies
        teacher = copy.deepcopy(task.module, {id(part): part for part in shared})
        load_state(teacher, task.weights, lora_of(task))  # a merge may have changed its form
        return teacher.to(self.device)

    def _collected(self, task: Task, state: State) -> Statistics:
        plan = self.plan
        options = dict(self.statistics_options)
        if plan.fisher == "sampled":
            options |= {"fisher": "sampled", "logits_fn": self.logits_fn, "seed": plan.seed}
        if plan.mix > 0 or plan.fisher == "empirical":  # sampled curvature has a loss of its own
            options["loss_fn"] = self._loss_fn(task)
        with self._on_device(task):
            return statistics_at(
                task.module,
                state,
                self._rows[task.name],
                plan.statistics,
                max_examples=plan.rows,
                progress=self.progress,
                **options,
            )

    def validated(self, name: str) -> int | None:
        """How many batches a task validates on; None for all of a loader without a length."""
        count, limit = sized_len(self._validation[name]), self.trainer.limit_val_batches
        if isinstance(limit, int):
            return limit if count is None else min(limit, count)
        return None if count is None else int(count * (1.0 if limit is None else limit))

    def _picked(self, task: Task) -> Iterable[Any]:
        if task.name in self.loaders:
            self.choice[task.name] = None
            return self.loaders[task.name]
        loader = task.dataloader("fit", self.trainer)
        try:
            self.choice[task.name] = len(rows_to_pick(loader))
            return first_rows(loader, self.plan.rows, self.plan.seed)
        except ValueError as error:
            raise ValueError(f"task '{task.name}': {error}") from error

    @contextmanager
    def _on_device(self, task: Task) -> Iterator[None]:
        """The task's module, which the trainer leaves on the CPU; errors say whose it is."""
        with self._with_hooks(task):
            task.module.to(self.device)
            try:
                yield
            except ValueError as error:
                raise ValueError(f"task '{task.name}': {error}") from error
            finally:
                task.module.cpu()

    @contextmanager
    def _with_hooks(self, task: Task) -> Iterator[None]:
        """Batches come to the module as in a trainer: by hooks of its data module, if any."""
        module, data = task.module, task.data
        hooks = [
            hook
            for hook in TRANSFERS
            if isinstance(data, pl.LightningDataModule) and is_overridden(hook, data)
        ]
        module.trainer = self.trainer
        for hook in hooks:
            setattr(module, hook, getattr(data, hook))
        try:
            yield
        finally:
            for hook in hooks:
                delattr(module, hook)
            module.trainer = None


def with_older(found: Statistics, older: Statistics, decay: float) -> Statistics:
    """Curvature of both, the older one's counts times `decay`; the gradient of the new one."""
    total = found + older.faded(decay)
    assert isinstance(total.tensors, dict)
    for name in found.gradient:
        key = f"{GRADIENT}/{name}"
        total.tensors[key] = found.tensors[key] * (total.examples / found.examples)
    return total


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
