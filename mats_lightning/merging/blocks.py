"""From statistics to operators: each task's C_i for one parameter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mats_lightning.merging.models import Weights, check_models, weighted_mean
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


def covering_statistics(
    names: Sequence[str], kinds: Sequence[str], statistics: Sequence[Statistics]
) -> dict[str, str]:
    """parameter -> the first of `kinds` that covers it in all models, where there is one.

    Raises ValueError for a parameter that is covered in some models only, and when no parameter
    is covered at all.
    """
    # iterating a view reads no tensor
    known = {k: [set(getattr(s, k)) for s in statistics] for k in kinds if k != "identity"}
    covering: dict[str, str] = {}
    for name in names:
        for kind in kinds:
            if kind == "identity":
                covering[name] = kind
                break
            covered = [
                _key(name, kind, s) in keys for s, keys in zip(statistics, known[kind], strict=True)
            ]
            if all(covered):
                covering[name] = kind
                break
            if any(covered):
                raise ValueError(
                    f"'{name}' has the statistic {kind} in model {covered.index(True)} but not in"
                    f" model {covered.index(False)}: take the same statistics of every model"
                )
    if not covering:
        found = sorted(key for sets in known.values() for keys in sets for key in keys)
        raise ValueError(
            f"no parameter ('{names[0]}' ...) has the statistic {' or '.join(kinds)}: the"
            " statistics hold "
            + (f"that of '{found[0]}' ...; is a prefix missing?" if found else "none of this kind")
        )
    return covering


def _key(name: str, kind: str, statistics: Statistics) -> str:
    """The name under which the statistic of a parameter is stored."""
    name = statistics.info.get("tied", {}).get(name, name)
    return name.removesuffix(".weight") if kind in ("gram", "kfac") else name


@dataclass(frozen=True)
class MatrixForm:
    """How a parameter is seen by its operators, where A and G act on it.

    A linear weight as it is; one of Hugging Face's Conv1D transposed; a convolution's as one
    matrix a group: (d_out, d_in) or (groups, d_out, d_in).
    """

    shape: tuple[int, ...]  # the parameter's own
    transposed: bool = False
    groups: int = 1

    def of(self, weight: Tensor) -> Tensor:
        if self.transposed:
            return weight.T
        if self.groups > 1:
            return weight.reshape(self.groups, self.shape[0] // self.groups, -1)
        return weight.flatten(1) if weight.ndim > 2 else weight

    def back(self, matrices: Tensor) -> Tensor:
        return matrices.T.contiguous() if self.transposed else matrices.reshape(self.shape)


def matrix_form(name: str, kind: str, statistics: Statistics, weight: Tensor) -> MatrixForm:
    """The form in which `operator` takes a parameter with this kind of statistic.

    Raises ValueError for statistics that do not fit the parameter.
    """
    shape = tuple(weight.shape)
    if kind not in ("gram", "kfac"):
        return MatrixForm(shape)
    module = _key(name, kind, statistics)
    groups = statistics.info.get("groups", {}).get(module, 1)
    if len(shape) < 2 or shape[0] % groups:
        raise ValueError(
            f"'{name}' has the statistic {kind}, which a matrix has, and the shape {shape}:"
            " these statistics are of another architecture"
        )
    return MatrixForm(shape, module in statistics.info.get("transposed", ()), groups)


def operator(
    name: str,
    kind: str,
    statistics: Statistics,
    like: Tensor,
    *,
    off_diagonal: float = 1.0,
    floor: float = 0.0,
) -> Operator:
    """C of one task for one parameter; `like` is its matrix form, in the dtype of the result.

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

    if kind == "identity":
        return Identity()
    key = _key(name, kind, statistics)
    if kind == "diagonal_fisher":
        f = fitted(statistics.diagonal_fisher[key], tuple(like.shape))
        return Diagonal(f.clamp(min=floor))
    if kind == "block_fisher":
        d = like.numel()
        return Dense(scale_off_diagonal(fitted(statistics.block_fisher[key], (d, d)), off_diagonal))
    *groups, d_out, d_in = like.shape
    square_in, square_out = (*groups, d_in, d_in), (*groups, d_out, d_out)
    if kind == "gram":
        a = statistics.gram[key]
        if a.ndim == 1:  # of an embedding
            return Diagonal(fitted(a, (d_out,)).unsqueeze(1))
        return Gram(scale_off_diagonal(fitted(a, square_in), off_diagonal))
    a, g = statistics.kfac[key]
    a, g = fitted(a, square_in), fitted(g, square_out)
    return KroneckerFactored(
        scale_off_diagonal(a, off_diagonal), scale_off_diagonal(g, off_diagonal)
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
) -> list[Operator]:
    """w_i C_i of every task, damped: C_i + damping (mean eigenvalue of C_i) I.

    `normalize` divides each C_i by its mean eigenvalue first (its trace, up to the size). All
    are divided by one number, so that the mean eigenvalue of their sum is 1: the curvature of a
    well fitted model is so small that float32 would run out of range. Where all are zero, they
    are w_i I: no evidence gives the average.
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
    if total > 0:
        return [c.scaled(1 / total) for c in operators]
    return [Identity(weight / sum(weights)) for weight in weights]


def uncovered_value(
    name: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    pretrained: Weights | None,
    uncovered: str,
) -> Tensor:
    """The value of a parameter without a statistic: `uncovered` is the user's choice."""
    if uncovered == "pretrained":
        assert pretrained is not None
        return pretrained[name].detach().to(tensors[0], copy=True)
    return weighted_mean(tensors, weights)


def check_statistics(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    kinds: Sequence[str],
    uncovered: str,
    pretrained: Weights | None,
) -> dict[str, str]:
    """parameter -> the statistic that its C_i are made of; what is not in it is uncovered.

    Raises ValueError for a wrong count of statistics, what `covering_statistics` raises, a wrong
    choice of `uncovered`, or, with "error", an uncovered parameter.
    """
    if len(statistics) != len(thetas):
        raise ValueError(f"{len(statistics)} statistics for {len(thetas)} models: give one a model")
    if uncovered not in UNCOVERED:
        raise ValueError(f"uncovered={uncovered!r}; choose from {', '.join(UNCOVERED)}")
    if uncovered == "pretrained" and pretrained is None:
        raise ValueError("uncovered='pretrained' needs pretrained=<state dict>")
    if uncovered == "pretrained":
        check_models(thetas[:1], pretrained)
    covering = covering_statistics(list(thetas[0]), kinds, statistics)
    if uncovered == "error":
        for name in thetas[0]:
            if name not in covering and thetas[0][name].is_floating_point():
                raise ValueError(
                    f"'{name}' has no statistic {' or '.join(kinds)}; choose"
                    " uncovered='average' or 'pretrained', or a statistic that covers it"
                )
    return covering
