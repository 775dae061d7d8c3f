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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from bench import evaluate, evaluation_trainer
from classifier import Batch, Classifier, optimizer_and_schedule
from labelled_data import LabelledData
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from merge import peak_memory, quiet_lightning
from merge_options import Options, TaskOptions, parse_options
from torch import Tensor, nn
from torch.utils.data import DataLoader
from train_tasks import (
    COMMON,
    TrainedTask,
    as_task,
    finished,
    folder_of,
    return_memory,
    task_data,
    task_folder,
    task_module,
    task_settings,
    train,
    write_json,
)
from typing_extensions import override

from mats_lightning import MergeModule
from mats_lightning.checkpoints import load_weights
from mats_lightning.report import (
    INDIVIDUAL,
    Row,
    average,
    print_table,
    relative,
    write_csv,
    write_markdown,
)

TaskBatch = tuple[int, Batch]  # the number of the task, and a batch of its own
Data = Mapping[TaskOptions, LabelledData]
Settings = Mapping[TaskOptions, Mapping[str, Any]]  # what decides the task's fine-tune


class MultitaskClassifier(L.LightningModule):
    """The tasks' classifiers on one backbone; tasks of one head group have one head too.

    The classifiers stay usable for themselves, for `trainer.test(classifier, data)`; the state
    dict has the backbone once (`backbone.`), and the heads in the order of `hparams.heads`
    (`heads.0.`). A head takes a step in its own tasks' batches alone: others leave it no gradient,
    and AdamW passes over it.

    Args:
        classifiers: with the same start, by the names of their tasks; they are changed.
        head_groups: task -> head group, for tasks that share one.
        seed: of the order of the batches and of dropout.

    Raises MisconfigurationException for a head group whose tasks have heads of unequal shapes.
    """

    def __init__(
        self,
        classifiers: Mapping[str, Classifier],
        head_groups: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifiers = dict(classifiers)  # no modules of ours: their names would repeat
        self.seed = seed
        self.backbone = next(iter(classifiers.values())).backbone
        heads: dict[str, nn.Linear] = {}
        for name, classifier in self.classifiers.items():
            group = (head_groups or {}).get(name)
            # no task has a space in its name
            head = heads.setdefault(f"group {group}" if group else name, classifier.head)
            if head.weight.shape != classifier.head.weight.shape:
                raise MisconfigurationException(
                    f"task {name!r} has {classifier.head.out_features} classes, and others of its "
                    f"head group {group!r} have {head.out_features}: give it a head of its own"
                )
            classifier.head, classifier.backbone = head, self.backbone
        self.heads = nn.ModuleList(heads.values())
        self.save_hyperparameters({"heads": list(heads)})

    @override
    def on_train_epoch_start(self) -> None:
        """From a seed of the epoch's own, so that a resumed run goes on as it would have gone."""
        epochs = self.trainer.max_epochs or 1
        torch.manual_seed(self.seed * epochs + self.current_epoch)

    @override
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        number, rows = batch
        loss = list(self.classifiers.values())[number].loss(rows)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(rows["labels"]))
        return loss

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        first = next(iter(self.classifiers.values()))
        return optimizer_and_schedule(self, first.learning_rate, first.weight_decay)


class Interleaved:
    """All batches of several loaders, each once an epoch, in a random order: (loader, batch)."""

    def __init__(self, loaders: Sequence[DataLoader[Any]]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[TaskBatch]:
        """Nothing is drawn before the first batch: that is after on_train_epoch_start."""
        counts = torch.tensor([len(loader) for loader in self.loaders])
        owners = torch.repeat_interleave(counts)  # 0, 0, 0, 1, 1, ...: each batch's loader
        batches = [iter(loader) for loader in self.loaders]
        for number in owners[torch.randperm(len(owners))].tolist():
            yield number, next(batches[number])


class MultitaskData(L.LightningDataModule):
    """The training rows of several tasks, interleaved."""

    def __init__(self, parts: Sequence[LabelledData]) -> None:
        super().__init__()
        self.parts = parts

    @override
    def prepare_data(self) -> None:
        for part in self.parts:
            part.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        for part in self.parts:
            part.setup(stage)

    @override
    def train_dataloader(self) -> Interleaved:
        return Interleaved([part.train_dataloader() for part in self.parts])


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
        "relative": relative(rows[-1], rows[0]) if individual is not None else None,
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


def train_multitask(options: Options, data: Data, settings: Settings) -> TrainedTask:
    """The final checkpoint; see `train`. What decides it is what decides each fine-tune."""
    folder, together = multitask_folder(options, settings)
    module = multitask_module(options, data)
    rows = MultitaskData(list(data.values()))
    trained = train(options, module, rows, folder, together, statistics=False)
    del module
    return_memory()
    return trained


def multitask_folder(options: Options, settings: Settings) -> tuple[Path, dict[str, Any]]:
    """Where a training is, and what decides it."""
    together: dict[str, Any] = {name: getattr(options, name) for name in COMMON}
    together["tasks"] = [task.name for task in settings]  # the order, too
    for task, own in settings.items():
        together |= {f"{task.name} {key}": own[key] for key in own if key not in COMMON}
    return folder_of(options.output_dir / "multitask", "multitask", together), together


def multitask_module(options: Options, data: Data) -> MultitaskClassifier:
    """The model before training: the backbone and the heads that the fine-tunes start with."""
    return MultitaskClassifier(
        {task.name: task_module(options, task, part) for task, part in data.items()},
        {task.name: task.head_group for task in data if task.head_group is not None},
        options.seed,
    )


def multitask_scores(options: Options, data: Data, trained: TrainedTask) -> dict[str, float]:
    """The test accuracy of each task."""
    module = multitask_module(options, data)
    module.load_state_dict(dict(load_weights(trained.checkpoint)))
    trainer = evaluation_trainer(options.accelerator)
    scores = {}
    for task, part in data.items():
        trainer.test(module.classifiers[task.name], part, verbose=False)
        scores[task.name] = float(trainer.callback_metrics["accuracy"])
    return scores


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
    return evaluate(module, evaluation_trainer(options.accelerator).test)


if __name__ == "__main__":
    main()
