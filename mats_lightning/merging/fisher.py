"""Diagonal Fisher merging: Matena and Raffel, "Merging models with Fisher-weighted averaging"."""

from collections.abc import Sequence

from torch import Tensor

from mats_lightning.merging.blocks import (
    check_statistics,
    covering_statistic,
    task_operators,
    uncovered_value,
)
from mats_lightning.merging.models import Weights, check_models, check_weights, parameters
from mats_lightning.statistics import Statistics


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

    F_i is the diagonal Fisher, floored at `floor` (1e-8 in the papers), so that no evidence at
    all gives the average. `normalize` divides each F_i by its mean, a parameter at a time.
    Parameters without a diagonal Fisher: `uncovered` = "average", "pretrained" or "error".

    Raises ValueError for models or statistics that do not fit together.
    """
    names, w = check_models(thetas), check_weights(weights, len(thetas))
    check_statistics(thetas, statistics, uncovered, pretrained)
    merged: dict[str, Tensor] = {}
    for name, tensors in parameters(names, thetas, merged):
        kind = covering_statistic(name, ["diagonal_fisher"], statistics)
        if kind is None:
            value = uncovered_value(name, tensors, w, pretrained, uncovered)
        else:
            operators = task_operators(
                name, kind, statistics, tensors[0], w, floor=floor, normalize=normalize
            )
            b = sum(c.matvec(t) for c, t in zip(operators, tensors, strict=True))
            value = b / sum(c.matvec(t.new_ones(t.shape)) for c, t in zip(operators, tensors, strict=True))
        merged[name] = value.to(thetas[0][name].dtype)
    return merged
