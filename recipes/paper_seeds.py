"""One seed of a setting: where its measurements are, before anything is trained; and its bench."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from bench import Bench
from cells import Cell, Cells, cells_of, rows_digest
from classifier import logits
from finetunes import starts
from merge_options import Options, options_of
from multitask_model import Settings, multitask_folder, multitask_scores, train_multitask
from paper_settings import Setting
from steps import Steps
from torch import Tensor
from train_tasks import (
    as_task,
    checkpoint_in,
    folder_of,
    task_data,
    task_folder,
    task_module,
    task_settings,
    train_task,
    training_of,
)

from mats_lightning import Task, collect_statistics, save_statistics
from mats_lightning.evaluation import quiet_trainer
from mats_lightning.sidecar import sidecar_path, versions


class Suite:
    """Tasks of one set of options: what their cells are called, and their fine-tunes.

    Nothing is read before it is asked for, nor trained before `task` asks for it.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.data = {task: task_data(options, task) for task in options.task_list}
        self.by_name = {task.name: task for task in self.data}
        self._settings: dict[str, dict[str, Any]] = {}
        self._about: dict[str, tuple[Path, str]] = {}
        self._trained: dict[str, Task] = {}

    def about(self, name: str) -> tuple[Path, str]:
        """The fine-tune's folder, and a digest of the rows it is evaluated on."""
        if name not in self._about:
            task = self.by_name[name]
            folder = task_folder(self.options, task, self.settings_of(name))
            self._about[name] = folder, rows_digest(self.data[task])
        return self._about[name]

    def settings_of(self, name: str) -> dict[str, Any]:
        """What decides the task's fine-tune."""
        if name not in self._settings:
            task = self.by_name[name]
            data = self.data[task]
            module = task_module(self.options, task, data)
            self._settings[name] = task_settings(self.options, task, data, module)
        return self._settings[name]

    @property
    def settings(self) -> Settings:
        """Those of all tasks."""
        return {task: self.settings_of(task.name) for task in self.data}

    def task(self, name: str, steps: Steps) -> Task:
        """A fine-tuned task: from disk, or trained now."""
        if name not in self._trained:
            task = self.by_name[name]
            with steps.paused():
                trained = train_task(self.options, task, self.data[task])
            self._trained[name] = as_task(self.options, task, self.data[task], trained.checkpoint)
        return self._trained[name]

    def start(self, name: str) -> Task:
        """The task before training."""
        task = self.by_name[name]
        data = self.data[task]
        module = task_module(self.options, task, data)
        return Task(name, module, "not trained", data, head_group=task.head_group)

    def let_go(self) -> None:
        """Of the models, which are on disk."""
        self._trained.clear()


class Seed:
    """One seed of a setting.

    Args:
        setting: the file.
        seed: takes the place of the options' seed.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        self.seed = seed
        self.options = options_of({**setting.options, "seed": seed})
        self.suite = Suite(self.options)
        self.tasks = list(self.suite.by_name)

    @cached_property
    def cells(self) -> Cells:
        """Of merges of all tasks."""
        about = [self.suite.about(name) for name in self.tasks]
        return cells_of(self.options.output_dir, about)

    @cached_property
    def multitask(self) -> Path:
        """The folder of multitask training."""
        return multitask_folder(self.options, self.suite.settings)[0]

    @cached_property
    def starts(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """As merge.py's: of new modules, since merges go into those of the tasks."""
        grouped = {t.head_group: t.name for t in self.suite.data if t.head_group is not None}
        needed = dict.fromkeys([self.tasks[0], *grouped.values()])  # heads of a group start alike
        return starts([self.suite.start(name) for name in needed])

    @property
    def multitask_key(self) -> dict[str, Any]:
        """Of the cell of multitask training, tested."""
        return {"method": "multitask", "training": training_of(self.multitask), "split": "test"}

    def measure_multitask(self, steps: Steps) -> None:
        """Train it, where it is not there, and test it; `merge_seconds` are those of training."""
        with steps.paused():
            trained = train_multitask(self.options, self.suite.data, self.suite.settings)
        scores, seconds = steps.run(
            "multitask: test", multitask_scores, self.options, self.suite.data, trained
        )
        cell = Cell(scores, seconds, merge_seconds=trained.seconds)
        self.cells.keep(self.multitask_key, cell)

    def bench(self, steps: Steps) -> Bench:
        """All tasks of the suite; trains those that are missing."""
        tasks = [self.suite.task(name, steps) for name in self.tasks]
        return Bench(
            tasks,
            *self.starts,
            self.options.accelerator,
            self.cells,
            steps,
            collect=self.collected,
        )

    def let_go(self) -> None:
        """Of the models, which are on disk."""
        self.suite.let_go()
        self.__dict__.pop("starts", None)  # cached

    def forget_collected(self, settings: Mapping[str, Any]) -> None:
        """Statistics that `collected` took with these settings, to take them again."""
        for name in self.tasks:
            checkpoint = checkpoint_in(self.suite.about(name)[0])
            collected_path(checkpoint, settings).unlink(missing_ok=True)

    def collected(self, task: Task, settings: Mapping[str, Any]) -> Path:
        """Statistics of the final weights on the first training rows, beside the checkpoint.

        `settings` are arguments of collect_statistics, and `rows`. Kept under a name with a
        digest of them and of the version of mats_lightning.

        Raises ValueError for more rows than there are.
        """
        path = collected_path(Path(task.checkpoint), settings)
        if path.exists():
            return path
        arguments = dict(settings)
        rows = arguments.pop("rows")
        options = replace(self.options, train_rows=rows)  # the first rows of the same split
        described = self.suite.by_name[task.name]
        data = task_data(options, described)
        if len(data.rows["train"]) < rows or rows > (self.options.train_rows or rows):
            raise ValueError(
                f"statistics of {rows} rows: {task.name} was trained on"
                f" {len(self.suite.data[described].rows['train'])}"
            )
        data.setup("fit")
        L.seed_everything(self.options.seed, verbose=False)  # of the order of the rows
        trained = as_task(options, described, data, Path(task.checkpoint))
        module = trained.module
        module.load_state_dict({**module.state_dict(), **trained.weights})
        module.to(quiet_trainer(accelerator=options.accelerator).strategy.root_device)
        if arguments.get("fisher") == "sampled":
            arguments["logits_fn"] = logits
        found = collect_statistics(module, data.train_dataloader(), progress=False, **arguments)
        save_statistics(found, path)
        return path


def collected_path(checkpoint: Path, settings: Mapping[str, Any]) -> Path:
    """Where statistics of these settings are, whether they have been taken or not."""
    decides = {"mats_lightning": versions()["mats_lightning"], **settings}
    digest = folder_of(checkpoint.parent, "statistics", decides).name
    return sidecar_path(f"{checkpoint}.{digest}")
