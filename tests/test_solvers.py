"""Solvers against dense linear algebra, and conjugate gradients against SciPy's, in float64."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from mats_lightning.solvers import (
    Solution,
    conjugate_gradient,
    kronecker_inverse,
    symmetric_inverse,
    two_kronecker_inverse,
)

COUNTS = (1, 2, 5, 17)
N = 30


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return (q * eigenvalues) @ q.T


def positive(d: int = N, condition: float = 1e3, seed: int = 0) -> Tensor:
    return symmetric(torch.logspace(0, np.log10(condition), d, dtype=torch.float64), seed)


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> M x in the shape of x."""
    return lambda x: (matrix @ x.flatten()).view_as(x)


def scipy_cg(
    matrix: Tensor, b: Tensor, x0: Tensor, iterations: int, inverse: Tensor | None = None
) -> tuple[Tensor, list[float]]:
    """SciPy's state after the iterations, and |b - A x| / |b| after each of them."""
    residuals = []

    def note(x: np.ndarray) -> None:
        residuals.append(float(np.linalg.norm(b.numpy() - matrix.numpy() @ x)))

    m = None if inverse is None else inverse.numpy()
    x, _ = scipy.sparse.linalg.cg(
        matrix.numpy(), b.numpy(), x0.numpy(), rtol=0.0, maxiter=iterations, M=m, callback=note
    )
    return torch.from_numpy(x), [r / float(b.norm()) for r in residuals]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# -- conjugate_gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N,), (5, 6), (3, 2, 5)])
def test_conjugate_gradient_solves(shape: tuple[int, ...]) -> None:
    matrix, b = positive(), random(*shape, seed=1)
    solution = conjugate_gradient(
        times(matrix), b, torch.zeros_like(b), iterations=500, tolerance=1e-12
    )
    expected = torch.linalg.solve(matrix, b.flatten()).view(shape)
    assert relative_error(solution.value, expected) < 1e-9
    assert solution.converged
    assert solution.iterations < 500
    assert solution.residuals[-1] <= 1e-12 < solution.residuals[-2]
    assert len(solution.residuals) == solution.iterations + 1


@pytest.mark.parametrize("iterations", COUNTS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradient_is_scipys(iterations: int, preconditioned: bool) -> None:
    # Beyond a condition of 100, rounding parts any two programs: at 1e3, 17 iterations of SciPy's
    # are 7e-4 away from those in extended precision, and ours 4e-5.
    matrix, b, x0 = positive(condition=30), random(N, seed=1), random(N, seed=2)
    inverse = torch.linalg.inv(matrix + 3 * positive(seed=5)) if preconditioned else None
    expected, residuals = scipy_cg(matrix, b, x0, iterations, inverse)
    found = conjugate_gradient(
        times(matrix),
        b,
        x0,
        iterations=iterations,
        preconditioner=None if inverse is None else times(inverse),
    )
    assert relative_error(found.value, expected) < 1e-6
    assert found.iterations == iterations
    assert found.residuals[1:] == pytest.approx(residuals, rel=1e-6)
    assert found.residuals[0] == pytest.approx(float((b - matrix @ x0).norm() / b.norm()))
    assert not found.converged


def test_a_preconditioner_changes_the_way() -> None:
    """So that the comparison above does not hold for a preconditioner that is ignored."""
    matrix, b, x0 = positive(), random(N, seed=1), random(N, seed=2)
    exact = times(torch.linalg.inv(matrix))
    first = conjugate_gradient(times(matrix), b, x0, iterations=1, preconditioner=exact)
    assert first.residuals[1] < 1e-10
    assert conjugate_gradient(times(matrix), b, x0, iterations=1).residuals[1] > 1e-3


def run(iterations: int, tolerance: float = 0.0, keep: tuple[int, ...] = ()) -> Solution:
    b, x0 = random(N, seed=1), random(N, seed=2)
    return conjugate_gradient(
        times(positive()), b, x0, iterations=iterations, tolerance=tolerance, keep=keep
    )


def test_keep_gives_the_states_of_separate_runs() -> None:
    counts = (0, *COUNTS)
    together = run(17, keep=counts)
    assert set(together.kept) == set(counts)
    for count in counts:
        assert torch.equal(together.kept[count], run(count).value)
    assert torch.equal(together.kept[0], random(N, seed=2))


def test_keep_of_a_run_that_stops_early_gives_its_last_state() -> None:
    together = run(1000, tolerance=1e-4, keep=(2, 900))
    assert 2 < together.iterations < 900
    assert torch.equal(together.kept[900], together.value)
    assert not torch.equal(together.kept[2], together.value)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.95])
