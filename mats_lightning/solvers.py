"""Solvers of C x = b for symmetric positive (semi-)definite C, given as a function.

They know nothing of layers or tasks, and return the evidence with the value.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Solution:
    """The state after the last iteration, and how it came about."""

    value: Tensor
    iterations: int
    residuals: list[float]  # |b - C x| / max(|b|, scale) after 0, 1, ... iterations
    converged: bool  # the last one is within the tolerance
    at_edge: bool  # the iteration ended where |x - x0| is the radius
    kept: dict[int, Tensor]  # the states after the iteration counts that were asked for


def conjugate_gradient(
    matvec: Function,
    b: Tensor,
    x0: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
    preconditioner: Function | None = None,
    scale: float = 0.0,
    radius: float = math.inf,
    keep: Collection[int] = (),
) -> Solution:
    """The conjugate gradient method of Hestenes and Stiefel, started at `x0`.

    Stops after `iterations`, or when |b - C x| <= tolerance max(|b|, scale), or when no direction
    is left along which C is positive by more than rounding: where C is singular, a step along such
    a direction would be of any length. A step that would lead further than `radius` from `x0` is
    shortened to end there, and is the last one (Steihaug, SIAM J. Numer. Anal. 20, 1983).
    Without a preconditioner |x - x0| grows with each step. With one, only the distance in the norm
    of its inverse surely grows: a path may leave the ball and come back, so stopping where it
    leaves is a heuristic.
    `preconditioner` applies an approximate inverse of C, symmetric positive definite. What must be
    within the tolerance at the end is b - C x itself: the recursion's own residual drifts away from
    it, and is replaced by it. `keep` names iteration counts whose states are returned too, from the
    same run; a run that stops earlier gives its last state for them.

    Raises ValueError for negative iterations or a negative radius, NaN or inf in what it is given,
    or a preconditioner that is so near to singular that rounding leaves no first step.
    """
    if iterations < 0 or any(count < 0 for count in keep):
        raise ValueError(f"iterations={iterations}, keep={sorted(keep)}: they cannot be negative")
    if radius < 0:
        raise ValueError(f"radius={radius}: it cannot be negative")
    x = x0.clone()
    r = b - matvec(x)
    unit = max(_norm(b), scale) or 1.0
    rr = _dot(r, r)
    residuals = [math.sqrt(rr) / unit]
    kept = {0: x.clone()} if 0 in keep else {}
    z = preconditioner(r) if preconditioner else r
    p = z.clone()
    rz = _dot(r, z) if preconditioner else rr
    eps = torch.finfo(b.dtype).eps
    largest = _norm(b - r) / (_norm(x) or 1.0)  # a lower bound of |C|
    done, at_edge = 0, False
    while done < iterations and residuals[-1] > tolerance and rz > 0:
        cp = matvec(p)
        curvature, pp = _dot(p, cp), _dot(p, p)
        # |C p| / |p| is a sharper bound, and needed once: a start at 0 gives none
        sharp = curvature / (pp or 1.0) if done else _norm(cp) / (math.sqrt(pp) or 1.0)
        largest = max(largest, sharp)
        if curvature <= eps * largest * pp:
            break  # rounding is all that is left along p
        alpha = rz / curvature
        if radius < math.inf:
            moved = x - x0
            to_edge = _to_edge(_dot(moved, moved), _dot(moved, p), pp, radius)
            at_edge = to_edge < alpha
            alpha = min(alpha, to_edge)
        x.add_(p, alpha=alpha)
        r.sub_(cp, alpha=alpha)
        rr = _dot(r, r)
        done += 1
        residuals.append(math.sqrt(rr) / unit)
        seems_done = residuals[-1] <= tolerance
        if seems_done:
            r = b - matvec(x)
            rr = _dot(r, r)
            residuals[-1] = math.sqrt(rr) / unit
        if done in keep:
            kept[done] = x.clone()
        if at_edge:
            break
        z = preconditioner(r) if preconditioner else r
        rz, before = _dot(r, z) if preconditioner else rr, rz
        torch.add(z, p, alpha=0.0 if seems_done else rz / before, out=p)  # 0: from here on anew
    if not all(map(math.isfinite, [*residuals, rz])):
        raise ValueError(
            "NaN or inf in conjugate gradients: the operator, the preconditioner, the right-hand"
            " side or the start has it, or the operator is too large for its dtype"
        )
    if preconditioner and iterations > done == 0 and residuals[0] > max(tolerance, math.sqrt(eps)):
        raise ValueError(
            f"the preconditioner amplifies rounding in {b.dtype} beyond the first direction: raise"
            " its damping, or go without it"
        )
    kept |= {count: x for count in keep if count > done}
    return Solution(x, done, residuals, residuals[-1] <= tolerance, at_edge, kept)


def _dot(x: Tensor, y: Tensor) -> float:
    """One pass, where a product and its sum are two: for small layers each pass counts."""
    return float(torch.dot(x.reshape(-1), y.reshape(-1)))


def _to_edge(moved2: float, moved_p: float, p2: float, radius: float) -> float:
    """The t >= 0 with |moved + t p| = radius: the larger root of a quadratic equation."""
    left = radius * radius - moved2  # inf for the largest, where ** raises
    root = math.sqrt(max(moved_p**2 + p2 * left, 0.0))
    return max((root - moved_p) / p2, 0.0)


def _norm(x: Tensor) -> float:
    return math.sqrt(_dot(x, x))


def symmetric_inverse(matrix: Tensor, damping: float) -> Function:
    """R (..., d) -> R (M + damping I)^-1, by a Cholesky factor in float64; M (d, d) symmetric.

    Or R (groups, n, d) for M (groups, d, d): a matrix a group.

    Raises ValueError when M + damping I is not positive definite.
    """
    factor = _cholesky(matrix, damping)

    def apply(r: Tensor) -> Tensor:
        rows = r.double() if matrix.ndim > 2 else r.double().reshape(-1, len(matrix))
        solved: Tensor = torch.cholesky_solve(rows.mT, factor).mT
        return solved.reshape(r.shape).to(r.dtype)

    return apply


def kronecker_inverse(a: Tensor, g: Tensor, damping_a: float, damping_g: float) -> Function:
    """R (d_out, d_in) -> (G + damping_g I)^-1 R (A + damping_a I)^-1.

    A (d_in, d_in) and G (d_out, d_out) symmetric, or one of each a group. The inverses are taken
    in float64 and applied in the dtype of A: two products each time.

    Raises ValueError when a damped factor is not positive definite.
    """
    inverse_a = torch.cholesky_inverse(_cholesky(a, damping_a)).to(a.dtype)
    inverse_g = torch.cholesky_inverse(_cholesky(g, damping_g)).to(a.dtype)
    return lambda r: inverse_g @ (r @ inverse_a)


def two_kronecker_inverse(
    a: tuple[Tensor, Tensor], g: tuple[Tensor, Tensor], damping: float
) -> Function:
    """R (d_out, d_in) -> the X with G_1 X A_1 + G_2 X A_2 = R, the closed form for two tasks.

    All four are symmetric and positive semi-definite, (d_in, d_in) and (d_out, d_out), or one of
    each a group, and `damping` times its mean eigenvalue is added to each. With
    A_1 V = (A_1 + A_2) V diag(m), V^T (A_1 + A_2) V = I, and likewise U and n for G,
    X = U [(U^T R V) / (n m^T + (1 - n) (1 - m)^T)] V^T: two generalised eigenvalue problems of
    the sums, in which the tasks stand alike (Golub and Van Loan, Matrix Computations, 8.7).

    Raises ValueError when the damped sum of both products, or of two factors, is not positive
    definite.
    """
    u, n, scale_g = _joint_eigenvectors(*g, damping)
    v, m, scale_a = _joint_eigenvectors(*a, damping)
    first, second = (x * y for x, y in zip(scale_g, scale_a, strict=True))
    n, m = n.unsqueeze(-1), m.unsqueeze(-2)
    eigenvalues = first * n * m + second * (1 - n) * (1 - m)
    if not bool((eigenvalues > 0).all()):
        raise ValueError(
            f"the sum of two Kronecker products with damping {damping:.1e} is not positive"
            " definite: raise the damping, or scale the off-diagonal below 1"
        )

    def apply(r: Tensor) -> Tensor:
        x = u @ ((u.mT @ r.double() @ v) / eigenvalues) @ v.mT
        return x.to(r.dtype)

    return apply


def _joint_eigenvectors(
    first: Tensor, second: Tensor, damping: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """V, m and c: V^T M_1 V = c_1 diag(m), V^T M_2 V = c_2 (I - diag(m)), of the damped M."""
    matrices = [matrix.to(torch.float64, copy=True) for matrix in (first, second)]
    means = [matrix.diagonal(0, -2, -1).mean(-1)[..., None, None] for matrix in matrices]
    for matrix, mean in zip(matrices, means, strict=True):  # one may be far larger, or zero
        matrix.div_(torch.where(mean > 0, mean, 1.0))
    factor = _cholesky(matrices[0] + matrices[1], 2 * damping)
    matrices[0].diagonal(0, -2, -1).add_(damping)
    half = torch.linalg.solve_triangular(factor, matrices[0], upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    m, q = torch.linalg.eigh((whitened + whitened.mT) / 2)
    vectors = torch.linalg.solve_triangular(factor.mT, q, upper=True)
    return vectors, m.clamp(0, 1), (means[0], means[1])


def _cholesky(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix.to(torch.float64, copy=True)
    damped.diagonal(0, -2, -1).add_(damping)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        damped_by = f" with damping {damping:.1e}" if damping else ""
        raise ValueError(
            f"a {tuple(matrix.shape)} matrix{damped_by} is not positive definite: raise the"
            " damping, or scale the off-diagonal below 1"
        )
    return factor
