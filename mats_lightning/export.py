"""The merged model as a Hugging Face folder, with the tasks' heads and a card of the merge."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
README = "README.md"
HEADS = "heads"
NOT_IN_FILE_NAMES = frozenset('/\\:*?"<>|')  # on any of the systems that may load the folder


class MergedTask(TypedDict):
    """One of the models that were merged, as the card names it."""

    name: str
    checkpoint: str  # a name that says something to the reader, not a path of this machine
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
        for task, tensors in heads.items():
            (partial / HEADS).mkdir(exist_ok=True)
            save_file(
                # clones, for save_file refuses tensors that share memory
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
                partial / HEADS / f"{task}.safetensors",
                metadata={"format": "pt"},
            )
        readme.save(partial / README)
    except BaseException:
        _remove(partial)
        raise
    if folder.exists():
        _remove(old)
        folder.rename(old)
    partial.rename(folder)
    _remove(old)
    return folder


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
            or not 0 < len(f"{task}.safetensors".encode()) - len(".safetensors") < 200
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
    start = _base_model(card.base_model)
    metadata = ModelCardData(
        base_model=start if start == card.base_model else None,
        library_name="transformers",
        tags=["merge", "mats_lightning"],
    )
    recipe = {
        "merge_method": card.method,
        "base_model": start,
        "models": [{"model": task["checkpoint"]} for task in card.tasks],
        "parameters": {name: _plain(value, name) for name, value in card.options.items()},
    }
    if start is None:
        del recipe["base_model"]
    names = ", ".join(task["name"] for task in card.tasks)
    origin = f", fine-tuned from {start}" if start else ""
    return ModelCard(
        f"""---
{metadata.to_yaml()}
---

# {title}

One model for {len(card.tasks)} tasks ({names}): as many models{origin}, merged by
[mats_lightning](https://pypi.org/project/mats_lightning/) without their data.

{_task_table(card)}
## Merge

```yaml
{yaml_dump(recipe, sort_keys=False).strip()}
```

Made with {", ".join(f"{name} {version}" for name, version in card.versions.items())}.

## Use

```python
{_snippet(model, tokenizer, heads)}
```
"""
    )


def _base_model(name: str | None) -> str | None:
    """A hub id as it is; of a path only the last part, for the rest says nothing to others."""
    if name is None:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return Path(name).name
    return Path(name).name if Path(name).exists() else name
