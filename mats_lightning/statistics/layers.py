"""What each kind of layer gives: per-example gradients and factors, from (input a, gradient g).

N examples, R positions an example (tokens, pixels; 1 without sharing). A weight that multiplies
is seen as a matrix (d_out, d_in), or as one for each group of a convolution; A and G are factors
of that matrix.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mats_lightning.statistics.gradients import (
    ExampleGradients,
    LookupGradients,
    MatrixGradients,
    PatchGradients,
    VectorGradients,
)

# (module, input, gradient at the output) -> gradients of its parameters by local name
Gradients = Callable[[nn.Module, Tensor, Tensor], dict[str, ExampleGradients]]
# numbers that the unfolded input of a convolution may have at a time: on a CPU its caches decide
PATCHES, PATCHES_ON_CPU = 2**24, 2**20


@dataclass(frozen=True, eq=False)
class Factors:
    """How a layer's input and gradient are seen as rows that its weight's matrix multiplies."""

    # (module, a) -> (n, R, d_in) or (n, R, groups, d_in), some examples at a time
    inputs: Callable[[nn.Module, Tensor], Iterator[Tensor]]
    # (module, g) -> (N, R, d_out) or (N, R, groups, d_out)
    outputs: Callable[[nn.Module, Tensor], Tensor]
    # module -> (groups, d_out, d_in)
    sizes: Callable[[nn.Module], tuple[int, int, int]]
    transposed: bool = False  # the weight is stored as (d_in, d_out)
    shared: bool = True  # layers that are given the same tensor have the same A


@dataclass(frozen=True, eq=False)
class Rule:
    """What is known of a kind of layer."""

    gradients: Gradients
    parameters: tuple[str, ...] = ("weight", "bias")
    factors: Factors | None = None
    blocks: tuple[str, ...] = ("bias",)  # vectors, whose (d, d) Fisher is worth having
    trained: bool = True  # the first parameter is: not a frozen weight below an adapter
    lookup: bool = False  # an embedding, whose A is the diagonal of how often each row is read
    check: Callable[[nn.Module], str | None] = field(default=lambda module: None)  # why not


def positions_last(x: Tensor, features: int) -> Tensor:
    """(N, ..., features) -> (N, R, features)."""
    return x.reshape(x.shape[0], -1, features)


# -- layers that multiply ------------------------------------------------------------------------


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    return positions_last(x, x.shape[-1])


def _all_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield _rows(module, x)


def linear(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = W a + b: grad W = sum_r g a^T, grad b = sum_r g."""
    a, g = _rows(module, a), _rows(module, g)
    return {"weight": MatrixGradients(a, g), "bias": VectorGradients(g.sum(1))}


