"""The simple average: C_i = I."""

from collections.abc import Sequence

from torch import Tensor

from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    counted,
    parameters,
    weighted_mean,
)


def average(
    thetas: Sequence[Weights], *, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """sum w_i theta_i / sum w_i, parameter by parameter.

    Raises ValueError for models that do not fit together or bad weights.
    """
    w = check_weights(weights, len(thetas))
    thetas, w = counted(thetas, w), counted(w, w)
    names = check_models(thetas)
    merged: dict[str, Tensor] = {}
    for name, tensors, dtype in parameters(names, thetas, w, merged):
        merged[name] = weighted_mean(tensors, w).to(dtype)
    return merged
