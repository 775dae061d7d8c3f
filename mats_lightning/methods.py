"""The merge methods by name, and what is known of each before there are tasks."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mats_lightning import merging
from mats_lightning.merging import MergeResult
from mats_lightning.merging.covering import covering_statistics
from mats_lightning.merging.fisher import STATISTICS as OF_FISHER
from mats_lightning.merging.models import of_batch_norm
from mats_lightning.merging.regmean import STATISTICS as OF_REGMEAN
from mats_lightning.statistics import Statistics

METHODS: dict[str, Callable[..., Any]] = {
    "average": merging.average,
    "task_arithmetic": merging.task_arithmetic,
    "ties": merging.ties,
    "dare": merging.dare,
    "iso_c": merging.iso_c,
    "tsv_m": merging.tsv_m,
    "fisher": merging.fisher,
    "regmean": merging.regmean,
    "mats": merging.mats,
}
OF_CURVATURE = ("fisher", "regmean", "mats")  # have no scale of their own
OF_TASK_VECTORS = ("task_arithmetic", "ties", "dare", "iso_c", "tsv_m")  # need the start
# what a method without a choice of its own takes
STATISTICS = {"fisher": OF_FISHER, "regmean": OF_REGMEAN}
# rows of a comparison that merge nothing: each task's own model; the start under its head
REFERENCES = ("individual", "pretrained")
# arguments of merge functions that are no options
OURS = {"thetas", "statistics", "pretrained", "weights", "on_block"}


@dataclass(frozen=True)
class Method:
    """A method with its options.

    Arguments:
        name: of METHODS or REFERENCES.
        options: of the merge function.
        scale: of the merged task vector, for OF_CURVATURE.
        lora_rank: that merged products get as factors, for METHODS.

    Raises ValueError for what does not exist, does not go together or is out of range.
    """

    name: str
    options: Mapping[str, Any]
    scale: float | None = None
    lora_rank: int | None = None

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Self:
        """With `scale` and `lora_rank` among the options."""
        names = ["scale"] if name in OF_CURVATURE else []
        names += ["lora_rank"] if name in METHODS else []
        rest = {option: value for option, value in options.items() if option not in names}
        return cls(name, rest, **{option: options.get(option) for option in names})

    def __post_init__(self) -> None:
        if self.name not in METHODS and self.name not in REFERENCES:
            known = ", ".join([*METHODS, *REFERENCES])
            raise ValueError(f"no method is called '{self.name}'; choose from {known}")
        own = self._arguments - OURS
        if unknown := sorted(set(self.options) - own):
            own |= {"scale"} if self.name in OF_CURVATURE else set()
            own |= {"lora_rank"} if self.name in METHODS else set()
            raise ValueError(
                f"{self.name} has no option '{unknown[0]}'; it has"
                f" {', '.join(sorted(own)) or 'none'}"
            )
        if missing := sorted(self._required - set(self.options)):
            raise ValueError(f"{self.name} needs the option '{missing[0]}'")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale}: a finite number is needed")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank}: an adapter has 1 at least")

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(METHODS[self.name]).parameters if self.merges else {}

    @property
    def _arguments(self) -> set[str]:
        return set(self._parameters)

    @property
    def _required(self) -> set[str]:
        given = {name for name, p in self._parameters.items() if p.default is not p.empty}
        return self._arguments - given - OURS

    @property
    def merges(self) -> bool:
        return self.name in METHODS

    def takes(self, argument: str) -> bool:
        """Whether the merge function has this argument."""
        return argument in self._arguments

    @property
    def needs_start(self) -> bool:
        """Whether it needs the model that the tasks started from."""
        return (
            self.name in ("pretrained", *OF_TASK_VECTORS)
            or self.scale is not None
            or self.options.get("init") == "pretrained"
            or self.options.get("uncovered") == "pretrained"
        )

    @property
    def counts(self) -> list[int]:
        """The iteration counts of which there are states; [0] for methods without."""
        if self.name != "mats":
            return [0]
        default = inspect.signature(merging.mats).parameters["iterations"].default
        iterations = self.options.get("iterations", default)
        return [iterations] if isinstance(iterations, int) else list(iterations)

    def states(
        self, result: Any, names: list[str], statistics: Sequence[Statistics]
    ) -> dict[int, MergeResult]:
        """What the merge function returned for parameters of these names, by iteration count."""
        if isinstance(result, MergeResult):
            return {self.counts[0]: result}
        if self.name == "mats":
            assert isinstance(result, dict)
            return dict(result)
        uncovered: list[str] = []
        if self.name in STATISTICS:
            covered = covering_statistics(names, STATISTICS[self.name], statistics)
            others = [n for n in names if n not in covered and not of_batch_norm(n, names)]
            uncovered = [n for n in others if result[n].is_floating_point()]
        return {0: MergeResult(result, uncovered=uncovered)}
