"""DARE: Yu et al., "Language models are super Mario", arXiv 2311.03099."""

import hashlib
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from mats_lightning.lazy import Lazy
from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    counted,
    merge_dtype,
    of_batch_norm,
)
from mats_lightning.merging.task_arithmetic import task_arithmetic
from mats_lightning.merging.ties import ties
from mats_lightning.statistics.record import finite


def dare(
    thetas: Sequence[Weights],
    pretrained: Weights,
    drop_rate: float,
    scale: float,
    *,
    seed: int = 0,
    density: float | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Task arithmetic, or with a `density` TIES, of the models that `drop_and_rescale` gives.

    theta_0 + scale sum w_i m_i (theta_i - theta_0) / (1 - drop_rate), each number of m_i 0 with
    probability `drop_rate` and else 1. What is called DARE with TIES elsewhere, sign
    election without a trim, is density=1.

    What is dropped depends on `seed`, the model's place in `thetas` and the parameter's name, not
    on device, dtype or the other parameters.

    Raises ValueError for models that do not fit together, bad weights, a drop rate outside [0, 1)
    or a density outside (0, 1].
    """
    w = check_weights(weights, len(thetas))
    sparse = counted(_sparse(thetas, pretrained, drop_rate, seed), w)
    thetas, w = counted(thetas, w), counted(w, w)
    names = check_models(thetas, pretrained)
    if density is None:
        merged = task_arithmetic(sparse, pretrained, scale, weights=w)
    else:
        merged = ties(sparse, pretrained, density, scale, weights=w)
    for name in names:
        stored = reduce(torch.promote_types, (theta[name].dtype for theta in thetas))
        merged[name] = merged[name].to(stored)
    return merged


def drop_and_rescale(
    thetas: Sequence[Weights], pretrained: Weights, drop_rate: float, *, seed: int = 0
) -> list[Weights]:
    """theta_0 + m_i (theta_i - theta_0) / (1 - drop_rate) of each model.

    In expectation it is theta_i; statistics of theta_i do not belong to it, so it is for merge
    functions without any. Computed as it is read, in float32 at least (what a narrower dtype would
    round away is what was dropped). Counters, running statistics and what has inf in it are as
    they were.

    Raises ValueError for models that do not fit together or a drop rate outside [0, 1).
    """
    check_models(thetas, pretrained)
    return _sparse(thetas, pretrained, drop_rate, seed)


def _sparse(
    thetas: Sequence[Weights], pretrained: Weights, drop_rate: float, seed: int
) -> list[Weights]:
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate={drop_rate}: the probability of a drop lies in [0, 1)")
    return [Sparse(theta, pretrained, drop_rate, f"{seed}/{i}") for i, theta in enumerate(thetas)]


class Sparse(Lazy[Tensor]):
    """One model with its task vector dropped and rescaled, a parameter at a time."""

    def __init__(self, theta: Weights, pretrained: Weights, drop_rate: float, seed: str) -> None:
        super().__init__(theta)
        self._theta, self._pretrained = theta, pretrained
        self._drop_rate, self._seed = drop_rate, seed

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._theta[name].detach()
        moves = tensor.is_floating_point() and finite(tensor)
        if not moves or of_batch_norm(name, self._theta):
            return tensor
        start = self._pretrained[name].detach()
        # theta_0 unrounded, or what is dropped would be small instead of 0
        tensor = tensor.to(merge_dtype([tensor, start]))
        start = start.to(tensor)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        # on the CPU: each kind of device has random numbers of its own
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
        kept = drawn >= self._drop_rate
        tau = (tensor - start).mul_(kept.to(tensor.device))
        return start.add(tau, alpha=1 / (1 - self._drop_rate))
