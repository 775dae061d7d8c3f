"""A loss for rows without labels: the prediction of a teacher, the task's own model, say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning.batches import Masks, default_masks
from mats_lightning.sampled import LogitsFn


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

    The loss raises ValueError where the two do not give logits of one shape, and for a mask of
    another.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        training = [module for module in teacher.modules() if module.training]
        teacher.eval()
        try:
            with torch.no_grad():
                given = logits_fn(teacher, batch)
        finally:
            for module in training:
                module.training = True
        target = given[0] if isinstance(given, tuple) else given
        found = logits_fn(model, batch)
        logits, keep = found if isinstance(found, tuple) else (found, None)
        if logits.shape != target.shape:
            raise ValueError(
                f"the teacher gives logits {tuple(target.shape)} and the model"
                f" {tuple(logits.shape)} for one batch: the teacher must be of the same task"
            )
        if keep is None and logits.ndim == 3:
            keep = Masks.of(default_masks(model)(batch)).of_output(logits.shape[:-1])
        if keep is not None and keep.shape != logits.shape[:-1]:
            raise ValueError(
                f"the logits have shape {tuple(logits.shape)} and the mask {tuple(keep.shape)}: let"
                f" logits_fn give (logits, mask) with a mask {tuple(logits.shape[:-1])}, true"
                " where a position counts"
            )
        wide = torch.promote_types(logits.dtype, torch.float32)
        likely = target.to(wide).flatten(0, -2).softmax(-1)
        surprise = -F.log_softmax(logits.to(wide).flatten(0, -2), -1)
        # a class with logits of -inf, which cannot occur, costs nothing
        losses = (likely * surprise.masked_fill(likely == 0, 0)).sum(-1)
        if keep is not None:
            losses = losses[keep.flatten().bool()]
        return losses.sum() / len(logits)

    return loss
