"""Heads fitted to merged weights: against an optimum found in another way; what is run again."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.special import logsumexp
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mats_lightning.distillation import soft_targets
from mats_lightning.heads import fit_head
from mats_lightning.replay import Replay

Batch = tuple[Tensor, Tensor]
HEAD = ("head.weight", "head.bias")


class Counted(nn.Linear):
    """A layer that knows how often it ran."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Model(pl.LightningModule):
    """A body, dropout, a head; what is logged would fail without a trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Counted(4, 6), nn.Tanh())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.body(x)))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    @property
    def counted(self) -> Counted:
        layer = self.body[0]
        assert isinstance(layer, Counted)
        return layer


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batches(*sizes: int, seed: int = 1) -> list[Batch]:
    """Rows whose labels are no function of them, so that the best head is a finite one."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 4, generator=g, dtype=torch.float64),
            torch.randint(3, (n,), generator=g),
        )
        for n in sizes
    ]


def best_loss(model: Model, rows: list[Batch]) -> float:
    """Of any head on the rows together, by SciPy's BFGS without gradients of ours."""
    with torch.no_grad():
        features = torch.cat([model.body(x) for x, _ in rows]).numpy()
    labels = torch.cat([y for _, y in rows]).numpy()
    ones = np.column_stack([features, np.ones(len(features))])

    def loss(w: Any) -> Any:
        logits = ones @ w.reshape(3, -1).T
        return np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels])

    found = scipy.optimize.minimize(loss, np.zeros(3 * ones.shape[1]), method="BFGS")
    return float(found.fun)


def mean_loss(model: Model, rows: list[Batch]) -> float:
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return float(F.cross_entropy(model.eval()(x), y))


def test_the_head_comes_to_the_optimum_of_all_rows(model: Model) -> None:
    rows = batches(16, 16, 5)  # a mean over rows, not over batches
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = mean_loss(model, rows)
    model.train()
    found = fit_head(model, rows, HEAD, iterations=[3, 100])
    assert found.iterations == 100 and found.scores == {}
    assert found.losses[0] == pytest.approx(first)
    assert found.losses[100] == pytest.approx(best_loss(model, rows), abs=1e-7)
    assert found.losses[0] > found.losses[3] > found.losses[100]
    assert model.training and model.dropout.training  # as it was
    assert mean_loss(model, rows) == pytest.approx(found.losses[100])
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) is (name not in HEAD)
    assert list(found.state) == list(HEAD)
    assert all(torch.equal(after[name], tensor) for name, tensor in found.state.items())


def test_no_point_is_evaluated_twice(model: Model) -> None:
    points: list[Tensor] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        points.append(model.head.weight.detach().clone())
        return F.cross_entropy(module(batch[0]), batch[1])

    found = fit_head(model, batches(16), HEAD, iterations=[10], loss_fn=loss)
    assert torch.equal(points[0], points[1])  # what is replayed was recorded there
    assert len(points) > 10
    for i, point in enumerate(points[1:-1]):
        assert not any(torch.equal(point, later) for later in points[i + 2 :])
    assert torch.equal(points[-1], found.state["head.weight"])


def test_gradients_and_what_trains_are_left_alone(model: Model) -> None:
    rows = batches(8)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.bias.requires_grad_(False)
    fit_head(model, rows, HEAD, iterations=[2])
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.head.bias.grad is None and not model.head.bias.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.body.parameters())


def test_the_best_score_wins_and_of_equal_ones_the_fewest_iterations(model: Model) -> None:
    rows, held_out = batches(20), batches(30, 7, seed=2)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs: list[int] = []

    def score() -> float:
        model.counted.runs = 0
        with torch.no_grad():
            losses = [F.cross_entropy(model.eval()(x), y, reduction="sum") for x, y in held_out]
        runs.append(model.counted.runs)
        return -float(sum(losses))

    found = fit_head(model, rows, HEAD, iterations=[1, 2, 4, 60], score=score)
    assert list(found.scores) == [0, 1, 2, 4, 60]
    assert found.iterations == max(found.scores, key=found.scores.__getitem__)
    assert runs == [2, 0, 0, 0, 0]  # the body ran for the first one alone
    assert score() == found.scores[found.iterations]
    for count in (1, 60):  # each is the head after so many iterations
        model.load_state_dict(start)
        fit_head(model, rows, HEAD, iterations=[count])
        assert score() == pytest.approx(found.scores[count])

    model.load_state_dict(start)
    assert fit_head(model, rows, HEAD, iterations=[1, 2], score=lambda: 0.5).iterations == 0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in start.items())


