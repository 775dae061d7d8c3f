"""Check the claims of the MaTS paper (arXiv 2312.04339), a setting at a time:

    python recipes/paper.py --setting text_full           # recipes/paper/text_full.yaml
    python recipes/paper.py --setting text_full --fast    # tiny: that everything runs
    python recipes/paper.py --setting my.yaml --tables methods starts --seeds 0
    python recipes/paper.py --setting text_full --report_only

Each finished cell (one merge, evaluated on one split) is kept in <output_dir>/cells, so that a run
that is killed goes on where it was, and settings with the same fine-tunes and output_dir share
them. `--again` forgets those of the tables and seeds that are run. The results of the whole
setting, whatever was run of it, are written to <results> from what is on disk, a cell that is
not there as "missing": <setting>.csv (a line a cell), <setting>.md (the tables), figures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import Steps
from merge import quiet_lightning
from paper_report import markdown_of, write_figures, write_long
from paper_seeds import Seed
from paper_settings import TABLES, Setting, read_setting
from paper_tables import Record, forget, records, run, steps_left
from rich.console import Console

__all__ = ["main"]

RESULTS = Path(__file__).with_name("results")


def main(args: Sequence[str] | None = None) -> list[Record]:
    """Everything, in its order; returns the lines of the long table."""
    asked = arguments().parse_args(args)
    try:
        name, setting = read_setting(asked.setting, asked.fast)
        tables = checked("tables", asked.tables, setting.tables)
        numbers = checked("seeds", asked.seeds, setting.seeds)
    except ValueError as error:
        arguments().error(str(error))
    if asked.output_dir is not None:
        setting.options["output_dir"] = asked.output_dir
    quiet_lightning()
    print(f"{name}: reading the tasks of {len(setting.seeds)} seeds")
    seeds = {number: Seed(setting, number) for number in setting.seeds}
    if not asked.report_only:
        measure(setting, tables, [seeds[number] for number in numbers], asked.again)
    named = asked.setting == name and not asked.fast
    output_dir = Path(next(iter(seeds.values())).options.output_dir)
    folder = asked.results or (RESULTS if named else output_dir / "results")
    return report(name, setting, list(seeds.values()), folder)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paper.py", description=__doc__.partition("\n")[0][:-1])
    parser.add_argument("--setting", required=True, help="of recipes/paper, or a YAML file")
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="default: all of the setting")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the setting")
    parser.add_argument("--fast", action="store_true", help="tiny slices, grids and one seed")
    parser.add_argument("--output_dir", help="over that of the setting")
    parser.add_argument("--results", type=Path, help="the folder of the results")
    parser.add_argument("--report_only", action="store_true", help="measure nothing")
    parser.add_argument("--again", action="store_true", help="measure what is there again, too")
    return parser


def checked(what: str, asked: list | None, known: Sequence) -> list:
    """What is asked for of what the setting has; raises ValueError for something else."""
    if odd := [entry for entry in asked or [] if entry not in known]:
        names = ", ".join(map(str, known))
        raise ValueError(f"{what}: the setting has no {odd[0]}, it has {names}; say it in its YAML")
    return [entry for entry in known if entry in (asked or known)]


def tables_of(seed: Seed, setting: Setting, tables: Sequence[str]) -> list[str]:
    """All for the first seed of a setting; for the others those that are over seeds."""
    over_seeds = ("methods", "intermediate")
    first = seed.seed == setting.seeds[0]
    return [table for table in tables if first or table in over_seeds]


def measure(setting: Setting, tables: Sequence[str], seeds: Sequence[Seed], again: bool) -> None:
    """What is missing of the tables, a seed after the other."""
    with Steps() as steps:
        for seed in seeds:
            own = tables_of(seed, setting, tables)
            if again:
                for table in own:
                    forget(table, setting, seed)
            steps.expect(*steps_left(own, setting, seed))
        for seed in seeds:
            steps.say(f"seed {seed.seed}")
            bench = seed.bench(steps)
            for table in tables_of(seed, setting, tables):
                run(table, setting, seed, bench)
            seed.suite.let_go()


def report(name: str, setting: Setting, seeds: Sequence[Seed], folder: Path) -> list[Record]:
    """Write what is on disk; returns it."""
    found = [
        record
        for seed in seeds
        for table in tables_of(seed, setting, setting.tables)
        for record in records(table, setting, seed)
    ]
    tasks = seeds[0].tasks
    folder.mkdir(parents=True, exist_ok=True)
    write_long(found, tasks, folder / f"{name}.csv")
    tables = markdown_of(name, found, tasks)
    figures = write_figures(found, tasks, folder, name)
    missing = sum(record.cell is None for record in found)
    begin = f"{len(found) - missing} of {len(found)} cells are measured."
    parts = [f"# {name}\n\n{begin}\n", *map(str, tables)]
    parts += [f"![{path.stem}]({path.name})\n" for path in figures]
    (folder / f"{name}.md").write_text("\n".join(parts), encoding="utf-8")
    Console().print(f"{begin} The results are in {folder}", soft_wrap=True, highlight=False)
    return found


if __name__ == "__main__":
    main()
