"""JointMerge: tasks and a method in; the state dict of each task's merged model out."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mats_lightning import merging
from mats_lightning.lora import Lora
from mats_lightning.merging import Block, MergeResult
from mats_lightning.merging.blocks import covering_statistics
from mats_lightning.merging.models import check_models, check_weights, names_with
from mats_lightning.products import (
    Refactored,
    factors_of,
    lora_of,
    product_models,
    product_names,
    product_start,
    refactored,
)
from mats_lightning.statistics import Statistics
from mats_lightning.tasks import Part, Task, check_same_scaling, check_tasks

Weights = Mapping[str, Tensor]
METHODS: dict[str, Callable[..., Any]] = {
    "average": merging.average,
    "task_arithmetic": merging.task_arithmetic,
    "ties": merging.ties,
    "dare": merging.dare,
    "iso_c": merging.iso_c,
    "tsv_m": merging.tsv_m,
    "fisher": merging.fisher,
    "regmean": merging.regmean,
    "mats": merging.mats,
}
OF_TASK_VECTORS = ("task_arithmetic", "ties", "dare", "iso_c", "tsv_m")  # need the start
# what a method without a choice of its own takes
STATISTICS = {"fisher": ("diagonal_fisher",), "regmean": ("gram",)}
# rows of a comparison that merge nothing: each task's own model; the start under its head
REFERENCES = ("individual", "pretrained")
SHARED = "shared parameters"


class JointMerge:
    """Which parameters of which tasks are merged together, and what came out.

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
        self.method = method
        self.options = dict(options)
        self.in_use = 0  # the iteration count whose state is given out
        self.examples: dict[str, int] = {}  # task -> that its statistics are of, where they count
        self.refreshed: dict[str, Any] = {}  # how the merge was changed since
        self._heads: dict[str, dict[str, Tensor]] = {}  # task -> what was put in for its own head
        self._pretrained = pretrained
        self._pretrained_heads = pretrained_heads
        self.weights = self._task_weights()
        self.lora_rank: int | None = None  # that merged products get as factors
        if method in METHODS:
            self.lora_rank = self.options.pop("lora_rank", None)
        self._products: dict[int, Refactored] = {}  # by count, where products are merged
        self._merged: dict[str, dict[int, MergeResult]] | None = None  # part -> count -> state
        self._check_arguments()

    def run(self, device: torch.device | str = "cpu", progress: bool = True) -> None:
        """Merge, once: a second call does nothing; the state of most iterations is in use.

        Raises what the merge function, the checkpoints and the sidecars raise.
        """
        if self._merged is not None:
            return
        device = torch.device(device)
        if device.type == "mps":  # has no float64, which the solvers decompose in
            device = torch.device("cpu")
        merged: dict[str, dict[int, MergeResult]] = {}
        if self.method not in REFERENCES:
            if self.lora_rank is None:
                check_same_scaling(list(self.tasks.values()))
            for part, (names, members) in self._parts().items():
                merged[part] = self._merge_part(part, names, members, device, progress)
        elif self.method == "pretrained":
            for task in self.tasks.values():
                shared = [name for name in task.weights if not task.owns(name)]
                check_models([Part(task.weights, shared, device)], self._start_of(SHARED, device))
        self._merged = merged
        self.use(max(self.counts))

    def use(self, iterations: int, only: bool = False) -> None:
        """Switch to the state after this number of CG iterations; `only` lets go of the others.

        Raises ValueError for a number that `iterations` did not list, or that was let go of.
        """
        assert self._merged is not None
        there = set(self.counts).intersection(*self._merged.values())
        if iterations not in there:
            raise ValueError(
                f"there is no state after {iterations} iterations; options['iterations'] gave"
                f" {sorted(self.counts)}, and {sorted(there)} are kept"
            )
        self.in_use = iterations
        if only:
            for part, states in self._merged.items():
                self._merged[part] = {iterations: states[iterations]}

    def replace_shared(self, result: MergeResult, how: Mapping[str, Any]) -> None:
        """Other values of the shared parameters, in the state in use; the other states go.

        Raises ValueError for a method that merges nothing, for merged products of LoRA factors,
        and for other names or shapes.
        """
        assert self._merged is not None
        if self.method in REFERENCES:
            raise ValueError(f"'{self.method}' merges nothing: there is no merged state to replace")
        if self.lora_rank is not None:
            raise ValueError(
                f"lora_rank={self.lora_rank} merges the products of LoRA factors, and what it makes"
                " of them are no task's own factors: nothing can be put in their place. To refresh"
                " a merge of adapters, merge factor by factor (no lora_rank)"
            )
        current = self._merged[SHARED][self.in_use].state_dict
        check_models([current, result.state_dict])
        self._merged[SHARED] = {self.in_use: result}
        self.refreshed = dict(how)

    def own_head(self, task: str) -> list[str]:
        """The parameters that no other task has a part in: none where its head is merged."""
        merged = {
            n for _, (names, members) in self._parts().items() if task in members for n in names
        }
        return [name for name in self.tasks[task].weights if name not in merged]

    def replace_heads(self, heads: Mapping[str, Weights], how: Mapping[str, Any]) -> None:
        """Other values for heads that the tasks do not share; those not named stay as they are.

        Raises ValueError for other tasks, names or shapes.
        """
        for task, head in heads.items():
            if task not in self.tasks:
                raise ValueError(f"no task is named '{task}'; there are {', '.join(self.tasks)}")
            own = {name: self.tasks[task].weights[name] for name in self.own_head(task)}
            try:
                check_models([own, head])
            except ValueError as error:
                raise ValueError(f"head of task '{task}': {error}") from error
        self._heads |= {task: dict(head) for task, head in heads.items()}
        self.refreshed = dict(how)

    def state_of(self, task: str) -> dict[str, Tensor]:
        """The state dict of one task's model: merged parameters, and its own head."""
        if task not in self.tasks:
            raise ValueError(f"no task is named '{task}'; there are {', '.join(self.tasks)}")
        assert self._merged is not None
        state = dict(self.tasks[task].weights)
        if self.method == "pretrained":
            assert self._pretrained is not None
            state |= {n: self._pretrained[n] for n in state if not self.tasks[task].owns(n)}
        for part, (_, members) in self._parts().items():
            if part in self._merged and task in members:
                state |= self._merged[part][self.in_use].state_dict
        return state | self._heads.get(task, {})

    def adapter_of(self, task: str) -> Lora | None:
        """The LoRA adapter of one task's model, where its checkpoint is one, with what is merged.

        Its rank, where products are merged, is another than that of the checkpoint.
        """
        lora = lora_of(self.tasks[task])
        if lora is None:
            return None
        like = self._products[self.in_use].form if self._products else lora
        return replace(like, weights=self.state_of(task))

    @property
    def lost(self) -> dict[str, float]:
        """Layer -> what share of its merged product the rank leaves out, for the state in use."""
        return self._products[self.in_use].lost if self._products else {}

    @property
    def blocks(self) -> dict[str, Block]:
        """Parameter -> how its solve went (mats), for the state in use."""
        assert self._merged is not None
        return {
            name if part == SHARED else f"{part}: {name}": block
            for part, results in self._merged.items()
            for name, block in results[self.in_use].blocks.items()
        }

    @property
    def uncovered(self) -> dict[str, list[str]]:
        """Part -> its parameters that no statistic of the method covers, where there are any."""
        assert self._merged is not None
        found = {part: states[self.in_use].uncovered for part, states in self._merged.items()}
        return {part: names for part, names in found.items() if names}

    @property
    def shared(self) -> list[str]:
        """The parameters that all tasks share."""
        return self._parts()[SHARED][0]

    def _parts(self) -> dict[str, tuple[list[str], list[str]]]:
        """What is merged together: part -> (parameter names, task names)."""
        first = next(iter(self.tasks.values()))
        shared = [name for name in first.weights if not first.owns(name)]
        parts = {SHARED: (shared, list(self.tasks))}
        for group in sorted({t.head_group for t in self.tasks.values() if t.head_group}):
            members = [name for name, task in self.tasks.items() if task.head_group == group]
            task = self.tasks[members[0]]
            if len(members) > 1:
                head = [name for name in task.weights if task.owns(name)]
                parts[_head_part(group)] = (head, members)
        return parts

    def _merge_part(
        self, part: str, names: list[str], members: list[str], device: torch.device, progress: bool
    ) -> dict[int, MergeResult]:
        function = METHODS[self.method]
        options = dict(self.options)
        options["weights"] = [self.weights[name] for name in members]
        thetas = []
        for member in members:
            task = self.tasks[member]
            own = [n for n in task.weights if task.owns(n) != (part == SHARED)]
            if set(own) != set(names):
                odd = sorted(set(own) ^ set(names))[0]
                raise ValueError(
                    f"tasks '{members[0]}' and '{member}' do not have the same parameters to merge"
                    f" ({part}): '{odd}' is in one of them alone; if it belongs to a head, name it"
                    " in Task(head=...)"
                )
            thetas.append(Part(task.weights, names, device))
        adapters: list[Lora] = []
        if part == SHARED and self.lora_rank is not None:
            adapters = [factors_of(task) for task in self.tasks.values()]
            thetas = product_models(adapters, device)
            names = list(thetas[0])
        wanted = inspect.signature(function).parameters
        if "statistics" in wanted:
            options["statistics"] = [self._statistics(member, names) for member in members]
        if "pretrained" in wanted:
            options["pretrained"] = (
                product_start(thetas[0]) if adapters else self._start_of(part, device)
            )
        if "averaged" in options:
            options["averaged"] = self._averaged(names)
        with ExitStack() as stack:
            if "on_block" in wanted and progress:
                options["on_block"] = stack.enter_context(_progress(f"{self.method}, {part}"))
            try:
                result = function(thetas, **options)
            except ValueError as error:
                order = ", ".join(f"model {i} is '{m}'" for i, m in enumerate(members))
                raise ValueError(f"{self.method} of the {part}: {error} ({order})") from error
        states = self._states(result, names, options.get("statistics", []))
        if not adapters:
            return states
        assert self.lora_rank is not None
        states, self._products = refactored(
            states, self.lora_rank, adapters, options.get("statistics", []), options["weights"]
        )
        return states

    def _states(
        self, result: Any, names: list[str], statistics: list[Statistics]
    ) -> dict[int, MergeResult]:
        """What a merge function returned, by iteration count."""
        if isinstance(result, MergeResult):
            return {self.counts[0]: result}
        if self.method == "mats":
            assert isinstance(result, dict)
            return result
        if self.method in STATISTICS:
            covered = covering_statistics(names, STATISTICS[self.method], statistics)
            uncovered = [n for n in names if n not in covered and result[n].is_floating_point()]
            return {0: MergeResult(result, uncovered=uncovered)}
        return {0: MergeResult(result)}

    def _averaged(self, names: list[str]) -> list[str]:
        """The expressions that these names have; each must be in a name of some part."""
        given = self.options["averaged"]
        patterns = [given] if isinstance(given, str) else list(given)
        everywhere: dict[str, None] = {}
        for part, (own, _) in self._parts().items():
            products = part == SHARED and self.lora_rank is not None
            everywhere |= dict.fromkeys(product_names(own) if products else own)
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
            if self._needs_start():
                raise ValueError(
                    f"{self.method} needs the start of the {part}: pass"
                    f" {'pretrained' if part == SHARED else 'pretrained_heads'}=..."
                )
            return None
        return Part(start, list(start), device)

    def _needs_start(self) -> bool:
        return (
            self.method in ("pretrained", *OF_TASK_VECTORS)
            or self.options.get("init") == "pretrained"
            or self.options.get("uncovered") == "pretrained"
        )

    @property
    def counts(self) -> list[int]:
        """The iteration counts of which there are states; [0] for methods without."""
        if self.method != "mats":
            return [0]
        default = inspect.signature(merging.mats).parameters["iterations"].default
        iterations = self.options.get("iterations", default)
        return [iterations] if isinstance(iterations, int) else list(iterations)

    def _task_weights(self) -> dict[str, float]:
        weights = self.options.pop("weights", None)
        if isinstance(weights, Mapping):
            if unknown := sorted(set(weights) ^ set(self.tasks)):
                raise ValueError(
                    f"options['weights']: '{unknown[0]}' is no task, or has no weight; the tasks"
                    f" are {', '.join(self.tasks)}"
                )
            weights = [weights[name] for name in self.tasks]
        return dict(zip(self.tasks, check_weights(weights, len(self.tasks)), strict=True))

    def _check_arguments(self) -> None:
        if self.method not in METHODS and self.method not in REFERENCES:
            known = ", ".join([*METHODS, *REFERENCES])
            raise ValueError(f"no method is called '{self.method}'; choose from {known}")
        ours = {"thetas", "statistics", "pretrained", "weights", "on_block"}
        signature = inspect.signature(METHODS[self.method]) if self.method in METHODS else None
        known_options = set(signature.parameters) - ours if signature else set()
        listed = sorted({*known_options, "lora_rank"} if signature else [])
        if unknown := sorted(set(self.options) - known_options):
            raise ValueError(
                f"{self.method} has no option '{unknown[0]}'; it has {', '.join(listed) or 'none'}"
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank}: an adapter has 1 at least")
        if self.lora_rank is None and self._needs_start() and self._pretrained is None:
            raise ValueError(
                f"method '{self.method}' with {self.options} needs the model that the tasks"
                " started from: pass pretrained=<state dict or path>"
            )


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
