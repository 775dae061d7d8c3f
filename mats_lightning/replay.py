"""Passes that differ in a few parameters alone: what does not depend on these runs once.

A body under a head that is being fitted gives the same in each pass over the same batches. `Replay`
finds the parts of a module for which this is so, keeps what they give in one pass, and gives it out
in the others.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# part -> for each of its calls, what the inputs were and what came out
Tape = dict[nn.Module, list[tuple[str, Any]]]
PLAIN = (str, bytes, bool, int, float, type(None))  # they carry no gradient


class Replay:
    """The largest submodules with parameters of which none is `trained`.

    What comes behind a trained parameter (its outputs require a gradient) runs in every pass; so
    does what changes its inputs in place, and what gives out anything but tensors, numbers and text
    in lists, dicts and the like. The first recording finds these, so it must be made with gradients
    on, and needs a forward that takes the same way in every pass: eval mode, no dropout.

    Arguments:
        roots: modules that run; they are looked into, and never taken as a whole.
        trained: the parameters that differ from pass to pass. No others may require a gradient.
    """

    def __init__(self, roots: Sequence[nn.Module], trained: Iterable[Tensor]) -> None:
        own = {id(parameter) for parameter in trained}
        found = (part for root in roots for part in _without(root, own))
        self.parts = list(dict.fromkeys(found))  # a module may have two names
        self._fixed: set[nn.Module] | None = None  # of the parts; unknown before a recording

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Everything runs, and the tape that is yielded holds it afterwards."""
        tape: Tape = {}
        changing: set[nn.Module] = set()
        if first := self._fixed is None:
            assert torch.is_grad_enabled()

        def run(part: nn.Module, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if not (first or part in (self._fixed or ())):
                return forward(*args, **options)
            given = _described(args, options)
            behind = _has_gradient((args, options))  # a trained parameter, in no_grad too
            output = forward(*args, **options)
            # what changes its inputs in place does more than it gives out
            changed = given != _described(args, options)
            if first and (behind or _may_change(output) or changed):
                changing.add(part)
            else:
                tape.setdefault(part, []).append((given, _copied(output)))
            return output

        with self._patched(run):
            yield tape
        if first:
            self._fixed = set(tape) - changing
        for part in set(tape) - (self._fixed or set()):
            del tape[part]

    @contextmanager
    def playing(self, tape: Tape) -> Iterator[None]:
        """The same batches in the same order: what is on the tape is not computed again.

        The calls raise ValueError for other inputs, or more of them, than were recorded.
        """
        calls: Counter[nn.Module] = Counter()

        def run(part: nn.Module, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if part not in tape:
                return forward(*args, **options)
            known = tape[part]
            at = calls[part]
            calls[part] += 1
            if at >= len(known) or known[at][0] != _described(args, options):
                raise ValueError(
                    f"{type(part).__name__} was given other inputs than in the pass before: the"
                    " batches must come in the same order each time, so let their loader not"
                    " shuffle; nor may it read what a trained parameter gave, detached"
                )
            return _copied(known[at][1])

        with self._patched(run):
            yield

    @contextmanager
    def _patched(self, run: Callable[..., Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(_calling(part, run))
            yield


def _without(module: nn.Module, own: set[int]) -> Iterator[nn.Module]:
    for child in module.children():
        parameters = {id(parameter) for parameter in child.parameters()}
        if parameters & own:
            yield from _without(child, own)
        elif parameters:
            yield child


@contextmanager
def _calling(part: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    forward = part.forward
    before = part.__dict__.get("forward")  # where somebody else has put one

    def patched(*args: Any, **options: Any) -> Any:
        return run(part, forward, *args, **options)

    part.forward = patched
    try:
        yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before


def _has_gradient(given: Any) -> bool:
    return any(leaf.requires_grad for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _may_change(output: Any) -> bool:
    leaves = tree_leaves(output)
    return any(
        leaf.requires_grad if isinstance(leaf, Tensor) else not isinstance(leaf, PLAIN)
        for leaf in leaves
    )


def _copied(output: Any) -> Any:
    """What comes behind a part may change what it was given in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _described(args: Any, options: Any) -> str:
    """Shapes and weighted sums of the tensors: enough to notice other batches, or another order."""
    tensors = [leaf.detach() for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
    return str([(tuple(tensor.shape), _weighted_sum(tensor)) for tensor in tensors])


def _weighted_sum(tensor: Tensor) -> float:
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    flat = tensor.flatten().to(wide)
    places = torch.arange(len(flat), device=flat.device).to(wide)
    return float(flat @ (1.2345 * places).sin())  # rows that change places change it
