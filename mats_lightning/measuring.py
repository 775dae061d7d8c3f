"""The two halves of a refresh on files, for parties that do not share their data.

Each party takes its task's statistics at the merged weights, `measure`; whoever has their sidecars
makes the next merged weights out of them, `next_weights`. Only sidecars and weights travel.
"""

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mats_lightning.checkpoints import load_weights, save_state
from mats_lightning.collect import collect_statistics
from mats_lightning.merging import MergeResult, refresh_step
from mats_lightning.names import plain_name
from mats_lightning.passes import training_alone
from mats_lightning.sidecar import check_belongs, load_statistics, save_statistics
from mats_lightning.statistics import Statistics
from mats_lightning.tasks import Part
from mats_lightning.tied import with_tied

MEASURED = ("kfac", "block_fisher")


def statistics_at(
    module: nn.Module,
    names: Container[str],
    batches: Iterable[Any],
    statistics: Sequence[str] = MEASURED,
    **options: Any,
) -> Statistics:
    """Statistics of the parameters `names` alone, at the weights that the module has.

    The others (its head) do not train meanwhile; the gradient goes through them all the same.
    `options` are those of `collect_statistics`; it raises what that does.
    """
    with training_alone(module, names):
        return collect_statistics(module, batches, statistics=statistics, **options)


def measure(
    weights: str | os.PathLike[str],
    module: nn.Module,
    batches: Iterable[Any],
    sidecar: str | os.PathLike[str],
    *,
    prefix: str = "",
    statistics: Sequence[str] = MEASURED,
    **options: Any,
) -> Statistics:
    """Take one task's statistics at merged weights, and save them at `sidecar`.

    Arguments:
        weights: the merged weights, as `load_weights` reads them, `prefix` put before their
            names. They are loaded into the module.
        module: the task's, with its own head in it. What `weights` does not hold stays as it is
            there, and has no statistics.
        batches: of the task's rows.
        statistics: with "gradient" among them for a step with mix > 0.
        options: of `collect_statistics`.

    Raises ValueError for weights that are not of the module's architecture, and what
    `collect_statistics` and `save_statistics` raise.
    """
    merged = load_weights(weights, prefix)
    Path(sidecar).parent.mkdir(parents=True, exist_ok=True)  # before hours of work
    _put(merged, module, weights)
    found = statistics_at(module, merged, batches, statistics, **options)
    save_statistics(found, sidecar)
    return found


def _put(merged: Mapping[str, Tensor], module: nn.Module, source: str | os.PathLike[str]) -> None:
    own = {plain_name(name): tensor for name, tensor in module.state_dict().items()}
    if unknown := [name for name in merged if name not in own]:
        raise ValueError(
            f"{source} has '{unknown[0]}', which {type(module).__name__} does not have"
            f" ({len(unknown)} such names): build the module that was merged, or say in prefix"
            " what precedes the names in it"
        )
    values = dict(merged)
    for name, value in values.items():
        if value.dtype != own[name].dtype:  # its digest would be that of other weights
            raise ValueError(
                f"'{name}' is {value.dtype} in {source} and {own[name].dtype} in"
                f" {type(module).__name__}: convert the module, module.to({value.dtype}), or"
                f" save the weights in {own[name].dtype}"
            )
        if value.shape != own[name].shape:
            raise ValueError(
                f"'{name}' has shape {tuple(value.shape)} in {source} and"
                f" {tuple(own[name].shape)} in {type(module).__name__}: build the module with"
                " the sizes that it was trained with"
            )
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def next_weights(
    weights: str | os.PathLike[str],
    sidecars: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    checkpoints: Sequence[str | os.PathLike[str]] | None = None,
    *,
    prefix: str = "",
    **options: Any,
) -> MergeResult:
    """One step from merged weights with the sidecars that were measured at them, saved at `out`.

    `out` is a safetensors file, written to a temporary name and renamed.

    Arguments:
        weights: the merged weights, as `load_weights` reads them, `prefix` put before their names.
            In `out` they have none, so that the next round takes `out` as this one `weights`.
        sidecars: one a task, of `measure` at these weights.
        checkpoints: the tasks' own, in the order of the sidecars; with mix=1 there is no need.
            Of each only what `weights` holds is taken; where names lack the prefix they get it.
        options: of `merging.refresh_step`.

    Raises ValueError for statistics of other weights, and what `refresh_step`, `load_weights` and
    `load_statistics` raise.
    """
    merged = load_weights(weights, prefix)
    statistics = [load_statistics(path) for path in sidecars]
    for path, task in zip(sidecars, statistics, strict=True):
        check_belongs(task, merged, f"{path} with {weights}")
    thetas = None
    if checkpoints is not None:
        tied = {n: used for s in statistics for n, used in s.info.get("tied", {}).items()}
        thetas = [_only(merged, path, prefix, tied) for path in checkpoints]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    result = refresh_step(merged, statistics, thetas, **options)
    save_state({n.removeprefix(prefix): t for n, t in result.state_dict.items()}, out)
    return result


def _only(
    merged: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    prefix: str,
    tied: Mapping[str, str],
) -> Part:
    """What the merged weights hold of a checkpoint: no head."""
    theta = load_weights(path)
    if not any(name.startswith(prefix) for name in theta):
        theta = load_weights(path, prefix)
    theta = with_tied(theta, tied, str(path))
    if missing := [name for name in merged if name not in theta]:
        raise ValueError(
            f"{path} does not have '{missing[0]}', which is among the merged weights"
            f" ({len(missing)} such names): give the checkpoints that were merged"
        )
    return Part(theta, list(merged), torch.device("cpu"))
