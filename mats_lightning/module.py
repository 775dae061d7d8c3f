"""MergeModule: merges once, then `trainer.test` says how good it is on every task."""

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from typing_extensions import override

from mats_lightning import merging
from mats_lightning.checkpoints import load_weights
from mats_lightning.export import MergeCard, export_huggingface
from mats_lightning.merging import Block, MergeResult
from mats_lightning.merging.blocks import covering_statistics
from mats_lightning.merging.models import check_models, check_weights
from mats_lightning.names import plain_name
from mats_lightning.sidecar import versions
from mats_lightning.statistics import Statistics
from mats_lightning.tasks import Part, Task, check_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Weights = Mapping[str, Tensor]
METHODS: dict[str, Callable[..., Any]] = {
    "average": merging.average,
    "task_arithmetic": merging.task_arithmetic,
    "ties": merging.ties,
    "fisher": merging.fisher,
    "regmean": merging.regmean,
    "mats": merging.mats,
}
# what a method without a choice of its own takes
STATISTICS = {"fisher": ("diagonal_fisher",), "regmean": ("gram",)}
# rows of a comparison that merge nothing: each task's own model; the start under its head
REFERENCES = ("individual", "pretrained")
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
        method: one of average, task_arithmetic, ties, fisher, regmean, mats; or individual or
            pretrained, the rows that a comparison needs.
        options: keyword arguments of the merge function. `weights` may map task names to
            numbers. `iterations` of mats may be a list: `use(n)` switches between the states.
        pretrained: the model that all tasks started from (a state dict, or a path that
            `load_weights` reads); needed by pretrained, task_arithmetic, ties, and the options
            init="pretrained" and uncovered="pretrained".
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
        check_tasks(tasks)
        self.tasks = {task.name: task for task in tasks}
        self.modules_of_tasks = nn.ModuleList(task.module for task in tasks)
        self.method = method
        self.options = dict(options or {})
        self.scores: dict[str, float] = {}  # task -> primary metric, of the last run
        self._pretrained: Weights | None = (
            load_weights(pretrained) if isinstance(pretrained, str | os.PathLike) else pretrained
        )
        self._pretrained_heads = dict(pretrained_heads or {})
        self._individual = dict(individual) if individual is not None else None
        self._weights = self._task_weights()
        self._merged: dict[str, dict[int, MergeResult]] | None = None  # part -> count -> state
        self._in_use = 0
        self._check_arguments()

    # -- merging -----------------------------------------------------------------------------

    def merge(self, device: torch.device | str = "cpu", progress: bool = True) -> None:
        """Merge, once: a second call does nothing. The merged state is then in place.

        Raises what the merge function, the checkpoints and the sidecars raise.
        """
        if self._merged is not None:
            return
        device = torch.device(device)
        merged: dict[str, dict[int, MergeResult]] = {}
        if self.method not in REFERENCES:
            for part, (names, members) in self._parts().items():
                merged[part] = self._merge_part(part, names, members, device, progress)
        elif self.method == "pretrained":
            for task in self.tasks.values():
                shared = [name for name in task.weights if not task.owns(name)]
                check_models([Part(task.weights, shared, device)], self._start_of(SHARED, device))
        self._merged = merged
        self.use(max(self._counts()))
        for part, results in merged.items():
            uncovered = results[self._in_use].uncovered
            if uncovered:
                how = self.options.get("uncovered", "average")
                rank_zero_info(
                    f"{self.method}, {part}: {len(uncovered)} parameters without a statistic of"
                    f" this objective ({how}): {', '.join(uncovered[:4])}"
                    f"{', ...' if len(uncovered) > 4 else ''}"
                )

    def use(self, iterations: int) -> None:
        """Put the state after this number of CG iterations in place.

        Raises ValueError for a number that `iterations` did not list.
        """
        self.merge()
        if iterations not in self._counts():
            raise ValueError(
                f"there is no state after {iterations} iterations; options['iterations'] gave"
                f" {sorted(self._counts())}"
            )
        self._in_use = iterations
        for name, task in self.tasks.items():
            state = self.state_of(name)
            actual = task.module.state_dict()
            task.module.load_state_dict({k: state.get(plain_name(k), v) for k, v in actual.items()})

    def state_of(self, task: str) -> dict[str, Tensor]:
        """The state dict of one task's model: merged parameters, and its own head."""
        if task not in self.tasks:
            raise ValueError(f"no task is named '{task}'; there are {', '.join(self.tasks)}")
        self.merge()
        assert self._merged is not None
        state = dict(self.tasks[task].weights)
        if self.method == "pretrained":
            assert self._pretrained is not None
            state |= {n: self._pretrained[n] for n in state if not self.tasks[task].owns(n)}
        for part, (_, members) in self._parts().items():
            if part in self._merged and task in members:
                state |= self._merged[part][self._in_use].state_dict
        return state

    def model(self, task: str) -> pl.LightningModule:
        """A copy of the task's LightningModule with the merged weights, independent of ours."""
        state = self.state_of(task)
        module = copy.deepcopy(self.tasks[task].module)
        actual = module.state_dict()
        module.load_state_dict({k: state.get(plain_name(k), v) for k, v in actual.items()})
        return module

    def export(
        self,
        folder: str | os.PathLike[str],
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the merged model as a Hugging Face folder: what AutoModel.from_pretrained loads.

        The one transformers model inside of the tasks' modules is written with its config; all
        that lies outside of it (heads) goes to heads/<task>.safetensors, and a card says how it
        was merged. `tokenizer` is by default that of the tasks' module or data, if they have one.

        Raises ValueError where there is no such model or several, or where it is not the same
        for all tasks; FileExistsError for a folder that is not empty, without `overwrite`.
        """
        prefix = {name: self._backbone_prefix(task) for name, task in self.tasks.items()}
        first = next(iter(self.tasks))
        inside = [name for name in self._parts()[SHARED][0] if name.startswith(prefix[first])]
        own = [n for n in self.tasks[first].weights if n.startswith(prefix[first])]
        if len(set(prefix.values())) > 1 or len(own) != len(inside):
            raise ValueError(
                "export writes one model that all tasks share, and here parameters inside of"
                f" '{prefix[first].rstrip('.')}' belong to single tasks; use model(task) instead"
            )
        merged = self.model(first).get_submodule(prefix[first].rstrip("."))
        assert isinstance(merged, _pretrained_model())
        heads = {}
        for name in self.tasks:
            state = self.state_of(name)
            heads[name] = {k: v for k, v in state.items() if not k.startswith(prefix[first])}
        if tokenizer is None:
            task = self.tasks[first]
            for owner in (task.module, task.data):
                tokenizer = tokenizer or getattr(owner, "tokenizer", None)
        card = MergeCard(
            method=self.method,
            options=self.options | ({"iterations": self._in_use} if self._in_use else {}),
            tasks=[
                {"name": name, "checkpoint": Path(task.checkpoint).name, "metric": task.metric}
                for name, task in self.tasks.items()
            ],
            base_model=merged.config.name_or_path or None,
            versions=versions(),
            scores=self.scores or None,
        )
        return export_huggingface(folder, merged, tokenizer, heads, card, overwrite)

    def _backbone_prefix(self, task: Task) -> str:
        found: list[str] = []
        kind = _pretrained_model()
        for name, module in task.module.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if isinstance(module, kind) and not inside:
                found.append(name)
        if len(found) != 1:
            raise ValueError(
                f"task '{task.name}': export needs one transformers model inside of"
                f" {type(task.module).__name__}, found {len(found)}"
            )
        return f"{plain_name(found[0])}."

    @property
    def blocks(self) -> dict[str, Block]:
        """Parameter -> how its solve went (mats), for the state in use."""
        self.merge()
        assert self._merged is not None
        return {
            name if part == SHARED else f"{part}: {name}": block
            for part, results in self._merged.items()
            for name, block in results[self._in_use].blocks.items()
        }

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
        options["weights"] = [self._weights[name] for name in members]
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
        wanted = inspect.signature(function).parameters
        if "statistics" in wanted:
            options["statistics"] = [self._statistics(member, names) for member in members]
        if "pretrained" in wanted:
            options["pretrained"] = self._start_of(part, device)
        with ExitStack() as stack:
            if "on_block" in wanted and progress:
                options["on_block"] = stack.enter_context(_progress(f"{self.method}, {part}"))
            try:
                result = function(thetas, **options)
            except ValueError as error:
                order = ", ".join(f"model {i} is '{m}'" for i, m in enumerate(members))
                raise ValueError(f"{self.method} of the {part}: {error} ({order})") from error
        if isinstance(result, MergeResult):
            return {self._counts()[0]: result}
        if self.method == "mats":
            assert isinstance(result, dict)
            return result
        if self.method in STATISTICS:
            kinds = STATISTICS[self.method]
            covered = covering_statistics(names, kinds, options["statistics"])
            uncovered = [n for n in names if n not in covered and result[n].is_floating_point()]
            return {0: MergeResult(result, uncovered=uncovered)}
        return {0: MergeResult(result)}

    def _statistics(self, member: str, names: list[str]) -> Statistics:
        statistics = self.tasks[member].load_statistics()
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
            self.method in ("pretrained", "task_arithmetic", "ties")
            or self.options.get("init") == "pretrained"
            or self.options.get("uncovered") == "pretrained"
        )

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
            return {name: float(weights[name]) for name in self.tasks}
        return dict(zip(self.tasks, check_weights(weights, len(self.tasks)), strict=True))

    def _check_arguments(self) -> None:
        if self.method not in METHODS and self.method not in REFERENCES:
            known = ", ".join([*METHODS, *REFERENCES])
            raise ValueError(f"no method is called '{self.method}'; choose from {known}")
        ours = {"thetas", "statistics", "pretrained", "weights", "on_block"}
        signature = inspect.signature(METHODS[self.method]) if self.method in METHODS else None
        known_options = set(signature.parameters) - ours if signature else set()
        if unknown := sorted(set(self.options) - known_options):
            raise ValueError(
                f"{self.method} has no option '{unknown[0]}'; it has"
                f" {', '.join(sorted(known_options)) or 'none'}"
            )
        if self._needs_start() and self._pretrained is None:
            raise ValueError(
                f"method '{self.method}' with {self.options} needs the model that the tasks"
                " started from: pass pretrained=<state dict or path>"
            )
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

    @override
    def setup(self, stage: str) -> None:
        for task in self.tasks.values():
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
        self.use(self._in_use)  # another MergeModule of the same tasks may have put its own in

    @override
    def test_dataloader(self) -> list[Any]:
        return self._loaders("test")

    @override
    def val_dataloader(self) -> list[Any]:
        return self._loaders("validate")

    def _loaders(self, stage: str) -> list[Any]:
        return [task.dataloader(stage, self.trainer) for task in self.tasks.values()]

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
        task = list(self.tasks.values())[dataloader_idx]
        of_data = isinstance(task.data, pl.LightningDataModule) and is_overridden(hook, task.data)
        with self._speaking_for(task):
            return getattr(task.data if of_data else task.module, hook)(*arguments, 0)

    def _step(self, hook: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        task = list(self.tasks.values())[dataloader_idx]
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
        for task in self.tasks.values():
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
        options.pop("metric_attribute", None)  # a name in their module; ours finds it itself
        self.log(f"{task}/{name}", value, *args, **options)

    def _log_scores(self) -> None:
        logged = self.trainer.callback_metrics
        scores = {}
        for name, task in self.tasks.items():
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


SHARED = "shared parameters"


def _head_part(group: str) -> str:
    return f"head group '{group}'"


def _pretrained_model() -> type[Any]:
    from transformers import PreTrainedModel  # seconds to import: only an export needs it

    return PreTrainedModel


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
