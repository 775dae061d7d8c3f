"""Which parameter of a model is covered by which statistic, or why by none."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mats_lightning.names import plain_name
from mats_lightning.statistics.layers import PARAMETERS, RULES, Rule, rule_for
from mats_lightning.statistics.record import BLOCK, DIAGONAL, INPUT, INPUT_SUM, OUTPUT, Statistics

GRAM, KFAC = "gram", "kfac"
KINDS = (DIAGONAL, GRAM, KFAC, BLOCK)


@dataclass
class ParameterCoverage:
    """One row of the table: a trainable parameter and what is known of it."""

    name: str
    shape: tuple[int, ...]
    module: str
    statistics: list[str] = field(default_factory=list)
    reason: str = ""  # why a statistic that was asked for is missing

    def drop(self, kinds: Iterable[str], reason: str) -> None:
        self.statistics = [kind for kind in self.statistics if kind not in set(kinds)]
        self.reason = reason


@dataclass
class CoveredModule:
    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, str]  # local name ("weight") -> parameter's name in the model


@dataclass
class Coverage:
    """The plan of a capture; `rows` is printed once and kept in the sidecar."""

    rows: dict[str, ParameterCoverage]
    modules: dict[str, CoveredModule]
    frozen: int  # parameters that do not train: left out
    dtypes: dict[str, torch.dtype]  # parameter -> dtype of its sums
    aliases: dict[str, str]  # other name of a tied parameter -> the name used here

    @property
    def uncovered(self) -> dict[str, str]:
        """parameter -> reason, of those that no statistic covers."""
        return {name: row.reason for name, row in self.rows.items() if not row.statistics}

    def bytes(self) -> int:
        """Upper bound of the memory that one set of sums takes.

        diagonal Fisher: numel; A: d_in^2 + d_in for each module (fewer when modules share an
        input, which is known after the first batch); G: d_out^2; block Fisher: d^2; times the
        size of a float32 (float64 for float64 parameters).
        """
        total = 0
        for name, row in self.rows.items():
            numel = torch.Size(row.shape).numel()
            elements = numel if DIAGONAL in row.statistics else 0
            elements += numel**2 if BLOCK in row.statistics else 0
            if GRAM in row.statistics or KFAC in row.statistics:
                elements += row.shape[1] * (row.shape[1] + 1)
            elements += row.shape[0] ** 2 if KFAC in row.statistics else 0
            total += elements * self.dtypes[name].itemsize
        return total

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that have a statistic, by name."""
        return {
            parameter: getattr(covered.module, local)
            for covered in self.modules.values()
            for local, parameter in covered.parameters.items()
            if self.rows[parameter].statistics
        }

    def allocate(self, statistics: Statistics) -> None:
        """Zeros for every sum that is not there yet, but for A, which layers may share.

        So a layer that no gradient reaches has zeros, which is what its curvature is.
        """
        tensors = statistics.tensors
        assert isinstance(tensors, dict)
        for covered in self.modules.values():
            for local, parameter in covered.parameters.items():
                row, like = self.rows[parameter], getattr(covered.module, local)
                d = like.numel()
                shapes: dict[str, tuple[int, ...]] = {}
                if DIAGONAL in row.statistics:
                    shapes[f"{DIAGONAL}/{parameter}"] = row.shape
                if BLOCK in row.statistics:
                    shapes[f"{BLOCK}/{parameter}"] = (d, d)
                if KFAC in row.statistics:
                    shapes[f"{OUTPUT}/{covered.name}"] = (row.shape[0], row.shape[0])
                for key, shape in shapes.items():
                    if key not in tensors:
                        zeros = torch.zeros(shape, dtype=self.dtypes[parameter], device=like.device)
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
            weight = self.rows.get(covered.parameters.get("weight", ""))
            if weight is None or KFAC not in weight.statistics:
                tensors.pop(f"{OUTPUT}/{covered.name}", None)
            if weight is None or not {GRAM, KFAC} & set(weight.statistics):
                statistics.inputs.pop(covered.name, None)
        for group in set(statistics.group_positions) - set(statistics.inputs.values()):
            del statistics.group_positions[group]
            for kind in (INPUT, INPUT_SUM):
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
            if statistics.examples and kinds and not self._reached(row, statistics):
                kinds = [kind for kind in kinds if kind in (DIAGONAL, BLOCK)]
                reason = "no gradient reached it in the captured batches"
            rows.append(
                {"name": row.name, "shape": list(row.shape), "statistics": kinds, "reason": reason}
            )
        return rows

    def _reached(self, row: ParameterCoverage, statistics: Statistics) -> bool:
        if {GRAM, KFAC} & set(row.statistics):
            return row.module in statistics.positions
        return any(bool(statistics.tensors[f"{k}/{row.name}"].any()) for k in row.statistics)


