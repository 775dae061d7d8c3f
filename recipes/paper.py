"""Check the claims of the MaTS paper (arXiv 2312.04339), a setting at a time:

    python recipes/paper.py --setting text_full           # recipes/paper/text_full.yaml
    python recipes/paper.py --setting text_full --fast    # tiny: that everything runs
    python recipes/paper.py --setting my.yaml --tables methods starts --seeds 0
    python recipes/paper.py --setting text_full --report_only

Each finished cell (one merge, refresh or training, evaluated on one split) is kept in
<output_dir>/cells, so that a run that is killed goes on where it was, and settings with the same
fine-tunes and output_dir share them. `--again` forgets those of the tables and seeds that are run.
The results of the whole setting, whatever was run of it, are written to <output_dir>/results from
what is on disk, a cell that is not there as "missing": <setting>.csv (a line a cell), <setting>.md
(the tables), figures.
Ours, of whole settings, are kept in recipes/results: `--results recipes/results` writes there.
`--known recipes/results/<setting>.csv` takes over what it has of this setting, unchanged, and
measures what it lacks; the fine-tunes that this needs are trained first, and differ from those of
the file in rounding at least.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from cells import Cell
from finetunes import check_methods_fit
from paper_cost import CostTable
from paper_figures import write_figures
from paper_intermediate import TransferTable
from paper_lines import AblationTable, StartTable
from paper_long import read_long, write_long
from paper_records import Record, Table
from paper_refresh import RefreshTable
from paper_report import tables_in
from paper_seeds import Seed
from paper_settings import TABLES, Setting, read_setting
from paper_tables import MethodTable
from process import quiet_lightning
from rich.console import Console
from steps import Steps

from mats_lightning.files import write_text


def main(args: Sequence[str] | None = None) -> list[Record]:
    """Everything, in its order; returns the lines of the long table."""
    parser = arguments()
    asked = parser.parse_args(args)
    try:
        name, setting = read_setting(asked.setting, asked.fast)
        tables = checked("tables", asked.tables, setting.tables)
        numbers = checked("seeds", asked.seeds, setting.seeds)
    except ValueError as error:
        parser.error(str(error))
    if asked.output_dir is not None:
        setting.options["output_dir"] = asked.output_dir
    quiet_lightning()
    print(f"{name}: reading the tasks of {len(setting.seeds)} seeds")
    seeds = [Seed(setting, number) for number in setting.seeds]
    try:
        all_tables = {seed: tables_of(setting, seed, seeds[0]) for seed in seeds}
        known = {} if asked.known is None else read_long(asked.known, seeds[0].tasks)
    except ValueError as error:
        parser.error(str(error))
    every = [table for own in all_tables.values() for table in own.values()]
    take_over(known, every)
    if not asked.report_only:
        check_methods_fit(seeds[0].options, setting.all_methods)
        chosen = {
            seed: [own[table] for table in tables if table in own]
            for seed, own in all_tables.items()
            if seed.seed in numbers
        }
        if known:
            train_first(chosen, asked.again)
            take_over(known, every)
        measure(chosen, asked.again)
    folder = asked.results or seeds[0].options.output_dir / "results"
    return report(name, all_tables, seeds[0].tasks, folder)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paper.py", description=__doc__.partition("\n")[0][:-1])
    parser.add_argument("--setting", required=True, help="of recipes/paper, or a YAML file")
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="default: all of the setting")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the setting")
    parser.add_argument("--fast", action="store_true", help="tiny slices, grids and one seed")
    parser.add_argument("--output_dir", help="over that of the setting")
    parser.add_argument("--results", type=Path, help="default: <output_dir>/results")
    parser.add_argument("--known", type=Path, help="a <setting>.csv whose lines are taken over")
    parser.add_argument("--report_only", action="store_true", help="measure nothing")
    parser.add_argument("--again", action="store_true", help="measure what is there again, too")
    return parser


def checked(what: str, asked: list | None, known: Sequence) -> list:
    """What is asked for of what the setting has; raises ValueError for something else."""
    if odd := [entry for entry in asked or [] if entry not in known]:
        names = ", ".join(map(str, known))
        raise ValueError(f"{what}: the setting has no {odd[0]}, it has {names}; say it in its YAML")
    return [entry for entry in known if entry in (asked or known)]


def tables_of(setting: Setting, seed: Seed, first_seed: Seed) -> dict[str, Table]:
    """Those of a seed: all for the setting's first one, for others those that are over seeds."""
    found: dict[str, Table] = {}
    first = seed is first_seed
    chosen_by = None if first else first_seed
    if setting.methods:
        found["methods"] = MethodTable(setting, seed, chosen_by)
    if setting.refresh is not None:
        found["refresh"] = RefreshTable(setting, setting.refresh, seed, chosen_by)
    if setting.starts is not None and first:
        found["starts"] = StartTable(setting, setting.starts, seed)
    if setting.ablations is not None and first:
        found["ablations"] = AblationTable(setting.ablations, seed)
    if setting.cost is not None and first:
        found["cost"] = CostTable(setting, setting.cost, seed)
    if setting.intermediate is not None:
        found["intermediate"] = TransferTable(setting.intermediate, seed)
    return found


def take_over(known: Mapping[tuple[str, ...], Cell], tables: Sequence[Table]) -> None:
    """Put what is known where it is missing, round by round: choices ask for what is chosen of."""
    while True:
        taken = 0
        for record in (record for table in tables for record in table.records()):
            if record.name in known and record.cell is None and record.keep is not None:
                record.keep(known[record.name])
                taken += 1
        if not taken:
            return


def train_first(seeds: Mapping[Seed, Sequence[Table]], again: bool) -> None:
    """The fine-tunes of tables that have something to measure: cells are of a training."""
    with Steps() as steps:
        for seed, tables in seeds.items():
            # all at once: after a training, cells of the one before are not there
            for table in [table for table in tables if again or is_unfinished(table)]:
                table.train(steps)
            seed.let_go()


def is_unfinished(table: Table) -> bool:
    total, done = table.steps_left()
    return done < total


def measure(seeds: Mapping[Seed, Sequence[Table]], again: bool) -> None:
    """What is missing of the tables, a seed after the other."""
    all_tables = list(itertools.chain.from_iterable(seeds.values()))
    if again:
        for table in reversed(all_tables):  # what is chosen among the methods is in others' keys
            table.forget()
    with Steps() as steps:
        for table in all_tables:
            steps.expect(*table.steps_left())
        for seed, tables in seeds.items():
            steps.say(f"seed {seed.seed}")
            for table in tables:
                if is_unfinished(table):  # nothing is trained for one that is not
                    table.run(steps)
            seed.let_go()


def report(
    name: str, seeds: Mapping[Seed, Mapping[str, Table]], tasks: Sequence[str], folder: Path
) -> list[Record]:
    """Write what is on disk; returns it."""
    found = [r for tables in seeds.values() for table in tables.values() for r in table.records()]
    folder.mkdir(parents=True, exist_ok=True)
    write_long(found, tasks, folder / f"{name}.csv")
    figures = write_figures(found, tasks, folder, name)
    missing = sum(record.cell is None for record in found)
    begin = f"{len(found) - missing} of {len(found)} cells are measured."
    parts = [f"# {name}\n\n{begin}\n", *map(str, tables_in(found, tasks))]
    parts += [f"![{path.stem}]({path.name})\n" for path in figures]
    write_text(folder / f"{name}.md", "\n".join(parts))
    Console().print(f"{begin} The results are in {folder}", soft_wrap=True, highlight=False)
    return found


if __name__ == "__main__":
    main()
