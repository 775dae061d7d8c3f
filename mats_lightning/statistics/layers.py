"""What each covered kind of layer gives: per-example gradients from (input, output gradient)."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning.statistics.gradients import (
    ExampleGradients,
    LookupGradients,
    MatrixGradients,
    VectorGradients,
)

# (module, input, gradient at the output) -> gradients of its parameters by local name
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, ExampleGradients]]


def positions_last(x: Tensor, features: int) -> Tensor:
    """(N, ..., features) -> (N, R, features)."""
    return x.reshape(x.shape[0], -1, features)


def linear(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = W a + b: grad W = sum_r g a^T, grad b = sum_r g."""
    a, g = positions_last(a, a.shape[-1]), positions_last(g, g.shape[-1])
    return {"weight": MatrixGradients(a, g), "bias": VectorGradients(g.sum(1))}


def layer_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = w o x-hat + b: grad w = sum_r g o x-hat, grad b = sum_r g."""
    assert isinstance(module, nn.LayerNorm)
    x_hat = F.layer_norm(a, module.normalized_shape, eps=module.eps)
    d = int(module.weight.numel())
    return {
        "weight": VectorGradients(positions_last(g * x_hat, d).sum(1)),
        "bias": VectorGradients(positions_last(g, d).sum(1)),
    }


def embedding(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = W[id]: row id of grad W receives g."""
    assert isinstance(module, nn.Embedding)
    ids = a.reshape(a.shape[0], -1).expand(g.shape[0], -1)  # one row of positions for all
    return {"weight": LookupGradients(ids, positions_last(g, g.shape[-1]), module.padding_idx)}


PARAMETERS = ("weight", "bias")  # what a rule gives; other names come from weight_norm and such
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.LayerNorm: layer_norm,
    nn.Embedding: embedding,
}


def rule_for(module: nn.Module) -> Rule | str | None:
    """The rule of a module, or the reason why it has none; None for a kind we do not know.

    A subclass counts only when it keeps the forward of its kind: another forward is another
    function, and its gradients would be wrong.
    """
    for kind, rule in RULES.items():
        if not isinstance(module, kind):
            continue
        if type(module).forward is not kind.forward or "forward" in vars(module):
            return f"{type(module).__name__} overrides the forward of nn.{kind.__name__}"
        if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
            return "scale_grad_by_freq mixes the gradients of a batch's examples"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "max_norm renormalises the weight in the forward pass"
        return rule
    return None
