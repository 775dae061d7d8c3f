"""MergeModule: merges once, then `trainer.test` says how good it is on every task."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from mats_lightning.checkpoints import load_weights
from mats_lightning.evaluation import TaskEvaluation
from mats_lightning.joint import JointMerge
from mats_lightning.lora import Lora, take_form
from mats_lightning.merge_folder import export_merge
from mats_lightning.merged import Merged
from mats_lightning.merging import Block, MergeResult
from mats_lightning.merging.models import Weights
from mats_lightning.names import plain_name
from mats_lightning.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MergeModule(TaskEvaluation):
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
            `scale`, of fisher, regmean and mats, makes the merged task vector longer or shorter
            (`merging.rescale`). `lora_rank` merges LoRA adapters as products: what they add to the
            weights. An SVD makes the merged products into factors of this rank. Where the method
            takes statistics the SVD is weighted with them, and they need `adapted_weights=True`.
            Products have no diagonal or block Fisher.
        pretrained: the model that all tasks started from (a state dict, or a path that
            `load_weights` reads); needed by pretrained, the methods of task vectors
            (task_arithmetic, ties, dare, iso_c, tsv_m), and the options scale, init="pretrained"
            and uncovered="pretrained".
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
        if isinstance(pretrained, str | os.PathLike):
            pretrained = load_weights(pretrained)
        joint = JointMerge(tasks, method, options or {}, pretrained, pretrained_heads or {})
        super().__init__(joint.tasks, individual)
        self._joint = joint
        self._merged: Merged | None = None

    def merge(self, device: torch.device | str = "cpu", progress: bool = True) -> None:
        """Merge, once: a second call does nothing. The merged state is then in place.

        Raises what the merge function, the checkpoints and the sidecars raise.
        """
        if self._merged is not None:
            return
        self._merged = merged = self._joint.run(device, progress)
        self._put_in_place()
        method = self._joint.method
        if lost := merged.lost.values():
            rank_zero_info(
                f"{method.name}: rank {method.lora_rank} leaves out"
                f" {median(lost):.1%} of a merged product (median over layers; at most"
                f" {max(lost):.1%})"
            )
        for part, names in merged.uncovered.items():
            how = method.options.get("uncovered", "average")
            rank_zero_info(
                f"{method.name}, {part}: {len(names)} parameters without a statistic of"
                f" this objective ({how}): {', '.join(names[:4])}"
                f"{', ...' if len(names) > 4 else ''}"
            )

    def _outcome(self) -> Merged:
        """Merges where that has not been done."""
        self.merge()
        assert self._merged is not None
        return self._merged

    def use(self, iterations: int, only: bool = False) -> None:
        """Put the state after this number of CG iterations in place.

        Each state takes as much memory as the model: `only` lets go of the others.

        Raises ValueError for a number that `iterations` did not list, or that was let go of.
        """
        self._outcome().use(iterations, only)
        self._put_in_place()

    def shared_state(self) -> dict[str, Tensor]:
        """The merged parameters and buffers that all tasks share: those that are in no head."""
        first = self.state_of(next(iter(self.tasks)))
        return {name: first[name] for name in self._outcome().shared}

    def replace_shared(self, result: MergeResult, how: Mapping[str, Any]) -> None:
        """Put other values of `shared_state` in place; the model card says `how` they were made.

        The states of other iteration counts are let go of. Raises ValueError for other names or
        shapes, for a method that merges nothing, and with lora_rank.
        """
        self._outcome().replace_shared(result, how)
        self._put_in_place()

    def own_heads(self) -> dict[str, dict[str, Tensor]]:
        """task -> the parameters that it shares with no other; no task without any."""
        heads = {task: self._outcome().head_of(task) for task in self.tasks}
        return {task: head for task, head in heads.items() if head}

    def replace_heads(self, heads: Mapping[str, Weights], how: Mapping[str, Any]) -> None:
        """Put other values of `own_heads` in place, of the tasks that are named.

        They are those of all states then, whatever the iterations; `how` is as in
        `replace_shared`. Raises ValueError for other tasks, names or shapes.
        """
        self._outcome().replace_heads(heads, how)
        self._put_in_place()

    @property
    def refreshed(self) -> dict[str, Any]:
        """How the merge was changed since, as the model card has it; {} where it was not."""
        return dict(self._outcome().refreshed)

    @property
    def task_weights(self) -> dict[str, float]:
        """task -> the number that it is merged with."""
        return dict(self._joint.weights)

    def _put_in_place(self) -> None:
        merged = self._outcome()
        for name, task in self.tasks.items():
            load_state(task.module, merged.state_of(name), merged.adapter_of(name))

    def state_of(self, task: str) -> dict[str, Tensor]:
        """The state dict of one task's model: merged parameters, and its own head."""
        return self._outcome().state_of(task)

    def model(self, task: str) -> pl.LightningModule:
        """A copy of the task's LightningModule with the merged weights, independent of ours."""
        state = self.state_of(task)
        module = copy.deepcopy(self.tasks[task].module)
        load_state(module, state, self._outcome().adapter_of(task))
        return module

    @property
    def blocks(self) -> dict[str, Block]:
        """Parameter -> how its solve went (mats), for the state in use."""
        return self._outcome().blocks

    @property
    def lost(self) -> dict[str, float]:
        """Layer -> what share of its merged product `lora_rank` leaves out, see `refactor`."""
        return self._outcome().lost

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

        Raises ValueError where there is no such model or several, where it is not the same for all
        tasks or nothing is merged, and for task names that are no file names; FileExistsError for
        a folder that is not empty (with `overwrite`: that holds no model and no adapter).
        """
        first = self.model(next(iter(self.tasks)))
        return export_merge(
            self._joint, self._outcome(), first, self.scores, folder, tokenizer, overwrite
        )

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Here, not in on_test_start: tensors made in inference mode could not be trained later.
        bar = self.trainer.progress_bar_callback is not None
        self.merge(self.trainer.strategy.root_device, bar)
        if self._evaluated is self.tasks:
            self._put_in_place()  # another MergeModule of the same tasks may have put its own in


def load_state(module: nn.Module, state: Weights, adapter: Lora | None = None) -> None:
    """Load by plain names; what the state does not hold stays as it is."""
    if adapter is not None:
        take_form(module, adapter)
    actual = module.state_dict()
    module.load_state_dict({k: state.get(plain_name(k), v) for k, v in actual.items()})
