"""A of layers that share an input (q, k and v of an attention): one sum, as long as they do."""

from collections.abc import Sequence

from torch import Tensor

from mats_lightning.statistics.record import INPUT, INPUT_SUM, Statistics


def add_input(statistics: Statistics, modules: Sequence[str], a: Tensor) -> None:
    """A += a^T a, a += sum of a (positions, d_in), for these modules of `statistics.inputs`.

    Once for each group of layers that have been given the same so far: what is stored is exact
    for each of them.
    """
    tensors = statistics.tensors
    assert isinstance(tensors, dict)
    d = a.shape[-1]
    for group in _groups_of(statistics, tensors, set(modules)):
        if f"{INPUT}/{group}" not in tensors:
            tensors[f"{INPUT}/{group}"] = a.new_zeros(d, d)
            tensors[f"{INPUT_SUM}/{group}"] = a.new_zeros(d)
        tensors[f"{INPUT}/{group}"].addmm_(a.T, a)
        tensors[f"{INPUT_SUM}/{group}"].add_(a.sum(0))
        statistics.group_positions[group] += len(a)


def _groups_of(
    statistics: Statistics, tensors: dict[str, Tensor], modules: set[str]
) -> dict[str, None]:
    """The groups that these modules make up.

    Those without a sum so far form one; groups that go beyond them are split, with a copy.
    """
    inputs, positions = statistics.inputs, statistics.group_positions
    chosen = [m for m in inputs if m in modules]
    new = [m for m in chosen if f"{INPUT}/{inputs[m]}" not in tensors]
    for module in new[1:]:  # each a group of its own so far
        del positions[inputs[module]]
        inputs[module] = inputs[new[0]]
    for group in dict.fromkeys(inputs[m] for m in chosen):
        members = [m for m, g in inputs.items() if g == group]
        leaving = [m for m in members if (m in modules) != (members[0] in modules)]
        if leaving:
            inputs.update(dict.fromkeys(leaving, leaving[0]))
            positions[leaving[0]] = positions[group]
            for kind in (INPUT, INPUT_SUM):
                tensors[f"{kind}/{leaving[0]}"] = tensors[f"{kind}/{group}"].clone()
    return dict.fromkeys(inputs[m] for m in chosen)
