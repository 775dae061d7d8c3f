"""A loss for rows without labels: the prediction of a teacher, the task's own model, say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning.batches import Masks, default_masks
from mats_lightning.passes import evaluating
from mats_lightning.sampled import LogitsFn, logits_and_mask


def soft_targets(teacher: nn.Module, logits_fn: LogitsFn) -> Callable[[nn.Module, Any], Tensor]:
    """(model, batch) -> - 1/N sum_n sum_r sum_y p_teacher(y) log p_model(y), a `loss_fn`.

    Its gradient is the expected gradient over labels that the teacher draws, without their noise,
    and is 0 where the model predicts what the teacher does (Hinton, Vinyals, Dean, "Distilling
    the knowledge in a neural network", arXiv 1503.02531, at temperature 1). The loss is a mean
    over examples, and a sum over positions.

    Arguments:
        teacher: called in eval mode and without gradient, on the batches that the model gets.
        logits_fn: as in collect_statistics, of both: (N, C), or (N, R, C), where the positions
            count that collect_statistics draws labels at: those of the batch's mask (a Hugging
            Face batch's attention mask), unless it gives (logits, mask (N, R)).

    The loss raises ValueError where the two do not give logits of one shape, for a mask of
    another, and for logits of the model without gradient.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with evaluating(teacher), torch.no_grad():
            given = logits_fn(teacher, batch)
        target = given[0] if isinstance(given, tuple) else given
        masks = Masks.of(default_masks(model)(batch))
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