def sum_dtype(parameter: Tensor) -> torch.dtype:
    """Sums are kept in float32 at least: bfloat16 sums of 200,000 rows are off by 92 %."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def find_coverage(model: nn.Module, kinds: Iterable[str], max_factor_size: int) -> Coverage:
    """Walk the model: every trainable parameter gets its statistics or a reason.

    Raises ValueError for a kind of statistic that does not exist.
    """
    wanted = set(kinds)
    if unknown := sorted(wanted - set(KINDS)):
        raise ValueError(f"no statistic is called '{unknown[0]}'; choose from {', '.join(KINDS)}")
    if not wanted:
        raise ValueError(f"no statistic is chosen; choose from {', '.join(KINDS)}")
    rows: dict[str, ParameterCoverage] = {}
    modules: dict[str, CoveredModule] = {}
    dtypes: dict[str, torch.dtype] = {}
    first_name: dict[int, str] = {}
    frozen: set[int] = set()
    inside_attention = {
        id(child)
        for parent in model.modules()
        if isinstance(parent, nn.MultiheadAttention)
        for child in parent.modules()
    }
    for module_name, module in model.named_modules():
        name = plain_name(module_name)
        rule = rule_for(module)
        if id(module) in inside_attention:
            rule = "nn.MultiheadAttention multiplies without calling its modules"
        elif parametrize.is_parametrized(module):
            rule = "its weight is computed by a parametrization"
        locals_: dict[str, str] = {}
        for local, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                frozen.add(id(parameter))
                continue
            full = first_name.setdefault(id(parameter), f"{name}.{local}" if name else local)
            tied = full in rows
            if not tied:
                rows[full] = ParameterCoverage(full, tuple(parameter.shape), name)
                dtypes[full] = sum_dtype(parameter)
            if not callable(rule):
                kinds_known = ", ".join(kind.__name__ for kind in RULES)
                rows[full].drop(KINDS, rule or f"{type(module).__name__} is none of {kinds_known}")
                continue
            if local not in PARAMETERS:
                rows[full].drop(
                    KINDS, f"a {type(module).__name__} has no parameter '{local}' of its own"
                )
                continue
            if parameter.is_complex():
                rows[full].drop(KINDS, "complex parameters have no statistic here")
                continue
            if tied and not rows[full].statistics:
                continue  # its other use is not covered, so neither is their sum
            locals_[local] = full
            row = rows[full]
            if tied:
                row.drop((GRAM, KFAC), f"tied: shared by {row.module} and {name}")
            else:
                _assign(row, module, wanted, max_factor_size)
        if callable(rule) and locals_:
            modules[name] = CoveredModule(name, module, rule, locals_)
    aliases = {
        plain_name(name): first_name[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first_name.get(id(parameter), plain_name(name)) != plain_name(name)
    }
    return Coverage(rows, modules, len(frozen), dtypes, aliases)


def _assign(row: ParameterCoverage, module: nn.Module, wanted: set[str], limit: int) -> None:
    """The statistics that a parameter can have, among those wanted, within the size limit."""
    matrix = isinstance(module, nn.Linear) and len(row.shape) == 2
    can = {DIAGONAL}
    if matrix:
        can |= {GRAM, KFAC}
    elif not isinstance(module, nn.Embedding):
        can.add(BLOCK)
    size = {GRAM: row.shape[-1], KFAC: max(row.shape), BLOCK: torch.Size(row.shape).numel()}
    large = [kind for kind in (GRAM, KFAC, BLOCK) if kind in can & wanted and size[kind] > limit]
    row.statistics = [kind for kind in KINDS if kind in can & wanted and kind not in large]
    if large:
        row.reason = (
            f"no {' or '.join(large)}: size {max(size[kind] for kind in large)} is above"
            f" max_factor_size={limit}"
        )
    elif not row.statistics:
        row.reason = f"no statistic that was chosen fits a {type(module).__name__} {row.shape}"
