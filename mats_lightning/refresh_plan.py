"""The plan of a refresh, and what goes with it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import lightning.pytorch as pl

from mats_lightning.heads import ITERATIONS
from mats_lightning.merging.models import check_range
from mats_lightning.merging.results import objective_kinds
from mats_lightning.sampled import FISHERS, Fisher, LogitsFn, choose_fisher

LABELS = ("data", "teacher")
WAYS = ("solving", "training")
JUDGES = ("score", "loss")
OF_STATISTICS = (
    "mask_fn",
    "loss_reduction",
    "batch_size_fn",
    "max_factor_size",
    "weight_sharing",
    "adapted_weights",
)


@dataclass(frozen=True)
class RefreshPlan:
    """What a refresh does; all of it is kept in its folder, and most on the model card.

    Arguments:
        rounds: steps of the shared parameters, at most; one that cannot be kept is the last. A
            folder may hold more: they stay there. 0 is for heads alone.
        by: how a round finds its step: by "training" on the rows, heads along with what is shared
            (`joint_training.train_together`), or by "solving" an equation, with curvature that is
            taken anew (`merging.refresh_step`).
        heads: iterations to choose from, a task at a time on its validation rows, when its own head
            is fitted to the merged weights (`heads.fit_head`): of the merge, and of each step that
            is tried. () leaves heads as they are.
        rows: of each task, the same in every round.
        epochs: of the training, over the rows.
        learning_rate: of the training (`train_together` says what becomes of it).
        mix: what is solved (`merging.refresh_step`): 0 is the merge's equation, 1 a
            natural-gradient step. With mix > 0 take fisher="sampled", and a damping (0.01, say):
            the gradient of few rows has noise where they have no curvature.
        iterations: of the conjugate gradient method.
        damping: of the curvatures' sum, relative to its mean eigenvalue.
        preconditioner_damping: that of the preconditioner.
        radius: where a block ends, in distances of the tasks' own weights; None for no end.
        normalize: whether each task's curvature is divided by its mean eigenvalue.
        objective: which curvature, as in `mats`.
        step: how far to go of what is solved for or trained, at first.
        kept: regular expressions for names of parameters that stay as they are.
        fisher: of the curvature: "empirical" or "sampled".
        labels: that heads are fitted to, of the training, the gradient and the empirical Fisher:
            what the task's own model predicts ("teacher", which needs `logits_fn` and no labels,
            and classes, of which a row has one; see `distillation.soft_targets`), or those of the
            "data".
        decay: what the sums of the rounds before count beside a round's own: averages the
            curvature, not the gradient.
        tries: steps that a round tries, each half of the one before, until validation is no worse
            than before the round. After the last the round is taken back.
        judge: what says so, a mean over tasks: the "loss" to `labels` (the distance to what the
            task's own model predicts, or the module's training_step on validation batches), which
            tells small differences on few rows, or the "score", their primary metrics.
        seed: of the choice of rows, of drawn labels and of the training's order.

    Raises ValueError for values out of range.
    """

    rounds: int = 1
    by: Literal["training", "solving"] = "training"
    heads: tuple[int, ...] = ITERATIONS
    rows: int = 500
    mix: float = 0.0
    step: float = 1.0
    iterations: int = 5
    damping: float = 0.0
    preconditioner_damping: float = 1e-3
    radius: float | None = 10.0
    normalize: bool = True
    objective: str = "kfac"
    kept: tuple[str, ...] = ()
    fisher: Fisher = "empirical"
    epochs: int = 2
    learning_rate: float = 2e-5
    labels: Literal["teacher", "data"] = "teacher"
    decay: float = 0.0
    tries: int = 3
    judge: Literal["loss", "score"] = "loss"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "rows", "iterations", "tries", "epochs"):
            number, lowest = getattr(self, name), int(name != "rounds")
            if not isinstance(number, Integral) or number < lowest:
                raise ValueError(f"{name}={number}; it must be a whole number, {lowest} or more")
        if isinstance(self.heads, int):
            raise ValueError(f"heads={self.heads}; it must be a tuple, ({self.heads},)")
        if not self.rounds and not self.heads:
            raise ValueError("rounds=0 and heads=(): there is nothing to do")
        if any(count < 1 for count in self.heads):
            raise ValueError(f"heads={self.heads}; iterations from 1 on are needed")
        for name in ("mix", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; it lies between 0 and 1")
        for name in ("step", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}; it must be a positive number")
        for name in ("damping", "preconditioner_damping", "radius"):
            check_range(name, getattr(self, name) or 0.0)
        choices = {"by": WAYS, "fisher": FISHERS, "labels": LABELS, "judge": JUDGES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose from {', '.join(known)}")
        if "identity" in objective_kinds(self.objective):
            raise ValueError(f"objective={self.objective!r} has no statistics to take again")

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is taken of each task."""
        return (*objective_kinds(self.objective), *(["gradient"] if self.mix > 0 else []))


def check_arguments(
    plan: RefreshPlan,
    trainer: pl.Trainer,
    tasks: Collection[str],
    logits_fn: LogitsFn | None,
    loaders: Mapping[str, Iterable[Any]],
    options: Mapping[str, Any],
) -> None:
    """Raises ValueError for what `refresh` was given and cannot do; `options` are of statistics."""
    if trainer.precision.endswith("-true") and trainer.precision != "32-true":
        raise ValueError(
            f"the trainer has precision={trainer.precision!r}, which converts the tasks' modules"
            " when they are validated: convert them before, module.bfloat16(), and pass"
            " Trainer(precision='32-true'), which leaves them as they are"
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"the trainer has {trainer.world_size} devices: a refresh takes its statistics on one;"
            " pass Trainer(devices=1)"
        )
    if plan.fisher == "sampled":
        choose_fisher(plan.fisher, logits_fn, plan.seed, draws=1)  # raises without logits_fn
    if plan.labels == "teacher" and logits_fn is None:
        raise ValueError(
            "labels='teacher' needs the logits of the tasks' modules: pass logits_fn=lambda"
            " module, batch: ...; or give RefreshPlan(labels='data')"
        )
    if options and plan.by != "solving":
        raise ValueError(
            f"statistics_options={sorted(options)}, and by={plan.by!r} takes no statistics: leave"
            " them out, or take RefreshPlan(by='solving')"
        )
    if refused := sorted(options.keys() - OF_STATISTICS):
        raise ValueError(
            f"statistics_options: '{refused[0]}' is none of {', '.join(OF_STATISTICS)}; the plan"
            " and the other arguments say all else"
        )
    if "loss_reduction" in options and plan.labels == "teacher":
        raise ValueError(
            "statistics_options: the loss towards a teacher is a mean; loss_reduction goes with"
            " RefreshPlan(labels='data')"
        )
    if unknown := sorted(set(loaders) - set(tasks)):
        known = ", ".join(tasks)
        raise ValueError(f"loaders: '{unknown[0]}' is no task; the tasks are {known}")
    if once := [task for task, batches in loaders.items() if isinstance(batches, Iterator)]:
        raise ValueError(
            f"loaders: the batches of '{once[0]}' can be read once, and a refresh reads them more"
            " often: give a list or a DataLoader"
        )
