"""Statistics: raw sums with their counts, divided once, on access."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from mats_lightning.lazy import Lazy

T = TypeVar("T")

# A raw sum's key is "<kind>/<name>". The kinds, and what their names are:
DIAGONAL = "diagonal_fisher"  # parameter -> sum_n grad_n^2, shape of the parameter
BLOCK = "block_fisher"  # parameter -> sum_n grad_n grad_n^T, (d, d)
INPUT = "A"  # input group -> sum over positions of a a^T, (d_in, d_in)
INPUT_SUM = "a"  # input group -> sum over positions of a, (d_in,)
REDUCED = "A_reduced"  # input group -> sum over examples of their mean a's a a^T, (d_in, d_in)
COUNTS = "counts"  # embedding -> how often each row was looked up, (rows,)
OUTPUT = "G"  # module -> sum over positions of g g^T, (d_out, d_out)
GRADIENT = "gradient"  # parameter -> sum_n grad_n of the loss, shape of the parameter
# G of K-FAC with reduce: sum over examples of their summed g's g g^T. A, a and G of a convolution
# with groups, or cut into blocks, have an axis of these in front.
OF_INPUTS = (INPUT, INPUT_SUM, REDUCED, COUNTS)
# what is asked for, where it is made of several sums
GRAM, KFAC = "gram", "kfac"
KINDS = (DIAGONAL, GRAM, KFAC, BLOCK)  # of curvature
ALL_KINDS = (*KINDS, GRADIENT)


class View(Lazy[T]):
    """Computes its values; says what there is where a name is unknown."""

    def __init__(self, what: str, names: list[str], get: Callable[[str], T]) -> None:
        super().__init__(names)
        self._what, self._get = what, get

    def __getitem__(self, name: str) -> T:
        if name not in self:
            known = ", ".join(list(self)[:3]) or "none at all"
            more = ", ..." if len(self) > 3 else ""
            raise KeyError(f"no {self._what} of '{name}'; there are: {known}{more}")
        return self._get(name)


def finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or inf; both come out as an extreme, in one pass without a copy."""
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in tensor.aminmax())


