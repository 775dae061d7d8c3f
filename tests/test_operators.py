"""Every operator is held against the dense matrix that it stands for, on x taken row by row."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mats_lightning.operators import (
    Damped,
    Dense,
    Diagonal,
    Gram,
    Identity,
    KroneckerFactored,
    Operator,
    scale_off_diagonal,
    sum_of_products,
)

Shape = tuple[int, ...]
Case = Callable[[torch.Generator, Shape], tuple[Operator, Tensor]]

sizes = st.integers(1, 6)
matrix_shapes = st.tuples(sizes, sizes)
any_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)
quick = settings(
    max_examples=30, deadline=None
)  # a busy machine stalls for longer than the default


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64) - 0.3


def factor(generator: torch.Generator, d: int) -> Tensor:
    """Positive semi-definite, of any rank, not diagonal."""
    root = uniform(generator, d, max(1, d - 1))
    return root @ root.T


def identity(generator: torch.Generator, shape: Shape) -> tuple[Operator, Tensor]:
    return Identity(2.5), 2.5 * torch.eye(torch.Size(shape).numel(), dtype=torch.float64)


def diagonal(generator: torch.Generator, shape: Shape) -> tuple[Operator, Tensor]:
    f = uniform(generator, *shape).square()
    return Diagonal(f), torch.diag(f.flatten())


def dense(generator: torch.Generator, shape: Shape) -> tuple[Operator, Tensor]:
    c = factor(generator, torch.Size(shape).numel())
    return Dense(c), c


def gram(generator: torch.Generator, shape: Shape) -> tuple[Operator, Tensor]:
    a = factor(generator, shape[1])
    return Gram(a), torch.kron(torch.eye(shape[0], dtype=torch.float64), a)


def kronecker(generator: torch.Generator, shape: Shape) -> tuple[Operator, Tensor]:
    a, g = factor(generator, shape[1]), factor(generator, shape[0])
    return KroneckerFactored(a, g), torch.kron(g, a)


def damped(case: Case) -> Case:
    def make(generator: torch.Generator, shape: Shape) -> tuple[Operator, Tensor]:
        operator, matrix = case(generator, shape)
        return Damped(operator, 0.7), matrix + 0.7 * torch.eye(len(matrix), dtype=torch.float64)

    make.__name__ = f"damped {case.__name__}"
    return make


FOR_ANY_SHAPE: list[Case] = [identity, diagonal, dense]
FOR_MATRICES: list[Case] = [gram, kronecker]


def check(case: Case, shape: Shape, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    operator, matrix = case(generator, shape)
    x = uniform(generator, *shape)
    before = x.clone()

    product = operator.matvec(x)
    assert product.shape == x.shape
    torch.testing.assert_close(product.flatten(), matrix @ x.flatten())
    assert torch.equal(x, before)

    mean = float(matrix.trace()) / len(matrix)
    assert operator.mean_eigenvalue() == pytest.approx(mean, rel=1e-12, abs=1e-15)

    scaled = operator.scaled(3.25)
    torch.testing.assert_close(scaled.matvec(x).flatten(), 3.25 * matrix @ x.flatten())
    assert scaled.mean_eigenvalue() == pytest.approx(3.25 * mean, rel=1e-12, abs=1e-15)
    # the scaled one is another: the first still acts as it did
    torch.testing.assert_close(operator.matvec(x), product)


@pytest.mark.parametrize("case", [*FOR_ANY_SHAPE, *map(damped, FOR_ANY_SHAPE)])
@quick
@given(any_shapes, seeds)
def test_operator_of_any_parameter_is_its_dense_twin(case: Case, shape: Shape, seed: int) -> None:
    check(case, shape, seed)


@pytest.mark.parametrize("case", [*FOR_MATRICES, *map(damped, FOR_MATRICES)])
@quick
@given(matrix_shapes, seeds)
def test_operator_of_a_matrix_is_its_dense_twin(case: Case, shape: Shape, seed: int) -> None:
    check(case, shape, seed)


@pytest.mark.parametrize("case", [*FOR_ANY_SHAPE, *FOR_MATRICES])
def test_damping_leaves_the_operator_and_its_input_alone(case: Case) -> None:
    operator, _ = case(torch.Generator().manual_seed(0), (3, 4))
    x = torch.ones(3, 4, dtype=torch.float64)
    product = operator.matvec(x)
    Damped(operator, 5.0).matvec(x)
    assert torch.equal(x, torch.ones_like(x))
    torch.testing.assert_close(operator.matvec(x), product)


@pytest.mark.parametrize("case", [*FOR_ANY_SHAPE, *FOR_MATRICES, damped(kronecker)])
@pytest.mark.parametrize("tasks", [1, 3])
def test_sum_of_products_is_that_of_the_dense_twins(case: Case, tasks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [case(generator, (3, 4)) for _ in range(tasks)]
    xs = [uniform(generator, 3, 4) for _ in range(tasks)]
    before = [x.clone() for x in xs]
    expected = torch.stack([m @ x.flatten() for (_, m), x in zip(pairs, xs, strict=True)]).sum(0)
    found = sum_of_products([operator for operator, _ in pairs], iter(xs))
    torch.testing.assert_close(found.flatten(), expected)
    assert all(torch.equal(x, old) for x, old in zip(xs, before, strict=True))


@quick
@given(sizes, st.floats(0, 1), seeds)
def test_scale_off_diagonal_is_the_papers_lambda(d: int, scale: float, seed: int) -> None:
    m = factor(torch.Generator().manual_seed(seed), d)
    before = m.clone()
    expected = scale * m + (1 - scale) * torch.diag(m.diagonal())
    torch.testing.assert_close(scale_off_diagonal(m, scale), expected)
    assert torch.equal(m, before)
    assert torch.equal(scale_off_diagonal(m, scale).diagonal(), m.diagonal())


def test_scale_off_diagonal_of_one_takes_no_memory() -> None:
    m = torch.eye(3)
    assert scale_off_diagonal(m, 1.0) is m
