"""LoRA tasks merged as products: adapters in, what merge functions take; factors out again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mats_lightning.adapter_files import adapter_config, is_adapter
from mats_lightning.lora import BASE, A, B, Lora, lora_products
from mats_lightning.low_rank import refactor
from mats_lightning.merging import MergeResult
from mats_lightning.statistics import Statistics
from mats_lightning.tasks import Part, Task


class Refactored(NamedTuple):
    """What merged products became: an adapter's form, without weights; what is lost a layer."""

    form: Lora
    lost: dict[str, float]


def lora_of(task: Task) -> Lora | None:
    """The LoRA adapter that is the task's checkpoint; None where it is something else."""
    if not is_adapter(task.checkpoint):
        return None
    config = adapter_config(task.checkpoint)
    return Lora(config, task.weights, task.prefix) if config["peft_type"] == "LORA" else None


def factors_of(task: Task) -> Lora:
    """The task's LoRA adapter without its head.

    Raises ValueError for a checkpoint that is none, and for weights in it that are neither factors
    nor the task's head.
    """
    lora = lora_of(task)
    if lora is None:
        raise ValueError(
            f"task '{task.name}': lora_rank merges the products of LoRA factors, and"
            f" {task.checkpoint} is no LoRA adapter: expected the folder that peft saved, or no"
            " lora_rank"
        )
    shared = {name: lora.weights[name] for name in lora.weights if not task.owns(name)}
    if odd := [name for name in shared if not name.endswith((A, B))]:
        raise ValueError(
            f"task '{task.name}': lora_rank merges the products of LoRA factors, and '{odd[0]}' is"
            " none: name it in Task(head=...) if it is the task's own"
        )
    return replace(lora, weights=shared)


def product_names(factors: Sequence[str]) -> list[str]:
    """What the products of these factors are called."""
    return [name.removesuffix(A) + BASE for name in factors if name.endswith(A)]


def product_models(adapters: Sequence[Lora], device: torch.device) -> list[Part]:
    """The products as models on the device; see `lora_products`."""
    return [Part(products, list(products), device) for products in lora_products(adapters)]


def product_start(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all products started from: 0, which takes no memory."""
    return {name: tensor.new_zeros(1).expand(tensor.shape) for name, tensor in model.items()}


def refactored(
    states: Mapping[int, MergeResult],
    rank: int,
    adapters: Sequence[Lora],
    statistics: Sequence[Statistics],
    weights: Sequence[float],
) -> tuple[dict[int, MergeResult], dict[int, Refactored]]:
    """The states with factors of this rank for products, and how these came out, by count.

    The SVD is weighted with the statistics that the method took, see `refactor`.
    """
    found, forms = {}, {}
    for count, result in states.items():
        adapter, lost = refactor(
            result.state_dict,
            rank,
            adapters[0],
            statistics,
            weights=weights if statistics else None,
        )
        found[count] = replace(result, state_dict=dict(adapter.weights))
        forms[count] = Refactored(replace(adapter, weights={}), lost)
    return found, forms
