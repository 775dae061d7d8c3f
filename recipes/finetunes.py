"""The fine-tuned tasks of a comparison, and what they started from."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from adapters import CALLBACK_ARGUMENTS
from compare import check_fit
from merge_options import MethodOptions, Options
from torch import Tensor
from train_tasks import as_task, task_data, task_module, train_task

from mats_lightning import Task


def check_methods_fit(options: Options, methods: Mapping[str, MethodOptions]) -> None:
    """Look at the first task's model, before the hours of fine-tuning.

    Raises SystemExit where a method cannot merge such models.
    """
    task = options.task_list[0]
    module = task_module(options, task, task_data(options, task))
    names, kinds = list(module.state_dict()), None
    if options.adapter is not None:
        names = [n for n, p in module.backbone.named_parameters("backbone") if p.requires_grad]
        kinds = CALLBACK_ARGUMENTS[options.adapter].get("statistics")
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
