"""What all merge functions check and share: models that fit together, and their weights."""

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from mats_lightning.statistics.record import finite

T = TypeVar("T")
Weights = Mapping[str, Tensor]  # a state dict, possibly read lazily


def check_models(
    thetas: Sequence[Weights], start: Weights | None = None, label: str = "the pretrained model"
) -> list[str]:
    """The names that all models have, in the order of the first.

    Raises ValueError, naming the model and the parameter, for models that do not have the same
    names and shapes, or no common parameter at all, or float8 weights. What only `start` has (its
    own head) takes no part.
    """
    if not thetas:
        raise ValueError("there is no model to merge")
    names = list(thetas[0])
    if not names:
        raise ValueError("model 0 has no parameter: there is nothing to merge")
    shapes = {name: _shape(name, thetas[0][name], "model 0") for name in names}
    for i, theta in enumerate(thetas[1:], start=1):
        extra = sorted(set(theta) - set(names))
        _check_model(shapes, f"model {i}", theta, extra)
    if start is not None:
        _check_model(shapes, label, start, extra=[])
    return names


def _check_model(
    shapes: Mapping[str, tuple[int, ...]], label: str, theta: Weights, extra: Sequence[str]
) -> None:
    if not shapes.keys() & set(theta):
        raise ValueError(
            f"model 0 and {label} have no common parameter: '{next(iter(shapes))}' ..."
            f" against '{next(iter(theta), '')}' ...; is a prefix missing?"
        )
    missing = sorted(shapes.keys() - set(theta))
    if missing or extra:
        raise ValueError(
            f"model 0 and {label} are of different architectures: '{[*missing, *extra][0]}' is"
            f" in {'model 0' if missing else label} alone ({len(missing) + len(extra)} such names);"
            " leave the parameters that belong to a task out (heads)"
        )
    for name, shape in shapes.items():
        if (other := _shape(name, theta[name], label)) != shape:
            raise ValueError(
                f"'{name}' has shape {shape} in model 0 and {other} in {label};"
                " a head of another size belongs to its task: leave it out"
            )


def _shape(name: str, tensor: Tensor, label: str) -> tuple[int, ...]:
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        raise ValueError(
            f"'{name}' is {tensor.dtype} in {label}: weights this narrow are quantized, and cannot"
            " be computed with; merge the weights before they were quantized, or convert these to"
            " torch.bfloat16, times their scales"
        )
    return tuple(tensor.shape)


def check_weights(weights: Sequence[float] | None, models: int) -> list[float]:
    """A number a model, 1 by default. Raises ValueError for another count or a bad number."""
    if weights is None:
        return [1.0] * models
    if len(weights) != models:
        raise ValueError(f"{len(weights)} weights for {models} models: give one a model")
    if any(not 0 <= w < float("inf") for w in weights) or not sum(weights) > 0:
        raise ValueError(f"weights={list(weights)}: they must be finite, not negative, not all 0")
    return [float(w) for w in weights]


def check_counts(statistics: Sequence[T], thetas: Sequence[Weights]) -> None:
    """Raises ValueError for another count of statistics than of models."""
    if len(statistics) != len(thetas):
        raise ValueError(f"{len(statistics)} statistics for {len(thetas)} models: give one a model")


def counted(items: Sequence[T], weights: Sequence[float]) -> list[T]:
    """The models, or what belongs to each, whose weight is above 0.

    No other has a part in a merge, whatever it holds. Errors number those that are left.
    """
    return [item for item, weight in zip(items, weights, strict=True) if weight > 0]


def names_with(patterns: str | Sequence[str], names: Sequence[str], option: str) -> set[str]:
    """The names in which one of these regular expressions is found.

    Raises ValueError for one that is found in none; `option` is what the user calls them.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        own = {name for name in names if re.search(pattern, name)}
        if not own:
            raise ValueError(
                f"{option}: no parameter has {pattern!r} in its name; they are called"
                f" '{names[0]}', '{names[len(names) // 2]}', '{names[-1]}' ...: leave it out, or"
                " write what is in the names"
            )
        found |= own
    return found


def check_range(option: str, value: float, highest: float = math.inf) -> None:
    """Raises ValueError for a value outside [0, highest], or NaN."""
    if not 0 <= value <= highest:
        raise ValueError(
            f"{option}={value}: it lies between 0 and {highest:g}"
            if highest < math.inf
            else f"{option}={value}: it cannot be negative"
        )


def distance(tensors: Sequence[Tensor], x: Tensor) -> float:
    """How far the tasks' tensors lie from x: the root of the mean square of |theta_i - x|."""
    return math.sqrt(sum(float((t - x).square().sum()) for t in tensors) / len(tensors))


