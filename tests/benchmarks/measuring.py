"""What the benchmarks share: ways that take turns, their ratios, and the machine they ran on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

Run = Callable[[], Any]
CONSOLE = Console(width=120)


def in_turns(ways: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in [False] + [True] * rounds:
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Sequence[float], of: Sequence[float]) -> list[float]:
    """Of the same rounds: what slows the machine falls on both."""
    return [a / b for a, b in zip(seconds, of, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def memory_of(what: str) -> float:
    """VmRSS, in use now, or VmHWM, the peak, in MB (Linux alone tells).

    Not getrusage's: a process starts with the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(what)) / 1024


def machine() -> dict[str, Any]:
    """Where this runs, with the speed of a product of two float32 matrices of 2048."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    x = torch.randn(2048, 2048)
    best = min(in_turns({"product": lambda: x @ x}, 7)["product"])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "GFLOP/s": round(2 * 2048**3 / best / 1e9),
    }
