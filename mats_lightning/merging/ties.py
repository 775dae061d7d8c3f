"""TIES: Yadav et al., "TIES-Merging: resolving interference when merging models", 2306.01708."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    counted,
    merge_dtype,
    of_batch_norm,
    parameters,
)
from mats_lightning.statistics.record import finite


def ties(
    thetas: Sequence[Weights],
    pretrained: Weights,
    density: float,
    scale: float,
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """theta_0 + scale tau, tau made of the task vectors tau_i = theta_i - theta_0 in three steps.

    Trim: of each tau_i the share `density` of largest magnitude is kept, over the whole model
    (what batch normalisation keeps is no part of it, and merged by its counts; nor is what has
    inf in it).
    Elect: the sign of sum w_i tau_i. Merge: the mean of the tau_i that have this sign, weighted.

    Raises ValueError for models that do not fit together, bad weights or density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: the share that is kept lies in (0, 1]")
    w = check_weights(weights, len(thetas))
    thetas, w = counted(thetas, w), counted(w, w)
    names = check_models(thetas, pretrained)
    thresholds = _thresholds(names, thetas, pretrained, density)
    merged: dict[str, Tensor] = {}
    for name, tensors, dtype in parameters(names, thetas, w, merged):
        start = pretrained[name].detach().to(tensors[0])
        trimmed = []
        for tensor, threshold in zip(tensors, thresholds, strict=True):
            tau = tensor - start
            trimmed.append(torch.where(tau.abs() >= threshold, tau, 0))
        zero = torch.zeros_like(start)
        sign = sum((wi * tau for wi, tau in zip(w, trimmed, strict=True)), zero).sign()
        total, agreeing = zero.clone(), zero.clone()
        for tau, weight in zip(trimmed, w, strict=True):
            agrees = tau.sign() == sign
            total.add_(torch.where(agrees, tau, 0), alpha=weight)
            agreeing.add_(agrees, alpha=weight)
        tau = torch.where(agreeing > 0, total / agreeing, 0)
        merged[name] = start.add(tau, alpha=scale).to(dtype)
    return merged


def _thresholds(
    names: Sequence[str], thetas: Sequence[Weights], pretrained: Weights, density: float
) -> list[float]:
    """For each task vector, the magnitude that the share `density` of its entries reaches."""
    dtypes = {
        name: merge_dtype([theta[name] for theta in thetas])
        for name in names
        if thetas[0][name].is_floating_point()
        and finite(thetas[0][name])
        and not of_batch_norm(name, names)
    }
    if not dtypes:
        return [0.0] * len(thetas)
    thresholds = []
    for theta in thetas:
        magnitudes = torch.cat(
            [
                (theta[n].detach().to(dtype) - pretrained[n].detach().to(theta[n].device, dtype))
                .abs()
                .flatten()
                for n, dtype in dtypes.items()
            ]
        )
        kept = max(1, round(density * magnitudes.numel()))
        thresholds.append(float(magnitudes.kthvalue(magnitudes.numel() - kept + 1).values))
    return thresholds
