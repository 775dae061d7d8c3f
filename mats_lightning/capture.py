"""Hooks on the covered layers: (input a, output gradient g) of each, turned into sums.

A forward hook keeps a layer's input; a hook on the output tensor brings its gradient. As soon
as all uses of a layer (and of those it shares a parameter with) have theirs, they are added to
the sums and let go. The caller says the scale of the loss; it is applied here and only here, so
that g is the gradient of one example's unreduced loss.

The first axis of a layer's input and output is taken to be the batch's examples; a layer in
which it has another length is named, and has no statistic of single examples.
"""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mats_lightning.batches import Masks
from mats_lightning.broadcast import ExamplesGradient, LookedUpOnce
from mats_lightning.statistics.coverage import Coverage, CoveredModule
from mats_lightning.statistics.gradients import (
    ExampleGradients,
)
from mats_lightning.statistics.layers import leaf
from mats_lightning.statistics.record import BLOCK, DIAGONAL, GRADIENT, KFAC, KINDS, Statistics
from mats_lightning.statistics.sums import Sums
from mats_lightning.verification import GradientCheck


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


@dataclass
class Batch:
    """What is known of the batch being captured."""

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
    check: GradientCheck | None = None  # in the first batch


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

    Usage:

        with capture.batch(examples, scale, mask):
            loss = forward(batch)
            capture.start_backward()
            loss.backward()
            capture.finish()

    Only the batches inside of `batch` cost anything: the hooks are registered there and are off
    again when it is left, whatever happens. Compiled models run without the compiler there.
    """

    def __init__(self, coverage: Coverage, statistics: Statistics) -> None:
        self.coverage = coverage
        self.statistics = statistics
        self._batch: Batch | None = None
        self._sums = Sums(coverage, statistics)
        self._owner = _sharing_groups(coverage.modules)

    @contextmanager
    def batch(
        self,
        examples: int,
        scale: float,
        masks: Masks | Tensor | None = None,
        defer: bool = False,
    ) -> Iterator[None]:
        """Capture what happens inside, as one batch of `examples` rows.

        `scale` times the gradient of the reduced (averaged, accumulated, loss-scaled) loss is
        the gradient of an example's own loss. `masks` say which positions of a layer count.
        `defer` holds all inputs and gradients until `finish`, which throws the batch away when
        one is not finite (needed with a gradient scaler).
        """
        self._batch = Batch(examples, scale, Masks.of(masks), defer)
        handles: list[RemovableHandle] = []
        if not self.statistics.examples:
            self._batch.check = GradientCheck(self.coverage.tensors())
            handles += self._batch.check.handles
        try:
            for covered in self.coverage.modules.values():
                hook = self._forward_hook(covered)
                # in front of the user's own hooks, which may change the output
                handles.append(
                    covered.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
                )
            with _uncompiled():
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._batch = None

    def start_backward(self) -> None:
        """The backward pass of the batch's loss begins.

        Gradients that came before it (an adversarial step, say) are not the loss's, and calls
        that come after it are a checkpointed segment's, run again.
        """
        if self._batch is not None:
            self._batch.backward = True
            if self._batch.check is not None:
                self._batch.check.restart()

    @property
    def active(self) -> bool:
        return self._batch is not None

    @property
    def needed(self) -> list[Tensor]:
        """What torch.autograd.grad must be asked for in this batch.

        A few parameters bring the gradient to every layer (`Coverage.sources`); the check of the
        first batch needs all.
        """
        if self._batch is None or self._batch.check is None:
            return self.coverage.sources()
        both = [*self.coverage.sources(), *self.coverage.tensors().values()]
        return list({id(p): p for p in both}.values())

    @property
    def skipped_batches(self) -> int:
        """Batches thrown away because a gradient was not finite."""
        return int(self.statistics.info.get("skipped_batches", 0))

    def finish(self) -> bool:
        """The backward pass of the batch has ended: add what is left, count its examples.

        Returns False when no gradient came to a covered layer: nothing is added or counted.
        """
        batch = self._batch
        if batch is None or not batch.gradients:
            return False
        if not batch.finite:
            self.statistics.info["skipped_batches"] = self.skipped_batches + 1
            return True
        for group in list(batch.arrived):
            self._add_group(batch, group)
        for given in list(batch.waiting):  # an output of a reader was not used
            self._add_input(batch, given)
        self.statistics.examples += batch.examples
        if batch.check is not None:
            why = "the model uses it without calling its layer, too"
            self._sums.drop(batch.check.differing(batch.scale), KINDS, why)
        return True

    def add_gradients(self, gradients: Mapping[str, Tensor], scale: float) -> None:
        """Add `scale` times autograd's own gradients, by parameter, to the sums "gradient"."""
        with torch.no_grad():
            self._sums.add_gradients_of_loss(gradients, scale)

    # -- hooks -------------------------------------------------------------------------------

    def _forward_hook(self, covered: CoveredModule) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> Tensor | None:
            batch = self._batch
            if batch is None:
                return None
            everything = (*args, *kwargs.values())
            given = [x for x in everything if isinstance(x, Tensor)]
            alone = len(everything) == 1 or covered.rule.gradients is not leaf
            if len(given) != 1 or not alone or not isinstance(output, Tensor):
                why = f"{covered.name} is not called with one tensor, or does not give one"
                self._sums.drop(self._sums.rows(covered.name), KINDS, why)
                return None
            if not batch.backward:
                # Calls without gradient count too: re-entrant checkpointing runs them again.
                batch.calls[self._owner[covered.name]] += 1
            if not output.requires_grad:
                return None
            a = given[0].detach()
            use = Use(covered.name, self._input(batch, covered, a))
            if isinstance(module, nn.Embedding) and a.shape[0] == 1 < batch.examples:
                examples = ExamplesGradient(batch.examples)
                output.register_hook(
                    lambda g: self._gradient_hook(batch, use, examples.instead_of(g))
                )
                return LookedUpOnce.of(output, examples)
            # A segment that is run again by non-reentrant checkpointing has outputs to which no
            # gradient comes; its first run has.
            output.register_hook(lambda g: self._gradient_hook(batch, use, g))
            return None

        return hook

    def _input(self, batch: Batch, covered: CoveredModule, a: Tensor) -> Input:
        """A layer that is given the same tensor as others joins them, unless it has already."""
        name, factors = covered.name, covered.rule.factors
        alone = "" if factors is not None and factors.shared else name
        key = (alone, a.data_ptr(), a.shape, a.stride(), a.dtype, a._version)
        given = batch.seen.get(key, lambda: None)()
        if given is None or given.added or name in given.readers:
            given = Input(a)
            batch.seen[key] = weakref.ref(given)
        if name in self.statistics.inputs:
            given.readers.add(name)
        return given

    def _gradient_hook(self, batch: Batch, use: Use, g: Tensor) -> None:
        if batch is not self._batch:
            return
        again = use.g is not None or use.input is None
        if again or (g.requires_grad and not batch.backward):
            why = f"the loss has a gradient in it that was taken through {use.module}"
            self._sums.drop(self._sums.rows(use.module), KINDS, why)
            return
        if not batch.backward:
            return  # of another loss, before the batch's own
        batch.gradients += 1
        use.g = g.detach()
        group = self._owner[use.module]
        batch.arrived[group].append(use)
        if batch.defer:
            batch.finite = batch.finite and bool(torch.isfinite(g).all())
        elif len(batch.arrived[group]) == batch.calls[group]:
            self._add_group(batch, group)

    # -- sums --------------------------------------------------------------------------------

    def _add_group(self, batch: Batch, group: str) -> None:
        uses = batch.arrived.pop(group)
        assert uses[0].g is not None
        with _plain_arithmetic(uses[0].g):
            gradients: dict[str, list[ExampleGradients]] = defaultdict(list)
            for use in uses:
                self._add_use(batch, use, gradients)
                use.input = use.g = None
            for parameter, parts in gradients.items():
                if batch.check is not None:
                    batch.check.add(parameter, parts, self._sums.zeros(parameter, parts[0].device))
                self._sums.add_gradients(parameter, parts)

    def _add_use(
        self, batch: Batch, use: Use, gradients: dict[str, list[ExampleGradients]]
    ) -> None:
        assert use.g is not None and use.input is not None
        covered, rows = self.coverage.modules[use.module], self._sums.rows(use.module)
        if use.input.changed:  # autograd keeps a copy of its own under autocast, so does not mind
            weights = [row for row in rows if row != covered.parameters.get("bias")]
            self._sums.drop(
                weights, KINDS, f"the input of {use.module} was changed in place after it"
            )
        if use.g.shape[0] != batch.examples:
            self._sums.drop(
                rows,
                (DIAGONAL, BLOCK, KFAC) if self.coverage.reduce else (DIAGONAL, BLOCK),
                f"the output of {use.module} has {use.g.shape[0]} rows for {batch.examples}"
                " examples, so an example's gradient cannot be told apart",
            )
            if batch.check is not None:
                batch.check.skip(rows)
        kinds = {kind for row in rows for kind in self.coverage.rows[row].statistics}
        if not kinds - {GRADIENT}:
            return
        dtype = self.coverage.dtypes[rows[0]]
        g = use.g.to(dtype) * batch.scale
        if KFAC in kinds:
            self._sums.add_output(use.module, g, batch.masks.of_module)
        if use.module in use.input.readers:
            use.input.arrived.add(use.module)
            if use.input.arrived == use.input.readers:
                self._add_input(batch, use.input)
            else:
                batch.waiting[use.input] = None
        if g.shape[0] != batch.examples or not (batch.check or kinds & {DIAGONAL, BLOCK}):
            return
        a = use.input.a
        a = a.to(dtype) if a.is_floating_point() else a
        try:
            found = covered.rule.gradients(covered.module, a, g)
        except (RuntimeError, TypeError, ValueError) as error:
            if covered.rule.gradients is not leaf:
                raise
            first = str(error).strip().partition("\n")[0]
            self._sums.drop(
                rows, KINDS, f"autograd of {use.module} for each example fails: {first}"
            )
            return
        for local, gradient in found.items():
            parameter = covered.parameters.get(local)
            if parameter and self.coverage.rows[parameter].statistics:
                gradients[parameter].append(gradient)
        if batch.check is not None:
            batch.check.computed_in(use.g.dtype)

    def _add_input(self, batch: Batch, given: Input) -> None:
        """For the layers whose gradients came back."""
        given.added = True
        batch.waiting.pop(given, None)
        with _plain_arithmetic(given.a):
            masks = batch.masks.of_module
            self._sums.add_input(given.arrived, given.a, batch.examples, masks)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """What was compiled before the hooks came would not call them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _plain_arithmetic(like: Tensor) -> Iterator[None]:
    """No graph, and no autocast: it would multiply in 16 bits."""
    with torch.no_grad(), torch.autocast(device_type=like.device.type, enabled=False):
        yield
