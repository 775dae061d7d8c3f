"""Tied parameters: one parameter of a module that has several names."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mats_lightning.names import plain_name

Weights = Mapping[str, Tensor]


def tied_names(module: nn.Module) -> dict[str, str]:
    """Other name of a tied parameter -> the name that stands first in the module."""
    first: dict[int, str] = {}
    found = {}
    for full, parameter in module.named_parameters(remove_duplicate=False):
        name = plain_name(full)
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def with_tied(weights: Weights, tied: Mapping[str, str], what: str) -> Weights:
    """The weights under all names of what is tied, where they have one of them.

    `save_pretrained` of Hugging Face keeps one name alone. `what` names the weights in the error.
    Raises ValueError for two names of one parameter with different values.
    """
    groups: dict[str, list[str]] = {}
    for name, first in tied.items():
        groups.setdefault(first, [first]).append(name)
    stands_for: dict[str, str] = {}
    for names in groups.values():
        there = [name for name in names if name in weights]
        for name in there[1:]:
            _check_equal(there[0], name, weights, what)
        if there:
            stands_for |= {name: there[0] for name in names if name not in there}
    return WithTied(weights, stands_for) if stands_for else weights


def _check_equal(one: str, other: str, weights: Weights, what: str) -> None:
    a, b = weights[one], weights[other]
    if a.data_ptr() != b.data_ptr() and (a.dtype != b.dtype or not torch.equal(a, b)):
        raise ValueError(
            f"{what}: '{one}' and '{other}' are one parameter in the module, and have different"
            " values there: expected weights of a module that ties them; build the module that was"
            " trained"
        )


class WithTied(Mapping[str, Tensor]):
    """Weights with further names for some of them, read as the weights are."""

    def __init__(self, weights: Weights, stands_for: Mapping[str, str]) -> None:
        self._weights, self._stands_for = weights, stands_for

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._stands_for.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self._stands_for or name in self._weights

    def __iter__(self) -> Iterator[str]:
        yield from self._weights
        yield from self._stands_for

    def __len__(self) -> int:
        return len(self._weights) + len(self._stands_for)
