"""What all merge functions check and share: models that fit together, and their weights."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]  # a state dict, possibly read lazily


def check_models(thetas: Sequence[Weights], pretrained: Weights | None = None) -> list[str]:
    """The names that all models have, in the order of the first.

    Raises ValueError, naming the model and the parameter, for models that do not have the same
    names and shapes, or no common parameter at all.
    """
    if not thetas:
        raise ValueError("there is no model to merge")
    names = list(thetas[0])
    others = [(f"model {i}", theta) for i, theta in enumerate(thetas[1:], start=1)]
    if pretrained is not None:
        others.append(("the pretrained model", pretrained))
    for label, theta in others:
        if not set(names) & set(theta):
            raise ValueError(
                f"model 0 and {label} have no common parameter: '{next(iter(names), '')}' ..."
                f" against '{next(iter(theta), '')}' ...; is a prefix missing?"
            )
        only = sorted(set(names) - set(theta))
        # what only the pretrained model has (its own head) takes no part
        extra = sorted(set(theta) - set(names)) if theta is not pretrained else []
        if only or extra:
            raise ValueError(
                f"model 0 and {label} are of different architectures: '{(only or extra)[0]}' is"
                f" in {'model 0' if only else label} alone ({len(only) + len(extra)} such names);"
                " leave the parameters that belong to a task out (heads)"
            )
        for name in names:
            if thetas[0][name].shape != theta[name].shape:
                raise ValueError(
                    f"'{name}' has shape {tuple(thetas[0][name].shape)} in model 0 and"
                    f" {tuple(theta[name].shape)} in {label}; a head of another size belongs to"
                    " its task: leave it out"
                )
    return names


def check_weights(weights: Sequence[float] | None, models: int) -> list[float]:
    """A number a model, 1 by default. Raises ValueError for another count or a bad number."""
    if weights is None:
        return [1.0] * models
    if len(weights) != models:
        raise ValueError(f"{len(weights)} weights for {models} models: give one a model")
    if any(not 0 <= w < float("inf") for w in weights) or not sum(weights) > 0:
        raise ValueError(f"weights={list(weights)}: they must be finite, not negative, not all 0")
    return [float(w) for w in weights]


def merge_dtype(tensor: Tensor) -> torch.dtype:
    """Computed in float32 at least, whatever the models are stored in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def parameters(
    names: Sequence[str], thetas: Sequence[Weights], merged: dict[str, Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, the models' tensors in the dtype to compute in), one parameter at a time.

    What is not floating point (position ids, counters) is not merged: it must be equal in all
    models and goes to `merged` as it is. Raises ValueError where it is not equal.
    """
    for name in names:
        tensors = [theta[name] for theta in thetas]
        if tensors[0].is_floating_point():
            dtype = merge_dtype(tensors[0])
            yield name, [tensor.detach().to(dtype) for tensor in tensors]
            continue
        for i, tensor in enumerate(tensors):
            if not torch.equal(tensor, tensors[0]):
                raise ValueError(
                    f"'{name}' ({tensor.dtype}) differs between model 0 and model {i} and cannot"
                    " be merged, since it is not floating point; leave it out"
                )
        merged[name] = tensors[0].clone()


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_i theta_i / sum w_i."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.div_(sum(weights))