def test_radius_ends_the_run_where_its_path_leaves_the_ball(
    share: float, preconditioned: bool
) -> None:
    matrix, b, x0 = positive(condition=30), random(N, seed=1), random(N, seed=2)
    inverse = torch.linalg.inv(matrix + 3 * positive(seed=5)) if preconditioned else None
    states = [x0, *(scipy_cg(matrix, b, x0, n, inverse)[0] for n in range(1, 12))]
    radius = share * float((states[-1] - x0).norm())
    last = next(n for n, state in enumerate(states) if float((state - x0).norm()) > radius)
    before, after = states[last - 1], states[last]
    low, high = 0.0, 1.0  # the crossing, by bisection
    for _ in range(60):
        middle = (low + high) / 2
        inside = float((before + middle * (after - before) - x0).norm()) <= radius
        low, high = (middle, high) if inside else (low, middle)
    expected = before + low * (after - before)
    found = conjugate_gradient(
        times(matrix),
        b,
        x0,
        iterations=11,
        preconditioner=None if inverse is None else times(inverse),
        radius=radius,
        keep=(last - 1, 11),
    )
    assert found.at_edge
    assert found.iterations == last
    assert relative_error(found.value, expected) < 1e-6
    assert float((found.value - x0).norm()) == pytest.approx(radius, rel=1e-12)
    assert relative_error(found.kept[last - 1], before) < 1e-6
    assert torch.equal(found.kept[11], found.value)
    assert found.residuals[-1] == pytest.approx(float((b - matrix @ found.value).norm() / b.norm()))


@pytest.mark.parametrize("radius", [1e6, 1e200])  # whose square is no float
def test_a_radius_beyond_the_path_changes_nothing(radius: float) -> None:
    b, x0 = random(N, seed=1), random(N, seed=2)
    wide = conjugate_gradient(times(positive()), b, x0, iterations=9, radius=radius)
    assert not wide.at_edge
    assert torch.equal(wide.value, run(9).value)


def test_start_and_right_hand_side_are_left_alone() -> None:
    b, x0 = random(N, seed=1), random(N, seed=2)
    conjugate_gradient(times(positive()), b, x0, iterations=5, keep=(0, 5))
    assert torch.equal(b, random(N, seed=1))
    assert torch.equal(x0, random(N, seed=2))


def test_started_at_the_solution_it_stays() -> None:
    matrix, x = positive(), random(N)
    solution = conjugate_gradient(times(matrix), matrix @ x, x, iterations=50)
    assert solution.converged
    assert solution.iterations == 0
    assert torch.equal(solution.value, x)


def test_zero_right_hand_side_gives_zero() -> None:
    b = torch.zeros(N, dtype=torch.float64)
    solution = conjugate_gradient(times(positive()), b, random(N), iterations=500, tolerance=1e-12)
    assert solution.converged
    assert float(solution.value.norm()) < 1e-10
    # there is no |b| to divide by
    expected = float((positive() @ random(N)).norm())
    assert solution.residuals[0] == pytest.approx(expected)


def test_zero_operator_and_right_hand_side_leave_the_start() -> None:
    b, x0 = torch.zeros(N, dtype=torch.float64), random(N)
    solution = conjugate_gradient(lambda x: 0 * x, b, x0, iterations=5, keep=(3,))
    assert torch.equal(solution.value, x0)
    assert torch.equal(solution.kept[3], x0)
    assert solution.converged


