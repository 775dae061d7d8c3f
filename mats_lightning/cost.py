"""What a fit pays for its statistics."""

import time
from dataclasses import dataclass, field


@dataclass
class Cost:
    """Seconds of the batches that are captured and of the others, from a batch's start to its end.

    Wall clock: nothing waits for an accelerator, whose queue of work evens out over many batches.
    """

    examples: int = 0  # captured
    batches: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})  # by captured
    seconds: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    _start: float = 0.0
    _captured: bool = False

    def start(self, captured: bool) -> None:
        self._start, self._captured = time.perf_counter(), captured

    def end(self) -> None:
        self.batches[self._captured] += 1
        self.seconds[self._captured] += time.perf_counter() - self._start

    def __str__(self) -> str:
        plain, captured = self.batches[False], self.batches[True]
        everything = plain + captured
        text = f"{self.examples:,} examples captured, in {captured:,} of {everything:,} batches"
        if not captured:
            return text
        if not plain:
            return f"{text}; what it took cannot be told, as none was without"
        means = {kind: self.seconds[kind] / self.batches[kind] for kind in (False, True)}
        ratio = means[True] / means[False]
        share = captured * (ratio - 1) / everything
        return (
            f"{text}; these took {ratio:.2f}x the others' time ({means[True]:.3g} s a batch and"
            f" {means[False]:.3g} s, wall clock), which adds {share:.0%} to the time of all batches"
        )
