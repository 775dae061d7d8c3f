"""What a model's own modules show of its loss and of how it treats a batch's examples."""

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.loss import _Loss

from mats_lightning.batches import LossReduction


def coupling(model: nn.Module) -> list[str]:
    """A note, where a model's batch normalisation is over the examples of a batch."""
    if any(
        isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        for module in model.modules()
    ):
        return [
            "batch normalisation over a batch's own rows couples its examples: statistics of the"
            " layers before it are not exact"
        ]
    return []


def check_loss_modules(model: nn.Module, reduction: LossReduction) -> None:
    """Raises ValueError where "mean" is said of a loss with another divisor.

    A mean by class weights, or without the labels of a class; a sum may be divided later, so of
    that there is a warning.
    """
    if reduction != "mean":
        return
    for name, module in model.named_modules():
        if getattr(module, "reduction", None) == "sum" and isinstance(module, _Loss):
            rank_zero_warn(
                f"'{name}' is a {type(module).__name__} that gives a sum, and"
                " loss_reduction='mean' says that the loss is divided by the number of examples:"
                " pass loss_reduction='sum' unless the training step divides it"
            )
        if not isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss) or module.reduction != "mean":
            continue
        if module.ignore_index != -100:
            raise ValueError(
                f"'{name}' is a {type(module).__name__} that leaves the label"
                f" {module.ignore_index} out of its mean, which is divided by the number of the"
                " other labels, not of the examples; pass loss_reduction=lambda batch:"
                f" (labels != {module.ignore_index}).sum(), with the batch's labels"
            )
        if module.weight is not None:
            raise ValueError(
                f"'{name}' is a {type(module).__name__} with class weights: its mean is divided by"
                " the sum of the labels' weights, not by the number of examples; pass"
                f" loss_reduction=lambda batch: module.{name}.weight[labels].sum(), with the"
                " batch's labels"
            )
