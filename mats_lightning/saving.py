"""A sidecar follows every checkpoint that a trainer saves or removes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mats_lightning.sidecar import save_statistics, sidecar_path
from mats_lightning.statistics import Statistics

LONGEST_NAME = 255  # bytes, on the file systems in use


def follow_checkpoints(
    trainer: pl.Trainer,
    statistics_of: Callable[[dict[str, Any]], Statistics | None],
    last_only: bool,
    factor_dtype: torch.dtype | None,
) -> None:
    """Write `statistics_of(checkpoint)` beside each checkpoint; remove it with the checkpoint.

    `statistics_of` is called on every rank before the checkpoint is written, and may change it;
    rank 0 writes what it gives there, unless that is None. With `last_only` a sidecar goes when
    the next one has been written. `factor_dtype`: see `save_statistics`.

    No callback hook knows the path, and none runs with save_weights_only, so the two methods of
    the trainer's strategy are wrapped. They stay wrapped after the fit: `trainer.save_checkpoint`
    is usually called then.
    """
    strategy = trainer.strategy
    save: Callable[..., None] = strategy.save_checkpoint
    remove: Callable[..., None] = strategy.remove_checkpoint
    save = getattr(save, "unwrapped", save)  # of an earlier fit
    remove = getattr(remove, "unwrapped", remove)
    previous: Path | None = None

    def save_checkpoint(
        checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        nonlocal previous
        statistics = statistics_of(checkpoint)
        save(checkpoint, filepath, storage_options=storage_options)
        if not trainer.is_global_zero:
            return
        if why := _no_place(filepath):
            rank_zero_warn(f"MaTSStatsCallback: no sidecar is written beside {filepath}: {why}")
            return
        path = sidecar_path(filepath)
        if not _write(statistics, path, factor_dtype):
            path.unlink(missing_ok=True)  # of a checkpoint that was overwritten
            return
        if last_only and previous is not None and previous != path:
            previous.unlink(missing_ok=True)
        previous = path

    def remove_checkpoint(filepath: str | Path) -> None:
        remove(filepath)
        if trainer.is_global_zero and not _no_place(filepath):
            sidecar_path(filepath).unlink(missing_ok=True)

    save_checkpoint.unwrapped = save  # type: ignore[attr-defined]
    remove_checkpoint.unwrapped = remove  # type: ignore[attr-defined]
    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    strategy.remove_checkpoint = remove_checkpoint  # type: ignore[method-assign]


def _write(statistics: Statistics | None, path: Path, factor_dtype: torch.dtype | None) -> bool:
    """Whether there is a sidecar now; a warning says why not."""
    if statistics is None:
        return False
    try:
        save_statistics(statistics, path, factor_dtype)
    except ValueError as error:  # sums that are not finite: no sidecar is better than these
        rank_zero_warn(f"MaTSStatsCallback: no sidecar is written: {error}")
        return False
    return True


def _no_place(filepath: str | Path) -> str:
    """Why there can be no sidecar; "" where there can."""
    if "://" in str(filepath):
        return "it is not a local path; save the checkpoint into a local folder and copy both files"
    if len(os.fsencode(sidecar_path(filepath).name)) > LONGEST_NAME:
        return (
            f"its name would have more than {LONGEST_NAME} bytes; give the checkpoint a shorter one"
        )
    return ""
