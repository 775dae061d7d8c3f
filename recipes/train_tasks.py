"""Fine-tune the tasks of the comparison that are missing; keep those that are there.

Each task has a folder named by its own name and by a digest of everything that decides the
result: the settings, the weights it starts from, and its training rows. So a run with other
settings trains again beside the earlier one, and checkpoints of different settings never meet.

    <output_dir>/tasks/trec-3fa95c01/settings.json                 what the digest stands for
                                     resume/epoch=0.ckpt           until the task is finished
                                     trec.ckpt                     the weights
                                     trec.ckpt.mats.safetensors    the statistics
                                     trec/, trec.mats.safetensors  instead, with an adapter
                                     result.json                   written last: it is finished,
                                                                   and the id of this training
"""

import hashlib
import json
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from adapters import CALLBACK_ARGUMENTS, load_head, save_adapter
from classifier import Classifier
from labelled_data import LabelledData
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from merge_options import Options, TaskOptions
from process import return_memory
from random_state import RandomState
from torch import Tensor

from mats_lightning import MaTSStatsCallback, Task
from mats_lightning.files import write_text
from mats_lightning.sidecar import sidecar_path

# the options that every fine-tune of a comparison shares
COMMON = ("model", "epochs", "learning_rate", "batch_size", "train_rows", "seed")


class TrainedTask(NamedTuple):
    """A finished training."""

    checkpoint: Path
    seconds: float
    now: bool  # in this run


def task_data(options: Options, task: TaskOptions) -> LabelledData:
    kind = options.kind
    common = ("model", "batch_size", "train_rows", "validation_rows", "test_rows", "seed")
    return kind.data(
        task=task.name if task.hub is None else None,
        hub=task.hub,
        **{name: getattr(options, name) for name in (*common, *kind.options)},
    )


def task_module(options: Options, task: TaskOptions, data: LabelledData) -> Classifier:
    """The task's model before training; tasks of one head group start with the same head."""
    L.seed_everything(options.seed, verbose=False)  # for weights that the model's file lacks
    head = zlib.crc32((task.head_group or task.name).encode())
    return options.kind.model(
        data.num_classes,
        backbone=options.model,
        learning_rate=options.learning_rate,
        head_seed=options.seed + head,
        adapter=options.adapter,
        adapter_options=options.adapter_options,
    )


def as_task(options: Options, task: TaskOptions, data: LabelledData, checkpoint: Path) -> Task:
    """The fine-tuned task as MergeModule takes it; its module starts with the pretrained weights.

    An adapter's checkpoint is without the head, so the module has the trained one.
    """
    module, head_group = task_module(options, task, data), task.head_group
    if options.adapter is None:
        return Task(task.name, module, checkpoint, data, head_group=head_group)
    load_head(module, checkpoint)
    return Task(task.name, module, checkpoint, data, prefix="backbone.")


def train_task(options: Options, task: TaskOptions, data: LabelledData) -> TrainedTask:
    """The task's final checkpoint, with its statistics beside it; see `train`."""
    module = task_module(options, task, data)
    settings = task_settings(options, task, data, module)
    folder = task_folder(options, task, settings)
    trained = train(
        options, module, data, folder, settings, statistics=True, adapter=options.adapter
    )
    del module
    return_memory()
    return trained


def train(
    options: Options,
    module: L.LightningModule,
    data: L.LightningDataModule,
    folder: Path,
    settings: Mapping[str, Any],
    statistics: bool,
    adapter: str | None = None,
) -> TrainedTask:
    """The final checkpoint in `folder`, which is the one of these settings (`folder_of`).

    It is kept when it is finished, resumed from its last epoch and the random state there when it
    was interrupted, and otherwise trained from the start. With `adapter` the checkpoint is the
    folder of the module's adapter, not the whole module. The caller lets go of `module` and calls
    `return_memory`.
    """
    result, resume = folder / "result.json", folder / "resume"
    if (kept := finished(folder, statistics)) is not None:
        shutil.rmtree(resume, ignore_errors=True)  # there after a kill between the last two lines
        return kept
    if not folder.exists():
        report_changes(folder, settings)
        write_json(folder / "settings.json", settings)
    started = time.perf_counter()
    trainer = fit(options, module, data, resume, statistics)
    checkpoint = folder / f"{task_of(folder)}.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=True)
    if adapter is not None:
        checkpoint = save_adapter(module, checkpoint)
    data.trainer = None  # which has the optimizer's state and the sums
    seconds = round(time.perf_counter() - started, 1)
    write_json(result, {"seconds": seconds, "id": secrets.token_hex(4)})
    shutil.rmtree(resume)  # with the optimizer's state: twice the weights
    return TrainedTask(checkpoint, seconds, now=True)


