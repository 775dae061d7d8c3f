"""Small models, one for each thing that makes capturing hard, and batches for them.

Each maps a batch to its examples' unreduced losses (N,), as `oracle` wants it.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

Batch = dict[str, Any]
D = 6  # features in and out, but for the MLP


def vectors(sizes: tuple[int, ...] = (4, 4, 2), seed: int = 0) -> list[Batch]:
    """Batches of rows x (D,) with labels among three."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(n, D, generator=draw, dtype=torch.float64),
            "labels": torch.randint(3, (n,), generator=draw),
        }
        for n in sizes
    ]


def texts(sizes: tuple[int, ...] = (4, 4, 2), seed: int = 0, vocabulary: int = 11) -> list[Batch]:
    """Token ids with padding (id 0) at the end; batches differ in length."""
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for index, n in enumerate(sizes):
        length = 7 - index % 2
        lengths = torch.randint(2, length + 1, (n, 1), generator=draw)
        lengths[0] = length
        mask = torch.arange(length) < lengths
        ids = torch.randint(1, vocabulary, (n, length), generator=draw) * mask
        labels = torch.randint(3, (n,), generator=draw)
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return batches


def classified(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"], reduction="none")


class MLP(nn.Module):
    """Two layers; the activation works in place on the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 5), nn.Linear(5, 3)
        self.activation = nn.ReLU(inplace=True)

    def logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self.second(self.activation(self.first(batch["x"])))
        return logits

    def forward(self, batch: Batch) -> Tensor:
        return classified(self.logits(batch), batch)


class Block(nn.Module):
    """Attention with q, k and v on one input, and an MLP; LayerNorms in front (pre-norm)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D, bias=False)
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.out, self.up, self.down = nn.Linear(D, D), nn.Linear(D, 8), nn.Linear(8, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool())
        x = x + self.dropout(self.out(h.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """Position ids of one row, broadcast over the batch; mean pooling over what is no padding.

    `checkpointing`: None, "reentrant" or "non-reentrant".
    """

    def __init__(self, checkpointing: str | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.words, self.places = nn.Embedding(11, D, padding_idx=0), nn.Embedding(9, D)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def logits(self, batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)[None])
        for block in self.blocks:
            if self.checkpointing:
                reentrant = self.checkpointing == "reentrant"
                x = checkpoint(block, x, mask, use_reentrant=reentrant)
            else:
                x = block(x, mask)
        keep = mask.unsqueeze(-1).to(x.dtype)
        logits: Tensor = self.head((self.norm(x) * keep).sum(1) / keep.sum(1))
        return logits

    def forward(self, batch: Batch) -> Tensor:
        return classified(self.logits(batch), batch)


class Reused(nn.Module):
    """One layer and one norm used three times, each time in a segment that may be checkpointed.

    The segment ends in an activation, so it is run again before any layer has its gradient.
    """

    def __init__(self, checkpointing: str | None = None) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm, self.layer, self.head = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, 3)

    def segment(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer(self.norm(x)))

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"].clone().requires_grad_()  # re-entrant checkpointing needs such an input
        for _ in range(3):
            if self.checkpointing:
                reentrant = self.checkpointing == "reentrant"
                x = checkpoint(self.segment, x, use_reentrant=reentrant)
            else:
                x = self.segment(x)
        return classified(self.head(x), batch)


class PartlyCheckpointed(Reused):
    """The layer is used inside of a checkpointed segment and outside of it."""

    def forward(self, batch: Batch) -> Tensor:
        x = self.segment(batch["x"].clone().requires_grad_())
        if self.checkpointing:
            x = checkpoint(self.segment, x, use_reentrant=self.checkpointing == "reentrant")
        else:
            x = self.segment(x)
        return classified(self.head(self.segment(x)), batch)


class Beside(nn.Module):
    """Two layers and a norm on one tensor, one of the layers in a checkpointed segment."""

    def __init__(self, first: str, checkpointing: str | None = None) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm, self.first, self.checkpointing = nn.LayerNorm(D), first, checkpointing

    def segment(self, x: Tensor) -> Tensor:
        return F.gelu(self.inner(x))

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        uses = {
            "inner": lambda: checkpoint(self.segment, x, use_reentrant=True),
            "outer": lambda: self.outer(x),
        }
        if not self.checkpointing:
            uses["inner"] = lambda: self.segment(x)
        normalised, h = self.norm(x), uses.pop(self.first)()  # their gradients come last
        (other,) = uses.values()
        return classified(self.head(normalised + h * other()), batch)


class Tied(nn.Module):
    """A language model whose output layer is its embedding; the bias is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(11, D), nn.Linear(D, D)
        self.output = nn.Linear(D, 11)
        self.output.weight = self.words.weight

    def forward(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        logits = self.output(torch.tanh(self.layer(self.words(ids))))[:, :-1]
        labels = torch.where(batch["attention_mask"].bool(), ids, -100)[:, 1:]
        return F.cross_entropy(logits.mT, labels, reduction="none").sum(1)


class Sharing(nn.Module):
    """Which of three layers get the same input changes with the batch's "way"."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, 4), nn.Linear(D, 4), nn.Linear(D, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        x, other = batch["x"], batch["x"].flip(1)
        way = batch["way"]
        h = self.q(x) * self.k(x if way != "k alone" else other)
        if way != "without v":
            h = h + self.v(x if way != "v alone" else other)
        if way == "k drops out":
            h = self.q(x) + self.k(x).detach() + self.v(x)
        return classified(self.head(torch.tanh(h)), batch)


class Conditional(nn.Module):
    """A layer that only some batches use, and one whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.extra, self.unused = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, 3)

    def forward(self, batch: Batch) -> Tensor:
        x = torch.tanh(self.layer(batch["x"]))
        self.unused(x)
        if batch["way"] == "extra":
            x = x + self.extra(x)
        return classified(self.head(x), batch)


class ByKeyword(MLP):
    def forward(self, batch: Batch) -> Tensor:
        return classified(self.second(input=self.activation(self.first(input=batch["x"]))), batch)


class Twice(MLP):
    """A layer is called twice on the very same tensor, another one once."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 5)

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        h = self.first(x) * torch.sigmoid(self.gate(x)) + torch.tanh(self.first(x))
        return classified(self.second(h), batch)


class Hooked(MLP):
    """A hook of the user's changes what the layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, output: 2 * output + 1)


class Functional(Tied):
    """The output layer is the embedding's weight, used without a call of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.never_called = nn.Identity(), nn.Linear(D, D)  # type: ignore[assignment]

    def forward(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        h = torch.tanh(self.layer(self.words(ids))) @ self.never_called.weight
        labels = torch.where(batch["attention_mask"].bool(), ids, -100)[:, 1:]
        logits = F.linear(h, self.words.weight)[:, :-1]
        return F.cross_entropy(logits.mT, labels, reduction="none").sum(1)


class Adversarial(MLP):
    """Trains on inputs moved along the gradient of the loss: a backward pass within the forward."""

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        losses = super().forward(batch | {"x": x})
        step, _ = torch.autograd.grad(losses.sum(), [x, self.first.weight])
        return super().forward(batch | {"x": x.detach() + step.sign()})


class GradientPenalty(MLP):
    """The loss has the gradient of the prediction in it: not of the form that layers have."""

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        losses = super().forward(batch | {"x": x})
        (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses + slope.square().sum(-1)


class Teacher(MLP):
    """The model's own prediction without gradient is a second target: the layers run twice."""

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = self.second(self.activation(self.first(batch["x"] + 1)))
        logits = self.second(self.activation(self.first(batch["x"])))
        return classified(logits, batch) + (logits - target).square().sum(-1)


class Flattened(nn.Module):
    """The middle layer sees all positions of the batch as rows of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        x = torch.tanh(self.first(batch["x"].unflatten(1, (3, 2))))
        x = torch.tanh(self.middle(x.flatten(0, 1))).view_as(x)
        return classified(self.last(x).mean(1), batch)


class Categories(nn.Module):
    """Embeddings of one id an example, one of them with sparse gradients; frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.sparse = nn.Embedding(3, D), nn.Embedding(3, D, sparse=True)
        self.norm, self.layer, self.head = nn.LayerNorm((2, 3)), nn.Linear(D, D), nn.Linear(D, 3)
        self.layer.weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        ids = batch["labels"]
        x = self.label(ids) + self.sparse((ids + 1) % 3) + batch["x"]
        x = self.norm(x.unflatten(1, (2, 3))).flatten(1)
        return classified(self.head(torch.tanh(self.layer(x))), batch)


class Places(nn.Module):
    """How positions that are looked up once, (1, R), meet the batch: `meet(words, places)`."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.places, self.head = (
            nn.Embedding(11, D),
            nn.Embedding(9, D),
            nn.Linear(D, 3),
        )
        self.meet = meet

    def forward(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        x = self.meet(self.words(ids), self.places(torch.arange(ids.shape[1])[None]))
        return classified(self.head(torch.tanh(x).mean(1)), batch)


def ways(*names: str, make: Callable[..., list[Batch]] = vectors) -> list[Batch]:
    """A batch for each way."""
    sizes = tuple(4 - i % 2 for i in range(len(names)))
    return [batch | {"way": way} for batch, way in zip(make(sizes), names, strict=True)]


# -- other kinds of layers -----------------------------------------------------------------------


def images(
    sizes: tuple[int, ...] = (4, 3), seed: int = 0, shape: tuple[int, ...] = (4, 7, 6)
) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(n, *shape, generator=draw, dtype=torch.float64),
            "labels": torch.randint(3, (n,), generator=draw),
        }
        for n in sizes
    ]


class Convolutions(nn.Module):
    """Stride, padding of three kinds, dilation, groups, one channel a group; a GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 9, (3, 1), groups=3, padding="same", bias=False)
        self.norm = nn.GroupNorm(3, 9)
        self.depthwise = nn.Conv2d(9, 9, 2, groups=9, dilation=2)
        self.pointwise, self.head = nn.Conv2d(9, 4, 1), nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        x = torch.tanh(self.norm(self.grouped(torch.tanh(self.first(batch["x"])))))
        x = torch.tanh(self.pointwise(torch.tanh(self.depthwise(x))))
        return classified(self.head(x.mean((2, 3))), batch)


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(2, 4, 2, groups=2, padding=1), nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        return classified(self.head(torch.tanh(self.conv(batch["x"])).mean((2, 3, 4))), batch)


class Windows(nn.Module):
    """A convolution over the tokens of padded texts, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, D, padding_idx=0), nn.Linear(D, 3)
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, batch: Batch) -> Tensor:
        keep = batch["attention_mask"].unsqueeze(1)
        x = self.words(batch["input_ids"]).mT
        for _ in range(2):
            x = torch.tanh(self.conv(x)) * keep
        return classified(self.head(x.sum(2) / keep.sum(2)), batch)


class Transposed(nn.Module):
    """Hugging Face's Conv1D: a linear layer whose weight is stored as (d_in, d_out)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(11, D), Conv1D(D, D), Conv1D(3, D)

    def forward(self, batch: Batch) -> Tensor:
        keep = batch["attention_mask"].unsqueeze(2)
        x = torch.tanh(self.first(self.words(batch["input_ids"]))) * keep
        return classified(self.second(x).sum(1), batch)


class Root(nn.Module):
    """An RMSNorm as language models write it, with 1 + weight as Gemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, D))

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.square().mean(-1, keepdim=True)
        return hidden_states * torch.rsqrt(mean + 1e-6) * (1 + self.weight)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.linspace(0, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class Norms(nn.Module):
    """Every norm, and small modules of unknown kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.rms, self.root, self.scale = nn.RMSNorm(D), Root(), Scale()
        self.batch, self.act, self.head = nn.BatchNorm1d(D), nn.PReLU(2), nn.Linear(D, 3)
        self.batch.running_mean = torch.linspace(-1, 1, D)
        self.batch.eval()
        for parameter in (*self.rms.parameters(), *self.batch.parameters()):
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, batch: Batch) -> Tensor:
        x = self.rms(self.batch(batch["x"]))
        x = self.scale(self.act(x.unflatten(1, (2, 3))).flatten(1))
        return classified(self.head(self.root(x)), batch)


class Adapted(nn.Module):
    """A layer, and a feed-forward one, for peft to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.up, self.head = nn.Linear(D, D), nn.Linear(D, 8), nn.Linear(8, 3)

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"].unflatten(1, (3, 2)).repeat(1, 1, 3)
        return classified(self.head(torch.tanh(self.up(torch.tanh(self.layer(x))))).mean(1), batch)


def adapted(config: Any, low: float, high: float) -> nn.Module:
    """`Adapted` under peft, with adapters that are not where they start."""
    model: Any = get_peft_model(Adapted(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, low, high)
    return model


def ia3() -> nn.Module:
    config = IA3Config(target_modules=["layer", "up"], feedforward_modules=["up"])
    return adapted(config, 0.5, 1.5)


def lora() -> nn.Module:
    return adapted(LoraConfig(r=2, target_modules=["layer", "up"]), -0.5, 0.5)
