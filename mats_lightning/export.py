"""The merged model as a Hugging Face folder, with the tasks' heads and a card of the merge."""

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor, nn

from mats_lightning.names import plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
README = "README.md"
HEADS = "heads"
NOT_IN_FILE_NAMES = frozenset('/\\:*?"<>|')  # on any of the systems that may load the folder


class MergedTask(TypedDict):
    """One of the models that were merged, as the card names it."""

    name: str
    checkpoint: str  # a name for readers elsewhere, not a path on this machine
    metric: str
    examples: NotRequired[int | None]  # that its statistics were taken from


@dataclass(frozen=True)
class MergeCard:
    """What the card says about the merge.

    `method` and `options` are those of `mats_lightning.merging`, options in plain values (numbers,
    text, lists and mappings of them). `base_model` is the common start: a hub id, or a path, of
    which only the last part is printed. `versions` is {package: version}; `scores` the merged
    model's {task: score in the task's metric}, None where it was not evaluated.
    """

    method: str
    options: Mapping[str, object]
    tasks: Sequence[MergedTask]
    base_model: str | None
    versions: Mapping[str, str]
    scores: Mapping[str, float] | None = None


def export_huggingface(
    folder: str | os.PathLike[str],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    heads: Mapping[str, Mapping[str, Tensor]],
    card: MergeCard,
    overwrite: bool = False,
) -> Path:
    """Write `model` so that `from_pretrained(folder)` gives the same tensors, bit for bit.

    The folder holds config.json and safetensors, the tokenizer where one is given,
    `heads/<task>.safetensors` for each task of `heads` ({task: {name: tensor}}), and a README.md
    made of `card`. It is written beside its place and renamed, so that a kill never leaves half
    of it. With `overwrite`, an earlier export is replaced after the new one is complete; a kill
    between the two renames leaves it beside as `.<name>.old`.

    Returns the folder. Raises FileExistsError where the folder holds something (with `overwrite`:
    something else than a model), and ValueError for a task's name that is no file name and an
    option that is no plain value.
    """
    folder = Path(folder).resolve()
    _check_target(folder, overwrite)
    _check_names(heads)
    readme = _card(card, folder.name, model, tokenizer, heads)  # before the slow part: may raise

    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _save_heads(partial / HEADS, heads)
        readme.save(partial / README)
        mode = (partial / README).stat().st_mode
        for file in partial.rglob("*.safetensors"):
            file.chmod(mode)  # safetensors makes its files readable for their owner alone
    except BaseException:
        _remove(partial)
        raise
    if folder.exists():
        _remove(old)
        folder.rename(old)
    partial.rename(folder)
    _remove(old)
    return folder


def backbone_prefix(task: str, module: nn.Module) -> str:
    """Where the one transformers model inside of a task's module is: "backbone.", say.

    Raises ValueError where there is none, or several, or where peft's layers are in it.
    """
    from transformers import PreTrainedModel  # seconds to import: only an export needs it

    found: list[str] = []
    for name, child in module.named_modules():
        if type(child).__module__.startswith("peft."):  # told by name: peft need not be imported
            raise ValueError(
                f"task '{task}': '{name}' of {type(module).__name__} is peft's"
                f" {type(child).__name__}, and export writes whole models: save the merged adapter"
                f" with model('{task}').<where its PeftModel is>.save_pretrained(folder)"
            )
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(child, PreTrainedModel) and not inside:
            found.append(name)
    if len(found) != 1:
        raise ValueError(
            f"task '{task}': export needs one transformers model inside of"
            f" {type(module).__name__}, found {len(found)}"
        )
    return f"{plain_name(found[0])}."


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: expected a folder to export to; name another")
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: export to another folder, or pass overwrite=True to replace it"
        )
    if not (folder / CONFIG).is_file():
        raise FileExistsError(
            f"{folder} holds something else than a model (no {CONFIG}), which overwrite=True does "
            "not replace: export to another folder, or empty this one"
        )


