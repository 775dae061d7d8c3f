"""Merge, then refresh: each task's head fitted to the merged weights, and training from there.

    python recipes/refresh.py                                    # seven text tasks, MiniLM
    python recipes/refresh.py --fast                             # the same on smaller slices
    python recipes/refresh.py --config recipes/merge_images.yaml # seven image tasks, DINOv2-S
    python recipes/refresh.py --plan.rows 200                    # any field of RefreshPlan
    python recipes/refresh.py --plan.rounds 0                    # heads alone
    python recipes/refresh.py --plan.by solving                  # the merge's equation, again
    python recipes/refresh.py --plan.by solving --plan.mix 1 --plan.fisher sampled \\
        --plan.damping 0.01                                      # a natural-gradient step
    python recipes/refresh.py --rivals                           # and what training would reach
    python recipes/refresh.py --rivals --rival_rates "[1e-5, 1e-4]"

It takes the options of merge.py, and its fine-tunes where they are there. The merge is the row of
`methods` that `--method` names; its settings are chosen on the validation rows, and what merge.py
has measured of it in cells/ is not measured again. Rounds are kept or taken back by the validation
rows too; the table is on the test rows, which nothing looks at before.

    <output_dir>/refresh/results.md, results.csv, results.json, seconds.png
                         rounds-2c81f0aa/                        as mats_lightning.rounds says

An interrupted refresh goes on where it was; `--again` chooses the settings, merges and refreshes
anew, on the fine-tunes that are there.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from bench import Bench, evaluate
from cells import Merge, cells_of_tasks
from compare import INDIVIDUAL, Comparison, Outcome, forget
from finetunes import check_methods_fit, finetuned_tasks, starts
from merge_options import Options, parse_arguments, parser_of
from process import peak_memory, quiet_lightning
from refresh_rivals import Start, train_rival
from refreshed import Before, Tested, folder_of_rounds, run_plan, seconds_of, tested, with_kept
from steps import Steps
from train_tasks import write_json

from mats_lightning import MergeModule, RefreshPlan, Task
from mats_lightning.figures import plot_seconds
from mats_lightning.methods import REFERENCES
from mats_lightning.report import (
    Row,
    average,
    print_table,
    relative,
    write_csv,
    write_markdown,
)
from mats_lightning.rounds import Round


@dataclass
class RefreshOptions:
    """What is set here beside the options of merge.py.

    Args:
        plan: of the refresh; `kept` of one that solves is by default what the merge averages.
        method: label of the merge in `methods`.
        rivals: also train on the same rows: the heads alone on the pretrained model (where the plan
            fits heads), all tasks together from the start, and from the merged weights for the
            seconds that the refresh took.
        rival_rates: the highest learning rates to choose from, for each rival, on validation rows;
            by default that of the fine-tunes alone.
    """

    plan: RefreshPlan = field(default_factory=RefreshPlan)
    method: str = "MaTS kfac, preconditioned"
    rivals: bool = False
    rival_rates: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    row: Row
    seconds: float | None  # since the merge: heads, statistics and steps, or training
    curve: str  # that it is a point of in the figure; "" for none


def main(args: Sequence[str] | None = None) -> list[Line]:
    """Everything, in its order; returns the lines of the table."""
    own, options = parse(args)
    quiet_lightning()
    methods = {own.method: options.methods[own.method]}
    check_methods_fit(options, methods)
    tasks, _ = finetuned_tasks(options)
    cells = cells_of_tasks(options.output_dir, tasks)
    if options.again:
        forget({**INDIVIDUAL, **methods}, cells)
    with Steps() as steps:
        bench = Bench(tasks, *starts(tasks), options.accelerator, cells, steps)
        comparison = Comparison(bench)
        individual, merge = comparison.run(methods)
        assert comparison.best is not None
        opened, count = comparison.best[1], merge.chosen.iterations
        module = opened.module(count)
    module.use(count)
    print(f"{merge.label}: chosen of {len(merge.attempts)}: {merge.chosen.settings}")

    plan = with_kept(own.plan, merge.chosen.settings)
    folder = folder_of_rounds(options.output_dir / "refresh", cells, opened.merge, count, plan)
    if options.again:
        shutil.rmtree(folder, ignore_errors=True)
    before = Before(module)
    rounds = run_plan(bench, module, plan, folder, progress=True)
    tests = tested(bench, module, rounds, folder, merge.scores)
    lines = [Line(individual.row, None, ""), Line(merge.row, 0.0, "refresh"), *lines_of(tests)]
    if own.rivals:
        if plan.heads:
            lines.append(probe(bench, replace(plan, rounds=0)))
        before.put_back(shared=plan.rounds > 0)
        rates = own.rival_rates or [options.learning_rate]
        lines += rivals(options, bench.tasks, module, plan, rates, tests[-1].seconds)
    report(options, plan, lines, rounds, merge)
    return lines


def parse(args: Sequence[str] | None) -> tuple[RefreshOptions, Options]:
    """Our own options, and those of merge.py. Raises SystemExit with the reason, as that does."""
    parser = parser_of("refresh.py", "Merge, and refresh; the options of merge.py and its own.")
    parser.add_class_arguments(RefreshPlan, "plan")
    parser.add_argument("--method", type=str, default=RefreshOptions.method, help="to refresh")
    parser.add_argument("--rivals", action="store_true", help="train on the same rows, too")
    parser.add_argument(
        "--rival_rates", type=list[float], default=[], help="highest learning rates of the rivals"
    )
    options, made = parse_arguments(parser, args)
    own = RefreshOptions(made.plan, made.method, made.rivals, made.rival_rates)
    if own.method not in options.methods:
        parser.error(f"--method {own.method!r} is none of {', '.join(options.methods)}")
    if options.methods[own.method].method in REFERENCES:
        parser.error(f"--method {own.method!r} merges nothing, so there is nothing to refresh")
    return own, options


def lines_of(tests: Sequence[Tested]) -> list[Line]:
    """A line for each round that was taken; round 0 has one where heads were fitted."""
    lines = []
    for test in tests:
        done = test.done
        if done.taken or (done.number == 0 and done.heads):
            words = f"step {done.step:g}, {test.seconds:.0f} s, validation {done.average:.3f}"
            label = f"refresh, round {done.number}" if done.number else "heads alone"
            lines.append(Line(Row(label, words, test.scores), test.seconds, "refresh"))
    return lines


def probe(bench: Bench, plan: RefreshPlan) -> Line:
    """The heads fitted on what all tasks started from: what a merge is worth beside no merge."""
    module = bench.module(Merge("pretrained"))
    (done,) = run_plan(bench, module, plan, folder=None, progress=True)
    scores = evaluate(module, bench.trainer.test)
    words = f"{seconds_of(done):.0f} s, validation {done.average:.3f}"
    label = "trained heads alone, no merge"
    return Line(Row(label, words, scores), seconds_of(done), label)


def rivals(
    options: Options,
    tasks: Sequence[Task],
    module: MergeModule,
    plan: RefreshPlan,
    rates: Sequence[float],
    seconds: float,
) -> list[Line]:
    """Training from the start, and from the merge that is in the module for these seconds."""
    lines = []
    for label, start in (("together", None), ("from the merge", Start(module, seconds))):
        if start is not None and seconds <= 0:
            continue
        tried = {rate: train_rival(options, tasks, plan, rate, start) for rate in rates}
        rate, best = max(tried.items(), key=lambda entry: entry[1].average)
        words = f"{best.steps} steps at {rate:g}, {best.seconds:.0f} s"
        name = f"trained {label} on {plan.rows} rows"
        lines.append(Line(Row(name, words, best.tested()), best.seconds, name))
    return lines


def report(
    options: Options,
    plan: RefreshPlan,
    lines: Sequence[Line],
    rounds: Sequence[Round],
    merge: Outcome,
) -> None:
    """The table on the console and in files, the figure, and all numbers as JSON."""
    rows, folder = [line.row for line in lines], options.output_dir / "refresh"
    print_table(rows, "test accuracy; seconds are those of heads and steps, or of training")
    write_markdown(rows, folder / "results.md")
    write_csv(rows, folder / "results.csv")
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if line.curve:
            curves.setdefault(line.curve, []).append((line.seconds or 0.0, average(line.row)))
    plot_seconds(curves, folder / "seconds.png", individual=average(rows[0]))
    summary = {
        "options": options.as_json(),
        "plan": asdict(plan),
        "merge": merge.as_json(),
        "rounds": [asdict(done) for done in rounds],
        "table": [
            {
                "label": line.row.method,
                "settings": line.row.settings,
                "seconds": line.seconds,
                "test_scores": line.row.scores,
                "test_average": average(line.row),
                "relative": relative(line.row.scores, rows[0].scores),
            }
            for line in lines
        ],
        "peak_memory_gb": peak_memory(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(folder / "results.json", summary)
    print(f"All results are in {folder}")


if __name__ == "__main__":
    main()
