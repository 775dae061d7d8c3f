"""Which parameter of a model is covered by which statistic, or why by none."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mats_lightning.statistics.layers import Rule
from mats_lightning.statistics.record import (
    BLOCK,
    DIAGONAL,
    GRADIENT,
    GRAM,
    KFAC,
    OF_INPUTS,
    OUTPUT,
    Statistics,
)


@dataclass(frozen=True)
class MatrixSizes:
    """A weight as `groups` matrices (d_out, d_in), and the equal blocks that each factor is cut
    into along its diagonal, when it is larger than max_factor_size."""

    groups: int
    d_out: int
    d_in: int
    blocks_out: int = 1
    blocks_in: int = 1

    @property
    def a(self) -> tuple[int, int]:
        """(how many matrices A is, their size)."""
        return self.groups * self.blocks_in, self.d_in // self.blocks_in

    @property
    def g(self) -> tuple[int, int]:
        return self.groups * self.blocks_out, self.d_out // self.blocks_out

    def cuts(self, with_g: bool) -> str:
        """What is cut, for the table; nothing where all is whole."""
        counts = {"A": self.blocks_in, "G": self.blocks_out if with_g else 1}
        cut = [f"{name} is cut into {count} blocks" for name, count in counts.items() if count > 1]
        return ", ".join(cut)

    def within(self, limit: int) -> "MatrixSizes":
        """The same in as few equal blocks as keep to the limit, where there are any."""
        out, into = _blocks(self.d_out, limit), _blocks(self.d_in, limit)
        return replace(self, blocks_out=out, blocks_in=into)


def _blocks(d: int, limit: int) -> int:
    counts = range(-(-d // limit), d // SMALLEST_BLOCK + 1)
    return next((k for k in counts if d % k == 0), 1)


SMALLEST_BLOCK = 16  # a factor that falls into smaller ones alone (its size a prime) is left out


@dataclass
class ParameterCoverage:
    """One row of the table: a parameter and what is known of it."""

    name: str
    shape: tuple[int, ...]
    module: str
    statistics: list[str] = field(default_factory=list)
    reason: str = ""  # why a statistic that was asked for is missing, or not whole
    matrix: MatrixSizes | None = None  # of a weight with A and G

    def drop(self, kinds: Iterable[str], reason: str) -> None:
        self.statistics = [kind for kind in self.statistics if kind not in set(kinds)]
        self.reason = reason


@dataclass
class CoveredModule:
    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, str]  # local name ("weight") -> parameter's name in the model

    @property
    def matrix(self) -> str:
        """The parameter that A and G belong to, or the rows of an embedding; "" without one."""
        if self.rule.factors is None and not self.rule.lookup:
            return ""
        return self.parameters.get(self.rule.parameters[0], "")

    def tensor(self, local: str) -> Tensor:
        found = self.module
        *path, last = local.split(".")
        for name in path:
            found = getattr(found, name)
        tensor: Tensor = getattr(found, last)  # a parametrized weight is no parameter
        return tensor


@dataclass
class Coverage:
    """The plan of a capture; `rows` is printed once and kept in the sidecar."""

    rows: dict[str, ParameterCoverage]
    modules: dict[str, CoveredModule]
    frozen: int  # parameters that do not train: left out
    dtypes: dict[str, torch.dtype]  # parameter -> dtype of its sums
    aliases: dict[str, str]  # other name of a tied parameter -> the name used here
    reduce: bool = False  # K-FAC's A and G are of the mean input and the summed gradient
    device: torch.device | None = None  # of the sums; None: of the parameters

    @property
    def uncovered(self) -> dict[str, str]:
        """parameter -> reason, of those that no statistic covers."""
        return {name: row.reason for name, row in self.rows.items() if not row.statistics}

    def form(self) -> dict[str, Any]:
        """What a reader of the sums must know: how K-FAC was taken, other names of parameters,
        the modules whose weight is stored as (d_in, d_out), those with several groups, and how
        many blocks (of A, of G) a factor is cut into."""
        sizes = {row.module: row.matrix for row in self.rows.values() if row.matrix is not None}
        return {
            "weight_sharing": "reduce" if self.reduce else "expand",
            "transposed": [
                name
                for name, covered in self.modules.items()
                if covered.rule.factors is not None and covered.rule.factors.transposed
            ],
            "groups": {module: size.groups for module, size in sizes.items() if size.groups > 1},
            "blocks": {
                module: [size.blocks_in, size.blocks_out]
                for module, size in sizes.items()
                if max(size.blocks_in, size.blocks_out) > 1
            },
            "tied": self.aliases,
        }

    def bytes(self) -> int:
        """Upper bound of the memory that one set of sums takes.

        diagonal Fisher, gradient: numel; A: d_in^2 + d_in for each module (fewer when modules
        share an input, which is known after the first batch), twice d_in^2 for K-FAC with reduce,
        a number a row for an embedding; G: d_out^2; A and G once for each group of a convolution,
        or each block of a factor that is cut into blocks; block Fisher: d^2; times the size of a
        float32 (float64 for float64 parameters).
        """
        total = 0
        for name, row in self.rows.items():
            numel = torch.Size(row.shape).numel()
            elements = numel * len({DIAGONAL, GRADIENT} & set(row.statistics))
            elements += numel**2 if BLOCK in row.statistics else 0
            if {GRAM, KFAC} & set(row.statistics):
                if row.matrix is None:
                    elements += row.shape[0]
                else:
                    (of_a, d_in), (of_g, d_out) = row.matrix.a, row.matrix.g
                    elements += of_a * d_in * (d_in + 1)
                    if KFAC in row.statistics:
                        elements += of_g * d_out**2 + of_a * d_in**2 * self.reduce
            total += elements * self.dtypes[name].itemsize
        return total

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that train and have a statistic, by name."""
        return {
            parameter: tensor
            for covered in self.modules.values()
            for local, parameter in covered.parameters.items()
            if self.rows[parameter].statistics and (tensor := covered.tensor(local)).requires_grad
        }

    def sources(self) -> list[Tensor]:
        """Parameters whose gradients make autograd bring its gradient to every covered layer.

        That of a weight that multiplies costs a product, so where the layer has a bias that
        trains, it is the bias.
        """
        found: dict[int, Tensor] = {}
        for covered in self.modules.values():
            own = list(covered.module.parameters())
            bias = getattr(covered.module, "bias", None)
            if covered.rule.factors and isinstance(bias, nn.Parameter) and bias.requires_grad:
                own = [bias]
            found |= {id(p): p for p in own if p.requires_grad}
        return list(found.values())

    def allocate(self, statistics: Statistics) -> None:
        """Zeros for every sum that is not there yet, but for A, which layers may share.

        So a layer that no gradient reaches has zeros, which is what its curvature is.
        """
        tensors = statistics.tensors
        assert isinstance(tensors, dict)
        statistics.info |= self.form()
        for covered in self.modules.values():
            for local, parameter in covered.parameters.items():
                row, like = self.rows[parameter], covered.tensor(local)
                d = like.numel()
                shapes: dict[str, tuple[int, ...]] = {}
                if DIAGONAL in row.statistics:
                    shapes[f"{DIAGONAL}/{parameter}"] = row.shape
                if BLOCK in row.statistics:
                    shapes[f"{BLOCK}/{parameter}"] = (d, d)
                if KFAC in row.statistics and row.matrix is not None:
                    count, size = row.matrix.g
                    square = (size, size) if count == 1 else (count, size, size)
                    shapes[f"{OUTPUT}/{covered.name}"] = square
                for key, shape in shapes.items():
                    if key not in tensors:
                        device = self.device or like.device
                        zeros = torch.zeros(shape, dtype=self.dtypes[parameter], device=device)
                        tensors[key] = zeros
                if {GRAM, KFAC} & set(row.statistics) and covered.name not in statistics.inputs:
                    statistics.inputs[covered.name] = covered.name
                    statistics.group_positions[covered.name] = 0

    def remove_dropped(self, statistics: Statistics) -> None:
        """Take out what a row has lost while the sums were taken."""
        tensors = statistics.tensors
        assert isinstance(tensors, dict)
        for covered in self.modules.values():
            for parameter in covered.parameters.values():
                kinds = self.rows[parameter].statistics
                for kind in {DIAGONAL, BLOCK} - set(kinds):
                    tensors.pop(f"{kind}/{parameter}", None)
            weight = self.rows.get(covered.matrix)
            if weight is None or KFAC not in weight.statistics:
                tensors.pop(f"{OUTPUT}/{covered.name}", None)
            if weight is None or not {GRAM, KFAC} & set(weight.statistics):
                statistics.inputs.pop(covered.name, None)
        for group in set(statistics.group_positions) - set(statistics.inputs.values()):
            del statistics.group_positions[group]
            for kind in OF_INPUTS:
                tensors.pop(f"{kind}/{group}", None)

    def summary(self) -> str:
        """One line for the parameters that differ in a number only (a layer's index)."""
        lines: dict[tuple[str, str, str], int] = {}
        for name, row in self.rows.items():
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            what = ", ".join(row.statistics) or "not covered"
            what += f" ({row.reason})" if row.reason else ""
            key = (pattern, " x ".join(map(str, row.shape)), what)
            lines[key] = lines.get(key, 0) + 1
        width = max((len(pattern) for pattern, _, _ in lines), default=0)
        text = [
            f"  {count:3d} {pattern:{width}}  {shape:>13}  {what}"
            for (pattern, shape, what), count in lines.items()
        ]
        if self.frozen:
            text.append(f"  {self.frozen:3d} frozen parameters are left out")
        return "\n".join(text)

    def table(self, statistics: Statistics) -> list[dict[str, Any]]:
        """The rows in primitives, for the sidecar, with what is missing in these sums."""
        rows = []
        for row in self.rows.values():
            kinds, reason = row.statistics, row.reason
            if statistics.examples and kinds and not self.reached(row, statistics):
                kinds = [kind for kind in kinds if kind in (DIAGONAL, BLOCK, GRADIENT)]
                reason = "no gradient reached it in the captured batches"
            rows.append(
                {"name": row.name, "shape": list(row.shape), "statistics": kinds, "reason": reason}
            )
        return rows

    def reached(self, row: ParameterCoverage, statistics: Statistics) -> bool:
        """Whether a gradient has come to a parameter that has a statistic."""
        if {GRAM, KFAC} & set(row.statistics):
            return row.module in statistics.positions
        return any(bool(statistics.tensors[f"{k}/{row.name}"].any()) for k in row.statistics)


def sum_dtype(parameter: Tensor) -> torch.dtype:
    """Sums are kept in float32 at least: bfloat16 sums of 200,000 rows are off by 92 %."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
