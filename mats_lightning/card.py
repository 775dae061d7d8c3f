"""The card of a merge: what was merged and how, as the README.md of an exported folder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import yaml
from huggingface_hub import ModelCard, ModelCardData


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
    model's {task: score in the task's metric}, None where it was not evaluated. `refreshed` says
    that rows of the tasks were needed after the merge.
    """

    method: str
    options: Mapping[str, object]
    tasks: Sequence[MergedTask]
    base_model: str | None
    versions: Mapping[str, str]
    scores: Mapping[str, float] | None = None
    refreshed: bool = False

    @property
    def start(self) -> str | None:
        """The common start, as it is printed: the rest of a path says nothing to others."""
        if self.base_model is None or _is_hub_id(self.base_model):
            return self.base_model
        return Path(self.base_model).name


def merge_card(card: MergeCard, title: str, library: str, program: str) -> ModelCard:
    """The card as Markdown; `program` loads what was exported with this `library`.

    Raises ValueError for an option that is no plain value, and scores of no task.
    """
    start = card.start
    metadata = ModelCardData(
        base_model=start if card.base_model and _is_hub_id(card.base_model) else None,
        library_name=library,
        tags=["merge", "mats_lightning"],
    )
    recipe = {
        "merge_method": card.method,
        **({} if start is None else {"base_model": start}),
        "models": [{"model": task["checkpoint"]} for task in card.tasks],
        "parameters": {name: _plain(value, name) for name, value in card.options.items()},
    }
    origin = f", fine-tuned from {start}" if start else ""
    rows = ", and refreshed with some rows of theirs at the merged weights"
    return ModelCard(
        f"""---
{metadata.to_yaml()}
---

# {title}

{len(card.tasks)} models{origin}, one a task, merged into this one by mats_lightning without
their data{rows if card.refreshed else ""}. Examples are those that a model's statistics were taken
from; the score is the merged model's.

{_task_table(card)}

## Merge

```yaml
{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()}
```

Made with {", ".join(f"{name} {version}" for name, version in card.versions.items())}.

## Use

```python
{program}
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
