"""TIES: Yadav et al., "TIES-Merging: resolving interference when merging models", 2306.01708."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    merge_dtype,
    parameters,
)


def ties(
    thetas: Sequence[Weights],
    pretrained: Weights,
    density: float,
    scale: float,
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """theta_0 + scale tau, tau made of the task vectors tau_i = theta_i - theta_0 in three steps.

    Trim: of each tau_i the share `density` of largest magnitude is kept, over the whole model.
    Elect: the sign of sum w_i tau_i. Merge: the mean of the tau_i that have this sign, weighted.

    Raises ValueError for models that do not fit together, bad weights or density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: the share that is kept lies in (0, 1]")
    names, w = check_models(thetas, pretrained), check_weights(weights, len(thetas))
    thresholds = [_threshold(names, theta, pretrained, density) for theta in thetas]
    merged: dict[str, Tensor] = {}
    for name, tensors in parameters(names, thetas, merged):
        start = pretrained[name].to(tensors[0])
        total, agreeing = torch.zeros_like(start), torch.zeros_like(start)
        trimmed = []
        for tensor, threshold in zip(tensors, thresholds, strict=True):
            tau = tensor - start
            trimmed.append(torch.where(tau.abs() >= threshold, tau, 0))
        sign = sum(wi * tau for wi, tau in zip(w, trimmed, strict=True)).sign()  # type: ignore[union-attr]
        for tau, weight in zip(trimmed, w, strict=True):
            agrees = (tau.sign() == sign) & (tau != 0)
            total.add_(torch.where(agrees, tau, 0), alpha=weight)
            agreeing.add_(agrees, alpha=weight)
        tau = torch.where(agreeing > 0, total / agreeing, 0)
        merged[name] = start.add(tau, alpha=scale).to(thetas[0][name].dtype)
    return merged


def _threshold(names: list[str], theta: Weights, pretrained: Weights, density: float) -> float:
    """The magnitude that the share `density` of a task vector's entries reaches."""
    magnitudes = torch.cat(
        [
            (theta[name].to(dtype) - pretrained[name].to(theta[name].device, dtype)).abs().flatten()
            for name in names
            if theta[name].is_floating_point() and (dtype := merge_dtype(theta[name]))
        ]
    )
    kept = max(1, round(density * magnitudes.numel()))
    return float(magnitudes.kthvalue(magnitudes.numel() - kept + 1).values)
