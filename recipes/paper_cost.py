"""What the ways to one model for all tasks take: FLOPs and seconds.

FLOPs are those that torch's FlopCounterMode sees: of matrix products and convolutions, a multiply
and an add being two. Decompositions (the preconditioner, RegMean, Iso-C, TSV-M) and what goes over
the numbers one by one are not among them, so look at the seconds too.

Training is measured on a few batches, drawn at random, and scaled to all steps.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import lightning as L
from bench import Bench
from cells import Cell, Merge
from multitask_model import MultitaskData, multitask_module
from paper_records import Record, Table
from paper_seeds import Seed
from paper_settings import Cost, Setting
from paper_tables import chosen_point
from process import return_memory
from refreshed import run_plan, with_kept
from steps import Steps
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from train_tasks import statistics_callback, task_module
from typing_extensions import override

from mats_lightning import RefreshPlan
from mats_lightning.evaluation import quiet_trainer
from mats_lightning.methods import REFERENCES

Measured = dict[str, float]  # flops, seconds


@dataclass(frozen=True)
class Taken:
    """One line of the table.

    Args:
        what: in words.
        iterations: of a merge.
        settings: how training was measured.
        key: of its cell; None for a method whose settings are not chosen yet.
        measure: does it now.
    """

    what: str
    iterations: int
    settings: str
    key: dict[str, Any] | None
    measure: Callable[[Bench], Measured]


class CostTable(Table):
    """Training, one evaluation, each method as it was chosen on validation rows, and refreshes."""

    def __init__(self, setting: Setting, cost: Cost, seed: Seed) -> None:
        self.cost, self.seed = cost, seed
        self.refresh = setting.refresh
        self.methods = {
            label: method
            for label, method in setting.methods.items()
            if method.method not in REFERENCES
        }

    def records(self) -> Iterator[Record]:
        for line in self.lines():
            yield Record(
                seed=self.seed.seed,
                table="cost",
                label=line.what,
                settings=line.settings,
                iterations=line.iterations,
                **self.seed.cells.slot(line.key),
            )

    def steps_left(self) -> tuple[int, int]:
        lines = list(self.lines())
        return len(lines), sum(self.seed.cells.at(line.key) is not None for line in lines)

    def run(self, steps: Steps) -> None:
        """Methods whose settings are not chosen yet stay missing."""
        bench = self.seed.bench(steps)
        for line in self.lines():
            if line.key is not None and self.seed.cells.at(line.key) is None:
                found, _ = steps.run(f"cost: {line.what}", line.measure, bench)
                cell = Cell({}, found["seconds"], flops=found["flops"])
                self.seed.cells.keep(line.key, cell)

    def forget(self) -> None:
        self.seed.cells.forget(line.key for line in self.lines() if line.key is not None)

    def lines(self) -> Iterator[Taken]:
        seed, batches = self.seed, self.cost.batches
        trainings: dict[str, Callable[[Bench], Measured]] = {
            "fine-tuning": lambda bench: finetuning(seed, batches, statistics=False),
            "fine-tuning with statistics": lambda bench: finetuning(seed, batches, True),
            "multitask training": lambda bench: multitask(seed, batches),
        }
        for what, measure in trainings.items():
            key = {"cost": what, "batches": batches}
            yield Taken(what, 0, f"scaled from {batches} batches a task", key, measure)
        yield Taken("one evaluation", 0, "test rows", {"cost": "evaluation"}, evaluation)
        for label, method in self.methods.items():
            point = chosen_point(seed.cells, method)
            if point is None:
                yield Taken(f"merge: {label}", 0, "not chosen yet", None, evaluation)
                continue
            merge, count = point
            merge = replace(merge, counts=(count,))
            key = merge.key(count, "none") | {"cost": "merge"}
            yield Taken(f"merge: {label}", count, "", key, partial(merging, merge))
            if self.refresh is None or label not in self.refresh.merges:
                continue
            for words, plan in self.refresh.plans.items():
                plan = with_kept(plan, merge.options)
                if plan.rounds:
                    key = merge.key(count, "none") | {"cost": "refresh", "plan": asdict(plan)}
                    measure = partial(refreshing, merge, plan)
                    yield Taken(f"refresh: {label}", count, words, key, measure)


def counted(action: Callable[..., Any], *arguments: Any) -> Measured:
    """The FLOPs and the seconds of a call."""
    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        action(*arguments)
    seconds = time.perf_counter() - started
    return {"flops": float(counter.get_total_flops()), "seconds": round(seconds, 3)}


def merging(merge: Merge, bench: Bench) -> Measured:
    module = bench.module(merge)
    return counted(module.merge, bench.trainer.strategy.root_device, False)


def refreshing(merge: Merge, plan: RefreshPlan, bench: Bench) -> Measured:
    """All of it, validation too."""
    module = bench.module(merge)
    module.merge(bench.trainer.strategy.root_device, progress=False)
    return counted(run_plan, bench, module, plan, None, False)


def evaluation(bench: Bench) -> Measured:
    module = bench.module(Merge("average"))
    module.merge(bench.trainer.strategy.root_device, progress=False)
    return counted(partial(bench.trainer.test, verbose=False), module)


def finetuning(seed: Seed, batches: int, statistics: bool) -> Measured:
    """Of all tasks' fine-tunes together; statistics are taken in the last epoch alone."""
    total = {"flops": 0.0, "seconds": 0.0}
    for task, data in seed.suite.data.items():
        data.setup("fit")
        loader = list(data.train_dataloader())
        epochs = seed.options.epochs
        plain = steps(seed, task_module(seed.options, task, data), loader, batches, False)
        last = plain
        if statistics:
            last = steps(seed, task_module(seed.options, task, data), loader, batches, True)
        for name in total:
            total[name] += len(loader) * ((epochs - 1) * plain[name] + last[name])
    return total


def multitask(seed: Seed, batches: int) -> Measured:
    """As many batches are measured as for all fine-tunes together."""
    data = seed.suite.data
    together = MultitaskData(list(data.values()))
    together.setup("fit")
    L.seed_everything(seed.seed, verbose=False)
    loader = list(together.train_dataloader())
    one = steps(seed, multitask_module(seed.options, data), loader, batches * len(data), False)
    return {name: seed.options.epochs * len(loader) * value for name, value in one.items()}


def steps(
    seed: Seed, module: L.LightningModule, loader: Sequence[Any], batches: int, statistics: bool
) -> Measured:
    """A mean training step, over this number of the loader's batches.

    One more goes ahead and counts for the FLOPs alone: the first step makes the optimizer's state
    and, with statistics, is checked against autograd. The counter is on while time is taken.
    """
    chosen = random.Random(seed.seed).sample(loader, min(batches, len(loader)))
    clock = Clock()
    trainer = quiet_trainer(
        accelerator=seed.options.accelerator,
        max_epochs=1,
        callbacks=[*([statistics_callback(seed.options)] if statistics else []), clock],
    )
    with FlopCounterMode(display=False) as counter:
        trainer.fit(module, DataLoader([chosen[0], *chosen], batch_size=None))  # type: ignore[arg-type]
    return_memory()
    flops = counter.get_total_flops() / (len(chosen) + 1)
    return {"flops": flops, "seconds": (clock.ends[-1] - clock.ends[0]) / len(chosen)}


class Clock(L.Callback):
    """When each training step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    @override
    def on_train_batch_end(self, *arguments: Any) -> None:
        self.ends.append(time.perf_counter())