def _check_names(tasks: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for task in tasks:
        if (
            not task.isprintable()
            or NOT_IN_FILE_NAMES.intersection(task)
            or task.strip(" ") != task
            or task.strip(".") != task
            or not 0 < len(task.encode()) < 200
        ):
            raise ValueError(
                f"task {task!r} cannot name its head's file, {HEADS}/{task}.safetensors: expected "
                "1 to 199 bytes of printable characters, without any of "
                f"{' '.join(sorted(NOT_IN_FILE_NAMES))}, and no space or dot at its ends. Rename it"
            )
        other = seen.setdefault(task.casefold(), task)
        if other != task:
            raise ValueError(
                f"tasks {other!r} and {task!r} would share a file where the system does not tell "
                "upper case from lower. Rename one"
            )


def _save_heads(folder: Path, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
    for task, tensors in heads.items():
        folder.mkdir(exist_ok=True)
        # clones, for save_file refuses tensors that share memory
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(own, folder / f"{task}.safetensors", metadata={"format": "pt"})


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _card(
    card: MergeCard,
    title: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    heads: Mapping[str, Mapping[str, Tensor]],
) -> ModelCard:
    start = card.base_model
    hub = start is not None and _is_hub_id(start)
    if start is not None and not hub:
        start = Path(start).name  # the rest of a path says nothing to others
    metadata = ModelCardData(
        base_model=start if hub else None,
        library_name="transformers",
        tags=["merge", "mats_lightning"],
    )
    recipe = {
        "merge_method": card.method,
        **({} if start is None else {"base_model": start}),
        "models": [{"model": task["checkpoint"]} for task in card.tasks],
        "parameters": {name: _plain(value, name) for name, value in card.options.items()},
    }
    origin = f", fine-tuned from {start}" if start else ""
    return ModelCard(
        f"""---
{metadata.to_yaml()}
---

# {title}

{len(card.tasks)} models{origin}, one a task, merged into this one by mats_lightning without
their data. Examples are those that a model's statistics were taken from; the score is the merged
model's.

{_task_table(card)}

## Merge

```yaml
{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()}
```

Made with {", ".join(f"{name} {version}" for name, version in card.versions.items())}.

## Use

```python
{_snippet(model, tokenizer is not None, heads)}
```

`folder` is where this file lies: the current folder, or what
`huggingface_hub.snapshot_download` returned. A head is a mapping from name to tensor; how it is
applied to the model's output is up to the module that it was trained in.
"""
    )


def _is_hub_id(name: str) -> bool:
    form = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, flags=re.ASCII)
    return form is not None and not Path(name).exists()


def _plain(value: object, option: str) -> object:
    """`value` as YAML can say it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, option) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, option) for key, item in value.items()}
    raise ValueError(
        f"option {option!r} of the card is or holds a {type(value).__name__}: expected numbers, "
        "text, None, lists and mappings of them. Describe it in words"
    )


def _task_table(card: MergeCard) -> str:
    scores = card.scores or {}
    unknown = scores.keys() - {task["name"] for task in card.tasks}
    if unknown:
        raise ValueError(
            f"the card has scores of {', '.join(sorted(unknown))}, which are not among its tasks: "
            f"{', '.join(task['name'] for task in card.tasks)}. Name the tasks alike"
        )
    lines = ["| task | checkpoint | examples | metric | score |", "| :-- | :-- | --: | :-- | --: |"]
    for task in card.tasks:
        name, examples = task["name"], task.get("examples")
        score = f"{scores[name]:.3f}" if name in scores else ""
        cells = [name, task["checkpoint"], "" if examples is None else str(examples)]
        cells += [task["metric"], score]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def _snippet(
    model: "PreTrainedModel", tokenizer: bool, heads: Mapping[str, Mapping[str, Tensor]]
) -> str:
    """A program that loads what was exported, run in its folder."""
    # AutoModel loads the model without a head; one with a head is loaded by its own class
    loader = "AutoModel" if model.base_model is model else type(model).__name__
    imports = [f"from transformers import {loader}{', AutoTokenizer' if tokenizer else ''}"]
    parameters = inspect.signature(type(model)).parameters
    no_pooler = getattr(model, "pooler", model) is None and "add_pooling_layer" in parameters
    options = ", add_pooling_layer=False" if no_pooler else ""  # or it would start at random
    lines = ['folder = "."', f"model = {loader}.from_pretrained(folder{options})"]
    if tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    if heads:
        task, tensors = next(iter(heads.items()))
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        file = json.dumps(f"/{HEADS}/{task}.safetensors", ensure_ascii=False)
        imports.insert(0, "from safetensors.torch import load_file")
        lines.append(f"head = load_file(folder + {file})  # {shapes}")
    return "\n".join([*imports, "", *lines])
