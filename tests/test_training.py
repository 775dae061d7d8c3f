"""Every way in which people train, against brute force; what is captured of a run; refusals."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import MLP, Batch, Transformer, texts, vectors
from oracle import Expected, expected
from test_callback import (
    QUIET,
    UNEVEN,
    Adam,
    Module,
    all_hooks,
    fit,
    half_precision,
    in_single,
    largest_distance,
    loader,
    oracle,
)
from test_capture import assert_equals, hooks
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mats_lightning import MaTSStatsCallback, load_statistics
from mats_lightning.batch_sums import Input

# -- ways of training --------------------------------------------------------------------------


class Fused(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.0, fused=True)


class Closures(Module):
    """The optimizer runs the training step several times a batch."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.0, max_iter=3, tolerance_grad=0.0)


class Halved(Module):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) / 2


class Weighted(Module):
    """A loss that is weighted batch by batch."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * len(batch["labels"]) ** 2


class Manual(Module):
    """Two batches to a step of the optimizer; what is logged of the loss does not matter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Rival(Manual):
    """Two optimizers, each with a loss of its own."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        first, second = optimizers
        for optimizer, loss in (
            (first, lambda: self.loss(batch)),
            (second, lambda: self.model(batch).square().mean()),
        ):
            self.manual_backward(loss())
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.0) for _ in range(2)]


class Unsized(IterableDataset[Batch]):
    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches


def unsized(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(Unsized(batches), batch_size=None)


def every(batches: list[Batch]) -> list[Batch]:
    return batches


@dataclass
class Way:
    """`counted`: the batches that the statistics are of; UNEVEN has five."""

    options: dict[str, Any] = field(default_factory=dict)
    module: Callable[[nn.Module], Module] = Module
    checkpointing: str | None = None
    data: Callable[[list[Batch]], Any] = every
    counted: Callable[[list[Batch]], list[Batch]] = every
    callback: dict[str, Any] = field(default_factory=dict)
    others: Callable[[], list[L.Callback]] = list
    notes: list[str] = field(default_factory=list)


WAYS: dict[str, Way] = {
    "fused optimizer": Way(module=Fused),
    "closures": Way(module=Closures),
    "re-entrant checkpointing": Way({"accumulate_grad_batches": 2}, checkpointing="reentrant"),
    "checkpointing": Way({"accumulate_grad_batches": 2}, checkpointing="non-reentrant"),
    "iterable data set": Way({"accumulate_grad_batches": 2}, data=unsized),
    "limited": Way({"limit_train_batches": 3}, counted=lambda b: b[:3]),
    "limited to a part": Way({"limit_train_batches": 0.4}, counted=lambda b: b[:2]),
    "limited, accumulated": Way(
        {"limit_train_batches": 3, "accumulate_grad_batches": 2}, counted=lambda b: b[:3]
    ),
    "max_steps in mid-epoch": Way(
        {"max_steps": 8, "max_epochs": None},
        counted=lambda b: b[:3],
        notes=["epoch 1 had not ended, 12 rows of it count"],
    ),
    "max_steps over epochs": Way(
        {"max_steps": 8, "max_epochs": None},
        counted=lambda b: b + b[:3],
        callback={"last_n_epochs": 2},
        notes=["epoch 1 had not ended, 12 rows of it count"],
    ),
    "max_steps at an epoch's end": Way(
        {"max_steps": 10, "max_epochs": None},
    ),
    "early stopping": Way(
        {"max_epochs": 9}, others=lambda: [EarlyStopping("val_loss", patience=1)]
    ),
    "accumulation that changes": Way(
        {"max_epochs": 2},
        counted=lambda b: b + b,
        callback={"last_n_epochs": 2},
        others=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})],
    ),
    "a scaled loss": Way(module=Halved, callback={"loss_scale": 0.5}),
    "a loss scaled by batch": Way(
        {"accumulate_grad_batches": 2},
        module=Weighted,
        callback={"loss_scale": lambda batch: len(batch["labels"]) ** 2},
    ),
    "manual": Way(module=Manual, callback={"loss_scale": 0.5}),
    "manual, checkpointing": Way(
        module=Manual, checkpointing="non-reentrant", callback={"loss_scale": 0.5}
    ),
    "every second batch": Way(callback={"every_n_batches": 2}, counted=lambda b: b[::2]),
    "every third batch, accumulated": Way(
        {"accumulate_grad_batches": 2},
        callback={"every_n_batches": 3},
        counted=lambda b: b[::3],
    ),
    "some examples": Way(callback={"max_examples": 9}, counted=lambda b: b[:3]),
    "exactly these examples": Way(callback={"max_examples": 8}, counted=lambda b: b[:2]),
    "some examples of every second batch, in two epochs": Way(
        {"max_epochs": 3},
        callback={"every_n_batches": 2, "max_examples": 5, "last_n_epochs": 2},
        counted=lambda b: 2 * [b[0], b[2]],
    ),
    "some examples, rolling": Way(
        {"max_epochs": 3, "max_steps": 15},
        callback={"max_examples": 1, "last_n_epochs": 2},
        counted=lambda b: 2 * b[:1],
    ),
}


def plain(module: Module) -> nn.Module:
    """The same weights, uncompiled and without checkpointing, for the oracle."""
    copy = nn.Module()
    copy.model = Transformer().double()
    copy.load_state_dict({k.replace("._orig_mod", ""): t for k, t in module.state_dict().items()})
    return copy


def oracle_of(module: Module, batches: list[Batch]) -> Expected:
    root = plain(module)
    return expected(root.model, batches, root=root)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WAYS)
def test_statistics_are_exact(name: str, tmp_path: Path) -> None:
    way, batches = WAYS[name], texts(UNEVEN)
    module = way.module(Transformer(way.checkpointing))
    callback = MaTSStatsCallback(**way.callback)
    data, validate = way.data(batches), texts(seed=9)
    options: dict[str, Any] = {"precision": "64-true", "validate": validate, **way.options}
    fit(module, data, tmp_path, callback, *way.others(), **options)
    wanted = oracle_of(module, way.counted(batches))
    assert_equals(callback.statistics, wanted, 1e-9, [])
    newest = max(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    info = load_statistics(newest).info
    assert info["notes"] == way.notes
    assert info["every_n_batches"] == way.callback.get("every_n_batches", 1)
    assert info["max_examples"] == way.callback.get("max_examples")


@pytest.mark.parametrize("module", [Fused, Manual])
def test_a_gradient_scaler_with(module: Callable[[nn.Module], Module], tmp_path: Path) -> None:
    """A fused optimizer divides by the scale within its step; with manual steps it changes."""
    made, batches = module(MLP()), in_single(vectors(UNEVEN))
    callback = MaTSStatsCallback(loss_scale=0.5 if module is Manual else 1.0)
    plugin = half_precision()
    assert plugin.scaler is not None
    plugin.scaler.set_growth_interval(1)  # another scale in every step
    fit(made, batches, tmp_path, callback, plugins=[plugin])
    assert plugin.scaler.get_scale() >= 2.0**12
    assert largest_distance(callback.statistics, oracle(made, batches)) < 0.005
    assert callback.statistics.examples == sum(UNEVEN)


# -- torch.compile -----------------------------------------------------------------------------


def whole(module: Module, backend: str) -> Any:
    return torch.compile(module, backend=backend)


def part(module: Module, backend: str) -> Any:
    module.model = torch.compile(module.model, backend=backend)  # type: ignore[assignment]
    return module


def in_place(module: Module, backend: str) -> Any:
    module.model.compile(backend=backend)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "backend"), [(whole, "aot_eager"), (part, "eager"), (in_place, "eager")]
)
def test_statistics_of_a_compiled_model(
    compiled: Callable[[Module, str], Any], backend: str, tmp_path: Path
) -> None:
    """Compiled in epoch 0, which is not captured; in epoch 1 the hooks come and go."""
    torch._dynamo.reset()
    batches = texts((4, 4, 4))
    module = Module(Transformer()).double()
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 2}
    callback = MaTSStatsCallback(every_n_batches=2)
    fit(compiled(module, backend), batches, tmp_path, callback, **options)
    assert callback.statistics.examples == 8
    assert_equals(callback.statistics, oracle_of(module, batches[::2]), 1e-9, [])
    assert load_statistics(next(tmp_path.rglob("*.ckpt"))).info["notes"] == []
    assert torch._dynamo.eval_frame._stance.stance == "default"


# -- manual optimization -----------------------------------------------------------------------


def test_manual_optimization_without_a_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"pass loss_scale=1.0 if by nothing"):
        fit(Manual(MLP()), vectors(), tmp_path, MaTSStatsCallback())


def test_a_scale_that_cannot_be_is_refused(tmp_path: Path) -> None:
    callback = MaTSStatsCallback(loss_scale=lambda batch: 0.0)
    with pytest.raises(MisconfigurationException, match=r"loss_scale=0.0; it must be a positive"):
        fit(Manual(MLP()), in_single(vectors()), tmp_path, callback)


def test_the_first_of_several_losses_counts(tmp_path: Path) -> None:
    module, callback = Rival(MLP()), MaTSStatsCallback(loss_scale=1.0)
    with pytest.warns(UserWarning, match="only the first manual_backward of a batch is captured"):
        fit(module, vectors(UNEVEN), tmp_path, callback, precision="64-true")
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)), 1e-9, [])
    (note,) = load_statistics(next(tmp_path.rglob("*.ckpt"))).info["notes"]
    assert note.startswith("only the first manual_backward")


def test_a_batch_without_manual_backward_is_noted(tmp_path: Path) -> None:
    class Direct(Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.manual_backward(loss) if batch_idx == 1 else loss.backward()

    module, callback = Direct(MLP()), MaTSStatsCallback(loss_scale=1.0)
    with pytest.warns(UserWarning, match="a batch without a manual_backward is not counted"):
        fit(module, vectors(UNEVEN), tmp_path, callback, precision="64-true")
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)[1:2]), 1e-9, [])


# -- batches that are not captured ----------------------------------------------------------------


class Profiled(Module):
    """Counts the package's functions that run within forward and backward, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[int] = []
        self.registered: list[int] = []

    def count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and "/mats_lightning/" in frame.f_code.co_filename:
            self.calls[-1] += 1

    def loss(self, batch: Batch) -> Tensor:
        self.calls.append(0)
        self.registered.append(all_hooks(self))
        sys.setprofile(self.count)
        try:
            return super().loss(batch)
        finally:
            sys.setprofile(None)

    def backward(self, loss: Tensor) -> None:
        sys.setprofile(self.count)
        try:
            super().backward(loss)
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize(
    ("arguments", "captured"),
    [
        ({}, [True] * 5),
        ({"every_n_batches": 2}, [True, False, True, False, True]),
        ({"every_n_batches": 9}, [True, False, False, False, False]),
        ({"max_examples": 8}, [True, True, False, False, False]),
    ],
)
def test_nothing_runs_in_batches_that_are_not_captured(
    arguments: dict[str, Any], captured: list[bool], tmp_path: Path
) -> None:
    seen: list[int] = []

    def size(batch: Batch) -> int:
        seen.append(len(batch["labels"]))
        return seen[-1]

    module = Profiled(MLP())
    callback = MaTSStatsCallback(batch_size_fn=size, **arguments)
    fit(module, vectors(UNEVEN), tmp_path, callback, max_epochs=2, precision="64-true")
    outside = [False] * 5 + captured
    assert [calls > 0 for calls in module.calls] == outside
    assert [count > 0 for count in module.registered] == outside
    assert len(seen) == 1 + sum(captured)  # the fit's first batch shows whether it can be called


