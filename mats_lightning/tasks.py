"""A task: its name, its LightningModule, its checkpoint with statistics, its data, its head."""

import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mats_lightning.adapter_files import (
    ADAPTER_NAME,
    AS_BUILT,
    BELOW,
    adapter_config,
    adapter_configs,
    is_adapter,
)
from mats_lightning.checkpoints import load_weights
from mats_lightning.lazy import Lazy
from mats_lightning.names import plain_name
from mats_lightning.sidecar import check_belongs, load_statistics
from mats_lightning.statistics import Statistics
from mats_lightning.tied import tied_names, with_tied

# of an adapter's configuration: what decides how its parameters act on a layer
FORM = (
    "peft_type",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "use_dora",
    "r",
    "rank_pattern",
)
MEANING = (*FORM, "feedforward_modules")
LOADERS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader"}


@dataclass
class Task:
    """One of the tasks that a merged model shall do.

    Arguments:
        name: stands before the task's metrics: "<name>/<metric>".
        module: the LightningModule that evaluates it; its weights are replaced.
        checkpoint: of the fine-tuned model: a Lightning .ckpt, a .safetensors file, or a
            Hugging Face folder (then `prefix` is what precedes its names in the module). Or the
            folder of a peft adapter: what lies below it is as it is in `module`, and takes no part
            in a merge; a head outside of it is the one that `module` has when the Task is made.
        data: a LightningDataModule, or a DataLoader for test and validation alike.
        metric: the primary metric, by the name under which test_step and validation_step log it.
        head: prefixes of the parameters that belong to the task alone.
        head_group: tasks of one group started from the same head, and merge it.
        statistics: where they are not beside the checkpoint: a path, or a `Statistics`.
        prefix: before the checkpoint's names; and before those of its statistics, where these were
            taken of the model alone.
    """

    name: str
    module: pl.LightningModule
    checkpoint: str | os.PathLike[str]
    data: pl.LightningDataModule | DataLoader[Any]
    metric: str = "accuracy"
    head: Sequence[str] = ("head",)
    head_group: str | None = None
    statistics: str | os.PathLike[str] | Statistics | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        # copies, for a merge and fits put other values into the module
        self._head_in_module = self._head_now() if is_adapter(self.checkpoint) else {}

    def _head_now(self) -> dict[str, Tensor]:
        """The head as it is in the module, but for what is an adapter's or below one."""
        return {
            name: value.detach().to("cpu", copy=True)
            for key, value in self.module.state_dict().items()
            if self.owns(name := plain_name(key))
            and isinstance(value, Tensor)
            and not {ADAPTER_NAME, *BELOW} & set(name.split("."))
        }

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """The fine-tuned model's weights, read lazily; names and shapes fit the module.

        Of a tied parameter, a checkpoint may hold one name alone. With an adapter's own are those
        of a head outside of it.

        Raises FileNotFoundError without a checkpoint, ValueError for one that cannot be read or
        is of another architecture.
        """
        with self._named_in_errors():
            weights = load_weights(self.checkpoint, self.prefix)
        state = self.module.state_dict().items()
        expected = {plain_name(n): t.shape for n, t in state if isinstance(t, Tensor)}
        if adapter := is_adapter(self.checkpoint):
            self._check_adapter()
            self._check_biases(expected, weights)
            # peft saves some of what lies below as well: trained biases, adapted embeddings
            own = {n for n in expected if ADAPTER_NAME in n.split(".") or n in weights}
            expected = {n: s for n, s in expected.items() if n in own}
        tied = {n: first for n, first in tied_names(self.module).items() if n in expected}
        with self._named_in_errors():
            weights = with_tied(weights, tied, str(self.checkpoint))
        if different := sorted(set(expected) ^ set(weights)):
            where = "the module" if different[0] in expected else "the checkpoint"
            raise ValueError(
                f"task '{self.name}': {self.checkpoint} is of another architecture than"
                f" {type(self.module).__name__}: '{different[0]}' is in {where} alone"
                f" ({len(different)} such names); build the module that was trained, or say which"
                " prefix its names have in Task(prefix=...)"
            )
        for name, shape in expected.items():
            shapes = [weights[name].shape, shape]
            if adapter:  # whose ranks are compared
                shapes = [_without_rank(name, shape) for shape in shapes]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"task '{self.name}': '{name}' has shape {tuple(weights[name].shape)} in"
                    f" {self.checkpoint}, {type(self.module).__name__} has {tuple(shape)}: build"
                    " the module with the sizes that it was trained with"
                )
        head = self._head_in_module.items()
        outside = {n: t for n, t in head if n not in weights and self.owns(n)}
        return WithHead(weights, outside) if outside else weights

    def _check_adapter(self) -> None:
        """The same factors mean something else under another scaling.

        What a merge made of the module does not count: it gives it the form that it needs.
        """
        found = adapter_config(self.checkpoint)
        for config in adapter_configs(self.module):
            forms = [config.to_dict(), getattr(config, AS_BUILT, config.to_dict())]
            for key in FORM:
                if _plain(found.get(key)) not in [_plain(form.get(key)) for form in forms]:
                    raise ValueError(
                        f"task '{self.name}': {self.checkpoint} was trained with"
                        f" {key}={found.get(key)!r}, its module has {forms[0].get(key)!r}: build"
                        " the module with the adapter's configuration"
                    )

    def _check_biases(self, names: Iterable[str], weights: Mapping[str, Tensor]) -> None:
        """Those of adapted layers, which some versions of peft train and do not save (0.18.0)."""
        if adapter_config(self.checkpoint).get("bias", "none") == "none":
            return
        lost = [n for n in names if n.endswith(".base_layer.bias") and n not in weights]
        if lost:
            raise ValueError(
                f"task '{self.name}': {self.checkpoint} was trained with biases, and"
                f" '{lost[0]}' is not in it ({len(lost)} such names): save it again with a newer"
                " peft, from the model that was trained"
            )

    def load_statistics(self) -> Statistics:
        """The statistics of the checkpoint, checked to belong to its weights.

        Raises FileNotFoundError without a sidecar, ValueError for one of other weights.
        """
        statistics = self.statistics
        if not isinstance(statistics, Statistics):
            with self._named_in_errors():
                statistics = load_statistics(statistics or self.checkpoint)
        weights = self.weights
        if is_adapter(self.checkpoint):  # they may cover what lies below the adapter too
            own = {plain_name(name): t for name, t in self.module.state_dict().items()}
            weights = ChainMap(dict(weights), own)
        if any(self.prefix + name in weights for name in statistics.info.get("digest", {})):
            statistics = statistics.prefixed(self.prefix)
        check_belongs(statistics, weights, f"task '{self.name}' ({self.checkpoint})")
        return statistics

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        """Errors about files say whose they are."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"task '{self.name}': {error}") from error
        except ValueError as error:
            raise ValueError(f"task '{self.name}': {error}") from error

    def owns(self, parameter: str) -> bool:
        """Whether the parameter is part of the task's head."""
        return any(_begins(parameter, prefix) for prefix in self.head)

    def dataloader(self, stage: str, trainer: pl.Trainer | None) -> Any:
        """The loader of "fit", "test" or "validate".

        Raises ValueError where there are several, or none to fit with: `data` is a DataLoader.
        """
        if not isinstance(self.data, pl.LightningDataModule):
            if stage == "fit":
                raise ValueError(
                    f"task '{self.name}' has a DataLoader for test and validation alone: give it a"
                    " LightningDataModule that has training rows too, or pass loaders={name: ...}"
                )
            return self.data
        self.data.trainer = trainer
        self.data.prepare_data()
        self.data.setup(stage)
        loader = getattr(self.data, LOADERS[stage])()
        if isinstance(loader, list | tuple | dict):
            loaders = list(loader.values() if isinstance(loader, dict) else loader)
            if len(loaders) != 1:
                raise ValueError(
                    f"task '{self.name}' has {len(loaders)} {stage} data loaders; make each a task"
                )
            return loaders[0]
        return loader


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises ValueError for no task, a name given twice, a module that several tasks share, a
    head that no parameter matches or that is tied to what is merged, or a head group without a
    head.
    """
    if not tasks:
        raise ValueError("MergeModule needs at least one task")
    owner: dict[int, str] = {}  # parameter -> its task
    for i, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:i]]:
            raise ValueError(f"two tasks are named '{task.name}': give each its own name")
        for name, parameter in task.module.named_parameters():
            if owner.setdefault(id(parameter), task.name) != task.name:
                raise ValueError(
                    f"tasks '{owner[id(parameter)]}' and '{task.name}' share '{name}': each needs"
                    " a LightningModule of its own, since each gets its own weights"
                )
        names = [plain_name(name) for name in task.module.state_dict()]
        for prefix in task.head:
            if not any(_begins(name, prefix) for name in names):
                raise ValueError(
                    f"task '{task.name}': no parameter of {type(task.module).__name__} belongs to"
                    f" the head '{prefix}'; its names begin with"
                    f" {', '.join(sorted({name.split('.')[0] for name in names}))};"
                    " pass head=() if the task has none"
                )
        _check_not_tied(task)
        if task.head_group is not None and not task.head:
            raise ValueError(
                f"task '{task.name}' is in the head group '{task.head_group}' and has no head:"
                " say which parameters it is in Task(head=...)"
            )


def _check_not_tied(task: Task) -> None:
    """One parameter cannot be merged under one of its names and be the task's own under another."""
    first: dict[Tensor, str] = {}
    for name, parameter in task.module.named_parameters(remove_duplicate=False):
        other = first.setdefault(parameter, name)
        if task.owns(plain_name(name)) != task.owns(plain_name(other)):
            raise ValueError(
                f"task '{task.name}': '{other}' and '{name}' are one parameter, and one of the two"
                " names is in the head alone: name both in Task(head=...), or neither"
            )


