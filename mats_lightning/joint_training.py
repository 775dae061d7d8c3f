"""Training of what tasks share, on their batches in turn: the other way of a refresh to step."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.data import sized_len
from rich.progress import track
from torch import Tensor, nn

from mats_lightning.names import plain_name
from mats_lightning.passes import LossFn, evaluating, loss_of, to_device
from mats_lightning.tied import tied_names

Owner = TypeVar("Owner")
WARM_UP = 0.1  # of all steps
HALF = (torch.float16, torch.bfloat16)


def train_together(
    modules: Mapping[str, nn.Module],
    shared: Mapping[str, Tensor],
    batches: Mapping[str, Iterable[Any]],
    *,
    heads: Mapping[str, Collection[str]],
    loss_fns: Mapping[str, LossFn | None],
    weights: Mapping[str, float],
    epochs: int,
    learning_rate: float,
    device: torch.device,
    kept: Collection[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The shared parameters, trained for all tasks, and all heads with them.

    AdamW without weight decay; the learning rate is `learning_rate` times the smaller of two lines,
    from 0 to 1 in the first tenth of the steps and from 1 to 0 over all of them; so .91 of it is
    the highest. Each step is a batch of one task, in a random order over all batches of an
    epoch, which come in the same order in each. The modules run in eval mode, and are afterwards
    what they were before.

    Arguments:
        modules: task -> its module, which holds the shared parameters under their names.
        shared: name -> where its training starts. What is no parameter that trains stays.
        batches: task -> its rows; a loader that does not shuffle, or any iterable.
        heads: task -> names of its own parameters that train along; their result is dropped.
        loss_fns: task -> (module, batch) -> loss; None for the module's own.
        weights: task -> what its loss is multiplied by, beside their mean; of 0, it takes no part.
        device: where it is done; the modules may be elsewhere.
        kept: names of shared parameters that do not train; of tied ones, any name.

    Raises ValueError for tasks without a batch, nothing shared that trains, 16-bit parameters, in
    which small steps are lost, and a loss that is not finite.
    """
    modules = {task: module for task, module in modules.items() if weights[task]}
    trained = which_train(modules.values(), shared, kept)
    sized: dict[str, Any] = {
        task: list(batches[task]) if sized_len(batches[task]) is None else batches[task]
        for task in modules
    }
    if empty := [task for task, own in sized.items() if not len(own)]:
        raise ValueError(f"no rows to train on: the batches of task '{empty[0]}' are empty")
    tied = _tied(modules.values())
    start = {name: shared[name].detach().to(device, copy=True) for name in trained}
    with ExitStack() as stack:
        own: dict[str, dict[str, nn.Parameter]] = {}
        for task, module in modules.items():
            own[task] = stack.enter_context(_training(module, start, heads.get(task, ()), device))
        parameters = {f"/{name}": nn.Parameter(tensor) for name, tensor in start.items()}
        parameters |= {
            f"{task}/{name}": p
            for task in own
            for name, p in own[task].items()
            if name not in start
        }
        fused = device.type in ("cpu", "cuda")  # a fifth of the time there
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=learning_rate, weight_decay=0.0, fused=fused
        )
        steps = epochs * sum(map(len, sized.values()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _share(n, steps))
        mean = sum(weights[task] for task in modules) / len(modules)
        generator = torch.Generator().manual_seed(seed)
        order = chain.from_iterable(in_turn(sized, generator) for _ in range(epochs))
        for index, (task, batch) in enumerate(
            track(order, "training together", total=steps, disable=not progress, transient=True)
        ):
            module, values = modules[task], own[task]
            try:
                loss = loss_of(module, to_device(module, batch, device), index, loss_fns[task])
            except ValueError as error:
                raise ValueError(f"task '{task}', in training: {error}") from error
            found = torch.autograd.grad(
                loss * (weights[task] / mean), list(values.values()), allow_unused=True
            )
            for name, gradient in zip(values, found, strict=True):
                parameter = parameters[f"/{name}" if name in start else f"{task}/{name}"]
                if gradient is not None and gradient.stride() != parameter.stride():
                    # the fused kernel goes over both as they lie in memory
                    gradient = torch.empty_like(parameter).copy_(gradient)
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    result = {name: tensor.to(shared[name].device) for name, tensor in start.items()}
    result |= {o: result[n] for o, n in tied.items() if o in shared and n in result}
    return {**shared, **result}


def which_train(
    modules: Collection[nn.Module], shared: Mapping[str, Tensor], kept: Collection[str]
) -> list[str]:
    """The shared parameters that do, one name of tied ones. Raises ValueError as above."""
    if half := [name for name, tensor in shared.items() if tensor.dtype in HALF]:
        raise ValueError(
            f"'{half[0]}' is in {shared[half[0]].dtype}, in which small steps are lost: convert the"
            " tasks' modules with module.float() to train them"
        )
    tied = _tied(modules)
    stay = {tied.get(name, name) for name in kept}
    found = {
        name
        for module in modules
        for name, parameter in _parameters(module)
        if parameter.requires_grad and name not in stay
    }
    if found.isdisjoint(shared):
        raise ValueError(
            "nothing trains of what the tasks share: all of it is frozen or kept; call"
            " requires_grad_() on what is to train (peft loads adapters frozen, unless with"
            " is_trainable=True), or fit heads alone, RefreshPlan(rounds=0)"
        )
    return [name for name in shared if name in found]


def _tied(modules: Iterable[nn.Module]) -> dict[str, str]:
    return {other: first for module in modules for other, first in tied_names(module).items()}


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((plain_name(name), p) for name, p in module.named_parameters())


@contextmanager
def _training(
    module: nn.Module, shared: Mapping[str, Tensor], head: Collection[str], device: torch.device
) -> Iterator[dict[str, nn.Parameter]]:
    """The module on the shared tensors, in eval mode; name -> its parameters that train."""
    parameters = dict(_parameters(module))
    before = {name: (p.data, p.requires_grad) for name, p in parameters.items()}
    buffers = {name: buffer.device for name, buffer in module.named_buffers()}
    try:
        for name, parameter in parameters.items():
            at_home = name in shared
            parameter.data = shared[name] if at_home else parameter.data.to(device, copy=True)
            parameter.requires_grad_(parameter.requires_grad and (at_home or name in head))
        module.to(device)  # buffers
        with evaluating(module), torch.enable_grad():
            yield {name: p for name, p in parameters.items() if p.requires_grad}
    finally:
        for name, parameter in parameters.items():
            parameter.data, required = before[name]
            parameter.requires_grad_(required)
        for name, home in buffers.items():
            path, _, local = name.rpartition(".")
            owner = module.get_submodule(path)
            setattr(owner, local, getattr(owner, local).to(home))


def _share(step: int, steps: int) -> float:
    """Of the learning rate."""
    done = (step + 1) / steps
    return min(done / WARM_UP, max(0.0, 1 - step / steps))


def in_turn(
    batches: Mapping[Owner, Any], generator: torch.Generator | None = None
) -> Iterator[tuple[Owner, Any]]:
    """Each batch of each once, with whose it is; whose turn it is is drawn (`generator`)."""
    owners = list(batches)
    turns = torch.repeat_interleave(torch.tensor([len(batches[owner]) for owner in owners]))
    loaders = {owner: iter(batches[owner]) for owner in owners}
    for number in turns[torch.randperm(len(turns), generator=generator)].tolist():
        yield owners[number], next(loaders[owners[number]])
