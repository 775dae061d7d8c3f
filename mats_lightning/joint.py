"""JointMerge: tasks and a method in; what is merged together; `Merged` out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mats_lightning.merged import SHARED, Merged, PartOfTasks
from mats_lightning.merging import MergeResult
from mats_lightning.merging.models import Weights, check_models, check_weights, names_with
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
        self.method = Method.of(method, rest)
        self.examples: dict[str, int] = {}  # task -> that its statistics are of, where they count
        self._pretrained = pretrained
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

    def _merge_part(
        self, name: str, part: PartOfTasks, device: torch.device, progress: bool
    ) -> dict[int, MergeResult]:
        """The states by iteration count."""
        thetas = [Part(self.tasks[member].weights, part.names, device) for member in part.tasks]
        options, start = self._options_of(part.tasks, part.names), self._start_of(name, device)
        return self._merge(name, part, thetas, start, options, progress)

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
            options["statistics"] = [self._statistics(member, names) for member in members]
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
            try:
                result = METHODS[self.method.name](thetas, **options)
            except ValueError as error:
                order = ", ".join(f"model {i} is '{m}'" for i, m in enumerate(part.tasks))
                raise ValueError(
                    f"{self.method.name} of the {part_name}: {error} ({order})"
                ) from error
        states = self.method.states(result, list(thetas[0]), options.get("statistics", []))
        if self.method.scale is not None:
            assert start is not None
            for state in states.values():
                for parameter, longer in rescaled(state.state_dict, start, self.method.scale):
                    state.state_dict[parameter] = longer  # one at a time: never two whole models
        return states

    def _averaged(self, names: list[str]) -> list[str]:
        """The expressions that these names have; each must be in a name of some part."""
        given = self.method.options["averaged"]
        patterns = [given] if isinstance(given, str) else list(given)
        everywhere: dict[str, None] = {}
        for name, part in self._parts().items():
            products = name == SHARED and self.method.lora_rank is not None
            everywhere |= dict.fromkeys(product_names(part.names) if products else part.names)
        names_with(patterns, list(everywhere), "averaged")
        return [p for p in patterns if any(re.search(p, name) for name in names)]

    def _statistics(self, member: str, names: list[str]) -> Statistics:
        statistics = self.tasks[member].load_statistics()
        self.examples[member] = statistics.examples
        known = {*statistics.diagonal_fisher, *statistics.block_fisher}
        known |= {f"{module}.weight" for module in statistics.gram}
        if not known & set(names):
            found = f"'{min(known)}' ..." if known else "nothing"
            raise ValueError(
                f"task '{member}': its statistics cover none of the parameters to merge"
                f" ('{names[0]}' ...), but {found}: take them of the module that was fine-tuned,"
                " with MaTSStatsCallback or collect_statistics(...)"
            )
        return statistics

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
