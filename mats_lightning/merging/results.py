"""What the solving methods are asked for, and what they give back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

# objective -> the statistics that give C_i, in order of preference for each parameter
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "average": ("identity",),
    "diagonal_fisher": ("diagonal_fisher",),
    "gram": ("gram",),
    "kfac": ("kfac", "block_fisher"),
}
OnBlock = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Block:
    """How the solve of one parameter went."""

    statistic: str
    iterations: int
    residuals: list[float]  # |b - C theta| / |b| after 0, 1, ... iterations
    converged: bool
    at_edge: bool  # it ended at the `radius`


@dataclass(eq=False)
class MergeResult:
    """The merged state dict, the evidence for each block, and what no statistic covered."""

    state_dict: dict[str, Tensor]
    blocks: dict[str, Block] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)


def objective_kinds(objective: str | Sequence[str]) -> tuple[str, ...]:
    """The statistics of an objective. Raises ValueError for names that do not exist."""
    known = sorted({kind for kinds in OBJECTIVES.values() for kind in kinds})
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"objective={objective!r}; choose from {', '.join(OBJECTIVES)}")
        return OBJECTIVES[objective]
    if unknown := [kind for kind in objective if kind not in known]:
        raise ValueError(f"no statistic is called {unknown[0]!r}; there are {', '.join(known)}")
    if not objective:
        raise ValueError(f"the objective is empty: name statistics out of {', '.join(known)}")
    return tuple(objective)