def test_a_teacher_runs_once(model: Model) -> None:
    torch.manual_seed(1)
    teacher = Model().double()
    rows = batches(12, 12)

    def logits_fn(module: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = module(batch[0])
        return logits

    def divergence() -> float:
        with torch.no_grad():
            mine, theirs = (
                torch.cat([m.eval()(x) for x, _ in rows]).log_softmax(-1) for m in (model, teacher)
            )
        return float(F.kl_div(mine, theirs, reduction="batchmean", log_target=True))

    before = divergence()
    teacher.counted.runs = model.counted.runs = 0
    loss_fn = soft_targets(teacher, logits_fn)
    fit_head(model, rows, HEAD, iterations=[40], loss_fn=loss_fn, others=[teacher])
    assert (teacher.counted.runs, model.counted.runs) == (2, 2)
    assert divergence() < 0.5 * before


def test_what_cannot_be_fitted_is_refused(model: Model) -> None:
    rows = batches(8)
    with pytest.raises(ValueError, match=r"head.scale: no parameter of Model"):
        fit_head(model, rows, ["head.weight", "head.scale"])
    with pytest.raises(ValueError, match="head is empty: name the parameters of Model"):
        fit_head(model, rows, [])
    for counts in ([], [0, 1]):
        with pytest.raises(ValueError, match="numbers from 1 on"):
            fit_head(model, rows, HEAD, iterations=counts)
    with pytest.raises(ValueError, match="no rows to fit a head to"):
        fit_head(model, iter(()), HEAD)
    with pytest.raises(ValueError, match="loss of batch 0"):
        fit_head(model, rows, HEAD, loss_fn=lambda model, batch: torch.tensor(1.0))
    bad = [(rows[0][0] * float("nan"), rows[0][1])]
    start = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match="loss of batch 0 is nan"):
        fit_head(model, bad, HEAD)
    assert torch.equal(model.head.weight, start) and model.head.weight.grad is None

    def growing(model: nn.Module, batch: Batch) -> Tensor:  # nan once the head has moved
        moved = (model.head.weight - start).abs().sum()  # type: ignore[union-attr, operator]
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss if moved == 0 else loss * float("nan")

    with pytest.raises(ValueError, match="loss of batch 0 is nan"):
        fit_head(model, rows, HEAD, loss_fn=growing)
    assert torch.equal(model.head.weight, start)
    shuffled: Iterator[list[Batch]] = iter([batches(8, 8), batches(8, 8)[::-1]])

    def score() -> float:
        return float(sum(model(x).detach().sum() for x, _ in next(shuffled)))

    with pytest.raises(ValueError, match="let their loader not shuffle"):
        fit_head(model, rows, HEAD, iterations=[1], score=score)
    assert "forward" not in model.body.__dict__


def test_a_head_in_float16_is_refused(model: Model) -> None:
    model.head.half()
    start = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'head\.weight' is in float16.*module\.bfloat16\(\)"):
        fit_head(model, batches(8), HEAD)
    assert torch.equal(model.head.weight, start)


# -- replay ------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Something before, between and behind two trained layers, and an output of a class."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first = Counted(3, 3), nn.Linear(3, 3)
        self.between, self.second = Counted(3, 3), nn.Linear(3, 3)
        self.inner = nn.ModuleDict({"aside": Counted(3, 3), "last": nn.Linear(3, 3)})
        self.object = Holding(3, 3)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.between(self.first(self.before(x))))
        hidden = hidden + self.inner["last"](self.inner["aside"](x)) + self.object(x).value
        loss: Tensor = self.loss(hidden, torch.zeros(len(x), dtype=torch.long))
        return loss


@dataclass
class Held:
    """An output that nobody can look into."""

    value: Tensor


class Holding(Counted):
    def forward(self, x: Tensor) -> Any:
        return Held(super().forward(x))


def test_only_what_stays_the_same_is_replayed() -> None:
    torch.manual_seed(0)
    model = Layers()
    trained = [*model.first.parameters(), *model.second.parameters()]
    trained += [*model.inner["last"].parameters()]
    for parameter in set(model.parameters()) - set(trained):
        parameter.requires_grad_(False)
    counted: list[Any] = [model.before, model.between, model.inner["aside"], model.object]
    replay = Replay([model], trained)
    assert set(replay.parts) == set(counted)
    xs = torch.randn(2, 4, 3)
    with replay.recording() as tape:
        first = [model(x) for x in xs]
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(1.5)
    wanted = [model(x) for x in xs]
    for layer in counted:
        layer.runs = 0
    with replay.playing(tape):
        found = [model(x) for x in xs]
    assert [layer.runs for layer in counted] == [0, 2, 0, 2]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.equal(first[0], found[0])
    with torch.inference_mode(), replay.recording() as other:  # where no gradient tells
        model(xs[0])
    assert set(other) == set(tape) == {model.before, model.inner["aside"]}
    with replay.playing(tape), pytest.raises(ValueError, match="other inputs"):
        model(xs[1])
    with replay.playing(tape), pytest.raises(ValueError, match="other inputs"):
        for x in (*xs, xs[0]):
            model(x)
    assert not any("forward" in layer.__dict__ for layer in counted)


def test_a_part_that_reads_what_is_trained_without_gradient_is_not_replayed() -> None:
    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.target = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.head(self.body(x))
            with torch.no_grad():
                target = self.target(h)
            return h - target

    torch.manual_seed(0)
    model, x = Target(), torch.randn(4, 3)
    for part in (model.body, model.target):
        part.requires_grad_(False)
    replay = Replay([model], list(model.head.parameters()))
    with replay.recording() as tape:
        model(x)
    assert set(tape) == {model.body}
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    wanted = model(x)
    with replay.playing(tape):
        assert torch.equal(model(x), wanted)


