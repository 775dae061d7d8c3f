"""RegMean: Jin et al., "Dataless knowledge fusion by merging weights", arXiv 2212.09849."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.covering import check_statistics, uncovered_value
from mats_lightning.merging.curvatures import task_operators
from mats_lightning.merging.forms import beside, matrix_form
from mats_lightning.merging.models import (
    Weights,
    check_counts,
    check_models,
    check_range,
    check_weights,
    counted,
    parameters,
    stored_dtype,
)
from mats_lightning.operators import Diagonal, Operator, undamped
from mats_lightning.solvers import symmetric_inverse
from mats_lightning.statistics import Statistics

STATISTICS = ("gram",)


def regmean(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    off_diagonal: float = 0.9,
    *,
    damping: float = 1e-6,
    normalize: bool = False,
    fold_bias: bool = False,
    weights: Sequence[float] | None = None,
    uncovered: str = "average",
    pretrained: Weights | None = None,
) -> dict[str, Tensor]:
    """W = (sum w_i W_i A_i) (sum w_i A_i)^-1 for weights that multiply (the paper's eq. 2).

    A_i is the Gram matrix of the layer's inputs, its off-diagonal scaled by `off_diagonal` and
    `damping` times its mean eigenvalue added, on both sides of the equation; solved by a
    Cholesky factor in float64. For an embedding A_i is diagonal: each row is a mean, weighted by
    how often it was looked up. `fold_bias` solves for [W b] together, with the A of the inputs
    with a 1 behind them. Parameters without a Gram matrix: `uncovered` = "average",
    "pretrained" or "error".

    Raises ValueError for models or statistics that do not fit together, an off-diagonal scaling
    outside [0, 1], a negative damping, or a singular sum.
    """
    w = check_weights(weights, len(thetas))
    check_counts(statistics, thetas)
    thetas, statistics, w = counted(thetas, w), counted(statistics, w), counted(w, w)
    names = check_models(thetas)
    check_range("off_diagonal", off_diagonal, highest=1)
    check_range("damping", damping)
    kind_of, folded = check_statistics(
        thetas, statistics, STATISTICS, uncovered, pretrained, fold_bias
    )
    merged: dict[str, Tensor] = {}
    for name, tensors, dtype in parameters(names, thetas, w, merged):
        if name in kind_of:
            operators = task_operators(
                name,
                kind_of[name],
                statistics,
                tensors[0].double(),
                w,
                off_diagonal=off_diagonal,
                damping=damping,
                normalize=normalize,
                with_bias=name in folded,
            )
            form = matrix_form(name, kind_of[name], statistics[0], tensors[0].shape)
            b: Tensor | None = None
            for c, tensor, theta in zip(operators, tensors, thetas, strict=True):
                block = form.of(tensor.double())  # one at a time: embeddings are large
                if name in folded:
                    block = beside(block, theta[folded[name]])
                product = c.matvec(block)
                b = product if b is None else b.add_(product)
            assert b is not None
            try:
                value = _closed_form(operators, b)
            except ValueError as error:
                raise ValueError(f"RegMean of '{name}': {error}") from error
            if name in folded:
                of_bias = stored_dtype([theta[folded[name]] for theta in thetas])
                merged[folded[name]] = value[:, -1].to(of_bias)
                value = value[:, :-1]
            value = form.back(value.contiguous())
        elif name in folded.values():
            continue
        else:
            value = uncovered_value(name, tensors, w, pretrained, uncovered)
        merged[name] = value.to(dtype)
    return merged


def _closed_form(operators: Sequence[Operator], b: Tensor) -> Tensor:
    """The X with sum C_i X = B, each C_i a product with a matrix from the right, or diagonal."""
    if isinstance(undamped(operators[0]), Diagonal):
        one = b.new_ones(len(b), 1)
        total = sum((c.matvec(one) for c in operators), torch.zeros_like(one))
        if not bool((total > 0).all()):
            raise ValueError("rows that no task looked up need a damping above 0")
        return b / total
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device).expand(*b.shape[:-2], -1, -1)
    total = sum((c.matvec(eye) for c in operators), torch.zeros_like(eye))
    return symmetric_inverse(total, 0.0)(b)
