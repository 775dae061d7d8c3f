"""A step from merged weights, with statistics taken at them.

Curvature that is taken at each task's own weights says little where the tasks lie far apart.
Taken again at the merged point theta_m, with the gradient grad_i of each task's mean loss there,

    (sum w_i C_i + damping I) delta = (1 - mix) sum w_i C_i (theta_i - theta_m) - mix sum w_i grad_i
    theta <- theta_m + step delta

With mix = 0 this is the equation of MaTS (arXiv 2312.04339, eq. 3), solved again from theta_m:
its fixed point is where the models match in these parameters, which is not where the losses are
least. With mix = 1 it is a step of Newton's method on sum w_i loss_i with C_i for the Hessian
(Gauss-Newton, or the natural gradient: Martens, arXiv 1412.1193), which needs no theta_i, and
rests where the losses' gradients cancel.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mats_lightning.merging.block_solver import BlockSolver
from mats_lightning.merging.covering import (
    check_covering,
    covering_statistics,
    parameters_with,
)
from mats_lightning.merging.curvatures import balance, task_curvatures
from mats_lightning.merging.forms import MatrixForm, matrix_form, statistic_name
from mats_lightning.merging.models import (
    Weights,
    check_counts,
    check_models,
    check_range,
    check_weights,
    counted,
    distance,
    merge_dtype,
    of_batch_norm,
)
from mats_lightning.merging.results import Block, MergeResult, OnBlock, objective_kinds
from mats_lightning.operators import Operator, sum_of_products, undamped
from mats_lightning.statistics import Statistics

OF_LOSS = ("kfac", "block_fisher", "diagonal_fisher")  # curvatures with the scale of the loss


def refresh_step(
    merged: Weights,
    statistics: Sequence[Statistics],
    thetas: Sequence[Weights] | None = None,
    *,
    mix: float = 0.0,
    step: float = 1.0,
    objective: str | Sequence[str] = "kfac",
    iterations: int = 5,
    preconditioner: str | None = "kronecker",
    preconditioner_damping: float = 1e-3,
    off_diagonal: float = 1.0,
    damping: float = 0.0,
    radius: float | None = 10.0,
    floor: float = 1e-8,
    normalize: bool = True,
    tolerance: float = 1e-6,
    kept: str | Sequence[str] = (),
    weights: Sequence[float] | None = None,
    on_block: OnBlock | None = None,
) -> MergeResult:
    """theta_m + step delta, a parameter at a time; see the module for the equation.

    Arguments:
        merged: theta_m. Parameters without a statistic of all tasks stay as they are there, and are
            named in the result's `uncovered`, unless they are `kept`. Buffers stay, too.
        statistics: one a task, taken at `merged` (check_belongs of mats_lightning.sidecar says
            whether they are). With mix > 0 they need "gradient", and should be of the sampled
            Fisher: the empirical one vanishes with the gradient, and is no Hessian.
        thetas: the tasks' own weights, in the order of the statistics; not read with mix = 1.
        mix: between 0 and 1.
        step: what delta is multiplied by.
        damping: on the left side alone, times the mean eigenvalue of sum w_i C_i (of the
            parameter): it makes the step shorter where there is little curvature.
        radius: as in `mats`, around theta_m, of delta: `step` is not counted. Of no effect with
            mix = 1, where the tasks' own weights are not known.
        normalize: w_i / (mean eigenvalue of C_i) in place of w_i, a block at a time, in front of
            the gradient too: a step of Newton's method on the losses with these weights. They
            differ between the blocks, so many rounds with mix > 0 do not come to rest at the
            minimum of one sum of losses: leave it out for that. A task without any curvature in
            a block has no part in it.
        kept: regular expressions; parameters that have one of them in a name stay as they are.
        iterations: of CG, one number.
        objective, preconditioner, preconditioner_damping, off_diagonal, floor, weights, on_block:
            as in `mats`. `tolerance` is relative to the right-hand side.

    Raises ValueError as `mats` does, and for missing gradients or thetas, or for an objective
    whose curvature has not the scale of the loss (gram, average) with mix > 0.
    """
    check_range("mix", mix, highest=1)
    names, w = check_models([merged]), check_weights(weights, len(statistics))
    thetas = _checked_thetas(merged, statistics, thetas, w, mix)
    statistics, w = counted(statistics, w), counted(w, w)
    lengths = {"damping": damping, "floor": floor, "radius": radius or 0.0}
    for option, value in {"step": step, **lengths}.items():
        check_range(option, value)
    solver = BlockSolver(preconditioner, preconditioner_damping, tolerance)
    check_range("off_diagonal", off_diagonal, highest=1)
    if iterations < 0:
        raise ValueError(f"iterations={iterations}: it cannot be negative")
    kinds = objective_kinds(objective)
    stay = parameters_with(kept, names, "kept", statistics)
    kind_of = covering_statistics(names, kinds, statistics)
    moving = [name for name in names if name not in stay] or names
    check_covering(kind_of, moving, kinds, statistics, "kept")
    for name in stay:
        kind_of.pop(name, None)
    if mix > 0:
        _check_gradients(kind_of, statistics)
    result = MergeResult({})
    for index, name in enumerate(names):
        if on_block is not None:
            on_block(name, index, len(names))
        before = merged[name].detach()
        if name not in kind_of or not before.is_floating_point():
            result.state_dict[name] = before.clone()
            of_none = name not in stay and not of_batch_norm(name, names)
            if before.is_floating_point() and of_none:
                result.uncovered.append(name)
            continue
        theta_m = before.to(merge_dtype([before]))
        form = matrix_form(name, kind_of[name], statistics[0], theta_m.shape)
        try:
            operators, scales = balance(
                task_curvatures(
                    name,
                    kind_of[name],
                    statistics,
                    theta_m,
                    off_diagonal=off_diagonal,
                    floor=floor,
                ),
                w,
                damping,
                normalize,
            )
            b = torch.zeros_like(form.of(theta_m))
            if mix < 1:
                b += (1 - mix) * _match(form, operators, thetas, theta_m, name)
            if mix > 0:
                b -= mix * _slope(form, scales, statistics, theta_m, name)
            reach = math.inf
            if radius is not None and thetas:
                away = [theta[name].detach().to(theta_m) for theta in thetas]
                reach = radius * distance(away, theta_m)
                if mix > 0 and not reach:  # all tasks are there: the gradient says how far to go
                    reach = math.inf
            delta, block = torch.zeros_like(b), Block(kind_of[name], 0, [0.0], True, False)
            if any(scales):  # or else there is no curvature in any task
                solution = solver.solve(operators, b, [iterations], reach)
                delta, block = solution.value, solver.block(kind_of[name], solution, iterations)
        except ValueError as error:
            raise ValueError(f"refresh of '{name}': {error}") from error
        result.blocks[name] = block
        result.state_dict[name] = (theta_m + step * form.back(delta)).to(before.dtype)
    return result


def _checked_thetas(
    merged: Weights,
    statistics: Sequence[Statistics],
    thetas: Sequence[Weights] | None,
    weights: Sequence[float],
    mix: float,
) -> Sequence[Weights]:
    """The weights of the tasks that count; none where they are not needed."""
    if mix == 1:
        return ()
    if thetas is None:
        raise ValueError(f"mix={mix} needs the tasks' own weights: pass thetas=..., or mix=1")
    check_counts(statistics, thetas)
    thetas = counted(thetas, weights)
    check_models(thetas, merged, label="the merged weights")
    if extra := [name for name in merged if name not in thetas[0]]:
        raise ValueError(
            f"'{extra[0]}' is in the merged weights and not in those of the tasks ({len(extra)}"
            " such names): leave it out, or give the weights that were merged"
        )
    return thetas


def _match(
    form: MatrixForm,
    operators: Sequence[Operator],
    thetas: Sequence[Weights],
    theta_m: Tensor,
    name: str,
) -> Tensor:
    """sum s_i C_i (theta_i - theta_m), without the damping."""
    return sum_of_products(
        [undamped(c) for c in operators],
        (form.of(theta[name].detach().to(theta_m) - theta_m) for theta in thetas),
    )


def _slope(
    form: MatrixForm,
    scales: Sequence[float],
    statistics: Sequence[Statistics],
    theta_m: Tensor,
    name: str,
) -> Tensor:
    """sum s_i grad_i, with what each C_i was multiplied by."""
    total = torch.zeros_like(theta_m)
    for scale, task in zip(scales, statistics, strict=True):
        gradient = task.gradient[statistic_name(name, "gradient", task)]
        if gradient.shape != theta_m.shape:
            raise ValueError(
                f"its gradient has shape {tuple(gradient.shape)}, the parameter has"
                f" {tuple(theta_m.shape)}: these statistics are of another architecture"
            )
        total.add_(gradient.to(theta_m), alpha=scale)
    return form.of(total)


def _check_gradients(kind_of: dict[str, str], statistics: Sequence[Statistics]) -> None:
    for name, kind in kind_of.items():
        if kind not in OF_LOSS:
            raise ValueError(
                f"mix > 0 and the objective {kind} of '{name}': its scale is not that of the"
                f" loss, so the length of a step would mean nothing; take {' or '.join(OF_LOSS)}"
            )
        for i, task in enumerate(statistics):
            if statistic_name(name, "gradient", task) not in task.gradient:
                raise ValueError(
                    f"mix > 0 needs the gradient of '{name}', which model {i} does not have: take"
                    ' its statistics with collect_statistics(..., statistics=("kfac",'
                    ' "block_fisher", "gradient"))'
                )
