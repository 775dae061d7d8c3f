"""Hooks on the covered layers: (input a, output gradient g) of each, turned into sums.

A forward hook keeps a layer's input; a hook on the output tensor brings its gradient. As soon
as all uses of a layer (and of those it shares a parameter with) have theirs, they are added to
the sums and let go. The scale of the loss is undone here and only here, so that g is the
gradient of one example's unreduced loss.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mats_lightning.statistics.coverage import GRAM, KFAC, Coverage, CoveredModule
from mats_lightning.statistics.gradients import (
    ExampleGradients,
    VectorGradients,
    add_squares_of_sum,
)
from mats_lightning.statistics.record import BLOCK, DIAGONAL, INPUT, INPUT_SUM, OUTPUT, Statistics


@dataclass(eq=False)
class Use:
    """One call of a layer in the forward pass, and the gradient that came back to it."""

    module: str
    a: Tensor
    serial: int  # equal for the layers that were given the same tensor
    g: Tensor | None = None


@dataclass
class Batch:
    """What is known of the batch being captured."""

    examples: int
    scale: float  # gradient of one example's loss / gradient that autograd brings
    mask: Tensor | None  # (N, R), true where a position counts
    defer: bool  # keep everything until the backward pass ends: an overflow may void it
    calls: Counter[str] = field(default_factory=Counter)  # group -> forward calls
    tracked: Counter[str] = field(default_factory=Counter)  # module -> calls with gradient
    arrived: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    serials: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    done: set[tuple[str, int]] = field(default_factory=set)  # (input group, serial) added to A
    backward: bool = False  # a gradient has arrived
    finite: bool = True
    seen: dict[tuple[Any, ...], "weakref.ref[Use]"] = field(default_factory=dict)
    serial: int = 0


def _sharing_groups(modules: Mapping[str, CoveredModule]) -> dict[str, str]:
    """module -> group; modules that share a parameter are added together, so are one group."""
    group = {name: name for name in modules}
    first: dict[str, str] = {}
    for name, covered in modules.items():
        for parameter in covered.parameters.values():
            here, there = group[name], group[first.setdefault(parameter, name)]
            if here != there:
                group = {m: there if g == here else g for m, g in group.items()}
    return group


class Capture:
    """Adds the statistics of single batches to a `Statistics`.

    Usage: `with capture.batch(...): loss = forward(batch); loss.backward(); capture.finish()`.
    Only the batches inside of `batch` cost anything: the hooks are registered there and are off
    again when it is left, whatever happens.
    """

    def __init__(self, coverage: Coverage, statistics: Statistics) -> None:
        self.coverage = coverage
        self.statistics = statistics
        self._batch: Batch | None = None
        self._tensors = statistics.tensors
        assert isinstance(self._tensors, dict), "sums are added in place: not to a lazy record"
        self._group = _sharing_groups(coverage.modules)

    @contextmanager
    def batch(
        self, examples: int, scale: float, mask: Tensor | None = None, defer: bool = False
    ) -> Iterator[None]:
        """Capture what happens inside, as one batch of `examples` rows.

        `scale` times the gradient of the reduced (averaged, accumulated, loss-scaled) loss is
        the gradient of an example's own loss. `mask` (N, R) applies to layers whose input has
        that leading shape. `defer` holds all inputs and gradients until `finish`, which throws
        the batch away when one is not finite (needed with a gradient scaler).
        """
        self._batch = Batch(examples, scale, mask, defer)
        handles: list[RemovableHandle] = []
        try:
            for covered in self.coverage.modules.values():
                handles.append(
                    covered.module.register_forward_hook(self._forward_hook(covered), with_kwargs=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._batch = None

    @property
    def skipped_batches(self) -> int:
        """Batches thrown away because a gradient was not finite."""
        return int(self.statistics.info.get("skipped_batches", 0))

    def finish(self) -> bool:
        """The backward pass of the batch has ended: add what is left, count its examples.

        Returns False when the batch was thrown away for a gradient that is not finite.
        """
        batch = self._batch
        if batch is None or not batch.backward:
            return False
        if not batch.finite:
            self.statistics.info["skipped_batches"] = self.skipped_batches + 1
            return False
        for group in list(batch.arrived):
            self._add_group(batch, group)
        self.statistics.examples += batch.examples
        return True

    # -- hooks -------------------------------------------------------------------------------

    def _forward_hook(self, covered: CoveredModule) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
        ) -> Tensor | None:
            batch = self._batch
            if batch is None:
                return None
            name = covered.name
            if not batch.backward:
                # Calls without gradient count too: re-entrant checkpointing runs them again.
                batch.calls[self._group[name]] += 1
            elif batch.tracked[name]:
                return None  # a checkpointed segment run again: its first run is the one hooked
            if not output.requires_grad:
                return None
            if not batch.backward:
                batch.tracked[name] += 1
            a = (args[0] if args else next(iter(kwargs.values()))).detach()
            expanded = None
            if isinstance(module, nn.Embedding) and a.shape[0] == 1 < batch.examples:
                # Positions are looked up once and broadcast over the batch, which sums their
                # gradients before we see them; broadcasting here keeps the examples apart.
                a = a.expand(batch.examples, *a.shape[1:])
                output = expanded = output.expand(batch.examples, *output.shape[1:])
            use = self._new_use(batch, name, a)
            output.register_hook(lambda g: self._gradient_hook(batch, use, g))
            return expanded

        return hook

    def _new_use(self, batch: Batch, name: str, a: Tensor) -> Use:
        key = (a.data_ptr(), a.shape, a.stride(), a.dtype, a._version)
        before = batch.seen.get(key, lambda: None)()
        if before is not None:
            use = Use(name, before.a, before.serial)
        else:
            batch.serial += 1
            use = Use(name, a, batch.serial)
        batch.seen[key] = weakref.ref(use)
        batch.serials[name].append(use.serial)
        return use

    def _gradient_hook(self, batch: Batch, use: Use, g: Tensor) -> None:
        if batch is not self._batch:
            return  # a later backward through the same graph
        batch.backward = True
        use.g = g.detach()
        group = self._group[use.module]
        batch.arrived[group].append(use)
        if batch.defer:
            batch.finite = batch.finite and bool(torch.isfinite(g).all())
        elif len(batch.arrived[group]) == batch.calls[group]:
            self._add_group(batch, group)

    # -- sums --------------------------------------------------------------------------------

    def _add_group(self, batch: Batch, group: str) -> None:
        uses = batch.arrived.pop(group)
        device = uses[0].a.device.type
        with torch.no_grad(), torch.autocast(device_type=device, enabled=False):
            gradients: dict[str, list[ExampleGradients]] = defaultdict(list)
            for use in uses:
                self._add_use(batch, use, gradients)
            for parameter, parts in gradients.items():
                self._add_gradients(parameter, parts)

    def _add_use(
        self, batch: Batch, use: Use, gradients: dict[str, list[ExampleGradients]]
    ) -> None:
        covered = self.coverage.modules[use.module]
        rows = [self.coverage.rows[p] for p in covered.parameters.values()]
        kinds = {kind for row in rows for kind in row.statistics}
        if not kinds:
            return
        dtype = self.coverage.dtypes[rows[0].name]
        assert use.g is not None
        a = use.a.to(dtype) if use.a.is_floating_point() else use.a
        g = use.g.to(dtype) * batch.scale
        if kinds & {GRAM, KFAC}:
            self._add_factors(batch, use, a, g, kfac=KFAC in kinds)
        if not kinds & {DIAGONAL, BLOCK}:
            return
        if g.shape[0] != batch.examples:
            for row in rows:
                row.drop(
                    (DIAGONAL, BLOCK),
                    f"the output of {use.module} has {g.shape[0]} rows for {batch.examples}"
                    " examples, so an example's gradient cannot be told apart",
                )
                for kind in (DIAGONAL, BLOCK):
                    self._tensors.pop(f"{kind}/{row.name}", None)
            return
        for local, gradient in covered.rule(covered.module, a, g).items():
            parameter = covered.parameters.get(local)
            if parameter and {DIAGONAL, BLOCK} & set(self.coverage.rows[parameter].statistics):
                gradients[parameter].append(gradient)

    def _add_gradients(self, parameter: str, parts: list[ExampleGradients]) -> None:
        row = self.coverage.rows[parameter]
        vectors = [part.v for part in parts if isinstance(part, VectorGradients)]
        if len(vectors) == len(parts):  # several uses of a vector: one sum an example
            parts = [VectorGradients(torch.stack(vectors).sum(0))]
        device = parts[0].device
        if DIAGONAL in row.statistics:
            total = self._total(f"{DIAGONAL}/{parameter}", row.shape, parameter, device)
            add_squares_of_sum(parts, total)
        if BLOCK in row.statistics and isinstance(parts[0], VectorGradients):
            d = torch.Size(row.shape).numel()
            parts[0].add_outer(self._total(f"{BLOCK}/{parameter}", (d, d), parameter, device))

    def _add_factors(self, batch: Batch, use: Use, a: Tensor, g: Tensor, kfac: bool) -> None:
        """A += sum a a^T and G += sum g g^T over the positions that the mask leaves."""
        statistics, module = self.statistics, use.module
        weight = self.coverage.modules[module].parameters["weight"]
        d_in, d_out = a.shape[-1], g.shape[-1]
        keep = None
        if batch.mask is not None and batch.mask.shape == a.shape[:-1]:
            keep = batch.mask.reshape(-1)
        if kfac:
            g = g.reshape(-1, d_out)
            g = g if keep is None else g[keep]
            self._total(f"{OUTPUT}/{module}", (d_out, d_out), weight, g.device).addmm_(g.T, g)
        group = self._input_group(batch, module)
        if (group, use.serial) in batch.done:
            return
        batch.done.add((group, use.serial))
        a = a.reshape(-1, d_in)
        a = a if keep is None else a[keep]
        self._total(f"{INPUT}/{group}", (d_in, d_in), weight, a.device).addmm_(a.T, a)
        self._total(f"{INPUT_SUM}/{group}", (d_in,), weight, a.device).add_(a.sum(0))
        statistics.group_positions[group] = statistics.group_positions.get(group, 0) + len(a)

    def _total(
        self, key: str, shape: tuple[int, ...], parameter: str, device: torch.device
    ) -> Tensor:
        total = self._tensors.get(key)
        if total is None:
            dtype = self.coverage.dtypes[parameter]
            total = self._tensors[key] = torch.zeros(shape, dtype=dtype, device=device)
        return total

    def _has_factors(self, module: str) -> bool:
        covered = self.coverage.modules[module]
        weight = covered.parameters.get("weight")
        return weight is not None and bool(
            {GRAM, KFAC} & set(self.coverage.rows[weight].statistics)
        )

    def _input_group(self, batch: Batch, module: str) -> str:
        """The group whose A this module's inputs go to: modules that were given equal tensors.

        Groups are formed when a module is first seen and split, with a copy of their sums, in
        the batch in which their inputs differ: what is stored is exact for each module.
        """
        inputs, mine = self.statistics.inputs, batch.serials[module]
        if module not in inputs:
            same = [m for m, s in batch.serials.items() if s == mine and m not in inputs]
            same = [m for m in same if self._has_factors(m)]
            inputs.update({m: same[0] for m in same})
            return inputs[module]
        group = inputs[module]
        members = [m for m, g in inputs.items() if g == group]
        same = [m for m in members if batch.serials[m] == mine]
        if len(same) == len(members):
            return group
        leaving = same if group not in same else [m for m in members if m not in same]
        new = leaving[0]
        inputs.update({m: new for m in leaving})
        for kind in (INPUT, INPUT_SUM):
            if f"{kind}/{group}" in self._tensors:
                self._tensors[f"{kind}/{new}"] = self._tensors[f"{kind}/{group}"].clone()
        if group in self.statistics.group_positions:
            self.statistics.group_positions[new] = self.statistics.group_positions[group]
        batch.done |= {(new, serial) for g, serial in batch.done if g == group}
        return inputs[module]
