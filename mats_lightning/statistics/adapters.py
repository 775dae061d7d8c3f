"""Layers of peft: what their own forward does with parameters that belong to no called module.

LoRA's factors need nothing of this: `lora_A` and `lora_B` are linear layers that are called.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning.statistics.gradients import ExampleGradients, VectorGradients
from mats_lightning.statistics.layers import LINEAR, TRANSPOSED, Rule, positions_last, rule_for

BASE, BASE_BIAS = "base_layer.weight", "base_layer.bias"


def adapter_rule(module: nn.Module, base: bool) -> Rule | str | None:
    """The rule of peft's `ia3.Linear`, and with `base` of the frozen weight below a LoRA.

    Told by their names: peft need not be imported. A reason where there is none, None for modules
    that are no adapter layers. A base layer whose weight trains has its own rule.
    """
    kind = type(module)
    of_lora = kind.__module__.startswith("peft.tuners.lora.")
    if base and of_lora and hasattr(module, "base_layer") and kind.__name__ != "Linear":
        return f"no A and G are taken below LoRA's {kind.__name__} ({kind.__module__})"
    if kind.__name__ != "Linear":
        return None
    if kind.__module__ == "peft.tuners.ia3.layer":
        return _ia3_rule(module)
    if kind.__module__ == "peft.tuners.lora.layer" and base:
        if module.get_parameter(BASE).requires_grad:
            return None
        below: Any = rule_for(module.get_submodule("base_layer"))
        if below not in (LINEAR, TRANSPOSED) or below.factors is None:
            return "the base layer of this LoRA is not linear"
        of_base = below.factors.sizes
        factors = replace(below.factors, sizes=lambda lora: of_base(lora.base_layer))
        bias = getattr(module.get_submodule("base_layer"), "bias", None)
        trained = (BASE_BIAS,) if bias is not None and bias.requires_grad else ()
        return Rule(_lora_base, (BASE, *trained), factors, blocks=trained, trained=False)
    return None


def _lora_base(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """A frozen weight has no gradient; its A and G are those of the whole layer.

    A bias that trains beside it is added to what the whole layer gives.
    """
    return {BASE_BIAS: VectorGradients(positions_last(g, g.shape[-1]).sum(1))}


def _ia3_rule(module: Any) -> Rule | str:
    active = [name for name in module.active_adapters if name in module.ia3_l]
    if len(active) != 1:
        return f"{len(active)} (IA)^3 adapters are active at once; one is needed"
    if rule_for(module.base_layer) not in (LINEAR, TRANSPOSED):
        return "the base layer of this (IA)^3 is not linear"
    local = f"ia3_l.{active[0]}"
    return Rule(partial(_ia3, local), (local,), blocks=(local,))


def _ia3(local: str, module: Any, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = l o (W x + b), or W (l o x) + b in front of a feed-forward layer; l a vector."""
    base = module.base_layer
    weight = base.weight.to(g.dtype)
    if rule_for(base) is TRANSPOSED:
        weight = weight.T
    if module.is_feedforward:
        product = a * (g @ weight)
    else:
        bias = None if base.bias is None else base.bias.to(g.dtype)
        product = g * F.linear(a, weight, bias)
    return {local: VectorGradients(positions_last(product, product.shape[-1]).sum(1))}
