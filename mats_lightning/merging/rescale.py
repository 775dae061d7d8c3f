"""The length of a merge: its task vector, as a whole, made longer or shorter."""

import math
from collections.abc import Iterator

from torch import Tensor

from mats_lightning.merging.models import (
    Weights,
    check_models,
    merge_dtype,
    of_batch_norm,
)
from mats_lightning.statistics.record import finite


def rescale(merged: Weights, pretrained: Weights, scale: float) -> dict[str, Tensor]:
    """theta_0 + scale (theta - theta_0), for what any method merged to.

    Task arithmetic and its heirs choose such a scale (Ilharco et al., arXiv 2212.04089). A mean by
    curvature can need one as well: the curvature of the other tasks holds back what one task has
    changed, so that the merged task vector is shorter than the tasks' own. Counters, running
    statistics and what has inf in it stay as they were merged.

    Raises ValueError for models that do not fit together, or a scale that is no number.
    """
    return dict(rescaled(merged, pretrained, scale))


def rescaled(merged: Weights, pretrained: Weights, scale: float) -> Iterator[tuple[str, Tensor]]:
    """`rescale`, a parameter at a time."""
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: a finite number is needed")
    for name in check_models([merged], pretrained):
        theta, start = merged[name], pretrained[name]
        moves = theta.is_floating_point() and finite(theta)
        if not moves or of_batch_norm(name, merged):
            yield name, theta
            continue
        dtype = merge_dtype([theta, start])
        first = start.detach().to(theta.device, dtype)
        yield name, (first + scale * (theta.to(dtype) - first)).to(theta.dtype)