def merge_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Computed in float32 at least, whatever the models are stored in."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def stored_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What a merge of these is given out in."""
    return reduce(torch.promote_types, (t.dtype for t in tensors))


def parameters(
    names: Sequence[str],
    thetas: Sequence[Weights],
    weights: Sequence[float],
    merged: dict[str, Tensor],
) -> Iterator[tuple[str, list[Tensor], torch.dtype]]:
    """(name, the models' tensors in the dtype to compute in, the dtype to return), one at a time.

    What batch normalisation averages goes to `merged`, weighted by weights times counts. What is
    not floating point (position ids, counters) or has inf in it (an attention mask) is not merged:
    it must be equal in all models and goes to `merged` as it is. Raises ValueError where it is not
    equal, NaN among it.
    """
    running = _running_statistics(names, thetas, weights)
    merged |= running
    for name in names:
        if name in running:
            continue
        tensors = [theta[name].detach() for theta in thetas]
        if all(tensor.is_floating_point() and finite(tensor) for tensor in tensors):
            dtype = merge_dtype(tensors)
            yield name, [tensor.to(dtype) for tensor in tensors], stored_dtype(tensors)
            continue
        for i, tensor in enumerate(tensors):
            if not torch.equal(tensor, tensors[0]) or tensor.dtype != tensors[0].dtype:
                odd = [str(k) for k, t in enumerate(tensors) if not finite(t)]
                why = f"it has NaN or inf in model {', '.join(odd)}" if odd else "it is no float"
                raise ValueError(
                    f"'{name}' differs between model 0 ({tensors[0].dtype}) and model {i}"
                    f" ({tensor.dtype}) and cannot be merged, since {why}; leave it out"
                )
        merged[name] = tensors[0].clone()


def of_batch_norm(name: str, names: Container[str]) -> bool:
    """Whether this is a mean or variance that batch normalisation keeps."""
    prefix, dot, last = name.rpartition(".")
    counts = f"{prefix}{dot}num_batches_tracked" in names
    return counts and last in ("running_mean", "running_var")


def _running_statistics(
    names: Sequence[str], thetas: Sequence[Weights], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Batch normalisation's buffers, as of one layer that has seen the batches of all models.

    A model's batches count `weights` times; the counter is that of all batches.

    The variance around the common mean: mean of (var_i + mean_i^2) - mean^2.
    """
    merged: dict[str, Tensor] = {}
    for name in names:
        prefix = name.removesuffix("num_batches_tracked")
        keys = [f"{prefix}running_mean", f"{prefix}running_var"]
        if prefix == name or not set(keys) <= set(names):
            continue
        counts = [w * float(theta[name]) for w, theta in zip(weights, thetas, strict=True)]
        seen = counts if sum(counts) else weights
        means, variances = ([theta[key].detach().double() for theta in thetas] for key in keys)
        mean = weighted_mean(means, seen)
        around = [v + (m - mean).square() for v, m in zip(variances, means, strict=True)]
        values = (mean, weighted_mean(around, seen))
        for key, value in zip(keys, values, strict=True):
            merged[key] = value.to(stored_dtype([theta[key] for theta in thetas]))
        merged[name] = torch.stack([theta[name].detach() for theta in thetas]).sum(0)
    return merged


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_i theta_i / sum w_i; a weight of 0 shuts out NaN as well.

    Taken of the differences to one of them: what is equal in all, a frozen layer, stays so.
    """
    first, *others = [(t, w) for t, w in zip(tensors, weights, strict=True) if w]
    total = torch.zeros_like(first[0])
    for tensor, weight in others:
        total.add_(tensor - first[0], alpha=weight)
    return total.div_(sum(weights)).add_(first[0])
