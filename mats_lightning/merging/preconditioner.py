"""The preconditioner of a block: the inverse of the sum of its operators, or nearly so."""

import math
from collections.abc import Sequence
from typing import cast

import torch

from mats_lightning.operators import (
    Damped,
    Dense,
    Diagonal,
    Gram,
    Identity,
    KroneckerFactored,
    Operator,
    undamped,
)
from mats_lightning.solvers import (
    Function,
    kronecker_inverse,
    symmetric_inverse,
    two_kronecker_inverse,
)

PRECONDITIONERS = ("kronecker", "exact")


def block_preconditioner(
    operators: Sequence[Operator], damping: float, kind: str = "kronecker"
) -> Function | None:
    """An approximate inverse of sum C_i + (damping times its mean eigenvalue) I.

    Exact for Diagonal, Dense and Gram. For Kronecker factors, with c_i the mean eigenvalue of
    G_i x A_i and both factors divided by their own, sum c_i G_i x A_i is taken as
    (sum c_i G_i) x (sum c_i A_i) / sum c_i: exact when the tasks' factors are equal. There each
    factor is damped, by `damping` times its own mean eigenvalue. With `kind` = "exact" it is the
    closed form for two tasks, each of the four factors damped so. None where no preconditioner is
    needed: the operators are all zero, or identities.

    Raises ValueError for Kronecker factors that have no closed form, with "exact".
    """
    shift = sum(c.shift for c in operators if isinstance(c, Damped))
    parts = [undamped(c) for c in operators]
    mean = sum(c.mean_eigenvalue() for c in parts)
    if mean <= 0 or isinstance(parts[0], Identity):
        return None
    first = parts[0]
    if isinstance(first, KroneckerFactored):
        factors = cast(Sequence[KroneckerFactored], parts)
        if kind == "exact" and len(factors) > 1:
            if len(factors) > 2 or shift:
                why = "more than two tasks" if len(factors) > 2 else "damping > 0"
                raise ValueError(
                    f"K-FAC with {why} has no closed form: take preconditioner='kronecker' with"
                    " some iterations"
                )
            one, two = factors
            return two_kronecker_inverse((one.a, two.a), (one.g, two.g), damping)
        a, g = torch.zeros_like(first.a), torch.zeros_like(first.g)
        for c in factors:
            if (share := c.mean_eigenvalue()) > 0:
                a.add_(c.a, alpha=share / Gram(c.a).mean_eigenvalue())
                g.add_(c.g, alpha=share / Gram(c.g).mean_eigenvalue())
        # means of both: `mean`, and 1 once G is divided by it; the shift is parted evenly
        each = damping + math.sqrt(shift / mean)
        return kronecker_inverse(a, g.div_(mean), each * mean, each)
    shift += damping * mean
    if isinstance(first, Diagonal):
        total = torch.stack([cast(Diagonal, c).f for c in parts]).sum(0) + shift
        return lambda r: r / total
    if isinstance(first, Dense):
        c_sum = sum((cast(Dense, c).c for c in parts), torch.zeros_like(first.c))
        inverse = symmetric_inverse(c_sum, shift)
        return lambda r: inverse(r.reshape(1, -1)).view_as(r)
    assert isinstance(first, Gram)
    a_sum = sum((cast(Gram, c).a for c in parts), torch.zeros_like(first.a))
    return symmetric_inverse(a_sum, shift)