def test_outputs_of_transformers_are_looked_into() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Counted(3, 3)

        def forward(self, x: Tensor) -> ModelOutput:
            return ModelOutput(last_hidden_state=self.layer(x), attentions=None)

    model = nn.ModuleDict({"body": Body(), "head": nn.Linear(3, 2)})
    for parameter in model["body"].parameters():
        parameter.requires_grad_(False)
    replay = Replay([model], model["head"].parameters())
    with replay.recording() as tape:
        model["body"](torch.ones(2, 3))
    assert set(tape) == {model["body"]}


def test_what_a_body_gives_may_be_changed_in_place(model: Model) -> None:
    def added(model: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(model.head(model.body(batch[0]) + 1), batch[1])

    def in_place(model: Any, batch: Batch) -> Tensor:
        hidden = model.body(batch[0])
        hidden += 1
        return F.cross_entropy(model.head(hidden), batch[1])

    rows, other = batches(16, 5), copy.deepcopy(model)
    wanted = fit_head(other, rows, HEAD, iterations=[10], loss_fn=added)
    found = fit_head(model, rows, HEAD, iterations=[10], loss_fn=in_place)
    assert found.losses == wanted.losses
    for name in HEAD:
        assert torch.equal(found.state[name], wanted.state[name])


def test_a_body_that_changes_its_input_in_place_runs_in_every_pass(model: Model) -> None:
    """What is behind it may read that input, too."""
    first = model.body

    def loss(model: Any, batch: Batch) -> Tensor:
        x = batch[0] - 0.5
        return F.cross_entropy(model.head(model.body(x) * x.mean()), batch[1])

    rows, losses = batches(16, 5), []
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        model.body = nn.Sequential(relu, first)
        other = copy.deepcopy(model)
        found = fit_head(other, rows, HEAD, iterations=[10], loss_fn=loss)
        with torch.no_grad():
            last = sum(float(loss(other.eval(), b)) * len(b[1]) for b in rows)
        assert found.losses[10] == pytest.approx(last / sum(len(b[1]) for b in rows))
        losses.append(found.losses[10])
    assert losses[0] != losses[1]


def test_another_order_within_a_batch_is_noticed(model: Model) -> None:
    """Integers have the same sum in any order."""
    model.body = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(18, 6)).double()
    ids, labels = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0], [1, 1, 1]]), torch.arange(4) % 3
    orders = iter([[0, 1, 2, 3], [0, 2, 1, 3]])

    def score() -> float:
        order = next(orders)
        with torch.no_grad():
            return -float(F.cross_entropy(model.eval()(ids[order]), labels[order]))

    with pytest.raises(ValueError, match="the batches must come in the same order each time"):
        fit_head(model, [(ids, labels)], HEAD, iterations=[2], score=score)


def test_a_body_with_two_names_is_replayed_once(model: Model) -> None:
    class Aliased(Model):
        def __init__(self, inner: Model) -> None:
            pl.LightningModule.__init__(self)
            self.net, self.backbone = inner, inner.body

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits

    rows, other = batches(8, 8, 5), Aliased(copy.deepcopy(model))
    fit_head(model, rows, HEAD, iterations=[5])
    fit_head(other, rows, [f"net.{name}" for name in HEAD], iterations=[5])
    assert torch.equal(other.net.head.weight, model.head.weight)
    assert torch.equal(other.net.head.bias, model.head.bias)
    assert other.net.counted.runs == 3


def test_a_fit_that_has_arrived_goes_no_further() -> None:
    """200 iterations are those of torch's L-BFGS, without the ones that change nothing."""
    torch.manual_seed(0)
    last = nn.Linear(5, 3)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), last).double()
    x, y = torch.randn(60, 6).double(), torch.randint(3, (60,))
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    calls, scored = 0, []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    def score() -> float:
        scored.append(1)
        return -float(nn.functional.cross_entropy(net(x), y))

    counts = (20, 100, 200, 500)
    head = ["2.weight", "2.bias"]
    found = fit_head(net, [(x, y)], head, iterations=counts, loss_fn=loss, score=score)
    stopped = calls
    assert stopped < 200 and len(scored) < 1 + len(counts)
    assert found.scores.keys() == {0, *counts} == found.losses.keys()
    assert found.losses[200] == found.losses[500] and found.scores[200] == found.scores[500]

    net.load_state_dict(start)
    found = fit_head(net, [(x, y)], head, iterations=[500], loss_fn=loss)
    net.load_state_dict(start)
    values = [last.weight, last.bias]
    optimizer = torch.optim.LBFGS(
        values, max_iter=1, max_eval=25, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(net(x), y)
        torch.autograd.backward(value)
        return value

    for _ in range(500):
        optimizer.step(closure)
    for name, value in zip(head, values, strict=True):
        torch.testing.assert_close(found.state[name], value.detach(), rtol=1e-9, atol=1e-9)
