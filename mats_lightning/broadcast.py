"""Embeddings that are looked up once for the whole batch: BERT's and GPT's positions."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
}


@dataclass(eq=False)
class ExamplesGradient:
    """The gradient (N, R, d) of what was looked up once, collected from its additions."""

    examples: int
    total: Tensor | None = None
    complete: bool = True  # no operation but additions has used it

    def add(self, gradient: Tensor) -> None:
        self.total = gradient if self.total is None else self.total + gradient

    def instead_of(self, summed: Tensor) -> Tensor:
        """The total where it is complete, otherwise the gradient (1, R, d) of autograd."""
        total, self.total = self.total, None  # of one backward pass
        return total if self.complete and total is not None else summed


class LookedUpOnce(Tensor):
    """An embedding's output (1, R, d) that an addition broadcasts over the N examples.

    Autograd sums its gradient over the examples in that addition, before we can see it. So the
    addition is given the output expanded to (N, R, d), which is what it does with it anyway.
    Every other operation gets the output as it is: the model computes what it computed before,
    but the examples' gradients cannot be told apart.
    """

    gradient: ExamplesGradient

    @staticmethod
    def of(output: Tensor, gradient: ExamplesGradient) -> "LookedUpOnce":
        once = output.as_subclass(LookedUpOnce)
        once.gradient = gradient
        return once

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        once = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LookedUpOnce)]
        with torch._C.DisableTorchFunctionSubclass():
            if func in ADDITIONS and len(args) == 2 and len(once) == 1:
                other = args[1] if args[0] is once[0] else args[0]
                wide = once[0]._expanded_for(other)
                if wide is not None:
                    return func(*(wide if x is once[0] else x for x in args), **kwargs)
            result = func(*args, **kwargs)
        made = [y for y in tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]
        if any(y is not x for y in made for x in once):
            for x in once:
                x.gradient.complete = False
        return result

    def _expanded_for(self, other: Any) -> Tensor | None:
        """Expanded to the examples, if that is what an addition to `other` does."""
        shape = (self.gradient.examples, *self.shape[1:])
        if not isinstance(other, Tensor) or other.ndim != len(shape) or len(other) != shape[0]:
            return None
        wide = self.expand(shape)
        wide.register_hook(self.gradient.add)
        return wide
