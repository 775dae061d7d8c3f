"""Training steps that few write, against brute force; what is wrong of them is left out or said."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import MLP, Batch, vectors
from oracle import Expected, assert_close, distance, expected
from test_callback import UNEVEN, Module, fit, oracle
from test_capture import assert_equals
from test_training import Manual
from torch import Tensor, nn

from mats_lightning import MaTSStatsCallback, Statistics, load_statistics

DOUBLE: dict[str, Any] = {"precision": "64-true"}


def saved(trainer: L.Trainer, folder: Path) -> dict[str, Any]:
    """What a sidecar says that is written after the fit."""
    trainer.save_checkpoint(folder / "after.ckpt")
    return load_statistics(folder / "after.ckpt").info


def table(info: dict[str, Any]) -> dict[str, Any]:
    """parameter -> (statistics, reason)"""
    return {row["name"]: (row["statistics"], row["reason"]) for row in info["coverage"]}


def check_only(layer: str, found: Statistics, wanted: Expected) -> None:
    """The statistics of one layer are there and exact, the other's are not."""
    other = next(name for name in ("model.first", "model.second") if name != layer)
    assert not any(other in name for name in [*found.tensors, *found.inputs])
    for name in (f"{layer}.weight", f"{layer}.bias"):
        assert_close_to(found.diagonal_fisher[name], wanted.diagonal_fisher[name])
    a, g = found.kfac[layer]
    assert_close_to(a, wanted.gram[layer])
    assert_close_to(g, wanted.output[layer])


def assert_close_to(found: Tensor, wanted: Tensor) -> None:
    assert distance(found, wanted) < 1e-9


# -- several optimizers and losses -----------------------------------------------------------------


class Toggled(Manual):
    """An optimizer for each layer, which alone trains in its turn; one loss for both."""

    def __init__(self, model: nn.Module, first: int) -> None:
        super().__init__(model)
        self.first = first

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for turn in (self.first, 1 - self.first):
            self.toggle_optimizer(optimizers[turn])
            self.manual_backward(self.loss(batch))
            optimizers[turn].step()
            optimizers[turn].zero_grad()
            self.untoggle_optimizer(optimizers[turn])

    def configure_optimizers(self) -> Any:
        layers: Any = self.model
        return [torch.optim.SGD(x.parameters(), lr=0.0) for x in (layers.first, layers.second)]


@pytest.mark.filterwarnings("ignore:only the first manual_backward")
def test_what_does_not_train_in_the_captured_pass_has_no_statistics(tmp_path: Path) -> None:
    """The head's turn is first: no gradient comes to the layer before it."""
    module, callback = Toggled(MLP(), first=1), MaTSStatsCallback(loss_scale=1.0)
    with pytest.warns(UserWarning, match=r"first\.weight, .*first\.bias: it does not train in"):
        trainer = fit(module, vectors(UNEVEN), tmp_path, callback, **DOUBLE)
    check_only("model.second", callback.statistics, oracle(module, vectors(UNEVEN)))
    for name, (kinds, reason) in table(saved(trainer, tmp_path)).items():
        assert bool(kinds) == ("second" in name)
        assert ("toggle_optimizer" in reason) == ("first" in name)


@pytest.mark.filterwarnings("ignore:only the first manual_backward")
def test_a_gradient_goes_through_what_does_not_train(tmp_path: Path) -> None:
    module, callback = Toggled(MLP(), first=0), MaTSStatsCallback(loss_scale=1.0)
    fit(module, vectors(UNEVEN), tmp_path, callback, **DOUBLE)
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)), 1e-9, [])


class Looking(Module):
    """Its own prediction first, without a gradient."""

    def loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            self.model(batch)
        return super().loss(batch)


def test_a_pass_without_gradients_leaves_nothing_out(tmp_path: Path) -> None:
    module, callback = Looking(MLP()), MaTSStatsCallback()
    fit(module, vectors(UNEVEN), tmp_path, callback, **DOUBLE)
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)), 1e-9, [])


