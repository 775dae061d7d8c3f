"""What comes through the layers in one batch, added to the sums."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mats_lightning.batches import Masks
from mats_lightning.statistics.coverage import CoveredModule
from mats_lightning.statistics.gradients import ExampleGradients
from mats_lightning.statistics.layers import leaf
from mats_lightning.statistics.record import BLOCK, DIAGONAL, GRADIENT, KFAC, KINDS
from mats_lightning.statistics.sums import Sums
from mats_lightning.verification import MORE_IN_IT, GradientCheck


@dataclass(eq=False)
class Input:
    """A tensor that one layer was given, or several, each of them once."""

    a: Tensor
    readers: set[str] = field(default_factory=set)  # the layers with an A that were given it
    arrived: set[str] = field(default_factory=set)  # those of them whose gradient came back
    added: bool = False  # to their A

    def __post_init__(self) -> None:
        self.version = self.a._version

    @property
    def changed(self) -> bool:
        """Whether it was written to since the layers read it."""
        return self.a._version != self.version


@dataclass(eq=False)
class Use:
    """One call of a layer in the forward pass, and the gradient that came back to it."""

    module: str
    input: Input | None  # let go when it has been added
    g: Tensor | None = None


def sharing_groups(modules: Mapping[str, CoveredModule]) -> dict[str, str]:
    """module -> group; modules that share a parameter are added together, so are one group."""
    group = {name: name for name in modules}
    first: dict[str, str] = {}
    for name, covered in modules.items():
        for parameter in covered.parameters.values():
            here, there = group[name], group[first.setdefault(parameter, name)]
            if here != there:
                group = {m: there if g == here else g for m, g in group.items()}
    return group


@dataclass(eq=False)
class BatchSums:
    """One batch that is being captured.

    As soon as all uses of a layer (and of those it shares a parameter with) have their gradients,
    they are added to the sums and let go.
    """

    sums: Sums
    owner: Mapping[str, str]  # module -> the group that is added together, of `sharing_groups`
    examples: int
    scale: float  # gradient of one example's loss / gradient that autograd brings
    masks: Masks  # which positions count
    defer: bool  # keep everything until the backward pass ends: an overflow may void it
    backward: bool = False  # the backward pass of the batch's loss has begun
    calls: Counter[str] = field(default_factory=Counter)  # group -> forward calls before it
    arrived: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    waiting: dict[Input, None] = field(default_factory=dict)  # some readers have no gradient yet
    seen: dict[tuple[Any, ...], "weakref.ref[Input]"] = field(default_factory=dict)
    gradients: int = 0
    finite: bool = True
    finished: bool = False
    check: GradientCheck | None = None  # of parameters that have not been checked yet

    @property
    def interrupted(self) -> bool:
        """Whether a part of it may be in the sums, and not all."""
        return self.gradients > 0 and not self.finished and not self.defer

    def input_of(self, covered: CoveredModule, a: Tensor) -> Input:
        """A layer that is given the same tensor as others joins them, unless it has already."""
        name, factors = covered.name, covered.rule.factors
        alone = "" if factors is not None and factors.shared else name
        key = (alone, a.data_ptr(), a.shape, a.stride(), a.dtype, a._version)
        given = self.seen.get(key, lambda: None)()
        if given is None or given.added or name in given.readers:
            given = Input(a)
            self.seen[key] = weakref.ref(given)
        if name in self.sums.statistics.inputs:
            given.readers.add(name)
        return given

    def add(self, use: Use, g: Tensor) -> None:
        """The gradient that came back to a use."""
        self.gradients += 1
        use.g = g.detach()
        if self.defer:
            self.finite = self.finite and bool(torch.isfinite(g).all())
            if not self.finite:
                return  # nothing of the batch will count
        group = self.owner[use.module]
        self.arrived[group].append(use)
        if not self.defer and len(self.arrived[group]) == self.calls[group]:
            self.add_group(group)

    def void(self) -> None:
        """Before its gradients come: they are not to be added, and the batch counts as skipped."""
        self.defer, self.finite = True, False

    def drop(self, module: str, reason: str, kinds: Sequence[str] = KINDS) -> None:
        """These statistics of a module's parameters."""
        self.sums.drop(self.sums.rows(module), kinds, reason)

    def finish(self) -> bool:
        """Add what is left, count the examples; False when no gradient came to a covered layer."""
        if not self.gradients:
            return False
        self.finished = True
        statistics = self.sums.statistics
        if not self.finite:
            skipped = statistics.info.get("skipped_batches", 0)
            statistics.info["skipped_batches"] = skipped + 1
            return True
        for group in list(self.arrived):
            self.add_group(group)
        for given in list(self.waiting):  # an output of a reader was not used
            self.add_input(given)
        statistics.examples += self.examples
        if self.check is not None:
            self.sums.drop(self.check.differing(self.scale), KINDS, MORE_IN_IT)
        return True

    def add_group(self, group: str) -> None:
        uses = self.arrived.pop(group)
        assert uses[0].g is not None
        with _plain_arithmetic(uses[0].g):
            gradients: dict[str, list[ExampleGradients]] = defaultdict(list)
            for use in uses:
                self.add_use(use, gradients)
                use.input = use.g = None
            for parameter, parts in gradients.items():
                if self.check is not None and self.check.watches([parameter]):
                    self.check.add(parameter, parts, self.sums.zeros(parameter, parts[0].device))
                self.sums.add_gradients(parameter, parts)

    def add_use(self, use: Use, gradients: dict[str, list[ExampleGradients]]) -> None:
        assert use.g is not None and use.input is not None
        coverage = self.sums.coverage
        covered, rows = coverage.modules[use.module], self.sums.rows(use.module)
        if use.input.changed:  # autograd keeps a copy of its own under autocast, so does not mind
            weights = [row for row in rows if row != covered.parameters.get("bias")]
            self.sums.drop(
                weights, KINDS, f"the input of {use.module} was changed in place after it"
            )
        if use.g.shape[0] != self.examples:
            once = use.g.ndim > 2 and use.g.shape[0] == 1  # for all examples, and g is their sum
            self.sums.drop(
                rows,
                (DIAGONAL, BLOCK, KFAC) if coverage.reduce or once else (DIAGONAL, BLOCK),
                f"the output of {use.module} has {use.g.shape[0]} rows for {self.examples}"
                " examples, so an example's gradient cannot be told apart",
            )
            if self.check is not None:
                self.check.skip(rows)
        kinds = {kind for row in rows for kind in coverage.rows[row].statistics}
        if not kinds - {GRADIENT}:
            return
        dtype = coverage.dtypes[rows[0]]
        g = use.g.to(dtype) * self.scale
        if KFAC in kinds:
            self.sums.add_output(use.module, g, self.masks.of_module)
        if use.module in use.input.readers:
            use.input.arrived.add(use.module)
            if use.input.arrived == use.input.readers:
                self.add_input(use.input)
            else:
                self.waiting[use.input] = None
        checked = self.check is not None and self.check.watches(rows)
        if g.shape[0] != self.examples or not (checked or kinds & {DIAGONAL, BLOCK}):
            return
        a = use.input.a
        a = a.to(dtype) if a.is_floating_point() else a
        try:
            found = covered.rule.gradients(covered.module, a, g)
        except Exception as error:  # whatever its own forward raises for a single example
            if covered.rule.gradients is not leaf:
                raise
            first = str(error).strip().partition("\n")[0]
            self.sums.drop(rows, KINDS, f"autograd of {use.module} for each example fails: {first}")
            return
        for local, gradient in found.items():
            parameter = covered.parameters.get(local)
            if parameter and coverage.rows[parameter].statistics:
                gradients[parameter].append(gradient)
        if self.check is not None:
            self.check.computed_in(use.g.dtype)

    def add_input(self, given: Input) -> None:
        """For the layers whose gradients came back."""
        given.added = True
        self.waiting.pop(given, None)
        with _plain_arithmetic(given.a):
            for readers in self.masks.alike(given.arrived):
                self.sums.add_input(readers, given.a, self.examples, self.masks.of_module)


@contextmanager
def _plain_arithmetic(like: Tensor) -> Iterator[None]:
    """No graph, and no autocast: it would multiply in 16 bits."""
    with torch.no_grad(), torch.autocast(device_type=like.device.type, enabled=False):
        yield
