"""From statistics to operators: each task's C_i for one parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.forms import matrix_form, of_embedding, statistic_name
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
from mats_lightning.statistics.record import finite


def operator(
    name: str,
    kind: str,
    statistics: Statistics,
    like: Tensor,
    *,
    off_diagonal: float = 1.0,
    floor: float = 0.0,
    with_bias: bool = False,
) -> Operator:
    """C of one task for one parameter, in the dtype and on the device of `like`, the parameter.

    It acts on the parameter in its `matrix_form`, and `with_bias` on [W b]: then A is that of
    the input with a 1 behind it. Raises ValueError for factors that do not fit the parameter or
    are not finite.
    """

    def fitted(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"the {kind} of '{name}' has shape {tuple(tensor.shape)}, its parameter"
                f" {tuple(like.shape)} needs {shape}: these statistics are of another architecture"
            )
        if not finite(tensor):
            raise ValueError(f"the {kind} of '{name}' has NaN or inf; take the statistics anew")
        return tensor.detach().to(like)

    if kind == "identity":
        return Identity()
    key = statistic_name(name, kind, statistics)
    if kind == "diagonal_fisher":
        f = fitted(statistics.diagonal_fisher[key], tuple(like.shape))
        return Diagonal(f.clamp(min=floor))
    if kind == "block_fisher":
        d = like.numel()
        return Dense(scale_off_diagonal(fitted(statistics.block_fisher[key], (d, d)), off_diagonal))
    if kind == "gram" and of_embedding(key, statistics):
        return Diagonal(fitted(statistics.gram[key], (len(like),)).unsqueeze(1))
    form = matrix_form(name, kind, statistics, like.shape)
    a, g = statistics.kfac[key] if kind == "kfac" else (statistics.gram[key], None)
    a = form.a(fitted(a, form.shape_of_a))
    if with_bias:
        mean = fitted(statistics.mean_input[key], a.shape[:1]).unsqueeze(0)
        a = torch.cat([torch.cat([a, mean]), torch.cat([mean.T, a.new_ones(1, 1)])], dim=1)
    a = scale_off_diagonal(a, off_diagonal)
    if g is None:
        return Gram(a)
    return KroneckerFactored(
        a, scale_off_diagonal(form.g(fitted(g, form.shape_of_g)), off_diagonal)
    )


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
    with_bias: bool = False,
) -> list[Operator]:
    """w_i C_i of every task, damped: C_i + damping (mean eigenvalue of C_i) I.

    `normalize` divides each C_i by its mean eigenvalue first (its trace, up to the size). All
    are divided by one number, so that the mean eigenvalue of their sum is 1: the curvature of a
    well fitted model is so small that float32 would run out of range. Where all are zero, they
    are w_i I: no evidence gives the average.

    Raises ValueError where the tasks' factors are cut into blocks in different ways.
    """
    operators = task_curvatures(
        name, kind, statistics, like, off_diagonal=off_diagonal, floor=floor, with_bias=with_bias
    )
    return balance(operators, weights, damping, normalize)[0]


def task_curvatures(
    name: str,
    kind: str,
    statistics: Sequence[Statistics],
    like: Tensor,
    *,
    off_diagonal: float = 1.0,
    floor: float = 0.0,
    with_bias: bool = False,
) -> list[Operator]:
    """C_i of every task, as it is. Raises as `task_operators` does."""
    forms = [matrix_form(name, kind, task, like.shape) for task in statistics]
    for i, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(
                f"the {kind} of '{name}' is cut into other blocks in model {i} than in model 0"
                f" ({form} and {forms[0]}): take all statistics with the same max_factor_size"
            )
    return [
        operator(
            name, kind, task, like, off_diagonal=off_diagonal, floor=floor, with_bias=with_bias
        )
        for task in statistics
    ]


def balance(
    operators: list[Operator], weights: Sequence[float], damping: float, normalize: bool
) -> tuple[list[Operator], list[float]]:
    """The C_i in the form of `task_operators`, and the s_i that each was multiplied by.

    The operators are replaced in place. All s_i are 0 where all C_i are zero, and with `normalize`
    that of a task whose C_i is zero.
    """
    means = [c.mean_eigenvalue() for c in operators]
    scales = [
        weight if not normalize else weight / mean if mean > 0 else 0.0
        for weight, mean in zip(weights, means, strict=True)
    ]
    total = (1 + damping) * sum(s * m for s, m in zip(scales, means, strict=True))
    if total <= 0:
        return [Identity(weight / sum(weights)) for weight in weights], [0.0] * len(weights)
    for i, mean in enumerate(means):  # in place: no second copy of all tasks' factors at once
        scale = scales[i] / total
        c = operators[i] = operators[i].scaled(scale)
        if damping and mean > 0:
            operators[i] = Damped(c, damping * scale * mean)
    return operators, [scale / total for scale in scales]