class ActorCritic(Manual):
    """The critic has a loss of its own, which is the second one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.critic = nn.Linear(6, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.manual_backward(self.critic(batch["x"]).square().mean())


@pytest.mark.parametrize("kinds", [("diagonal_fisher", "kfac", "block_fisher"), ("gram",)])
def test_what_only_the_second_loss_has_is_left_out(kinds: Any, tmp_path: Path) -> None:
    module = ActorCritic(MLP())
    callback = MaTSStatsCallback(last_n_epochs=2, statistics=kinds, loss_scale=1.0)
    critic = r"critic\.weight(, critic\.bias)?: it is not in the first manual_backward"
    with pytest.warns(UserWarning, match=critic):
        trainer = fit(module, vectors(UNEVEN), tmp_path, callback, max_epochs=2, **DOUBLE)
    found = callback.statistics
    assert not any("critic" in name for name in [*found.tensors, *found.inputs])
    wanted = oracle(module, 2 * vectors(UNEVEN))
    for layer in ("model.first", "model.second"):
        assert_close_to(found.gram[layer], wanted.gram[layer])
    if "kfac" in kinds:
        check_all = {n: d for n, d in wanted.diagonal_fisher.items() if "critic" not in n}
        assert_close(found.diagonal_fisher, check_all, 1e-9)
    rows = table(saved(trainer, tmp_path))
    assert rows["critic.weight"][0] == [] and "first manual_backward" in rows["critic.weight"][1]
    assert rows["model.first.weight"][0] == [k for k in kinds if k != "block_fisher"]


# -- what backward is called with ------------------------------------------------------------------


class Multiplying(Module):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (4 * loss).backward()


class Gradient(Manual):
    """Another factor in each batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch), gradient=torch.tensor(3.0 + batch_idx))


@pytest.mark.parametrize("way", [Multiplying, Gradient])
def test_a_factor_of_the_backward_pass_does_not_count(
    way: Callable[[nn.Module], Module], tmp_path: Path
) -> None:
    module, callback = way(MLP()), MaTSStatsCallback(loss_scale=1.0)
    fit(module, vectors(UNEVEN), tmp_path, callback, accumulate_grad_batches=1, **DOUBLE)
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)), 1e-9, [])


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_a_loss_that_does_not_count_is_left_out(factor: float, tmp_path: Path) -> None:
    class Sometimes(Gradient):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            gradient = torch.tensor(1.0 if batch_idx else factor)
            self.manual_backward(self.loss(batch), gradient=gradient)

    module, callback = Sometimes(MLP()), MaTSStatsCallback(loss_scale=1.0)
    trainer = fit(module, vectors(UNEVEN), tmp_path, callback, **DOUBLE)
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)[1:]), 1e-9, [])
    assert saved(trainer, tmp_path)["skipped_batches"] == 1


def test_losses_that_are_weighted_by_their_gradient_are_refused(tmp_path: Path) -> None:
    class Weighted(Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            losses = self.model(batch)
            self.manual_backward(losses, gradient=torch.linspace(0, 1, len(losses)).to(losses))

    with pytest.raises(MisconfigurationException, match="is given 4 losses at once"):
        fit(Weighted(MLP()), vectors(), tmp_path, MaTSStatsCallback(loss_scale=1.0), **DOUBLE)


# -- layers that come and go -----------------------------------------------------------------------


class Teacher(Module):
    """A frozen copy of the last layer, made in a batch that is captured: it has its hooks, too."""

    def loss(self, batch: Batch) -> Tensor:
        model: Any = self.model
        copied = copy.deepcopy(model.second).requires_grad_(False)
        h = torch.relu(model.first(batch["x"]))
        loss: Tensor = super().loss(batch) + copied(h.flip(1)).square().sum(1).mean()
        return loss

    def examples(self, batch: Batch) -> Tensor:
        model: Any = self.model
        weight, bias = model.second.weight.detach(), model.second.bias.detach()
        h = torch.relu(model.first(batch["x"])).flip(1)
        losses: Tensor = model(batch) + (h @ weight.T + bias).square().sum(1)
        return losses


def test_a_copy_of_a_layer_is_not_the_layer(tmp_path: Path) -> None:
    module, callback = Teacher(MLP()), MaTSStatsCallback()
    fit(module, vectors(UNEVEN), tmp_path, callback, **DOUBLE)
    wanted = expected(module.examples, vectors(UNEVEN), root=module)
    assert_equals(callback.statistics, wanted, 1e-9, [])


class Replacing(L.Callback):
    """The last layer by another one before this epoch; with new parameters, or the old ones."""

    def __init__(self, epoch: int, keep: bool = False) -> None:
        self.epoch, self.keep = epoch, keep

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch != self.epoch:
            return
        torch.manual_seed(1)
        model: Any = pl_module.model
        old, model.second = model.second, nn.Linear(5, 3).to(model.second.weight)
        if self.keep:
            model.second.weight, model.second.bias = old.weight, old.bias


@pytest.mark.parametrize("keep", [False, True])
def test_a_layer_that_is_replaced_before_the_first_batch(keep: bool, tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback()
    fit(module, vectors(UNEVEN), tmp_path, Replacing(0, keep), callback, **DOUBLE)
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)), 1e-9, [])
    assert load_statistics(next(tmp_path.rglob("*.ckpt"))).info["notes"] == []


