"""Layers whose input is not one row an example: they are named, and training goes on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Batch, D, classified, texts, vectors
from oracle import assert_close, expected
from test_capture import capture_batch, captured
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning import collect_statistics
from mats_lightning.batches import Masks
from mats_lightning.capture import Capture
from mats_lightning.statistics import KINDS, Statistics, find_coverage
from mats_lightning.verification import MORE_IN_IT


class WithPositions(nn.Module):
    """Places of the batch are looked up without an axis of examples; R is N in all batches."""

    def __init__(self, positions: Callable[[int], Tensor], width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, D), nn.Embedding(32, width)
        self.head, self.positions = nn.Linear(D, 3), positions

    def forward(self, batch: Batch) -> Tensor:
        x = self.words(batch["input_ids"])
        found = self.places(self.positions(x.shape[1]))
        mixed = found.ndim == 3  # (R, R, 1): how much of each position the others take
        x = torch.einsum("ijh,njd->nid", found.tanh(), x) if mixed else x + found
        return classified(self.head(torch.tanh(x).mean(1)), batch)


def square(n: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 11, (n, n), generator=draw)
    return {"input_ids": ids, "labels": torch.randint(3, (n,), generator=draw)}


def relative(length: int) -> Tensor:
    place = torch.arange(length)
    return (place[None] - place[:, None]).clamp(-2, 2) + 5


@pytest.mark.parametrize(
    ("positions", "width"), [(relative, 1), (torch.arange, D)], ids=["relative", "absolute"]
)
def test_positions_are_no_examples_where_there_are_as_many(
    positions: Callable[[int], Tensor], width: int
) -> None:
    model = WithPositions(positions, width).double()
    batches = [square(5, seed) for seed in range(3)]
    found, coverage = captured(model, batches)
    wanted = expected(model, batches, root=model)
    assert coverage.rows["places.weight"].statistics == []
    assert "looks up positions" in coverage.rows["places.weight"].reason
    assert sorted(found.diagonal_fisher) == ["head.bias", "head.weight", "words.weight"]
    covered = {name: wanted.diagonal_fisher[name] for name in found.diagonal_fisher}
    assert_close(found.diagonal_fisher, covered, 1e-9)


def test_ids_that_count_up_are_data_where_they_go_on() -> None:
    """The rows of a table in their order: 0 to 3, then 4 to 7."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Embedding(12, D), nn.Linear(D, 3)

        def forward(self, batch: Batch) -> Tensor:
            return classified(self.head(self.rows(batch["row"])), batch)

    model = Table().double()
    batches = [{**vectors()[0], "row": torch.arange(4) + 4 * k} for k in range(3)]
    found, _ = captured(model, batches)
    assert_close(found.diagonal_fisher, expected(model, batches).diagonal_fisher, 1e-9)


class Shared(nn.Module):
    """A layer reads what is the same for all examples: a parameter, (1, R, d), or one row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        rows = 1 if kind == "row" else 4
        self.query, self.key = nn.Parameter(torch.randn(rows, D)), nn.Linear(D, D)
        self.head, self.kind = nn.Linear(rows, 3), kind

    def forward(self, batch: Batch) -> Tensor:
        query = self.query if self.kind == "parameter" else torch.tanh(self.query)
        keys = self.key(query[None] if self.kind == "leading" else query).view(-1, D)
        return classified(self.head(batch["x"] @ keys.T), batch)


@pytest.mark.parametrize("kind", ["parameter", "leading", "row"])
def test_a_layer_that_runs_once_for_the_batch_has_no_curvature(kind: str) -> None:
    """Its gradient is the sum over the batch, so G would depend on how rows are batched."""
    torch.manual_seed(0)
    model = Shared(kind).double()
    found, coverage = captured(model, vectors((4, 4, 2)))
    assert coverage.rows["key.weight"].statistics == ["gram"]
    assert coverage.rows["key.bias"].statistics == []
    assert sorted(found.kfac) == ["head"] and sorted(found.gram) == ["head", "key"]


class Experts(nn.Module):
    """Rows go to one of two experts; in some batches one of them gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.head = nn.Linear(D, 3)

    def forward(self, batch: Batch) -> Tensor:
        x, chosen = batch["x"], batch["x"][:, 0] > 0
        y = torch.zeros_like(x)
        for rows, expert in zip((chosen, ~chosen), self.experts, strict=True):
            y = y.index_put((rows.nonzero()[:, 0],), expert(x[rows]))
        return classified(self.head(torch.tanh(y)), batch)


def test_an_expert_may_get_a_single_row() -> None:
    model, batches = Experts().double(), vectors((4, 4, 4))
    for batch in batches:
        batch["x"][:, 0] = torch.tensor([1.0, 2.0, 3.0, -1.0])
    found, coverage = captured(model, batches)
    wanted = expected(model, batches)
    assert coverage.rows["experts.1.weight"].statistics == ["gram", "kfac"]
    assert_close({m: g for m, (_, g) in found.kfac.items()}, wanted.output, 1e-9)


def test_an_expert_may_get_no_row() -> None:
    model, batches = Experts().double(), vectors()
    batches[0]["x"][:, 0].abs_()
    found, coverage = captured(model, batches)
    wanted = expected(model, [b for b in batches])
    for name in ("experts.0", "experts.1"):
        assert coverage.rows[f"{name}.weight"].statistics == ["gram", "kfac"]
        assert_close({name: found.gram[name]}, {name: wanted.gram[name]}, 1e-9)
        assert_close({name: found.kfac[name][1]}, {name: wanted.output[name]}, 1e-9)


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(D, 3)
        self.odd: nn.Module = nn.Embedding(4, D) if kind == "id" else nn.Linear(D, D)
        if kind == "scalar":
            self.odd = Temperature()
        if kind == "norm":
            self.odd = nn.LayerNorm(D)

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        if self.kind == "id":
            x = x + self.odd(torch.tensor(2))
        elif self.kind == "scalar":
            x = self.odd(x)
        else:
            x = x * self.odd(torch.ones(D, dtype=x.dtype))
        return classified(self.head(x), batch)


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.exp()


