"""JointMerge: tasks and a method in; what is merged together; `Merged` out."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mats_lightning.merged import SHARED, Merged, PartOfTasks
from mats_lightning.merging import MergeResult
from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    counted,
    names_with,
)
from mats_lightning.merging.rescale import rescaled
from mats_lightning.methods import METHODS, Method
from mats_lightning.products import (
    Refactored,
    factors_of,
    product_models,
    product_names,
    product_start,
    refactored,
)
from mats_lightning.statistics import Statistics
from mats_lightning.tasks import Part, Task, check_same_scaling, check_tasks
from mats_lightning.tied import tied_names, with_tied


class JointMerge:
    """Which parameters of which tasks are merged together, and how.

    The parts are the parameters that no head owns, of all tasks, and the head of each head group
    of several members. Arguments and errors: see `MergeModule`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        method: str,
        options: Mapping[str, Any],
        pretrained: Weights | None,
        pretrained_heads: Mapping[str, Weights],
    ) -> None:
        check_tasks(tasks)
        self.tasks = {task.name: task for task in tasks}
        rest = dict(options)
        self.weights = _weights_of(rest.pop("weights", None), list(self.tasks))
        self.examples: dict[str, int] = {}  # task -> that its statistics are of, where they count
        # task -> other name of a tied parameter -> the name under which it is merged
        self._tied = {name: tied_names(task.module) for name, task in self.tasks.items()}
        shared = next(iter(self._tied.values()))
        self._pretrained = None
        if pretrained is not None:
            self._pretrained = with_tied(pretrained, shared, "pretrained")
        if isinstance(init := rest.get("init"), Mapping):
            rest["init"] = with_tied(init, shared, "options['init']")
        self.method = Method.of(method, rest)
        self._pretrained_heads = pretrained_heads
        chosen = self.method
        if chosen.lora_rank is None and chosen.needs_start and pretrained is None:
            given = {**chosen.options, **({} if chosen.scale is None else {"scale": chosen.scale})}
            raise ValueError(
                f"method '{method}' with {given} needs the model that the tasks"
                " started from: pass pretrained=<state dict or path>"
            )

    def run(self, device: torch.device | str = "cpu", progress: bool = True) -> Merged:
        """Merge.

        Raises what the merge function, the checkpoints and the sidecars raise.
        """
        device = torch.device(device)
        if device.type == "mps":  # has no float64, which the solvers decompose in
            device = torch.device("cpu")
        parts = self._parts()
        states: dict[str, dict[int, MergeResult]] = {}
        products: dict[int, Refactored] = {}
        unmerged: Weights | None = None
        if self.method.name == "pretrained":
            unmerged, start = self._pretrained, self._start_of(SHARED, device)
            for task in self.tasks.values():
                shared = [name for name in task.weights if not task.owns(name)]
                check_models([Part(task.weights, shared, device)], start)
        elif self.method.merges:
            if self.method.lora_rank is None:
                check_same_scaling(list(self.tasks.values()))
            for name, part in parts.items():
                self._check_same_names(name, part)
                if name == SHARED and self.method.lora_rank is not None:
                    states[name], products = self._merge_products(part, device, progress)
                else:
                    states[name] = self._merge_part(name, part, device, progress)
        return Merged(
            self.method.name,
            self.tasks,
            parts,
            states,
            self.method.counts,
            products,
            lora_rank=self.method.lora_rank,
            unmerged=unmerged,
        )

    def _parts(self) -> dict[str, PartOfTasks]:
        """What is merged together."""
        first = next(iter(self.tasks.values()))
        shared = [name for name in first.weights if not first.owns(name)]
        parts = {SHARED: PartOfTasks(shared, list(self.tasks))}
        for group in sorted({t.head_group for t in self.tasks.values() if t.head_group}):
            members = [name for name, task in self.tasks.items() if task.head_group == group]
            task = self.tasks[members[0]]
            if len(members) > 1:
                head = [name for name in task.weights if task.owns(name)]
                parts[_head_part(group)] = PartOfTasks(head, members)
        return parts

    def _check_same_names(self, name: str, part: PartOfTasks) -> None:
        for member in part.tasks:
            task = self.tasks[member]
            own = [n for n in task.weights if task.owns(n) != (name == SHARED)]
            if odd := sorted(set(own) ^ set(part.names)):
                raise ValueError(
                    f"tasks '{part.tasks[0]}' and '{member}' do not have the same parameters to"
                    f" merge ({name}): '{odd[0]}' is in one of them alone; if it belongs to a head,"
                    " name it in Task(head=...)"
                )
            ties = [self._tied_in(part, of) for of in (part.tasks[0], member)]
            if odd := sorted(dict(ties[0].items() ^ ties[1].items())):
                raise ValueError(
                    f"tasks '{part.tasks[0]}' and '{member}' tie their parameters in different"
                    f" ways: '{odd[0]}' is another parameter's second name in one of them alone;"
                    " build their modules alike"
                )

    def _tied_in(self, part: PartOfTasks, member: str) -> dict[str, str]:
        """Of a part's names those that one task has for a parameter that is merged under another.

        A parameter is merged once, whatever the options say of its names.
        """
        names = set(part.names)
        return {n: first for n, first in self._tied[member].items() if {n, first} <= names}

    def _merge_part(
        self, name: str, part: PartOfTasks, device: torch.device, progress: bool
    ) -> dict[int, MergeResult]:
        """The states by iteration count."""
        tied = self._tied_in(part, part.tasks[0])
        names = [n for n in part.names if n not in tied]
        thetas = [Part(self.tasks[member].weights, names, device) for member in part.tasks]
        if any(self.weights[member] for member in part.tasks):
            options, start = self._options_of(part.tasks, names), self._start_of(name, device)
            states = self._merge(name, part, thetas, start, options, progress)
        else:  # a head group of which the weights say nothing
            average = METHODS["average"](thetas)
            states = {count: MergeResult(dict(average)) for count in self.method.counts}
        for state in states.values():
            state.state_dict |= {n: state.state_dict[first] for n, first in tied.items()}
        return states

    def _merge_products(
        self, part: PartOfTasks, device: torch.device, progress: bool
    ) -> tuple[dict[int, MergeResult], dict[int, Refactored]]:
        """LoRA adapters merged as what they add to the weights, and made into factors again."""
        adapters = [factors_of(task) for task in self.tasks.values()]
        thetas = product_models(adapters, device)
        options, start = self._options_of(part.tasks, list(thetas[0])), product_start(thetas[0])
        states = self._merge(SHARED, part, thetas, start, options, progress)
        assert self.method.lora_rank is not None
        return refactored(
            states,
            self.method.lora_rank,
            adapters,
            options.get("statistics", []),
            options["weights"],
        )

    def _options_of(self, members: list[str], names: list[str]) -> dict[str, Any]:
        """Arguments of the merge function, for these tasks and parameters."""
        options = {**self.method.options, "weights": [self.weights[name] for name in members]}
        if self.method.takes("statistics"):
            options["statistics"] = [  # of a task without weight none are read
                self._statistics(member, names) if self.weights[member] else Statistics()
                for member in members
            ]
        if "averaged" in options:
            options["averaged"] = self._averaged(names)
        return options

    def _merge(
        self,
        part_name: str,
        part: PartOfTasks,
        thetas: Sequence[Weights],
        start: Weights | None,
        options: dict[str, Any],
        progress: bool,
    ) -> dict[int, MergeResult]:
        """The states by iteration count, as long as they are to be."""
        if self.method.takes("pretrained"):
            options["pretrained"] = start
        init = options.get("init")
        if part_name != SHARED and isinstance(init, Mapping) and not init.keys() & thetas[0].keys():
            options["init"] = "average"  # `init` is of what all tasks share
        with ExitStack() as stack:
            if self.method.takes("on_block") and progress:
                options["on_block"] = stack.enter_context(
                    _progress(f"{self.method.name}, {part_name}")
                )
            members = counted(part.tasks, options["weights"])
            order = ", ".join(f"model {i} is '{m}'" for i, m in enumerate(members))
            what = f"{self.method.name} of the {part_name}"
            try:
                with warnings.catch_warnings(record=True) as caught:
                    result = METHODS[self.method.name](thetas, **options)
            except ValueError as error:
                raise ValueError(f"{what}: {error} ({order})") from error
        for warning in caught:
            warnings.warn(f"{what}: {warning.message} ({order})", warning.category, stacklevel=2)
        statistics = options.get("statistics")
        of_counted = counted(statistics, options["weights"]) if statistics else []
        states = self.method.states(result, list(thetas[0]), of_counted)
        if self.method.scale is not None:
            assert start is not None
            for state in states.values():
                for parameter, longer in rescaled(state.state_dict, start, self.method.scale):
                    state.state_dict[parameter] = longer  # one at a time: never two whole models
        return states

    def _averaged(self, names: list[str]) -> list[str]:
        """Expressions for those of these names that are meant, by any name of what is tied.

        Each that was given must be in a name of some part.
        """
        given = self.method.options["averaged"]
        patterns = [given] if isinstance(given, str) else list(given)
        merged_as: dict[str, str] = {}  # name -> that under which the parameter is merged
        for name, part in self._parts().items():
            products = name == SHARED and self.method.lora_rank is not None
            own = product_names(part.names) if products else part.names
            merged_as |= dict(zip(own, own, strict=True)) | self._tied_in(part, part.tasks[0])
        meant = {merged_as[n] for n in names_with(patterns, list(merged_as), "averaged")}
        return [f"^{re.escape(name)}$" for name in names if name in meant]

    def _statistics(self, member: str, names: list[str]) -> Statistics:
        statistics = self.tasks[member].load_statistics()
        self.examples[member] = statistics.examples
        known = {*statistics.diagonal_fisher, *statistics.block_fisher}
        known |= {f"{module}.weight" for module in statistics.gram}
        if not known & set(names):
            found = f"'{min(known)}' ..." if known else "nothing"
            how = "with MaTSStatsCallback or collect_statistics(...)"
            if self.method.lora_rank is not None:
                how += " and adapted_weights=True, since lora_rank merges what LoRA adds to them"
            raise ValueError(
                f"task '{member}': its statistics cover none of the parameters to merge"
                f" ('{names[0]}' ...), but {found}: take them of the module that was fine-tuned,"
                f" {how}"
            )
        # they belong to the task's weights, as it has checked
        info = {what: value for what, value in statistics.info.items() if what != "digest"}
        return replace(statistics, info=info)

    def _start_of(self, part: str, device: torch.device) -> Weights | None:
        if part == SHARED:
            start = self._pretrained
        else:
            heads = {_head_part(group): head for group, head in self._pretrained_heads.items()}
            start = heads.get(part)
        if start is None:
            if self.method.needs_start:
                raise ValueError(
                    f"{self.method.name} needs the start of the {part}: pass"
                    f" {'pretrained' if part == SHARED else 'pretrained_heads'}=..."
                )
            return None
        return Part(start, list(start), device)


def _weights_of(weights: Any, tasks: Sequence[str]) -> dict[str, float]:
    """task -> its number, of what was given as options["weights"]."""
    if isinstance(weights, Mapping):
        if unknown := sorted(set(weights) ^ set(tasks)):
            raise ValueError(
                f"options['weights']: '{unknown[0]}' is no task, or has no weight; the tasks"
                f" are {', '.join(tasks)}"
            )
        weights = [weights[name] for name in tasks]
    return dict(zip(tasks, check_weights(weights, len(tasks)), strict=True))


def _head_part(group: str) -> str:
    return f"head group '{group}'"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        transient=True,
    ) as bar:
        row = bar.add_task(what)
        yield lambda name, index, total: bar.update(
            row, completed=index, total=total, description=f"{what}: {name}"
        )