@pytest.mark.parametrize("preconditioned", [False, True])
def test_singular_consistent_system_keeps_the_start_in_the_null_space(preconditioned: bool) -> None:
    eigenvalues = torch.linspace(0, 9, 10, dtype=torch.float64)
    matrix, x0 = symmetric(eigenvalues), random(10, seed=2)
    b = matrix @ random(10, seed=1)
    solution = conjugate_gradient(
        times(matrix),
        b,
        x0,
        iterations=40,
        tolerance=1e-12,
        preconditioner=(lambda r: 0.5 * r) if preconditioned else None,
    )
    expected = x0 + torch.linalg.pinv(matrix) @ (b - matrix @ x0)
    assert solution.converged
    assert relative_error(solution.value, expected) < 1e-9


def test_stops_where_the_operator_is_not_positive() -> None:
    matrix = symmetric(torch.tensor([-1.0] * 3, dtype=torch.float64))
    solution = conjugate_gradient(times(matrix), random(3), random(3, seed=1), iterations=5)
    assert not solution.converged
    assert solution.iterations == 0


def singular(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """C of rank 20, a start, and a right-hand side in the range of C."""
    c = symmetric(torch.cat([torch.zeros(40), torch.logspace(-2, 0, 20)]).double()).to(dtype)
    return c, random(60, seed=1).to(dtype), c @ random(60, seed=2).to(dtype)


@pytest.mark.parametrize("damping", [1e-4, 1e-6])
def test_rounding_in_the_null_space_is_not_followed(damping: float) -> None:
    """The preconditioner amplifies it, and a step along it has no bound."""
    c, x0, b = singular(torch.float32)
    inverse = symmetric_inverse(c, damping)
    solution = conjugate_gradient(times(c), b, x0, iterations=100, preconditioner=inverse)
    c, x0, b = (tensor.double() for tensor in (c, x0, b))
    expected = x0 + torch.linalg.pinv(c, rcond=1e-5) @ (b - c @ x0)
    assert solution.residuals[-1] < 1e-4
    assert relative_error(solution.value.double(), expected) < 0.1  # not 17 or 49


def test_a_preconditioner_that_leaves_rounding_alone_is_an_error() -> None:
    c, x0, b = singular(torch.float32)
    eigenvalues = torch.cat([torch.full((40,), 1e12), 1 / torch.logspace(-2, 0, 20)]).double()
    amplified = times(symmetric(eigenvalues).float())
    conjugate_gradient(times(c), b, x0, iterations=0, preconditioner=amplified)
    with pytest.raises(
        ValueError, match=r"amplifies rounding in torch\.float32 .*raise its damping"
    ):
        conjugate_gradient(times(c), b, x0, iterations=3, preconditioner=amplified)


@pytest.mark.parametrize(("iterations", "keep"), [(-1, ()), (3, (-2,))])
def test_negative_iterations(iterations: int, keep: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        run(iterations, keep=keep)


def test_a_radius_is_not_negative() -> None:
    b = random(N)
    with pytest.raises(ValueError, match=r"radius=-1\.0: it cannot be negative"):
        conjugate_gradient(times(positive()), b, b, iterations=3, radius=-1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["operator", "preconditioner"])
def test_nan_and_inf_are_errors(where: str, value: float) -> None:
    def broken(x: Tensor) -> Tensor:
        return x * value

    matvec = broken if where == "operator" else times(positive())
    preconditioner = broken if where == "preconditioner" else None
    with pytest.raises(ValueError, match="NaN or inf in conjugate gradients"):
        conjugate_gradient(
            matvec, random(N), random(N, seed=1), iterations=3, preconditioner=preconditioner
        )


def test_nan_in_the_start_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN or inf in conjugate gradients"):
        conjugate_gradient(times(positive()), random(N), random(N) * float("nan"), iterations=0)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-12])
def test_what_converges_is_the_true_residual(tolerance: float) -> None:
    """In float32 the recursion's own goes on to nothing, and the true one stays at rounding."""
    matrix, b = positive().float(), random(N, seed=1).float()
    solution = conjugate_gradient(times(matrix), b, 0 * b, iterations=300, tolerance=tolerance)
    true = b.double() - matrix.double() @ solution.value.double()
    true_residual = float(true.norm() / b.double().norm())
    assert solution.converged is (true_residual <= tolerance) is (tolerance == 1e-4)
    assert 1e-9 < true_residual < 1e-3


