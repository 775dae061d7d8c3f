"""TSV-M: Gargiulo et al., "Task singular vectors", arXiv 2412.00081."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.models import Weights
from mats_lightning.merging.spectral import merge_matrices, orthogonal_factor, singular_vectors


def tsv_m(
    thetas: Sequence[Weights],
    pretrained: Weights,
    scale: float,
    *,
    rank_fraction: float | None = None,
    weights: Sequence[float] | None = None,
    averaged: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    """theta_0 + scale P(U) S P(V)^T, with U = [U_1 ... U_T] and V alike.

    U_i S_i V_i^T is the SVD of w_i (theta_i - theta_0), cut to the largest `rank_fraction` of its
    components: by default 1/T for T models of positive weight, at least one, and none whose
    singular value is zero. P whitens the tasks' singular vectors against each other: P(U) is the
    orthonormal matrix nearest to U (orthogonal Procrustes). Where tasks have a direction in
    common, up to rounding, it is shared among them, not replaced by an arbitrary one: T equal
    models give that one, cut to 1/T. One model is returned as it is, with scale 1. SVD in float64.

    As in the authors' code, a matrix is any parameter with exactly two axes: linear weights, and
    embeddings too. All others (vectors, convolutions) get theta_0 + scale mean(theta_i - theta_0),
    the mean weighted. `averaged` are regular expressions: a matrix whose name has one is averaged
    as well ("embeddings"; the authors' code does so with "text_projection").

    Raises ValueError for models that do not fit together, bad weights, NaN or inf, an expression
    that no name has, or a rank_fraction outside (0, 1].
    """
    if rank_fraction is not None and not 0 < rank_fraction <= 1:
        raise ValueError(f"rank_fraction={rank_fraction}: the share that is kept lies in (0, 1]")

    def combine(taus: list[Tensor]) -> Tensor:
        full = min(taus[0].shape)
        kept = full // len(taus) if rank_fraction is None else int(full * rank_fraction)
        return _whitened_sum(taus, max(1, kept))

    return merge_matrices(thetas, pretrained, scale, weights, averaged, combine)


def _whitened_sum(taus: list[Tensor], kept: int) -> Tensor:
    """P([U_1 ...]) [S_1 ...] P([V_1 ...])^T, `kept` components of each."""
    us, ss, vts = [], [], []
    for tau in taus:
        u, s, vt = singular_vectors(tau)
        us.append(u[:, :kept].clone())  # a view would hold all of U
        ss.append(s[:kept])
        vts.append(vt[:kept].clone())
    u, s, vt = torch.cat(us, dim=1), torch.cat(ss), torch.cat(vts)
    return (orthogonal_factor(u) * s) @ orthogonal_factor(vt)
