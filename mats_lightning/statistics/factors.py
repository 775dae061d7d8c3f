"""Rows of inputs and gradients -> the sums A and G.

A of layers that share an input (q, k and v of an attention) is one sum, as long as they do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mats_lightning.statistics.record import (
    COUNTS,
    INPUT,
    INPUT_SUM,
    OF_INPUTS,
    REDUCED,
    Statistics,
)

POSITIONS_OF_PRODUCT = 8192  # of a group: longer sums round more
ROWS_OF_BLOCK = 256  # smaller blocks save more products, and take longer for each


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, R, ...) -> (positions that the mask (N, R) leaves, ...)."""
    return x.flatten(0, 1) if mask is None else x[mask]


def summed(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, R, ...) -> (N, ...), over the positions that the mask leaves."""
    return x.sum(1) if mask is None else (x * _beside(mask, x)).sum(1)


def averaged(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, R, ...) -> (N, ...), over the positions that the mask leaves."""
    if mask is None:
        return x.mean(1)
    return summed(x, mask) / _beside(mask, x).sum(1).clamp(min=1)


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """(N, R) -> (N, R, 1, ...), to multiply x (N, R, ...)."""
    return mask.to(x.dtype).reshape(*mask.shape, *[1] * (x.ndim - 2))


def cut(x: Tensor, sizes: tuple[int, int]) -> Tensor:
    """(P, d) or (P, groups, d) -> (P, groups and blocks, size), where there is more than one."""
    count, _ = sizes
    return x.reshape(len(x), *sizes) if count > 1 else x


@contextmanager
def accumulating(
    tensors: dict[str, Tensor], key: str, shape: Sequence[int], like: Tensor, home: torch.device
) -> Iterator[Tensor]:
    """Yields a tensor beside `like` to add to; what was added is then in tensors[key].

    That one is made of zeros on `home` where it is not there yet.
    """
    if key not in tensors:
        tensors[key] = like.new_zeros(shape, device=home)
    total = tensors[key]
    if total.device == like.device:
        yield total
        return
    part = like.new_zeros(shape)
    yield part
    total.add_(part.to(total))


def add_input(
    statistics: Statistics,
    modules: Sequence[str],
    a: Tensor,
    home: torch.device,
    means: Tensor | None = None,
) -> None:
    """A += a^T a, a += sum of a (positions, d_in), for these modules of `statistics.inputs`.

    Once for each group of layers that have been given the same so far: what is stored is exact
    for each of them. With groups of a convolution a is (positions, groups, d_in). `means`, each
    example's mean a, go to the A of K-FAC with reduce. The sums are kept on `home`.
    """
    tensors = statistics.tensors
    assert isinstance(tensors, dict)
    for group in _groups_of(statistics, tensors, set(modules)):
        add_second_moment(tensors, f"{INPUT}/{group}", a, home)
        if means is not None:
            add_second_moment(tensors, f"{REDUCED}/{group}", means, home)
        with accumulating(tensors, f"{INPUT_SUM}/{group}", a.shape[1:], a, home) as total:
            total.add_(a.sum(0))
        statistics.group_positions[group] += len(a)


def add_counts(
    statistics: Statistics,
    modules: Sequence[str],
    ids: Tensor,
    rows: int,
    dtype: torch.dtype,
    home: torch.device,
) -> None:
    """How often each of an embedding's rows was looked up: the diagonal of its A."""
    tensors = statistics.tensors
    assert isinstance(tensors, dict)
    for module in modules:
        counts = torch.bincount(ids, minlength=rows).to(dtype)
        with accumulating(tensors, f"{COUNTS}/{module}", counts.shape, counts, home) as total:
            total.add_(counts)
        statistics.group_positions[module] += len(ids)


def add_second_moment(tensors: dict[str, Tensor], key: str, x: Tensor, home: torch.device) -> None:
    """tensors[key] += sum_p x_p x_p^T of x (P, d) or, a group each, (P, groups, d)."""
    with accumulating(tensors, key, (*x.shape[1:], x.shape[-1]), x, home) as total:
        _add_symmetric(total, x if x.ndim == 2 else x.transpose(0, 1))


def _add_symmetric(total: Tensor, x: Tensor) -> None:
    """total += x^T x, in place; x is (P, d) or (groups, P, d), total symmetric.

    On a CPU a block row is multiplied from the diagonal on, and mirrored: two thirds of the time
    of the whole product. On an accelerator the blocks would be too small to fill it.

    Of groups, products of some positions are added: `baddbmm_` adds each position by itself to the
    total, whose rounding in float32 then exceeds the small eigenvalues (2e-4 of the largest after
    a million positions of a depthwise convolution, against 7e-7), and takes twice the time.
    """
    d = x.shape[-1]
    size = ROWS_OF_BLOCK if x.device.type == "cpu" else d
    for start in range(0, d, size):
        block = total[..., start : start + size, start:]
        left, right = x[..., start : start + size].mT, x[..., start:]
        if x.ndim == 2:
            block.addmm_(left, right)
        else:
            parts = [part.split(POSITIONS_OF_PRODUCT, dim) for part, dim in ((left, 2), (right, 1))]
            for rows, columns in zip(*parts, strict=True):
                block.add_(rows @ columns)
        total[..., start + size :, start : start + size] = block[..., size:].mT


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
            for kind in OF_INPUTS:
                if (before := tensors.get(f"{kind}/{group}")) is not None:
                    tensors[f"{kind}/{leaving[0]}"] = before.clone()
    return dict.fromkeys(inputs[m] for m in chosen)
