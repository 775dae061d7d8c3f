"""A refresh on a bench: its rounds tested, and the module put to any of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import Bench, evaluate
from cells import Cells, Merge
from classifier import logits
from train_tasks import folder_of

from mats_lightning import MergeModule, RefreshPlan, refresh
from mats_lightning.merging import MergeResult
from mats_lightning.rounds import Folder, Round

FITTING = ("heads", "rows", "labels", "seed")  # fields of a plan that decide its round 0


@dataclass(frozen=True)
class Tested:
    """Where a refresh stood after one round.

    Args:
        done: the round.
        seconds: since the merge: statistics, steps and heads, without the validation that only
            decides.
        scores: task -> primary metric on test rows; after a round that was taken back those of the
            round before.
    """

    done: Round
    seconds: float
    scores: dict[str, float]


def with_kept(plan: RefreshPlan, options: Mapping[str, Any]) -> RefreshPlan:
    """What a plan that solves keeps is by default what the merge with these options averages."""
    averaged = options.get("averaged", [])
    names = (averaged,) if isinstance(averaged, str) else tuple(averaged)
    return plan if plan.kept or plan.by == "training" else replace(plan, kept=names)


def key_of(merge: Merge, count: int, plan: RefreshPlan, number: int, split: str) -> dict[str, Any]:
    """Of the cell after this round of a refresh of the merge after `count` iterations."""
    settings = {name: value for name, value in asdict(plan).items() if name != "rounds"}
    if not number:  # before any step
        settings = {name: settings[name] for name in FITTING} if plan.heads else {}
    return {**merge.key(count, split), "plan": settings, "round": number}


def folder_of_rounds(
    parent: Path, cells: Cells, merge: Merge, count: int, plan: RefreshPlan
) -> Path:
    """One for all that decides a refresh but for the number of rounds.

    Of the fine-tunes these are the trainings: rounds do not go on from those of others.
    """
    return folder_of(parent, "rounds", {**cells.about, **key_of(merge, count, plan, 1, "")})


def run_plan(
    bench: Bench, module: MergeModule, plan: RefreshPlan, folder: Path | None, progress: bool
) -> list[Round]:
    """The rounds, from the folder or run now; the last one's state is in the module."""
    return refresh(
        module, plan, trainer=bench.trainer, folder=folder, logits_fn=logits, progress=progress
    )


def tested(
    bench: Bench,
    module: MergeModule,
    rounds: Sequence[Round],
    folder: Path,
    merge: Mapping[str, float] | None = None,
) -> list[Tested]:
    """Each round on the test rows, where `merge` has known scores; the last one's state stays."""
    found: list[Tested] = []
    for done in rounds:
        if not (done.number or done.heads or merge is None):
            scores = dict(merge)
        elif done.taken or not found:
            put(module, folder, done, shared=len(rounds) > 1)
            scores = evaluate(module, bench.trainer.test)
        found.append(Tested(done, sum(map(seconds_of, rounds[: done.number + 1])), scores))
    return found


def seconds_of(done: Round) -> float:
    """What a round took; without the validation that only decides."""
    return sum(taken for part, taken in done.seconds.items() if part != "validation")


def put(module: MergeModule, folder: Path, done: Round, shared: bool) -> None:
    """The heads after a round that was taken, and what is `shared`, if rounds change it."""
    kept = Folder(folder)
    if shared:
        module.replace_shared(MergeResult(kept.state(done.number)), {"rounds": done.number})
    if heads := kept.heads(done):
        module.replace_heads(heads, {"rounds": done.number})


class Before:
    """A module's weights and heads as they are now, to be put back."""

    def __init__(self, module: MergeModule) -> None:
        self._module = module
        self._shared, self._heads = module.shared_state(), module.own_heads()

    def put_back(self, shared: bool = True) -> None:
        """`shared`: what is merged too, and not the heads alone."""
        if shared:
            self._module.replace_shared(MergeResult(self._shared), {})
        self._module.replace_heads(self._heads, {})
