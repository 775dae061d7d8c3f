"""MaTS: Tam, Bansal, Raffel, "Merging by matching models in task parameter subspaces".

arXiv 2312.04339. The merged parameters solve (sum w_i C_i) theta = sum w_i C_i theta_i with the
conjugate gradient method, from a chosen start and for a chosen number of iterations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from torch import Tensor

from mats_lightning.merging.blocks import (
    check_statistics,
    covering_statistic,
    task_operators,
    uncovered_value,
)
from mats_lightning.merging.models import (
    Weights,
    check_models,
    check_weights,
    parameters,
    weighted_mean,
)
from mats_lightning.merging.preconditioner import block_preconditioner
from mats_lightning.solvers import conjugate_gradient
from mats_lightning.statistics import Statistics

# objective -> the statistics that give C_i, in order of preference for each parameter
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "average": ("identity",),
    "diagonal_fisher": ("diagonal_fisher",),
    "gram": ("gram",),
    "kfac": ("kfac", "block_fisher"),
}
OnBlock = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Block:
    """How the solve of one parameter went."""

    statistic: str
    iterations: int
    residuals: list[float]  # |b - C theta| / |b| after 0, 1, ... iterations
    converged: bool


@dataclass(eq=False)
class MergeResult:
    """The merged state dict, the evidence for each block, and what no statistic covered."""

    state_dict: dict[str, Tensor]
    blocks: dict[str, Block] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)


@overload
def mats(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    *,
    iterations: int = ...,
    objective: str | Sequence[str] = ...,
    init: str | Weights = ...,
    preconditioner: str | None = ...,
    preconditioner_damping: float = ...,
    off_diagonal: float = ...,
    damping: float = ...,
    floor: float = ...,
    normalize: bool = ...,
    tolerance: float = ...,
    weights: Sequence[float] | None = ...,
    uncovered: str = ...,
    pretrained: Weights | None = ...,
    on_block: OnBlock | None = ...,
) -> MergeResult: ...


@overload
def mats(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    *,
    iterations: Sequence[int],
    objective: str | Sequence[str] = ...,
    init: str | Weights = ...,
    preconditioner: str | None = ...,
    preconditioner_damping: float = ...,
    off_diagonal: float = ...,
    damping: float = ...,
    floor: float = ...,
    normalize: bool = ...,
    tolerance: float = ...,
    weights: Sequence[float] | None = ...,
    uncovered: str = ...,
    pretrained: Weights | None = ...,
    on_block: OnBlock | None = ...,
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
    floor: float = 1e-8,
    normalize: bool = False,
    tolerance: float = 1e-6,
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
        iterations: of CG; a sequence gives the states after each of these counts, from one run,
            as {count: MergeResult}.
        preconditioner: "kronecker" applies the inverse of (sum A) x (sum G) (exact for
            objectives whose sum is of one factor); None is plain CG, as in the paper.
        preconditioner_damping: added to it, relative to the mean eigenvalue of the sum.
        off_diagonal: scales the off-diagonal of A, G and block Fishers (the paper's lambda).
        damping: C_i + damping (mean eigenvalue of C_i) I, on both sides of the equation.
        floor: the least value of a diagonal Fisher.
        normalize: each C_i divided by its mean eigenvalue, a block at a time.
        tolerance: a block whose relative residual is below it is done.
        weights: a number a task.
        uncovered: parameters without a statistic: "average", "pretrained" or "error".
        on_block: called with (name, index, total) before each parameter.

    Raises ValueError for models or statistics that do not fit together, unknown names, negative
    iterations, factors with NaN or inf.
    """
    names, w = check_models(thetas), check_weights(weights, len(thetas))
    check_statistics(thetas, statistics, uncovered, pretrained)
    counts = [iterations] if isinstance(iterations, int) else list(iterations)
    if not counts or min(counts) < 0:
        raise ValueError(f"iterations={iterations}: give counts that are not negative")
    if preconditioner not in ("kronecker", None):
        raise ValueError(f"preconditioner={preconditioner!r}; choose 'kronecker' or None")
    kinds = _kinds(objective)
    start = _start(init, pretrained, thetas)
    results = {count: MergeResult({}) for count in counts}
    fixed: dict[str, Tensor] = {}  # not floating point: equal in all models
    for index, (name, tensors) in enumerate(parameters(names, thetas, fixed)):
        if on_block is not None:
            on_block(name, index, len(names))
        dtype = thetas[0][name].dtype
        kind = covering_statistic(name, kinds, statistics)
        if kind is None:
            value = uncovered_value(name, tensors, w, pretrained, uncovered).to(dtype)
            for result in results.values():
                result.state_dict[name] = value
                result.uncovered.append(name)
            continue
        operators = task_operators(
            name,
            kind,
            statistics,
            tensors[0],
            w,
            off_diagonal=off_diagonal,
            floor=floor,
            damping=damping,
            normalize=normalize,
        )
        x0 = weighted_mean(tensors, w) if start is None else start[name].detach().to(tensors[0])

        def matvec(x: Tensor, operators=operators) -> Tensor:  # type: ignore[no-untyped-def]
            return sum(c.matvec(x) for c in operators)

        solution = conjugate_gradient(
            matvec,
            sum(c.matvec(t) for c, t in zip(operators, tensors, strict=True)),
            x0,
            iterations=max(counts),
            tolerance=tolerance,
            preconditioner=block_preconditioner(operators, preconditioner_damping)
            if preconditioner
            else None,
            keep=counts,
        )
        for count, result in results.items():
            done = min(count, solution.iterations)
            residuals = solution.residuals[: done + 1]
            result.state_dict[name] = solution.kept[count].to(dtype)
            result.blocks[name] = Block(kind, done, residuals, residuals[-1] <= tolerance)
    for result in results.values():
        result.state_dict |= fixed
    return results[counts[0]] if isinstance(iterations, int) else results


def _kinds(objective: str | Sequence[str]) -> tuple[str, ...]:
    known = {kind for kinds in OBJECTIVES.values() for kind in kinds}
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"objective={objective!r}; choose from {', '.join(OBJECTIVES)}")
        return OBJECTIVES[objective]
    if unknown := [kind for kind in objective if kind not in known]:
        raise ValueError(f"no statistic is called {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(objective)


def _start(
    init: str | Weights, pretrained: Weights | None, thetas: Sequence[Weights]
) -> Weights | None:
    """The start as a state dict; None is the average, made a parameter at a time."""
    if isinstance(init, Mapping):
        check_models([thetas[0]], init)
        return init
    if init == "average":
        return None
    if init == "pretrained" and pretrained is not None:
        check_models(thetas, pretrained)
        return pretrained
    if init == "pretrained":
        raise ValueError("init='pretrained' needs pretrained=<state dict>")
    raise ValueError(f"init={init!r}; choose 'average', 'pretrained' or give a state dict")
