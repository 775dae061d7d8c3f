"""Refresh: each task's head fitted to the merged weights, and rounds of steps from there.

    merged weights -> each task's own head, fitted to what they give it
                   -> training on all tasks' rows                                 -> merged weights
                   or each task's statistics at them -> merging.refresh_step      -> merged weights

Where tasks lie far apart, heads that do not fit the merged weights, and curvature that was taken at
each task's own, are what limits a merge. A refresh needs some hundred rows a task; in place of
labels it takes what the task's own model predicts, unless it is told to use them
(labels="data"). `measuring` has the two halves of a round for parties that do not share their rows.
"""

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from mats_lightning.evaluation import quiet_trainer
from mats_lightning.joint_training import which_train
from mats_lightning.judge import Judge
from mats_lightning.merging import MergeResult, refresh_step
from mats_lightning.merging.models import names_with
from mats_lightning.module import MergeModule
from mats_lightning.names import plain_name
from mats_lightning.passes import LossFn, NotFinite
from mats_lightning.refresh_plan import RefreshPlan, check_arguments
from mats_lightning.rounds import Folder, Round, State, last_kept
from mats_lightning.sampled import LogitsFn
from mats_lightning.sidecar import name_of
from mats_lightning.statistics import Statistics
from mats_lightning.statistics.digest import digest
from mats_lightning.task_rounds import TaskRounds
from mats_lightning.tasks import Part