def test_a_layer_that_is_replaced_in_the_window(tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback(last_n_epochs=2)
    with pytest.warns(UserWarning, match="or their layers, have changed in epoch 1"):
        fit(module, vectors(), tmp_path, Replacing(1), callback, max_epochs=2, **DOUBLE)
    assert_equals(callback.statistics, oracle(module, vectors()), 1e-9, [])


def test_a_teacher_that_is_copied_in_each_step_restarts_nothing(tmp_path: Path) -> None:
    class Following(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
            return self.loss(batch)

        def on_train_end(self) -> None:
            del self.teacher  # which has copies of hooks

    module, callback = Following(MLP()), MaTSStatsCallback()
    fit(module, vectors(UNEVEN), tmp_path, callback, **DOUBLE)
    root = nn.Module()
    root.model = module.model
    wanted = expected(root.model, vectors(UNEVEN), root=root)
    assert_equals(callback.statistics, wanted, 1e-9, [])
    assert load_statistics(next(tmp_path.rglob("*.ckpt"))).info["notes"] == []


def test_a_use_that_begins_in_a_later_epoch_is_named(tmp_path: Path) -> None:
    class Later(Module):
        def loss(self, batch: Batch) -> Tensor:
            loss = super().loss(batch)
            model: Any = self.model
            return loss + model.second.weight.square().sum() if self.current_epoch else loss

    module, callback = Later(MLP()), MaTSStatsCallback(last_n_epochs=2)
    with pytest.warns(UserWarning, match=r"second\.weight: its gradient is not the sum"):
        fit(module, vectors(UNEVEN), tmp_path, callback, max_epochs=2, **DOUBLE)
    found, wanted = callback.statistics, oracle(module, 2 * vectors(UNEVEN))
    assert list(found.kfac) == ["model.first"]
    assert "model.second.weight" not in found.diagonal_fisher
    for name, diagonal in found.diagonal_fisher.items():
        assert_close_to(diagonal, wanted.diagonal_fisher[name])


def test_a_checkpoint_in_the_middle_of_an_epoch_of_the_window_says_so(tmp_path: Path) -> None:
    every = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    fit(Module(MLP()), vectors(), tmp_path, every, MaTSStatsCallback(), max_epochs=2, **DOUBLE)
    found = map(load_statistics, tmp_path.rglob("epoch=1*.ckpt"))
    assert {each.info["global_step"]: each.info["notes"] for each in found} == {
        4: ["epoch 1 had not ended, 4 rows of it count"],
        5: ["epoch 1 had not ended, 8 rows of it count"],
        6: [],
    }


def test_an_epoch_of_fewer_batches_than_its_loader_says_has_ended(tmp_path: Path) -> None:
    class Guessed:
        def __len__(self) -> int:
            return len(vectors()) + 1

        def __iter__(self) -> Iterator[Batch]:
            return iter(vectors())

    trainer = fit(Module(MLP()), Guessed(), tmp_path, MaTSStatsCallback(), **DOUBLE)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    paths = list(tmp_path.rglob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        found = load_statistics(path)
        assert found.info["notes"] == []
        assert found.examples == sum(len(b["labels"]) for b in vectors())