@dataclass(eq=False, repr=False)
class Statistics:
    """Curvature statistics of one model on one task (MaTS, arXiv 2312.04339, section 3).

    With N examples, R positions an example, a layer's input a and g = d loss_n / d output:

    - `diagonal_fisher[parameter]` = 1/N sum_n (sum_r g a^T)^2, the parameter's shape;
    - `gram[module]` = A = 1/positions sum a a^T, (d_in, d_in); the diagonal of it, (rows,), for
      an embedding, which is how often each row was looked up;
    - `kfac[module]` = (A, G) with G = 1/N sum_nr g g^T, (d_out, d_out): K-FAC, expand; or, with
      reduce, A = 1/N sum_n a-bar a-bar^T of the mean input and G = 1/N sum_n g-hat g-hat^T of the
      summed gradient (Eschenhagen et al., arXiv 2311.00636);
    - `block_fisher[parameter]` = 1/N sum_n grad_n grad_n^T of a vector, (d, d);
    - `gradient[parameter]` = 1/N sum_n grad_n, the parameter's shape, where it was asked for.

    Where a convolution has several groups, or a factor is cut into blocks, A, G and the mean input
    have an axis of these in front: (groups, d, d).

    `tensors` holds the raw sums under "<kind>/<name>"; it may be lazy (`load_statistics`).
    Two records of the same model add with `+`: epochs, shards, ranks. It raises ValueError for
    those of different kinds, coverage, or weights.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    # input group -> positions seen; a group is named after its first module. It has no A as long
    # as it has seen none
    group_positions: dict[str, int] = field(default_factory=dict)
    # module -> the group whose input it shares (q, k and v of an attention have one)
    inputs: dict[str, str] = field(default_factory=dict)
    # how they were taken: loss, Fisher kind, epochs, coverage, digest of the weights, versions
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Counts, and of how many parameters and modules there is what."""
        kinds = (*KINDS, GRADIENT)
        found = {kind: len(getattr(self, kind)) for kind in kinds}
        of = ", ".join(f"{kind} of {count}" for kind, count in found.items() if count)
        return f"Statistics({self.examples} examples; {of or 'nothing'})"

    def _named(self, kind: str) -> list[str]:
        if not self.examples:
            return []
        return [key.removeprefix(f"{kind}/") for key in self.tensors if key.startswith(f"{kind}/")]

    def _mean(self, kind: str, name: str) -> Tensor:
        return self.tensors[f"{kind}/{name}"] / self.examples

    def _gram(self, module: str) -> Tensor:
        group = self.inputs[module]
        kind = COUNTS if f"{COUNTS}/{group}" in self.tensors else INPUT
        return self.tensors[f"{kind}/{group}"] / self.group_positions[group]

    def _kfac(self, module: str) -> tuple[Tensor, Tensor]:
        reduced = f"{REDUCED}/{self.inputs[module]}"
        a = self.tensors[reduced] / self.examples if reduced in self.tensors else None
        return self._gram(module) if a is None else a, self._mean(OUTPUT, module)

    def _mean_input(self, module: str) -> Tensor:
        group = self.inputs[module]
        return self.tensors[f"{INPUT_SUM}/{group}"] / self.group_positions[group]

    @property
    def diagonal_fisher(self) -> View[Tensor]:
        names = self._named(DIAGONAL)
        return View("diagonal Fisher", names, lambda name: self._mean(DIAGONAL, name))

    @property
    def block_fisher(self) -> View[Tensor]:
        return View("block Fisher", self._named(BLOCK), lambda name: self._mean(BLOCK, name))

    @property
    def gradient(self) -> View[Tensor]:
        return View("gradient", self._named(GRADIENT), lambda name: self._mean(GRADIENT, name))

    @property
    def gram(self) -> View[Tensor]:
        return View("Gram matrix", list(self.positions), self._gram)

    @property
    def mean_input(self) -> View[Tensor]:
        """module -> the mean over positions of a, (d_in,): what a bias folded into A needs."""
        names = [m for m in self.positions if f"{INPUT_SUM}/{self.inputs[m]}" in self.tensors]
        return View("mean input", names, self._mean_input)

    @property
    def kfac(self) -> View[tuple[Tensor, Tensor]]:
        names = [name for name in self._named(OUTPUT) if name in self.positions]
        return View("K-FAC factors", names, self._kfac)

    @property
    def positions(self) -> dict[str, int]:
        """module -> positions (tokens that the mask leaves) that its Gram matrix is a mean of."""
        counts = {module: self.group_positions[group] for module, group in self.inputs.items()}
        return {module: count for module, count in counts.items() if count}

    def __add__(self, other: "Statistics") -> "Statistics":
        if not self.examples or not other.examples:
            return other if other.examples else self
        for what in ("fisher", "weight_sharing"):
            both = [s.info[what] for s in (self, other) if what in s.info]
            if len(set(both)) > 1:
                raise ValueError(
                    f"these statistics are of two kinds: {what} is {both[0]} in one and {both[1]}"
                    " in the other; take both parts in the same way"
                )
        of_inputs = tuple(f"{kind}/" for kind in OF_INPUTS)
        digests = [s.info.get("digest", {}) for s in (self, other)]
        for name in digests[0].keys() & digests[1].keys():
            if digests[0][name] != digests[1][name]:
                raise ValueError(
                    f"these statistics belong to different weights: the digest of '{name}' is"
                    f" {digests[0][name][:12]}... in one and {digests[1][name][:12]}... in the"
                    " other; take both parts at the same weights, or add older.faded(1.0), which"
                    " belongs to none"
                )
        kinds = {key for key in self.tensors if not key.startswith(of_inputs)}
        theirs = {key for key in other.tensors if not key.startswith(of_inputs)}
        if different := sorted(kinds ^ theirs) or sorted(set(self.inputs) ^ set(other.inputs)):
            raise ValueError(
                f"these statistics do not cover the same: '{different[0]}' is in one of the two"
                f" only ({len(different)} such); add statistics of one model and one selection"
            )
        tensors = {k: _sum(k, self.tensors[k], other.tensors[k]) for k in sorted(kinds)}
        inputs: dict[str, str] = {}
        positions: dict[str, int] = {}
        owner: dict[tuple[str, ...], str] = {}
        for module in self.inputs:
            parts = [(s, s.inputs[module]) for s in (self, other)]
            seen = [(s, group) for s, group in parts if _has_inputs(s, group)]
            # Two modules share an input in the sum if they share it in both parts.
            pair = tuple(group if (s, group) in seen else "" for s, group in parts)
            inputs[module] = owner.setdefault(pair if seen else (module,), module)
            if inputs[module] != module:
                continue
            positions[module] = sum(s.group_positions[group] for s, group in parts)
            for kind in OF_INPUTS:
                terms = [s.tensors.get(f"{kind}/{group}") for s, group in seen]
                if found := [term for term in terms if term is not None]:
                    key = f"{kind}/{module}"
                    tensors[key] = _sum(key, *found)
        examples = self.examples + other.examples
        return Statistics(tensors, examples, positions, inputs, _joined(self.info, other.info))

    def faded(self, factor: float) -> "Statistics":
        """The same means of fewer examples, for a sum in which they shall count for less.

        Examples and positions are multiplied by `factor` and rounded; none are left of very few.
        They belong to no weights any more: a sum belongs to those of its other part.
        """
        examples = round(self.examples * factor)
        if not examples:
            return Statistics()
        positions = {group: round(n * factor) for group, n in self.group_positions.items()}
        tensors = {}
        for key in self.tensors:
            kind, _, name = key.partition("/")
            share = examples / self.examples
            if kind in OF_INPUTS and kind != REDUCED:
                share = positions[name] / (self.group_positions[name] or 1)
            tensors[key] = self.tensors[key] * share
        info = {what: value for what, value in self.info.items() if what != "digest"}
        return Statistics(tensors, examples, positions, dict(self.inputs), info)

    def prefixed(self, prefix: str) -> "Statistics":
        """With `prefix` before all names, for a model that became a part of another module."""

        def tensor(key: str) -> Tensor:
            kind, _, name = key.partition("/")
            return self.tensors[f"{kind}/{name.removeprefix(prefix)}"]

        def named(entries: Mapping[str, T]) -> dict[str, T]:
            return {prefix + name: entry for name, entry in entries.items()}

        info, names = dict(self.info), ("groups", "blocks", "digest")
        info |= {what: named(info[what]) for what in names if what in info}
        if "coverage" in info:
            info["coverage"] = [row | {"name": prefix + row["name"]} for row in info["coverage"]]
        if "transposed" in info:
            info["transposed"] = [prefix + module for module in info["transposed"]]
        if "tied" in info:
            info["tied"] = {name: prefix + used for name, used in named(info["tied"]).items()}
        parts = (key.partition("/") for key in self.tensors)
        return Statistics(
            View("sum", [f"{kind}/{prefix}{name}" for kind, _, name in parts], tensor),
            self.examples,
            named(self.group_positions),
            {prefix + module: prefix + group for module, group in self.inputs.items()},
            info,
        )


def _has_inputs(statistics: Statistics, group: str) -> bool:
    return any(f"{kind}/{group}" in statistics.tensors for kind in OF_INPUTS)


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What is counted or listed is of both; the rest (digest, versions) is of the first."""
    info = {**second, **first}
    for name in {"epochs", "notes", "seeds", "draws"} & set(info):
        both = [*first.get(name, ()), *second.get(name, ())]
        info[name] = list(dict.fromkeys(both))
    if "skipped_batches" in info:
        info["skipped_batches"] = sum(x.get("skipped_batches", 0) for x in (first, second))
    return info


def _sum(key: str, first: Tensor, *rest: Tensor) -> Tensor:
    total = first.clone()
    for tensor in rest:
        if tensor.shape != total.shape:
            raise ValueError(
                f"these statistics are of different models: '{key}' has shape"
                f" {tuple(total.shape)} in one and {tuple(tensor.shape)} in the other"
            )
        total += tensor.to(total.device)  # one of the two may come from a file
    return total