def test_a_scale_that_is_larger_than_b_ends_it_earlier() -> None:
    matrix, b = positive(), random(N, seed=1)
    solve = partial(conjugate_gradient, times(matrix), b, 0 * b, iterations=300, tolerance=1e-6)
    norm = float(b.norm())
    usual, smaller, larger = solve(), solve(scale=norm / 9), solve(scale=1000 * norm)
    assert usual.residuals == smaller.residuals
    assert larger.residuals == pytest.approx(
        [residual / 1000 for residual in usual.residuals[: len(larger.residuals)]]
    )
    assert larger.converged and 0 < larger.iterations < usual.iterations


# -- inverses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_symmetric_inverse(shape: tuple[int, ...], damping: float) -> None:
    matrix, r = positive(7), random(*shape, seed=3)
    before = matrix.clone()
    inverse = torch.linalg.inv(matrix + damping * torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(symmetric_inverse(matrix, damping)(r), r @ inverse)
    assert torch.equal(matrix, before)


def test_symmetric_inverse_works_in_float64_for_float32() -> None:
    """A condition number of 1e6: float32 would leave an error of a few per cent."""
    matrix = positive(20, condition=1e6).float()
    r = random(3, 20, seed=3).float()
    expected = torch.linalg.solve(matrix.double(), r.double().T).T
    found = symmetric_inverse(matrix, 0.0)(r)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), expected) < 1e-6


def test_symmetric_inverse_refuses_a_singular_matrix() -> None:
    matrix = symmetric(torch.tensor([-1e-3, 1.0, 2.0], dtype=torch.float64))
    message = r"\(3, 3\) matrix with damping 1.0e-04 is not positive definite: raise the damping"
    with pytest.raises(ValueError, match=message):
        symmetric_inverse(matrix, 1e-4)
    symmetric_inverse(matrix, 2e-3)


