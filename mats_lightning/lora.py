"""LoRA adapters merged as what they add to the weights: their products, and back to factors.

An adapter adds scaling B A to a layer's weight. The factors of two adapters span other spaces, so
their averages mean little; the products can be merged by any method, with the curvature of the
weights that they sit on (`adapted_weights=True`), and made into factors of any rank again:

    adapters = [load_lora(path) for path in paths]
    merged = merging.mats(lora_products(adapters), statistics).state_dict
    adapter, lost = refactor(merged, rank=8, like=adapters[0], statistics=statistics)  # low_rank
    save_lora("merged", adapter)

Products have the names of the weights that they are added to, "<layer>.base_layer.weight".
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mats_lightning.adapter_files import (
    ADAPTER,
    ADAPTER_NAME,
    AS_BUILT,
    adapter_config,
    adapter_configs,
    adapter_key,
)
from mats_lightning.checkpoints import load_weights
from mats_lightning.export import export_adapter
from mats_lightning.lazy import Lazy
from mats_lightning.merging.models import merge_dtype
from mats_lightning.names import plain_name

A, B = f".lora_A.{ADAPTER_NAME}.weight", f".lora_B.{ADAPTER_NAME}.weight"
BASE = ".base_layer.weight"
# decides the scalings
OF_SCALING = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
HEAD = f".modules_to_save.{ADAPTER_NAME}."
# what makes an adapter something else than W + scaling B A with the W of the model's own folder
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change W as well


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA adapter: peft's configuration, and the weights by their names in a PeftModel.

    `weights` are the factors A (rank, d_in) and B (d_out, rank) of each layer, and the modules
    that were saved whole (heads). `prefix` is what precedes peft's names in a LightningModule.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    prefix: str = ""

    @property
    def layers(self) -> list[str]:
        """The layers that are adapted, in the order of the weights."""
        return [name.removesuffix(A) for name in self.weights if name.endswith(A)]

    @property
    def head(self) -> dict[str, Tensor]:
        """What was trained beside the factors, and belongs to the task (`modules_to_save`)."""
        return {name: self.weights[name] for name in self.weights if HEAD in name}

    def with_head(self, other: "Lora") -> "Lora":
        """These factors with the head of another adapter."""
        factors = {n: self.weights[n] for n in self.weights if HEAD not in n}
        head = {self.prefix + n.removeprefix(other.prefix): t for n, t in other.head.items()}
        saved = other.config.get("modules_to_save")
        return replace(
            self, config={**self.config, "modules_to_save": saved}, weights=factors | head
        )

    def scaling(self, layer: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA, of this layer."""
        alpha = self.config["lora_alpha"]
        inside = layer.removeprefix(self.prefix).removeprefix("base_model.model.")
        for pattern, of_layer in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", inside):
                alpha = of_layer
                break
        rank = len(self.weights[layer + A])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def transposed(self) -> bool:
        """Whether the weights are (d_in, d_out), as in Hugging Face's Conv1D."""
        return bool(self.config.get("fan_in_fan_out"))


def load_lora(folder: str | os.PathLike[str], prefix: str = "") -> Lora:
    """The LoRA adapter that peft saved in `folder`, its weights read lazily.

    Raises FileNotFoundError where there is none, ValueError for one that is more than products of
    two factors on linear layers (DoRA and other variants, trained biases, embeddings,
    convolutions, starts like PiSSA that change the weights below).
    """
    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"no adapter in {folder}: expected {ADAPTER}, as peft saves it")
    lora = Lora(adapter_config(folder), load_weights(folder / ADAPTER, prefix), prefix)
    _check_lora(lora, f"the adapter in {folder}")
    return lora


def lora_products(adapters: Sequence[Lora]) -> list[Mapping[str, Tensor]]:
    """For each adapter, {"<layer>.base_layer.weight": scaling B A}, in the weight's own shape.

    Computed as they are read, in float32 at least. They are what merge functions take as models;
    the model that these started from is 0 everywhere (`torch.zeros_like`). Heads are left out.

    Raises ValueError for adapters that do not sit on the same layers, or not in the same way.
    """
    for i, adapter in enumerate(adapters):
        _check_lora(adapter, f"adapter {i}")
        if odd := sorted(set(adapter.layers) ^ set(adapters[0].layers)):
            here, there = (i, 0) if odd[0] in adapter.layers else (0, i)
            raise ValueError(
                f"'{odd[0]}' is adapted by adapter {here} and not by adapter {there}"
                f" ({len(odd)} such layers): merge adapters with the same target_modules"
            )
        if adapter.transposed != adapters[0].transposed:
            raise ValueError(
                f"adapters 0 and {i} differ in fan_in_fan_out: they were trained on other layers"
            )
    return [Products(adapter) for adapter in adapters]


