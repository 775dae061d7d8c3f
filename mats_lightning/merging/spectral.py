"""Task matrices and their singular vectors: what Iso-C and TSV-M share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    counted,
    names_with,
    parameters,
    weighted_mean,
)
from mats_lightning.statistics.record import finite

Combine = Callable[[list[Tensor]], Tensor]


def merge_matrices(
    thetas: Sequence[Weights],
    pretrained: Weights,
    scale: float,
    weights: Sequence[float] | None,
    averaged: str | Sequence[str],
    combine: Combine,
) -> dict[str, Tensor]:
    """theta_0 + scale combine([w_i tau_i]) for matrices, theta_0 + scale mean(tau_i) for the rest.

    A matrix is a parameter of two axes whose name has none of the regular expressions `averaged`.
    `combine` gets the tasks of positive weight.

    Raises ValueError for models that do not fit together, bad weights, NaN or inf, or an expression
    that no name has.
    """
    w = check_weights(weights, len(thetas))
    thetas, w = counted(thetas, w), counted(w, w)
    names = check_models(thetas, pretrained)
    apart = names_with(averaged, names, "averaged")
    merged: dict[str, Tensor] = {}
    for name, tensors, dtype in parameters(names, thetas, w, merged):
        start = pretrained[name].detach().to(tensors[0])
        if not finite(start):
            raise ValueError(f"'{name}' has NaN or inf in the pretrained model")
        taus = [tensor - start for tensor in tensors]
        if start.ndim == 2 and name not in apart:
            tau = combine([tau.mul_(wi) for wi, tau in zip(w, taus, strict=True)])
        else:
            tau = weighted_mean(taus, w)
        merged[name] = start.add(tau.to(start), alpha=scale).to(dtype)
    return merged


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), s (r,), V^T (r, n) of a matrix (m, n) of rank r, in float64.

    Directions whose singular value is zero, up to rounding in the dtype of `matrix`, are left
    out: which they are is chance.
    """
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = int((s > s[:1] * min(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """U V^T: the nearest matrix whose singular values are 1 (orthogonal Procrustes)."""
    u, _, vt = singular_vectors(matrix)
    return u @ vt
