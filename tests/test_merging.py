"""Merge functions against dense brute force in float64, and what must hold of every one of them.

`C` below writes a task's C_i out as a dense matrix; it shares no code with the package.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from mats_lightning import Statistics
from mats_lightning.merging import (
    average,
    dare,
    fisher,
    iso_c,
    mats,
    regmean,
    task_arithmetic,
    ties,
    tsv_m,
)
from mats_lightning.merging.preconditioner import block_preconditioner
from mats_lightning.operators import Damped, KroneckerFactored
from mats_lightning.statistics.digest import digest

State = dict[str, Tensor]
Merge = Callable[..., State]

LINEAR = {"first": (4, 5), "second": (3, 4)}  # module -> its weight's shape
SHAPES: dict[str, tuple[int, ...]] = {
    "first.weight": (4, 5),
    "first.bias": (4,),
    "norm.weight": (4,),
    "second.weight": (3, 4),
    "free": (2, 3),  # covered by no statistic
}
VECTORS = ("first.bias", "norm.weight")
COVERED = tuple(name for name in SHAPES if name != "free")
EXAMPLES, POSITIONS = 8, 32  # powers of two: divided exactly


# -- a merge to do, and its brute force --------------------------------------------------------


@dataclass
class Factors:
    """The means that a `Statistics` shall give."""

    f: State  # parameter -> diagonal Fisher
    c: State  # vector -> block Fisher
    a: State  # module -> A
    g: State  # module -> G

    def statistics(self, info: dict[str, Any] | None = None) -> Statistics:
        tensors = {f"diagonal_fisher/{n}": EXAMPLES * t for n, t in self.f.items()}
        tensors |= {f"block_fisher/{n}": EXAMPLES * t for n, t in self.c.items()}
        tensors |= {f"G/{m}": EXAMPLES * t for m, t in self.g.items()}
        tensors |= {f"A/{m}": POSITIONS * t for m, t in self.a.items()}
        positions = dict.fromkeys(self.a, POSITIONS)
        return Statistics(tensors, EXAMPLES, positions, {m: m for m in self.a}, info or {})

    def map(self, function: Callable[[Tensor], Tensor]) -> "Factors":
        groups = (self.f, self.c, self.a, self.g)
        return Factors(*({k: function(t) for k, t in group.items()} for group in groups))


@dataclass
class Problem:
    """Models with their statistics, and the model that they started from."""

    thetas: list[State]
    factors: list[Factors]
    pretrained: State

    @property
    def statistics(self) -> list[Statistics]:
        return [factors.statistics() for factors in self.factors]

    def of(self, tasks: Sequence[int]) -> "Problem":
        return replace(
            self, thetas=[self.thetas[i] for i in tasks], factors=[self.factors[i] for i in tasks]
        )

    def to(self, dtype: torch.dtype) -> "Problem":
        """Models in another dtype; statistics in float32 at least, as they are kept."""
        kept = torch.promote_types(dtype, torch.float32)
        return Problem(
            [cast(theta, dtype) for theta in self.thetas],
            [factors.map(lambda t: t.to(kept)) for factors in self.factors],
            cast(self.pretrained, dtype),
        )


def cast(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def positive(generator: torch.Generator, d: int, scale: float) -> Tensor:
    root = normal(generator, d, 3 * d)
    return scale * root @ root.T / (3 * d)


def make_factors(generator: torch.Generator, scale: float) -> Factors:
    return Factors(
        f={n: scale * (normal(generator, *SHAPES[n]).square() + 0.1) for n in COVERED},
        c={n: positive(generator, SHAPES[n][0], scale) for n in VECTORS},
        a={m: positive(generator, d_in, 1.0) for m, (_, d_in) in LINEAR.items()},
        g={m: positive(generator, d_out, scale) for m, (d_out, _) in LINEAR.items()},
    )


def make_state(generator: torch.Generator) -> State:
    return {name: normal(generator, *shape) for name, shape in SHAPES.items()}


def make_problem(scale: float = 1.0, tasks: int = 3) -> Problem:
    generator = torch.Generator().manual_seed(0)
    # the tasks' curvature differs in scale, so that normalisation and weights are seen
    factors = [make_factors(generator, scale * 3.0**i) for i in range(tasks)]
    return Problem([make_state(generator) for _ in range(tasks)], factors, make_state(generator))


@pytest.fixture
def problem() -> Problem:
    return make_problem()


def scaled_off_diagonal(matrix: Tensor, scale: float) -> Tensor:
    return scale * matrix + (1 - scale) * torch.diag(matrix.diagonal())


def dense_operator(
    factors: Factors,
    kind: str,
    name: str,
    off_diagonal: float = 1.0,
    floor: float = 0.0,
    damping: float = 0.0,
    normalize: bool = False,
) -> Tensor:
    """C of one task for one parameter, as the matrix that acts on the parameter's numbers."""
    module = name.removesuffix(".weight")
    if kind == "average":
        c = torch.eye(torch.Size(SHAPES[name]).numel(), dtype=torch.float64)
    elif kind == "diagonal_fisher":
        c = torch.diag(factors.f[name].clamp(min=floor).flatten())
    elif kind == "block_fisher":
        c = scaled_off_diagonal(factors.c[name], off_diagonal)
    else:
        d_out = LINEAR[module][0]
        a = scaled_off_diagonal(factors.a[module], off_diagonal)
        g = torch.eye(d_out, dtype=torch.float64)
        if kind == "kfac":
            g = scaled_off_diagonal(factors.g[module], off_diagonal)
        c = torch.kron(g, a)
    if normalize:
        c = c / (c.trace() / len(c))
    return c + damping * c.trace() / len(c) * torch.eye(len(c), dtype=torch.float64)


def brute_force(
    problem: Problem,
    kind_of: Mapping[str, str],
    weights: Sequence[float] | None = None,
    **options: Any,
) -> State:
    """(sum w_i C_i) theta = sum w_i C_i theta_i by dense algebra; without a C_i, the mean."""
    w = weights or [1.0] * len(problem.thetas)
    merged = {}
    for name, shape in SHAPES.items():
        kind = kind_of.get(name, "average")
        cs = [dense_operator(factors, kind, name, **options) for factors in problem.factors]
        total = sum(wi * c for wi, c in zip(w, cs, strict=True))
        b = sum(
            wi * c @ theta[name].flatten()
            for wi, c, theta in zip(w, cs, problem.thetas, strict=True)
        )
        merged[name] = torch.linalg.solve(total, b).view(shape)
    return merged


MATRICES = tuple(f"{module}.weight" for module in LINEAR)
AVERAGE: dict[str, str] = {}
DIAGONAL = dict.fromkeys(COVERED, "diagonal_fisher")
GRAM = dict.fromkeys(MATRICES, "gram")
KFAC = dict.fromkeys(MATRICES, "kfac") | dict.fromkeys(VECTORS, "block_fisher")
KINDS = {"average": AVERAGE, "diagonal_fisher": DIAGONAL, "gram": GRAM, "kfac": KFAC}


def solved(problem: Problem, objective: Any = "kfac", **options: Any) -> State:
    """`mats`, run to convergence."""
    options = {"preconditioner": "kronecker"} | options
    result = mats(
        problem.thetas,
        problem.statistics,
        objective=objective,
        iterations=300,
        tolerance=1e-13,
        preconditioner_damping=1e-3,
        **options,
    )
    assert all(block.converged for block in result.blocks.values())
    return result.state_dict