def refresh(
    module: MergeModule,
    plan: RefreshPlan | None = None,
    *,
    trainer: pl.Trainer | None = None,
    folder: str | os.PathLike[str] | None = None,
    logits_fn: LogitsFn | None = None,
    loss_fn: LossFn | None = None,
    loaders: Mapping[str, Iterable[Any]] | None = None,
    statistics_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[Round]:
    """Merge, then some rounds; the module has the best weights after it, for test and export.

    With `plan.heads` the heads that tasks do not share are fitted to the merge first, and again to
    each step that is tried. Each round takes the statistics of every task's training rows at the
    merged weights (in eval mode), or trains them on these rows, takes the step, and validates.
    Validation decides by the average of the tasks' primary metrics, higher being better, or of
    their losses (`plan.judge`): so no score on these rows is a fair one afterwards, and
    `module.scores` is empty until the next test.

    Arguments:
        plan: RefreshPlan() by default: heads fitted, then one round of training, towards what the
            tasks' own models predict.
        module: the merge. Merged heads stay as they are; without `plan.heads` all heads do. Each
            task has the weight that it had in the merge.
        trainer: for `validate`; one device. The default is a quiet one on what there is.
        folder: where each round's weights and scores are kept (see `rounds.Folder`). An
            interrupted refresh goes on from there, in the middle of a round's statistics too.
        logits_fn: (task's module, batch) -> logits, as in collect_statistics; needed with
            fisher="sampled" and labels="teacher".
        loss_fn: (task's module, batch) -> loss, a mean over examples, with labels="data"; by
            default the loss of its training_step.
        loaders: task -> batches, as they come, for tasks whose data is no LightningDataModule:
            heads are fitted to all of them and all are trained on, so they must come again each
            time; statistics stop at `rows`. By default it is the first `rows` of the data module's
            training rows in an order that depends on `seed` alone.
        statistics_options: of collect_statistics, with by="solving": what the callback was given
            when the tasks were fine-tuned, mask_fn, loss_reduction (with labels="data"),
            batch_size_fn, max_factor_size, weight_sharing or adapted_weights.

    Returns the rounds; number 0 is the merge. Raises ValueError for a method that merges nothing or
    merged products of LoRA factors (lora_rank), unless plan.rounds is 0, several devices, a
    precision that converts modules, training loaders that rows cannot be picked from, no head to
    fit where heads are to be, no validation rows, a folder with another refresh, and what merging,
    collecting, training and fitting raise. The module then has the weights after the last round, as
    it has them when the refresh is interrupted.
    """
    plan = plan or RefreshPlan()
    trainer = trainer or quiet_trainer()
    options = dict(statistics_options or {})
    check_arguments(plan, trainer, module.tasks, logits_fn, loaders or {}, options)
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(TemporaryDirectory())
        rounds = TaskRounds(
            module, plan, trainer, logits_fn, loss_fn, loaders or {}, options, progress
        )
        return _Refresh(module, plan, trainer, folder, rounds, progress).run()


class _Refresh:
    def __init__(
        self,
        module: MergeModule,
        plan: RefreshPlan,
        trainer: pl.Trainer,
        folder: str | os.PathLike[str],
        tasks: TaskRounds,
        progress: bool,
    ) -> None:
        self.module, self.plan, self.trainer = module, plan, trainer
        self.device = trainer.strategy.root_device
        self.heads: dict[str, State] = {}  # that were fitted to them
        self.evidence = MergeResult({})  # how the solves of the state went
        self.tasks = tasks
        self.judge = Judge(
            module,
            trainer,
            tasks.loss_fn_of if plan.judge == "loss" else None,
            tasks.statistics_options.get("batch_size_fn"),
        )
        module.merge(self.device, progress)
        # the merged parameters, after the rounds that are done
        self.state = self._in_modules_dtypes(module.shared_state())
        own = {name: block for name, block in module.blocks.items() if name in self.state}
        self.evidence = MergeResult({}, own)
        self.before = module.own_heads()  # of the merge, or fitted to it earlier
        self.how_before = module.refreshed
        if plan.heads and not self.before:
            raise ValueError(
                f"heads={plan.heads}: no task has a head of its own to fit; for steps of what is"
                " merged alone pass heads=(), rounds=1"
            )
        self.kept = names_with(plan.kept, list(self.state), "kept")
        if plan.rounds and plan.by == "training":
            weights = module.task_weights
            taught = [task.module for name, task in module.tasks.items() if weights[name]]
            which_train(taught, self.state, self.kept)  # says now what it cannot do
        self.folder = Folder(Path(folder))
        self.about_tasks = self._about_tasks()
        done = self.folder.history(asdict(plan), self.about_tasks, self.state)
        self.rounds = done[: plan.rounds + 1]
        if plan.rounds:
            self._put([])  # says so where nothing is merged

    def _in_modules_dtypes(self, state: State) -> State:
        """As what runs has them: the merge may have those of the checkpoints."""
        module = next(iter(self.module.tasks.values())).module
        own = {plain_name(name): tensor for name, tensor in module.state_dict().items()}
        return {name: tensor.to(own[name].dtype) for name, tensor in state.items()}

    def _about_tasks(self) -> dict[str, Any]:
        """What decides the rounds beside the plan and the merge: a folder is of these alone."""
        merged_heads = self.module.own_heads()
        options = {name: name_of(value) for name, value in self.tasks.statistics_options.items()}
        functions = {"logits_fn": self.tasks.logits_fn, "loss_fn": self.tasks.loss_fn}
        return {
            name: {
                "metric": task.metric,
                "weight": self.module.task_weights[name],
                "head": digest({n: task.weights[n] for n in merged_heads.get(name, ())}),
                "rows": self.tasks.choice[name],
                "number of validation batches": self.judge.batches(name),
                "statistics_options": options,
                **{name: name_of(function) for name, function in functions.items()},
            }
            for name, task in self.module.tasks.items()
        }

    def run(self) -> list[Round]:
        """See `refresh`; whatever ends it early, the module has the weights of the last round."""
        try:
            return self._run()
        except BaseException:
            how = self._how(self.rounds) if self.rounds else self.how_before
            if self.plan.rounds:
                self.module.replace_shared(replace(self.evidence, state_dict=self.state), how)
            if self.before:
                self.module.replace_heads(self.before | self.heads, how)
            self.module.scores = {}
            raise

    def _run(self) -> list[Round]:
        rounds = self.rounds
        if rounds:
            kept = last_kept(rounds)
            self.state, self.heads = self.folder.state(kept), self.folder.heads(rounds[kept])
            if kept:
                self.evidence = MergeResult({})  # of an earlier process
            self._put(rounds)
        else:
            rounds.append(self._round_0())
            self._keep(rounds)
        while len(rounds) <= self.plan.rounds and (rounds[-1].taken or len(rounds) == 1):
            rounds.append(self._round(len(rounds), rounds))
            self._keep(rounds)
            self.folder.remove_sidecars(before=len(rounds) - (1 if self.plan.decay else 0))
            self._put(rounds)
            last = rounds[-1]
            rank_zero_info(
                f"refresh, round {last.number}: {rounds[-2].average:.4f} -> {last.average:.4f} on"
                f" validation, {_told(rounds[-2:])}"
                + (f"step {last.step:g}" if last.taken else "every step was worse: taken back")
            )
        self.module.scores = {}  # those of the rounds chose them: no card shows them as its own
        return rounds

    def _round_0(self) -> Round:
        """The merge; its heads are then fitted."""
        seconds = {"heads": 0.0, "validation": self.judge.validate()}
        tried: dict[str, float] = {}
        fitted: dict[str, int] = {}
        if self.plan.heads:
            tried["0"] = self.judge.judged
            with _adding_to(seconds, "heads"):
                fitted = self._fit_heads([])
            seconds["validation"] += self.judge.validate()
            self.heads = self._fitted(fitted)
            what = "losses " if self.judge.losses else ""
            now = self.judge.judged
            rank_zero_info(f"refresh, heads: {what}{tried['0']:.4f} -> {now:.4f} on validation")
        scores = dict(self.module.scores)
        return Round(0, 0.0, scores, tried, seconds, fitted, self.judge.losses)

    def _round(self, number: int, before: list[Round]) -> Round:
        """One round from `self.state`, which is then that after it, like `self.heads`."""
        seconds = {"heads": 0.0, "validation": 0.0}
        training = self.plan.by == "training"
        result = self._trained(seconds) if training else self._solved(number, seconds)
        start, step, tried = self.state, self.plan.step, {}
        whole = step if self.plan.by == "solving" else 1.0  # what the result has gone of it
        for _ in range(self.plan.tries):
            state = _between(start, result.state_dict, step / whole)
            how = self._how(before)
            self.module.replace_shared(replace(result, state_dict=state), how)
            self.module.replace_heads(self.heads, how)
            fitted: dict[str, int] = {}
            try:
                if self.plan.heads:
                    with _adding_to(seconds, "heads"):
                        fitted = self._fit_heads(before)
                seconds["validation"] += self.judge.validate()
            except NotFinite:  # the step has destroyed the model
                tried[str(step)] = math.nan
            else:
                scores, losses = dict(self.module.scores), self.judge.losses
                tried[str(step)] = self.judge.judged
                done = Round(number, step, scores, tried, seconds, fitted, losses)
                if done.is_no_worse(before[-1]):
                    self.state, self.evidence = state, result
                    self.heads = self._fitted(fitted)
                    return done
            step /= 2
        return replace(before[-1], number=number, step=0.0, tried=tried, seconds=seconds)

    def _trained(self, seconds: dict[str, float]) -> MergeResult:
        """The state after a step."""
        with _adding_to(seconds, "training"):
            return MergeResult(self.tasks.trained(self.state, self.kept))

    def _solved(self, number: int, seconds: dict[str, float]) -> MergeResult:
        """The same by solving."""
        statistics = self.tasks.statistics(number, self.state, self.folder)
        seconds["statistics"] = sum(task.info["seconds"] for task in statistics)
        with _adding_to(seconds, "solve"):
            result = self._step(statistics)
        if stay := result.uncovered:
            rank_zero_info(
                f"refresh: {len(stay)} parameters without a statistic of this objective stay as"
                f" they are: {', '.join(stay[:4])}{', ...' if len(stay) > 4 else ''}"
            )
        return result

    def _step(self, statistics: list[Statistics]) -> MergeResult:
        plan, names = self.plan, list(self.state)
        device = torch.device("cpu") if self.device.type == "mps" else self.device  # no float64
        return refresh_step(
            Part(self.state, names, device),
            statistics,
            [Part(task.weights, names, device) for task in self.module.tasks.values()],
            mix=plan.mix,
            step=plan.step,
            objective=plan.objective,
            iterations=plan.iterations,
            damping=plan.damping,
            preconditioner_damping=plan.preconditioner_damping,
            radius=plan.radius,
            normalize=plan.normalize,
            kept=plan.kept,
            weights=list(self.module.task_weights.values()),
        )

    def _fitted(self, names: Iterable[str]) -> dict[str, State]:
        """Their heads, as they are."""
        heads = self.module.own_heads()
        return {name: heads[name] for name in names}

    def _fit_heads(self, rounds: list[Round]) -> dict[str, int]:
        """To the weights in place: task -> iterations."""
        fitted, heads = self.tasks.fit_heads(self.judge.score)
        self.module.replace_heads(heads, self._how(rounds))
        return fitted

    def _keep(self, rounds: list[Round]) -> None:
        self.folder.keep(asdict(self.plan), self.about_tasks, rounds, self.state, self.heads)

    def _put(self, rounds: list[Round]) -> None:
        if self.plan.rounds:
            result = replace(self.evidence, state_dict=self.state)
            self.module.replace_shared(result, self._how(rounds))
        if self.heads:
            self.module.replace_heads(self.heads, self._how(rounds))

    def _how(self, rounds: list[Round]) -> dict[str, Any]:
        """For the model card."""
        plan = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.plan).items()}
        return plan | {"rounds": sum(done.taken for done in rounds)}


@contextmanager
def _adding_to(seconds: dict[str, float], what: str) -> Iterator[None]:
    """The time of what is within, whatever ends it."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started


def _told(rounds: Sequence[Round]) -> str:
    """The losses before and after, where they decide."""
    before, after = rounds
    return f"losses {before.judged:.4f} -> {after.judged:.4f}, " if after.losses else ""


def _between(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> State:
    """before + share (after - before); `after` itself for a share of 1, and what is no number."""
    if share == 1:
        return dict(after)
    return {
        name: before[name].to(value).lerp(value, share) if value.is_floating_point() else value
        for name, value in after.items()
    }
