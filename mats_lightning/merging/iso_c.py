"""Iso-C: Marczak et al., "No task left behind: isotropic model merging", arXiv 2502.04959."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.models import Weights
from mats_lightning.merging.spectral import merge_matrices, singular_vectors


def iso_c(
    thetas: Sequence[Weights],
    pretrained: Weights,
    scale: float,
    *,
    weights: Sequence[float] | None = None,
    averaged: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    """theta_0 + scale s U V^T, where U S V^T = sum w_i (theta_i - theta_0) and s = mean(S).

    So the merged task matrix has the singular vectors of the summed ones, all equally strong
    (section 4). The mean is over the rank of the sum: directions that no task changed stay
    unchanged, where the authors' code fills them with arbitrary ones (it differs for sums without
    full rank alone). One model is changed too. SVD in float64.

    As in the authors' code, a matrix is any parameter with exactly two axes: linear weights, and
    embeddings too. All others (vectors, convolutions) get theta_0 + scale mean(theta_i - theta_0),
    the mean weighted. `averaged` are regular expressions: a matrix whose name has one is averaged
    as well ("embeddings"; the authors' code does so with "text_projection").

    Raises ValueError for models that do not fit together, bad weights, NaN or inf, or an expression
    that no name has.
    """
    return merge_matrices(thetas, pretrained, scale, weights, averaged, _isotropic_sum)


def _isotropic_sum(taus: list[Tensor]) -> Tensor:
    u, s, vt = singular_vectors(sum(taus, torch.zeros_like(taus[0])))
    return s.sum() / max(1, len(s)) * (u @ vt)
