"""Brute force: one example at a time, plain autograd. Shares no code with the package.

A model under test maps a batch (a dict of tensors with one leading row an example; other values
are the whole batch's) to its examples' unreduced losses (N,).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


@dataclass
class Expected:
    """What `Statistics` must hold, divided by the counts; every layer that multiplies has A, G."""

    examples: int = 0
    diagonal_fisher: dict[str, Tensor] = field(default_factory=dict)
    block_fisher: dict[str, Tensor] = field(default_factory=dict)  # of vectors
    gram: dict[str, Tensor] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)  # G
    reduced: dict[str, Tensor] = field(default_factory=dict)  # A of K-FAC with reduce
    positions: dict[str, int] = field(default_factory=dict)


def rows_of(batch: Batch) -> list[Batch]:
    """The batches of one row that a batch consists of."""
    count = next(len(v) for v in batch.values() if isinstance(v, Tensor))
    return [
        {k: v[n : n + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
        for n in range(count)
    ]


def expected(
    model: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    root: nn.Module | None = None,
    mask: Callable[[Batch], Tensor | None] = lambda batch: batch.get("attention_mask"),
    with_blocks: bool = True,
    reduce: bool = False,
) -> Expected:
    """All statistics of the trainable parameters of `root` (the model, unless it is a function).

    With `reduce`, `reduced` and `output` are K-FAC's of means over positions and of sums.
    """
    root = root if root is not None else model  # type: ignore[assignment]
    assert isinstance(root, nn.Module)
    parameters = {n: p for n, p in root.named_parameters() if p.requires_grad}
    vectors = {n for n, p in parameters.items() if p.ndim == 1 or _of_norm(root, n) or "ia3_l" in n}
    total = Expected()
    for row in (row for batch in batches for row in rows_of(batch)):
        with recorded_calls(root) as calls:
            loss = model(row)
        assert loss.shape == (1,)
        tracked = [call for call in calls if call[3].requires_grad]
        gradients = torch.autograd.grad(
            loss[0], [*parameters.values(), *(s for *_, s in tracked)], allow_unused=True
        )
        total.examples += 1
        own, outputs = gradients[: len(parameters)], gradients[len(parameters) :]
        for (name, parameter), gradient in zip(parameters.items(), own, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            add(total.diagonal_fisher, name, gradient.square())
            if with_blocks and name in vectors:
                add(total.block_fisher, name, torch.outer(gradient.flatten(), gradient.flatten()))
        for (name, module, input, _), gradient in zip(tracked, outputs, strict=True):
            if gradient is None:
                continue
            a, g = positions_of(module, input, gradient)
            keep = mask(row)
            if keep is not None and keep.numel() == len(g):
                a, g = a[keep[0].bool()], g[keep[0].bool()]
            total.positions[name] = total.positions.get(name, 0) + len(a)
            if isinstance(module, nn.Embedding):
                add(total.gram, name, a.bincount(minlength=module.num_embeddings).to(g))
                continue
            add(total.gram, name, moment(a))
            if reduce:
                add(total.reduced, name, moment(a.mean(0, keepdim=True)))
                g = g.sum(0, keepdim=True)
            add(total.output, name, moment(g))
    for sums in (total.diagonal_fisher, total.block_fisher, total.output, total.reduced):
        for tensor in sums.values():
            tensor /= total.examples
    for name, tensor in total.gram.items():
        tensor /= total.positions[name]
    return total


def moment(x: Tensor) -> Tensor:
    """sum_p x_p x_p^T of (P, groups, d): one matrix a group, or the only one."""
    return torch.einsum("pgi,pgj->gij", x, x).squeeze(0)


def positions_of(module: Any, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """One example's input and gradient, as rows (R, groups, d); ids (R,) for an embedding."""
    if isinstance(module, nn.Embedding):
        return a.flatten(), g.reshape(-1, g.shape[-1])
    if not hasattr(module, "kernel_size"):
        return a.reshape(-1, 1, a.shape[-1]), g.reshape(-1, 1, g.shape[-1])
    rows = torch.stack(list(windows(module, a[0])))
    return rows, g[0].flatten(1).T.reshape(len(rows), module.groups, -1)


def windows(conv: Any, a: Tensor) -> Iterator[Tensor]:
    """What the kernel sees (groups, d_in) at each position, cut out of the padded input."""
    both = []
    for axis, size in enumerate(conv.kernel_size):
        reach = conv.dilation[axis] * (size - 1)
        same = (reach // 2, reach - reach // 2)
        given = conv.padding if isinstance(conv.padding, tuple) else None
        both.append(
            (given[axis], given[axis]) if given else same if conv.padding == "same" else (0, 0)
        )
    flat = [n for pair in reversed(both) for n in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    a = nn.functional.pad(a[None], flat, mode=mode)[0]
    starts = [
        range(0, a.shape[axis + 1] - conv.dilation[axis] * (size - 1), conv.stride[axis])
        for axis, size in enumerate(conv.kernel_size)
    ]
    for corner in itertools.product(*starts):
        window = a
        for axis, start in enumerate(corner):
            index = start + conv.dilation[axis] * torch.arange(conv.kernel_size[axis])
            window = window.index_select(axis + 1, index)
        yield window.reshape(conv.groups, -1)


def _of_norm(root: nn.Module, parameter: str) -> bool:
    return isinstance(root.get_submodule(parameter.rpartition(".")[0]), nn.LayerNorm)


def add(sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in sums:
        sums[name] += tensor
    else:
        sums[name] = tensor.detach().clone()


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@contextmanager
def recorded_calls(
    root: nn.Module,
) -> Iterator[list[tuple[str, nn.Module, Tensor, Tensor]]]:
    """(name, module, input, output) of every call of a layer that multiplies; the output is given
    back as a copy, so that an operation in place on it changes the copy."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    modules = [
        (n, m)
        for n, m in root.named_modules()
        if isinstance(m, LAYERS) or type(m).__name__ == "Conv1D"
    ]

    def recording(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        original = module.forward

        def forward(input: Tensor) -> Tensor:
            output = original(input)
            calls.append((name, module, input.detach().clone(), output))
            return output.clone()

        return forward

    for name, module in modules:
        module.forward = recording(name, module)
    try:
        yield calls
    finally:
        for _, module in modules:
            del module.forward


def distance(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Relative, in the Frobenius norm; relative to `floor` where less is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    norm = max(float(expected.double().norm()), floor)
    return float((found.double() - expected.double()).norm()) / (norm or 1.0)


def assert_close(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """What is but rounding, beside the largest (the bias of an attention's keys), is zero."""
    assert sorted(found) == sorted(expected)
    largest = max((float(t.double().norm()) for t in expected.values()), default=0.0)
    floors = {name: largest * torch.finfo(t.dtype).eps for name, t in expected.items()}
    distances = {name: distance(found[name], expected[name], floors[name]) for name in expected}
    wrong = {name: d for name, d in distances.items() if not d <= tolerance}
    assert not wrong, f"relative distance above {tolerance}: {wrong}"
