"""collect_statistics: the same statistics by a pass over data, at fixed weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from rich.progress import track
from torch import Tensor, nn

from mats_lightning.batches import (
    BatchSizeFn,
    LossReduction,
    MaskFn,
    Masks,
    batch_size,
    check_loss_reduction,
    default_masks,
    loss_divisor,
)
from mats_lightning.capture import Capture
from mats_lightning.names import plain_name
from mats_lightning.sidecar import describe
from mats_lightning.statistics import KINDS, Statistics, find_coverage

LossFn = Callable[[nn.Module, Any], Tensor]


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    statistics: Sequence[str] = KINDS,
    loss_fn: LossFn | None = None,
    loss_reduction: LossReduction = "mean",
    mask_fn: MaskFn | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    max_factor_size: int = 8192,
    weight_sharing: str = "expand",
    adapted_weights: bool = False,
    max_examples: int | None = None,
    progress: bool = True,
) -> Statistics:
    """What MaTSStatsCallback accumulates, for a model that was trained without it.

    The model is put into eval mode (no dropout) for the pass and left as it was; its weights and
    `.grad`s are not touched. Save the result beside the checkpoint:
    `save_statistics(statistics, sidecar_path(checkpoint))`.

    Arguments:
        model: a LightningModule, whose training_step gives the loss, or any torch module.
        batches: a DataLoader or any iterable of batches, of labelled training rows.
        loss_fn: (model, batch) -> the reduced loss. The default is a LightningModule's
            training_step, and for other modules Hugging Face's `model(**batch).loss`.
        max_examples: stop after the batch in which this number is reached.
        progress: show a progress bar.
        statistics, loss_reduction, mask_fn, batch_size_fn, max_factor_size, weight_sharing,
            adapted_weights: as in MaTSStatsCallback.

    Raises ValueError for choices that do not exist, a loss without gradient, or no batches.
    """
    check_loss_reduction(loss_reduction)
    coverage = find_coverage(model, statistics, max_factor_size, weight_sharing, adapted_weights)
    sums = Statistics({}, info={})
    capture = Capture(coverage, sums)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable or not coverage.modules:
        raise ValueError(
            f"no trainable parameter of {type(model).__name__} is in a layer that is covered:\n"
            f"{coverage.summary()}"
        )
    device = trainable[0].device
    masks = mask_fn or default_masks(model)
    with _evaluating(model), torch.enable_grad():
        for index, batch in enumerate(_with_progress(batches, progress)):
            batch = _to_device(batch, device)
            examples = batch_size_fn(batch) if batch_size_fn else batch_size(batch)
            scale = loss_divisor(loss_reduction, batch, examples)
            with capture.batch(examples, scale, Masks.of(masks(batch))):
                loss = _loss(model, batch, index, loss_fn)
                capture.start_backward()
                torch.autograd.grad(loss, trainable, allow_unused=True)
                capture.finish()
            if max_examples is not None and sums.examples >= max_examples:
                break
    if not sums.examples:
        raise ValueError("no example was seen: the batches are empty, or no gradient came back")
    weights = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    sums.info = describe(
        coverage,
        sums,
        weights,
        loss_reduction=loss_reduction,
        mask=masks,
        mode="eval",
        kinds=list(statistics),
        epochs=[],
        skipped_batches=0,
        notes=[],
    )
    return sums


def _loss(model: nn.Module, batch: Any, index: int, loss_fn: LossFn | None) -> Tensor:
    if loss_fn is not None:
        loss: Any = loss_fn(model, batch)
    elif isinstance(model, pl.LightningModule):
        output = model.training_step(batch, index)
        loss = output["loss"] if isinstance(output, Mapping) else output
    else:
        loss = model(**batch).loss
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {index} is {loss!r}; a scalar tensor with a gradient is needed:"
            " pass loss_fn=lambda model, batch: ..., and labels in the batch"
        )
    return loss


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, each module's own mode put back after; what a LightningModule logs is dropped."""
    modes = {module: module.training for module in model.modules()}
    loggers = [module for module in modes if isinstance(module, pl.LightningModule)]
    model.eval()
    for logger in loggers:
        logger.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for logger in loggers:
            del logger.log
        for module, training in modes.items():
            module.training = training


def _with_progress(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    total = len(batches) if isinstance(batches, Sized) else None
    return track(
        batches, "collecting statistics", total=total, disable=not progress, transient=True
    )


def _to_device(batch: Any, device: torch.device) -> Any:
    """Tensors in mappings and sequences, moved."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch
