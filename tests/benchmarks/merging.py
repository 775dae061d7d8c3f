"""What merging costs: an iteration, the iterations, a merged model, against the paper's way.

    python tests/benchmarks/merging.py [--parts iteration iterations quality whole scaling]
        [--configs recipes/merge.yaml recipes/merge_images.yaml]

The paper's way is SciPy's `cg`, a layer at a time, over a LinearOperator whose products go from
NumPy to torch and back. Factors are those of the recipes' own fine-tunes, which are made first
where they are not there yet (some minutes a task), and, for one layer of ViT-B's size, random ones
whose eigenvalues fall as 1 / k. All ways of a table run in one process, in turns; a ratio is taken
within a round, and its median over the rounds is printed with its range.
"""

import argparse
import json
import logging
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import scipy.sparse.linalg
import torch
from measuring import CONSOLE, in_turns, machine, memory_of, ratios, spread
from rich.table import Table
from torch import Tensor

from mats_lightning import MergeModule, Statistics, Task, load_statistics, merging, save_statistics
from mats_lightning.merging.curvatures import task_operators
from mats_lightning.merging.mats import Options
from mats_lightning.merging.preconditioner import block_preconditioner
from mats_lightning.operators import KroneckerFactored, sum_of_products
from mats_lightning.solvers import Function, conjugate_gradient

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = [RECIPES / "merge.yaml", RECIPES / "merge_images.yaml"]
COUNTS = (10, 20, 50, 100, 200, 500)  # SciPy's states that are evaluated


@dataclass
class Suite:
    """The fine-tuned models of a recipe, with their factors in memory."""

    name: str
    tasks: list[Task]
    thetas: list[dict[str, Tensor]]
    statistics: list[Statistics]
    trainer: L.Trainer
    averaged: tuple[str, ...]  # in `quality`: where K-FAC fails, in front of an image encoder

    @property
    def layers(self) -> list[str]:
        """The weights with K-FAC factors."""
        names = (f"{module}.weight" for module in self.statistics[0].kfac)
        return [name for name in names if name in self.thetas[0]]

    def operators(self, name: str, tasks: int, normalize: bool = True) -> list[KroneckerFactored]:
        """Of `tasks` tasks; where there are fewer, the first ones again."""
        statistics = list(islice(cycle(self.statistics), tasks))
        found = task_operators(
            name, "kfac", statistics, self.thetas[0][name], [1.0] * tasks, normalize=normalize
        )
        assert all(isinstance(c, KroneckerFactored) for c in found)
        return found  # type: ignore[return-value]

    def weights(self, name: str, tasks: int) -> list[Tensor]:
        return [theta[name] for theta in islice(cycle(self.thetas), tasks)]

    def accuracy(self, state: Mapping[str, Tensor]) -> float:
        """The mean over the tasks, on their validation rows."""
        options = {"objective": "average", "init": state, "iterations": 0}
        module = MergeModule(self.tasks, "mats", options)
        self.trainer.validate(module, verbose=False)
        return statistics.mean(module.scores.values())


def suite(config: Path) -> Suite:
    sys.path.append(str(RECIPES))
    from finetunes import finetuned_tasks
    from merge_options import parse_options
    from process import quiet_lightning

    quiet_lightning()
    options = parse_options(["--config", str(config)])
    tasks, _ = finetuned_tasks(options)
    shared = [name for name in tasks[0].weights if not tasks[0].owns(name)]
    thetas = [{name: task.weights[name].clone() for name in shared} for task in tasks]
    loaded = []
    for task in tasks:
        lazy = task.load_statistics()
        kept = {k: lazy.tensors[k] for k in lazy.tensors if not k.startswith("diagonal_fisher/")}
        loaded.append(Statistics(kept, lazy.examples, lazy.group_positions, lazy.inputs, lazy.info))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    averaged = ("embeddings",) if options.modality == "image" else ()
    return Suite(config.stem, tasks, thetas, loaded, trainer, averaged)


# -- an iteration --------------------------------------------------------------------------------


def power_law(d: int) -> Tensor:
    q = torch.linalg.qr(torch.randn(d, d)).Q
    return (q / torch.arange(1, d + 1)) @ q.T


def bare(operators: Sequence[KroneckerFactored], x: Tensor, times: int) -> None:
    for _ in range(times):
        for c in operators:
            c.g @ (x @ c.a)


def scipy_cg(
    operators: Sequence[KroneckerFactored],
    b: Tensor,
    x0: Tensor,
    iterations: int,
    callback: Callable[[Any], None] | None = None,
) -> None:
    """The paper's way."""

    def matvec(vector: Any) -> Any:
        x = torch.from_numpy(vector.reshape(x0.shape))
        total = np.zeros_like(vector)
        for c in operators:
            total += (c.g @ (x @ c.a)).numpy().reshape(-1)
        return total

    size = x0.numel()
    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec, dtype=np.float32)
    scipy.sparse.linalg.cg(
        operator,
        b.numpy().reshape(-1),
        x0=x0.numpy().reshape(-1),
        rtol=0.0,
        maxiter=iterations,
        callback=callback,
    )


def iteration(suites: Sequence[Suite], rounds: int) -> list[dict[str, Any]]:
    """A plain iteration, ours and SciPy's, over the bare loop G_i @ (X @ A_i)."""
    table = Table(title="an iteration / the bare products G_i @ (X @ A_i)")
    for column in ("layer", "shape", "tasks", "GFLOP", "bare, GFLOP/s", "ours", "SciPy's way"):
        table.add_column(column)
    cases: list[tuple[str, Callable[[int], tuple[Any, Any]]]] = []
    for found in suites:
        shapes = {tuple(found.thetas[0][n].shape): n for n in found.layers if "head" not in n}
        for shape, name in shapes.items():
            if len(shape) == 2 and min(shape) > 64:
                cases.append(
                    (
                        found.name,
                        lambda t, n=name, s=found: (s.operators(n, t), s.weights(n, t)),  # type: ignore[misc]
                    )
                )
    cases.append(("ViT-B, random", vit_layer))
    rows = []
    for label, case in cases:
        for tasks in (2, 4, 8):
            operators, weights = case(tasks)
            x0 = torch.stack(weights).mean(0)
            b = sum_of_products(operators, weights)
            products = 11  # of the start, and of ten iterations
            matvec = partial(_products, operators)
            seconds = in_turns(
                {
                    "bare": partial(bare, operators, x0, products),
                    "ours": partial(conjugate_gradient, matvec, b, x0, iterations=10),
                    "scipy": partial(scipy_cg, operators, b, x0, 10),
                },
                rounds,
            )
            d_out, d_in = x0.shape
            gflop = 2 * tasks * (d_out**2 * d_in + d_out * d_in**2) / 1e9
            speed = products * gflop / statistics.median(seconds["bare"])
            ours = ratios(seconds["ours"], seconds["bare"])
            scipys = ratios(seconds["scipy"], seconds["bare"])
            CONSOLE.print(f"{label}, {d_out} x {d_in}, {tasks} tasks: ours {spread(ours, 2)}")
            table.add_row(
                label,
                f"{d_out} x {d_in}",
                str(tasks),
                f"{gflop:.1f}",
                f"{speed:.0f}",
                spread(ours, 2),
                spread(scipys, 2),
            )
            row = {"layer": label, "shape": [d_out, d_in], "tasks": tasks, "gflop": gflop}
            rows.append(row | {"gflop_per_s": speed, "ours": ours, "scipy": scipys})
    CONSOLE.print(table)
    return rows


def _products(operators: Sequence[KroneckerFactored], x: Tensor) -> Tensor:
    return sum_of_products(operators, repeat(x, len(operators)))


def vit_layer(tasks: int) -> tuple[list[KroneckerFactored], list[Tensor]]:
    factors = [KroneckerFactored(power_law(768), power_law(3072)) for _ in range(min(tasks, 2))]
    return list(islice(cycle(factors), tasks)), [torch.randn(3072, 768) for _ in range(tasks)]


# -- the iterations ------------------------------------------------------------------------------


def eigenvalue_corrected(operators: Sequence[KroneckerFactored], damping: float) -> Function:
    """The sum's own diagonal in the eigenbasis of (sum A) x (sum G), instead of their product."""
    parts = [(c.a.double(), c.g.double()) for c in operators]
    v, u = (
        torch.linalg.eigh(torch.stack([m / m.diagonal().mean() for m in factors]).sum(0))[1]
        for factors in zip(*parts, strict=True)
    )
    in_basis = [((u * (g @ u)).sum(0), (v * (a @ v)).sum(0)) for a, g in parts]
    diagonal = torch.stack([torch.outer(g, a) for g, a in in_basis]).sum(0)
    diagonal += damping**2 * diagonal.mean()
    return lambda r: (u @ ((u.T @ r.double() @ v) / diagonal) @ v.T).to(r.dtype)


def iterations(suites: Sequence[Suite], layers: int, cap: int) -> list[dict[str, Any]]:
    """Iterations until |sum C_i (theta_i - x)| / |sum C_i theta_i| is below 1e-3 and 1e-6."""
    table = Table(title=f"iterations to a relative residual, median over the layers (cap {cap})")
    for column in ("suite", "tasks", "factors", "preconditioner", "to 1e-3", "to 1e-6", "set-up"):
        table.add_column(column)
    rows = []
    for found in suites:
        names = [n for n in found.layers if min(found.thetas[0][n].shape[:2]) > 64]
        picked = random.Random(0).sample(names, min(layers, len(names)))  # not of one sort
        for tasks, normalize in ((len(found.tasks), False), (len(found.tasks), True), (2, True)):
            kinds: dict[str, Callable[[Any], Any]] = {
                "none": lambda operators: None,
                "kronecker": lambda operators: block_preconditioner(operators, 1e-3),
                "eigenvalue-corrected": lambda operators: eigenvalue_corrected(operators, 1e-3),
            }
            if tasks == 2:
                kinds["exact"] = lambda operators: block_preconditioner(operators, 1e-3, "exact")
            for label, make in kinds.items():
                counts: dict[float, list[float]] = {1e-3: [], 1e-6: []}
                set_up = []
                for name in picked:
                    operators = found.operators(name, tasks, normalize)
                    weights = found.weights(name, tasks)
                    mean = torch.stack(weights).mean(0)
                    b = sum_of_products(operators, (w - mean for w in weights))
                    start = time.perf_counter()
                    preconditioner = make(operators)
                    set_up.append(time.perf_counter() - start)
                    try:
                        residuals = conjugate_gradient(
                            partial(_products, operators),
                            b,
                            torch.zeros_like(b),
                            iterations=cap,
                            tolerance=1e-6,
                            preconditioner=preconditioner,
                            scale=float(sum_of_products(operators, weights).norm()),
                        ).residuals
                    except ValueError as error:  # too close to singular for float32
                        CONSOLE.print(f"{found.name}, {name}, {label}: {error}")
                        residuals = []
                    for target, reached in counts.items():
                        within = (i for i, r in enumerate(residuals) if r <= target)
                        reached.append(next(within, float("inf")))
                shown = [
                    f"{middle:.0f}" if (middle := statistics.median(c)) <= cap else f"> {cap}"
                    for c in counts.values()
                ]
                seconds = statistics.median(set_up)
                factors = "normalised" if normalize else "as they are"
                table.add_row(found.name, str(tasks), factors, label, *shown, f"{seconds:.2f} s")
                CONSOLE.print(f"{found.name}, {tasks} tasks, {factors}, {label}: {shown}")
                row = {"suite": found.name, "tasks": tasks, "normalize": normalize, "kind": label}
                rows.append(row | {"iterations": {str(k): v for k, v in counts.items()}})
    CONSOLE.print(table)
    return rows


# -- seconds to a model that is as good ----------------------------------------------------------


