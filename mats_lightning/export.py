"""The merged model as a Hugging Face folder, with the tasks' heads and a card of the merge."""

import inspect
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mats_lightning.adapter_files import ADAPTER, ADAPTER_CONFIG
from mats_lightning.card import MergeCard, merge_card
from mats_lightning.checkpoints import save_weights
from mats_lightning.names import plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
README = "README.md"
HEADS = "heads"
OF_MODELS = {".json", ".safetensors", ".txt", ".model", ".jinja", ".md"}  # weights, tokenizer, card
NOT_IN_FILE_NAMES = frozenset('/\\:*?"<>|')  # on any of the systems that may load the folder


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
    something that no model or adapter has) or is the one that the program runs in, and ValueError
    for a task's name that is no file name and an option that is no plain value.
    """
    folder = Path(folder).resolve()
    _check_target(folder, overwrite)
    _check_names(heads)
    program = _program_of_model(model, tokenizer is not None, heads)
    readme = merge_card(card, folder.name, "transformers", program)  # before the slow part
    with _new_folder(folder) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _save_heads(partial / HEADS, heads)
        readme.save(partial / README)
    return folder


def export_adapter(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    card: MergeCard | None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as peft does, so that `PeftModel.from_pretrained(model, folder)` loads it.

    `config` is peft's, `weights` have the names of peft's file (`adapter_key`). Heads, the card,
    the way of writing and what is raised are those of `export_huggingface`; without a card there
    is no README.md.
    """
    folder = Path(folder).resolve()
    _check_target(folder, overwrite)
    _check_names(heads)
    readme = None
    if card is not None:
        readme = merge_card(card, folder.name, "peft", _program_of_adapter(card, heads))
    with _new_folder(folder) as partial:
        text = json.dumps(dict(config), indent=2, sort_keys=True)
        (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        save_weights(weights, partial / ADAPTER)
        _save_heads(partial / HEADS, heads)
        if readme is not None:
            readme.save(partial / README)
    return folder


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside its place to fill, which takes the place when all of it is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666
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
    if Path.cwd().is_relative_to(folder):
        raise FileExistsError(
            f"{folder} is what the program runs in, and would be replaced as a whole: export to"
            " another folder, one inside of it for example"
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: expected a folder to export to; name another")
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: export to another folder, or pass overwrite=True to replace it"
        )
    if not any((folder / marker).is_file() for marker in (CONFIG, ADAPTER_CONFIG)):
        raise FileExistsError(
            f"{folder} holds something else than a model or an adapter (no {CONFIG}, no"
            f" {ADAPTER_CONFIG}), which overwrite=True does not replace: export to another folder,"
            " or empty this one"
        )
    for file in sorted(file for file in folder.rglob("*") if not file.is_dir()):
        if file.suffix not in OF_MODELS or file.parent not in (folder, folder / HEADS):
            raise FileExistsError(
                f"{folder} holds {file.relative_to(folder)}, which is no part of an export, and"
                " overwrite=True would remove it: export to another folder, or move it away"
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
        save_weights(tensors, folder / f"{task}.safetensors")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _program_of_model(
    model: "PreTrainedModel", tokenizer: bool, heads: Mapping[str, Mapping[str, Tensor]]
) -> str:
    """A program that loads what was exported, run in its folder."""
    import transformers  # seconds to import: only an export needs it
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    # AutoModel loads one class a configuration, without a head; others are loaded by their own
    of_config: Any = MODEL_MAPPING.get(type(model.config), None)
    loader = "AutoModel" if type(model) is of_config else type(model).__name__
    module = type(model).__module__
    if module.startswith("transformers.") and hasattr(transformers, loader):
        imports = [f"from transformers import {loader}{', AutoTokenizer' if tokenizer else ''}"]
    else:
        loader = type(model).__name__
        imports = [f"from {module} import {loader}"]
        imports += ["from transformers import AutoTokenizer"] if tokenizer else []
    parameters = inspect.signature(type(model)).parameters
    no_pooler = getattr(model, "pooler", model) is None and "add_pooling_layer" in parameters
    options = ", add_pooling_layer=False" if no_pooler else ""  # or it would start at random
    lines = ['folder = "."', f"model = {loader}.from_pretrained(folder{options})"]
    if tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    return _with_head(imports, lines, heads)


def _program_of_adapter(card: MergeCard, heads: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The same for an adapter; on which model it sits is for the reader to load."""
    base = f"  # the {card.start} that it was trained on" if card.start else ""
    lines = ['folder = "."', f"model = PeftModel.from_pretrained(model, folder){base}"]
    return _with_head(["from peft import PeftModel"], lines, heads)


def _with_head(
    imports: list[str], lines: list[str], heads: Mapping[str, Mapping[str, Tensor]]
) -> str:
    if heads:
        task, tensors = next(iter(heads.items()))
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        file = json.dumps(f"/{HEADS}/{task}.safetensors", ensure_ascii=False)
        imports = ["from safetensors.torch import load_file", *imports]
        lines = [*lines, f"head = load_file(folder + {file})  # {shapes}"]
    return "\n".join([*imports, "", *lines])