class Products(Lazy[Tensor]):
    """The products of one adapter's factors."""

    def __init__(self, adapter: Lora) -> None:
        super().__init__(layer + BASE for layer in adapter.layers)
        self._adapter = adapter

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        layer = name.removesuffix(BASE)
        a, b = (self._adapter.weights[layer + factor].detach() for factor in (A, B))
        dtype = merge_dtype([a, b])
        product = self._adapter.scaling(layer) * (b.to(dtype) @ a.to(dtype))
        return product.T.contiguous() if self._adapter.transposed else product


def save_lora(folder: str | os.PathLike[str], lora: Lora, overwrite: bool = False) -> Path:
    """Write the adapter as peft does: `PeftModel.from_pretrained(model, folder)` loads it.

    It is written beside its place and renamed. Returns the folder. Raises FileExistsError where
    the folder holds something (with `overwrite`: something else than a model or an adapter).
    """
    weights = {
        adapter_key(name.removeprefix(lora.prefix)): lora.weights[name] for name in lora.weights
    }
    return export_adapter(folder, lora.config, weights, {}, None, overwrite)


def take_form(module: nn.Module, lora: Lora) -> None:
    """Give peft's LoRA layers inside of `module` the ranks and scalings of `lora`.

    The factors of layers that change are empty then, and wait for a state dict. The configuration
    that the module was built with stays beside that of its new form, for its task's checkpoint.
    """
    if lora.config.get("target_parameters"):
        return  # A has rows for each expert, and no such adapter is merged as products
    layers: dict[str, Any] = {plain_name(name): layer for name, layer in module.named_modules()}
    for name in lora.layers:
        layer, rank, scaling = layers[name], len(lora.weights[name + A]), lora.scaling(name)
        if layer.r[ADAPTER_NAME] == rank and math.isclose(layer.scaling[ADAPTER_NAME], scaling):
            continue
        a, b = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
        a.out_features = b.in_features = layer.r[ADAPTER_NAME] = rank
        for factor, shape in [(a, (rank, a.in_features)), (b, (b.out_features, rank))]:
            trains = factor.weight.requires_grad
            factor.weight = nn.Parameter(factor.weight.new_empty(shape), requires_grad=trains)
        layer.scaling[ADAPTER_NAME] = scaling
    for config in adapter_configs(module):
        if not hasattr(config, AS_BUILT):
            setattr(config, AS_BUILT, config.to_dict())
        for key in lora.config.keys() & OF_SCALING:  # for save_pretrained
            setattr(config, key, lora.config[key])


def _check_lora(lora: Lora, what: str) -> None:
    """Raises ValueError for anything but products of two factors on linear layers, and heads."""
    config = lora.config
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{what} is of kind {config.get('peft_type')}: only LORA has products")
    found = [name for name in VARIANTS if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if config.get("init_lora_weights", True) not in STARTS:
        found.append("init_lora_weights")
    if found:
        raise ValueError(
            f"{what} has {found[0]}={config[found[0]]!r}: it is more than scaling B A added to the"
            " weights of its base model, so it cannot be merged as products. Merge it factor by"
            " factor, or fold it into its model (merge_and_unload) and merge the models"
        )
    for name in lora.weights:
        if HEAD not in name and not name.endswith((A, B)):
            raise ValueError(
                f"{what} holds '{name}', which is neither a factor of a linear layer nor a module"
                " that was saved whole (modules_to_save): such adapters are not merged as products"
            )
        pair = (A, B) if name.endswith(A) else (B, A)
        if name.endswith(pair[0]) and name.removesuffix(pair[0]) + pair[1] not in lora.weights:
            raise ValueError(
                f"{what} holds '{name}' without the other factor of its layer: it is incomplete;"
                " copy or save it again"
            )
    for layer in lora.layers:
        shapes = [tuple(lora.weights[layer + factor].shape) for factor in (A, B)]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ValueError(
                f"{what}: the factors of '{layer}' have the shapes {shapes[0]} and {shapes[1]};"
                " expected (rank, d_in) and (d_out, rank), of a linear layer"
            )
    if not lora.layers:
        raise ValueError(f"{what} holds no LoRA factors")
