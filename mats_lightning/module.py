"""MergeModule: merges once, then `trainer.test` says how good it is on every task."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from mats_lightning.checkpoints import load_weights
from mats_lightning.joint import JointMerge
from mats_lightning.lora import Lora, take_form
from mats_lightning.merge_folder import export_merge
from mats_lightning.merging import Block, MergeResult
from mats_lightning.names import plain_name
from mats_lightning.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Weights = Mapping[str, Tensor]
# hooks of a task's module that would run in its own test or validation, and do not in ours
NOT_RUN = tuple(
    f"on_{stage}_{hook}"
    for stage in ("test", "validation")
    for hook in ("start", "end", "batch_start", "batch_end")
)


class MergeModule(pl.LightningModule):
    """Tasks and a method in, one model for all of them out.

    `trainer.test(module)` and `trainer.validate(module)` run every task's own step with the
    merged parameters in place and report "<task>/<metric>", "average" (of the tasks' primary
    metrics) and, when `individual` is given, "relative" (the mean of merged / individual).
    `module.merge()` works without a Trainer, `module.model(task)` hands out one usable model.

    Arguments:
        tasks: see `Task`. Parameters in a task's head stay its own, unless its `head_group` has
            several members; all other parameters are merged.
        method: one of average, task_arithmetic, ties, dare, iso_c, tsv_m, fisher, regmean, mats; or
            individual or pretrained, the rows that a comparison needs.
        options: keyword arguments of the merge function. `weights` may map task names to
            numbers. `iterations` of mats may be a list: `use(n)` switches between the states.
            `lora_rank`, of every method, merges LoRA adapters as their products (what they add
            to the weights), which are made into factors of this rank by an SVD; it is weighted
            with the statistics, which need `adapted_weights=True`, where the method takes some.
        pretrained: the model that all tasks started from (a state dict, or a path that
            `load_weights` reads); needed by pretrained, the methods of task vectors
            (task_arithmetic, ties, dare, iso_c, tsv_m), and the options init="pretrained" and
            uncovered="pretrained".
        pretrained_heads: head group -> state dict of the head that it started from.
        individual: task -> primary metric of its own model, as `scores` of a MergeModule with
            method="individual" gives it.

    Raises ValueError for tasks, a method or options that do not fit together.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        method: str = "mats",
        options: Mapping[str, Any] | None = None,
        pretrained: Weights | str | os.PathLike[str] | None = None,
        pretrained_heads: Mapping[str, Weights] | None = None,
        individual: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str | os.PathLike):
            pretrained = load_weights(pretrained)
        self._joint = JointMerge(tasks, method, options or {}, pretrained, pretrained_heads or {})
        self._merged = False
        self.tasks = self._joint.tasks
        self.modules_of_tasks = nn.ModuleList(task.module for task in tasks)
        self.scores: dict[str, float] = {}  # task -> primary metric, of the last run
        self._evaluated = self.tasks  # by a run: all of them, or one as its module is
        self._individual = dict(individual) if individual is not None else None
        self._check_individual()

    # -- merging -----------------------------------------------------------------------------

    def merge(self, device: torch.device | str = "cpu", progress: bool = True) -> None:
        """Merge, once: a second call does nothing. The merged state is then in place.

        Raises what the merge function, the checkpoints and the sidecars raise.
        """
        if not self._merged:
            self._joint.run(device, progress)
            self._merged = True
            self._put_in_place()
            if lost := self.lost.values():
                rank_zero_info(
                    f"{self._joint.method}: rank {self._joint.lora_rank} leaves out"
                    f" {median(lost):.1%} of a merged product (median over layers; at most"
                    f" {max(lost):.1%})"
                )
            for part, names in self._joint.uncovered.items():
                how = self._joint.options.get("uncovered", "average")
                rank_zero_info(
                    f"{self._joint.method}, {part}: {len(names)} parameters without a statistic of"
                    f" this objective ({how}): {', '.join(names[:4])}"
                    f"{', ...' if len(names) > 4 else ''}"
                )

    def use(self, iterations: int, only: bool = False) -> None:
        """Put the state after this number of CG iterations in place.

        Each state takes as much memory as the model: `only` lets go of the others.

        Raises ValueError for a number that `iterations` did not list, or that was let go of.
        """
        self.merge()
        self._joint.use(iterations, only)
        self._put_in_place()

    def shared_state(self) -> dict[str, Tensor]:
        """The merged parameters and buffers that all tasks share: those that are in no head."""
        first = self.state_of(next(iter(self.tasks)))
        return {name: first[name] for name in self._joint.shared}

    def replace_shared(self, result: MergeResult, how: Mapping[str, Any]) -> None:
        """Put other values of `shared_state` in place; the model card says `how` they were made.

        The states of other iteration counts are let go of. Raises ValueError for other names or
        shapes, for a method that merges nothing, and with lora_rank.
        """
        self.merge()
        self._joint.replace_shared(result, how)
        self._put_in_place()

    def own_heads(self) -> dict[str, dict[str, Tensor]]:
        """task -> the parameters that it shares with no other; no task without any."""
        heads = {name: self._joint.own_head(name) for name in self.tasks}
        return {
            task: {name: state[name] for name in names}
            for task, names in heads.items()
            if names and (state := self.state_of(task))
        }

    def replace_heads(self, heads: Mapping[str, Weights], how: Mapping[str, Any]) -> None:
        """Put other values of `own_heads` in place, of the tasks that are named.

        They are those of all states then, whatever the iterations; `how` is as in
        `replace_shared`. Raises ValueError for other tasks, names or shapes.
        """
        self.merge()
        self._joint.replace_heads(heads, how)
        self._put_in_place()

    @property
    def task_weights(self) -> dict[str, float]:
        """task -> the number that it is merged with."""
        return dict(self._joint.weights)

    def _put_in_place(self) -> None:
        for name, task in self.tasks.items():
            load_state(task.module, self._joint.state_of(name), self._joint.adapter_of(name))

    def state_of(self, task: str) -> dict[str, Tensor]:
        """The state dict of one task's model: merged parameters, and its own head."""
        self.merge()
        return self._joint.state_of(task)

    def model(self, task: str) -> pl.LightningModule:
        """A copy of the task's LightningModule with the merged weights, independent of ours."""
        state = self.state_of(task)
        module = copy.deepcopy(self.tasks[task].module)
        load_state(module, state, self._joint.adapter_of(task))
        return module

    @property
    def blocks(self) -> dict[str, Block]:
        """Parameter -> how its solve went (mats), for the state in use."""
        self.merge()
        return self._joint.blocks

    @property
    def lost(self) -> dict[str, float]:
        """Layer -> what share of its merged product `lora_rank` leaves out, see `refactor`."""
        self.merge()
        return self._joint.lost

    def export(
        self,
        folder: str | os.PathLike[str],
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the merged model as a Hugging Face folder: what AutoModel.from_pretrained loads.

        The one transformers model inside of the tasks' modules is written with its config; all
        that lies outside of it (heads) goes to heads/<task>.safetensors, and a card says how it
        was merged. Where the tasks' checkpoints are adapters it is the merged adapter, which
        PeftModel.from_pretrained loads. `tokenizer` is by default that of the tasks' module or
        data, if they have one.

        Raises ValueError where there is no such model or several, or where it is not the same
        for all tasks; FileExistsError for a folder that is not empty, without `overwrite`.
        """
        first = self.model(next(iter(self.tasks)))
        return export_merge(self._joint, first, self.scores, folder, tokenizer, overwrite)

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

    # -- evaluating --------------------------------------------------------------------------

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
                        " MergeModule; do what it does in an epoch hook"
                    )
            with self._speaking_for(task):
                task.module.setup(stage)
        # Here, not in on_test_start: tensors made in inference mode could not be trained later.
        bar = self.trainer.progress_bar_callback is not None
        self.merge(self.trainer.strategy.root_device, bar)
        if self._evaluated is self.tasks:
            self._put_in_place()  # another MergeModule of the same tasks may have put its own in

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
            getattr(task.module, hook)(batch, batch_idx)

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
                    f" {', '.join(theirs) or 'nothing'}; say which in Task(metric=...)"
                )
            scores[name] = float(logged[key])
        self.scores = scores
        self.log("average", sum(scores.values()) / len(scores))
        if self._individual is not None:
            quotients = [score / self._individual[name] for name, score in scores.items()]
            self.log("relative", sum(quotients) / len(quotients))


def load_state(module: nn.Module, state: Weights, adapter: Lora | None = None) -> None:
    """Load by plain names; what the state does not hold stays as it is."""
    if adapter is not None:
        take_form(module, adapter)
    actual = module.state_dict()
    module.load_state_dict({k: state.get(plain_name(k), v) for k, v in actual.items()})
