"""Where the time goes in what misses its goal: torch's profiler, an operator a line.

    python tests/benchmarks/profiles.py [--cases capture iteration merge]

capture: a training step of a ViT of DINOv2-S's size, plain and with all statistics. iteration: ten
plain iterations on a layer of 384 x 384 with two tasks. merge: K-FAC, preconditioned, 0 and 20
iterations, on the fine-tunes of recipes/merge.yaml, which are made first where they are not there.
Milliseconds are of the operator itself, on the CPU, in one run after one that does not count.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from capture import CASES, CLASSES, new_capture, train
from measuring import CONSOLE, Run, machine
from merging import CONFIGS, power_law, suite
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from mats_lightning import merging as methods
from mats_lightning.operators import KroneckerFactored, sum_of_products
from mats_lightning.solvers import conjugate_gradient
from mats_lightning.statistics import KINDS

LINES = 8  # of a table; the rest is one more


def profiled(title: str, runs: Mapping[str, Run]) -> dict[str, Any]:
    """A column a run, an operator a line, by what the last run takes."""
    columns: dict[str, dict[str, tuple[float, int]]] = {}
    for name, run in runs.items():
        run()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        columns[name] = {
            event.key.removeprefix("autograd::engine::evaluate_function: "): (
                event.self_cpu_time_total / 1e3,
                event.count,
            )
            for event in found.key_averages()
        }
    last = list(columns.values())[-1]
    shown = sorted(last, key=lambda key: -last[key][0])[:LINES]
    table = Table("operator", *(f"{name}, ms (calls)" for name in runs), title=title)
    for key in shown:
        cells = (column.get(key, (0.0, 0)) for column in columns.values())
        table.add_row(key, *(f"{ms:.1f} ({calls})" for ms, calls in cells))
    sums = [sum(ms for ms, _ in column.values()) for column in columns.values()]
    rest = [
        sum(ms for key, (ms, _) in column.items() if key not in shown)
        for column in columns.values()
    ]
    table.add_row("all else", *(f"{ms:.1f}" for ms in rest))
    table.add_row("all", *(f"{ms:.1f}" for ms in sums))
    CONSOLE.print(table)
    return columns


def capture() -> dict[str, Any]:
    make, size, rows = CASES["vit-56"]
    model, inputs, labels = make(), rows(32, size), torch.randint(CLASSES, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step = partial(train, model, optimizer, inputs, labels)
    diagonal = new_capture(model, ["diagonal_fisher"])
    runs = {
        "plain": partial(step, None),
        "diagonal Fisher": partial(step, diagonal),
        "all statistics": partial(step, new_capture(model, KINDS)),
    }
    return profiled("a training step of a ViT-S, 56 px, 32 rows", runs)


def iteration() -> dict[str, Any]:
    operators = [KroneckerFactored(power_law(384), power_law(384)) for _ in range(2)]
    thetas = [torch.randn(384, 384) for _ in operators]
    b, x0 = sum_of_products(operators, thetas), torch.stack(thetas).mean(0)

    def products() -> None:
        for _ in range(11):
            sum_of_products(operators, (x0, x0))

    def ours() -> None:
        conjugate_gradient(
            lambda x: sum_of_products(operators, (x, x)), b, x0, iterations=10, tolerance=0.0
        )

    return profiled("384 x 384, two tasks", {"11 products": products, "10 iterations": ours})


def merge() -> dict[str, Any]:
    found = suite(CONFIGS[0])
    runs: dict[str, Run] = {
        f"{count} iterations": partial(
            methods.mats, found.thetas, found.statistics, iterations=count, radius=None
        )
        for count in (0, 20)
    }
    return profiled("seven MiniLMs, K-FAC, preconditioned", runs)


def main() -> None:
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "capture": capture,
        "iteration": iteration,
        "merge": merge,
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": machine()}
    CONSOLE.print(found["machine"])
    for case in options.cases:
        found[case] = cases[case]()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
