"""Hooks on the covered layers: (input a, output gradient g) of each, turned into sums.

A forward hook keeps a layer's input; a hook on the output tensor brings its gradient, and both go
to the batch's sums (`BatchSums`). The caller says the scale of the loss; it is applied there and
only there, so that g is the gradient of one example's unreduced loss.

The first axis of a layer's input and output is taken to be the batch's examples; a layer in
which it has another length is named, and has no statistic of single examples. Its rows are taken
to be positions of examples then. For a layer that is given several rows which all examples share,
(Q, d) made of a buffer or of parameters, this is wrong, and cannot be seen: its G depends on the
size of the batches. Nor can it be seen where a layer is called several times and is given the
examples in another order each time (x and x.flip(0)): an example's gradient is taken to be the sum
of the calls' rows at its place, so the diagonal and block Fisher are wrong.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mats_lightning.axes import FirstAxis
from mats_lightning.batch_sums import BatchSums, Use, sharing_groups
from mats_lightning.batches import Masks
from mats_lightning.broadcast import ExamplesGradient, LookedUpOnce
from mats_lightning.statistics.coverage import Coverage, CoveredModule
from mats_lightning.statistics.layers import leaf
from mats_lightning.statistics.record import BLOCK, DIAGONAL, KFAC, KINDS, Statistics, finite
from mats_lightning.statistics.sums import Sums
from mats_lightning.verification import GradientCheck


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
        self._broken_off = False  # a backward pass: a part of its batch is added
        self._batch: BatchSums | None = None
        self._sums = Sums(coverage, statistics)
        self._owner = sharing_groups(coverage.modules)
        self._first_axis = FirstAxis()
        # parameters whose gradient has not been compared with autograd's, or was 0
        self._unchecked = {} if statistics.examples else coverage.tensors()
        self._largest = 0.0  # norm of the gradients that have been
        self._training = coverage.tensors().keys()  # parameters that train between the batches

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
        self._batch = BatchSums(self._sums, self._owner, examples, scale, Masks.of(masks), defer)
        handles: list[RemovableHandle] = []
        if self._unchecked:
            self._batch.check = GradientCheck(self._unchecked, self._largest)
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
            self._broken_off |= self._batch.interrupted
            self._batch = None

    def start_backward(self, loss: Tensor | None = None) -> None:
        """The backward pass of the batch's loss begins; of one that is not finite nothing counts.

        Gradients that came before it (an adversarial step, say) are not the loss's, and calls
        that come after it are a checkpointed segment's, run again.
        """
        if self._batch is not None:
            self._batch.backward = True
            if loss is not None and loss.requires_grad:
                loss.register_hook(partial(_multiplied, self._batch))
            if loss is not None and not finite(loss.detach()):
                self._batch.void()
            if self._batch.check is not None:
                self._batch.check.restart()

    @property
    def active(self) -> bool:
        return self._batch is not None

    @property
    def interrupted(self) -> bool:
        """Whether a part of a batch is in the sums, whose backward pass has not ended."""
        return self._broken_off or (self._batch is not None and self._batch.interrupted)

    @property
    def needed(self) -> list[Tensor]:
        """What torch.autograd.grad must be asked for in this batch.

        A few parameters bring the gradient to every layer (`Coverage.sources`), and some are still
        to be checked.
        """
        if self._batch is None or self._batch.check is None:
            return self.coverage.sources()
        both = [*self.coverage.sources(), *self._unchecked.values()]
        return list({id(p): p for p in both}.values())

    def begin_epoch(self) -> None:
        """The same rows may come again, and the model may use its parameters otherwise."""
        self._first_axis = FirstAxis()
        self._unchecked = self.coverage.tensors()

    def finish(self) -> bool:
        """The backward pass of the batch has ended: add what is left, count its examples.

        Returns False when no gradient came to a covered layer: nothing is added or counted.
        """
        batch = self._batch
        if batch is None or not batch.finish():
            return False
        if batch.check is not None and batch.finite:
            self._largest = batch.check.largest(batch.scale)
            for name in batch.check.compared():
                del self._unchecked[name]
        return True

    def drop_unreached(self, why: str) -> None:
        """Of parameters to which no gradient has come so far."""
        rows = [row for row in self.coverage.rows.values() if row.statistics]
        unreached = [row.name for row in rows if not self.coverage.reached(row, self.statistics)]
        self._sums.drop(unreached, KINDS, why)

    def told(self) -> list[str]:
        """What the batches since it was last asked for have shown to be not exact: it is left out.

        "<parameters>: <why>", for people.
        """
        return self._sums.told()

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
            if batch is None or module is not covered.module:  # a copy of it has its hooks
                return None
            everything = (*args, *kwargs.values())
            given = [x for x in everything if isinstance(x, Tensor)]
            alone = len(everything) == 1 or covered.rule.gradients is not leaf
            if len(given) != 1 or not alone or not isinstance(output, Tensor):
                why = f"{covered.name} is not called with one tensor, or does not give one"
                batch.drop(covered.name, why)
                return None
            if why := self._first_axis.why_not(covered, given[0], batch.examples):
                batch.drop(covered.name, why)
                return None
            if not output.numel():
                return None  # an expert that no row was sent to
            a = given[0].detach()
            if not batch.backward:
                if not batch.calls[self._owner[covered.name]]:
                    why = self._first_axis.why_shared(covered, a, batch.examples)
                # Calls without gradient count too: re-entrant checkpointing runs them again.
                batch.calls[self._owner[covered.name]] += 1
            if not output.requires_grad:
                self._drop_frozen(covered)
                return None
            if isinstance(given[0], nn.Parameter):
                why = f"{covered.name} reads a parameter, which all examples of a batch share"
            if why:
                batch.drop(covered.name, why, (DIAGONAL, BLOCK, KFAC))
            use = Use(covered.name, batch.input_of(covered, a))
            if isinstance(module, nn.Embedding) and a.shape[0] == 1 < batch.examples:
                examples = ExamplesGradient(batch.examples)
                output.register_hook(
                    lambda g: self._gradient_hook(batch, use, examples.instead_of(g))
                )
                return LookedUpOnce.of(output, examples)
            # A segment that is run again by non-reentrant checkpointing has outputs to which no
            # gradient comes; its first run has.
            product, shape = _made_by(covered, output), output.shape
            product.register_hook(lambda g: self._gradient_hook(batch, use, g.reshape(shape)))
            return None

        return hook

    def _drop_frozen(self, covered: CoveredModule) -> None:
        """Of parameters that are switched off for this pass alone, as toggle_optimizer does it."""
        frozen = [
            parameter
            for local, parameter in covered.parameters.items()
            if parameter in self._training and not covered.tensor(local).requires_grad
        ]
        why = (
            "it does not train in the backward pass that is captured (toggle_optimizer?): take its"
            " statistics with collect_statistics"
        )
        self._sums.drop(frozen, KINDS, why)

    def _gradient_hook(self, batch: BatchSums, use: Use, g: Tensor) -> None:
        if batch is not self._batch:
            return
        again = use.g is not None or use.input is None
        if again or (g.requires_grad and not batch.backward):
            why = f"the loss has a gradient in it that was taken through {use.module}"
            batch.drop(use.module, why)
        elif batch.backward:  # or else it is of another loss, before the batch's own
            batch.add(use, g)


def _multiplied(batch: BatchSums, gradient: Tensor) -> None:
    """What backward brings to the loss: not 1 where it is told so, or multiplies the loss."""
    factor = float(gradient)
    if factor and math.isfinite(factor):
        batch.scale /= factor
    else:
        batch.void()


def _made_by(covered: CoveredModule, output: Tensor) -> Tensor:
    """The tensor to which the gradient of a layer's output comes, whatever is done to that.

    A linear layer gives a view (N, R, d) of a product (N R, d). What changes a view in place
    gives it another past, in which a hook on it is not called; the product keeps its own.
    """
    product = output._base if covered.rule.factors is not None else None
    if product is None or product.grad_fn is None or product.numel() != output.numel():
        return output
    both = product.is_contiguous() and output.is_contiguous()
    return product if both else output


@contextmanager
def _uncompiled() -> Iterator[None]:
    """What was compiled before the hooks came would not call them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
