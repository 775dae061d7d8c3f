"""Training of what tasks share: against a model that really shares it, and what it leaves alone."""

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from test_module import SHARED, Suite, make_trainer, rows, suite
from test_refresh import assert_same, differ, logits_of, merged, refreshed, taking
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from mats_lightning import RefreshPlan, Task, refresh
from mats_lightning.joint_training import train_together
from mats_lightning.judge import Judge
from mats_lightning.task_rounds import TaskRounds

__all__ = ["suite"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

D = 4
Rows = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


CLASSES = {"a": 3, "b": 2}
HEAD = ("head.weight", "head.bias")


def nets() -> dict[str, Net]:
    torch.manual_seed(0)
    return {task: Net(classes).double() for task, classes in CLASSES.items()}


def data() -> dict[str, list[Rows]]:
    draw = torch.Generator().manual_seed(1)
    sizes = {"a": (6, 6, 2), "b": (5, 3)}
    return {
        task: [
            (
                torch.randn(n, D, generator=draw, dtype=torch.float64),
                torch.randint(CLASSES[task], (n,), generator=draw),
            )
            for n in sizes[task]
        ]
        for task in CLASSES
    }


def start_of(net: Net) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in net.body.state_dict(prefix="body.").items()}


def train(modules: dict[str, Net], **options: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """The result, and which batch of which task came when."""
    came: list[Any] = []

    def losses(task: str) -> Callable[[nn.Module, Any], Tensor]:
        def loss(module: nn.Module, batch: Rows) -> Tensor:
            came.append((task, batch))
            return F.cross_entropy(module(batch[0]), batch[1])

        return loss

    defaults: dict[str, Any] = {
        "shared": start_of(modules["a"]),
        "batches": data(),
        "heads": dict.fromkeys(modules, HEAD),
        "loss_fns": {task: losses(task) for task in modules},
        "weights": dict.fromkeys(modules, 1.0),
        "epochs": 3,
        "learning_rate": 0.05,
        "device": torch.device("cpu"),
        "progress": False,
    }
    return train_together(modules, **(defaults | options)), came


def test_a_task_of_weight_0_has_no_part() -> None:
    modules = nets()
    found, came = train(modules, weights={"a": 2.0, "b": 0.0})
    expected, _ = train({"a": modules["a"]})
    torch.testing.assert_close(found, expected)
    assert {task for task, _ in came} == {"a"}


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}])
@pytest.mark.parametrize("heads", [True, False])
def test_it_is_the_training_of_one_model_with_two_heads(
    heads: bool, weights: dict[str, float]
) -> None:
    modules = nets()
    chosen: dict[str, Any] = {"heads": dict.fromkeys(modules, HEAD if heads else ())}
    found, came = train(modules, weights=weights, **chosen)

    body = copy.deepcopy(modules["a"].body).eval()
    own = {task: copy.deepcopy(net.head).requires_grad_(heads) for task, net in modules.items()}
    parameters = [*body.parameters(), *(p for head in own.values() for p in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step, (task, (x, y)) in enumerate(came):
        share = min((step + 1) / len(came) * 10, 1 - step / len(came))
        optimizer.param_groups[0]["lr"] = 0.05 * share
        weight = weights[task] * 2 / sum(weights.values())
        (F.cross_entropy(own[task](body(x)), y) * weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in body.state_dict(prefix="body.").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)
    assert list(found) == list(start_of(modules["a"]))


def test_each_batch_comes_once_an_epoch_in_an_order_of_the_seeds() -> None:
    orders = []
    for seed in (0, 0, 1):
        _, came = train(nets(), seed=seed)
        tasks = [task for task, _ in came]
        for epoch in range(3):
            assert sorted(tasks[epoch * 5 : epoch * 5 + 5]) == ["a", "a", "a", "b", "b"]
        sizes = [len(y) for task, (_, y) in came if task == "a"]
        assert sizes == [6, 6, 2] * 3
        orders.append(tasks)
    assert orders[0] == orders[1] != orders[2]


def test_modules_are_afterwards_what_they_were() -> None:
    modules = nets()
    modules["b"].body[0].bias.requires_grad_(False)
    before = {task: copy.deepcopy(net) for task, net in modules.items()}
    tensors = {task: list(net.parameters()) for task, net in modules.items()}
    found, _ = train(modules)
    for task, net in modules.items():
        assert_same(dict(net.state_dict()), dict(before[task].state_dict()))
        assert all(p is q for p, q in zip(net.parameters(), tensors[task], strict=True))
        assert all(p.grad is None for p in net.parameters()) and net.training
        flags = [p.requires_grad for p in net.parameters()]
        assert flags == [p.requires_grad for p in before[task].parameters()]
    start = start_of(before["a"])
    assert differ(found, start)
    buffers = [name for name in start if "running" in name or "num_batches" in name]
    assert len(buffers) == 3 and all(torch.equal(found[name], start[name]) for name in buffers)


def test_they_are_so_after_an_error_too() -> None:
    modules = nets()
    before = {task: copy.deepcopy(net) for task, net in modules.items()}
    rows = data()
    rows["b"][1] = (rows["b"][1][0] * float("nan"), rows["b"][1][1])
    with pytest.raises(ValueError, match="the loss of batch"):
        train(modules, batches=rows)
    for task, net in modules.items():
        assert_same(dict(net.state_dict()), dict(before[task].state_dict()))
        assert net.training and all(p.requires_grad for p in net.parameters())


def test_what_is_frozen_in_all_modules_stays() -> None:
    modules = nets()
    for net in modules.values():
        net.body[0].requires_grad_(False)
    found, _ = train(modules)
    start = start_of(modules["a"])
    assert torch.equal(found["body.0.weight"], start["body.0.weight"])
    assert not torch.equal(found["body.1.weight"], start["body.1.weight"])


def test_what_cannot_be_trained_is_said() -> None:
    with pytest.raises(ValueError, match=r"the batches of task .b. are empty"):
        train(nets(), batches=data() | {"b": iter([])})
    modules = nets()
    half = {n: t.bfloat16() for n, t in start_of(modules["a"]).items()}
    with pytest.raises(
        ValueError, match=r"'body\.0\.weight' is in torch.bfloat16, .* module\.float\(\)"
    ):
        train(modules, shared=half)


# -- parameters of all kinds ---------------------------------------------------------------------


class Turned(nn.Module):
    """Its weight's gradient lies in memory otherwise than the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, D, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,hdk->nhk", x, self.weight).tanh().flatten(1)


def test_gradients_may_lie_in_memory_as_they_like() -> None:
    torch.manual_seed(0)
    modules: dict[str, Any] = {
        task: nn.Sequential(OrderedDict(body=Turned(), head=nn.Linear(6, n).double()))
        for task, n in CLASSES.items()
    }
    x, y = data()["a"][0]
    loss = F.cross_entropy(modules["a"](x), y)
    weight = modules["a"].body.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.stride() != weight.stride()  # what this test is for
    start = {"body.weight": weight.detach().clone()}
    found, came = train(modules, shared=start)
    body = copy.deepcopy(modules["a"].body)
    body.weight.data = start["body.weight"].clone()
    own = {task: copy.deepcopy(net.head) for task, net in modules.items()}
    parameters = [body.weight, *(p for head in own.values() for p in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step, (task, (x, y)) in enumerate(came):
        optimizer.param_groups[0]["lr"] = 0.05 * min(
            (step + 1) / len(came) * 10, 1 - step / len(came)
        )
        F.cross_entropy(own[task](body(x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(found["body.weight"], body.weight.detach(), rtol=1e-9, atol=1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.again = nn.Linear(D, D)
        self.again.weight = self.body.weight
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.again(self.body(x).tanh()))
        return logits


@pytest.mark.parametrize("kept", [(), ("body.weight",), ("again.weight",)])
def test_tied_parameters_train_as_one(kept: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    modules: Any = {task: Tied().double() for task in CLASSES}
    state = modules["a"].state_dict()
    start = {n: t.detach().clone() for n, t in state.items() if not n.startswith("head")}
    found, _ = train(modules, shared=start, kept=kept)
    assert torch.equal(found["body.weight"], found["again.weight"])
    assert torch.equal(found["body.weight"], start["body.weight"]) == bool(kept)
    assert not torch.equal(found["body.bias"], start["body.bias"])
    assert list(found) == list(start)


def test_where_nothing_trains_it_is_said() -> None:
    modules = nets()
    for net in modules.values():
        net.requires_grad_(False)
        net.get_submodule("head").requires_grad_()  # what comes of it is dropped
    with pytest.raises(ValueError, match="nothing trains of what the tasks share: all of it is fr"):
        train(modules, loss_fns=dict.fromkeys(modules))


def test_loaders_without_a_length() -> None:
    class Stream(IterableDataset[Rows]):
        def __init__(self, rows: list[Rows]) -> None:
            self.rows = rows

        def __iter__(self) -> Iterator[Rows]:
            return iter(self.rows)

    rows = data()
    streams = {task: DataLoader(Stream(own), batch_size=None) for task, own in rows.items()}
    found, came = train(nets(), batches=streams)
    wanted, _ = train(nets())
    assert_same(found, wanted)
    assert len(came) == 3 * sum(map(len, rows.values()))


def test_modules_are_put_back_where_they_could_not_be_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = nets()
    before = {task: [p.data_ptr() for p in net.parameters()] for task, net in modules.items()}

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(modules["b"], "to", full)
    with pytest.raises(MemoryError):
        train(modules)
    for task, net in modules.items():
        assert [p.data_ptr() for p in net.parameters()] == before[task]
        assert all(p.requires_grad for p in net.parameters())


# -- as a round of a refresh -------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["data", "teacher"])
def test_a_round_by_training(suite: Suite, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = merged(suite, "log", "dict", weights={"log": 1.0, "dict": 2.0})
    module.merge()
    start = module.shared_state()
    taking(monkeypatch, 0.5, 0.6)
    options: dict[str, Any] = {"labels": labels, "epochs": 3, "learning_rate": 0.01, "rows": 20}
    (_, done) = refreshed(module, by="training", logits_fn=logits_of, **options)
    found = module.shared_state()
    assert list(found) == list(SHARED) and differ(found, start)
    assert set(done.seconds) == {"training", "heads", "validation"}
    assert done.taken and module.refreshed["by"] == "training"


def test_training_brings_the_loss_down_and_half_of_it_is_tried(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(module: Any) -> float:
        total = 0.0
        for task in module.tasks:
            x, y = rows(task, "train").tensors
            with torch.no_grad():
                total += float(F.cross_entropy(module.model(task)(x), y))
        return total

    module = merged(suite)
    module.merge()
    before, start = loss(module), module.shared_state()
    seen = taking(monkeypatch, 0.5, 0.4, 0.6)
    options: dict[str, Any] = {"epochs": 5, "learning_rate": 0.01, "rows": 48}
    rounds = refreshed(module, by="training", **options)
    assert rounds[1].step == 0.5
    assert loss(module) < before
    moved = [after["body.0.weight"] - start["body.0.weight"] for after in seen[1:]]
    torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-4, atol=1e-6)


def test_what_is_kept_does_not_train(suite: Suite) -> None:
    module = merged(suite)
    module.merge()
    start = module.shared_state()
    options: dict[str, Any] = {"judge": "loss", "learning_rate": 0.01, "kept": ("body.0",)}
    rounds = refreshed(module, by="training", **options)
    assert rounds[1].taken
    found = module.shared_state()
    for name in start:
        assert torch.equal(found[name], start[name]) == name.startswith("body.0"), name


def test_heads_are_fitted_to_what_was_trained(suite: Suite) -> None:
    module = merged(suite)
    plan = RefreshPlan(judge="score", epochs=3, learning_rate=0.01, rows=48)
    rounds = refresh(module, plan, trainer=make_trainer(), logits_fn=logits_of, progress=False)
    assert set(rounds[1].heads) == set(module.tasks)
    assert rounds[1].average >= rounds[0].average


def test_own_models_are_made_one_at_a_time(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all for batches that they have seen."""
    made: WeakSet[Any] = WeakSet()
    at_once, together = [], []
    before, train = TaskRounds._teacher, train_together

    def teacher(self: TaskRounds, task: Task) -> nn.Module:
        found = before(self, task)
        made.add(found)
        gc.collect()
        at_once.append(len(made))
        return found

    def trained(*args: Any, **options: Any) -> Any:
        count = len(at_once)
        result = train(*args, **options)
        together.append(len(at_once) - count)
        return result

    monkeypatch.setattr(TaskRounds, "_teacher", teacher)
    monkeypatch.setattr("mats_lightning.task_rounds.train_together", trained)
    plan = RefreshPlan(rounds=2, heads=(1, 2), rows=48)
    refresh(merged(suite), plan, trainer=make_trainer(), logits_fn=logits_of, progress=False)
    assert max(at_once) == 1 and together == [0, 0]


# -- losses that judge -------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["data", "teacher"])
@pytest.mark.parametrize("limit", [None, 1, 0.5])
def test_losses_are_of_validation_rows(suite: Suite, labels: str, limit: float | None) -> None:
    """Each counts once: those of a last batch, which is smaller, too."""
    size = 8
    module = merged(suite)
    options: dict[str, Any] = {"labels": labels, "epochs": 3, "learning_rate": 0.01}
    plan = RefreshPlan(heads=(), **options)
    trainer = make_trainer() if limit is None else make_trainer(limit_val_batches=limit)
    rounds = refresh(module, plan, trainer=trainer, logits_fn=logits_of, progress=False)
    assert rounds[1].taken
    for task in module.tasks.values():
        x, y = rows(task.name, "validate").tensors
        assert size < len(x) < 2 * size  # two batches
        count = {None: len(x), 1: size, 0.5: size}[limit]
        x, y = x[:count], y[:count]
        teacher = copy.deepcopy(task.module)
        teacher.load_state_dict(torch.load(suite.checkpoint(task.name))["state_dict"])
        with torch.no_grad():
            target = teacher.eval()(x).softmax(-1) if labels == "teacher" else y
            wanted = float(F.cross_entropy(module.model(task.name).eval()(x), target))
        assert rounds[1].losses[task.name] == pytest.approx(wanted, rel=1e-5), task.name


@pytest.mark.parametrize("way", ["training", "solving"])
def test_losses_judge_in_place_of_scores(
    suite: Suite, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the scores do; and a round that is taken back keeps the loss before it."""

    def giving(*averages: float) -> None:
        left = [average + apart for average in averages for apart in (-0.3, 0.3, 0.0, 0.0, 0.0)]
        monkeypatch.setattr(Judge, "_loss", lambda *arguments: left.pop(0))

    options: dict[str, Any] = {"by": way, "judge": "loss", "rows": 48, "folder": tmp_path}
    giving(1.0, 1.5, 0.9)
    rounds = refreshed(merged(suite), **options)
    assert [done.step for done in rounds] == [0.0, 0.5] and list(rounds[1].tried) == ["1.0", "0.5"]
    assert sum(rounds[1].losses.values()) == pytest.approx(0.9 * len(rounds[1].losses))
    giving(1.1, 1.2, 0.90001)
    (*_, back) = rounds = refreshed(merged(suite), **options | {"rounds": 3})
    assert len(rounds) == 3 and not back.taken
    assert back.losses == rounds[1].losses and back.scores == rounds[1].scores
    with pytest.raises(ValueError, match=r"a refresh with judge='loss', and this one has 'score'"):
        refreshed(merged(suite), **options | {"judge": "score"})