def quality(suites: Sequence[Suite], cap: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds until the merged model is within .005 of the converged one, on validation rows."""
    rows = []
    for found in suites:
        equations: Options = {"averaged": found.averaged, "radius": None}
        converged = merging.mats(found.thetas, found.statistics, iterations=150, **equations)
        target = found.accuracy(converged.state_dict) - 0.005
        done = [b.converged for b in converged.blocks.values()]
        CONSOLE.print(
            f"{found.name}: converged kfac has {target + 0.005:.4f}"
            f" ({sum(done)} of {len(done)} blocks within 1e-6)"
        )
        counts = [1, 2, 3, 5, 10, 20]
        tried = merging.mats(found.thetas, found.statistics, iterations=counts, **equations)
        accuracies = {n: found.accuracy(result.state_dict) for n, result in tried.items()}
        CONSOLE.print(f"preconditioned: { {n: round(a, 4) for n, a in accuracies.items()} }")
        enough = next((n for n, accuracy in accuracies.items() if accuracy >= target), None)
        seconds = (
            in_turns(
                {
                    "ours": lambda f=found, n=enough, e=equations: merging.mats(  # type: ignore[misc]
                        f.thetas, f.statistics, iterations=n, **e
                    )
                },
                rounds,
            )["ours"]
            if enough
            else [float("nan")]
        )
        theirs = scipys_way(found, cap)
        reached = None
        for count, (state, after) in theirs.items():
            accuracy = found.accuracy(state)
            CONSOLE.print(f"SciPy's plain way, {count} iterations: {accuracy:.4f} in {after:.0f} s")
            rows.append({"suite": found.name, "scipy": count, "seconds": after, "value": accuracy})
            if reached is None and accuracy >= target:
                reached = count, after
        last, after = max(theirs), theirs[max(theirs)][1]
        against = (
            f"{reached[0]} plain iterations in {reached[1]:.0f} s"
            if reached
            else f"not within {last} plain iterations, {after:.0f} s"
        )
        CONSOLE.print(
            f"{found.name}: {enough} preconditioned iterations in {spread(seconds, 1)} s against"
            f" {against}: {(reached[1] if reached else after) / statistics.median(seconds):.1f}x"
        )
        row = {"suite": found.name, "target": target, "ours": enough, "seconds": seconds}
        rows.append(row | {"value": accuracies, "converged": sum(done)})
    return rows


def scipys_way(found: Suite, cap: int) -> dict[int, tuple[dict[str, Tensor], float]]:
    """Count of iterations -> the merged state, and the seconds that all layers took to get there.

    Blocks that are no K-FAC (vectors, embeddings) are ours in all of them, and take no time.
    """
    rest = merging.mats(found.thetas, found.statistics, iterations=0).state_dict
    rest |= merging.mats(
        found.thetas,
        found.statistics,
        objective=("block_fisher",),
        iterations=20,
        averaged=found.averaged,
        radius=None,
    ).state_dict
    named = re.compile("|".join(found.averaged) or "(?!)")
    layers = [name for name in found.layers if not named.search(name)]
    counts = [count for count in COUNTS if count <= cap]
    states = {count: dict(rest) for count in counts}
    seconds = dict.fromkeys(counts, 0.0)
    for number, name in enumerate(layers, start=1):
        print(f"\rSciPy's way: layer {number} of {len(layers)}", end="", file=sys.stderr)
        for count, (value, after) in kept_states(found, name, counts).items():
            states[count][name] = value
            seconds[count] += after
    print(file=sys.stderr)
    return {count: (states[count], seconds[count]) for count in counts}


def kept_states(found: Suite, name: str, counts: Sequence[int]) -> dict[int, tuple[Tensor, float]]:
    """Count of iterations -> a layer's weight, and the seconds that it took to get there."""
    start = time.perf_counter()
    operators = found.operators(name, len(found.tasks))
    weights = found.weights(name, len(found.tasks))
    x0 = torch.stack(weights).mean(0)
    b = sum_of_products(operators, weights)
    kept: dict[int, tuple[Tensor, float]] = {}
    done = 0

    def note(vector: Any) -> None:
        nonlocal done
        done += 1
        if done in counts:
            state = torch.from_numpy(vector.copy()).view(x0.shape)
            kept[done] = state, time.perf_counter() - start

    scipy_cg(operators, b, x0, counts[-1], note)
    return kept


# -- the whole merge -----------------------------------------------------------------------------


def whole(suites: Sequence[Suite], rounds: int) -> list[dict[str, Any]]:
    """Eight models merged: from factors in memory, and straight from the files."""
    rows = []
    for found in suites:
        eight = [list(islice(cycle(part), 8)) for part in (found.thetas, found.statistics)]
        lazy = [task.load_statistics() for task in islice(cycle(found.tasks), 8)]
        ways = {
            "kfac, 5 iterations, factors in memory": lambda e=eight: merging.mats(*e, iterations=5),
            "kfac, 5 iterations, from the sidecars": lambda e=eight, s=lazy: merging.mats(
                e[0], s, iterations=5
            ),
            "RegMean, from the sidecars": lambda e=eight, s=lazy: merging.regmean(e[0], s),
        }
        table = Table(title=f"eight models of {found.name}: seconds of a merge")
        for column in ("method", "seconds"):
            table.add_column(column)
        for label, seconds in in_turns(ways, rounds).items():  # type: ignore[arg-type]
            table.add_row(label, spread(seconds, 1))
            rows.append({"suite": found.name, "method": label, "seconds": seconds})
        CONSOLE.print(table)
    return rows


# -- time and memory against tasks and layers ----------------------------------------------------

# glibc keeps what is freed for later, up to as much again; so the peak is of what is in use
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
BLOCK = {"query": (384, 384), "value": (384, 384), "up": (1536, 384), "down": (384, 1536)}


def made_up(layers: int) -> tuple[dict[str, Tensor], Statistics]:
    """A model of `layers` blocks of MiniLM's width, and statistics for all of it."""
    theta, tensors, inputs = {}, {}, {}
    factors = {d: power_law(d) for d in (384, 1536)}
    for layer in range(layers):
        for name, (d_out, d_in) in BLOCK.items():
            module = f"layer.{layer}.{name}"
            theta[f"{module}.weight"] = torch.randn(d_out, d_in)
            tensors[f"A/{module}"], tensors[f"G/{module}"] = factors[d_in], factors[d_out]
            inputs[module] = module
    return theta, Statistics(tensors, 1, dict.fromkeys(inputs, 1), inputs, {})


def scaled(folder: Path, tasks: int) -> tuple[float, float]:
    """Seconds, and peak memory in MB above what the models take, of one merge from files."""
    theta = torch.load(folder / "theta.pt", mmap=True)
    thetas = [{name: tensor.clone() for name, tensor in theta.items()} for _ in range(tasks)]
    records = [load_statistics(folder / "theta.pt") for _ in range(tasks)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is in use now
    before = memory_of("VmRSS")
    start = time.perf_counter()
    merging.mats(thetas, records, iterations=5)
    return time.perf_counter() - start, memory_of("VmHWM") - before


def scaling(_: Sequence[Suite], rounds: int) -> list[dict[str, Any]]:
    """Time and memory against the number of tasks and of layers, straight from sidecars."""
    table = Table(title="a merge from sidecars, 5 iterations; blocks of four layers, width 384")
    columns = ("tasks", "blocks", "seconds", "s / task / block", "peak above the models, MB")
    for column in (*columns, "merged weights + one layer's factors, MB"):
        table.add_column(column)
    rows = []
    for tasks, layers in ((2, 2), (4, 2), (8, 2), (16, 2), (32, 2), (4, 1), (4, 6), (4, 24)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theta, statistics_ = made_up(layers)
            torch.save(theta, folder / "theta.pt")
            save_statistics(statistics_, folder / "theta.pt.mats.safetensors")
            command = [sys.executable, __file__, "--scaled", name, str(tasks)]
            command += ["--threads", str(torch.get_num_threads())]
            found = [
                json.loads(
                    subprocess.run(
                        command, capture_output=True, check=True, env=os.environ | RETURN_MEMORY
                    ).stdout
                )
                for _ in range(rounds)
            ]
        seconds, memory = ([x[i] for x in found] for i in (0, 1))
        weights = sum(tensor.nbytes for tensor in theta.values())
        bound = (weights + tasks * 4 * (384**2 + 1536**2)) / 2**20
        each = statistics.median(seconds) / tasks / layers
        table.add_row(
            str(tasks),
            str(layers),
            spread(seconds, 1),
            f"{each:.3f}",
            spread(memory, 0),
            f"{bound:.0f}",
        )
        rows.append({"tasks": tasks, "blocks": layers, "seconds": seconds, "memory": memory})
    CONSOLE.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = ["iteration", "iterations", "quality", "whole", "scaling"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--configs", nargs="*", type=Path, default=CONFIGS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="of each model, for `iterations`")
    parser.add_argument("--cap", type=int, default=500, help="on plain iterations")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--scaled", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if options.scaled:
        print(json.dumps(scaled(Path(options.scaled[0]), int(options.scaled[1]))))
        return
    found: dict[str, Any] = {"machine": machine()}
    CONSOLE.print(found["machine"])
    needed = set(options.parts) != {"scaling"}
    suites = [suite(config) for config in options.configs] if needed else []
    run: dict[str, Callable[..., Any]] = {
        "iteration": partial(iteration, rounds=options.rounds),
        "iterations": partial(iterations, layers=options.layers, cap=options.cap),
        "quality": partial(quality, cap=options.cap, rounds=options.rounds),
        "whole": partial(whole, rounds=options.rounds),
        "scaling": partial(scaling, rounds=options.rounds),
    }
    for part in options.parts:
        found[part] = run[part](suites)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
