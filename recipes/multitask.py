"""Train one model on all tasks' rows together, the upper bound of what a merge can reach:

    python recipes/multitask.py                                    # seven text tasks, MiniLM
    python recipes/multitask.py --fast                             # the same on smaller slices
    python recipes/multitask.py --config recipes/merge_images.yaml # seven image tasks, DINOv2-S

It takes the options of merge.py, `methods` and `again` without effect: the same rows, splits,
epochs, heads, optimizer and learning rate, with one backbone for all tasks. Nothing is chosen on
validation rows.

Each step is a batch of one task, in a random order over all tasks: so a task's batches, their
padding, their loss and the number of its head's steps are those of its own fine-tune.

    <output_dir>/multitask/results.md, results.csv, results.json
                           multitask-7d2a90c4/                  as a task's folder in train_tasks.py

A training that is finished is kept, and an interrupted one goes on from its last epoch. Where
merge.py has fine-tuned all tasks with the same settings, the table has the individual models too.
"""

import time
from collections.abc import Sequence

from bench import evaluate
from merge_options import Options, parse_options
from multitask_model import Data, Settings, multitask_scores, train_multitask
from process import peak_memory, quiet_lightning
from train_tasks import (
    as_task,
    finished,
    task_data,
    task_folder,
    task_module,
    task_settings,
    write_json,
)

from mats_lightning import MergeModule
from mats_lightning.evaluation import quiet_trainer
from mats_lightning.report import (
    INDIVIDUAL,
    Row,
    average,
    print_table,
    relative,
    write_csv,
    write_markdown,
)


def main(args: Sequence[str] | None = None) -> list[Row]:
    """Everything, in its order; returns the lines of the table."""
    options = parse_options(
        args, "multitask.py", "Train one model on the rows of all tasks; the options of merge.py."
    )
    quiet_lightning()
    started = time.perf_counter()
    data = {task: task_data(options, task) for task in options.task_list}
    settings = {
        task: task_settings(options, task, part, task_module(options, task, part))
        for task, part in data.items()
    }
    trained = train_multitask(options, data, settings)
    when = "now" if trained.now else "earlier, kept"
    print(f"multitask: {trained.checkpoint} (trained {when}, {trained.seconds:.0f} s)")
    testing = time.perf_counter()
    rows = [Row("multitask", "", multitask_scores(options, data, trained))]
    test_seconds = round(time.perf_counter() - testing, 1)
    memory = peak_memory()  # before the individual models, which are as many as the tasks
    individual = individual_scores(options, data, settings)
    if individual is not None:
        rows.insert(0, Row(INDIVIDUAL, "", individual))

    folder = options.output_dir / "multitask"
    print_table(rows, "test accuracy")
    write_markdown(rows, folder / "results.md")
    write_csv(rows, folder / "results.csv")
    chosen = options.as_json()
    del chosen["methods"]  # which have no part in it
    summary = {
        "options": chosen,
        "checkpoint": str(trained.checkpoint),
        "trained_in_this_run": trained.now,
        "rows": {
            task.name: {name: len(split) for name, split in part.rows.items()}
            for task, part in data.items()
        },
        "test_average": average(rows[-1]),
        "test_scores": rows[-1].scores,
        "individual_scores": individual,
        "relative": relative(rows[-1].scores, rows[0].scores) if individual is not None else None,
        "seconds": {"training": trained.seconds, "test": test_seconds},
        "peak_memory_gb": memory,
    }
    write_json(folder / "results.json", summary)
    print(
        f"{time.perf_counter() - started:.0f} s"
        + (f", {trained.seconds:.0f} of them training" if trained.now else "")
        + (f"; peak memory {memory:.1f} GB" if memory else "")
        + f". All results are in {folder}"
    )
    return rows


def individual_scores(options: Options, data: Data, settings: Settings) -> dict[str, float] | None:
    """The same of the tasks' own models, where fine-tunes of all of them are there."""
    found = {
        task: finished(task_folder(options, task, settings[task]), statistics=False)
        for task in data
    }
    if missing := [task.name for task, trained in found.items() if trained is None]:
        print(
            f"nothing to relate to: no fine-tune of {', '.join(missing)} with these settings is in "
            f"{options.output_dir / 'tasks'}; merge.py makes them"
        )
        return None
    tasks = [
        as_task(options, task, data[task], trained.checkpoint)
        for task, trained in found.items()
        if trained is not None
    ]
    module = MergeModule(tasks, method=INDIVIDUAL)
    return evaluate(module, quiet_trainer(accelerator=options.accelerator).test)


if __name__ == "__main__":
    main()
