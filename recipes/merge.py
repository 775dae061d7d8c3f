"""Fine-tune, merge by every method, and compare on all tasks, in one run:

    python recipes/merge.py                                    # seven text tasks, MiniLM
    python recipes/merge.py --fast                             # the same on smaller slices
    python recipes/merge.py --config recipes/merge_images.yaml # seven image tasks, DINOv2-S
    python recipes/merge.py --tasks '[trec, sms]' --output_dir runs/two
    python recipes/merge.py --config my.yaml                   # any models and data of the hub

merge.yaml says what can be set. Fine-tunes that are finished are kept, and an interrupted one goes
on from its last epoch. So do the merges: what was measured is in cells/ (see cells.py), and is not
measured again by the same version of mats_lightning; `--again` forgets what is measured of these
methods on these fine-tunes: give it after a change in the code. `output_dir` then holds results.md,
results.csv, results.json (each point of each grid, seconds, memory), scores.png, residuals.png,
merged/ (the best merge, for `AutoModel.from_pretrained`, or, of adapters, for
`PeftModel.from_pretrained`) and tasks/ (checkpoints and statistics).
"""

import itertools
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters import STATISTICS
from bench import Bench
from cells import cells_of_tasks
from compare import INDIVIDUAL, Comparison, Outcome, check_fit, forget
from merge_options import MethodOptions, Options, parse_options
from steps import Steps
from torch import Tensor
from train_tasks import as_task, task_data, task_module, train_task, write_json

from mats_lightning import Task
from mats_lightning.report import (
    plot_residuals,
    plot_scores,
    print_table,
    write_csv,
    write_markdown,
)

ROUTINE = (  # what Lightning says about every trainer and every fit
    "GPU available",
    "TPU available",
    "💡 Tip",
    "Loading `train_dataloader`",
    "`Trainer.fit` stopped",
    "Restor",
)


def main(args: Sequence[str] | None = None) -> list[Outcome]:
    """Everything, in its order; returns the lines of the table."""
    options = parse_options(args)
    quiet_lightning()
    check_methods_fit(options, options.methods)
    clock = [time.perf_counter()]
    tasks, trained = finetuned_tasks(options)
    clock.append(time.perf_counter())
    cells = cells_of_tasks(options.output_dir, tasks)
    if options.again:
        forget({**INDIVIDUAL, **options.methods}, cells)
    with Steps() as steps:
        bench = Bench(tasks, *starts(tasks), options.accelerator, cells, steps)
        comparison = Comparison(bench)
        outcomes = comparison.run(options.methods)
    clock.append(time.perf_counter())
    report(outcomes, options.output_dir)
    clock.append(time.perf_counter())
    seconds = [round(b - a, 1) for a, b in itertools.pairwise(clock)]
    summary: dict[str, Any] = {
        "options": options.as_json(),
        "finetuning": trained,
        "methods": [outcome.as_json() for outcome in outcomes],
        "exported": None,
        "seconds": dict(zip(("finetuning", "comparison", "report"), seconds, strict=True)),
        "peak_memory_gb": peak_memory(),
    }
    write_json(options.output_dir / "results.json", summary)  # before what may be refused
    summary["exported"] = export(comparison, options.output_dir / "merged")
    summary["peak_memory_gb"] = memory = peak_memory()
    write_json(options.output_dir / "results.json", summary)
    print(
        f"{time.perf_counter() - clock[0]:.0f} s, {seconds[0]:.0f} of them fine-tuning"
        + (f"; peak memory {memory:.1f} GB" if memory else "")
        + f". All results are in {options.output_dir}"
    )
    return outcomes


def check_methods_fit(options: Options, methods: Mapping[str, MethodOptions]) -> None:
    """Look at the first task's model, before the hours of fine-tuning.

    Raises SystemExit where a method cannot merge such models.
    """
    task = options.task_list[0]
    module = task_module(options, task, task_data(options, task))
    names, kinds = list(module.state_dict()), None
    if options.adapter is not None:
        names = [n for n, p in module.backbone.named_parameters("backbone") if p.requires_grad]
        kinds = STATISTICS[options.adapter].get("statistics")
    try:
        check_fit(methods, names, kinds)
    except ValueError as error:
        sys.exit(f"error: {error}")


def finetuned_tasks(options: Options) -> tuple[list[Task], dict[str, Any]]:
    """The tasks as MergeModule takes them, and for the record what each fine-tune took."""
    tasks, record = [], {}
    for number, task in enumerate(options.task_list, start=1):
        print(f"task {number} of {len(options.tasks)}: {task.name}")
        data = task_data(options, task)
        trained = train_task(options, task, data)
        when = "now" if trained.now else "earlier, kept"
        print(f"{task.name}: {trained.checkpoint} (trained {when}, {trained.seconds:.0f} s)")
        tasks.append(as_task(options, task, data, trained.checkpoint))
        record[task.name] = {
            "checkpoint": str(trained.checkpoint),
            "seconds": trained.seconds,
            "trained_in_this_run": trained.now,
            "rows": {name: len(rows) for name, rows in data.rows.items()},
        }
    return tasks, record


def starts(tasks: Sequence[Task]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """What the tasks started from: the weights, and {head group: weights of its head}.

    Copies, since MergeModule puts other weights into the tasks' modules.
    """
    first = {name: value.clone() for name, value in tasks[0].module.state_dict().items()}
    heads = {
        task.head_group: {
            name: value.clone()
            for name, value in task.module.state_dict().items()
            if task.owns(name)
        }
        for task in tasks
        if task.head_group is not None
    }
    return first, heads


def report(outcomes: Sequence[Outcome], folder: Path) -> None:
    """The table on the console, as Markdown and as CSV, and the figures."""
    rows = [outcome.row for outcome in outcomes]
    print_table(rows, "test accuracy; settings chosen on validation")
    write_markdown(rows, folder / "results.md")
    write_csv(rows, folder / "results.csv")
    plot_scores(rows, folder / "scores.png")
    if curves := {outcome.label: outcome.blocks for outcome in outcomes if outcome.blocks}:
        plot_residuals(curves, folder / "residuals.png")


def export(comparison: Comparison, folder: Path) -> str | None:
    """The merge that is best on validation, for AutoModel or peft; returns its label."""
    if comparison.best is None:
        return None
    outcome, opened = comparison.best
    count = outcome.chosen.iterations
    module = opened.module(count)  # merged now, where all of it was measured in an earlier run
    module.use(count)
    module.scores = dict(outcome.scores)
    module.export(folder, overwrite=True)
    print(f"the best merge on validation, {outcome.label}, is in {folder}")
    return outcome.label


def peak_memory() -> float | None:
    """The most memory that this process has held, in GB; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def quiet_lightning() -> None:
    """Leave out what Lightning says about every trainer, and what was said for another task."""
    said: set[str] = set()

    def news(record: logging.LogRecord) -> bool:
        begin = record.getMessage().partition("\n")[0]
        known = begin in said or begin.startswith(ROUTINE)
        said.add(begin)
        return not known

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(news)


if __name__ == "__main__":
    main()
