"""MaTS: Tam, Bansal, Raffel, "Merging by matching models in task parameter subspaces".

arXiv 2312.04339. The merged parameters solve (sum w_i C_i) theta = sum w_i C_i theta_i with the
conjugate gradient method, from a chosen start and for a chosen number of iterations.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack, overload

from torch import Tensor

from mats_lightning.merging.block_solver import BlockSolver
from mats_lightning.merging.covering import check_statistics, uncovered_value
from mats_lightning.merging.curvatures import task_operators
from mats_lightning.merging.forms import beside, matrix_form
from mats_lightning.merging.models import (
    Weights,
    check_counts,
    check_models,
    check_range,
    check_weights,
    counted,
    distance,
    parameters,
    stored_dtype,
    weighted_mean,
)
from mats_lightning.merging.results import MergeResult, OnBlock, objective_kinds
from mats_lightning.operators import Operator, sum_of_products
from mats_lightning.solvers import Solution
from mats_lightning.statistics import Statistics


class Options(TypedDict, total=False):
    """What `mats` takes beside `iterations`, for type checkers."""

    objective: str | Sequence[str]
    init: str | Weights
    preconditioner: str | None
    preconditioner_damping: float
    off_diagonal: float
    damping: float
    radius: float | None
    floor: float
    normalize: bool
    fold_bias: bool
    tolerance: float
    averaged: str | Sequence[str]
    weights: Sequence[float] | None
    uncovered: str
    pretrained: Weights | None
    on_block: OnBlock | None


@overload
def mats(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    *,
    iterations: int = ...,
    **options: Unpack[Options],
) -> MergeResult: ...


@overload
def mats(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    *,
    iterations: Sequence[int],
    **options: Unpack[Options],
) -> dict[int, MergeResult]: ...


def mats(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    *,
    objective: str | Sequence[str] = "kfac",
    init: str | Weights = "average",
    iterations: int | Sequence[int] = 10,
    preconditioner: str | None = "kronecker",
    preconditioner_damping: float = 1e-3,
    off_diagonal: float = 1.0,
    damping: float = 0.0,
    radius: float | None = 10.0,
    floor: float = 1e-8,
    normalize: bool = True,
    fold_bias: bool = False,
    tolerance: float = 1e-6,
    averaged: str | Sequence[str] = (),
    weights: Sequence[float] | None = None,
    uncovered: str = "average",
    pretrained: Weights | None = None,
    on_block: OnBlock | None = None,
) -> MergeResult | dict[int, MergeResult]:
    """Solve (sum w_i C_i) theta = sum w_i C_i theta_i (eq. 3), a parameter at a time.

    Arguments:
        objective: what C_i is: "kfac" (G X A for linear weights, the block Fisher for vectors),
            "gram" (X A), "diagonal_fisher", "average"; or a sequence of statistics of which the
            first that covers a parameter is taken, e.g. ("kfac", "block_fisher",
            "diagonal_fisher").
        init: where CG starts: "average", "pretrained", or a state dict.
        pretrained: the model that all started from, for init and uncovered.
        iterations: of CG; a sequence gives the states after each of these counts, from one run,
            as {count: MergeResult}.
        preconditioner: "kronecker" applies the inverse of (sum A) x (sum G), exact for
            objectives whose sum is of one factor; "exact" has the closed form of K-FAC for two
            tasks, too; None is plain CG, as in the paper.
        preconditioner_damping: added to each factor of it, relative to its mean eigenvalue. Where
            the preconditioner is exact and the factors have full rank, one iteration with a small
            one (1e-8, in float32 1e-4) and radius=None is the closed form.
        off_diagonal: scales the off-diagonal of A, G and block Fishers (the paper's lambda).
        damping: C_i + damping (mean eigenvalue of C_i) I, on both sides of the equation.
        radius: how far a block may go from its start, in units of how far the tasks' own lie from
            it (root mean square); there its iteration ends. Good merges go 3 to 10 far; where
            K-FAC is far from the true curvature, its solution can lie hundreds away and be worth
            nothing. None sets no bound, as in the paper.
        floor: the least value of a diagonal Fisher.
        normalize: divide each C_i by its mean eigenvalue, block by block. Otherwise a task whose
            model fits its rows very well has almost no curvature, and hardly counts. The paper
            does not.
        fold_bias: solve for [W b] together, with the A of the inputs with a 1 behind them, where
            a weight has A and a bias; else biases are blocks of their own, or uncovered (gram).
        tolerance: a block is done when its residual |sum w_i C_i (theta_i - theta)| is below this
            share of the start's, or of the average's where that is larger.
        averaged: regular expressions; a parameter whose name has one of them has C_i = I, so it is
            averaged. K-FAC of a layer can be far from its true curvature: of the patches of an
            image, for example, where all positions and gradients depend on each other.
        weights: a number a task; one of weight 0 has no part in anything.
        uncovered: parameters without a statistic of all models: "average", "pretrained" or "error".
        on_block: called with (name, index, total) before each parameter.

    Raises ValueError for models or statistics that do not fit together, unknown names, an
    expression in `averaged` that no name has, options out of range, factors with NaN or inf.
    """
    w = check_weights(weights, len(thetas))
    check_counts(statistics, thetas)
    thetas, statistics, w = counted(thetas, w), counted(statistics, w), counted(w, w)
    names = check_models(thetas)
    counts = [iterations] if isinstance(iterations, int) else list(iterations)
    if not counts or min(counts) < 0:
        raise ValueError(f"iterations={iterations}: give counts that are not negative")
    solver = BlockSolver(preconditioner, preconditioner_damping, tolerance)
    check_range("off_diagonal", off_diagonal, highest=1)
    check_range("damping", damping)
    check_range("radius", radius or 0.0)
    check_range("floor", floor)
    kind_of, folded = check_statistics(
        thetas, statistics, objective_kinds(objective), uncovered, pretrained, fold_bias, averaged
    )
    start = _start(init, pretrained, thetas)
    done_with_weight = set(folded.values())
    results = {count: MergeResult({}) for count in counts}
    fixed: dict[str, Tensor] = {}  # not floating point: equal in all models
    for index, (name, tensors, dtype) in enumerate(parameters(names, thetas, w, fixed)):
        if on_block is not None:
            on_block(name, index, len(names))
        if name in done_with_weight:
            continue
        if name not in kind_of:
            value = uncovered_value(name, tensors, w, pretrained, uncovered).to(dtype)
            for result in results.values():
                result.state_dict[name] = value
                result.uncovered.append(name)
            continue
        bias = folded.get(name)
        form = matrix_form(name, kind_of[name], statistics[0], tensors[0].shape)
        sources = thetas if start is None else [*thetas, start]
        blocks = [form.of(source[name].detach().to(tensors[0])) for source in sources]
        if bias is not None:
            blocks = [beside(x, source[bias]) for x, source in zip(blocks, sources, strict=True)]
        average = weighted_mean(blocks[: len(thetas)], w)
        x0 = average if start is None else blocks[-1]
        solution = _solve(
            solver,
            name,
            task_operators(  # nothing here holds them: they go before those of the next block come
                name,
                kind_of[name],
                statistics,
                tensors[0],
                w,
                off_diagonal=off_diagonal,
                floor=floor,
                damping=damping,
                normalize=normalize,
                with_bias=bias is not None,
            ),
            blocks[: len(thetas)],
            average,
            x0,
            radius,
            counts,
        )
        for count, result in results.items():
            value = x0 + solution.kept[count]
            block = solver.block(kind_of[name], solution, count)
            if bias is not None:
                of_bias = stored_dtype([theta[bias] for theta in thetas])
                result.state_dict[bias] = value[:, -1].to(of_bias)
                result.blocks[bias], value = block, value[:, :-1].contiguous()
            result.state_dict[name] = form.back(value).to(dtype)
            result.blocks[name] = block
    for result in results.values():
        result.state_dict |= fixed
    return results[counts[0]] if isinstance(iterations, int) else results


def _solve(
    solver: BlockSolver,
    name: str,
    operators: Sequence[Operator],
    tensors: Sequence[Tensor],
    average: Tensor,
    x0: Tensor,
    radius: float | None,
    counts: Sequence[int],
) -> Solution:
    """delta with sum C_i (x0 + delta) = sum C_i theta_i, and its states after these counts."""

    def residual(x: Tensor) -> Tensor:
        """Small differences are multiplied, not large products subtracted."""
        return sum_of_products(operators, (t - x for t in tensors))

    reach = math.inf if radius is None else radius * distance(tensors, x0)
    try:
        b = residual(x0)
        scale = 0.0 if average is x0 else float(residual(average).norm())
        return solver.solve(operators, b, counts, reach, scale)
    except ValueError as error:
        raise ValueError(f"MaTS of '{name}': {error}") from error


def _start(
    init: str | Weights, pretrained: Weights | None, thetas: Sequence[Weights]
) -> Weights | None:
    """The start as a state dict; None is the average, made a parameter at a time."""
    if isinstance(init, Mapping):
        check_models(thetas[:1], init, label="the state dict in init")
        return init
    if init == "average":
        return None
    if init == "pretrained" and pretrained is not None:
        check_models(thetas[:1], pretrained)
        return pretrained
    if init == "pretrained":
        raise ValueError("init='pretrained' needs pretrained=<state dict>")
    raise ValueError(f"init={init!r}; choose 'average', 'pretrained' or give a state dict")
