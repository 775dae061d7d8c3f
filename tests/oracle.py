"""Brute force: one example at a time, plain autograd. Shares no code with the package.

A model under test maps a batch (a dict of tensors with one leading row an example; other values
are the whole batch's) to its examples' unreduced losses (N,).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


@dataclass
class Expected:
    """What `Statistics` must hold, divided by the counts; every Linear that is called has A, G."""

    examples: int = 0
    diagonal_fisher: dict[str, Tensor] = field(default_factory=dict)
    block_fisher: dict[str, Tensor] = field(default_factory=dict)  # of vectors
    gram: dict[str, Tensor] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)  # G
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
) -> Expected:
    """All statistics of the trainable parameters of `root` (the model, unless it is a function)."""
    root = root if root is not None else model  # type: ignore[assignment]
    assert isinstance(root, nn.Module)
    parameters = {n: p for n, p in root.named_parameters() if p.requires_grad}
    vectors = {n for n, p in parameters.items() if p.ndim == 1 or _of_norm(root, n)}
    total = Expected()
    for row in (row for batch in batches for row in rows_of(batch)):
        with recorded_calls(root) as calls:
            loss = model(row)
        assert loss.shape == (1,)
        tracked = [(name, a, s) for name, a, s in calls if s.requires_grad]
        gradients = torch.autograd.grad(
            loss[0], [*parameters.values(), *(s for _, _, s in tracked)], allow_unused=True
        )
        total.examples += 1
        own, outputs = gradients[: len(parameters)], gradients[len(parameters) :]
        for (name, parameter), gradient in zip(parameters.items(), own, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            add(total.diagonal_fisher, name, gradient.square())
            if with_blocks and name in vectors:
                add(total.block_fisher, name, torch.outer(gradient.flatten(), gradient.flatten()))
        for (name, a, _), g in zip(tracked, outputs, strict=True):
            if g is None:
                continue
            keep = mask(row)
            if keep is not None and keep.shape == a.shape[:-1]:
                a, g = a[keep.bool()], g[keep.bool()]
            a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
            add(total.gram, name, a.T @ a)
            add(total.output, name, g.T @ g)
            total.positions[name] = total.positions.get(name, 0) + len(a)
    for sums in (total.diagonal_fisher, total.block_fisher, total.output):
        for tensor in sums.values():
            tensor /= total.examples
    for name, tensor in total.gram.items():
        tensor /= total.positions[name]
    return total


def _of_norm(root: nn.Module, parameter: str) -> bool:
    return isinstance(root.get_submodule(parameter.rpartition(".")[0]), nn.LayerNorm)


def add(sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in sums:
        sums[name] += tensor
    else:
        sums[name] = tensor.detach().clone()


@contextmanager
def recorded_calls(root: nn.Module) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(module, input, output) of every call of a Linear, which is given back as a copy, so that
    an operation in place on it changes the copy."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    modules = [(n, m) for n, m in root.named_modules() if isinstance(m, nn.Linear)]

    def recording(name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            output = nn.functional.linear(input, module.weight, module.bias)
            calls.append((name, input.detach().clone(), output))
            return output.clone()

        return forward

    for name, module in modules:
        module.forward = recording(name, module)  # type: ignore[assignment, method-assign]
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
