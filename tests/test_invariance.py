"""What statistics must not depend on, for models and data that Hypothesis makes up (float64).

Each is compared with brute force, an example at a time, and with the same rows captured in
another way: cut into other batches, in another order, with accumulated gradients, with segments
that are checkpointed, and compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import Batch
from oracle import assert_close, expected
from test_capture import assert_equals
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mats_lightning.capture import Capture
from mats_lightning.statistics import KINDS, Statistics, find_coverage

VOCABULARY = 7
CLASSES = 3
some = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Layer:
    kind: str  # "linear", "norm" or "embedding" (of the tokens, added)
    width: int  # what a linear layer gives
    bias: bool


@dataclass(frozen=True)
class Shape:
    """A stack, and rows for it."""

    layers: tuple[Layer, ...]
    start: int  # width of the first embedding
    pooled: bool  # one label a row, or one a position
    rows: int
    positions: int
    seed: int


SHAPES = st.builds(
    Shape,
    layers=st.lists(
        st.builds(
            Layer,
            kind=st.sampled_from(["linear", "linear", "norm", "embedding"]),
            width=st.integers(1, 5),
            bias=st.booleans(),
        ),
        max_size=4,
    ).map(tuple),
    start=st.integers(1, 5),
    pooled=st.booleans(),
    rows=st.integers(1, 6),
    positions=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)


class Stack(nn.Module):
    """Embedding -> layers, each with an activation -> head; `segments` are checkpointed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(shape.seed)
        self.pooled, width = shape.pooled, shape.start
        self.words, self.layers = nn.Embedding(VOCABULARY, width), nn.ModuleList()
        for layer in shape.layers:
            narrow = layer.kind == "norm" and width < 3  # all of its gradient would be rounding
            if layer.kind == "linear" or narrow:
                before, width = width, 3 if narrow else layer.width
                self.layers.append(nn.Linear(before, width, layer.bias))
            elif layer.kind == "norm":
                self.layers.append(nn.LayerNorm(width, bias=layer.bias))
            else:
                self.layers.append(nn.Embedding(VOCABULARY, width))
        self.head = nn.Linear(width, CLASSES)
        self.reentrant: dict[int, bool] = {}  # layer -> how it is checkpointed
        self.double()

    def segment(self, index: int, x: Tensor, ids: Tensor) -> Tensor:
        layer = self.layers[index]
        return torch.tanh(x + layer(ids) if isinstance(layer, nn.Embedding) else layer(x))

    def forward(self, batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"].double()
        x = self.words(ids)
        for index in range(len(self.layers)):
            if index in self.reentrant:
                x = checkpoint(self.segment, index, x, ids, use_reentrant=self.reentrant[index])
            else:
                x = self.segment(index, x, ids)
        if self.pooled:
            mean = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            return F.cross_entropy(self.head(mean), batch["labels"][:, 0], reduction="none")
        losses = F.cross_entropy(self.head(x).mT, batch["labels"], reduction="none")
        return (losses * mask).sum(1)


def rows(shape: Shape) -> Batch:
    draw = torch.Generator().manual_seed(shape.seed)
    size = (shape.rows, shape.positions)
    lengths = torch.randint(1, shape.positions + 1, (shape.rows, 1), generator=draw)
    return {
        "input_ids": torch.randint(VOCABULARY, size, generator=draw),
        "attention_mask": (torch.arange(shape.positions) < lengths).long(),
        "labels": torch.randint(CLASSES, size, generator=draw),
    }


def captured(
    model: nn.Module, batches: list[Batch], run: Callable[[Batch], Tensor] | None = None
) -> Statistics:
    """The mean loss of each batch, gradients accumulated over all of them."""
    sums = Statistics({})
    capture = Capture(find_coverage(model, KINDS, 8192), sums)
    for batch in batches:
        examples = len(batch["labels"])
        with capture.batch(examples, examples * len(batches), batch["attention_mask"]):
            loss = (run or model)(batch).mean() / len(batches)
            capture.start_backward()
            loss.backward()
            assert capture.finish()
    assert not capture.coverage.uncovered
    return sums


def assert_same(found: Statistics, wanted: Statistics) -> None:
    assert found.examples == wanted.examples
    assert found.positions == wanted.positions
    for kind in ("diagonal_fisher", "block_fisher", "gram"):
        assert_close(getattr(found, kind), getattr(wanted, kind), 1e-9)
    ours, theirs = (
        {name: g for name, (_, g) in statistics.kfac.items()} for statistics in (found, wanted)
    )
    assert_close(ours, theirs, 1e-9)


@given(SHAPES)
@some
def test_statistics_equal_brute_force(shape: Shape) -> None:
    model, batch = Stack(shape), rows(shape)
    assert_equals(captured(model, [batch]), expected(model, [batch]), 1e-9, [])


@given(SHAPES, st.data())
@some
def test_batches_may_be_cut_and_ordered_in_any_way(shape: Shape, data: st.DataObject) -> None:
    model, batch = Stack(shape), rows(shape)
    order = data.draw(st.permutations(range(shape.rows)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, shape.rows - 1)))) - {shape.rows})
    parts = [list(order)[i:j] for i, j in zip([0, *cuts], [*cuts, shape.rows], strict=True)]
    batches = [{k: v[part] for k, v in batch.items()} for part in parts]
    assert_same(captured(model, batches), captured(model, [batch]))
    total = sum((captured(model, [part]) for part in batches), Statistics())
    assert_same(total, captured(model, [batch]))


@given(SHAPES, st.integers(1, 3))
@some
def test_padding_may_be_of_any_length(shape: Shape, more: int) -> None:
    model, batch = Stack(shape), rows(shape)
    longer = {name: F.pad(value, (0, more)) for name, value in batch.items()}
    assert_same(captured(model, [longer]), captured(model, [batch]))


@given(SHAPES, st.data())
@some
def test_segments_may_be_checkpointed_in_any_way(shape: Shape, data: st.DataObject) -> None:
    assume(shape.layers)
    model, batch = Stack(shape), rows(shape)
    wanted = captured(model, [batch])
    indices = st.integers(0, len(shape.layers) - 1)
    model.reentrant = data.draw(st.dictionaries(indices, st.booleans(), min_size=1))
    assert_same(captured(model, [batch, batch]), wanted + wanted)


@given(SHAPES)
@settings(some, max_examples=2)  # each is compiled anew
def test_the_module_may_be_compiled(shape: Shape) -> None:
    """Before its first batch: one that has run already calls no hooks."""
    torch.compiler.reset()
    model, batch = Stack(shape), rows(shape)
    wanted = captured(model, [batch])
    compiled = torch.compile(model, backend="eager")
    found = captured(model, [batch, batch], lambda batch: compiled(batch))
    assert_same(found, wanted + wanted)
