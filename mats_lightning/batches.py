"""What a batch tells: how many examples it has, which positions count, how its loss is reduced."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MaskFn = Callable[[Any], Tensor | None]
BatchSizeFn = Callable[[Any], int]
# batch -> what the mean loss was divided by
LossReduction = str | Callable[[Any], float]


def batch_size(batch: Any) -> int:
    """The leading size on which all tensors of a batch agree.

    Raises ValueError when they do not, or when there is no tensor.
    """
    sizes = {int(tensor.shape[0]) for tensor in _tensors(batch) if tensor.ndim}
    if len(sizes) != 1:
        found = f"the sizes {sorted(sizes)}" if sizes else "no tensor"
        raise ValueError(
            f"cannot tell how many examples a batch has: its tensors have {found}; pass"
            " batch_size_fn=lambda batch: ..."
        )
    return sizes.pop()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for value in batch:
            yield from _tensors(value)


def attention_mask(batch: Any) -> Tensor | None:
    """The default mask: a Hugging Face batch's "attention_mask" (N, R), if it has one."""
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def loss_divisor(reduction: LossReduction, batch: Any, examples: int) -> float:
    """What the reduced loss was divided by, so that scale = divisor gives an example's own.

    "mean": the examples; "sum": 1; "token_mean": the labels that are not -100 in
    batch["labels"] (N, R); "next_token_mean": those in batch["labels"][:, 1:], which a causal
    language model predicts; or a function of the batch (class weights, say).
    """
    if callable(reduction):
        return float(reduction(batch))
    if reduction == "mean":
        return float(examples)
    if reduction == "sum":
        return 1.0
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"loss_reduction={reduction!r} counts the labels that are not -100 in"
            ' batch["labels"], and this batch has none; pass a function of the batch instead'
        )
    if reduction == "next_token_mean":
        labels = labels[:, 1:]
    return float(torch.count_nonzero(labels != -100))


LOSS_REDUCTIONS = ("mean", "sum", "token_mean", "next_token_mean")


def check_loss_reduction(reduction: LossReduction) -> None:
    """Raises ValueError for a name that is none of LOSS_REDUCTIONS."""
    if not callable(reduction) and reduction not in LOSS_REDUCTIONS:
        raise ValueError(
            f"loss_reduction={reduction!r}; choose from {', '.join(LOSS_REDUCTIONS)}, or pass a"
            " function of the batch that gives what the loss was divided by"
        )
