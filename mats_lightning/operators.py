"""The positive semi-definite C_i of a task: frozen dataclasses with a `matvec`.

Each acts on a parameter in its own shape. `scaled` folds a factor into the stored tensors, so
that a product costs nothing more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from torch import Tensor


class Operator(Protocol):
    """C: matvec(x) = C x, in the shape of x; the mean of its eigenvalues, for damping."""

    def matvec(self, x: Tensor) -> Tensor: ...

    def mean_eigenvalue(self) -> float: ...

    def scaled(self, factor: float) -> "Operator": ...


@dataclass(frozen=True, eq=False)
class Identity:
    """C x = scale x: the simple average."""

    scale: float = 1.0

    def matvec(self, x: Tensor) -> Tensor:
        return self.scale * x

    def mean_eigenvalue(self) -> float:
        return self.scale

    def scaled(self, factor: float) -> Self:
        return replace(self, scale=self.scale * factor)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """C x = f o x: the diagonal Fisher; the Gram matrix of an embedding."""

    f: Tensor  # the parameter's shape, or (rows, 1): one number a row of an embedding

    def matvec(self, x: Tensor) -> Tensor:
        return self.f * x

    def mean_eigenvalue(self) -> float:
        return float(self.f.mean())

    def scaled(self, factor: float) -> Self:
        return replace(self, f=self.f * factor)


@dataclass(frozen=True, eq=False)
class Dense:
    """C x: the block Fisher of a vector."""

    c: Tensor  # (d, d), d the number of elements of x

    def matvec(self, x: Tensor) -> Tensor:
        return (self.c @ x.reshape(-1)).view_as(x)

    def mean_eigenvalue(self) -> float:
        return float(self.c.diagonal().mean())

    def scaled(self, factor: float) -> Self:
        return replace(self, c=self.c * factor)


@dataclass(frozen=True, eq=False)
class Gram:
    """C X = X A: RegMean's objective for a weight X (..., d_out, d_in)."""

    a: Tensor  # (..., d_in, d_in)

    def matvec(self, x: Tensor) -> Tensor:
        return x @ self.a

    def mean_eigenvalue(self) -> float:
        return float(self.a.diagonal(0, -2, -1).mean())

    def scaled(self, factor: float) -> Self:
        return replace(self, a=self.a * factor)


@dataclass(frozen=True, eq=False)
class KroneckerFactored:
    """C X = G X A: K-FAC of a weight X (..., d_out, d_in)."""

    a: Tensor  # (..., d_in, d_in)
    g: Tensor  # (..., d_out, d_out)

    def matvec(self, x: Tensor) -> Tensor:
        return self.g @ (x @ self.a)

    def mean_eigenvalue(self) -> float:
        a, g = (m.diagonal(0, -2, -1).mean(-1) for m in (self.a, self.g))  # of each group
        return float((a * g).mean())

    def scaled(self, factor: float) -> Self:
        return replace(self, g=self.g * factor)


@dataclass(frozen=True, eq=False)
class Damped:
    """C x + shift x."""

    operator: Operator
    shift: float

    def matvec(self, x: Tensor) -> Tensor:
        return self.operator.matvec(x).add_(x, alpha=self.shift)

    def mean_eigenvalue(self) -> float:
        return self.operator.mean_eigenvalue() + self.shift

    def scaled(self, factor: float) -> Self:
        return replace(self, operator=self.operator.scaled(factor), shift=self.shift * factor)


def undamped(c: Operator) -> Operator:
    return c.operator if isinstance(c, Damped) else c


def sum_of_products(operators: Sequence[Operator], xs: Iterable[Tensor]) -> Tensor:
    """sum_i C_i x_i, in the shape of the x_i."""
    total: Tensor | None = None
    for c, x in zip(operators, xs, strict=True):
        if total is None:
            total = c.matvec(x)
        elif isinstance(c, KroneckerFactored) and x.ndim == 2:
            total.addmm_(c.g, x @ c.a)  # no pass over a product of its own
        else:
            total.add_(c.matvec(x))
    assert total is not None
    return total


def scale_off_diagonal(matrix: Tensor, factor: float) -> Tensor:
    """factor M + (1 - factor) diag(M): the paper's lambda; 1 leaves M as it is."""
    if factor == 1.0:
        return matrix
    scaled = matrix * factor
    scaled.diagonal(0, -2, -1).copy_(matrix.diagonal(0, -2, -1))
    return scaled
