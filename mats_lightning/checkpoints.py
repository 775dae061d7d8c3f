"""Weights of a checkpoint as a mapping that reads a tensor when it is asked for.

Four forms are read: a Lightning checkpoint, one safetensors file, a Hugging Face folder of
safetensors files, and an adapter's folder as peft saves it. None is unpickled beyond what
`torch.load(weights_only=True)` admits. One safetensors file is what is written.
"""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mats_lightning.names import plain_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "default"  # under which peft loads an adapter that is given no other name
DORA = "lora_magnitude_vector"  # a module, of which peft's file has the one parameter alone
# attribute of peft's configuration inside of a module: what it was before a merge changed it
AS_BUILT = "as_built"


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
        rename = _adapter_names(adapter_config(folder))
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


class SafetensorsWeights(Mapping[str, Tensor]):
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
        self._stored = {name: (home[key], key) for name, key in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._stored[name]
        with safe_open(file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether peft's adapter is there, by the folder or its file of weights."""
    path = Path(path)
    if path.is_dir():
        whole = any((path / name).is_file() for name in (SINGLE, INDEX))  # a model, saved with it
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
    if config.get("bias") == "all" and config.get("modules_to_save"):
        raise ValueError(
            f"{path} has bias='all' beside modules_to_save={config['modules_to_save']}, whose"
            " biases peft's file holds under several names: fold the adapter into its model"
            " (merge_and_unload) and merge the models, or train with bias='lora_only' or 'none'"
        )
    return config


def _adapter_names(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Name in the file -> name in a PeftModel: peft leaves the adapter's own name out there."""
    saved = config.get("modules_to_save") or []

    def name(key: str) -> str:
        parts = plain_name(key).split(".")
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
        return f"There is no folder {folder} either."
    return f"{folder} holds: {_shorten(sorted(entry.name for entry in folder.iterdir()))}."


def _shorten(names: list[str], limit: int = 8) -> str:
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return ", ".join(names) or "nothing"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
