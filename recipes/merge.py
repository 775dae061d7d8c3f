"""Fine-tune, merge by every method, and compare on all tasks, in one run:

    python recipes/merge.py                                    # seven text tasks, MiniLM
    python recipes/merge.py --fast                             # the same on smaller slices
    python recipes/merge.py --config recipes/merge_images.yaml # seven image tasks, DINOv2-S
    python recipes/merge.py --tasks '[trec, sms]' --output_dir runs/two
    python recipes/merge.py --config my.yaml                   # any models and data of the hub

merge.yaml says what can be set. Fine-tunes that are finished are kept, and an interrupted one goes
on from its last epoch. So do the merges: what was measured is in cells/ (see cells.py), and is not
measured again by the same version of mats_lightning; `--again` forgets what is measured of these
methods on these fine-tunes: give it after a change in the code. `output_dir` then holds results.md,
results.csv, results.json (each point of each grid, seconds, memory), scores.png, residuals.png,
merged/ (the best merge, for `AutoModel.from_pretrained`, or, of adapters, for
`PeftModel.from_pretrained`) and tasks/ (checkpoints and statistics).
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import Bench
from cells import cells_of_tasks
from compare import INDIVIDUAL, Comparison, Outcome, forget
from finetunes import check_methods_fit, finetuned_tasks, starts
from merge_options import parse_options
from process import peak_memory, quiet_lightning
from steps import Steps
from train_tasks import write_json

from mats_lightning.figures import plot_residuals, plot_scores
from mats_lightning.report import print_table, write_csv, write_markdown


def main(args: Sequence[str] | None = None) -> list[Outcome]:
    """Everything, in its order; returns the lines of the table."""
    options = parse_options(args)
    quiet_lightning()
    check_methods_fit(options, options.methods)
    clock = [time.perf_counter()]
    tasks, trained = finetuned_tasks(options)
    clock.append(time.perf_counter())
    cells = cells_of_tasks(options.output_dir, tasks)
    if options.again:
        forget({**INDIVIDUAL, **options.methods}, cells)
    with Steps() as steps:
        bench = Bench(tasks, *starts(tasks), options.accelerator, cells, steps)
        comparison = Comparison(bench)
        outcomes = comparison.run(options.methods)
    clock.append(time.perf_counter())
    report(outcomes, options.output_dir)
    clock.append(time.perf_counter())
    seconds = [round(b - a, 1) for a, b in itertools.pairwise(clock)]
    summary: dict[str, Any] = {
        "options": options.as_json(),
        "finetuning": trained,
        "methods": [outcome.as_json() for outcome in outcomes],
        "exported": None,
        "seconds": dict(zip(("finetuning", "comparison", "report"), seconds, strict=True)),
        "peak_memory_gb": peak_memory(),
    }
    write_json(options.output_dir / "results.json", summary)  # before what may be refused
    summary["exported"] = export(comparison, options.output_dir / "merged")
    summary["peak_memory_gb"] = memory = peak_memory()
    write_json(options.output_dir / "results.json", summary)
    print(
        f"{time.perf_counter() - clock[0]:.0f} s, {seconds[0]:.0f} of them fine-tuning"
        + (f"; peak memory {memory:.1f} GB" if memory else "")
        + f". All results are in {options.output_dir}"
    )
    return outcomes


def report(outcomes: Sequence[Outcome], folder: Path) -> None:
    """The table on the console, as Markdown and as CSV, and the figures."""
    rows = [outcome.row for outcome in outcomes]
    print_table(rows, "test accuracy; settings chosen on validation")
    write_markdown(rows, folder / "results.md")
    write_csv(rows, folder / "results.csv")
    plot_scores(rows, folder / "scores.png")
    if curves := {outcome.label: outcome.blocks for outcome in outcomes if outcome.blocks}:
        plot_residuals(curves, folder / "residuals.png")


def export(comparison: Comparison, folder: Path) -> str | None:
    """The merge that is best on validation, for AutoModel or peft; returns its label."""
    if comparison.best is None:
        return None
    outcome, opened = comparison.best
    count = outcome.chosen.iterations
    module = opened.module(count)  # merged now, where all of it was measured in an earlier run
    module.use(count)
    module.scores = dict(outcome.scores)
    module.export(folder, overwrite=True)
    print(f"the best merge on validation, {outcome.label}, is in {folder}")
    return outcome.label


if __name__ == "__main__":
    main()