@pytest.mark.parametrize(("damping_a", "damping_g"), [(0.0, 0.0), (0.3, 0.7)])
def test_kronecker_inverse(damping_a: float, damping_g: float) -> None:
    a, g, r = positive(5, seed=1), positive(4, seed=2), random(4, 5, seed=3)
    eye_a, eye_g = torch.eye(5, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    matrix = torch.kron(g + damping_g * eye_g, a + damping_a * eye_a)
    expected = torch.linalg.solve(matrix, r.flatten()).view(4, 5)
    torch.testing.assert_close(kronecker_inverse(a, g, damping_a, damping_g)(r), expected)


def test_kronecker_inverse_keeps_float32() -> None:
    a, g, r = positive(5, seed=1), positive(4, seed=2), random(4, 5, seed=3)
    found = kronecker_inverse(a.float(), g.float(), 0.1, 0.1)(r.float())
    assert found.dtype == torch.float32
    assert relative_error(found.double(), kronecker_inverse(a, g, 0.1, 0.1)(r)) < 1e-4


@pytest.mark.parametrize("which", ["a", "g"])
def test_kronecker_inverse_refuses_a_singular_factor(which: str) -> None:
    singular = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    a, g = (singular, positive(4)) if which == "a" else (positive(4), singular)
    with pytest.raises(ValueError, match=r"\(3, 3\) matrix is not positive"):
        kronecker_inverse(a, g, 0.0, 0.0)


def of_rank(d: int, rank: int, seed: int) -> Tensor:
    root = random(d, rank, seed=seed)
    return root @ root.T


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("ranks", [(5, 5, 4, 4), (2, 5, 4, 1), (3, 4, 2, 3)])
def test_two_kronecker_inverse(ranks: tuple[int, int, int, int], scale: float) -> None:
    """Against the dense sum, also of factors that have no inverse alone, or are far smaller."""
    a = (of_rank(5, ranks[0], 1), scale * of_rank(5, ranks[1], 2))
    g = (of_rank(4, ranks[2], 3), of_rank(4, ranks[3], 4))
    before = [m.clone() for m in (*a, *g)]
    damping, r = 0.03, random(4, 5, seed=5)

    def damped(m: Tensor) -> Tensor:
        return m + damping * float(m.trace()) / len(m) * torch.eye(len(m), dtype=m.dtype)

    matrix = sum(torch.kron(damped(y), damped(x)) for x, y in zip(a, g, strict=True))
    assert isinstance(matrix, Tensor)
    expected = torch.linalg.solve(matrix, r.flatten()).view(4, 5)
    torch.testing.assert_close(two_kronecker_inverse(a, g, damping)(r), expected)
    assert all(torch.equal(m, old) for m, old in zip((*a, *g), before, strict=True))


def test_two_kronecker_inverse_of_groups_is_that_of_each() -> None:
    """Factors in the form of a convolution with groups, on weights (groups, 1, 1, d_out, d_in)."""
    a = tuple(torch.stack([positive(5, seed=s), positive(5, seed=s + 1)]) for s in (1, 3))
    g = tuple(torch.stack([positive(4, seed=s), positive(4, seed=s + 1)]) for s in (5, 7))
    r = random(2, 1, 1, 4, 5)
    (a1, a2), (g1, g2) = (tuple(m.reshape(2, 1, 1, *m.shape[1:]) for m in pair) for pair in (a, g))
    found = two_kronecker_inverse((a1, a2), (g1, g2), 0.0)(r)
    for i in range(2):
        alone = two_kronecker_inverse((a[0][i], a[1][i]), (g[0][i], g[1][i]), 0.0)
        torch.testing.assert_close(found[i, 0, 0], alone(r[i, 0, 0]))


def test_two_kronecker_inverse_where_one_task_has_no_curvature() -> None:
    a, g, r = positive(5, seed=1), positive(4, seed=2), random(4, 5, seed=3)
    found = two_kronecker_inverse((a, positive(5)), (g, torch.zeros_like(g)), 1e-12)(r)
    torch.testing.assert_close(found, kronecker_inverse(a, g, 0.0, 0.0)(r), rtol=1e-6, atol=1e-9)


def test_two_kronecker_inverse_refuses_a_singular_sum() -> None:
    a, g = positive(5), of_rank(4, 2, 1)
    with pytest.raises(ValueError, match=r"a \(4, 4\) matrix.* is not positive definite"):
        two_kronecker_inverse((a, a), (g, g - 1e-3 * torch.eye(4, dtype=g.dtype)), 0.0)
    with pytest.raises(ValueError, match=r"\(4, 4\) matrix with damping 2.0e-09 is not positive"):
        two_kronecker_inverse((a, a), (g, g - 1e-3 * torch.eye(4, dtype=g.dtype)), 1e-9)


def test_two_kronecker_inverse_refuses_a_singular_sum_of_definite_sums() -> None:
    """Each input and each output matters to a task, but not all of their pairs."""
    one = torch.diag(torch.tensor([1, 0, 0, 0], dtype=torch.float64))
    pair, r = (one, torch.eye(4, dtype=torch.float64) - one), random(4, 4)
    with pytest.raises(ValueError, match=r"Kronecker products with damping 0\.0e\+00 is not posi"):
        two_kronecker_inverse(pair, pair, 0.0)
    assert bool(two_kronecker_inverse(pair, pair, 1e-8)(r).isfinite().all())


def test_from_zero_the_first_direction_is_checked_too() -> None:
    """The preconditioner leads into the null space, where a step would be of any length."""
    c = torch.diag(torch.tensor([1.0, 0.0]))
    inverse = torch.tensor([[1e-9, 1.0], [1.0, 2e9]])  # positive definite
    with pytest.raises(ValueError, match="amplifies rounding"):
        conjugate_gradient(
            lambda x: c @ x,
            torch.tensor([1.0, 0.0]),
            torch.zeros(2),
            iterations=5,
            preconditioner=lambda r: inverse @ r,
        )
