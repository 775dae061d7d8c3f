"""A finished merge as a folder: the model, or the adapter, that all tasks share, heads, a card."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor

from mats_lightning.adapter_files import adapter_config, adapter_key, is_adapter
from mats_lightning.card import MergeCard
from mats_lightning.export import backbone_prefix, export_adapter, export_huggingface
from mats_lightning.joint import JointMerge
from mats_lightning.merged import Merged
from mats_lightning.names import plain_name
from mats_lightning.sidecar import versions
from mats_lightning.tasks import Task

WITHOUT_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_merge(
    joint: JointMerge,
    merged: Merged,
    model: pl.LightningModule,
    scores: Mapping[str, float],
    folder: str | os.PathLike[str],
    tokenizer: "PreTrainedTokenizerBase | None",
    overwrite: bool,
) -> Path:
    """See `MergeModule.export`; `model` is the first task's, with the merged weights."""
    if joint.method.name == "individual":
        raise ValueError(
            "method='individual' merges nothing, so there is no one model to export: export a"
            " merge, or take each task's own with model(task)"
        )
    if all(is_adapter(task.checkpoint) for task in joint.tasks.values()):
        return _export_adapter(joint, merged, scores, folder, overwrite)
    prefix = {name: backbone_prefix(name, task.module) for name, task in joint.tasks.items()}
    first = next(iter(joint.tasks.values()))
    inside = [name for name in merged.shared if name.startswith(prefix[first.name])]
    own = [n for n in first.weights if n.startswith(prefix[first.name])]
    if len(set(prefix.values())) > 1 or len(own) != len(inside):
        raise ValueError(
            "export writes one model that all tasks share, and here parameters inside of"
            f" '{prefix[first.name].rstrip('.')}' belong to single tasks; use model(task) instead"
        )
    backbone: Any = model.get_submodule(prefix[first.name].rstrip("."))
    heads = {}
    for name in joint.tasks:
        state = merged.state_of(name)
        own_head = {k: v for k, v in state.items() if not k.startswith(prefix[first.name])}
        if own_head:
            heads[name] = own_head
    if tokenizer is None:
        for owner in (first.module, first.data):
            tokenizer = tokenizer or getattr(owner, "tokenizer", None)
    card = _card(joint, merged, scores, backbone.config.name_or_path)
    return export_huggingface(folder, backbone, tokenizer, heads, card, overwrite)


def _export_adapter(
    joint: JointMerge,
    merged: Merged,
    scores: Mapping[str, float],
    folder: str | os.PathLike[str],
    overwrite: bool,
) -> Path:
    """The merged adapter; each task's head, in it (`modules_to_save`) or outside, is apart."""
    first = next(iter(joint.tasks.values()))
    lora = merged.adapter_of(first.name)
    config = adapter_config(first.checkpoint) if lora is None else lora.config
    state = merged.state_of(first.name)
    weights = {adapter_key(n.removeprefix(first.prefix)): state[n] for n in merged.shared}
    heads = {name: _head(task, merged.state_of(name)) for name, task in joint.tasks.items()}
    card = _card(joint, merged, scores, config.get("base_model_name_or_path"))
    # with the type of a classification peft would expect its head in the file
    kind = config.get("task_type") if config.get("task_type") in WITHOUT_HEAD else None
    return export_adapter(
        folder,
        {**config, "modules_to_save": None, "task_type": kind},
        weights,
        {name: head for name, head in heads.items() if head},
        card,
        overwrite,
    )


def _head(task: Task, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The task's head, of its `state`; and what else lies outside of the model below."""
    own = {name: tensor for name, tensor in state.items() if task.owns(name)}
    for key, tensor in task.module.state_dict().items():
        if (name := plain_name(key)) not in own and not name.startswith(task.prefix):
            own[name] = tensor
    return own


def _card(
    joint: JointMerge, merged: Merged, scores: Mapping[str, float], base_model: str | None
) -> MergeCard:
    method = joint.method
    options = dict(method.options)
    if isinstance(options.get("init"), Mapping):
        options["init"] = "a state dict"
    if set(joint.weights.values()) != {1.0}:
        options["weights"] = joint.weights
    if method.scale is not None:
        options["scale"] = method.scale
    if method.lora_rank is not None:
        options["lora_rank"] = method.lora_rank
    if merged.in_use:
        options["iterations"] = merged.in_use
    if merged.refreshed:
        options["refresh"] = merged.refreshed
    return MergeCard(
        method=method.name,
        options=options,
        tasks=[
            {
                "name": name,
                "checkpoint": Path(task.checkpoint).name,
                "metric": task.metric,
                "examples": joint.examples.get(name),
            }
            for name, task in joint.tasks.items()
        ],
        base_model=base_model or None,
        versions=versions(),
        scores=scores or None,
        refreshed=bool(merged.refreshed),
    )
