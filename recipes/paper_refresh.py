"""The table of refreshes: merges refreshed by plans, and what training reaches on the same rows."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import Bench, Opened
from cells import Cell, Merge
from paper_records import Record, Table, added
from paper_seeds import Seed
from paper_settings import Refresh, Setting
from paper_tables import chosen_point
from refresh_rivals import Rival, Start, train_rival
from refreshed import Before, folder_of_rounds, key_of, run_plan, tested, with_kept
from steps import Steps

from mats_lightning import MergeModule, RefreshPlan

RIVALS = ("together", "from the merge")
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Line:
    """One merge refreshed by one plan; `point` is None where its settings are not chosen yet."""

    method: str
    label: str  # of the plan
    plan: RefreshPlan
    point: tuple[Merge, int] | None

    def key(self, number: int, split: str) -> dict[str, Any] | None:
        """Of the cell after this round."""
        if self.point is None:
            return None
        return key_of(*self.point, self.plan, number, split)


@dataclass(frozen=True)
class Training:
    """One rival at one learning rate; `point` is the merge that it starts from, if it does."""

    label: str
    rate: float
    point: tuple[Merge, int] | None

    @property
    def words(self) -> str:
        return f"learning rate {self.rate:g}"

    def key(self, plan: RefreshPlan, split: str) -> dict[str, Any]:
        key: dict[str, Any] = {"training_rows": plan.rows, "rows_seed": plan.seed, "split": split}
        if self.point is not None:
            key["start"] = self.point[0].key(self.point[1], split)
            key["plan"] = asdict(plan)  # whose seconds it has
        return {**key, "method": f"trained {self.label}", "learning_rate": self.rate}


class RefreshTable(Table):
    """Each line after each of its rounds on validation and on test rows, and the rivals.

    A round that is taken back changes nothing: its cell repeats the scores before it, and its
    seconds are added. `merge_seconds` of a cell are those of the refresh up to its round.

    Args:
        setting: the file.
        refresh: its part of this table.
        seed: whose fine-tunes are merged.
        first: the seed that chooses; None where it is `seed` itself.
    """

    def __init__(
        self, setting: Setting, refresh: Refresh, seed: Seed, first: Seed | None = None
    ) -> None:
        self.setting, self.refresh, self.seed, self.first = setting, refresh, seed, first
        self.rivals = RIVALS if refresh.rivals is not None and first is None else ()
        self.merge = refresh.merges[0]  # that more is done with

    # -- what there is -----------------------------------------------------------------------

    def lines(self) -> Iterator[Line]:
        (label, plan), *_ = self.refresh.plans.items()
        first = self.first is None
        for method in self.refresh.methods if first else ():
            yield self._line(method, label, plan)
        for method in self.refresh.merges:
            plans = dict(self.refresh.plans)
            if first and method == self.merge:
                plans |= self.refresh.first_seed
            for label, plan in plans.items():
                yield self._line(method, label, plan)

    def _line(self, method: str, label: str, plan: RefreshPlan) -> Line:
        point = self._point(method)
        if point is not None:
            plan = with_kept(plan, point[0].options)
        return Line(method, label, plan, point)

    def _point(self, label: str) -> tuple[Merge, int] | None:
        """What the methods' table has chosen, on the first seed."""
        return chosen_point((self.first or self.seed).cells, self.setting.methods[label])

    def trainings(self, label: str) -> list[Training]:
        """Of one rival, at each learning rate."""
        point = self._point(self.merge) if label == "from the merge" else None
        if label == "from the merge" and point is None:
            return []
        assert self.refresh.rivals is not None
        return [Training(label, rate, point) for rate in self.refresh.rivals.learning_rates]

    def _best(self, tried: list[Training]) -> Training | None:
        """On validation rows; None while one is missing, or what they start from."""
        plan = self._plan_of_rivals()
        cells = [self.seed.cells.at(one.key(plan, "validation")) for one in tried]
        known = [(cell.average, one) for cell, one in zip(cells, tried, strict=True) if cell]
        if not known or len(known) < len(tried):
            return None
        return max(known, key=lambda entry: entry[0])[1]

    def _plan_of_rivals(self) -> RefreshPlan:
        return self._refreshed().plan

    def _refreshed(self) -> Line:
        """What the rivals are held against."""
        assert self.refresh.rivals is not None
        label = self.refresh.rivals.plan
        return self._line(self.merge, label, self.refresh.plans[label])

    def records(self) -> Iterator[Record]:
        for line in self.lines():
            about = self._about(label=line.method, settings=line.label)
            for number in range(line.plan.rounds + 1):
                for split in SPLITS:
                    slot = self.seed.cells.slot(line.key(number, split))
                    yield Record(**about, iterations=number, split=split, **slot)
        for label in self.rivals:
            yield from self._records_of_rival(label)

    def _records_of_rival(self, label: str) -> Iterator[Record]:
        plan = self._plan_of_rivals()
        about = self._about(label=f"trained {label} on {plan.rows} rows")
        tried = self.trainings(label)
        for one in tried:
            slot = self.seed.cells.slot(one.key(plan, "validation"))
            yield Record(**about, settings=one.words, split="validation", **slot)
        best = self._best(tried)
        if best is None:
            yield Record(**about, settings="not chosen yet", split="test")
        else:
            slot = self.seed.cells.slot(best.key(plan, "test"))
            yield Record(**about, settings=best.words, split="test", **slot)

    def _about(self, **more: Any) -> dict[str, Any]:
        return {"seed": self.seed.seed, "table": "refresh", **more}

    # -- measuring ---------------------------------------------------------------------------

    def steps_left(self) -> tuple[int, int]:
        """One a merge and one a plan; one a training, one a rival's test, and one a start."""
        counted = []
        for _, own in groupby(self.lines(), lambda line: line.method):
            done = [self._done(line) for line in own]
            counted.append((1 + len(done), sum(done) + all(done)))
        for label in self.rivals:
            tried, plan = self.trainings(label), self._plan_of_rivals()
            known = [self.seed.cells.at(one.key(plan, "validation")) for one in tried]
            assert self.refresh.rivals is not None
            total = len(self.refresh.rivals.learning_rates)
            tested = self._is_tested(tried)
            counted.append((total + 1, sum(cell is not None for cell in known) + tested))
            if label == "from the merge":
                counted.append((1, int(tested)))
        return added(counted)

    def _is_tested(self, tried: list[Training]) -> bool:
        best = self._best(tried)
        if best is None:
            return False
        return self.seed.cells.at(best.key(self._plan_of_rivals(), "test")) is not None

    def _done(self, line: Line) -> bool:
        return self.seed.cells.at(line.key(line.plan.rounds, "test")) is not None

    def run(self, steps: Steps) -> None:
        bench = self.seed.bench(steps)
        for method, own in groupby(self.lines(), lambda line: line.method):
            if missing := [line for line in own if not self._done(line)]:
                self._run_plans(bench, method, missing)
        for label in self.rivals:
            self._run_rival(bench, label)

    def _run_plans(self, bench: Bench, method: str, lines: list[Line]) -> None:
        """Of one merge."""
        module = self._merged(bench, method)
        before = Before(module)
        for line in lines:
            if self._done(line):  # the rounds of another line have it in them
                bench.steps.expect(0, done=1)
                continue
            found, _ = bench.steps.run(
                f"{method}: {line.label}", self._measure, bench, module, line
            )
            before.put_back(shared=line.plan.rounds > 0)
            bench.steps.say(f"{method}, {line.label}: {found:.3f} on test")

    def _merged(self, bench: Bench, method: str) -> MergeModule:
        point = self._point(method)
        if point is None:
            raise ValueError(f"refresh: the settings of {method} are not chosen yet: run methods")
        merge, count = point
        module = Opened(bench, merge, method).module(count)
        module.use(count)
        return module

    def _measure(self, bench: Bench, module: MergeModule, line: Line) -> float:
        """All rounds, kept as cells; the average on test after the last."""
        assert line.point is not None
        folder = self._folder(line.point, line.plan)
        rounds = run_plan(bench, module, line.plan, folder, progress=False)
        merge = self.seed.cells.find(*line.point, "test")
        states = tested(bench, module, rounds, folder, None if merge is None else merge.scores)
        for number in range(line.plan.rounds + 1):
            state = states[min(number, len(states) - 1)]
            for split, scores in zip(SPLITS, (state.done.scores, state.scores), strict=True):
                key = line.key(number, split)
                if self.seed.cells.at(key) is None:  # plans can have their round 0 in common
                    self._keep(key, scores, state.seconds)
        shutil.rmtree(folder)
        return sum(states[-1].scores.values()) / len(states[-1].scores)

    def _keep(self, key: dict[str, Any] | None, scores: dict[str, float], seconds: float) -> None:
        assert key is not None
        self.seed.cells.keep(key, Cell(scores, 0.0, merge_seconds=seconds))

    def _folder(self, point: tuple[Merge, int], plan: RefreshPlan) -> Path:
        """Of a line's rounds."""
        parent = self.seed.options.output_dir / "refresh"
        return folder_of_rounds(parent, self.seed.cells, *point, plan)

    def _run_rival(self, bench: Bench, label: str) -> None:
        """Each learning rate on validation rows, and the best one on test rows."""
        plan, tried = self._plan_of_rivals(), self.trainings(label)
        if self._is_tested(tried):
            return
        start = None
        if label == "from the merge":
            refreshed = self.seed.cells.at(self._refreshed().key(plan.rounds, "test"))
            assert refreshed is not None  # `run` begins with it
            start = Start(self._merged(bench, self.merge), refreshed.merge_seconds)
        trained: dict[float, Rival] = {}
        for one in tried:
            if self.seed.cells.at(one.key(plan, "validation")) is None:
                found = trained[one.rate] = self._train(bench, one.rate, start)
                self._keep(one.key(plan, "validation"), found.validated, found.seconds)
                bench.steps.expect(0, done=1)
        best = self._best(tried)
        assert best is not None
        # again, where it was trained in an earlier run
        found = trained.get(best.rate) or self._train(bench, best.rate, start)
        self._keep(best.key(plan, "test"), found.tested(), found.seconds)
        bench.steps.expect(0, done=1)

    def _train(self, bench: Bench, rate: float, start: Start | None) -> Rival:
        with bench.steps.paused():
            plan = self._plan_of_rivals()
            return train_rival(self.seed.options, bench.tasks, plan, rate, start)

    def forget(self) -> None:
        for line in self.lines():
            for number in range(line.plan.rounds + 1):
                keys = [line.key(number, split) for split in SPLITS]
                self.seed.cells.forget(key for key in keys if key is not None)
            if line.point is not None:
                shutil.rmtree(self._folder(line.point, line.plan), ignore_errors=True)
        for label in self.rivals:
            for one in self.trainings(label):
                plan = self._plan_of_rivals()
                self.seed.cells.forget(one.key(plan, split) for split in SPLITS)
