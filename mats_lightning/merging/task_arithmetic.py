"""Task arithmetic: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089."""

from collections.abc import Sequence

from torch import Tensor

from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    counted,
    parameters,
)


def task_arithmetic(
    thetas: Sequence[Weights],
    pretrained: Weights,
    scale: float,
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """theta_0 + scale sum w_i (theta_i - theta_0), with the task vectors theta_i - theta_0.

    Raises ValueError for models that do not fit together or bad weights.
    """
    w = check_weights(weights, len(thetas))
    thetas, w = counted(thetas, w), counted(w, w)
    names = check_models(thetas, pretrained)
    merged: dict[str, Tensor] = {}
    for name, tensors, dtype in parameters(names, thetas, w, merged):
        start = pretrained[name].detach().to(tensors[0])
        total = start.clone()
        for tensor, weight in zip(tensors, w, strict=True):
            total.add_(tensor - start, alpha=scale * weight)
        merged[name] = total.to(dtype)
    return merged
