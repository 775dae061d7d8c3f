"""A task's module at work outside of a trainer's loops, with what it would find within them."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from mats_lightning.passes import NotFinite
from mats_lightning.tasks import Task

TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def hooked(task: Task, trainer: pl.Trainer) -> Iterator[None]:
    """Batches come to the module as in this trainer: by hooks of its data module, if any."""
    module, data = task.module, task.data
    hooks = [
        hook
        for hook in TRANSFERS
        if isinstance(data, pl.LightningDataModule) and is_overridden(hook, data)
    ]
    module.trainer = trainer
    for hook in hooks:
        setattr(module, hook, getattr(data, hook))
    try:
        yield
    finally:
        for hook in hooks:
            delattr(module, hook)
        module.trainer = None


@contextmanager
def on_device(task: Task, trainer: pl.Trainer) -> Iterator[None]:
    """The same, on the trainer's device, which leaves it on the CPU; errors say whose it is."""
    with hooked(task, trainer):
        task.module.to(trainer.strategy.root_device)
        try:
            yield
        except ValueError as error:
            kind = NotFinite if isinstance(error, NotFinite) else ValueError
            raise kind(f"task '{task.name}': {error}") from error
        finally:
            task.module.cpu()
