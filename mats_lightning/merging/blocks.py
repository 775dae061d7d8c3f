"""From statistics to operators: each task's C_i for one parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.models import Weights, weighted_mean
from mats_lightning.operators import (
    Damped,
    Dense,
    Diagonal,
    Gram,
    Identity,
    KroneckerFactored,
    Operator,
    scale_off_diagonal,
)
from mats_lightning.statistics import Statistics

UNCOVERED = ("average", "pretrained", "error")


def covering_statistic(
    name: str, kinds: Sequence[str], statistics: Sequence[Statistics]
) -> str | None:
    """The first of `kinds` that covers the parameter in all models; None if none does in any.

    Raises ValueError when it is covered in some models only.
    """
    for kind in kinds:
        if kind == "identity":
            return kind
        key = name.removesuffix(".weight") if kind in ("gram", "kfac") else name
        covered = [key in getattr(s, kind) for s in statistics]
        if all(covered):
            return kind
        if any(covered):
            raise ValueError(
                f"'{name}' has the statistic {kind} in model {covered.index(True)} but not in"
                f" model {covered.index(False)}: take the same statistics of every model"
            )
    return None


def operator(
    name: str,
    kind: str,
    statistics: Statistics,
    like: Tensor,
    *,
    off_diagonal: float = 1.0,
    floor: float = 0.0,
) -> Operator:
    """C of one task for one parameter, in the dtype and on the device of `like`.

    Raises ValueError for factors that do not fit the parameter or are not finite.
    """

    def fitted(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"the {kind} of '{name}' has shape {tuple(tensor.shape)}, its parameter"
                f" {tuple(like.shape)} needs {shape}: these statistics are of another architecture"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the {kind} of '{name}' has NaN or inf; take the statistics anew")
        return tensor.detach().to(like)

    module = name.removesuffix(".weight")
    if kind == "identity":
        return Identity()
    if kind == "diagonal_fisher":
        f = fitted(statistics.diagonal_fisher[name], tuple(like.shape))
        return Diagonal(f.clamp(min=floor))
    if kind == "block_fisher":
        d = like.numel()
        return Dense(scale_off_diagonal(fitted(statistics.block_fisher[name], (d, d)), off_diagonal))
    d_out, d_in = like.shape
    if kind == "gram":
        return Gram(scale_off_diagonal(fitted(statistics.gram[module], (d_in, d_in)), off_diagonal))
    a, g = statistics.kfac[module]
    a, g = fitted(a, (d_in, d_in)), fitted(g, (d_out, d_out))
    return KroneckerFactored(scale_off_diagonal(a, off_diagonal), scale_off_diagonal(g, off_diagonal))


def task_operators(
    name: str,
    kind: str,
    statistics: Sequence[Statistics],
    like: Tensor,
    weights: Sequence[float],
    *,
    off_diagonal: float = 1.0,
    floor: float = 0.0,
    damping: float = 0.0,
    normalize: bool = False,
) -> list[Operator]:
    """w_i C_i of every task, damped: C_i + damping (mean eigenvalue of C_i) I.

    `normalize` divides each C_i by its mean eigenvalue first (its trace, up to the size). All
    are divided by one number, so that the mean eigenvalue of their sum is 1: the curvature of a
    well fitted model is so small that float32 would run out of range.
    """
    operators = []
    for task, weight in zip(statistics, weights, strict=True):
        c = operator(name, kind, task, like, off_diagonal=off_diagonal, floor=floor)
        mean = c.mean_eigenvalue()
        if normalize and mean > 0:
            c, mean = c.scaled(1 / mean), 1.0
        c = c.scaled(weight)
        operators.append(Damped(c, damping * weight * mean) if damping and mean > 0 else c)
    total = sum(c.mean_eigenvalue() for c in operators)
    return [c.scaled(1 / total) for c in operators] if total > 0 else operators


def uncovered_value(
    name: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    pretrained: Weights | None,
    uncovered: str,
) -> Tensor:
    """The value of a parameter without a statistic: `uncovered` is the user's choice."""
    if uncovered == "error":
        raise ValueError(
            f"'{name}' is covered by no statistic of this objective; choose"
            " uncovered='average' or 'pretrained', or a statistic that covers it"
        )
    if uncovered == "pretrained":
        assert pretrained is not None
        return pretrained[name].detach().to(tensors[0])
    return weighted_mean(tensors, weights)


def check_statistics(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    uncovered: str,
    pretrained: Weights | None,
) -> None:
    """Raises ValueError for a wrong count of statistics or a wrong choice of `uncovered`."""
    if len(statistics) != len(thetas):
        raise ValueError(f"{len(statistics)} statistics for {len(thetas)} models: one a model")
    if uncovered not in UNCOVERED:
        raise ValueError(f"uncovered={uncovered!r}; choose from {', '.join(UNCOVERED)}")
    if uncovered == "pretrained" and pretrained is None:
        raise ValueError("uncovered='pretrained' needs pretrained=<state dict>")
