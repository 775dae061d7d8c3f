"""Merged: what came out of a merge of tasks, as the state dict of each task's model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mats_lightning.lora import Lora
from mats_lightning.merging import Block, MergeResult
from mats_lightning.merging.models import Weights, check_models
from mats_lightning.products import Refactored, lora_of
from mats_lightning.tasks import Task

SHARED = "shared parameters"  # the part of all tasks


@dataclass(frozen=True)
class PartOfTasks:
    """Parameters that are merged together: those that no head owns, or the head of a group."""

    names: list[str]
    tasks: list[str]


class Merged:
    """The states of all parts, by iteration count, one of them in use; and the tasks' own heads.

    Arguments:
        method: for messages.
        tasks: by their name.
        parts: SHARED, and one a head group of several members.
        states: part -> iteration count -> state; empty for a method that merges nothing.
        counts: the iteration counts; the largest is in use.
        products, lora_rank: by count, and of which rank, where products of LoRA factors were
            merged.
        unmerged: what is in the place of the shared parameters where nothing is merged; by default
            each task's own.
    """

    def __init__(
        self,
        method: str,
        tasks: Mapping[str, Task],
        parts: Mapping[str, PartOfTasks],
        states: Mapping[str, Mapping[int, MergeResult]],
        counts: Sequence[int],
        products: Mapping[int, Refactored] | None = None,
        lora_rank: int | None = None,
        unmerged: Weights | None = None,
    ) -> None:
        self._method, self._tasks, self._parts = method, tasks, parts
        self._states = {part: dict(own) for part, own in states.items()}
        self._counts = counts
        self._products, self._lora_rank = products or {}, lora_rank
        self._unmerged = unmerged
        self._heads: dict[str, dict[str, Tensor]] = {}  # task -> what was put in for its own head
        self.in_use = max(counts)  # the iteration count whose state is given out
        self.refreshed: dict[str, Any] = {}  # how the merge was changed since

    # -- what is given out ---------------------------------------------------------------------

    def state_of(self, task: str) -> dict[str, Tensor]:
        """The state dict of one task's model: merged parameters, and its own head."""
        if task not in self._tasks:
            raise ValueError(f"no task is named '{task}'; there are {', '.join(self._tasks)}")
        own, put = self._tasks[task], dict[str, Tensor]()  # instead of the checkpoint's
        if self._unmerged is not None:
            put |= {name: self._unmerged[name] for name in own.weights if not own.owns(name)}
        for name, part in self._parts.items():
            if name in self._states and task in part.tasks:
                put |= self._states[name][self.in_use].state_dict
        put |= self._heads.get(task, {})
        names = dict.fromkeys([*own.weights, *put])
        return {name: put[name] if name in put else own.weights[name] for name in names}

    def adapter_of(self, task: str) -> Lora | None:
        """The LoRA adapter of one task's model, where its checkpoint is one, with what is merged.

        Its rank, where products are merged, is another than that of the checkpoint.
        """
        lora = lora_of(self._tasks[task])
        if lora is None:
            return None
        like = self._products[self.in_use].form if self._products else lora
        return replace(like, weights=self.state_of(task))

    @property
    def shared(self) -> list[str]:
        """The parameters that all tasks share."""
        return self._parts[SHARED].names

    @property
    def lost(self) -> dict[str, float]:
        """Layer -> what share of its merged product the rank leaves out, for the state in use."""
        return self._products[self.in_use].lost if self._products else {}

    @property
    def blocks(self) -> dict[str, Block]:
        """Parameter -> how its solve went (mats), for the state in use."""
        return {
            name if part == SHARED else f"{part}: {name}": block
            for part, states in self._states.items()
            for name, block in states[self.in_use].blocks.items()
        }

    @property
    def uncovered(self) -> dict[str, list[str]]:
        """Part -> its parameters that no statistic of the method covers, where there are any."""
        found = {part: states[self.in_use].uncovered for part, states in self._states.items()}
        return {part: names for part, names in found.items() if names}

    def own_head(self, task: str) -> list[str]:
        """The parameters that no other task has a part in: none where its head is merged."""
        merged = {name for p in self._parts.values() if task in p.tasks for name in p.names}
        return [name for name in self._tasks[task].weights if name not in merged]

    def head_of(self, task: str) -> dict[str, Tensor]:
        """The same with their values; nothing else of the checkpoint is read."""
        put, weights = self._heads.get(task, {}), self._tasks[task].weights
        return {name: put[name] if name in put else weights[name] for name in self.own_head(task)}

    # -- what is put in ------------------------------------------------------------------------

    def use(self, iterations: int, only: bool = False) -> None:
        """Switch to the state after this number of CG iterations; `only` lets go of the others.

        Raises ValueError for a number that `iterations` did not list, or that was let go of.
        """
        there = set(self._counts).intersection(*self._states.values())
        if iterations not in there:
            raise ValueError(
                f"there is no state after {iterations} iterations; options['iterations'] gave"
                f" {sorted(self._counts)}, and {sorted(there)} are kept"
            )
        self.in_use = iterations
        if only:
            for part, states in self._states.items():
                self._states[part] = {iterations: states[iterations]}

    def replace_shared(self, result: MergeResult, how: Mapping[str, Any]) -> None:
        """Other values of the shared parameters, in the state in use; the other states go.

        Raises ValueError for a method that merges nothing, for merged products of LoRA factors,
        and for other names or shapes.
        """
        if SHARED not in self._states:
            raise ValueError(
                f"'{self._method}' merges nothing: there is no merged state to replace, but heads"
                " can be fitted to it, with RefreshPlan(rounds=0)"
            )
        if self._lora_rank is not None:
            raise ValueError(
                f"lora_rank={self._lora_rank} merges the products of LoRA factors, and what it"
                " makes of them are no task's own factors: nothing can be put in their place. To"
                " refresh a merge of adapters, merge factor by factor (no lora_rank), or fit heads"
                " alone, with RefreshPlan(rounds=0)"
            )
        check_models([self._states[SHARED][self.in_use].state_dict, result.state_dict])
        self._states[SHARED] = {self.in_use: result}
        self.refreshed = dict(how)

    def replace_heads(self, heads: Mapping[str, Weights], how: Mapping[str, Any]) -> None:
        """Other values for heads that the tasks do not share; those not named stay as they are.

        Raises ValueError for other tasks, names or shapes.
        """
        for task, head in heads.items():
            if task not in self._tasks:
                raise ValueError(f"no task is named '{task}'; there are {', '.join(self._tasks)}")
            own = {name: self._tasks[task].weights[name] for name in self.own_head(task)}
            try:
                check_models([own, head])
            except ValueError as error:
                raise ValueError(f"head of task '{task}': {error}") from error
        self._heads |= {task: dict(head) for task, head in heads.items()}
        self.refreshed = dict(how)
