"""What a pass over batches needs of a model: its loss, eval mode, batches on its device."""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from mats_lightning import huggingface
from mats_lightning.names import plain_name

LossFn = Callable[[nn.Module, Any], Tensor]


class NotFinite(ValueError):
    """A loss that is no number, as of weights that a step has destroyed."""


def loss_of(model: nn.Module, batch: Any, index: int, loss_fn: LossFn | None) -> Tensor:
    """Raises ValueError for one that is no scalar with a gradient, or not finite."""
    loss = value_of_loss(model, batch, index, loss_fn)
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {index} is {loss!r}; a scalar tensor with a gradient is needed:"
            " let a parameter that it depends on train, or pass loss_fn=lambda model, batch: ..."
        )
    check_finite(loss, index)
    return loss


def value_of_loss(model: nn.Module, batch: Any, index: int, loss_fn: LossFn | None) -> Tensor:
    """Raises ValueError for one that is no scalar."""
    if loss_fn is not None:
        loss: Any = loss_fn(model, batch)
    elif isinstance(model, pl.LightningModule):
        if not model.automatic_optimization:
            raise ValueError(
                f"{type(model).__name__} optimizes manually, so its training_step would train it:"
                " pass loss_fn=lambda module, batch: ..."
            )
        output = call_step(model.training_step, batch, index)
        loss = output["loss"] if isinstance(output, Mapping) else output
    else:
        loss = huggingface.output_of(model, batch).loss
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            f"the loss of batch {index} is {loss!r}; a scalar tensor with a gradient is needed:"
            " pass loss_fn=lambda model, batch: ..., and labels in the batch"
        )
    return loss


def call_step(step: Callable[..., Any], batch: Any, index: int) -> Any:
    """As Lightning calls it, with or without the number of the batch."""
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return step(batch, index) if numbered else step(batch)


def check_finite(loss: Tensor, index: int) -> None:
    if not torch.isfinite(loss).all():
        raise NotFinite(
            f"the loss of batch {index} is {loss.tolist()}, which would spoil all sums: look for"
            " rows without a label (all -100) or weights that are not finite"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, each module's own mode put back after; what a LightningModule logs is dropped.

    Metrics that were empty before are so again: a training_step may have filled them.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    loggers = {m: vars(m).get("log") for m in modules if isinstance(m, pl.LightningModule)}
    empty = [m for m in modules if isinstance(m, Metric) and not m.update_called]
    if training:
        model.eval()
    for logger in loggers:
        logger.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for logger, log in loggers.items():
            del logger.log
            if log is not None:  # of a pass around this one
                logger.log = log  # type: ignore[method-assign]
        for metric in empty:
            if metric.update_called:
                metric.reset()
        for module in training:
            module.training = True


def to_device(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """As Lightning does it: named tuples, a tokenizer's BatchEncoding, a module's own hooks."""
    if not isinstance(model, pl.LightningModule):
        return move_data_to_device(batch, device)
    batch = model.on_before_batch_transfer(batch, 0)
    batch = model.transfer_batch_to_device(batch, device, 0)
    return model.on_after_batch_transfer(batch, 0)


@contextmanager
def training_alone(module: nn.Module, names: Container[str]) -> Iterator[None]:
    """Of the parameters that train, those named alone do so within."""
    others = [
        p for n, p in module.named_parameters() if p.requires_grad and plain_name(n) not in names
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