def check_same_scaling(tasks: Sequence[Task]) -> None:
    """Raises ValueError for tasks whose adapters' parameters mean different things.

    The factors of a LoRA with another alpha or rank add something else to the weights, so their
    means are means of nothing; (IA)^3 vectors multiply a layer's input or its output.
    """
    first, *others = [(task.name, _trained_with(task)) for task in tasks]
    for name, configs in others:
        for mine, theirs in zip(first[1], configs, strict=False):  # names are compared elsewhere
            for key in MEANING:
                values = [_plain(config.get(key)) for config in (mine, theirs)]
                if values[0] != values[1]:
                    raise ValueError(
                        f"the adapters of tasks '{first[0]}' and '{name}' have {key}={values[0]!r}"
                        f" and {values[1]!r}: their parameters cannot be merged one by one. Train"
                        " them alike, or give lora_rank, which merges the products of LoRA factors"
                    )


def _trained_with(task: Task) -> list[dict[str, Any]]:
    """peft's configurations of the task's adapters: of the files, for a merge changes modules."""
    if is_adapter(task.checkpoint):
        return [adapter_config(task.checkpoint)]
    return [config.to_dict() for config in adapter_configs(task.module)]


def _without_rank(name: str, shape: torch.Size) -> torch.Size:
    """The shape of a LoRA factor but for its rank, which a merge may have changed."""
    parts = name.split(".")
    if "lora_A" in parts:  # (rank, d_in)
        return shape[1:]
    return torch.Size([*shape[:1], *shape[2:]]) if "lora_B" in parts else shape  # (d_out, rank)


def _plain(value: Any) -> Any:
    """Sets and lists in one order, and None for what is empty."""
    return (sorted(value) if isinstance(value, set | list | tuple) else value) or None


def _begins(parameter: str, prefix: str) -> bool:
    return parameter == prefix or parameter.startswith(f"{prefix}.")


class WithHead(Lazy[Tensor]):
    """An adapter's weights, read as they are, and a head that lies outside of it."""

    def __init__(self, weights: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
        super().__init__([*weights, *head])
        self._weights, self._head = weights, head

    def __getitem__(self, name: str) -> Tensor:
        return self._head[name] if name in self._head else self._weights[name]


class Part(Lazy[Tensor]):
    """Some of a model's weights, moved to a device as they are read."""

    def __init__(
        self, weights: Mapping[str, Tensor], names: Sequence[str], device: torch.device
    ) -> None:
        super().__init__(names)
        self._weights, self._device = weights, device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._weights[name].to(self._device)
