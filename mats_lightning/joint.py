"""JointMerge: tasks and a method in; what is merged together; `Merged` out."""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mats_lightning import merging
from mats_lightning.merged import SHARED, Merged, PartOfTasks
from mats_lightning.merging import MergeResult
from mats_lightning.merging.blocks import covering_statistics
from mats_lightning.merging.fisher import STATISTICS as OF_FISHER
from mats_lightning.merging.models import (
    check_models,
    check_weights,
    counted,
    names_with,
    of_batch_norm,
)
from mats_lightning.merging.regmean import STATISTICS as OF_REGMEAN
from mats_lightning.merging.rescale import rescaled
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
OF_CURVATURE = ("fisher", "regmean", "mats")  # have no scale of their own
OF_TASK_VECTORS = ("task_arithmetic", "ties", "dare", "iso_c", "tsv_m")  # need the start
# what a method without a choice of its own takes
STATISTICS = {"fisher": OF_FISHER, "regmean": OF_REGMEAN}
# rows of a comparison that merge nothing: each task's own model; the start under its head
REFERENCES = ("individual", "pretrained")


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
        self.method = method
        self.options = dict(options)
        self.examples: dict[str, int] = {}  # task -> that its statistics are of, where they count
        # task -> other name of a tied parameter -> the name under which it is merged
        self._tied = {name: tied_names(task.module) for name, task in self.tasks.items()}
        shared = next(iter(self._tied.values()))
        self._pretrained = None
        if pretrained is not None:
            self._pretrained = with_tied(pretrained, shared, "pretrained")
        if isinstance(init := self.options.get("init"), Mapping):
            self.options["init"] = with_tied(init, shared, "options['init']")
        self._pretrained_heads = pretrained_heads
        self.weights = self._task_weights()
        self.lora_rank: int | None = None  # that merged products get as factors
        self.scale: float | None = None  # of the merged task vector
        if method in METHODS:
            self.lora_rank = self.options.pop("lora_rank", None)
        if method in OF_CURVATURE:
            self.scale = self.options.pop("scale", None)
        self._check_arguments()

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
        if self.method == "pretrained":
            unmerged, start = self._pretrained, self._start_of(SHARED, device)
            for task in self.tasks.values():
                shared = [name for name in task.weights if not task.owns(name)]
                check_models([Part(task.weights, shared, device)], start)
        elif self.method != "individual":
            if self.lora_rank is None:
                check_same_scaling(list(self.tasks.values()))
            for name, part in parts.items():
                self._check_same_names(name, part)
                if name == SHARED and self.lora_rank is not None:
                    states[name], products = self._merge_products(part, device, progress)
                else:
                    states[name] = self._merge_part(name, part, device, progress)
        return Merged(
            self.method,
            self.tasks,
            parts,
            states,
            self._counts,
            products,
            lora_rank=self.lora_rank,
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
            average = merging.average(thetas)
            states = {count: MergeResult(dict(average)) for count in self._counts}
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
        assert self.lora_rank is not None
        return refactored(
            states, self.lora_rank, adapters, options.get("statistics", []), options["weights"]
        )

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(METHODS[self.method]).parameters

    def _options_of(self, members: list[str], names: list[str]) -> dict[str, Any]:
        """Arguments of the merge function, for these tasks and parameters."""
        options = {**self.options, "weights": [self.weights[name] for name in members]}
        if self._takes("statistics"):
            options["statistics"] = [self._statistics(member, names) for member in members]
        if "averaged" in options:
            options["averaged"] = self._averaged(names)
        return options

    def _merge(
        self,
        name: str,
        part: PartOfTasks,
        thetas: Sequence[Weights],
        start: Weights | None,
        options: dict[str, Any],
        progress: bool,
    ) -> dict[int, MergeResult]:
        """The states by iteration count, as long as they are to be."""
        if self._takes("pretrained"):
            options["pretrained"] = start
        init = options.get("init")
        if name != SHARED and isinstance(init, Mapping) and not init.keys() & thetas[0].keys():
            options["init"] = "average"  # `init` is of what all tasks share
        with ExitStack() as stack:
            if self._takes("on_block") and progress:
                options["on_block"] = stack.enter_context(_progress(f"{self.method}, {name}"))
            members = counted(part.tasks, options["weights"])
            order = ", ".join(f"model {i} is '{m}'" for i, m in enumerate(members))
            try:
                with warnings.catch_warnings(record=True) as caught:
                    result = METHODS[self.method](thetas, **options)
            except ValueError as error:
                raise ValueError(f"{self.method} of the {name}: {error} ({order})") from error
        for warning in caught:
            text = f"{self.method} of the {name}: {warning.message} ({order})"
            warnings.warn(text, warning.category, stacklevel=2)
        statistics = options.get("statistics")
        of_counted = counted(statistics, options["weights"]) if statistics else []
        states = self._states(result, list(thetas[0]), of_counted)
        if self.scale is not None:
            assert start is not None
            for state in states.values():
                for name, longer in rescaled(state.state_dict, start, self.scale):
                    state.state_dict[name] = longer  # one at a time: never two whole models
        return states

    def _states(
        self, result: Any, names: list[str], statistics: list[Statistics]
    ) -> dict[int, MergeResult]:
        """What a merge function returned, by iteration count."""
        if isinstance(result, MergeResult):
            return {self._counts[0]: result}
        if self.method == "mats":
            assert isinstance(result, dict)
            return dict(result)
        uncovered: list[str] = []
        if self.method in STATISTICS:
            covered = covering_statistics(names, STATISTICS[self.method], statistics)
            others = [n for n in names if n not in covered and not of_batch_norm(n, names)]
            uncovered = [n for n in others if result[n].is_floating_point()]
        return {0: MergeResult(result, uncovered=uncovered)}

    def _averaged(self, names: list[str]) -> list[str]:
        """Expressions for those of these names that are meant, by any name of what is tied.

        Each that was given must be in a name of some part.
        """
        given = self.options["averaged"]
        patterns = [given] if isinstance(given, str) else list(given)
        merged_as: dict[str, str] = {}  # name -> that under which the parameter is merged
        for name, part in self._parts().items():
            products = name == SHARED and self.lora_rank is not None
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
            if self.lora_rank is not None:
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
            or self.scale is not None
            or self.options.get("init") == "pretrained"
            or self.options.get("uncovered") == "pretrained"
        )

    @property
    def _counts(self) -> list[int]:
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
        scale = {"scale"} if self.method in OF_CURVATURE else set()
        listed = sorted({*known_options, *scale, "lora_rank"} if signature else [])
        if unknown := sorted(set(self.options) - known_options):
            raise ValueError(
                f"{self.method} has no option '{unknown[0]}'; it has {', '.join(listed) or 'none'}"
            )
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale}: a finite number is needed")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank}: an adapter has 1 at least")
        if self.lora_rank is None and self._needs_start() and self._pretrained is None:
            given = self.options | ({} if self.scale is None else {"scale": self.scale})
            raise ValueError(
                f"method '{self.method}' with {given} needs the model that the tasks"
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
