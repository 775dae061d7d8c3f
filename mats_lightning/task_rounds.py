"""What each task gives to a round of a refresh: its statistics, and its head fitted."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
from rich.progress import track
from torch import Tensor, nn

from mats_lightning.batches import first_rows, rows_to_pick
from mats_lightning.distillation import soft_targets
from mats_lightning.heads import fit_head
from mats_lightning.joint_training import train_together
from mats_lightning.measuring import statistics_at
from mats_lightning.module import MergeModule, load_state
from mats_lightning.names import plain_name
from mats_lightning.passes import LossFn
from mats_lightning.products import lora_of
from mats_lightning.refresh_plan import RefreshPlan
from mats_lightning.rounds import Folder, State
from mats_lightning.sampled import LogitsFn
from mats_lightning.sidecar import check_belongs, load_statistics, save_statistics
from mats_lightning.statistics import Statistics
from mats_lightning.statistics.record import GRADIENT
from mats_lightning.task_modules import hooked, on_device
from mats_lightning.tasks import Task


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
        # how many rows there are to choose from; None where batches are given
        self.choice: dict[str, int | None] = {}
        # task -> what its own model gives for batches, which come again and again
        self._targets: dict[str, dict[bytes, Tensor]] = {name: {} for name in module.tasks}
        # asked for once: a setup that splits at random gives other rows each time
        self._rows = {name: self._picked(task) for name, task in module.tasks.items()}

    def fit_heads(self, score: Callable[[str], float]) -> tuple[dict[str, int], dict[str, State]]:
        """Each task's own head to the weights in place: task -> iterations, task -> head.

        `score` is of a task's module as it is then; higher is better.
        """
        fitted, heads = {}, {}
        own = self.module.own_heads()
        for name in track(own, "fitting heads", disable=not self.progress, transient=True):
            task = self.module.tasks[name]
            loss_fn, teacher = self.loss_fn, None
            trained = map(plain_name, dict(task.module.named_parameters()))
            if self.plan.labels == "teacher":
                teacher = self._teacher(task)
                loss_fn = self._soft_targets(task, teacher)
            with on_device(task, self.trainer):
                found = fit_head(
                    task.module,
                    self._rows[name],
                    [n for n in trained if n in own[name]],
                    iterations=self.plan.heads,
                    loss_fn=loss_fn,
                    score=partial(score, name),
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
                stack.enter_context(hooked(task, self.trainer))
            return train_together(
                {name: task.module for name, task in tasks.items()},
                state,
                self._rows,
                heads=self.module.own_heads() if self.plan.heads else {},
                loss_fns={name: self.loss_fn_of(name) for name in tasks},
                weights=self.module.task_weights,
                epochs=self.plan.epochs,
                learning_rate=self.plan.learning_rate,
                device=self.device,
                kept=kept,
                seed=self.plan.seed,
                progress=self.progress,
            )

    def statistics(self, number: int, state: State, folder: Folder) -> list[Statistics]:
        """Of all tasks at these weights, for this round: those in the folder, or taken now."""
        return [self._statistics(number, t, state, folder) for t in self.module.tasks.values()]

    def _statistics(self, number: int, task: Task, state: State, folder: Folder) -> Statistics:
        path = folder.sidecar(number, task.name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
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

    def loss_fn_of(self, name: str) -> LossFn | None:
        """To the labels of the plan; a teacher is made for batches that are new alone."""
        if self.plan.labels == "data":
            return self.loss_fn
        task = self.module.tasks[name]
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
            options["loss_fn"] = self.loss_fn_of(task.name)
        with on_device(task, self.trainer):
            return statistics_at(
                task.module,
                state,
                self._rows[task.name],
                plan.statistics,
                max_examples=plan.rows,
                progress=self.progress,
                **options,
            )

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


def with_older(found: Statistics, older: Statistics, decay: float) -> Statistics:
    """Curvature of both, the older one's counts times `decay`; the gradient of the new one."""
    total = found + older.faded(decay)
    assert isinstance(total.tensors, dict)
    for name in found.gradient:
        key = f"{GRADIENT}/{name}"
        total.tensors[key] = found.tensors[key] * (total.examples / found.examples)
    return total
