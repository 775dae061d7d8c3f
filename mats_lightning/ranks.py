"""Several processes that train one model, each on its own rows: their sums, added up on rank 0.

All functions are collective: every rank calls them, in the same order.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import distributed

from mats_lightning.statistics import Statistics

T = TypeVar("T")


def new_group() -> distributed.ProcessGroup | None:
    """A group of all ranks, over CPU memory; None where there is one process.

    One of its own, so that its messages cannot meet those of a backward pass when a signal has
    a checkpoint saved in the middle of a batch.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo")
    return group


def all_of(value: T, group: distributed.ProcessGroup) -> list[T]:
    """Every rank's value, on every rank."""
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def add_up(
    sums: dict[int, Statistics], group: distributed.ProcessGroup
) -> dict[int, Statistics] | None:
    """key -> the sum over the ranks of their records under it, on rank 0; None on the others.

    Records under one key cover the same. The total is in CPU memory, and beside it one record of
    one other rank at a time.
    """
    if distributed.get_rank(group):
        _send(sums, group)
        return None
    total = {key: _to_cpu(statistics) for key, statistics in sums.items()}
    for source in range(1, distributed.get_world_size(group)):
        for key, theirs in _received(source, group):
            total[key] = _added(total[key], theirs) if key in total else theirs
    return total


def _added(first: Statistics, second: Statistics) -> Statistics:
    """Also what was tried by the one that has no examples."""
    infos = (first.info, second.info)
    info = {
        **first.info,
        "epochs": sorted({epoch for info in infos for epoch in info["epochs"]}),
        "skipped_batches": sum(info["skipped_batches"] for info in infos),
    }
    return replace(first + second, info=info)


def _to_cpu(statistics: Statistics) -> Statistics:
    return replace(statistics, tensors={k: t.cpu() for k, t in statistics.tensors.items()})


def _send(sums: dict[int, Statistics], group: distributed.ProcessGroup) -> None:
    records = {key: replace(statistics, tensors={}) for key, statistics in sums.items()}
    tensors = [tensor for statistics in sums.values() for tensor in statistics.tensors.values()]
    shapes = {
        key: {name: (tensor.shape, tensor.dtype) for name, tensor in statistics.tensors.items()}
        for key, statistics in sums.items()
    }
    distributed.send_object_list([records, shapes], dst=0, group=group)
    for tensor in tensors:
        distributed.send(tensor.cpu().contiguous(), dst=0, group=group)


def _received(source: int, group: distributed.ProcessGroup) -> Iterator[tuple[int, Statistics]]:
    """A record at a time."""
    message: list[Any] = [None, None]
    distributed.recv_object_list(message, src=source, group=group)
    records, shapes = message
    for key, record in records.items():
        tensors = {
            name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes[key].items()
        }
        for tensor in tensors.values():
            distributed.recv(tensor, src=source, group=group)
        yield key, replace(record, tensors=tensors)
