"""Adds what came through a layer in one batch to a record of statistics."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mats_lightning.statistics.coverage import Coverage
from mats_lightning.statistics.factors import (
    accumulating,
    add_counts,
    add_input,
    add_second_moment,
    averaged,
    cut,
    kept,
    summed,
)
from mats_lightning.statistics.gradients import (
    ExampleGradients,
    VectorGradients,
    add_squares_of_sum,
)
from mats_lightning.statistics.record import (
    BLOCK,
    DIAGONAL,
    GRADIENT,
    OUTPUT,
    Statistics,
)

# (module, leading shape of its rows) -> which positions count, (N, R), or None for all
MaskOf = Callable[[str, Sequence[int]], Tensor | None]


class Sums:
    """The sums that a coverage plans, in a record that holds them in memory."""

    def __init__(self, coverage: Coverage, statistics: Statistics) -> None:
        assert isinstance(statistics.tensors, dict), "sums are added in place: not to a lazy record"
        self.coverage = coverage
        self.statistics = statistics
        self._tensors = statistics.tensors
        self._dropped: dict[str, list[str]] = {}  # reason -> parameters, that nobody was told of
        coverage.allocate(statistics)

    def rows(self, module: str) -> list[str]:
        """The parameters of a module."""
        return list(self.coverage.modules[module].parameters.values())

    def drop(self, parameters: Iterable[str], kinds: Sequence[str], reason: str) -> None:
        """These statistics cannot be exact: their sums go, and the table says why."""
        for row in (self.coverage.rows[parameter] for parameter in parameters):
            if set(kinds) & set(row.statistics):
                row.drop(kinds, reason)
                self._dropped.setdefault(reason, []).append(row.name)
        self.coverage.remove_dropped(self.statistics)

    def told(self) -> list[str]:
        """What has been dropped since it was last asked for, and why."""
        told = [f"{', '.join(names)}: {reason}" for reason, names in self._dropped.items()]
        self._dropped.clear()
        return told

    def zeros(self, parameter: str, device: torch.device) -> Tensor:
        """In the parameter's shape and the dtype of its sums."""
        shape, dtype = self.coverage.rows[parameter].shape, self.coverage.dtypes[parameter]
        return torch.zeros(shape, dtype=dtype, device=device)

    def add_gradients(self, parameter: str, parts: list[ExampleGradients]) -> None:
        """Diagonal and block Fisher, of all uses of a parameter in the batch."""
        kinds = self.coverage.rows[parameter].statistics
        vectors = [part.g for part in parts if isinstance(part, VectorGradients)]
        if len(vectors) == len(parts):  # several uses of a vector: one sum an example
            parts = [VectorGradients(torch.stack(vectors).sum(0))]
        if DIAGONAL in kinds:
            with self._accumulating(f"{DIAGONAL}/{parameter}", parts[0].device) as total:
                add_squares_of_sum(parts, total)
        if BLOCK in kinds and isinstance(parts[0], VectorGradients):
            with self._accumulating(f"{BLOCK}/{parameter}", parts[0].device) as total:
                parts[0].add_outer(total)

    def add_gradients_of_loss(self, gradients: Mapping[str, Tensor], scale: float) -> None:
        """gradient += scale times each, in the dtype of the sums."""
        for parameter, gradient in gradients.items():
            key = f"{GRADIENT}/{parameter}"
            if key not in self._tensors:
                self._tensors[key] = self.zeros(parameter, self._home(gradient))
            total = self._tensors[key]
            total.add_(gradient.to_dense().to(total), alpha=scale)

    def _accumulating(self, key: str, device: torch.device) -> AbstractContextManager[Tensor]:
        total = self._tensors[key]  # has been allocated
        like = torch.empty(0, dtype=total.dtype, device=device)
        return accumulating(self._tensors, key, total.shape, like, total.device)

    def _home(self, work: Tensor) -> torch.device:
        return self.coverage.device or work.device

    def add_output(self, module: str, g: Tensor, mask_of: MaskOf) -> None:
        """G += sum g g^T over the positions that the mask leaves."""
        covered = self.coverage.modules[module]
        sizes = self.coverage.rows[covered.matrix].matrix
        assert covered.rule.factors is not None and sizes is not None
        g = covered.rule.factors.outputs(covered.module, g)
        mask = mask_of(module, g.shape[:2])
        rows = summed(g, mask) if self.coverage.reduce else kept(g, mask)
        rows = cut(rows, sizes.g)
        add_second_moment(self._tensors, f"{OUTPUT}/{module}", rows, self._home(rows))

    def add_input(
        self, readers: Collection[str], a: Tensor, examples: int, mask_of: MaskOf
    ) -> None:
        """A += sum a a^T over the positions that the mask leaves, for the modules that read `a`."""
        modules = [m for m in self.statistics.inputs if m in readers]
        if not modules:
            return
        covered = self.coverage.modules[modules[0]]
        row = self.coverage.rows[covered.matrix]
        dtype = self.coverage.dtypes[row.name]
        if covered.rule.lookup:
            ids = a.reshape(len(a), -1)
            ids = ids.expand(examples, -1) if len(ids) == 1 else ids  # one row for all
            ids = kept(ids, mask_of(covered.name, ids.shape))
            add_counts(self.statistics, modules, ids, row.shape[0], dtype, self._home(ids))
            return
        assert covered.rule.factors is not None and row.matrix is not None
        start, a = 0, a.to(dtype)
        for rows in covered.rule.factors.inputs(covered.module, a):
            mask = mask_of(covered.name, (len(a), rows.shape[1]))
            mask = None if mask is None else mask[start : start + len(rows)]
            means = cut(averaged(rows, mask), row.matrix.a) if self.coverage.reduce else None
            inputs = cut(kept(rows, mask), row.matrix.a)
            add_input(self.statistics, modules, inputs, self._home(rows), means)
            start += len(rows)
