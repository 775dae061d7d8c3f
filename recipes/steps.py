"""Steps of a long run, under a bar that says how long it will take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

T = TypeVar("T")


class Steps:
    """Runs steps under a bar: done / all, the time gone, and the time to go at the pace so far."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("to go: {task.fields[to_go]}"),
        )
        self._row = self._bar.add_task("", total=0, to_go="unknown")
        self._seconds, self._ran = 0.0, 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what has a bar of its own."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def expect(self, steps: int, done: int = 0) -> None:
        """This many steps more, of which some were done earlier."""
        task = self._bar.tasks[0]
        total, completed = (task.total or 0) + steps, int(task.completed) + done
        self._bar.update(self._row, total=total, completed=completed)

    def run(self, description: str, action: Callable[..., T], *arguments: Any) -> tuple[T, float]:
        """What `action` returns, and its seconds."""
        self._bar.update(self._row, description=description)
        started = time.perf_counter()
        result = action(*arguments)
        seconds = time.perf_counter() - started
        self._seconds, self._ran = self._seconds + seconds, self._ran + 1
        self._bar.advance(self._row)
        task = self._bar.tasks[0]
        left = max(0, int((task.total or 0) - task.completed)) * self._seconds / self._ran
        hours, minutes = divmod(int(left) // 60, 60)
        self._bar.update(self._row, to_go=f"{hours}:{minutes:02}:{int(left) % 60:02}")
        return result, round(seconds, 2)

    def show(self, description: str) -> None:
        """What is at work, where it is no step of its own."""
        self._bar.update(self._row, description=description)

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, soft_wrap=True)
