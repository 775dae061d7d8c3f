"""A loss for rows without labels: the prediction of a teacher, the task's own model, say."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning.batches import Masks, default_masks
from mats_lightning.passes import evaluating
from mats_lightning.sampled import LogitsFn, logits_and_mask
from mats_lightning.statistics.digest import digest_of


def soft_targets(
    teacher: nn.Module | Callable[[], nn.Module],
    logits_fn: LogitsFn,
    kept: dict[bytes, Tensor] | None = None,
) -> Callable[[nn.Module, Any], Tensor]:
    """(model, batch) -> - 1/N sum_n sum_r sum_y p_teacher(y) log p_model(y), a `loss_fn`.

    Its gradient is the expected gradient over labels that the teacher draws, without their noise,
    and is 0 where the model predicts what the teacher does (Hinton, Vinyals, Dean, "Distilling
    the knowledge in a neural network", arXiv 1503.02531, at temperature 1). The loss is a mean
    over examples, and a sum over positions.

    Arguments:
        teacher: called in eval mode and without gradient, on the batches that the model gets; or
            what gives it when it is needed first.
        logits_fn: as in collect_statistics, of both: (N, C), or (N, R, C), where the positions
            count that collect_statistics draws labels at: those of the batch's mask (a Hugging
            Face batch's attention mask), unless it gives (logits, mask (N, R)).
        kept: where the teacher's logits (N, C) are kept, by what is in a batch: give the same dict
            each time, and it runs once for each batch.

    The loss raises ValueError where the two do not give logits of one shape, for a mask of
    another, and for logits of the model without gradient.
    """
    made = cache(lambda: teacher if isinstance(teacher, nn.Module) else teacher())
    masks_of = cache(default_masks)  # a look at each module of a model

    def loss(model: nn.Module, batch: Any) -> Tensor:
        key = None if kept is None else _content(batch)
        if kept is None or key is None or (target := kept.get(key)) is None:
            with evaluating(made()), torch.no_grad():
                given = logits_fn(made(), batch)
            target = given[0] if isinstance(given, tuple) else given
            if kept is not None and key is not None and target.ndim == 2:
                kept[key] = target
        masks = Masks.of(masks_of(model)(batch))
        logits, keep = logits_and_mask(logits_fn(model, batch), len(target), masks)
        if logits.shape != target.shape:
            raise ValueError(
                f"the teacher gives logits {tuple(target.shape)} and the model"
                f" {tuple(logits.shape)} for one batch: the teacher must be of the same task"
            )
        wide = torch.promote_types(logits.dtype, torch.float32)
        likely = target.to(wide).flatten(0, -2).softmax(-1)
        surprise = -F.log_softmax(logits.to(wide).flatten(0, -2), -1)
        # a class with logits of -inf, which cannot occur, costs nothing
        losses = (likely * surprise.masked_fill(likely == 0, 0)).sum(-1)
        if keep is not None:
            losses = losses[keep.flatten()]
        return losses.sum() / len(logits)

    return loss


def _content(batch: Any) -> bytes | None:
    """A digest of tensors, numbers and text in lists and dicts; None where there is more."""
    found = hashlib.sha256()

    def read(part: Any) -> bool:
        if isinstance(part, Tensor):
            found.update(digest_of(part).encode())
            return True
        if isinstance(part, Mapping):
            part = [item for pair in part.items() for item in pair]
        if isinstance(part, list | tuple):
            found.update(f"{len(part)} of".encode())
            return all(map(read, part))
        found.update(f"{part!r};".encode())
        return isinstance(part, str | bytes | bool | int | float | None)

    return found.digest() if read(batch) else None
