"""From statistics to operators: each task's C_i for one parameter."""

import math
from collections.abc import Mapping, Sequence
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
from mats_lightning.statistics.record import COUNTS

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

    A linear weight as it is, (d_out, d_in), and transposed in Hugging Face's Conv1D. With groups
    of a convolution, or factors cut into blocks: (groups, blocks of G, blocks of A, d_out, d_in),
    each a matrix of its own.
    """

    shape: tuple[int, ...]  # the parameter's own
    transposed: bool = False
    groups: int = 1
    blocks_in: int = 1
    blocks_out: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(d_out, d_in) of the whole weight; of one group's inputs for a convolution."""
        first, rest = self.shape[0], math.prod(self.shape[1:])
        return (rest, first) if self.transposed else (first, rest)

    @property
    def whole(self) -> bool:
        return self.groups == self.blocks_in == self.blocks_out == 1

    def of(self, weight: Tensor) -> Tensor:
        matrix = weight.T if self.transposed else weight.flatten(1) if weight.ndim > 2 else weight
        if self.whole:
            return matrix
        d_in = self.matrix[1] // self.blocks_in
        tiles = matrix.reshape(self.groups, self.blocks_out, -1, self.blocks_in, d_in)
        return tiles.transpose(2, 3)

    def back(self, matrices: Tensor) -> Tensor:
        if not self.whole:
            matrices = matrices.transpose(2, 3).reshape(self.matrix)
        return matrices.T.contiguous() if self.transposed else matrices.reshape(self.shape)

    @property
    def shape_of_a(self) -> tuple[int, ...]:
        """The shape of A in `Statistics`."""
        return _stacked(self.groups * self.blocks_in, self.matrix[1] // self.blocks_in)

    @property
    def shape_of_g(self) -> tuple[int, ...]:
        count = self.groups * self.blocks_out
        return _stacked(count, self.matrix[0] // count)

    def a(self, factor: Tensor) -> Tensor:
        """A in the form in which it multiplies: (groups, 1, blocks, d_in, d_in) of several."""
        if self.whole:
            return factor
        return factor.reshape(self.groups, 1, self.blocks_in, *factor.shape[-2:])

    def g(self, factor: Tensor) -> Tensor:
        if self.whole:
            return factor
        return factor.reshape(self.groups, self.blocks_out, 1, *factor.shape[-2:])


def _stacked(count: int, size: int) -> tuple[int, ...]:
    return (size, size) if count == 1 else (count, size, size)


def matrix_form(name: str, kind: str, statistics: Statistics, shape: torch.Size) -> MatrixForm:
    """The form of a parameter that its operator of this kind acts on.

    Raises ValueError for statistics that do not fit the parameter.
    """
    module = _key(name, kind, statistics)
    if kind not in ("gram", "kfac") or (kind == "gram" and _of_embedding(module, statistics)):
        return MatrixForm(tuple(shape))
    blocks_in, blocks_out = statistics.info.get("blocks", {}).get(module, (1, 1))
    form = MatrixForm(
        tuple(shape),
        module in statistics.info.get("transposed", ()),
        statistics.info.get("groups", {}).get(module, 1),
        blocks_in,
        blocks_out if kind == "kfac" else 1,
    )
    if (
        len(shape) < 2
        or form.matrix[0] % (form.groups * form.blocks_out)
        or (form.matrix[1] % blocks_in)
    ):
        raise ValueError(
            f"'{name}' has the statistic {kind}, which a matrix has, and the shape {tuple(shape)}:"
            " these statistics are of another architecture"
        )
    return form


def _of_embedding(module: str, statistics: Statistics) -> bool:
    return f"{COUNTS}/{module}" in statistics.tensors


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
    if kind == "gram" and _of_embedding(key, statistics):
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


def _folded_biases(
    kind_of: Mapping[str, str], thetas: Sequence[Weights], statistics: Sequence[Statistics]
) -> dict[str, str]:
    """weight -> the bias beside it, where both can be solved for together.

    Raises ValueError for K-FAC with reduce, whose A is not that of single positions.
    """
    tied = {n for s in statistics for pair in s.info.get("tied", {}).items() for n in pair}
    folded = {}
    for name, kind in kind_of.items():
        bias = f"{name.removesuffix('.weight')}.bias"
        if kind not in ("gram", "kfac") or bias not in thetas[0] or {name, bias} & tied:
            continue
        if not matrix_form(name, kind, statistics[0], thetas[0][name].shape).whole:
            continue
        if kind == "kfac" and any(s.info.get("weight_sharing") == "reduce" for s in statistics):
            raise ValueError(
                "fold_bias=True needs K-FAC with weight_sharing='expand': with 'reduce' there is"
                " no mean input that fits A; leave the biases to their own blocks"
            )
        folded[name] = bias
    return folded


def beside(weight: Tensor, bias: Tensor) -> Tensor:
    """[W b], (d_out, d_in + 1)."""
    return torch.cat([weight, bias.detach().to(weight).unsqueeze(1)], dim=1)


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
    """
    operators = []
    for task, weight in zip(statistics, weights, strict=True):
        c = operator(
            name, kind, task, like, off_diagonal=off_diagonal, floor=floor, with_bias=with_bias
        )
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
    fold_bias: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """parameter -> the statistic that its C_i are made of; weight -> bias solved for with it.

    A parameter that is in neither is uncovered. Raises ValueError for a wrong count of
    statistics, what `covering_statistics` raises, a wrong choice of `uncovered`, or, with "error",
    an uncovered parameter.
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
    folded = _folded_biases(covering, thetas, statistics) if fold_bias else {}
    if uncovered == "error":
        known = covering.keys() | set(folded.values())
        for name in thetas[0]:
            if name not in known and thetas[0][name].is_floating_point():
                raise ValueError(
                    f"'{name}' has no statistic {' or '.join(kinds)}; choose"
                    " uncovered='average' or 'pretrained', or a statistic that covers it"
                )
    return covering, folded
