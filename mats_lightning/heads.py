"""A task's own head, fitted to the merged weights.

A merge leaves heads as they were trained, on what the task's own body gave them. The merged body
gives them something else: where tasks lie far apart, most of what a merge seems to lose is lost
there and not in the body (Yang et al., "Representation surgery for multi-task model merging", arXiv
2402.02705, add a module for it; here the head itself learns). A head is small, the body stays, and
so its outputs are computed once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mats_lightning.batches import batch_size
from mats_lightning.names import plain_name
from mats_lightning.passes import LossFn, evaluating, loss_of, to_device, training_alone
from mats_lightning.replay import Replay, Tape

ITERATIONS = (1, 2, 5, 10, 20, 50, 100, 200)
EVALUATIONS = 25  # of the loss in a line search, at most


@dataclass(frozen=True)
class HeadFit:
    """What came out; the head is in the module.

    Arguments:
        state: parameter -> value.
        iterations: that it took; 0 leaves the head as it was.
        losses: iterations -> the mean loss of the rows.
        scores: iterations -> what `score` gave; empty without.
    """

    state: dict[str, Tensor]
    iterations: int
    losses: dict[int, float]
    scores: dict[int, float]


def fit_head(
    module: nn.Module,
    batches: Iterable[Any],
    head: Iterable[str],
    *,
    iterations: Sequence[int] = ITERATIONS,
    loss_fn: LossFn | None = None,
    score: Callable[[], float] | None = None,
    others: Sequence[nn.Module] = (),
) -> HeadFit:
    """Fit some parameters of a module to rows; all else in it stays as it is.

    L-BFGS (torch's, with strong Wolfe line search) on the mean loss of all rows, in eval mode. Few
    rows and many iterations fit a head to the rows alone: each number of `iterations` gives one, 0
    the head as it was, and the one with the best score stays. What does not depend on the head runs
    once, and is held in memory: its outputs for all rows.

    Arguments:
        module: the task's, with the merged weights in it.
        batches: of the task's rows, on which the loss is a mean over the rows of a batch.
        head: names of the parameters to fit.
        iterations: to choose from by `score`; without one the largest is taken.
        loss_fn: as in collect_statistics.
        score: of the module as it is when called, higher is better; of rows that `batches` does not
            have, in the same order at each call. Of equal ones the fewest iterations win.
        others: modules that `loss_fn` runs as well, a teacher, say.

    Raises ValueError for names that are no parameters of the module, a head in float16, no batches,
    iterations below 1, a loss without gradient or that is not finite, and scores of batches in a
    changing order; the head is then as it was.
    """
    counts = sorted({*iterations})
    if not counts or counts[0] < 1:
        raise ValueError(f"iterations={iterations}: numbers from 1 on are needed")
    names = set(head)
    parameters = {plain_name(n): p for n, p in module.named_parameters() if plain_name(n) in names}
    if not names:
        raise ValueError(f"head is empty: name the parameters of {type(module).__name__} to fit")
    if missing := sorted(names - {*parameters}):
        raise ValueError(f"{missing[0]}: no parameter of {type(module).__name__} to fit as a head")
    if half := [name for name, p in parameters.items() if p.dtype == torch.float16]:
        raise ValueError(
            f"'{half[0]}' is in float16, in which L-BFGS overflows: convert the module, with"
            " module.float() or module.bfloat16()"
        )
    frozen = {p: p.requires_grad for p in parameters.values()}
    gradients = {p: p.grad for p in parameters.values()}
    start = _copy(parameters)
    replay = Replay([module, *others], parameters.values())
    try:
        for parameter in parameters.values():
            parameter.requires_grad_()
        with evaluating(module), training_alone(module, parameters), torch.enable_grad():
            states, losses = _states(module, batches, parameters, counts, loss_fn, replay)
        if score is None:
            best, scores = counts[-1], {}
        else:
            scores = _scores(parameters, states, score, replay)
            best = max(scores, key=lambda count: (scores[count], -count))
    except BaseException:
        _put(parameters, start)
        raise
    finally:
        for parameter, required in frozen.items():
            parameter.requires_grad_(required)
            parameter.grad = gradients[parameter]
    _put(parameters, states[best])
    return HeadFit(states[best], best, losses, scores)


def _states(
    module: nn.Module,
    batches: Iterable[Any],
    parameters: Mapping[str, Tensor],
    counts: Sequence[int],
    loss_fn: LossFn | None,
    replay: Replay,
) -> tuple[dict[int, dict[str, Tensor]], dict[int, float]]:
    """The head after 0 and each of these iterations, and the losses; the last is in place."""
    values = list(parameters.values())
    rows = [to_device(module, batch, values[0].device) for batch in batches]
    if not rows:
        raise ValueError("no rows to fit a head to: `batches` is empty (or used up?)")
    sizes = [batch_size(batch) for batch in rows]

    def mean_loss() -> Tensor:
        """And its gradients, as L-BFGS wants them."""
        wide = torch.promote_types(values[0].dtype, torch.float32)
        total = torch.zeros((), device=values[0].device, dtype=wide)
        for value in values:
            value.grad = torch.zeros_like(value)
        for index, (batch, size) in enumerate(zip(rows, sizes, strict=True)):
            loss = loss_of(module, batch, index, loss_fn) * (size / sum(sizes))
            for value, gradient in zip(
                values, torch.autograd.grad(loss, values, allow_unused=True), strict=True
            ):
                if gradient is not None and value.grad is not None:
                    value.grad += gradient
            total += loss.detach()
        return total

    with replay.recording() as tape:
        mean_loss()

    # the points of a line search, with loss and gradients: the next step begins at one of them
    known: deque[tuple[list[Tensor], Tensor, list[Tensor | None]]] = deque(maxlen=EVALUATIONS)

    def replayed() -> Tensor:
        for point, loss, gradients in known:
            if all(map(torch.equal, values, point)):
                for value, gradient in zip(values, gradients, strict=True):
                    value.grad = gradient
                known.clear()
                return loss
        with replay.playing(tape):
            loss = mean_loss()
        known.append(([v.detach().clone() for v in values], loss, [v.grad for v in values]))
        return loss

    optimizer = torch.optim.LBFGS(
        values, max_iter=1, max_eval=EVALUATIONS, history_size=20, line_search_fn="strong_wolfe"
    )
    states: dict[int, dict[str, Tensor]] = {0: _copy(parameters)}
    losses: dict[int, float] = {}
    last, state = 0.0, states[0]
    for count in range(1, counts[-1] + 1):
        last = float(optimizer.step(replayed))  # before the step
        if count - 1 in states:
            losses[count - 1] = last
        if all(torch.equal(parameters[name], state[name]) for name in parameters):
            rest = [later for later in counts if later >= count]  # it has arrived
            return states | dict.fromkeys(rest, state), losses | dict.fromkeys(rest, last)
        state = _copy(parameters)
        if count in counts:
            states[count] = state
    losses[counts[-1]] = float(replayed())
    return states, losses


def _scores(
    parameters: Mapping[str, Tensor],
    states: Mapping[int, Mapping[str, Tensor]],
    score: Callable[[], float],
    replay: Replay,
) -> dict[int, float]:
    scores: dict[int, float] = {}
    tape: Tape | None = None
    for count, state in sorted(states.items()):
        same = [known for known in scores if states[known] is state]
        if same:
            scores[count] = scores[same[0]]
            continue
        _put(parameters, state)
        if tape is None:
            with replay.recording() as tape:
                scores[count] = score()
        else:
            with replay.playing(tape):
                scores[count] = score()
    return scores


def _copy(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _put(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
