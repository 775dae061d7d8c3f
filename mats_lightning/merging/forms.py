"""How a weight is seen as matrices, on which A and G act."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mats_lightning.statistics import Statistics
from mats_lightning.statistics.record import COUNTS


def statistic_name(name: str, kind: str, statistics: Statistics) -> str:
    """The name under which the statistic of a parameter is stored."""
    name = statistics.info.get("tied", {}).get(name, name)
    return name.removesuffix(".weight") if kind in ("gram", "kfac") else name


@dataclass(frozen=True)
class MatrixForm:
    """How a parameter is seen by its operators, where A and G act on it.

    A linear weight as it is, (d_out, d_in), and transposed in Hugging Face's Conv1D. With groups
    of a convolution, or factors cut into blocks: (groups, blocks of G, blocks of A, d_out, d_in),
    each a matrix of its own. Operators that act number by number see any parameter as it is.
    """

    shape: tuple[int, ...]  # the parameter's own
    transposed: bool = False
    groups: int = 1
    blocks_in: int = 1
    blocks_out: int = 1
    as_it_is: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """(d_out, d_in) of the whole weight; of one group's inputs for a convolution."""
        first, rest = self.shape[0], math.prod(self.shape[1:])
        return (rest, first) if self.transposed else (first, rest)

    @property
    def whole(self) -> bool:
        return self.groups == self.blocks_in == self.blocks_out == 1

    def of(self, weight: Tensor) -> Tensor:
        if self.as_it_is:
            return weight
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
    module = statistic_name(name, kind, statistics)
    if kind not in ("gram", "kfac") or (kind == "gram" and of_embedding(module, statistics)):
        return MatrixForm(tuple(shape), as_it_is=True)
    blocks_in, blocks_out = statistics.info.get("blocks", {}).get(module, (1, 1))
    form = MatrixForm(
        tuple(shape),
        module in statistics.info.get("transposed", ()),
        statistics.info.get("groups", {}).get(module, 1),
        blocks_in,
        blocks_out if kind == "kfac" else 1,
    )
    cut_evenly = len(shape) > 1 and not (
        form.matrix[0] % (form.groups * form.blocks_out) or form.matrix[1] % blocks_in
    )
    if not cut_evenly:
        raise ValueError(
            f"'{name}' has the statistic {kind}, which a matrix has, and the shape {tuple(shape)}:"
            " these statistics are of another architecture"
        )
    return form


def of_embedding(module: str, statistics: Statistics) -> bool:
    return f"{COUNTS}/{module}" in statistics.tensors


def beside(weight: Tensor, bias: Tensor) -> Tensor:
    """[W b], (d_out, d_in + 1)."""
    return torch.cat([weight, bias.detach().to(weight).unsqueeze(1)], dim=1)
