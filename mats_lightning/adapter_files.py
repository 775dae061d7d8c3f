"""What is known of peft: an adapter's files, the names in them, its configuration in a module."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mats_lightning.names import plain_name

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "default"  # under which peft loads an adapter that is given no other name
# components of the names of what a PeftModel has beside it, under its adapter
BELOW = frozenset({"base_layer", "original_module"})
DORA = "lora_magnitude_vector"  # a module, of which peft's file has the one parameter alone
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")  # of a whole model
# attribute of peft's configuration inside of a module: what it was before a merge changed it
AS_BUILT = "as_built"


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether peft's adapter is there, by the folder or its file of weights."""
    path = Path(path)
    if path.is_dir():
        whole = any((path / name).is_file() for name in MODEL_FILES)  # a model, saved with it
        return (path / ADAPTER).is_file() and not whole
    return path.name == ADAPTER and path.is_file()


def adapter_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """peft's configuration of the adapter, by its folder or its file of weights.

    Raises FileNotFoundError or ValueError without one.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"no {ADAPTER_CONFIG} beside {folder / ADAPTER}: it says what kind of adapter this is."
            " Copy it as well, or save the adapter again with PeftModel.save_pretrained"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): copy it again") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "IA3"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path} is of an adapter of kind {kind}: LORA and IA3 are read")
    return config


def names_in_model(config: Mapping[str, Any], source: Path) -> Callable[[str], str]:
    """Name in the file -> name in a PeftModel: peft leaves the adapter's own name out there.

    It raises ValueError for what peft saves under several names, and for rows of an embedding.
    """
    saved = config.get("modules_to_save") or []

    def name(key: str) -> str:
        parts = plain_name(key).split(".")
        if odd := {"modules_to_save", "original_module"} & set(parts):
            raise ValueError(
                f"{source} holds '{key}', with {odd.pop()} in its name: with bias='all' peft saves"
                " the biases of modules_to_save under several names. Fold the adapter into its"
                " model (merge_and_unload) and merge the models, or train with bias='lora_only' or"
                " 'none'"
            )
        if "token_adapter" in parts:
            raise ValueError(
                f"{source} holds '{key}': rows of an embedding that were trained"
                " (trainable_token_indices), which another adapter may have of other tokens. Fold"
                " the adapter into its model (merge_and_unload) and merge the models"
            )
        for i, part in enumerate(parts, start=1):
            if part == DORA:
                return ".".join([*parts[:i], ADAPTER_NAME, "weight"])
            if part.startswith(("lora_", "ia3_")):
                return ".".join([*parts[:i], ADAPTER_NAME, *parts[i:]])
            if any(".".join(parts[:i]).endswith(target) for target in saved):
                return ".".join([*parts[:i], "modules_to_save", ADAPTER_NAME, *parts[i:]])
        return plain_name(key)

    return name


def adapter_key(name: str) -> str:
    """The name in peft's file of a parameter of a PeftModel, where the adapter's own is left out.

    "....query.lora_A.default.weight" -> "....query.lora_A.weight"
    """
    parts = plain_name(name).split(".")
    for i in [i for i, part in enumerate(parts) if part == ADAPTER_NAME and i]:
        if parts[i - 1] == "modules_to_save":
            return ".".join([*parts[: i - 1], *parts[i + 1 :]])
        if parts[i - 1] == DORA:
            return ".".join(parts[:i])
        if parts[i - 1].startswith(("lora_", "ia3_")):
            return ".".join([*parts[:i], *parts[i + 1 :]])
    return name


def adapter_configs(module: nn.Module) -> list[Any]:
    """peft's configurations of the adapters inside of a module."""
    found: dict[int, Any] = {}  # PeftModel and the tuner inside of it share theirs
    for part in module.modules():
        configs: Any = getattr(part, "peft_config", None)
        if isinstance(configs, Mapping) and ADAPTER_NAME in configs:
            config = configs[ADAPTER_NAME]
            found[id(config)] = config
    return list(found.values())
