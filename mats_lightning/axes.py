"""Whether the first axis of what a layer is given is the batch's examples, where it can be seen."""

from torch import Tensor, equal, strided

from mats_lightning.statistics.coverage import CoveredModule
from mats_lightning.statistics.layers import leaf

NO_RANGE = -1
SAME = 0.1  # relative distance of two inputs, between which the model may have taken a step


class FirstAxis:
    """Of the inputs of one model's layers, over its batches."""

    def __init__(self) -> None:
        self._ranges: dict[str, int] = {}  # lookup -> the first id, where its first ids count up
        self._rows: dict[str, Tensor] = {}  # layer -> the only row (1, d) that it was last given

    def why_not(self, covered: CoveredModule, a: Tensor, examples: int) -> str:
        """Why it is not the examples; "" where nothing shows that.

        Positions are looked up as if they were examples where a batch has as many of them: all
        pairs of them (T5's distances), or the same range in two batches.
        """
        name = covered.name
        if a.layout != strided:
            return f"{name} is given a sparse tensor"
        if a.is_nested:
            return f"{name} is given a nested tensor"
        least = 1 if covered.rule.lookup or covered.rule.gradients is leaf else 2
        if a.ndim < least:
            return f"{name} is given a tensor of shape {tuple(a.shape)}, without examples"
        if covered.rule.lookup and len(a) == examples > 1:
            seen = self._ranges.get(name)
            again = seen not in (None, NO_RANGE) and _is_range(a) and int(a[0]) == seen
            if again or _is_of_pairs(a):
                return f"{name} looks up positions, which all examples of a batch share"
            if seen is None:
                self._ranges[name] = int(a[0]) if _is_range(a) else NO_RANGE
        return ""

    def why_shared(self, covered: CoveredModule, a: Tensor, examples: int) -> str:
        """Why all examples of a batch share what it is given first; "" where nothing shows that.

        A single row may be an example's, that alone was sent to an expert. It is not where the next
        batch with a single row has the same.
        """
        if covered.rule.factors is None or a.ndim != 2 or not len(a) == 1 < examples:
            return ""
        before, self._rows[covered.name] = self._rows.get(covered.name), a.detach().clone()
        if before is None or (a - before).norm() > SAME * before.norm():
            return ""
        return f"{covered.name} is given one row, the same in two batches: all examples share it"


def _is_range(ids: Tensor) -> bool:
    """As torch.arange gives it."""
    return ids.ndim == 1 and bool((ids[1:] - ids[:-1] == 1).all())


def _is_of_pairs(ids: Tensor) -> bool:
    """(R, R), and depends on the difference of row and column alone."""
    square = ids.ndim == 2 and ids.shape[0] == ids.shape[1] > 2
    return square and equal(ids[1:, 1:], ids[:-1, :-1]) and not equal(ids[0], ids[1])
