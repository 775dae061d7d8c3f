"""What a setting of paper.py says: its options, its seeds, and what each of its tables holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from merge_options import MethodOptions, check_methods

from mats_lightning import RefreshPlan
from mats_lightning.methods import REFERENCES

FOLDER = Path(__file__).with_name("paper")
TABLES = ("methods", "refresh", "starts", "ablations", "cost", "intermediate")


@dataclass(frozen=True)
class Rivals:
    """What training on the rows of a refresh reaches: all tasks together, and from its merge.

    On the first seed alone.

    Args:
        plan: label of the refresh among `plans`; from the merge it is trained for its seconds.
        learning_rates: to choose from, on validation rows.
    """

    plan: str
    learning_rates: list[float]


@dataclass(frozen=True)
class Refresh:
    """Merges refreshed, tested after each round; and what training reaches on the same rows.

    Args:
        plans: fields of RefreshPlan, by a label; the first one is that of `methods`.
        merges: the rows of the setting's methods that all plans refresh, with the settings chosen
            for them; the first one is that of `first_seed` and of the rivals.
        methods: more rows, which the first plan refreshes, on the first seed alone.
        first_seed: more plans, for the first seed alone.
        rivals: if any are trained.
    """

    plans: dict[str, RefreshPlan]
    merges: list[str]
    methods: list[str] = field(default_factory=list)
    first_seed: dict[str, RefreshPlan] = field(default_factory=dict)
    rivals: Rivals | None = None


@dataclass(frozen=True)
class Solver:
    """A way to solve the equation: options of mats, and the iterations that are looked at."""

    iterations: list[int]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Starts:
    """Each objective solved from each start by each solver; the average on validation rows.

    Args:
        labels: rows of `methods` to start from, with the settings that were chosen for them.
        objectives: of mats.
        solvers: by their label.
        options: of mats, for all of them.
    """

    labels: list[str]
    objectives: list[str]
    solvers: dict[str, Solver]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A baseline with something changed.

    Args:
        baseline: its label in `baselines`.
        label: what is changed, in words.
        options: over those of the baseline.
        statistics: arguments of collect_statistics (`rows` instead of max_examples): a pass over
            the first training rows with the final weights, in place of the training's statistics.
    """

    baseline: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] | None = None


@dataclass(frozen=True)
class Ablations:
    """One merge a baseline and a change; the average on validation rows."""

    baselines: dict[str, MethodOptions]
    changes: list[Change]


@dataclass(frozen=True)
class Cost:
    """What a fine-tune, a merge, an evaluation and multitask training take.

    Args:
        batches: training steps of each task that are measured, for each way.
    """

    batches: int = 4


@dataclass(frozen=True)
class Intermediate:
    """A target with few rows, merged with a donor with many; the target alone is scored.

    Args:
        targets: tasks of the suite.
        donors: tasks of the suite; a task is not its own donor.
        few_rows: training rows of the target.
        few_epochs: of its fine-tune.
        donor_weights: the grid of the donor's weight; the target has what is missing to 1.
        methods: what merges the two; their grids are tried with each weight.
    """

    targets: list[str]
    donors: list[str]
    few_rows: int
    few_epochs: int
    donor_weights: list[float]
    methods: dict[str, MethodOptions]


