"""The record of a refresh: its rounds, and the folder in which they are kept."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from mats_lightning.checkpoints import load_weights, save_state
from mats_lightning.files import write_text
from mats_lightning.merging.models import Weights
from mats_lightning.sidecar import SUFFIX

State = dict[str, Tensor]
ROUNDING = 1e-5  # what other threads or another machine change in the norm of a parameter


@dataclass(frozen=True)
class Round:
    """What one round did; number 0 is the merge that was there before, its heads fitted."""

    number: int
    step: float  # that was taken; 0 where every one that was tried made validation worse
    scores: dict[str, float]  # task -> primary metric on validation, after the round
    # step -> what judges, a mean, or NaN; "0" is the merge with its own heads
    tried: dict[str, float]
    # statistics, solve (or training), heads, validation
    seconds: dict[str, float] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)  # task -> iterations, where one was fitted
    losses: dict[str, float] = field(default_factory=dict)  # task -> loss, where losses judge

    @property
    def average(self) -> float:
        return mean(self.scores.values())

    def is_no_worse(self, before: "Round") -> bool:
        """By what the plan's judge says."""
        return self.judged <= before.judged if self.losses else self.judged >= before.judged

    @property
    def judged(self) -> float:
        """The mean loss where losses decide, or else the mean score."""
        return mean((self.losses or self.scores).values())

    @property
    def taken(self) -> bool:
        """Whether the weights are others after it."""
        return self.step > 0


def last_kept(rounds: Sequence[Round]) -> int:
    """The number of the round whose weights stand at the end of these."""
    return max(done.number for done in rounds if done.taken or not done.number)


@dataclass(frozen=True)
class _History:
    """What history.json holds."""

    plan: dict[str, Any]
    tasks: dict[str, Any]
    rounds: list[Round]


class Folder:
    """`history.json`, `round-<n>.safetensors` for round 0 and each that was taken, beside it
    `heads-<n>.safetensors` with its fitted heads, and below `statistics/` the sidecars of the round
    under way (with `decay` of the one before, too).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def history(
        self, plan: Mapping[str, Any], tasks: Mapping[str, Any], start: Weights
    ) -> list[Round]:
        """The rounds that are done; none in a new folder.

        Raises ValueError where they are of another plan (`rounds` aside: more of them may follow),
        of other tasks, or from other weights than `start`, which may also be those after the last
        of them; and for a history that another version wrote. The same merge on another machine
        differs by rounding: what is kept is what goes on.
        """
        known = self._known()
        if known is None:
            return []
        for name, value in _as_kept(plan).items():
            if name != "rounds" and (then := known.plan.get(name)) != value:
                raise ValueError(
                    f"{self.path} holds a refresh with {name}={then!r}, and this one has"
                    f" {value!r}: give the same plan to go on, or another folder"
                )
        of_tasks = _as_kept(tasks)
        for task in sorted(known.tasks.keys() | of_tasks.keys()):
            then, now = known.tasks.get(task), of_tasks.get(task)
            if then != now:
                odd = "is in one of the two alone"
                if then and now:
                    changed = min(w for w in {*then, *now} if then.get(w) != now.get(w))
                    odd = f"has another {changed}"
                raise ValueError(
                    f"{self.path} holds a refresh of other tasks: '{task}' {odd}. Give the same"
                    " tasks to go on, or another folder"
                )
        apart = min(_apart(start, self.state(n)) for n in {0, last_kept(known.rounds)})
        if apart > ROUNDING:
            raise ValueError(
                f"{self.path} holds a refresh that started from other merged weights (a parameter"
                f" differs by {apart:.1e} of its norm): merge as before to go on, or give another"
                " folder"
            )
        return known.rounds

    def _known(self) -> _History | None:
        file = self.path / "history.json"
        if not file.exists():
            return None
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            return _History(**{**known, "rounds": [Round(**done) for done in known["rounds"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not what this version of mats_lightning writes ({error!r}): give"
                " another folder, or go on with the version that wrote it"
            ) from error

    def keep(
        self,
        plan: Mapping[str, Any],
        tasks: Mapping[str, Any],
        rounds: list[Round],
        state: Weights,
        heads: Mapping[str, Weights],
    ) -> None:
        """Write the state and heads after the last of these rounds, then the record of all."""
        self.path.mkdir(parents=True, exist_ok=True)
        last = rounds[-1]
        if last.taken or not last.number:
            save_state(state, self.weights(last.number))
            fitted = {
                f"{quote(task, safe='')}/{name}": tensor
                for task, head in heads.items()
                for name, tensor in head.items()
            }
            if fitted:
                save_state(fitted, self.fitted_heads(last.number))
        done = asdict(_History(dict(plan), dict(tasks), rounds))
        write_text(self.path / "history.json", json.dumps(done, indent=2) + "\n")

    def weights(self, number: int) -> Path:
        return self.path / f"round-{number}.safetensors"

    def fitted_heads(self, number: int) -> Path:
        return self.path / f"heads-{number}.safetensors"

    def state(self, number: int) -> State:
        """The merged weights after this round, which was taken or is 0."""
        return dict(load_weights(self.weights(number)))

    def heads(self, kept: Round) -> dict[str, State]:
        """task -> its fitted head after this round; none where the plan fits none.

        Raises ValueError where the file of a head that was fitted is gone.
        """
        found: dict[str, State] = {}
        if not kept.heads:
            return found
        path = self.fitted_heads(kept.number)
        if not path.exists():
            raise ValueError(
                f"{path} is gone, which holds the fitted heads of {', '.join(kept.heads)}: copy the"
                " whole folder, or give another one to begin again"
            )
        for key, tensor in load_weights(path).items():
            task, _, name = key.partition("/")
            found.setdefault(unquote(task), {})[name] = tensor
        return found

    def sidecar(self, number: int, task: str) -> Path:
        return self.path / "statistics" / f"{number}-{quote(task, safe='')}{SUFFIX}"

    def remove_sidecars(self, before: int) -> None:
        """Those of the rounds before this one."""
        for file in (self.path / "statistics").glob(f"*{SUFFIX}"):
            if int(file.name.partition("-")[0]) < before:
                file.unlink()


def _as_kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """As the file gives them back."""
    kept: dict[str, Any] = json.loads(json.dumps(values))
    return kept


def _apart(found: Weights, kept: Weights) -> float:
    """The largest |found - kept| / |kept| of a tensor; inf where these are not of one model."""
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in kept.items()}:
        return math.inf
    apart = 0.0
    for name, tensor in kept.items():
        other = found[name].cpu()
        if not torch.equal(other, tensor):
            norm = float(tensor.double().norm())
            apart = max(apart, float((other.double() - tensor.double()).norm()) / (norm or 1.0))
    return apart