def assert_states(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        error = float((found[name].double() - tensor.double()).norm())
        assert error <= tolerance * float(tensor.double().norm()), name


# -- the equation ------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"weights": [1.0, 0.25, 3.0]},
    {"normalize": True},
    {"normalize": True, "weights": [1.0, 0.25, 3.0]},
]
FACTOR_SETTINGS = [
    *SETTINGS,
    {"off_diagonal": 0.9},
    {"off_diagonal": 0.0},
    {"damping": 0.1},
    {"off_diagonal": 0.6, "damping": 0.05, "normalize": True, "weights": [2.0, 1.0, 0.5]},
]


@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_average(problem: Problem, weights: list[float] | None) -> None:
    expected = brute_force(problem, AVERAGE, weights)
    assert_states(average(problem.thetas, weights=weights), expected, 1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_fisher_is_brute_force(problem: Problem, setting: dict[str, Any], floor: float) -> None:
    found = fisher(problem.thetas, problem.statistics, floor=floor, **setting)
    assert_states(found, brute_force(problem, DIAGONAL, floor=floor, **setting), 1e-12)


@pytest.mark.parametrize("setting", FACTOR_SETTINGS, ids=str)
def test_regmean_is_brute_force(problem: Problem, setting: dict[str, Any]) -> None:
    setting = {"off_diagonal": 1.0, "damping": 0.0} | setting
    found = regmean(problem.thetas, problem.statistics, **setting)
    assert_states(found, brute_force(problem, GRAM, **setting), 1e-11)


def test_regmean_of_float32_is_solved_in_float64(problem: Problem) -> None:
    """Gram matrices with a condition of 1e4, which the sums in float32 would spoil."""
    q = torch.linalg.qr(problem.factors[0].a["first"]).Q
    for i, factors in enumerate(problem.factors):
        factors.a["first"] = (q * torch.logspace(-i, -4, 5, dtype=torch.float64)) @ q.T
    p = problem.to(torch.float32)
    found = regmean(p.thetas, p.statistics, off_diagonal=1.0, damping=0.0)
    # the same numbers as they were given: rounded to float32
    rounded = Problem(
        [cast(theta, torch.float64) for theta in p.thetas],
        [factors.map(Tensor.double) for factors in p.factors],
        p.pretrained,
    )
    assert_states(found, brute_force(rounded, GRAM), 1e-6)


@pytest.mark.parametrize("preconditioner", ["kronecker", None])
@pytest.mark.parametrize("objective", ["gram", "kfac"])
@pytest.mark.parametrize("setting", FACTOR_SETTINGS, ids=str)
def test_converged_mats_is_brute_force(
    problem: Problem, setting: dict[str, Any], objective: str, preconditioner: str | None
) -> None:
    setting = {"off_diagonal": 1.0, "damping": 0.0, "normalize": False} | setting
    found = solved(problem, objective, preconditioner=preconditioner, **setting)
    assert_states(found, brute_force(problem, KINDS[objective], **setting), 1e-9)


@pytest.mark.parametrize("preconditioner", ["kronecker", None])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_converged_mats_is_the_closed_form(
    problem: Problem, setting: dict[str, Any], preconditioner: str | None
) -> None:
    thetas, statistics = problem.thetas, problem.statistics
    same = {"normalize": False} | setting
    options = same | {"preconditioner": preconditioner}

    found = solved(problem, "average", damping=0.0, **options)
    assert_states(found, average(thetas, weights=setting.get("weights")), 1e-9)

    found = solved(problem, "diagonal_fisher", floor=0.02, damping=0.0, **options)
    assert_states(found, fisher(thetas, statistics, floor=0.02, **same), 1e-9)

    factors: dict[str, Any] = {"off_diagonal": 0.7, "damping": 0.01}
    found = solved(problem, "gram", **factors, **options)
    assert_states(found, regmean(thetas, statistics, **factors, **same), 1e-9)


def test_an_objective_is_the_first_statistic_that_covers_a_parameter(problem: Problem) -> None:
    plain = {"off_diagonal": 1.0, "damping": 0.0, "normalize": False, "floor": 0.0}
    found = solved(problem, ("gram", "diagonal_fisher"), **plain)
    assert_states(found, brute_force(problem, DIAGONAL | GRAM), 1e-9)
    found = solved(problem, ("diagonal_fisher", "gram"), **plain)
    assert_states(found, brute_force(problem, DIAGONAL), 1e-9)
    result = mats(
        problem.thetas, problem.statistics, objective=("gram", "block_fisher"), iterations=1
    )
    assert {n: b.statistic for n, b in result.blocks.items()} == (
        GRAM | dict.fromkeys(VECTORS, "block_fisher")
    )
    assert result.uncovered == ["free"]


def test_plain_conjugate_gradients_are_the_papers(problem: Problem) -> None:
    """SciPy's cg over the Kronecker sums, from the average: what the authors' code runs."""
    counts = [1, 2, 5, 17]
    results = mats(
        problem.thetas,
        problem.statistics,
        objective="kfac",
        init="average",
        iterations=counts,
        preconditioner=None,
        off_diagonal=1.0,
        damping=0.0,
        normalize=False,
        tolerance=0.0,
    )
    for module, (d_out, d_in) in LINEAR.items():
        pairs = [(f.g[module].numpy(), f.a[module].numpy()) for f in problem.factors]
        thetas = [theta[f"{module}.weight"].numpy() for theta in problem.thetas]

        def matvec(
            x: np.ndarray, pairs: Any = pairs, shape: tuple[int, int] = (d_out, d_in)
        ) -> np.ndarray:
            return sum(g @ x.reshape(shape) @ a for g, a in pairs).ravel()

        size = d_out * d_in
        operator = scipy.sparse.linalg.LinearOperator((size, size), matvec, dtype=np.float64)
        b = sum(g @ theta @ a for (g, a), theta in zip(pairs, thetas, strict=True)).ravel()
        x0 = np.mean(thetas, axis=0).ravel()
        for count in counts:
            x, _ = scipy.sparse.linalg.cg(operator, b, x0, rtol=0.0, maxiter=count)
            found = results[count].state_dict[f"{module}.weight"].numpy().ravel()
            assert np.linalg.norm(found - x) < 1e-6 * np.linalg.norm(x), (module, count)
            residual = np.linalg.norm(b - operator @ x) / np.linalg.norm(b - operator @ x0)
            block = results[count].blocks[f"{module}.weight"]
            assert block.residuals[-1] == pytest.approx(residual, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
@pytest.mark.parametrize("distance", [1e-2, 1e-5])
def test_how_large_the_weights_are_does_not_matter(
    problem: Problem, preconditioner: str | None, distance: float
) -> None:
    """The equation is of differences: a shift of all models shifts the solution, and no stop."""
    options: dict[str, Any] = {"iterations": 40, "preconditioner": preconditioner, "radius": None}
    near = [{n: distance * t for n, t in theta.items()} for theta in problem.thetas]
    shifted = [{n: t + problem.pretrained[n] for n, t in theta.items()} for theta in near]
    found, expected = (mats(t, problem.statistics, **options) for t in (shifted, near))
    for name, tensor in expected.state_dict.items():
        torch.testing.assert_close(
            found.state_dict[name] - problem.pretrained[name],
            tensor,
            rtol=1e-5,
            atol=1e-8 * distance,
        )
    for name, block in expected.blocks.items():
        assert found.blocks[name].converged and block.converged
        assert found.blocks[name].residuals[0] == 1


def test_a_start_that_is_the_solution_stays(problem: Problem) -> None:
    """Its residual is rounding alone, so what is left is measured by that of the average."""
    solution = solved(problem, "gram", damping=0.1)
    again = mats(problem.thetas, problem.statistics, objective="gram", damping=0.1, init=solution)
    for block in again.blocks.values():
        assert block.iterations == 0 and block.converged and block.residuals[0] < 1e-9


# -- the preconditioner ------------------------------------------------------------------------


def test_kronecker_preconditioner_is_what_it_says(problem: Problem) -> None:
    """(sum c_i G_i + d I)^-1 x (sum c_i A_i + d I)^-1 (sum c_i): means of 1, both damped."""
    weights, damping, relative = [1.0, 0.5, 2.0], 0.1, 0.03
    tasks = [(w, f.a["first"], f.g["first"]) for w, f in zip(weights, problem.factors, strict=True)]
    operators = [Damped(KroneckerFactored(a, g).scaled(w), damping * w) for w, a, g in tasks]
    apply = block_preconditioner(operators, relative)
    assert apply is not None

    def mean(m: Tensor) -> float:
        return float(m.trace()) / len(m)

    c = [w * mean(a) * mean(g) for w, a, g in tasks]
    a_sum = torch.stack([ci * a / mean(a) for ci, (_, a, _) in zip(c, tasks, strict=True)]).sum(0)
    g_sum = torch.stack([ci * g / mean(g) for ci, (_, _, g) in zip(c, tasks, strict=True)]).sum(0)
    # the operators' own damping is a share of their mean eigenvalue, and goes to both factors
    each = sum(c) * (relative + (damping * sum(weights) / sum(c)) ** 0.5)
    g_sum, a_sum = g_sum + each * torch.eye(len(g_sum)), a_sum + each * torch.eye(len(a_sum))
    matrix = torch.kron(g_sum, a_sum) / sum(c)
    r = problem.thetas[0]["first.weight"]
    torch.testing.assert_close(apply(r).flatten(), torch.linalg.solve(matrix, r.flatten()))


@pytest.mark.parametrize("objective", ["diagonal_fisher", "gram", ("block_fisher",)])
def test_where_the_preconditioner_is_exact_one_iteration_does(
    problem: Problem, objective: Any
) -> None:
    options: dict[str, Any] = {"objective": objective, "iterations": 1, "damping": 0.1}
    exact = mats(problem.thetas, problem.statistics, preconditioner_damping=0.0, **options)
    plain = mats(problem.thetas, problem.statistics, preconditioner=None, **options)
    assert exact.blocks
    for name, block in exact.blocks.items():
        assert block.residuals[1] < 1e-12 < plain.blocks[name].residuals[1], name


def test_equal_factors_make_the_kronecker_preconditioner_exact(problem: Problem) -> None:
    problem.factors = [problem.factors[0]] * 3
    options: dict[str, Any] = {"init": problem.pretrained, "iterations": 1}
    options |= {"objective": "kfac", "damping": 0.0, "normalize": False}
    exact = mats(problem.thetas, problem.statistics, preconditioner_damping=0.0, **options)
    plain = mats(problem.thetas, problem.statistics, preconditioner=None, **options)
    assert exact.blocks
    for name, block in exact.blocks.items():
        assert block.residuals[1] < 1e-11 < plain.blocks[name].residuals[1], name


@pytest.mark.parametrize("normalize", [False, True])
def test_two_tasks_have_a_closed_form(problem: Problem, normalize: bool) -> None:
    two = problem.of([0, 2])
    two.factors[1] = two.factors[1].map(lambda t: 1e-4 * t)  # far smaller than the other's
    options: dict[str, Any] = {"iterations": 1, "normalize": normalize, "weights": [1.0, 3.0]}
    options |= {"preconditioner_damping": 0.0, "tolerance": 1e-12}
    exact = mats(two.thetas, two.statistics, preconditioner="exact", **options)
    assert {n for n, b in exact.blocks.items() if b.statistic == "kfac"} == set(MATRICES)
    assert all(block.converged for block in exact.blocks.values())
    converged = solved(two, "kfac", normalize=normalize, weights=[1.0, 3.0])
    assert_states(exact.state_dict, converged, 1e-8)


def test_other_sums_of_kronecker_factors_have_none(problem: Problem) -> None:
    message = "MaTS of 'first.weight': K-FAC with more than two tasks has no closed form: take"
    with pytest.raises(ValueError, match=message):
        mats(problem.thetas, problem.statistics, preconditioner="exact")
    two = problem.of([0, 1])
    with pytest.raises(ValueError, match="K-FAC with damping > 0 has no closed form"):
        mats(two.thetas, two.statistics, preconditioner="exact", damping=0.1)
    one = problem.of([0])
    mats(one.thetas, one.statistics, preconditioner="exact", damping=0.1)


@pytest.mark.parametrize("preconditioner", ["kronecker", None])
def test_float32_reaches_a_residual_of_1e_6(preconditioner: str | None) -> None:
    """Also where the models are far from zero, and close to each other: no digits are lost."""
    generator = torch.Generator().manual_seed(0)
    d, tasks = 24, 4
    start = 100 + normal(generator, d, d)
    thetas = [{"m.weight": (start + normal(generator, d, d)).float()} for _ in range(tasks)]
    spectrum = torch.logspace(0, -2, d, dtype=torch.float64)

    def factor() -> Tensor:
        q = torch.linalg.qr(normal(generator, d, d)).Q
        return ((q * spectrum) @ q.T).float()

    factors = [Factors({}, {}, {"m": factor()}, {"m": factor()}) for _ in range(tasks)]
    result = mats(
        thetas,
        [f.statistics() for f in factors],
        iterations=1000,
        tolerance=1e-6,
        normalize=False,
        preconditioner=preconditioner,
    )
    block, x = result.blocks["m.weight"], result.state_dict["m.weight"].double()
    assert x.dtype == torch.float64 and result.state_dict["m.weight"].dtype == torch.float32
    pulls, b = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for theta, f in zip(thetas, factors, strict=True):
        a, g, t = f.a["m"].double(), f.g["m"].double(), theta["m.weight"].double()
        pulls += g @ (t - x) @ a
        b += g @ t @ a
    assert block.converged
    assert block.residuals[-1] <= 1e-6
    assert float(pulls.norm() / b.norm()) < 1.1e-6


@pytest.mark.parametrize("init", ["average", "pretrained"])
def test_named_parameters_are_averaged_and_the_others_are_not(problem: Problem, init: str) -> None:
    """Also where the statistic covers them, where none does, and where they would be folded."""
    options: dict[str, Any] = {"init": init, "pretrained": problem.pretrained, "iterations": 50}
    options |= {"uncovered": "pretrained", "weights": [1.0, 2.0, 0.5]}
    plain = mats(problem.thetas, problem.statistics, **options)
    named = mats(problem.thetas, problem.statistics, averaged=[r"^first\.", "free"], **options)
    mean = average(problem.thetas, weights=options["weights"])
    for name, tensor in named.state_dict.items():
        chosen = name in ("first.weight", "first.bias", "free")
        expected = (mean if chosen else plain.state_dict)[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
    assert named.blocks["first.weight"].statistic == "identity"
    assert "free" in plain.uncovered and "free" not in named.uncovered


@pytest.mark.parametrize("init", ["average", "pretrained"])
@pytest.mark.parametrize("preconditioner", ["kronecker", None])
def test_no_block_goes_further_than_the_radius(
    problem: Problem, init: str, preconditioner: str | None
) -> None:
    options: dict[str, Any] = {"init": init, "pretrained": problem.pretrained}
    options |= {"preconditioner": preconditioner, "iterations": 50, "tolerance": 0.0}
    start = average(problem.thetas) if init == "average" else problem.pretrained

    def moved(state: State, name: str) -> float:
        """In units of the tasks' own distances."""
        away = [float((theta[name] - start[name]).norm()) for theta in problem.thetas]
        return float((state[name] - start[name]).norm()) / math.sqrt(mean(x * x for x in away))

    free = mats(problem.thetas, problem.statistics, **options)
    radius = median(moved(free.state_dict, name) for name in free.blocks)
    bound = mats(problem.thetas, problem.statistics, radius=radius, **options)
    for name, block in bound.blocks.items():
        if block.at_edge:
            assert moved(bound.state_dict, name) == pytest.approx(radius, rel=1e-9)
        else:
            assert moved(bound.state_dict, name) < radius * (1 + 1e-9)
            torch.testing.assert_close(bound.state_dict[name], free.state_dict[name])
    ended = [name for name, block in bound.blocks.items() if block.at_edge]
    assert len(bound.blocks) / 4 < len(ended) < len(bound.blocks)


def test_an_expression_that_no_parameter_has_is_refused(problem: Problem) -> None:
    message = r"averaged: no parameter has 'frist' in its name; they are called '.*first\.weight'"
    with pytest.raises(ValueError, match=message):
        mats(problem.thetas, problem.statistics, averaged=["first", "frist"], iterations=1)


# -- what holds of every method ----------------------------------------------------------------


def by_mats(objective: str, preconditioner: str | None) -> Merge:
    def merge(problem: Problem, weights: Any = None) -> State:
        return solved(
            problem,
            objective,
            preconditioner=preconditioner,
            off_diagonal=0.8,
            damping=0.01,
            normalize=True,
            weights=weights,
        )

    return merge


DIRECT: dict[str, Merge] = {
    "average": lambda p, weights=None: average(p.thetas, weights=weights),
    "task_arithmetic": lambda p, weights=None: task_arithmetic(
        p.thetas, p.pretrained, 0.3, weights=weights
    ),
    "ties": lambda p, weights=None: ties(p.thetas, p.pretrained, 0.4, 0.7, weights=weights),
    "dare": lambda p, weights=None: dare(p.thetas, p.pretrained, 0.5, 0.3, seed=1, weights=weights),
    "dare with ties": lambda p, weights=None: dare(
        p.thetas, p.pretrained, 0.5, 0.3, seed=1, density=0.6, weights=weights
    ),
    "iso_c": lambda p, weights=None: iso_c(p.thetas, p.pretrained, 0.6, weights=weights),
    "tsv_m": lambda p, weights=None: tsv_m(p.thetas, p.pretrained, 0.8, weights=weights),
    "fisher": lambda p, weights=None: fisher(p.thetas, p.statistics, weights=weights),
    "regmean": lambda p, weights=None: regmean(p.thetas, p.statistics, weights=weights),
    "mats, two iterations": lambda p, weights=None: (
        mats(p.thetas, p.statistics, iterations=2, weights=weights).state_dict
    ),
}
CONVERGED: dict[str, Merge] = {
    f"mats {objective}, {preconditioner}": by_mats(objective, preconditioner)
    for objective in KINDS
    for preconditioner in ("kronecker", None)
}
METHODS = DIRECT | CONVERGED


def methods(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("merge", [pytest.param(METHODS[n], id=n) for n in names])


every_method = methods(METHODS)
# whose masks belong to places in the order of models
without_dare = methods(n for n in METHODS if not n.startswith("dare"))
# whose weights scale the task vectors
SCALED = ("task_arithmetic", "dare", "iso_c", "tsv_m")


@without_dare
def test_the_order_of_tasks_does_not_matter(problem: Problem, merge: Merge) -> None:
    weights = [1.0, 0.25, 3.0]
    expected = merge(problem, weights=weights)
    for order in itertools.permutations(range(3)):
        found = merge(problem.of(order), weights=[weights[i] for i in order])
        assert_states(found, expected, 1e-9)


@without_dare
def test_weight_zero_leaves_a_task_out(problem: Problem, merge: Merge) -> None:
    found = merge(problem, weights=[1.0, 0.0, 3.0])
    assert_states(found, merge(problem.of([0, 2]), weights=[1.0, 3.0]), 1e-9)
    with pytest.raises(AssertionError):  # and the task would have had a say
        assert_states(found, merge(problem), 1e-3)


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9])
def test_weight_zero_shuts_out_a_model_that_has_diverged(
    problem: Problem, merge: Merge, value: float
) -> None:
    weights = [1.0, 0.0, 3.0]
    expected = merge(problem, weights=weights)
    problem.thetas[1] = {n: torch.full_like(t, value) for n, t in problem.thetas[1].items()}
    problem.factors[1] = problem.factors[1].map(lambda t: t * math.nan)
    found = merge(problem, weights=weights)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weight_zero_leaves_a_task_out_of_the_radius_and_the_closed_form() -> None:
    problem = make_problem()
    problem.thetas[2] = {n: 1000 * t for n, t in problem.thetas[2].items()}
    two = problem.of([0, 1])
    cases: list[dict[str, Any]] = [
        {"radius": 0.5, "init": problem.pretrained, "iterations": 20},
        {"preconditioner": "exact", "iterations": 1},
    ]
    for options in cases:
        found = mats(problem.thetas, problem.statistics, weights=[1.0, 1.0, 0.0], **options)
        expected = mats(two.thetas, two.statistics, **options)
        assert_states(found.state_dict, expected.state_dict, 1e-12)
        assert {n: b.at_edge for n, b in found.blocks.items()} == {
            n: b.at_edge for n, b in expected.blocks.items()
        }


def test_weight_zero_needs_no_statistics_that_cover_the_same(problem: Problem) -> None:
    statistics = [*problem.statistics[:2], Statistics()]
    found = mats(problem.thetas, statistics, weights=[1.0, 1.0, 0.0], iterations=3)
    expected = mats(problem.thetas[:2], statistics[:2], iterations=3)
    assert_states(found.state_dict, expected.state_dict, 1e-12)
    with pytest.raises(ValueError, match="2 statistics for 3 models"):
        mats(problem.thetas, statistics[:2], weights=[1.0, 1.0, 0.0])


@methods(n for n in METHODS if n not in SCALED)
def test_only_the_weights_proportions_matter(problem: Problem, merge: Merge) -> None:
    found = merge(problem, weights=[2.0, 0.5, 6.0])
    assert_states(found, merge(problem, weights=[1.0, 0.25, 3.0]), 1e-9)
    assert_states(merge(problem, weights=[2.0] * 3), merge(problem), 1e-9)


@every_method
def test_inputs_are_left_alone_and_not_shared(problem: Problem, merge: Merge) -> None:
    before = make_problem()
    for state in (*problem.thetas, problem.pretrained, *before.thetas, before.pretrained):
        state["ids"] = torch.arange(5)
    merged = merge(problem)
    for tensor in merged.values():
        tensor.fill_(7)
    for found, expected in zip(
        [*problem.thetas, problem.pretrained], [*before.thetas, before.pretrained], strict=True
    ):
        assert_states(found, expected, 0.0)
    for factors, same in zip(problem.factors, before.factors, strict=True):
        for found, expected in ((factors.f, same.f), (factors.a, same.a), (factors.g, same.g)):
            assert_states(found, expected, 0.0)


@methods(DIRECT)  # float32 does not reach the tolerance of the others
def test_bfloat16_is_computed_in_float32_and_returned(problem: Problem, merge: Merge) -> None:
    half = problem.to(torch.bfloat16)
    wide = replace(half, thetas=[cast(t, torch.float32) for t in half.thetas])
    wide.pretrained = cast(half.pretrained, torch.float32)
    found = merge(half)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_states(found, cast(merge(wide), torch.bfloat16), 0.0)


@every_method
def test_float64_is_kept(problem: Problem, merge: Merge) -> None:
    assert {tensor.dtype for tensor in merge(problem).values()} == {torch.float64}


@every_method
def test_models_of_two_dtypes_give_the_wider(problem: Problem, merge: Merge) -> None:
    expected = merge(problem)
    for narrow in range(3):
        mixed = replace(problem, thetas=list(problem.thetas))
        mixed.thetas[narrow] = cast(problem.thetas[narrow], torch.float32)
        found = merge(mixed)
        assert {tensor.dtype for tensor in found.values()} == {torch.float64}
        assert_states(found, expected, 1e-5)


def identical(problem: Problem) -> Problem:
    return replace(problem, thetas=[problem.thetas[0]] * 3)


@pytest.mark.parametrize("preconditioner", ["kronecker", None])
def test_identical_models_merge_to_themselves(problem: Problem, preconditioner: str | None) -> None:
    p = identical(problem)
    theta = p.thetas[0]
    assert_states(average(p.thetas), theta, 1e-12)
    assert_states(fisher(p.thetas, p.statistics), theta, 1e-12)
    assert_states(regmean(p.thetas, p.statistics), theta, 1e-10)
    assert_states(task_arithmetic(p.thetas, p.pretrained, 1 / 3), theta, 1e-12)
    assert_states(ties(p.thetas, p.pretrained, 1.0, 1.0), theta, 1e-12)
    for objective in KINDS:
        from_the_average = mats(
            p.thetas,
            p.statistics,
            objective=objective,
            init="average",
            iterations=3,
            preconditioner=preconditioner,
        )
        assert_states(from_the_average.state_dict, theta, 1e-12)
        from_elsewhere = solved(
            p, objective, init=p.pretrained, damping=0.1, preconditioner=preconditioner
        )
        assert_states(from_elsewhere, theta, 1e-9)


# -- evidence that is missing, tiny or zero ----------------------------------------------------


def test_no_evidence_gives_the_average(problem: Problem) -> None:
    problem.factors = [factors.map(torch.zeros_like) for factors in problem.factors]
    thetas, statistics = problem.thetas, problem.statistics
    weights = [1.0, 0.25, 3.0]
    expected = average(thetas, weights=weights)
    for floor in (0.0, 1e-8):
        found = fisher(thetas, statistics, floor=floor, weights=weights)
        assert_states(found, expected, 1e-12)
    assert_states(regmean(thetas, statistics, weights=weights), expected, 1e-12)
    for objective, damping, init in itertools.product(
        ("diagonal_fisher", "gram", "kfac"), (0.0, 0.1), ("average", "pretrained")
    ):
        found = solved(
            problem,
            objective,
            damping=damping,
            init=init,
            floor=0.0,
            weights=weights,
            pretrained=problem.pretrained,
        )
        assert_states(found, expected, 1e-9)


def test_no_evidence_for_single_numbers_gives_their_average(problem: Problem) -> None:
    for factors in problem.factors:
        factors.f["first.weight"][1] = 0
    expected = average(problem.thetas)["first.weight"]
    found = fisher(problem.thetas, problem.statistics, floor=0.0)["first.weight"]
    torch.testing.assert_close(found[1], expected[1])
    assert not torch.isclose(found[0], expected[0]).any()


def test_a_task_without_evidence_has_no_say(problem: Problem) -> None:
    problem.factors[1] = problem.factors[1].map(torch.zeros_like)
    found = solved(problem, "kfac", damping=0.1, normalize=True)
    expected = solved(problem.of([0, 2]), "kfac", damping=0.1, normalize=True)
    for name in COVERED:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("scale", [1e-12, 1e-24])
def test_tiny_curvature_in_float32_is_still_right(scale: float) -> None:
    exact = make_problem(scale)
    for factors in exact.factors:  # tiny inputs too: A and G multiply
        factors.a = {module: a * scale**0.5 for module, a in factors.a.items()}
    p = exact.to(torch.float32)
    found = fisher(p.thetas, p.statistics, floor=0.0)
    assert_states(found, brute_force(exact, DIAGONAL), 1e-4)
    found = regmean(p.thetas, p.statistics, off_diagonal=1.0, damping=0.0)
    assert_states(found, brute_force(exact, GRAM), 1e-4)
    for objective, preconditioner in itertools.product(KINDS, ("kronecker", None)):
        result = mats(
            p.thetas,
            p.statistics,
            objective=objective,
            iterations=200,
            tolerance=1e-6,
            floor=0.0,
            off_diagonal=1.0,
            damping=0.01,
            normalize=False,
            preconditioner=preconditioner,
        )
        assert all(block.converged for block in result.blocks.values())
        expected = brute_force(exact, KINDS[objective], damping=0.01)
        assert_states(result.state_dict, expected, 1e-4)


# -- mats: iterations, start, evidence ---------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["kronecker", None])
def test_a_list_of_iterations_is_as_many_runs(problem: Problem, preconditioner: str | None) -> None:
    def run(iterations: Any) -> Any:
        return mats(
            problem.thetas,
            problem.statistics,
            iterations=iterations,
            preconditioner=preconditioner,
            preconditioner_damping=1e-3,
            tolerance=1e-9,
        )

    counts = [3, 0, 1, 1000]
    together = run(counts)
    assert list(together) == counts
    for count in counts:
        alone = run(count)
        assert_states(together[count].state_dict, alone.state_dict, 0.0)
        assert together[count].blocks == alone.blocks
        assert together[count].uncovered == alone.uncovered == ["free"]
    for name, block in together[1000].blocks.items():
        assert block.converged
        assert 1 < block.iterations == len(block.residuals) - 1 < 1000
        early = together[1].blocks[name]
        assert (early.iterations, len(early.residuals), early.converged) == (1, 2, False)
        assert early.residuals == block.residuals[:2]


@pytest.mark.parametrize("init", ["average", "pretrained", "state dict"])
def test_without_iterations_the_start_comes_back(problem: Problem, init: str) -> None:
    other = make_state(torch.Generator().manual_seed(9))
    start = {
        "average": average(problem.thetas),
        "pretrained": problem.pretrained,
        "state dict": other,
    }
    result = mats(
        problem.thetas,
        problem.statistics,
        init=other if init == "state dict" else init,
        iterations=0,
        pretrained=problem.pretrained,
        uncovered="average",
    )
    expected = start[init] | {"free": average(problem.thetas)["free"]}
    assert_states(result.state_dict, expected, 0.0)
    for name in COVERED:
        assert result.blocks[name].iterations == 0
        assert result.state_dict[name] is not start[init][name]


def test_the_start_matters_until_convergence(problem: Problem) -> None:
    def run(init: Any, iterations: int) -> State:
        return mats(
            problem.thetas,
            problem.statistics,
            init=init,
            iterations=iterations,
            damping=0.1,
            tolerance=1e-12,
        ).state_dict

    assert_states(run(problem.pretrained, 200), run("average", 200), 1e-9)
    with pytest.raises(AssertionError):
        assert_states(run(problem.pretrained, 1), run("average", 1), 1e-3)


def test_each_block_is_reported_before_it_is_solved(problem: Problem) -> None:
    calls: list[tuple[str, int, int]] = []
    mats(
        problem.thetas, problem.statistics, iterations=1, on_block=lambda *call: calls.append(call)
    )
    assert calls == [(name, i, len(SHAPES)) for i, name in enumerate(SHAPES)]


# -- task vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_task_arithmetic_is_its_formula(problem: Problem, weights: list[float] | None) -> None:
    w = weights or [1.0] * 3
    expected = {
        name: start
        + 0.3 * sum(wi * (t[name] - start) for wi, t in zip(w, problem.thetas, strict=True))
        for name, start in problem.pretrained.items()
    }
    found = task_arithmetic(problem.thetas, problem.pretrained, 0.3, weights=weights)
    assert_states(found, expected, 1e-12)


def ties_of_the_paper(
    thetas: Sequence[np.ndarray],
    start: np.ndarray,
    density: float,
    scale: float,
    w: Sequence[float],
) -> np.ndarray:
    """arXiv 2306.01708, algorithm 1, on flat vectors."""
    vectors = []
    for theta in thetas:  # trim
        tau = theta - start
        order = np.argsort(-np.abs(tau))
        kept = np.zeros_like(tau)
        largest = order[: round(density * len(tau))]
        kept[largest] = tau[largest]
        vectors.append(kept)
    sign = np.sign(sum(wi * tau for wi, tau in zip(w, vectors, strict=True)))  # elect
    merged = np.zeros_like(start)
    for p in range(len(start)):  # disjoint merge
        agreeing = [
            (wi, tau[p]) for wi, tau in zip(w, vectors, strict=True) if tau[p] * sign[p] > 0
        ]
        if total := sum(wi for wi, _ in agreeing):
            merged[p] = sum(wi * value for wi, value in agreeing) / total
    return start + scale * merged


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_ties_is_the_papers_three_steps(
    problem: Problem, density: float, weights: list[float] | None
) -> None:
    def flat(state: State) -> np.ndarray:
        return torch.cat([state[name].flatten() for name in SHAPES]).numpy()

    expected = ties_of_the_paper(
        [flat(t) for t in problem.thetas],
        flat(problem.pretrained),
        density,
        0.7,
        weights or [1.0] * 3,
    )
    found = ties(problem.thetas, problem.pretrained, density, 0.7, weights=weights)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-12, atol=1e-14)


# -- parameters without a statistic, buffers, ties ---------------------------------------------


def statistic_methods(uncovered: str, pretrained: State | None) -> dict[str, Merge]:
    more: dict[str, Any] = {"uncovered": uncovered, "pretrained": pretrained}
    return {
        "fisher": lambda p: fisher(p.thetas, p.statistics, **more),
        "regmean": lambda p: regmean(p.thetas, p.statistics, **more),
        "mats": lambda p: mats(p.thetas, p.statistics, iterations=2, **more).state_dict,
    }


STATISTIC_METHODS = ("fisher", "regmean", "mats")


@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_uncovered_parameters_are_the_users_choice(problem: Problem, method: str) -> None:
    mean = average(problem.thetas)["free"]
    by_average = statistic_methods("average", problem.pretrained)[method](problem)
    torch.testing.assert_close(by_average["free"], mean)
    by_pretrained = statistic_methods("pretrained", problem.pretrained)[method](problem)
    assert torch.equal(by_pretrained["free"], problem.pretrained["free"])
    by_pretrained["free"].zero_()  # the user's model is not the merged one
    assert problem.pretrained["free"].all()
    covered = [name for name in SHAPES if name != "free"]
    for name in covered[:1]:
        assert torch.equal(by_pretrained[name], by_average[name])
    with pytest.raises(ValueError, match=r"has no statistic .*uncovered='average' or 'pretrained'"):
        statistic_methods("error", None)[method](problem)


@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_uncovered_error_is_silent_where_all_is_covered(problem: Problem, method: str) -> None:
    names = MATRICES  # which all three cover
    p = replace(problem, thetas=[{n: t[n] for n in names} for t in problem.thetas])
    buffered = [t | {"count": torch.tensor(3)} for t in p.thetas]  # nothing to cover
    found = statistic_methods("error", None)[method](replace(p, thetas=buffered))
    assert set(found) == {*names, "count"}


@every_method
def test_what_is_not_floating_point_is_kept_where_it_is_equal(
    problem: Problem, merge: Merge
) -> None:
    for state in (*problem.thetas, problem.pretrained):
        state["ids"] = torch.arange(5)
        state["flag"] = torch.tensor(True)
    merged = merge(problem)
    assert torch.equal(merged["ids"], torch.arange(5))
    assert merged["ids"].dtype == torch.int64
    assert merged["flag"].dtype == torch.bool
    problem.thetas[2]["ids"] = torch.arange(5) + 1
    with pytest.raises(
        ValueError, match=r"'ids' differs between model 0 .* and model 2 .*leave it out"
    ):
        merge(problem)


@every_method
def test_what_has_inf_in_it_is_kept_where_it_is_equal(problem: Problem, merge: Merge) -> None:
    """An attention mask that is saved with the model: its differences would be NaN."""
    expected = merge(problem)
    mask = torch.full((30, 30), -torch.inf, dtype=torch.float64).triu(1)
    for state in (*problem.thetas, problem.pretrained):
        state["mask"] = mask
    merged = merge(problem)
    assert torch.equal(merged.pop("mask"), mask)
    assert_states(merged, expected, 1e-12)
    problem.thetas[2]["mask"] = mask + 1e-3
    with pytest.raises(ValueError, match=r"'mask' differs .* model 2 .* inf in model 0, 1, 2"):
        merge(problem)
    problem.thetas[2]["mask"] = mask
    problem.thetas[1]["free"] = torch.full_like(problem.thetas[1]["free"], torch.nan)
    with pytest.raises(ValueError, match=r"'free' differs .* NaN or inf in model 1;"):
        merge(problem)


@every_method
def test_numbers_and_counters_under_one_name_are_an_error(problem: Problem, merge: Merge) -> None:
    problem.thetas[1]["free"] = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'free' differs between model 0 .*int64"):
        merge(problem)


@pytest.mark.parametrize("method", ["fisher", "mats"])
def test_both_names_of_a_tied_parameter_get_one_value(problem: Problem, method: str) -> None:
    """As in a language model whose head is its embedding: the statistic stands under one name."""
    for state in (*problem.thetas, problem.pretrained):
        state["head.weight"] = state["first.weight"]
    statistics = [f.statistics({"tied": {"head.weight": "first.weight"}}) for f in problem.factors]
    if method == "fisher":
        merged = fisher(problem.thetas, statistics)
    else:
        merged = mats(problem.thetas, statistics, iterations=3).state_dict
    assert torch.equal(merged["head.weight"], merged["first.weight"])
    assert not torch.allclose(merged["head.weight"], average(problem.thetas)["first.weight"])


class Lazy(Mapping[str, Tensor]):
    """As weights are that are read from a file: a new tensor at each access, with a gradient."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].clone().requires_grad_(self._state[name].is_floating_point())

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@every_method
def test_float8_is_an_error(problem: Problem, merge: Merge) -> None:
    problem.thetas[1]["second.weight"] = problem.thetas[1]["second.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"'second\.weight' is torch\.float8_e4m3fn in model 1: .*con"
    ):
        merge(problem)


@every_method
def test_weights_may_be_lazy_and_may_require_gradients(problem: Problem, merge: Merge) -> None:
    expected = merge(problem)
    lazy: Any = replace(
        problem,
        thetas=[Lazy(theta) for theta in problem.thetas],  # type: ignore[misc]
        pretrained=Lazy(problem.pretrained),  # type: ignore[arg-type]
    )
    found = merge(lazy)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert_states(found, expected, 0.0)


# -- bad input ---------------------------------------------------------------------------------


@every_method
def test_no_models(merge: Merge) -> None:
    with pytest.raises(ValueError, match="there is no model to merge"):
        merge(Problem([], [], {}))


@every_method
def test_models_without_parameters(merge: Merge) -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="model 0 has no parameter"):
        merge(replace(problem, thetas=[{}, {}, {}]))


@every_method
def test_no_common_parameter(problem: Problem, merge: Merge) -> None:
    problem.thetas[1] = {f"backbone.{name}": t for name, t in problem.thetas[1].items()}
    message = (
        "model 0 and model 1 have no common parameter: 'first.weight' ... against"
        " 'backbone.first.weight' ...; is a prefix missing"
    )
    with pytest.raises(ValueError, match=message):
        merge(problem)


@every_method
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            2,
            {"third.weight": None},
            r"model 0 and model 2 .*architectures: 'free' is in model 0 alone",
        ),
        (1, {"third.weight": torch.ones(1)}, "'third.weight' is in model 1 alone.*leave"),
    ],
)
def test_another_architecture(
    problem: Problem, merge: Merge, model: int, change: Any, message: str
) -> None:
    if change["third.weight"] is None:
        del problem.thetas[model]["free"]
    else:
        problem.thetas[model] |= change
    with pytest.raises(ValueError, match=message):
        merge(problem)


@every_method
def test_another_head_size(problem: Problem, merge: Merge) -> None:
    problem.thetas[2]["second.weight"] = torch.ones(7, 4, dtype=torch.float64)
    message = (
        r"'second.weight' has shape \(3, 4\) in model 0 and \(7, 4\) in model 2; a head of another"
    )
    with pytest.raises(ValueError, match=message):
        merge(problem)


@every_method
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "2 weights for 3 models: give one a model"),
        ([1.0, -0.5, 1.0], r"weights=\[1.0, -0.5, 1.0\]: they must be finite, not negative"),
        ([1.0, float("nan"), 1.0], "must be finite"),
        ([1.0, float("inf"), 1.0], "must be finite"),
        ([0.0, 0.0, 0.0], "not all 0"),
    ],
)
def test_bad_weights(problem: Problem, merge: Merge, weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(problem, weights=weights)


@pytest.mark.parametrize("method", [task_arithmetic, ties])
def test_a_start_of_another_architecture(problem: Problem, method: Any) -> None:
    settings = (0.5,) if method is task_arithmetic else (0.5, 1.0)
    extra = problem.pretrained | {"head.weight": torch.ones(2)}  # its own head is no matter
    method(problem.thetas, extra, *settings)
    del problem.pretrained["free"]
    message = "model 0 and the pretrained model are of different architectures: 'free'"
    with pytest.raises(ValueError, match=message):
        method(problem.thetas, problem.pretrained, *settings)


def test_what_a_model_alone_has_is_an_error_even_when_it_is_the_start_too(problem: Problem) -> None:
    start = problem.thetas[0] | {"head.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"'head\.weight' is in model 1 alone"):
        task_arithmetic([problem.thetas[0], start], start, 0.5)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_ties_density_out_of_range(problem: Problem, density: float) -> None:
    with pytest.raises(ValueError, match=rf"density={density}: .* lies in \(0, 1\]"):
        ties(problem.thetas, problem.pretrained, density, 1.0)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "negative iterations": ({"iterations": -1}, "iterations=-1: give counts that are not negative"),
    "a negative one": ({"iterations": [3, -1]}, r"iterations=\[3, -1\]: give counts"),
    "no iterations": ({"iterations": []}, r"iterations=\[\]: give counts"),
    "objective": ({"objective": "hessian"}, "objective='hessian'; choose from average, diagonal"),
    "statistic": ({"objective": ("gram", "hesse")}, "no statistic is called 'hesse'; there are"),
    "no statistic": ({"objective": ()}, "the objective is empty"),
    "preconditioner": (
        {"preconditioner": "jacobi"},
        "preconditioner='jacobi'; choose 'kronecker', 'exact'",
    ),
    "init": ({"init": "zero"}, "init='zero'; choose 'average', 'pretrained' or give a state dict"),
    "no start": ({"init": "pretrained"}, "init='pretrained' needs pretrained=<state dict>"),
    "another start": (
        {"init": {"free": torch.ones(2, 3)}},
        "model 0 and the state dict in init are of different architectures: 'first.bias'",
    ),
    "uncovered": (
        {"uncovered": "zero"},
        "uncovered='zero'; choose from average, pretrained, error",
    ),
    "uncovered start": ({"uncovered": "pretrained"}, "uncovered='pretrained' needs pretrained="),
    "off_diagonal": ({"off_diagonal": 1.1}, "off_diagonal=1.1: it lies between 0 and 1"),
    "damping": ({"damping": -0.1}, "damping=-0.1: it cannot be negative"),
    "preconditioner_damping": ({"preconditioner_damping": -1.0}, "preconditioner_damping=-1.0: it"),
    "tolerance": ({"tolerance": float("nan")}, "tolerance=nan: it cannot be negative"),
    "floor": ({"floor": float("nan")}, "floor=nan: it cannot be negative"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_of_mats(problem: Problem, case: str) -> None:
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        mats(problem.thetas, problem.statistics, **options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (fisher, {"floor": -1.0}, "floor=-1.0: it cannot be negative"),
        (fisher, {"uncovered": "zero"}, "uncovered='zero'; choose from"),
        (regmean, {"off_diagonal": -0.1}, "off_diagonal=-0.1: it lies between 0 and 1"),
        (regmean, {"damping": -1.0}, "damping=-1.0: it cannot be negative"),
        (regmean, {"uncovered": "pretrained"}, "uncovered='pretrained' needs pretrained="),
    ],
)
def test_bad_options(problem: Problem, method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(problem.thetas, problem.statistics, **options)


def run_method(
    method: str,
    problem: Problem,
    statistics: Sequence[Statistics] | None = None,
    weights: Sequence[float] | None = None,
) -> Any:
    statistics = problem.statistics if statistics is None else statistics
    functions: dict[str, Any] = {"fisher": fisher, "regmean": regmean, "mats": mats}
    return functions[method](problem.thetas, statistics, weights=weights)


@pytest.mark.parametrize("method", ["average", *STATISTIC_METHODS])
def test_what_is_equal_in_all_models_stays_so_to_the_bit(problem: Problem, method: str) -> None:
    """Layers that were frozen come out as they went in, whatever the weights."""
    problem = problem.to(torch.float32)
    names = ["free", "first.weight"] if method == "mats" else ["free"]
    for theta in problem.thetas[1:]:
        theta.update({name: problem.thetas[0][name].clone() for name in names})
    weights = [0.3, 0.25, 3.0]
    if method == "average":
        found = average(problem.thetas, weights=weights)
    else:
        result = run_method(method, problem, weights=weights)
        found = result.state_dict if method == "mats" else result
    for name in names:
        assert torch.equal(found[name], problem.thetas[0][name])


FACTOR_OF = {"fisher": ("f", "first.weight"), "regmean": ("a", "first"), "mats": ("g", "first")}


@pytest.mark.parametrize("method", STATISTIC_METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_with_nan_or_inf(problem: Problem, method: str, value: float) -> None:
    group, key = FACTOR_OF[method]
    getattr(problem.factors[1], group)[key][1, 1] = value
    with pytest.raises(
        ValueError, match=r"of 'first.weight' has NaN or inf; take the statistics anew"
    ):
        run_method(method, problem)


@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_a_factor_of_another_shape(problem: Problem, method: str) -> None:
    group, key = FACTOR_OF[method]
    getattr(problem.factors[1], group)[key] = torch.eye(9, dtype=torch.float64)
    message = (
        r"of 'first.weight' has shape \(9, 9\), its parameter \(4, 5\) needs .* of another arch"
    )
    with pytest.raises(ValueError, match=message):
        run_method(method, problem)


def test_factors_of_what_is_no_matrix(problem: Problem) -> None:
    for theta in problem.thetas:
        theta["first.weight"] = theta["first.weight"].view(20)
    message = r"'first.weight' has the statistic gram, .* \(20,\): .* another architecture"
    with pytest.raises(ValueError, match=message):
        run_method("regmean", problem)


@pytest.mark.parametrize("uncovered", ["average", "pretrained"])
@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_a_parameter_that_one_task_lacks_a_statistic_of_is_uncovered(
    problem: Problem, method: str, uncovered: str
) -> None:
    group, key = FACTOR_OF[method]
    whole = statistic_methods(uncovered, problem.pretrained)[method](problem)
    del getattr(problem.factors[1], group)[key]
    how = "it is averaged" if uncovered == "average" else "the pretrained value is taken"
    message = rf"^'first.weight' has the statistic \w+ in model 0 but not in model 1: {how}"
    with pytest.warns(UserWarning, match=message):
        found = statistic_methods(uncovered, problem.pretrained)[method](problem)
    given = problem.pretrained if uncovered == "pretrained" else average(problem.thetas)
    expected = whole | {"first.weight": given["first.weight"]}
    assert_states(found, expected, 1e-9)


@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_it_can_be_an_error(problem: Problem, method: str) -> None:
    group, key = FACTOR_OF[method]
    del getattr(problem.factors[1], group)[key]
    for theta in (*problem.thetas, problem.pretrained):
        del theta["free"]
    message = r"'first.weight' has the statistic \w+ in model 0 but not in model 1: take the same"
    with pytest.raises(ValueError, match=message):
        statistic_methods("error", None)[method](problem)


def test_so_it_is_where_no_parameter_is_covered_in_all_models(problem: Problem) -> None:
    problem.factors[1] = replace(problem.factors[1], f={})
    message = "'first.weight' has the .* in model 0 but not in model 1; .*: take the same"
    with pytest.raises(ValueError, match=message):
        fisher(problem.thetas, problem.statistics)


def test_averaged_names_need_no_statistics(
    problem: Problem, recwarn: pytest.WarningsRecorder
) -> None:
    expected = mats(problem.thetas, problem.statistics, averaged="first.weight", iterations=3)
    del problem.factors[1].a["first"]
    found = mats(problem.thetas, problem.statistics, averaged="first.weight", iterations=3)
    assert_states(found.state_dict, expected.state_dict, 1e-12)
    assert found.uncovered == ["free"]
    for factors in problem.factors:
        factors.a, factors.c = {}, {}
    with pytest.raises(ValueError, match=r"no parameter .* has the statistic kfac or block"):
        mats(problem.thetas, problem.statistics)
    assert not recwarn


def of_their_weights(problem: Problem) -> list[Statistics]:
    pairs = zip(problem.factors, problem.thetas, strict=True)
    return [factors.statistics({"digest": digest(theta)}) for factors, theta in pairs]


@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_statistics_of_other_weights(problem: Problem, method: str) -> None:
    statistics = of_their_weights(problem)
    run_method(method, problem, statistics)
    statistics[1], statistics[2] = statistics[2], statistics[1]
    message = (
        r"statistics of model 1 belong to other weights: the digest of '.*' is \w{12}\.\.\. the"
    )
    with pytest.raises(ValueError, match=message):
        run_method(method, problem, statistics)


def test_digests_are_those_of_what_is_used(problem: Problem) -> None:
    """So of no parameter that is averaged; and a wider dtype holds the same weights."""
    statistics = of_their_weights(problem)
    problem.thetas[0]["free"] += 1
    problem.thetas[0]["first.weight"] += 1
    with pytest.raises(
        ValueError, match=r"model 0 .* other weights: the digest of 'first\.weight'"
    ):
        mats(problem.thetas, statistics)
    mats(problem.thetas, statistics, averaged="first.weight")
    for dtype in (torch.float32, torch.bfloat16):
        narrow = replace(problem, thetas=[cast(theta, dtype) for theta in problem.thetas])
        found = of_their_weights(narrow)
        mats([cast(theta, torch.float64) for theta in narrow.thetas], found)


def test_kfac_of_two_kinds(problem: Problem) -> None:
    ways = ("expand", "expand", "reduce")
    pairs = zip(problem.factors, ways, strict=True)
    statistics = [factors.statistics({"weight_sharing": way}) for factors, way in pairs]
    with pytest.raises(ValueError, match="is expand in model 0 and reduce in model 2; take the"):
        mats(problem.thetas, statistics)
    for objective in ("gram", "diagonal_fisher"):
        mats(problem.thetas, statistics, objective=objective)


@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_too_few_statistics(problem: Problem, method: str) -> None:
    with pytest.raises(ValueError, match="2 statistics for 3 models: give one a model"):
        run_method(method, problem, problem.statistics[:2])


@pytest.mark.parametrize("method", STATISTIC_METHODS)
def test_statistics_of_other_names_or_of_another_kind(problem: Problem, method: str) -> None:
    """They would merge to the average without a word."""
    prefixed = replace(
        problem,
        thetas=[{f"backbone.{n}": t for n, t in theta.items()} for theta in problem.thetas],
    )
    message = (
        r"no parameter \('backbone.first.weight' ...\) has the statistic .* is a prefix missing"
    )
    with pytest.raises(ValueError, match=message):
        run_method(method, prefixed)
    with pytest.raises(ValueError, match="the statistics hold none of this kind"):
        run_method(method, problem, [Statistics()] * 3)


def test_errors_in_a_solve_name_the_parameter(problem: Problem) -> None:
    for factors in problem.factors:
        factors.a["second"][:] = 1.0  # of rank one
    message = "'second.weight': .*not positive definite: raise the damping"
    with pytest.raises(ValueError, match=f"RegMean of {message}"):
        regmean(problem.thetas, problem.statistics, off_diagonal=1.0, damping=0.0)
    with pytest.raises(ValueError, match=f"MaTS of {message}"):
        mats(
            problem.thetas,
            problem.statistics,
            objective="gram",
            off_diagonal=1.0,
            damping=0.0,
            preconditioner_damping=0.0,
        )
    problem.thetas[1]["second.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'second\.weight' differs .* NaN or inf in model 1;"):
        mats(problem.thetas, problem.statistics, objective="kfac", preconditioner=None)