def transposed_linear(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = a W + b (Hugging Face's Conv1D): grad W = sum_r a g^T."""
    a, g = _rows(module, a), _rows(module, g)
    return {"weight": MatrixGradients(g, a), "bias": VectorGradients(g.sum(1))}


def patches(module: nn.Module, a: Tensor) -> Tensor:
    """(N, channels, *spatial) -> (N, R, groups, d_in): what each position's kernel sees.

    d_in = channels / groups times the size of the kernel, in the order of the weight. In memory the
    positions stand last: they are copied in long runs, and products over them need no other copy.
    """
    assert isinstance(module, _ConvNd)
    axes = len(module.kernel_size)
    padding = list(module._reversed_padding_repeated_twice)  # as F.pad takes it; "same" too
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, padding, mode=mode)
    sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    for axis, (size, dilation, stride) in enumerate(sizes, start=2):
        a = a.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    n, groups = len(a), module.groups
    kernel, positions = range(2 + axes, 2 + 2 * axes), range(2, 2 + axes)
    a = a.permute(1, *kernel, 0, *positions).reshape(groups, -1, n, prod(a.shape[2 : 2 + axes]))
    return a.permute(2, 3, 0, 1)


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution takes a single example without its axis, too."""
    assert isinstance(module, _ConvNd)
    return x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)


def _convolution_inputs(module: nn.Module, a: Tensor) -> Iterator[Tensor]:
    assert isinstance(module, _ConvNd)
    a = _batched(module, a)
    numbers = PATCHES_ON_CPU if a.device.type == "cpu" else PATCHES
    for part in a.split(max(1, numbers // (a[0].numel() * prod(module.kernel_size)))):
        rows = patches(module, part)
        yield rows.squeeze(2) if module.groups == 1 else rows


def _convolution_outputs(module: nn.Module, g: Tensor) -> Tensor:
    assert isinstance(module, _ConvNd)
    g = _batched(module, g).flatten(2).mT  # (N, R, channels)
    return g if module.groups == 1 else g.unflatten(2, (module.groups, -1))


def _convolution_sizes(module: nn.Module) -> tuple[int, int, int]:
    assert isinstance(module, _ConvNd)
    return module.groups, module.out_channels // module.groups, module.weight[0].numel()


def convolution(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """A linear layer on patches, one for each group: its positions are those of the output."""
    assert isinstance(module, _ConvNd)
    a, g = _batched(module, a), _batched(module, g).flatten(2)
    return {
        "weight": PatchGradients(a, g, module.groups, partial(patches, module)),
        "bias": VectorGradients(g.sum(2)),
    }


# -- norms, embeddings, and anything else with small parameters ----------------------------------


def layer_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = w o x-hat + b: grad w = sum_r g o x-hat, grad b = sum_r g."""
    assert isinstance(module, nn.LayerNorm)
    x_hat = F.layer_norm(a, module.normalized_shape, eps=module.eps)
    d = int(module.weight.numel())
    return {
        "weight": VectorGradients(positions_last(g * x_hat, d).sum(1)),
        "bias": VectorGradients(positions_last(g, d).sum(1)),
    }


@cache
def _usual_eps(dtype: torch.dtype) -> float:
    """Of F.rms_norm: that of the dtype, or in 16 bits that of float32, as newer torch has it."""
    own = torch.finfo(dtype).eps
    small = torch.full((1,), own / 2, dtype=dtype)  # its square vanishes beside its dtype's eps
    return own if F.rms_norm(small, (1,)) < 0.5 else min(own, torch.finfo(torch.float32).eps)


def rms_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = w o x-hat."""
    assert isinstance(module, nn.RMSNorm)
    eps = _usual_eps(module.weight.dtype) if module.eps is None else module.eps
    x_hat = F.rms_norm(a, module.normalized_shape, eps=eps)
    d = int(module.weight.numel())
    return {"weight": VectorGradients(positions_last(g * x_hat, d).sum(1))}


def group_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = w o x-hat + b, a number a channel: axis 1."""
    assert isinstance(module, nn.GroupNorm)
    return _by_channel(g, F.group_norm(a, module.num_groups, eps=module.eps))


def batch_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """The same with the running statistics (eval mode), or those of the batch (train mode)."""
    assert isinstance(module, _BatchNorm)
    own = module.training or module.running_mean is None
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    if mean is not None and var is not None:
        mean, var = mean.to(a.dtype), var.to(a.dtype)
    return _by_channel(g, F.batch_norm(a, mean, var, training=own, eps=module.eps))


def _by_channel(g: Tensor, x_hat: Tensor) -> dict[str, ExampleGradients]:
    n, channels = g.shape[:2]
    return {
        "weight": VectorGradients((g * x_hat).reshape(n, channels, -1).sum(2)),
        "bias": VectorGradients(g.reshape(n, channels, -1).sum(2)),
    }


def embedding(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """s = W[id]: row id of grad W receives g."""
    assert isinstance(module, nn.Embedding)
    ids = a.reshape(a.shape[0], -1).expand(g.shape[0], -1)  # one row of positions for all
    return {"weight": LookupGradients(ids, positions_last(g, g.shape[-1]), module.padding_idx)}


class _Forward(nn.Module):
    """Calls a module's forward without its hooks: ours are among them.

    On a copy: what the forward keeps in attributes is the training's alone.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.copy(module)
        for tensors in ("_parameters", "_buffers"):
            setattr(self.module, tensors, dict(vars(module)[tensors]))

    def forward(self, a: Tensor) -> Any:
        return self.module.forward(a)


def leaf(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, ExampleGradients]:
    """Any function of one tensor and its own parameters: autograd, an example at a time.

    RMSNorms of all sorts, LayerScale, PReLU: whatever its formula is, it is the module's own.
    """
    call = _Forward(module)
    own = {name: p.detach().to(g.dtype) for name, p in module.named_parameters(recurse=False)}
    rest = {f"module.{name}": buffer.clone() for name, buffer in module.named_buffers()}

    def weighted(parameters: dict[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
        state = {f"module.{name}": p for name, p in parameters.items()}
        s: Tensor = functional_call(call, {**state, **rest}, (a.unsqueeze(0),))
        return (s.squeeze(0) * g).sum()

    gradients = vmap(grad(weighted), in_dims=(None, 0, 0))(own, a, g)
    return {name: VectorGradients(v.reshape(len(v), -1)) for name, v in gradients.items()}


# -- which rule a module has ---------------------------------------------------------------------


def _check_embedding(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq mixes the gradients of a batch's examples"
    if module.max_norm is not None:
        return "max_norm renormalises the weight in the forward pass"
    return None


def _linear_sizes(module: nn.Module) -> tuple[int, int, int]:
    assert isinstance(module, nn.Linear)
    return 1, module.out_features, module.in_features


def _transposed_sizes(module: nn.Module) -> tuple[int, int, int]:
    weight = module.get_parameter("weight")
    return 1, weight.shape[1], weight.shape[0]


NORM = ("weight", "bias")
LINEAR = Rule(linear, factors=Factors(_all_rows, _rows, _linear_sizes))
TRANSPOSED = Rule(
    transposed_linear, factors=Factors(_all_rows, _rows, _transposed_sizes, transposed=True)
)
CONVOLUTION = Rule(
    convolution,
    factors=Factors(_convolution_inputs, _convolution_outputs, _convolution_sizes, shared=False),
)
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.LayerNorm: Rule(layer_norm, blocks=NORM),
    nn.RMSNorm: Rule(rms_norm, blocks=NORM),
    nn.GroupNorm: Rule(group_norm, blocks=NORM),
    nn.BatchNorm1d: Rule(batch_norm, blocks=NORM),
    nn.BatchNorm2d: Rule(batch_norm, blocks=NORM),
    nn.BatchNorm3d: Rule(batch_norm, blocks=NORM),
    nn.Embedding: Rule(embedding, ("weight",), lookup=True, blocks=(), check=_check_embedding),
}


def rule_for(module: nn.Module) -> Rule | str | None:
    """The rule of a module, or the reason why it has none; None for a kind we do not know.

    A subclass counts only when it keeps the forward of its kind: another forward is another
    function, and its gradients would be wrong.
    """
    if _is_conv1d(module):
        return TRANSPOSED
    for kind, rule in RULES.items():
        if not isinstance(module, kind):
            continue
        if type(module).forward is not kind.forward or "forward" in vars(module):
            return f"{type(module).__name__} overrides the forward of nn.{kind.__name__}"
        return rule.check(module) or rule
    return None


def leaf_rule(module: nn.Module, largest: int) -> Rule | None:
    """The rule of an unknown module without children, if its parameters are small."""
    own = dict(module.named_parameters(recurse=False))
    if not own or any(True for _ in module.children()):
        return None
    if any(p.numel() > largest or p.is_complex() for p in own.values()):
        return None
    vectors = [name for name, p in own.items() if p.numel() == max(p.shape, default=1)]
    return Rule(leaf, tuple(own), blocks=tuple(vectors))


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D (GPT-2), told by its name: transformers need not be imported."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
