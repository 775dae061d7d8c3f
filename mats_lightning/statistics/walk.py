"""Walks a model, and finds the statistics that each of its parameters can have."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from mats_lightning.names import plain_name
from mats_lightning.statistics.adapters import BASE, adapter_rule
from mats_lightning.statistics.coverage import (
    Coverage,
    CoveredModule,
    MatrixSizes,
    ParameterCoverage,
    sum_dtype,
)
from mats_lightning.statistics.layers import RULES, Rule, leaf_rule, rule_for
from mats_lightning.statistics.record import ALL_KINDS, BLOCK, DIAGONAL, GRADIENT, GRAM, KFAC, KINDS

WEIGHT_SHARING = ("expand", "reduce")


def check_kinds(kinds: str | Iterable[str], weight_sharing: str) -> tuple[str, ...]:
    """The kinds of statistics, of which there may be one.

    Raises ValueError for a kind, or a way of K-FAC, that does not exist, for none, and for the
    gradient alone.
    """
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if unknown := sorted(set(chosen) - set(ALL_KINDS)):
        known = ", ".join(ALL_KINDS)
        raise ValueError(f"no statistic is called '{unknown[0]}'; choose from {known}")
    if set(chosen) == {GRADIENT}:
        raise ValueError(f"the gradient is taken beside a curvature: add one of {', '.join(KINDS)}")
    if not chosen:
        raise ValueError(f"no statistic is chosen; choose from {', '.join(KINDS)}")
    if weight_sharing not in WEIGHT_SHARING:
        raise ValueError(
            f"weight_sharing={weight_sharing!r}; choose from {', '.join(WEIGHT_SHARING)}"
        )
    return chosen


def find_coverage(
    model: nn.Module,
    kinds: str | Iterable[str],
    max_factor_size: int,
    weight_sharing: str = "expand",
    adapted_weights: bool = False,
    device: torch.device | None = None,
) -> Coverage:
    """Walk the model: every trainable parameter gets its statistics or a reason.

    `adapted_weights` adds A and G of the frozen weights that LoRA sits on.

    The gradient is autograd's own, so every trainable parameter has it, covered by a rule or not.

    Raises ValueError as `check_kinds` does, for a max_factor_size below 1, and for lazy modules
    that have not been called.
    """
    wanted = set(check_kinds(kinds, weight_sharing))
    if max_factor_size < 1:
        raise ValueError(f"max_factor_size={max_factor_size}; it must be 1 or more")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"'{name}' has no shape yet: call the model on a batch before the fit, which makes"
                " its lazy modules ordinary ones"
            )
    walk = _Walk(wanted, max_factor_size, adapted_weights, _inside_attention(model))
    for name, module in model.named_modules():
        walk.visit(plain_name(name), module)
    if GRADIENT in wanted:
        for parameter in model.parameters():
            if parameter.requires_grad:
                walk.rows[walk.first_name[id(parameter)]].statistics.append(GRADIENT)
    aliases = {
        plain_name(name): walk.first_name[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if walk.first_name.get(id(parameter), plain_name(name)) != plain_name(name)
    }
    frozen = sum(1 for p in model.parameters() if not p.requires_grad)
    return Coverage(
        walk.rows, walk.modules, frozen, walk.dtypes, aliases, weight_sharing == "reduce", device
    )


def _inside_attention(model: nn.Module) -> set[int]:
    return {
        id(child)
        for parent in model.modules()
        if isinstance(parent, nn.MultiheadAttention)
        for child in parent.modules()
    }


class _Walk:
    """Goes through the modules of a model, parents before children."""

    def __init__(
        self, wanted: set[str], limit: int, adapted_weights: bool, inside_attention: set[int]
    ) -> None:
        self.rows: dict[str, ParameterCoverage] = {}
        self.modules: dict[str, CoveredModule] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.first_name: dict[int, str] = {}
        self._adapted: set[str] = set()  # parameters that an adapter layer's rule is for
        self._wanted, self._limit = wanted, limit
        self._adapted_weights, self._inside_attention = adapted_weights, inside_attention

    def visit(self, name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        adapter = adapter_rule(module, self._adapted_weights)
        rule = adapter or self._rule(module)
        found = dict(module.named_parameters(recurse=False))
        below = {}  # the frozen weight that an adapter layer without a rule sits on
        if isinstance(adapter, Rule):
            found |= {local: module.get_parameter(local) for local in adapter.parameters}
            if not adapter.trained:  # A and G are named after the module whose weight it is
                name = f"{name}.{adapter.parameters[0].rpartition('.')[0]}"
        elif adapter is not None:
            weights = {local: p for local, p in module.named_parameters() if local == BASE}
            below = {local: p for local, p in weights.items() if not p.requires_grad}
            found |= below
        covered = CoveredModule(name, module, rule, {}) if isinstance(rule, Rule) else None
        for local, parameter in found.items():
            full = f"{prefix}{local}"
            if full in self._adapted:
                continue
            if isinstance(adapter, Rule) or local in below:
                self._adapted.add(full)
            elif not parameter.requires_grad:
                continue
            if reason := self._row(full, local, parameter, name, module, rule):
                self.rows[self.first_name[id(parameter)]].drop(KINDS, reason)
            elif covered is not None and self.rows[self.first_name[id(parameter)]].statistics:
                covered.parameters[local] = self.first_name[id(parameter)]
        if covered is not None and covered.parameters:
            self.modules[name] = covered

    def _rule(self, module: nn.Module) -> Rule | str:
        if id(module) in self._inside_attention:
            return "nn.MultiheadAttention multiplies without calling its modules"
        if parametrize.is_parametrized(module):
            return "its weight is computed by a parametrization"
        rule = rule_for(module)
        if rule is None and not isinstance(module, nn.ParameterDict | nn.ParameterList):
            rule = leaf_rule(module, self._limit)
        known = ", ".join(kind.__name__ for kind in RULES)
        return rule or (
            f"{type(module).__name__} is none of {known}, and no small module without children"
        )

    def _row(
        self,
        full: str,
        local: str,
        parameter: Tensor,
        name: str,
        module: nn.Module,
        rule: Rule | str,
    ) -> str | None:
        """Make the row of a parameter, or add to that of a tied one; why it has no statistic."""
        first = self.first_name.setdefault(id(parameter), full)
        tied = first in self.rows
        if not tied:
            self.rows[first] = ParameterCoverage(first, tuple(parameter.shape), name)
            self.dtypes[first] = sum_dtype(parameter)
        if isinstance(rule, str):
            return rule
        if local not in rule.parameters:  # of weight_norm and such
            return f"a {type(module).__name__} has no parameter '{local}' of its own"
        if parameter.is_complex():
            return "complex parameters have no statistic here"
        row = self.rows[first]
        if tied:
            if row.statistics:  # or else its other use is not covered, so neither is their sum
                row.drop((GRAM, KFAC), f"tied: shared by {row.module} and {name}")
            return None
        self._assign(row, local, parameter, module, rule)
        return None

    def _assign(
        self, row: ParameterCoverage, local: str, parameter: Tensor, module: nn.Module, rule: Rule
    ) -> None:
        """The statistics that a parameter can have, among those wanted, within the size limit."""
        can, size = {DIAGONAL} if parameter.requires_grad else set(), {}
        if rule.factors is not None and local == rule.parameters[0]:
            sizes = MatrixSizes(*rule.factors.sizes(module))
            row.matrix = sizes = sizes.within(self._limit)
            can |= {GRAM, KFAC}
            size = {GRAM: sizes.a[1], KFAC: max(sizes.a[1], sizes.g[1])}
        elif rule.lookup:
            can.add(GRAM)
        if local in rule.blocks:
            can.add(BLOCK)
            size[BLOCK] = torch.Size(row.shape).numel()
        chosen = [kind for kind in KINDS if kind in can & self._wanted]
        large = [kind for kind in chosen if size.get(kind, 0) > self._limit]
        row.statistics = [kind for kind in chosen if kind not in large]
        if large:
            row.reason = (
                f"no {' or '.join(large)}: size {max(size[kind] for kind in large)} is above"
                f" max_factor_size={self._limit}"
            )
        elif row.matrix is not None and {GRAM, KFAC} & set(row.statistics):
            row.reason = row.matrix.cuts(KFAC in row.statistics)
        if not chosen:
            kind = type(module).__name__
            row.reason = f"no statistic that was chosen fits a {kind} {row.shape}"