@dataclass(frozen=True)
class Setting:
    """One file of recipes/paper.

    Args:
        options: those of merge.py, over merge.yaml; `methods` and `seed` are said here instead.
        seeds: of the methods, refreshes and intermediate tasks; all else is on the first of them,
            the choice of the methods' options as well.
        methods: rows of the table of methods, by their label.
        multitask: whether multitask training is among them.
        refresh: the table of refreshes, if the setting has one, over the seeds.
        starts: the table of starts, if the setting has one.
        ablations: that of the ablations.
        cost: that of the cost.
        intermediate: that of the intermediate tasks.
    """

    options: dict[str, Any]
    seeds: list[int]
    methods: dict[str, MethodOptions] = field(default_factory=dict)
    multitask: bool = False
    refresh: Refresh | None = None
    starts: Starts | None = None
    ablations: Ablations | None = None
    cost: Cost | None = None
    intermediate: Intermediate | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: one or more different ones are needed, got {self.seeds}")
        if odd := sorted({"methods", "seed", "again"} & self.options.keys()):
            raise ValueError(f"options: {odd[0]!r} is not said there")
        for where, options in self._options_of_mats():
            if "iterations" in options:
                raise ValueError(f"{where}: say iterations with its solver or baseline, not here")
        if self.refresh is not None:
            self._check_refresh(self.refresh)
        if self.starts is not None and (odd := sorted({*self.starts.labels} - {*self.methods})):
            raise ValueError(f"starts: {odd[0]!r} is none of {', '.join(self.methods)}")
        if self.ablations is not None:
            known = self.ablations.baselines
            for label, baseline in known.items():
                if baseline.grid or isinstance(baseline.options.get("iterations"), list):
                    raise ValueError(f"ablations: the baseline {label!r} is one point, not a grid")
            if odd := sorted({c.baseline for c in self.ablations.changes} - {*known}):
                raise ValueError(f"ablations: {odd[0]!r} is none of {', '.join(known)}")

    def _check_refresh(self, refresh: Refresh) -> None:
        for name in ("plans", "merges"):
            if not getattr(refresh, name):
                raise ValueError(f"refresh: {name} has none")
        refreshed = [*refresh.merges, *refresh.methods]
        if twice := [label for label in refreshed if refreshed.count(label) > 1]:
            raise ValueError(f"refresh: {twice[0]!r} is twice among merges and methods")
        for label in refreshed:
            if label not in self.methods:
                raise ValueError(f"refresh: {label!r} is none of {', '.join(self.methods)}")
        plan = next(iter(refresh.plans.values()))
        for label in refresh.methods if plan.rounds else ():
            if self.methods[label].method in REFERENCES:
                raise ValueError(
                    f"refresh: the first plan has rounds={plan.rounds}, and {label!r} merges"
                    " nothing: it can have its heads fitted alone"
                )
        for label in refresh.merges:
            if self.methods[label].method in REFERENCES:
                raise ValueError(f"refresh: {label!r} merges nothing")
        if odd := sorted({*refresh.plans} & {*refresh.first_seed}):
            raise ValueError(f"refresh: {odd[0]!r} is among plans and first_seed")
        if refresh.rivals is not None:
            label, rates = refresh.rivals.plan, refresh.rivals.learning_rates
            if label not in refresh.plans:
                known = ", ".join(refresh.plans)
                raise ValueError(f"refresh: rivals: the plan {label!r} is none of {known}")
            if not rates or any(rate <= 0 for rate in rates):
                raise ValueError(f"refresh: rivals: learning_rates {rates}: one or more above 0")

    def _options_of_mats(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Those beside which the iterations are said."""
        if self.starts is not None:
            yield "starts: options", self.starts.options
            for label, solver in self.starts.solvers.items():
                yield f"starts: options of {label!r}", solver.options
        for change in self.ablations.changes if self.ablations is not None else ():
            yield f"ablations: options of {change.label!r}", change.options

    @property
    def all_methods(self) -> dict[str, MethodOptions]:
        """Those of the methods, of the ablations' baselines and of the intermediate tasks."""
        found = dict(self.methods)
        if self.ablations is not None:
            found |= {f"ablations: {n}": method for n, method in self.ablations.baselines.items()}
        if self.intermediate is not None:
            found |= {f"intermediate: {n}": m for n, m in self.intermediate.methods.items()}
        return found

    @property
    def tables(self) -> list[str]:
        """Those that the file has something of."""
        return [name for name in TABLES if getattr(self, name)]


def read_setting(name: str, fast: bool = False) -> tuple[str, Setting]:
    """The setting of recipes/paper/<name>.yaml, or of the file `name`, and what it is called.

    `fast` takes what the file says under `fast` (each value as a whole, `options` one by one),
    the first value of each grid, [1, 2] for all lists of iterations, and appends "-fast" to the
    output_dir.

    Raises ValueError for a file that does not exist or does not fit.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise ValueError(f"setting: {path} does not exist; choose from {known}, or name a file")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("options"), dict):
        raise ValueError(f"{path}: expected settings by name, `options` among them")
    changes = found.pop("fast", {})
    if fast:
        options = {**found["options"], **changes.pop("options", {})}
        options["output_dir"] = f"{options.get('output_dir', 'runs/paper/' + path.stem)}-fast"
        found = _cut({**found, **changes, "options": options})
    found["options"].setdefault("output_dir", f"runs/paper/{path.stem}")
    parser = ArgumentParser(prog=str(path), exit_on_error=False)
    parser.add_class_arguments(Setting)
    try:
        for holder, name in ((found, "methods"), *_inner_methods(found)):
            check_methods(holder.get(name))
        made = parser.instantiate(parser.parse_object(found))
    except Exception as error:  # jsonargparse raises what the values' types raise
        raise ValueError(f"{path}: {error}") from error
    return path.stem, Setting(**{part.name: made[part.name] for part in fields(Setting)})


def _inner_methods(found: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    places = (("ablations", "baselines"), ("intermediate", "methods"))
    return [(found[part], name) for part, name in places if isinstance(found.get(part), dict)]


def _cut(value: Any) -> Any:
    """The first value of each grid, and two iterations."""
    if not isinstance(value, Mapping):
        return [_cut(entry) for entry in value] if isinstance(value, list) else value
    cut: dict[str, Any] = {}
    for name, entry in value.items():
        if name == "iterations" and isinstance(entry, list):
            cut[name] = [1, 2]
        elif name == "grid":
            cut[name] = {n: [1, 2] if n == "iterations" else v[:1] for n, v in entry.items()}
        else:
            cut[name] = _cut(entry)
    return cut