def finished(folder: Path, statistics: bool) -> TrainedTask | None:
    """The training in `folder`, where all of it is there."""
    result, checkpoint = folder / "result.json", checkpoint_in(folder)
    files = [result, checkpoint, *([sidecar_path(checkpoint)] if statistics else [])]
    if not all(path.exists() for path in files):
        return None
    return TrainedTask(checkpoint, json.loads(result.read_text())["seconds"], now=False)


def training_of(folder: Path) -> str:
    """The folder's name and the id of the training that was finished there.

    Another training of the same settings gives other weights. One that is not finished, or that
    was finished before there were ids, has none.
    """
    result = folder / "result.json"
    found = json.loads(result.read_text()) if result.exists() else {}
    return f"{folder.name} {found['id']}" if "id" in found else folder.name


def folder_of(parent: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """The folder of a training: its name and a digest of its settings."""
    text = json.dumps(settings, sort_keys=True)
    return parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def task_folder(options: Options, task: TaskOptions, settings: Mapping[str, Any]) -> Path:
    return folder_of(options.output_dir / "tasks", task.name, settings)


def task_of(folder: Path) -> str:
    return folder.name.rpartition("-")[0]


def checkpoint_in(folder: Path) -> Path:
    """Of a finished training: the folder of its adapter, where it has one."""
    adapter = folder / task_of(folder)
    return adapter if adapter.is_dir() else folder / f"{adapter.name}.ckpt"


def fit(
    options: Options,
    module: L.LightningModule,
    data: L.LightningDataModule,
    resume: Path,
    statistics: bool,
) -> L.Trainer:
    """Train from the newest checkpoint in `resume`, with statistics of the last epoch if wanted."""
    L.seed_everything(options.seed, verbose=False)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_epochs=options.epochs,
        callbacks=[
            *([statistics_callback(options)] if statistics else []),
            RandomState(),
            ModelCheckpoint(resume, filename="{epoch}", save_on_train_epoch_end=True),
            RichProgressBar(),
        ],
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=resume,
    )
    checkpoints = sorted(resume.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        print(f"resuming from {checkpoints[-1]}")
    trainer.fit(module, data, ckpt_path=checkpoints[-1] if checkpoints else None)
    return trainer


def statistics_callback(options: Options) -> MaTSStatsCallback:
    """Takes what the merges need, in the last epoch."""
    kinds = {} if options.adapter is None else CALLBACK_ARGUMENTS[options.adapter]
    return MaTSStatsCallback(last_n_epochs=1, **kinds)


def task_settings(
    options: Options, task: TaskOptions, data: LabelledData, module: Classifier
) -> dict[str, Any]:
    """All that decides what a fine-tune gives; the rows it is evaluated on are not among it."""
    adapter = {"adapter": options.adapter, "adapter_options": options.adapter_options}
    return {
        **{name: getattr(options, name) for name in COMMON},
        **(adapter if options.adapter is not None else {}),
        "head_group": task.head_group,
        "num_classes": data.num_classes,
        "start_weights": digest_of(module.state_dict()),
        **data.settings,
    }


def digest_of(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def report_changes(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say in which settings the newest earlier fine-tune of this task differs from `settings`."""
    name = task_of(folder)
    earlier = [
        path
        for path in folder.parent.glob(f"{name}-*/settings.json")
        if re.fullmatch(re.escape(name) + "-[0-9a-f]{8}", path.parent.name)
    ]
    if earlier:
        newest = max(earlier, key=lambda path: path.stat().st_mtime)
        before = json.loads(newest.read_text())
        changes = ", ".join(
            f"{key} {before.get(key)} -> {value}"
            for key, value in settings.items()
            if before.get(key) != value
        )
        print(f"{name}: trained again, since {changes}; {newest.parent} stays as it is")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