@pytest.mark.parametrize("kind", ["id", "vector", "norm"])
def test_an_input_without_an_axis_of_examples_is_named(kind: str) -> None:
    found, coverage = captured(Odd(kind).double(), vectors())
    assert coverage.rows["odd.weight"].statistics == []
    assert "without examples" in coverage.rows["odd.weight"].reason
    assert sorted(found.diagonal_fisher) == ["head.bias", "head.weight"]


def test_a_scalar_parameter_has_its_statistics() -> None:
    model = Odd("scalar").double()
    found, _ = captured(model, vectors())
    wanted = expected(model, vectors())
    torch.testing.assert_close(
        found.diagonal_fisher["odd.log"], wanted.diagonal_fisher["odd.log"], rtol=1e-9, atol=0
    )


def test_a_lazy_module_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'lazy\.weight' has no shape yet: call the model"):
        find_coverage(nn.ModuleDict({"lazy": nn.LazyLinear(3)}), KINDS, 8192)


class Gate(nn.Module):
    """Counts its calls and keeps what it gave, as modules do that are looked into."""

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.weight, self.calls, self.only = nn.Parameter(torch.ones(D)), 0, only
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.only in (None, len(x)), "made for one size of batch"
        self.calls += 1
        self.last = torch.sigmoid(self.weight * self.calls)
        return x * self.last


class Gated(nn.Module):
    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.gate, self.head = Gate(only), nn.Linear(D, 3)

    def forward(self, batch: Batch) -> Tensor:
        return classified(self.head(self.gate(batch["x"])), batch)


def test_what_a_module_keeps_of_its_calls_is_the_trainings_alone() -> None:
    model = Gated().double()
    captured(model, vectors())
    assert model.gate.calls == 3
    assert model.gate.last is not None and model.gate.last.shape == (D,)
    float(model.gate.last.detach().sum())  # no tensor of a transform that is over


def test_a_module_that_cannot_run_on_one_example_is_named() -> None:
    found, coverage = captured(Gated(only=4).double(), vectors((4, 4)))
    reason = coverage.rows["gate.weight"].reason
    assert reason == "autograd of gate for each example fails: made for one size of batch"
    assert sorted(found.diagonal_fisher) == ["head.bias", "head.weight"]


class Added(nn.Module):
    """x W + x A B with parameters of a layer that is never called; B is 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.head = nn.Linear(D, 3)
        nn.init.zeros_(self.up.weight)

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        change = F.linear(x, self.up.weight @ self.down.weight)
        return classified(self.head(x) + change, batch)


def test_a_gradient_that_is_0_at_first_is_checked_later() -> None:
    model = Added().double()
    coverage, statistics = find_coverage(model, KINDS, 8192), Statistics({})
    capture = Capture(coverage, statistics)
    first, second, _ = vectors()
    capture_batch(capture, model, first)
    assert coverage.rows["up.weight"].statistics == []
    assert coverage.rows["down.weight"].statistics  # nothing shows it yet
    nn.init.ones_(model.up.weight)
    capture_batch(capture, model, second)
    assert coverage.rows["down.weight"].statistics == []
    assert coverage.rows["down.weight"].reason == MORE_IN_IT
    assert sorted(statistics.diagonal_fisher) == ["head.bias", "head.weight"]


def test_layers_that_read_one_tensor_have_masks_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, D)
            self.left, self.right, self.head = nn.Linear(D, 3), nn.Linear(D, 3), nn.Linear(D, 3)

        def forward(self, batch: Batch) -> Tensor:
            x = self.words(batch["input_ids"])
            s = self.left(x) + self.right(x).tanh() + self.head(x)
            return classified(s.mean(1), batch)

    model, batch = Two().double(), texts()[0]
    mask = batch["attention_mask"].bool()
    first = mask & (torch.arange(mask.shape[1]) == 0)
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    with capture.batch(len(mask), len(mask), Masks.of({"^right$": first, "": mask})):
        loss = model(batch).mean()
        capture.start_backward()
        loss.backward()
        capture.finish()
    found: Any = capture.statistics
    counts = {name: found.positions[name] for name in ("left", "right", "head")}
    assert counts == {"left": int(mask.sum()), "right": len(mask), "head": int(mask.sum())}
    x = model.words(batch["input_ids"]).detach()
    for name, rows in (("left", x[mask]), ("right", x[first])):
        torch.testing.assert_close(found.gram[name], rows.T @ rows / len(rows))
    assert found.inputs["left"] == found.inputs["head"] != found.inputs["right"]


def test_a_sparse_input_is_named() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Linear(D, 4), nn.Linear(4, 3)

        def forward(self, batch: Batch) -> Tensor:
            return classified(self.head(self.words(batch["x"].to_sparse()).tanh()), batch)

    found, coverage = captured(Bag().double(), vectors())
    reason = "words is given a sparse tensor"
    assert coverage.uncovered == {"words.weight": reason, "words.bias": reason}
    assert list(found.kfac) == ["head"]


def test_what_is_left_out_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    model = Added().double()
    nn.init.ones_(model.up.weight)
    batches = vectors()
    collect_statistics(
        model, batches, loss_fn=lambda model, batch: model(batch).mean(), progress=False
    )
    said = [str(w.message) for w in recwarn if "leaves statistics out" in str(w.message)]
    about = "up.weight, down.weight"
    assert said == [f"collect_statistics leaves statistics out. {about}: {MORE_IN_IT}"]
