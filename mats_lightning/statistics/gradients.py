"""Per-example gradients of one parameter, in the factored form that its layer gives them.

Each form knows how to add itself to a sum: the squares for the diagonal Fisher, the outer
products for the block Fisher. Shapes: N examples, R positions an example (tokens; 1 without
sharing), d_in and d_out features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class ExampleGradients(ABC):
    """What every form offers. grad_n is the gradient of example n's loss."""

    g: Tensor  # (N, ...)

    @property
    def examples(self) -> int:
        return self.g.shape[0]

    @property
    def device(self) -> torch.device:
        return self.g.device

    @abstractmethod
    def add_squares(self, total: Tensor) -> None:
        """total += sum_n grad_n * grad_n, elementwise, in place."""

    @abstractmethod
    def add_example(self, n: int, gradient: Tensor) -> None:
        """gradient += grad_n, in place."""


@dataclass(frozen=True, eq=False)
class MatrixGradients(ExampleGradients):
    """grad_n = sum_r g_nr a_nr^T of a weight (d_out, d_in), never formed for all n at once."""

    a: Tensor  # (N, R, d_in)
    g: Tensor  # (N, R, d_out)

    def add_squares(self, total: Tensor) -> None:
        if self.a.shape[1] == 1:  # (g a^T)^2 = (g^2) (a^2)^T: one product for all examples
            total.addmm_(self.g[:, 0].square().T, self.a[:, 0].square())
            return
        # One buffer and N products: the floating point operations of the weight gradient itself,
        # while a batched product would hold N matrices. The longer side first: with few positions
        # it is up to twice as fast as the transpose (MKL).
        wide = self.a.shape[-1] > self.g.shape[-1]
        left, right = (self.a, self.g) if wide else (self.g, self.a)
        squares = total.new_zeros(total.T.shape) if wide else total
        buffer = torch.empty_like(squares)
        for x, y in zip(left, right, strict=True):
            torch.mm(x.T, y, out=buffer)
            squares.addcmul_(buffer, buffer)
        if wide:
            total.add_(squares.T)

    def add_example(self, n: int, gradient: Tensor) -> None:
        gradient.addmm_(self.g[n].T, self.a[n])


@dataclass(frozen=True, eq=False)
class PatchGradients(ExampleGradients):
    """grad_n = sum_r g_nr a_nr^T for each group of a convolution, unfolded an example at a time."""

    a: Tensor  # (N, channels, *spatial)
    g: Tensor  # (N, channels of the output, R)
    groups: int
    patches: Callable[[Tensor], Tensor]  # a -> (N, R, groups, d_in)

    def add_squares(self, total: Tensor) -> None:
        for n in range(self.examples):
            gradient = self._gradient(n).view_as(total)
            total.addcmul_(gradient, gradient)

    def add_example(self, n: int, gradient: Tensor) -> None:
        gradient.add_(self._gradient(n).view_as(gradient))

    def _gradient(self, n: int) -> Tensor:
        """(groups, d_out / groups, d_in)."""
        a = self.patches(self.a[n : n + 1])[0].transpose(0, 1)  # (groups, R, d_in)
        return torch.bmm(self.g[n].unflatten(0, (self.groups, -1)), a)


@dataclass(frozen=True, eq=False)
class VectorGradients(ExampleGradients):
    """grad_n of a vector: the sum over positions is already taken."""

    g: Tensor  # (N, d)

    def add_squares(self, total: Tensor) -> None:
        total.add_(self.g.square().sum(0).view_as(total))

    def add_example(self, n: int, gradient: Tensor) -> None:
        gradient.add_(self.g[n].view_as(gradient))

    def add_outer(self, total: Tensor) -> None:
        """total += sum_n grad_n grad_n^T, (d, d)."""
        total.addmm_(self.g.T, self.g)


@dataclass(frozen=True, eq=False)
class LookupGradients(ExampleGradients):
    """grad_n of an embedding (rows, d): row t receives the g of the positions whose id is t."""

    ids: Tensor  # (N, R)
    g: Tensor  # (N, R, d)
    padding_idx: int | None

    def add_squares(self, total: Tensor) -> None:
        n, rows = self.examples, total.shape[0]
        example = torch.arange(n, device=self.ids.device).unsqueeze(1)
        # One slot for each (example, id) pair that occurs: sum in it first, then square.
        pairs, slot = torch.unique(example * rows + self.ids, return_inverse=True)
        sums = self.g.new_zeros(len(pairs), self.g.shape[-1])
        sums.index_add_(0, slot.reshape(-1), self.g.reshape(-1, self.g.shape[-1]))
        ids = pairs % rows
        if self.padding_idx is not None:
            sums[ids == self.padding_idx] = 0
        total.index_add_(0, ids, sums.square_())

    def add_example(self, n: int, gradient: Tensor) -> None:
        g = self.g[n]
        if self.padding_idx is not None:
            g = g * (self.ids[n] != self.padding_idx).unsqueeze(-1)
        gradient.index_add_(0, self.ids[n], g)


def add_squares_of_sum(parts: Sequence[ExampleGradients], total: Tensor) -> None:
    """total += sum_n (sum_parts grad_n)^2: a parameter that several modules share.

    The sum over the uses stands inside the square, so each example's gradient is made dense.
    """
    if len(parts) == 1:
        parts[0].add_squares(total)
        return
    gradient = torch.empty_like(total)
    for n in range(parts[0].examples):
        gradient.zero_()
        for part in parts:
            part.add_example(n, gradient)
        total.addcmul_(gradient, gradient)
