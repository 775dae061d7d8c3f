"""Weights of a checkpoint as a mapping that reads a tensor when it is asked for.

Four forms are read: a Lightning checkpoint, one safetensors file, a Hugging Face folder of
safetensors files, and an adapter's folder as peft saves it. None is unpickled beyond what
`torch.load(weights_only=True)` admits. One safetensors file is what is written.
"""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mats_lightning.adapter_files import (
    ADAPTER,
    MODEL_FILES,
    adapter_config,
    is_adapter,
    names_in_model,
)
from mats_lightning.files import write_atomically
from mats_lightning.lazy import Lazy
from mats_lightning.names import plain_name

SINGLE, INDEX = MODEL_FILES
SHOWN = 8  # names in an error


def load_weights(path: str | os.PathLike[str], prefix: str = "") -> Mapping[str, Tensor]:
    """The weights at `path`, on the CPU, by parameter name; each is read when it is accessed.

    `path` is one of
    - a Lightning checkpoint (`.ckpt`, or any other file that `torch.save` wrote): its
      "state_dict", memory-mapped;
    - a `.safetensors` file;
    - a Hugging Face folder: its `model.safetensors`, or the shards that its
      `model.safetensors.index.json` names;
    - an adapter's folder (or its `adapter_model.safetensors`) as peft saves LoRA and (IA)^3: its
      weights alone, by the names that they have in a `PeftModel` whose adapter is "default":
      "....query.lora_A.default.weight", "....classifier.modules_to_save.default.weight".

    Names lose the components that wrappers put in (`mats_lightning.names.plain_name`), and get
    `prefix` in front: with "backbone.", the "encoder.layer.0..." of a Hugging Face folder has the
    name that it has in a LightningModule that calls its model `backbone`. Entries of a state dict
    that are no tensors (a module's extra state) are left out with a warning.

    Raises FileNotFoundError for a missing file, folder or shard, and ValueError for a prefix
    without its dot, a file that is cut off or in another format, a checkpoint without
    "state_dict" or with objects that `weights_only=True` refuses, and names that are equal.
    """
    if prefix and not prefix.endswith("."):
        raise ValueError(f"prefix {prefix!r} would run into the names: expected {prefix + '.'!r}")
    path = Path(path)
    if is_adapter(path):
        folder = path if path.is_dir() else path.parent
        rename = names_in_model(adapter_config(folder), path)
        return SafetensorsWeights([folder / ADAPTER], prefix, path, rename)
    if path.is_dir():
        files = _model_files(path)
    elif not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: expected a Lightning checkpoint, a .safetensors file or a "
            f"Hugging Face folder. {_what_is_in(path.parent)}"
        )
    elif path.suffix == ".safetensors":
        files = [path]
    else:
        state_dict = _lightning_state_dict(path)
        stored = _plain_names(state_dict, prefix, path)
        return {name: state_dict[key] for name, key in stored.items()}
    return SafetensorsWeights(files, prefix, path)


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file, as Hugging Face's libraries write it."""
    # clones, for save_file refuses tensors that share memory
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(own, file, metadata={"format": "pt"})


def save_state(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """The same, written to a temporary name and renamed."""
    write_atomically(Path(path), lambda file: save_weights(state, file))


class SafetensorsWeights(Lazy[Tensor]):
    """The tensors of one or more safetensors files, by plain name.

    Holds names and paths, no open file and no tensor, so it can be copied and pickled.
    """

    def __init__(
        self,
        files: Iterable[Path],
        prefix: str,
        source: Path,
        rename: Callable[[str], str] = plain_name,
    ) -> None:
        home: dict[str, Path] = {}
        for file in files:
            for key in _keys(file):
                if key in home:
                    raise ValueError(
                        f"{source}: tensor {key!r} is in {home[key].name} and in {file.name}; "
                        "expected it once. Save the model again, into an empty folder"
                    )
                home[key] = file
        names = _plain_names(home, prefix, source, rename)
        super().__init__(names)
        self._stored = {name: (home[key], key) for name, key in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._stored[name]
        with safe_open(file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor


def _plain_names(
    keys: Iterable[str], prefix: str, source: Path, rename: Callable[[str], str] = plain_name
) -> dict[str, str]:
    """{prefix + plain name: key in the file}."""
    stored: dict[str, str] = {}
    for key in keys:
        name = prefix + rename(key)
        if name in stored:
            raise ValueError(
                f"{source}: {stored[name]!r} and {key!r} are both {name!r} without the wrappers' "
                "components; expected one of them. Save the model's state dict from one place"
            )
        stored[name] = key
    return stored


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no complete safetensors file ({error}); found {file.stat().st_size} bytes. "
            "It may have been cut off: copy or save it again"
        ) from error


def _model_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"no weights in the folder {folder}: expected {SINGLE} or {INDEX}. "
            f"{_what_is_in(folder)} Weights in another form are rewritten by "
            "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)`"
        )
    shard_of = _weight_map(index)
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(
                f"{index} names the shard {shard}, which is not in its folder: expected the name of"
                " a file beside it. Do not use this index unless you know who wrote it"
            )
        file = folder / shard
        if not file.is_file():
            raise FileNotFoundError(
                f"{index} names the shard {shard}, which is not there. {_what_is_in(folder)} "
                "Copy or download it as well"
            )
        found = set(_keys(file))
        missing = [key for key, home in shard_of.items() if home == shard and key not in found]
        if missing:
            raise ValueError(
                f"{index} says that {shard} holds {missing[0]!r} (of {len(missing)} that it does "
                "not hold): index and shards are of different saves. Copy or download all again"
            )
    return [folder / shard for shard in shards]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(shard) for key, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards ({error!r}): expected JSON with a 'weight_map' from "
            "tensor to file name. Copy or download it again"
        ) from error


def _lightning_state_dict(path: Path) -> dict[str, Tensor]:
    checkpoint = _torch_load(path)
    if not isinstance(checkpoint, dict):
        found = f"a {type(checkpoint).__name__}"
    elif not isinstance(checkpoint.get("state_dict"), dict):
        found = _shorten([str(key) for key in checkpoint])
    else:
        state_dict: dict[str, Any] = checkpoint["state_dict"]
        others = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
        if others:
            warnings.warn(f"{path}: left out, as no tensors: {_shorten(others)}", stacklevel=3)
        return {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    raise ValueError(
        f"{path} has no 'state_dict': expected a Lightning checkpoint, found {found}. "
        "Save a bare state dict as {'state_dict': ...}, or as a .safetensors file"
    )


def _torch_load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        refused = ", ".join(classes) or _first_line(error)
        raise ValueError(
            f"{path} holds pickled objects that torch.load(weights_only=True) refuses: {refused}; "
            "expected tensors and plain values. Save it with "
            "ModelCheckpoint(save_weights_only=True), without such objects among the "
            "hyper-parameters, or, if you trust the file, allow the classes with "
            "torch.serialization.add_safe_globals"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: expected a complete file of torch.save in its "
            f"zip format, found {path.stat().st_size} bytes ({_first_line(error)}). It may have "
            "been cut off: copy or save it again"
        ) from error


def _what_is_in(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"There is no folder {folder} either. For a model of the hub give the folder that"
            " huggingface_hub.snapshot_download(id) returns."
        )
    return f"{folder} holds: {_shorten(sorted(entry.name for entry in folder.iterdir()))}."


def _shorten(names: list[str]) -> str:
    if len(names) > SHOWN:
        return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"
    return ", ".join(names) or "nothing"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
