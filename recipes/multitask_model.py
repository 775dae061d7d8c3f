"""One model for all tasks: its backbone and heads, their rows in turn, its training and scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from classifier import Batch, Classifier, optimizer_and_schedule
from labelled_data import LabelledData
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from merge_options import Options, TaskOptions
from process import return_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader
from train_tasks import COMMON, TrainedTask, folder_of, task_module, train
from typing_extensions import override

from mats_lightning.checkpoints import load_weights
from mats_lightning.evaluation import quiet_trainer
from mats_lightning.joint_training import in_turn

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
        yield from in_turn(dict(enumerate(self.loaders)))


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
    rows = {task.name: part for task, part in data.items()}
    return accuracies(module, rows, quiet_trainer(accelerator=options.accelerator).test)


def accuracies(
    module: MultitaskClassifier, data: Mapping[str, Any], run: Callable[..., Any]
) -> dict[str, float]:
    """Of each task on its own data; `run` is a trainer's `validate` or `test`."""
    found = {}
    for name, rows in data.items():
        (metrics,) = run(module.classifiers[name], rows, verbose=False)
        found[name] = float(metrics["accuracy"])
    return found
