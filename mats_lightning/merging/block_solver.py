"""One block solved by conjugate gradients, with its preconditioner."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from mats_lightning.merging.models import check_range
from mats_lightning.merging.preconditioner import PRECONDITIONERS, block_preconditioner
from mats_lightning.merging.results import Block
from mats_lightning.operators import Operator, sum_of_products
from mats_lightning.solvers import Solution, conjugate_gradient


@dataclass(frozen=True)
class BlockSolver:
    """How each block is solved; see `mats` for the arguments, which raise ValueError."""

    preconditioner: str | None
    preconditioner_damping: float
    tolerance: float

    def __post_init__(self) -> None:
        if self.preconditioner not in (*PRECONDITIONERS, None):
            known = ", ".join(map(repr, PRECONDITIONERS))
            raise ValueError(f"preconditioner={self.preconditioner!r}; choose {known} or None")
        check_range("preconditioner_damping", self.preconditioner_damping)
        check_range("tolerance", self.tolerance)

    def solve(
        self,
        operators: Sequence[Operator],
        b: Tensor,
        counts: Sequence[int],
        reach: float = math.inf,
        scale: float = 0.0,
    ) -> Solution:
        """delta with sum C_i delta = b, and its states after these counts of iterations.

        It starts at 0 and ends at this distance from it. What is solved for is a difference, so
        that neither rounding nor the stop depends on how large the weights themselves are. `scale`
        and errors: see `conjugate_gradient` and `block_preconditioner`.
        """
        inverse = None
        if (kind := self.preconditioner) is not None:
            inverse = block_preconditioner(operators, self.preconditioner_damping, kind)
        return conjugate_gradient(
            lambda x: sum_of_products(operators, repeat(x, len(operators))),
            b,
            torch.zeros_like(b),
            iterations=max(counts),
            tolerance=self.tolerance,
            preconditioner=inverse,
            scale=scale,
            radius=reach,
            keep=counts,
        )

    def block(self, statistic: str, solution: Solution, count: int) -> Block:
        """How the solve stood after this count of iterations."""
        done = min(count, solution.iterations)
        residuals = solution.residuals[: done + 1]
        at_edge = solution.at_edge and done == solution.iterations
        return Block(statistic, done, residuals, residuals[-1] <= self.tolerance, at_edge)