def test_hooks_come_off_when_the_module_ends_the_epoch(tmp_path: Path) -> None:
    class Ending(Module):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

        def on_train_epoch_end(self) -> None:
            assert hooks(self) == 0

    module, callback = Ending(MLP()), MaTSStatsCallback()
    fit(module, vectors(UNEVEN), tmp_path, callback, precision="64-true")
    assert_equals(callback.statistics, oracle(module, vectors(UNEVEN)[:1]), 1e-9, [])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_memory_does_not_grow(precision: Any, tmp_path: Path) -> None:
    tensors: list[int] = []

    class Counting(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            gc.collect()
            objects = gc.get_objects()
            assert not [x for x in objects if type(x) is Input]
            tensors.append(sum(issubclass(type(x), Tensor) for x in objects))

    batches = [in_single(texts())[0]] * 8
    options = (
        {"plugins": [half_precision()]} if precision == "16-mixed" else {"precision": precision}
    )
    module = Adam(Transformer("non-reentrant"))
    gc.freeze()  # what is there already is not looked at, which would take a second a batch
    try:
        fit(module, batches, tmp_path, MaTSStatsCallback(), Counting(), max_epochs=2, **options)
    finally:
        gc.unfreeze()
    assert len(tensors) == 16
    assert len(set(tensors[9:])) == 1, tensors  # epoch 1 is captured


# -- training is what it was -----------------------------------------------------------------------


class ManualAdam(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.losses.append(float(self.loss(batch).detach()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class FusedAdam(Adam):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


@pytest.mark.parametrize("make", [ManualAdam, FusedAdam])
@pytest.mark.parametrize("arguments", [{}, {"every_n_batches": 2, "max_examples": 7}])
@pytest.mark.parametrize("scaled", [False, True])
def test_training_is_bit_identical(
    make: Callable[[nn.Module], Module], arguments: dict[str, Any], scaled: bool, tmp_path: Path
) -> None:
    modules: list[Module] = []
    for callbacks in ([], [MaTSStatsCallback(last_n_epochs=2, loss_scale=0.5, **arguments)]):
        torch.manual_seed(0)
        module = make(Transformer(dropout=0.2))
        plugins = [half_precision()] if scaled else []
        fit(module, texts(UNEVEN), tmp_path, *callbacks, max_epochs=3, plugins=plugins)
        modules.append(module)
    without, with_ = modules
    assert with_.losses == without.losses and len(set(without.losses)) == 15
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_.state_dict()[name], tensor), name


# -- what is refused ---------------------------------------------------------------------------


def without_init(cls: Any) -> Any:
    """DeepSpeed and XLA are not installed, so that their strategies cannot be made."""
    return cls.__new__(cls)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "FSDPStrategy": FSDPStrategy,
    "ModelParallelStrategy": ModelParallelStrategy,
    "DeepSpeedStrategy": partial(without_init, DeepSpeedStrategy),
    "XLAStrategy": partial(without_init, XLAStrategy),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_other_strategies_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer(**QUIET)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", STRATEGIES[name]())
    message = rf"and on several with DDPStrategy, not with {name}; use strategy='ddp'"
    with pytest.raises(MisconfigurationException, match=message):
        MaTSStatsCallback().setup(trainer, Module(MLP()), "fit")


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_spawn", "ddp_notebook", "ddp_fork"])
def test_one_device_and_ddp_are_not(strategy: str) -> None:
    trainer = L.Trainer(strategy=strategy, devices=1, **QUIET)
    assert strategy == "auto" or type(trainer.strategy) is DDPStrategy
    MaTSStatsCallback().setup(trainer, Module(MLP()), "fit")


def test_a_step_that_fetches_its_batches_is_refused(tmp_path: Path) -> None:
    class Fetching(Module):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    with pytest.raises(MisconfigurationException, match=r"Fetching.training_step\(dataloader_iter"):
        fit(Fetching(MLP()), loader(in_single(vectors())), tmp_path, MaTSStatsCallback())
