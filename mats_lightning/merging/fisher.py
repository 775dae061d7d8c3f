"""Diagonal Fisher merging: Matena and Raffel, "Merging models with Fisher-weighted averaging"."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.covering import check_statistics, uncovered_value
from mats_lightning.merging.curvatures import task_operators
from mats_lightning.merging.models import (
    Weights,
    check_counts,
    check_models,
    check_range,
    check_weights,
    counted,
    parameters,
    weighted_mean,
)
from mats_lightning.statistics import Statistics

STATISTICS = ("diagonal_fisher",)


def fisher(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    *,
    floor: float = 1e-8,
    normalize: bool = False,
    weights: Sequence[float] | None = None,
    uncovered: str = "average",
    pretrained: Weights | None = None,
) -> dict[str, Tensor]:
    """sum w_i F_i theta_i / sum w_i F_i, elementwise (arXiv 2111.09832, eq. 4).

    F_i is the diagonal Fisher, floored at `floor` (1e-8 in the papers). Where there is no
    evidence at all, the value is the average. `normalize` divides each F_i by its mean, a
    parameter at a time. Parameters without a diagonal Fisher: `uncovered` = "average",
    "pretrained" or "error".

    Raises ValueError for models or statistics that do not fit together, or a negative floor.
    """
    w = check_weights(weights, len(thetas))
    check_counts(statistics, thetas)
    thetas, statistics, w = counted(thetas, w), counted(statistics, w), counted(w, w)
    names = check_models(thetas)
    check_range("floor", floor)
    kind_of, _ = check_statistics(thetas, statistics, STATISTICS, uncovered, pretrained)
    merged: dict[str, Tensor] = {}
    for name, tensors, dtype in parameters(names, thetas, w, merged):
        if name in kind_of:
            operators = task_operators(
                name, kind_of[name], statistics, tensors[0], w, floor=floor, normalize=normalize
            )
            zero, one = torch.zeros_like(tensors[0]), torch.ones_like(tensors[0])
            b = sum((c.matvec(t) for c, t in zip(operators, tensors, strict=True)), zero)
            total = sum((c.matvec(one) for c in operators), zero)
            value = torch.where(total > 0, b / total, weighted_mean(tensors, w))
        else:
            value = uncovered_value(name, tensors, w, pretrained, uncovered)
        merged[name] = value.to(dtype)
    return merged
