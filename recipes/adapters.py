"""Fine-tuning with an adapter of peft: only its parameters and the task's head train.

What is kept of such a task is small: peft's own folder with the adapter alone, the head in a file
of its own in it, and the statistics beside it.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mats_lightning.sidecar import sidecar_path

ADAPTERS: Mapping[str, tuple[type[Any], dict[str, Any]]] = {  # peft's configuration, our defaults
    # on the layers that peft knows for the architecture: keys, values and the feed-forward part
    "ia3": (IA3Config, {}),
    "lora": (LoraConfig, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
}
# adapter -> arguments of the MaTSStatsCallback: vectors have these two statistics alone, and the
# products of LoRA's factors are merged with the curvature of the weights that they are added to
CALLBACK_ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "ia3": {"statistics": ["diagonal_fisher", "block_fisher"]},
    "lora": {"adapted_weights": True},
}
HEAD = "head.safetensors"


def adapted(
    backbone: PreTrainedModel, name: str, adapter: str, options: Mapping[str, Any]
) -> PeftModel:
    """The model under a new adapter, all else frozen.

    Arguments:
        backbone: loaded from `name`, which the adapter's configuration will say.
        adapter: "ia3" or "lora".
        options: of peft's IA3Config or LoraConfig, over the defaults above.

    Raises MisconfigurationException for another adapter, and for options that peft refuses.
    """
    if adapter not in ADAPTERS:
        raise MisconfigurationException(f"adapter: {adapter!r} is none of {', '.join(ADAPTERS)}")
    kind, defaults = ADAPTERS[adapter]
    try:
        config = kind(**{**defaults, **options}, base_model_name_or_path=name)
        backbone.name_or_path = name  # what get_peft_model writes into the configuration
        model = get_peft_model(backbone, config)
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"adapter_options: peft makes no {kind.__name__} for {name} of {dict(options)}: {error}"
        ) from error
    assert isinstance(model, PeftModel)
    return model


def save_adapter(module: L.LightningModule, checkpoint: Path) -> Path:
    """The adapter and the head of `module` in place of its whole checkpoint; returns the folder.

    The folder has the checkpoint's name without ".ckpt"; the sidecar goes with it.
    """
    folder = checkpoint.with_name(checkpoint.name.removesuffix(".ckpt"))
    partial = folder.with_name(f".{folder.name}.partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    backbone: Any = module.backbone
    # embeddings are no adapter, and peft would look for the base model on the hub to compare them
    backbone.save_pretrained(partial, save_embedding_layers=False)
    head: Any = module.head
    save_file({name: value.cpu() for name, value in head.state_dict().items()}, partial / HEAD)
    for file in partial.glob("*.safetensors"):
        file.chmod(checkpoint.stat().st_mode)  # which are made readable for their owner alone
    partial.rename(folder)
    if (sidecar := sidecar_path(checkpoint)).exists():
        os.replace(sidecar, sidecar_path(folder))
    checkpoint.unlink()
    return folder


def load_head(module: L.LightningModule, folder: Path) -> None:
    """Put the head that `save_adapter` saved into `module`."""
    head: Any = module.head
    head.load_state_dict(load_file(folder / HEAD))
