"""A check of the capture on the model at hand: do the examples' gradients add up to the batch's?

They do not where a model uses a parameter without calling its layer, as `F.linear(h, emb.weight)`
does, or has it in a penalty: nothing but the gradient itself shows it.

Each parameter is compared once an epoch, in the first batch in which its gradient is not 0. A use
that begins later in the epoch is not seen before the next one. Nor is one in 16 bits whose gradient
is small beside the model's largest (below 1/8 of its norm in bfloat16, 1/64 in float16): there it
may be rounding.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mats_lightning.statistics.gradients import ExampleGradients
from mats_lightning.statistics.record import finite

MORE_IN_IT = (
    "its gradient is not the sum of those that its layer gives: the model uses it without calling"
    " its layer, a penalty has it, or a hook changes it"
)


class GradientCheck:
    """Compares, over one backward pass, the captured gradients of parameters with autograd's.

    `largest`: the norm of gradients that others had in earlier passes.
    """

    def __init__(self, parameters: Mapping[str, Tensor], largest: float = 0.0) -> None:
        self._parameters, self._largest = set(parameters), largest
        self._captured: dict[str, Tensor] = {}
        self._autograd: dict[str, Tensor] = {}
        self._skipped: set[str] = set()
        self._eps = 0.0  # of the coarsest numbers in which a gradient was computed
        self.handles = [self._watch(name, parameter) for name, parameter in parameters.items()]

    def _watch(self, name: str, parameter: Tensor) -> RemovableHandle:
        def receive(gradient: Tensor) -> None:
            """More than once, where re-entrant checkpointing goes back a segment at a time."""
            wide = torch.promote_types(gradient.dtype, torch.float32)
            gradient = gradient.detach().to_dense().to(wide, copy=True)
            before = self._autograd.get(name)
            self._autograd[name] = gradient if before is None else before + gradient

        handle: RemovableHandle = parameter.register_hook(receive)
        return handle

    def restart(self) -> None:
        """Forget what came before the backward pass of the batch's own loss."""
        self._autograd.clear()

    def watches(self, names: Iterable[str]) -> bool:
        """Any of them."""
        return not self._parameters.isdisjoint(names)

    def compared(self) -> list[str]:
        """The parameters whose gradient was not 0 and finite, or that are not to be compared."""
        reached = {name for name, gradient in self._finite().items() if gradient.any()}
        return sorted(self._parameters & (reached | self._skipped))

    def _finite(self) -> dict[str, Tensor]:
        """Of autograd: in 16 bits a sum over examples may overflow where no example's own does."""
        return {name: g for name, g in self._autograd.items() if finite(g)}

    def largest(self, scale: float) -> float:
        """Norm of a parameter's gradient, times `scale`, in this pass or an earlier one."""
        norms = [float(gradient.norm()) * scale for gradient in self._finite().values()]
        return max([self._largest, *norms])

    def skip(self, names: Iterable[str]) -> None:
        self._skipped.update(names)

    def computed_in(self, dtype: torch.dtype) -> None:
        self._eps = max(self._eps, torch.finfo(dtype).eps)

    def add(self, name: str, parts: Iterable[ExampleGradients], zeros: Tensor) -> None:
        """The examples' gradients of a parameter, of all its uses or some of them."""
        total = self._captured.setdefault(name, zeros)
        for part in parts:
            for n in range(part.examples):
                part.add_example(n, total)

    def differing(self, scale: float) -> list[str]:
        """The parameters whose gradient, times `scale`, is not the sum of the examples'.

        By more than rounding: of the gradient itself, and of the largest one, beside which a
        gradient may be nothing but rounding.
        """
        largest, names = self.largest(scale), []
        for name, gradient in self._finite().items():
            if name in self._skipped:
                continue
            captured = self._captured.get(name)
            if captured is None:
                wrong = bool(gradient.any())
            else:
                error = float((captured - gradient * scale).norm())
                size = max(float(captured.norm()), float(gradient.norm()) * scale)
                wrong = error > max(0.01, 32 * self._eps) * size
                wrong &= error > 16 * self._eps * largest
            if wrong:
                names.append(name)
        return names
