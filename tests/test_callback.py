"""The callback in real Trainers: scales, windows, checkpoints, crashes, what it leaves alone."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import (
    MLP,
    Batch,
    Conditional,
    Convolutions,
    Flattened,
    Norms,
    Reused,
    Transformer,
    Transposed,
    Windows,
    ia3,
    images,
    lora,
    texts,
    vectors,
    ways,
)
from oracle import Expected, assert_close, distance, expected
from safetensors.torch import load_file
from test_capture import BASES, assert_equals, hooks, to
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from mats_lightning import (
    MaTSStatsCallback,
    Statistics,
    collect_statistics,
    load_statistics,
    sidecar_path,
)
from mats_lightning.sidecar import check_belongs
from mats_lightning.statistics import factors
from mats_lightning.verification import MORE_IN_IT

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Module(L.LightningModule):
    """Trains on the mean loss. At learning rate 0 the weights stay, so that the oracle applies."""

    def __init__(self, model: nn.Module, lr: float = 0.0) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def loss(self, batch: Batch) -> Tensor:
        return self.model(batch).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert hooks(self) == 0
        self.log("val_loss", self.model(batch).mean(), batch_size=len(batch["labels"]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self.model(batch).mean(), batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(batches: Sequence[Batch]) -> DataLoader[Batch]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def fit(
    module: L.LightningModule,
    batches: Any,
    tmp_path: Path,
    *callbacks: L.Callback,
    ckpt_path: Path | None = None,
    validate: Sequence[Batch] = (),
    **options: Any,
) -> L.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 1, "default_root_dir": tmp_path}
    trainer = L.Trainer(callbacks=list(callbacks), **(defaults | QUIET | options))
    train = loader(batches) if isinstance(batches, list) else batches
    before = all_hooks(module)
    try:
        trainer.fit(module, train, loader(validate) if validate else None, ckpt_path=ckpt_path)
    finally:
        assert all_hooks(module) == before
    return trainer


def all_hooks(module: nn.Module) -> int:
    """On modules and parameters, of every kind that torch has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)
    return on_modules + sum(len(p._backward_hooks or ()) for p in module.parameters())


def oracle(module: Module, batches: Sequence[Batch]) -> Expected:
    return expected(lambda batch: module.model(batch), batches, root=module)


def assert_same(found: Statistics, wanted: Statistics) -> None:
    """To the last bit."""
    assert sorted(found.tensors) == sorted(wanted.tensors)
    for key, tensor in wanted.tensors.items():
        assert torch.equal(found.tensors[key], tensor), key
    assert found.examples == wanted.examples
    assert found.inputs == wanted.inputs
    assert found.group_positions == wanted.group_positions


def in_single(batches: Sequence[Batch]) -> list[Batch]:
    return [to(batch, torch.float32) for batch in batches]


# -- the scale of the loss ---------------------------------------------------------------------

UNEVEN = (4, 4, 4, 4, 2)  # the last window of an accumulation over 2 or 3 is short, the batch too
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 1e-3},
    "clipped by value": {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
    "both": {"accumulate_grad_batches": 3, "gradient_clip_val": 1e-3},
}


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "linear": (MLP, vectors(UNEVEN)),
    "transformer": (Transformer, texts(UNEVEN)),
    "convolutions": (Convolutions, images(UNEVEN)),
    "convolution of texts": (Windows, texts(UNEVEN)),
    "Conv1D": (Transposed, texts(UNEVEN)),
    "norms": (Norms, vectors(UNEVEN)),
    "reused": (Reused, vectors(UNEVEN)),
    "(IA)^3": (ia3, vectors(UNEVEN)),
    "LoRA": (lora, vectors(UNEVEN)),
}
FROZEN = [f"model.{name}" for name in BASES]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", LAYERS)
def test_statistics_are_exact_in_double(layers: str, way: str, tmp_path: Path) -> None:
    (model, batches), callback = LAYERS[layers], MaTSStatsCallback()
    module = Module(model().double())
    fit(module, batches, tmp_path, callback, precision="64-true", **WAYS[way])
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    assert_equals(found, oracle(module, batches), 1e-9, FROZEN)
    assert_close(found.tensors, callback.statistics.tensors, 1e-15)


@pytest.mark.parametrize("layers", LAYERS)
def test_statistics_are_exact_in_single(layers: str, tmp_path: Path) -> None:
    (model, batches), callback = LAYERS[layers], MaTSStatsCallback()
    module, batches = Module(model()), in_single(batches)
    fit(module, batches, tmp_path, callback, **WAYS["both"])
    assert_equals(callback.statistics, oracle(module, batches), 1e-5, FROZEN)


def largest_distance(found: Statistics, wanted: Expected) -> float:
    g = {name: g for name, (_, g) in found.kfac.items()}
    return max(
        distance(ours[name], theirs[name])
        for ours, theirs in (
            (dict(found.diagonal_fisher), wanted.diagonal_fisher),
            (dict(found.gram), wanted.gram),
            (g, wanted.output),
        )
        for name in theirs
    )


@pytest.mark.parametrize("layers", [name for name in LAYERS if name != "norms"])
def test_statistics_of_every_layer_in_bfloat16(layers: str, tmp_path: Path) -> None:
    """Training itself is in 16 bits; so many more of them are lost in deep models."""
    torch.manual_seed(0)
    (model, batches), callback = LAYERS[layers], MaTSStatsCallback()
    module, batches = Module(model()), in_single(batches)
    fit(module, batches, tmp_path, callback, precision="bf16-mixed")
    wanted = oracle(module, batches)
    wanted.gram = {name: a for name, a in wanted.gram.items() if name not in FROZEN}
    wanted.output = {name: g for name, g in wanted.output.items() if name not in FROZEN}
    assert {t.dtype for t in callback.statistics.tensors.values()} == {torch.float32}
    assert largest_distance(callback.statistics, wanted) < 0.1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_statistics_in_bfloat16(precision: Any, tmp_path: Path) -> None:
    """8 bits of mantissa: the statistics are as far off as the gradients, the sums are not."""
    module, callback = Module(MLP()), MaTSStatsCallback()
    batches = in_single(vectors(UNEVEN))
    wanted = oracle(module, batches)
    fit(module, batches, tmp_path, callback, precision=precision, **WAYS["both"])
    assert {t.dtype for t in callback.statistics.tensors.values()} == {torch.float32}
    assert largest_distance(callback.statistics, wanted) < 0.03


def half_precision(scale: float = 2.0**10) -> MixedPrecision:
    """With a real gradient scaler, which Lightning does not use on a CPU by itself."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def test_statistics_with_a_gradient_scaler(tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback()
    batches = in_single(vectors(UNEVEN))
    fit(module, batches, tmp_path, callback, plugins=[half_precision()], **WAYS["both"])
    assert largest_distance(callback.statistics, oracle(module, batches)) < 0.005
    assert callback.statistics.examples == sum(UNEVEN)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_overflowing_batch_is_left_out_and_counted(accumulate: int, tmp_path: Path) -> None:
    class Loud(Module):
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) * (1e6 if batch["way"] == "loud" else 1)

    module, callback, plugin = Loud(MLP()), MaTSStatsCallback(), half_precision()
    batches = in_single(ways("", "loud", "", "", ""))
    fit(module, batches, tmp_path, callback, plugins=[plugin], accumulate_grad_batches=accumulate)
    quiet = [batch for batch in batches if batch["way"] != "loud"]
    assert plugin.scaler is not None and plugin.scaler.get_scale() == 2.0**9
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    assert found.info["skipped_batches"] == 1
    assert found.examples == sum(len(batch["labels"]) for batch in quiet)
    assert largest_distance(found, oracle(module, quiet)) < 0.005


def test_a_weight_gradient_that_overflows_is_checked_later(tmp_path: Path) -> None:
    """Those of the outputs are finite, so that the batch counts."""

    class Twofold(nn.Module):
        """The first layer's weight is used without it, too."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, batch: Batch) -> Tensor:
            h = self.first(batch["x"])
            h = h + F.linear(torch.tanh(h), self.first.weight)
            return self.second(h).square().sum(-1)

    torch.manual_seed(0)
    module, callback = Module(Twofold()), MaTSStatsCallback()
    batches = [batch | {"x": 4 * batch["x"]} for batch in in_single(vectors((64, 64, 64)))]
    plugin = half_precision(2.0**13)
    fit(module, batches, tmp_path, callback, plugins=[plugin])
    assert plugin.scaler is not None and plugin.scaler.get_scale() == 2.0**12
    info = load_statistics(next(tmp_path.rglob("*.ckpt"))).info
    assert info["skipped_batches"] == 0
    reasons = {row["name"]: row["reason"] for row in info["coverage"]}
    assert reasons["model.first.weight"] == MORE_IN_IT
    assert reasons["model.second.weight"] == ""


class Reduced(Module):
    def __init__(self, model: nn.Module, reduce: Callable[[Tensor, Batch], Tensor]) -> None:
        super().__init__(model)
        self.reduce = reduce

    def loss(self, batch: Batch) -> Tensor:
        return self.reduce(self.model(batch), batch)


class Tagger(nn.Module):
    """A loss at each token that has a label."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, batch: Batch) -> Tensor:
        logits = self.head(self.words(batch["input_ids"]))
        return F.cross_entropy(logits.mT, batch["labels"], reduction="none").sum(1)


def tagged() -> list[Batch]:
    return [
        {
            "input_ids": b["input_ids"],
            "labels": torch.where(b["input_ids"] > 3, b["input_ids"], -100),
        }
        for b in texts(UNEVEN)
    ]


REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor, Batch], Tensor]]] = {
    # the mean of sums over tokens, which "mean" is not said of where labels are -100
    "examples": (lambda batch: len(batch["labels"]), lambda losses, batch: losses.mean()),
    "sum": ("sum", lambda losses, batch: losses.sum()),
    "token_mean": (
        "token_mean",
        lambda losses, batch: losses.sum() / (batch["labels"] != -100).sum(),
    ),
    "function": (lambda batch: 3.0 * len(batch["labels"]), lambda losses, batch: losses.mean() / 3),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reduction_of_the_loss_is_undone(reduction: str, tmp_path: Path) -> None:
    choice, reduce = REDUCTIONS[reduction]
    module = Reduced(Tagger(), reduce)
    callback = MaTSStatsCallback(loss_reduction=choice)
    fit(module, tagged(), tmp_path, callback, precision="64-true", **WAYS["both"])
    assert_equals(callback.statistics, oracle(module.double(), tagged()), 1e-9, [])


def test_the_mask_is_a_function_of_the_batch(tmp_path: Path) -> None:
    module = Module(Tagger())
    callback = MaTSStatsCallback(
        mask_fn=lambda batch: (batch["labels"] != -100).long(),
        loss_reduction=lambda batch: len(batch["labels"]),
    )
    fit(module, tagged(), tmp_path, callback, precision="64-true")
    wanted = expected(
        module.double().model, tagged(), root=module, mask=lambda batch: batch["labels"] != -100
    )
    assert_equals(callback.statistics, wanted, 1e-9, [])


def test_the_batch_size_is_a_function_of_the_batch(tmp_path: Path) -> None:
    batches = [batch | {"weights": torch.ones(3)} for batch in vectors(UNEVEN)]
    module = Module(MLP())
    message = r"its tensors have the sizes \[3, 4\]; pass batch_size_fn"
    with pytest.raises(ValueError, match=message):
        fit(module, batches, tmp_path, MaTSStatsCallback(), precision="64-true")
    assert hooks(module) == 0
    callback = MaTSStatsCallback(batch_size_fn=lambda batch: len(batch["labels"]))
    fit(module, batches, tmp_path, callback, precision="64-true")
    assert_equals(callback.statistics, oracle(module.double(), vectors(UNEVEN)), 1e-9, [])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({}, r"its tensors have the sizes \[3, 4\]"),
    "no examples": ({"batch_size_fn": lambda batch: 0}, "batch_size_fn gives 0 for a batch"),
    "labels": (
        {"batch_size_fn": lambda batch: 4, "loss_reduction": "token_mean"},
        "'token_mean' counts the labels",
    ),
    "loss scale": (
        {"batch_size_fn": lambda batch: 4, "loss_scale": lambda batch: 0.0},
        "it must be a positive number",
    ),
    "logits": (
        {
            "batch_size_fn": lambda batch: 4,
            "fisher": "sampled",
            "logits_fn": lambda module, batch: module.model(batch["x"]).detach(),
        },
        "the logits of logits_fn have no gradient",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_the_window(what: str, tmp_path: Path) -> None:
    options, message = WRONG[what]
    steps = []

    class Plain(Module):
        def loss(self, batch: Batch) -> Tensor:
            steps.append(self.current_epoch)
            return self.model(batch["x"]).square().mean()

    batches = [{"x": torch.randn(4, 6), "weights": torch.ones(3)}]
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(Plain(nn.Linear(6, 3)), batches, tmp_path, MaTSStatsCallback(**options), max_epochs=3)
    assert steps == []


def test_the_number_of_examples_may_be_a_tensor(tmp_path: Path) -> None:
    module, batches = Module(MLP()), vectors(UNEVEN)
    size: Any = lambda b: torch.count_nonzero(b["labels"] >= 0)  # noqa: E731
    callback = MaTSStatsCallback(batch_size_fn=size)
    fit(module, batches, tmp_path, callback, precision="64-true")
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    assert type(found.examples) is int
    assert_equals(found, oracle(module, batches), 1e-9, [])
    size = lambda b: np.float64(len(b["x"]))  # noqa: E731
    taken = collect_statistics(module, batches, batch_size_fn=size, progress=False)
    assert type(taken.examples) is int and taken.examples == sum(UNEVEN)


def test_codes_of_rows_that_come_in_order_in_each_epoch_are_data(tmp_path: Path) -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes, self.head = nn.Embedding(8, 6), nn.Linear(6, 3)

        def forward(self, batch: Batch) -> Tensor:
            logits = self.head(self.codes(batch["row"]))
            return F.cross_entropy(logits, batch["labels"], reduction="none")

    parts = enumerate(vectors((4, 4)))
    batches = [{"row": torch.arange(4) + 4 * k, "labels": b["labels"]} for k, b in parts]
    module, callback = Module(Codes()), MaTSStatsCallback(last_n_epochs=2)
    fit(module, batches, tmp_path, callback, precision="64-true", max_epochs=2)
    assert_equals(callback.statistics, oracle(module, batches * 2), 1e-9, [])


def test_a_token_mean_without_labels_is_refused(tmp_path: Path) -> None:
    batches = [{"x": b["x"], "classes": b["labels"]} for b in vectors()]
    with pytest.raises(ValueError, match="'token_mean' counts the labels"):
        fit(Module(MLP()), batches, tmp_path, MaTSStatsCallback(loss_reduction="token_mean"))


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
def test_a_mean_over_the_rows_that_have_a_label(reduction: str, tmp_path: Path) -> None:
    batches = vectors((4, 4))
    batches[1]["labels"][1:] = -100

    def reduce(losses: Tensor, batch: Batch) -> Tensor:
        return losses.sum() / (batch["labels"] != -100).sum()

    module, callback = Reduced(MLP(), reduce), MaTSStatsCallback(loss_reduction=reduction)
    if reduction == "mean":
        with pytest.raises(ValueError, match=r"3 of the batch's labels are -100.*'token_mean'"):
            fit(module, batches, tmp_path, callback, precision="64-true")
        return
    fit(module, batches, tmp_path, callback, precision="64-true")
    assert_equals(callback.statistics, oracle(module.double(), batches), 1e-9, [])


# -- which batches count -----------------------------------------------------------------------


def test_only_training_batches_count(tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback()
    batches = vectors(UNEVEN)
    options: dict[str, Any] = {"num_sanity_val_steps": 2, "val_check_interval": 2}
    fit(
        module,
        batches,
        tmp_path,
        callback,
        validate=vectors(seed=9),
        precision="64-true",
        **options,
    )
    assert_equals(callback.statistics, oracle(module, batches), 1e-9, [])


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_batch_whose_loss_is_not_finite_is_left_out_and_counted(
    fisher: Any, tmp_path: Path
) -> None:
    """The module leaves its step out, as is usual; its statistics stay those of the others."""

    class Careful(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if any(p.grad is not None and not p.grad.isfinite().all() for p in self.parameters()):
                self.zero_grad()

    def logits_fn(module: Any, batch: Batch) -> Tensor:
        logits: Tensor = module.model.logits(batch)
        return logits

    batches = vectors((4, 4, 2))
    broken = [*batches, {**vectors((4,))[0], "x": torch.full((4, 6), torch.nan).double()}]
    torch.manual_seed(0)
    module = Careful(MLP())
    callback = MaTSStatsCallback(
        fisher=fisher, logits_fn=logits_fn if fisher == "sampled" else None
    )
    fit(module, broken, tmp_path, callback, precision="64-true")
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    assert found.info["skipped_batches"] == 1 and found.examples == 10
    wanted = oracle(module, batches)
    assert_close(found.gram, wanted.gram, 1e-9)
    if fisher == "empirical":
        assert_equals(found, wanted, 1e-9, [])


def test_a_step_without_a_loss_does_not_count(tmp_path: Path) -> None:
    class Picky(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    module, callback = Picky(MLP()), MaTSStatsCallback()
    batches = vectors(UNEVEN)
    fit(module, batches, tmp_path, callback, precision="64-true")
    assert_equals(callback.statistics, oracle(module, batches[:1] + batches[2:]), 1e-9, [])


def test_a_batch_in_which_nothing_is_captured_is_named(tmp_path: Path) -> None:
    class Elsewhere(Module):
        def loss(self, batch: Batch) -> Tensor:
            return self.get_parameter("extra.weight").sum()

    module = Elsewhere(MLP())
    module.extra = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match="no gradient came to a covered layer in a batch of epoch"):
        fit(module, vectors(), tmp_path, MaTSStatsCallback())
    with pytest.raises(ValueError, match="holds no examples"):
        load_statistics(next(tmp_path.rglob("*.ckpt")))


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_the_window_is_the_last_epochs(kept: int, tmp_path: Path) -> None:
    """Learning moves the weights, so every epoch has other statistics."""
    batches = in_single(vectors(UNEVEN))
    alone: list[Statistics] = []
    for epoch in range(3):  # each epoch alone, as a window of its own
        torch.manual_seed(0)
        callback = MaTSStatsCallback()
        fit(Module(MLP(), lr=0.1), batches, tmp_path / "alone", callback, max_epochs=epoch + 1)
        alone.append(callback.statistics)
    torch.manual_seed(0)
    callback = MaTSStatsCallback(last_n_epochs=kept)
    fit(Module(MLP(), lr=0.1), batches, tmp_path / "kept", callback, max_epochs=3)
    found = load_statistics(next((tmp_path / "kept").rglob("*.ckpt")))
    assert found.info["epochs"] == [0, 1, 2][-kept:]
    wanted = sum(alone[-kept:], Statistics())
    assert_close(found.tensors, wanted.tensors, 1e-5)
    assert found.examples == wanted.examples


class StopsAtEpoch(L.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


ROLLING: dict[str, tuple[list[L.Callback], dict[str, Any]]] = {
    "early stopping": ([EarlyStopping("val_loss"), StopsAtEpoch(3)], {"max_epochs": 10}),
    "monitor": ([ModelCheckpoint(monitor="val_loss", save_top_k=-1)], {"max_epochs": 4}),
    "max_steps": ([], {"max_epochs": None, "max_steps": 4 * len(UNEVEN)}),
    "max_time": ([StopsAtEpoch(3)], {"max_epochs": 10, "max_time": "01:00:00:00"}),
    "no end": ([StopsAtEpoch(3)], {"max_epochs": -1}),
}


@pytest.mark.parametrize("way", ROLLING)
def test_the_window_rolls_when_the_end_is_not_known(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks, options = ROLLING[way]
    callback = MaTSStatsCallback(last_n_epochs=2)
    torch.manual_seed(0)
    module = Module(MLP(), lr=0.1)
    batches, validation = in_single(vectors(UNEVEN)), in_single(vectors(seed=9))
    with caplog.at_level("INFO"):
        fit(module, batches, tmp_path, callback, *callbacks, validate=validation, **options)
    assert "in every epoch, the last 2 kept" in caplog.text
    torch.manual_seed(0)
    fixed = MaTSStatsCallback(last_n_epochs=2)
    fit(Module(MLP(), lr=0.1), batches, tmp_path / "fixed", fixed, max_epochs=4)
    assert_close(callback.statistics.tensors, fixed.statistics.tensors, 1e-5)
    epochs = {p.name[6]: load_statistics(p).info["epochs"] for p in tmp_path.glob("*/epoch*.ckpt")}
    wanted = {"0": [0], "1": [0, 1], "2": [1, 2], "3": [2, 3]}
    assert epochs.items() <= wanted.items() and epochs["3"] == [2, 3]


class Without(Module):
    """From this epoch on, before this batch of each, a step has no loss, or one that is `value`."""

    def __init__(self, epoch: int, value: float | None = None, batches: int = len(UNEVEN)) -> None:
        super().__init__(MLP(), lr=0.1)
        self.epoch, self.value, self.batches = epoch, value, batches

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if loss is None or self.current_epoch < self.epoch or batch_idx >= self.batches:
            return loss
        return None if self.value is None else loss * self.value

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if any(p.grad is not None and not p.grad.isfinite().all() for p in self.parameters()):
            self.zero_grad()


@pytest.mark.parametrize("value", [None, torch.nan])
@pytest.mark.parametrize("kept", [1, 2])
def test_an_epoch_without_examples_is_none_of_the_last(
    kept: int, value: float | None, tmp_path: Path
) -> None:
    batches = in_single(vectors(UNEVEN))
    found: list[Statistics] = []
    for epochs, steps in ((3, 99), (4, 99), (3, -1)):  # the last one: a window that is known
        torch.manual_seed(0)
        callback = MaTSStatsCallback(last_n_epochs=kept)
        options: dict[str, Any] = {"max_epochs": epochs, "max_steps": steps}
        trainer = fit(Without(3, value), batches, tmp_path, callback, **options)
        path = tmp_path / f"{len(found)}.ckpt"
        trainer.save_checkpoint(path)
        found.append(load_statistics(path))
    short, longer, known = found
    assert_same(longer, short)
    assert_close(longer.tensors, known.tensors, 1e-5)
    assert longer.info["epochs"] == short.info["epochs"] == [1, 2][-kept:]
    assert longer.info["skipped_batches"] == (0 if value is None else len(UNEVEN))
    assert longer.info["notes"] == []


def test_in_a_known_window_too_an_epoch_without_examples_is_not_listed(tmp_path: Path) -> None:
    callback = MaTSStatsCallback(last_n_epochs=2)
    fit(Without(2), in_single(vectors(UNEVEN)), tmp_path, callback, max_epochs=3)
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    assert found.info["epochs"] == [1] and found.examples == sum(UNEVEN)


def test_a_fit_in_which_nothing_is_captured_says_so(tmp_path: Path) -> None:
    batches, path = in_single(vectors()), tmp_path / "end.ckpt"
    with pytest.warns(UserWarning, match="nothing was captured: no batch of the epochs to capture"):
        trainer = fit(Without(1), batches, tmp_path, MaTSStatsCallback(), max_epochs=2)
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"holds no examples: .* \(nothing was captured"):
        load_statistics(path)
    callbacks = [MaTSStatsCallback(), StopsAtEpoch(0)]  # before the window
    note = "nothing was captured: the fit ended before epoch 1, from which on it captures"
    with pytest.warns(UserWarning, match=note):
        trainer = fit(Without(0), batches, tmp_path, *callbacks, max_epochs=2)
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=rf"holds no examples: .* \({note}\)"):
        load_statistics(path)


def test_a_checkpoint_within_an_epoch_holds_what_there_is(tmp_path: Path) -> None:
    module = Module(MLP())
    callback = MaTSStatsCallback()
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module, vectors(UNEVEN), tmp_path, callback, every, precision="64-true")
    for steps in range(1, 6):
        found = load_statistics(tmp_path / f"step={steps}.ckpt")
        assert_equals(found, oracle(module.double(), vectors(UNEVEN)[:steps]), 1e-9, [])


def test_no_hook_before_the_window(tmp_path: Path) -> None:
    counts: list[int] = []

    class Counting(Module):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            counts.append(hooks(self))
            return super().training_step(batch, batch_idx)

    fit(Counting(MLP()), in_single(vectors()), tmp_path, MaTSStatsCallback(), max_epochs=2)
    assert counts == [0, 0, 0, 2, 2, 2]


def test_a_layer_that_only_some_epochs_use(tmp_path: Path) -> None:
    class Growing(Module):
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch | {"way": "extra" if self.current_epoch == 2 else "plain"})

    module, callback = Growing(Conditional()), MaTSStatsCallback(last_n_epochs=2)
    fit(module, vectors(), tmp_path, callback, max_steps=9, max_epochs=3, precision="64-true")
    batches = [b | {"way": way} for way in ("plain", "extra") for b in vectors()]
    assert_equals(callback.statistics, oracle(module.double(), batches), 1e-9, [])


def test_a_layer_that_a_later_epoch_shows_to_be_inexact(tmp_path: Path) -> None:
    class Turning(Flattened):
        flat = False

        def forward(self, batch: Batch) -> Tensor:
            if self.flat:
                return super().forward(batch)
            x = torch.tanh(self.middle(torch.tanh(self.first(batch["x"].unflatten(1, (3, 2))))))
            return F.cross_entropy(self.last(x).mean(1), batch["labels"], reduction="none")

    class TurningModule(Module):
        def on_train_epoch_start(self) -> None:
            self.model.flat = self.current_epoch == 1  # type: ignore[assignment]

    module, callback = TurningModule(Turning()), MaTSStatsCallback(last_n_epochs=2)
    fit(module, vectors(), tmp_path, callback, max_steps=6, max_epochs=2, precision="64-true")
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    assert "model.middle.weight" not in found.diagonal_fisher
    rows = {row["name"]: row for row in found.info["coverage"]}
    assert rows["model.middle.weight"]["statistics"] == ["gram", "kfac"]
    assert "12 rows for 4 examples" in rows["model.middle.weight"]["reason"]
    assert found.examples == 20


# -- a sidecar beside every checkpoint -----------------------------------------------------------


def checkpoints(folder: Path) -> set[str]:
    """The checkpoints; every one has its sidecar and every sidecar its checkpoint."""
    names = {path.name for path in folder.rglob("*.ckpt")}
    assert {path.name for path in folder.rglob("*.mats.safetensors")} == {
        f"{name}.mats.safetensors" for name in names
    }
    assert not list(folder.rglob(".*"))
    return names


def state_dict(path: Path) -> dict[str, Tensor]:
    # not weights_only: torch 2.6 does not know the function in the schedule of averaged weights
    weights: dict[str, Tensor] = torch.load(path, weights_only=False)["state_dict"]
    return weights


def test_a_sidecar_lies_beside_every_checkpoint_and_goes_with_it(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "best {val_loss:.2f}", monitor="val_loss", save_top_k=1)
    light = ModelCheckpoint(
        tmp_path, "light {epoch}", save_weights_only=True, save_top_k=-1, save_last=True
    )
    module = Module(MLP(), lr=0.1)
    validation = in_single(vectors(seed=0))
    trainer = fit(
        module,
        in_single(vectors()),
        tmp_path,
        MaTSStatsCallback(),
        best,
        light,
        validate=validation,
        max_epochs=3,
    )
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "after light.ckpt", weights_only=True)
    names = checkpoints(tmp_path)
    assert names == {
        Path(best.best_model_path).name,
        "last.ckpt",
        "after.ckpt",
        "after light.ckpt",
    } | {f"light epoch={epoch}.ckpt" for epoch in range(3)}
    for name in names:
        check_belongs(load_statistics(tmp_path / name), state_dict(tmp_path / name), name)
    with pytest.raises(ValueError, match="belong to other weights"):
        sums = load_statistics(tmp_path / "light epoch=1.ckpt")
        check_belongs(sums, state_dict(tmp_path / "after.ckpt"), "it")


def test_a_linked_checkpoint_has_the_statistics_of_its_target(tmp_path: Path) -> None:
    linked = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_last="link")
    fit(Module(MLP()), in_single(vectors()), tmp_path, MaTSStatsCallback(), linked, max_epochs=2)
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() and last.resolve().name == "epoch=1.ckpt"
    assert_same(load_statistics(last), load_statistics(tmp_path / "epoch=1.ckpt"))
    # one that lies beside the link itself is older: Lightning made a file of it once
    sidecar_path(last).write_bytes(sidecar_path(tmp_path / "epoch=0.ckpt").read_bytes()[:10])
    assert_same(load_statistics(last), load_statistics(tmp_path / "epoch=1.ckpt"))


def test_a_checkpoint_before_the_window_has_no_examples(tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(Module(MLP()), in_single(vectors()), tmp_path, MaTSStatsCallback(), each, max_epochs=2)
    assert checkpoints(tmp_path) == {"epoch=0.ckpt", "epoch=1.ckpt"}
    with pytest.raises(ValueError, match="holds no examples: its checkpoint was saved before the"):
        load_statistics(tmp_path / "epoch=0.ckpt")
    assert load_statistics(tmp_path / "epoch=1.ckpt").examples == 10


def test_a_sidecar_says_how_it_came_about(tmp_path: Path) -> None:
    def padding(batch: Batch) -> Tensor:
        return batch["attention_mask"].bool()

    module = Module(Transformer())
    module.model.head.bias.requires_grad_(False)  # type: ignore[union-attr]
    callback = MaTSStatsCallback(2, ["kfac", "block_fisher"], mask_fn=padding)
    fit(module, texts(), tmp_path, callback, max_epochs=3)
    info = load_statistics(next(tmp_path.rglob("*.ckpt"))).info
    versions, coverage, digest = (info.pop(key) for key in ("versions", "coverage", "digest"))
    assert info == {
        "fisher": "empirical",
        "loss_reduction": "mean",
        "mode": "train",
        "epochs": [1, 2],
        "global_step": 9,
        "mask": "padding",
        "kinds": ["kfac", "block_fisher"],
        "weight_sharing": "expand",
        "transposed": [],
        "groups": {},
        "blocks": {},
        "tied": {},
        "every_n_batches": 1,
        "max_examples": None,
        "skipped_batches": 0,
        "notes": [],
    }
    assert versions["torch"] == version("torch")
    assert {row["name"] for row in coverage} == {
        name for name, p in module.named_parameters() if p.requires_grad
    }
    assert set(digest) == {row["name"] for row in coverage if row["statistics"]}


def test_names_may_be_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    trainer = fit(Module(MLP()), in_single(vectors()), tmp_path, MaTSStatsCallback())
    fits, too_long = (tmp_path / f"{'x' * n}.ckpt" for n in (233, 234))
    trainer.save_checkpoint(fits)
    assert load_statistics(fits).examples == 10
    with pytest.warns(UserWarning, match="no sidecar is written .* more than 255 bytes"):
        trainer.save_checkpoint(too_long)
    assert too_long.exists()
    trainer.strategy.remove_checkpoint(too_long)
    assert not too_long.exists()


def test_a_checkpoint_that_is_not_local_has_no_sidecar(tmp_path: Path) -> None:
    """And the fit goes on."""
    remote = ModelCheckpoint("memory://checkpoints", save_top_k=1, monitor="val_loss")
    with pytest.warns(UserWarning, match="no sidecar is written beside memory://checkpoints/epoch"):
        fit(
            Module(MLP(), lr=0.1),
            in_single(vectors()),
            tmp_path,
            MaTSStatsCallback(),
            remote,
            validate=in_single(vectors()),
            max_epochs=3,
        )
    assert not list(tmp_path.iterdir()) and not Path("memory:").exists()


def test_sums_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Broken(Module):
        """The loss is finite, its gradient is not."""

        def loss(self, batch: Batch) -> Tensor:
            loss = super().loss(batch)
            return loss + (0 * loss).sqrt()

    with pytest.warns(UserWarning, match="no sidecar is written: .* has NaN or inf"):
        fit(Broken(MLP()), in_single(vectors()), tmp_path, MaTSStatsCallback())
    assert list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("*.safetensors"))


def test_testing_another_checkpoint_does_no_harm(tmp_path: Path) -> None:
    callback = MaTSStatsCallback()
    each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    module = Module(MLP(), lr=0.1)
    trainer = fit(module, in_single(vectors()), tmp_path, callback, each, max_steps=9, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    before = load_statistics(tmp_path / "end.ckpt")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    trainer.test(
        module, loader(in_single(vectors())), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False
    )
    assert hooks(module) == 0
    assert_same(callback.statistics, before)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == files
    # the module has the weights of epoch 0 now: the statistics of epoch 2 are not theirs
    with pytest.warns(UserWarning, match="since the fit .* the weights have changed"):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert not sidecar_path(tmp_path / "end.ckpt").exists()


def test_no_sidecar_for_weights_that_are_not_the_fits(tmp_path: Path) -> None:
    callback, first, second = MaTSStatsCallback(), Module(MLP(), lr=0.1), Module(MLP(), lr=0.2)
    batches = in_single(vectors())
    trainer = fit(first, batches, tmp_path / "a", callback)
    weights = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert sidecar_path(tmp_path / "end.ckpt").exists()
    first.load_state_dict(Module(MLP()).state_dict())
    with pytest.warns(UserWarning, match="since the fit .* the weights have changed"):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert not sidecar_path(tmp_path / "end.ckpt").exists()
    first.load_state_dict(weights)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    check_belongs(load_statistics(tmp_path / "end.ckpt"), weights, "it")
    fit(second, batches, tmp_path / "b", callback)  # its sums are the second fit's now
    with pytest.warns(UserWarning, match="or another fit with this callback"):
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert not sidecar_path(tmp_path / "end.ckpt").exists()


class Unfreezing(L.Callback):
    """The first layer trains from this epoch on, or from this batch of it."""

    def __init__(self, epoch: int, batch: int = 0) -> None:
        self.at = (epoch, batch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.model.first.requires_grad_(False)  # type: ignore[union-attr]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) >= self.at:
            pl_module.model.first.requires_grad_(True)  # type: ignore[union-attr]


@pytest.mark.parametrize("epoch", [1, 2])
def test_layers_that_are_unfrozen_in_the_fit_have_statistics(epoch: int, tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback()
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 3}
    fit(module, vectors(), tmp_path, Unfreezing(epoch), callback, **options)
    assert_equals(callback.statistics, oracle(module, vectors()), 1e-9, [])
    info = load_statistics(next(tmp_path.rglob("*.ckpt"))).info
    assert info["notes"] == [] and info["epochs"] == [2]
    assert {row["name"] for row in info["coverage"]} == set(module.state_dict())


def test_what_was_captured_before_layers_were_unfrozen_is_left_out(tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback(last_n_epochs=2)
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 2}
    note = (
        "the parameters that train, or their layers, have changed in epoch 1: what was captured"
        " before is left out"
    )
    with pytest.warns(UserWarning, match=note):
        fit(module, vectors(), tmp_path, Unfreezing(1, 1), callback, **options)
    assert_equals(callback.statistics, oracle(module, vectors()[1:]), 1e-9, [])
    assert load_statistics(next(tmp_path.rglob("*.ckpt"))).info["notes"] == [note]


def test_a_fit_that_unfreezes_resumes(tmp_path: Path) -> None:
    """At its start the layers are frozen again, until the next batch."""
    each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 2}
    module, callback = Module(MLP()), MaTSStatsCallback(last_n_epochs=3)
    fit(module, vectors(), tmp_path, Unfreezing(0), callback, each, **options)
    resumed = MaTSStatsCallback(last_n_epochs=3)
    path, options["max_epochs"] = tmp_path / "epoch=1.ckpt", 3
    fit(module, vectors(), tmp_path, Unfreezing(0), resumed, ckpt_path=path, **options)
    assert_equals(resumed.statistics, oracle(module, vectors() * 3), 1e-9, [])


class Interrupted(MLP):
    """The backward pass of one batch fails between its two layers."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.batches = number, 0

    def logits(self, batch: Batch) -> Tensor:
        hidden = self.activation(self.first(batch["x"]))
        if self.batches == self.number:
            hidden.register_hook(self._fail)
        self.batches += 1
        logits: Tensor = self.second(hidden)
        return logits

    def _fail(self, gradient: Tensor) -> None:
        raise RuntimeError("out of memory")


def test_sums_with_a_part_of_a_batch_are_left_out(tmp_path: Path) -> None:
    module, callback = Module(Interrupted(1)), MaTSStatsCallback()
    saving = OnExceptionCheckpoint(tmp_path, "broken")
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        pytest.warns(UserWarning, match="a backward pass was interrupted in the middle of a batch"),
    ):
        fit(module, in_single(vectors()), tmp_path, callback, saving)
    with pytest.raises(
        ValueError, match=r"holds no examples: .* \(a backward pass was interrupted"
    ):
        load_statistics(tmp_path / "broken.ckpt")
    assert not callback.statistics.examples
    state = torch.load(tmp_path / "broken.ckpt")["callbacks"][callback.state_key]
    assert state["examples"] == 0  # or a resumed fit with max_examples would take too few


class SavingWithin(L.Callback):
    """As a handler of signals does it: between the gradients of two layers."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.number:
            weight: Any = pl_module.get_parameter("model.first.weight")
            self.handle = weight.register_hook(lambda g: trainer.save_checkpoint(self.path))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()


def test_an_epoch_that_is_interrupted_in_its_first_batch_leaves_the_one_before(
    tmp_path: Path,
) -> None:
    module, callback = Module(Interrupted(len(UNEVEN))), MaTSStatsCallback()
    saving = OnExceptionCheckpoint(tmp_path, "broken")
    options: dict[str, Any] = {"max_epochs": 2, "max_steps": 99, "precision": "64-true"}
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, vectors(UNEVEN), tmp_path, callback, saving, **options)
    found = load_statistics(tmp_path / "broken.ckpt")
    module.model = plain = MLP()
    plain.load_state_dict(
        {k.removeprefix("model."): t for k, t in state_dict(tmp_path / "broken.ckpt").items()}
    )
    assert_equals(found, oracle(module.double(), vectors(UNEVEN)), 1e-9, [])
    assert found.info["epochs"] == [0]


class SavingAtDraw(L.Callback):
    """As a handler of signals does it: when the draw begins that has this number in the fit."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer

    def logits(self, module: Any, batch: Batch) -> Tensor:
        logits: Tensor = module.model.logits(batch)
        logits.register_hook(self._save)
        return logits

    def _save(self, gradient: Tensor) -> None:
        self.number -= 1
        if not self.number:
            self.trainer.save_checkpoint(self.path)


def test_a_checkpoint_between_two_draws_has_no_batch_that_is_not_counted(tmp_path: Path) -> None:
    saving, batches = SavingAtDraw(tmp_path / "within.ckpt", 8), in_single(vectors())
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=saving.logits, draws=2)
    fit(Module(MLP()), batches, tmp_path, callback, saving, max_epochs=2, max_steps=99)
    found = load_statistics(tmp_path / "within.ckpt")
    assert found.info["epochs"] == [0] and found.examples == 20


def test_a_checkpoint_within_a_backward_pass_has_no_part_of_a_batch(tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback()
    saving = SavingWithin(tmp_path / "within.ckpt", 1)
    with pytest.warns(UserWarning, match="the checkpoint of step 1 was saved in the middle of a"):
        fit(module, vectors(), tmp_path, callback, saving, precision="64-true")
    with pytest.raises(ValueError, match=r"holds no examples: .* the middle of a backward pass"):
        load_statistics(tmp_path / "within.ckpt")
    assert_equals(callback.statistics, oracle(module, vectors()), 1e-9, [])  # the fit goes on


def test_a_checkpoint_within_the_first_batch_of_an_epoch_has_the_epoch_before(
    tmp_path: Path,
) -> None:
    class InLastEpoch(SavingWithin):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                super().on_train_batch_start(trainer, *args)

    module, callback = Module(MLP()), MaTSStatsCallback()
    saving = InLastEpoch(tmp_path / "within.ckpt", 0)
    options: dict[str, Any] = {"max_epochs": 2, "max_steps": 99}
    fit(module, vectors(), tmp_path, callback, saving, precision="64-true", **options)
    found = load_statistics(tmp_path / "within.ckpt")
    assert_equals(found, oracle(module, vectors()), 1e-9, [])
    assert found.info["epochs"] == [0]
    assert "in the middle of a backward pass" in found.info["notes"][0]


@pytest.mark.parametrize(
    "choice",
    [
        {"weight_sharing": "reduce"},
        {"loss_reduction": "sum"},
        {"loss_scale": 0.5},
        {"max_factor_size": 3},
        {"statistics": ["gram"]},
        {"mask_fn": lambda batch: None},
    ],
    ids=lambda choice: next(iter(choice)),
)
def test_resuming_with_another_choice_is_refused(choice: dict[str, Any], tmp_path: Path) -> None:
    batches = in_single(vectors())
    fit(Module(MLP()), batches, tmp_path, MaTSStatsCallback())
    path = next(tmp_path.rglob("*.ckpt"))
    other = MaTSStatsCallback(**choice)
    with pytest.raises(MisconfigurationException, match=f"{next(iter(choice))}=.*same choice"):
        fit(Module(MLP()), batches, tmp_path, other, ckpt_path=path, max_epochs=2)
    # nothing is resumed by a test
    trainer = L.Trainer(callbacks=[other], default_root_dir=tmp_path, **QUIET)
    trainer.test(Module(MLP()), loader(batches), ckpt_path=path, verbose=False)


def test_numbers_may_be_numpys(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"last_n_epochs": np.int64(1), "max_examples": np.int64(5)}
    callback = MaTSStatsCallback(**numbers)
    fit(Module(MLP()), in_single(vectors()), tmp_path, callback)
    path = next(tmp_path.rglob("*.ckpt"))
    assert load_statistics(path).info["max_examples"] == 5
    torch.load(path, weights_only=True)


def test_testing_with_a_new_callback_does_no_harm(tmp_path: Path) -> None:
    module = Module(MLP())
    fit(module, in_single(vectors()), tmp_path, MaTSStatsCallback())
    path = next(tmp_path.rglob("*.ckpt"))
    trainer = L.Trainer(callbacks=[MaTSStatsCallback()], default_root_dir=tmp_path, **QUIET)
    (found,) = trainer.test(module, loader(in_single(vectors())), ckpt_path=path, verbose=False)
    assert found["test_loss"] > 0


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback()
    trainer = fit(module, vectors(), tmp_path, callback, precision="64-true")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(vectors(seed=1)))
    assert_equals(callback.statistics, oracle(module, vectors(seed=1)), 1e-9, [])
    checkpoints(tmp_path)


def test_fast_dev_run(tmp_path: Path) -> None:
    module, callback = Module(MLP()), MaTSStatsCallback()
    fit(module, vectors(), tmp_path, callback, fast_dev_run=True, precision="64-true")
    assert_equals(callback.statistics, oracle(module, vectors()[:1]), 1e-9, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save_last", [False, True])
def test_the_last_sidecar_alone_is_kept(save_last: bool, tmp_path: Path) -> None:
    module, callback = Module(MLP(), lr=0.1), MaTSStatsCallback(sidecar="last")
    each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_last=save_last)
    there: list[list[str]] = []

    class Looking(L.Callback):
        def on_train_epoch_start(self, *args: Any) -> None:
            there.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))

    options: dict[str, Any] = {"max_epochs": 3, "max_steps": 9}
    trainer = fit(module, in_single(vectors()), tmp_path, callback, each, Looking(), **options)
    names = ["last.ckpt"] * 3 if save_last else [f"epoch={epoch}.ckpt" for epoch in range(3)]
    assert there == [[], *([f"{name}.mats.safetensors"] for name in names[:2])]
    path = tmp_path / names[2]
    assert list(tmp_path.glob("*.safetensors")) == [sidecar_path(path)]
    check_belongs(load_statistics(path), state_dict(path), "it")
    for _ in range(2):  # the same one again is not removed
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        assert list(tmp_path.glob("*.safetensors")) == [sidecar_path(tmp_path / "end.ckpt")]
    # those of an earlier fit are not this one's to remove
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(in_single(vectors())))
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    assert sidecar_path(tmp_path / "end.ckpt").exists()


# -- stopped and resumed -------------------------------------------------------------------------


class StatefulLoader:
    """Shuffles the batches each epoch; knows its place, so that Lightning can put it back there."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.epoch, self.place = list(batches), 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if self.place == len(self):  # Lightning does not ask for more than the last batch
            self.epoch, self.place = self.epoch + 1, 0
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch))
        while self.place < len(self):
            self.place += 1
            yield self.batches[order[self.place - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


class Crash(L.Callback):
    """Stops the fit in the middle of an epoch, as a fault does."""

    def __init__(self, step: int, error: type[BaseException] = RuntimeError) -> None:
        self.step, self.error = step, error

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("crash")


STOPS: dict[str, tuple[int, dict[str, Any]]] = {
    "fixed, in the window": (12, {"max_epochs": 3}),
    "fixed, before the window": (2, {"max_epochs": 3}),
    "fixed, at an epoch's end": (10, {"max_epochs": 3}),
    "rolling": (12, {"max_epochs": 3, "max_steps": 15}),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_has_the_statistics_of_an_uninterrupted_one(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "ROWS_OF_BLOCK", 2)  # as it is in large layers
    step, options = STOPS[stop]
    batches = in_single(vectors(UNEVEN))

    def run(folder: str, *callbacks: L.Callback, ckpt_path: Path | None = None) -> Module:
        torch.manual_seed(0)
        module, callback = Module(MLP(), lr=0.1), MaTSStatsCallback(last_n_epochs=2)
        every = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        data = StatefulLoader(batches)
        fit(module, data, tmp_path, callback, every, *callbacks, ckpt_path=ckpt_path, **options)
        return module

    whole = run("whole")
    with pytest.raises(RuntimeError, match="crash"):
        run("crashed", Crash(step))
    assert checkpoints(tmp_path / "crashed") == {f"step={n}.ckpt" for n in range(1, step + 1)}
    resumed = run("resumed", ckpt_path=tmp_path / "crashed" / f"step={step}.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for n in range(step + 1, 16):
        path = tmp_path / "whole" / f"step={n}.ckpt"
        if n <= 5 and "rolling" not in stop:
            continue  # before the window
        wanted, found = load_statistics(path), load_statistics(tmp_path / "resumed" / path.name)
        assert_same(found, wanted)
        assert found.info == wanted.info


@pytest.mark.parametrize("step", [5, 6, 8, 9])
def test_a_fit_resumes_in_an_epoch_that_has_no_examples_yet(step: int, tmp_path: Path) -> None:
    """Epoch 1 has them from its fourth batch on, which is step 9."""

    def run(folder: str, *callbacks: L.Callback, ckpt_path: Path | None = None) -> None:
        torch.manual_seed(0)
        every = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = (MaTSStatsCallback(max_examples=4), every, *callbacks)
        data = StatefulLoader(in_single(vectors(UNEVEN)))
        module = Without(1, batches=3)
        options: dict[str, Any] = {"max_epochs": 2, "max_steps": 99}
        fit(module, data, tmp_path, *callbacks, ckpt_path=ckpt_path, **options)

    run("whole")
    with pytest.raises(RuntimeError, match="crash"):
        run("crashed", BeforeBatch(step))
    run("resumed", ckpt_path=tmp_path / "crashed" / f"step={step}.ckpt")
    for n in range(step + 1, 11):
        wanted = load_statistics(tmp_path / "whole" / f"step={n}.ckpt")
        found = load_statistics(tmp_path / "resumed" / f"step={n}.ckpt")
        assert_same(found, wanted)
        assert found.info == wanted.info and found.info["epochs"] == [int(n >= 9)]


class BeforeBatch(Crash):
    """Also where no step has a loss, so that no gradient is ever set to zero."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.on_before_zero_grad(trainer)


class Unsized(StatefulLoader):
    """Lightning reads one batch ahead, so that the loader's place is not the fit's."""

    def __len__(self) -> int:
        raise TypeError

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches[self.place :]


@pytest.mark.parametrize("make", [list, Unsized])
def test_a_loader_that_does_not_resume_exactly_is_warned_of(
    make: Callable[[list[Batch]], Any], tmp_path: Path
) -> None:
    batches = make(in_single(vectors(UNEVEN)))
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RuntimeError, match="crash"):
        fit(Module(MLP()), batches, tmp_path, MaTSStatsCallback(), every, Crash(2))
    note = "resumed in the middle of epoch 0 with a data loader that is not stateful"
    with pytest.warns(UserWarning, match=note):
        fit(
            Module(MLP()),
            batches,
            tmp_path,
            MaTSStatsCallback(),
            ModelCheckpoint(tmp_path, "end"),
            ckpt_path=tmp_path / "step=2.ckpt",
        )
    (found,) = load_statistics(tmp_path / "end.ckpt").info["notes"]
    assert found.startswith(note)


def test_resuming_at_the_end_of_an_epoch_needs_no_note(tmp_path: Path) -> None:
    batches = in_single(vectors(UNEVEN))
    fit(Module(MLP()), batches, tmp_path / "a", MaTSStatsCallback(last_n_epochs=2), max_epochs=1)
    path = next((tmp_path / "a").rglob("*.ckpt"))
    callback = MaTSStatsCallback(last_n_epochs=2)
    fit(Module(MLP()), batches, tmp_path / "b", callback, ckpt_path=path, max_epochs=2)
    found = load_statistics(next((tmp_path / "b").rglob("*.ckpt")))
    assert found.info["notes"] == [] and found.info["epochs"] == [0, 1]
    assert found.examples == 2 * sum(UNEVEN)


def test_resuming_for_longer_forgets_what_is_before_the_new_window(tmp_path: Path) -> None:
    batches = in_single(vectors(UNEVEN))
    fit(Module(MLP()), batches, tmp_path / "a", MaTSStatsCallback(last_n_epochs=2), max_epochs=2)
    path = next((tmp_path / "a").rglob("*.ckpt"))
    each = ModelCheckpoint(tmp_path / "b", "{epoch}", save_top_k=-1)
    callback = MaTSStatsCallback(last_n_epochs=2)
    fit(Module(MLP()), batches, tmp_path / "b", callback, each, ckpt_path=path, max_epochs=5)
    with pytest.raises(ValueError, match="holds no examples"):
        load_statistics(tmp_path / "b" / "epoch=2.ckpt")
    found = load_statistics(tmp_path / "b" / "epoch=4.ckpt")
    assert found.info["epochs"] == [3, 4] and found.examples == 2 * sum(UNEVEN)


def test_resuming_with_other_layers_says_that_it_starts_anew(tmp_path: Path) -> None:
    batches = vectors(UNEVEN)
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 1}
    fit(Module(MLP()), batches, tmp_path, MaTSStatsCallback(last_n_epochs=2), **options)
    path, module = next(tmp_path.rglob("*.ckpt")), Module(MLP())
    module.model.get_submodule("first").requires_grad_(False)
    callback = MaTSStatsCallback(last_n_epochs=2)
    with pytest.warns(UserWarning, match=r"are left out: .* 'model\.first\.bias' trains in one"):
        fit(
            module,
            batches,
            tmp_path / "resumed",
            callback,
            ckpt_path=path,
            max_epochs=2,
            precision="64-true",
        )
    found = load_statistics(next((tmp_path / "resumed").rglob("*.ckpt")))
    assert found.info["epochs"] == [1] and len(found.info["notes"]) == 1
    assert_equals(found, oracle(module, batches), 1e-9, ["model.first"])


def test_the_order_of_statistics_is_no_other_choice(tmp_path: Path) -> None:
    first = MaTSStatsCallback(statistics=["gram", "kfac"])
    fit(Module(MLP()), in_single(vectors()), tmp_path, first)
    path = next(tmp_path.rglob("*.ckpt"))
    same = MaTSStatsCallback(statistics=["kfac", "gram"])
    fit(Module(MLP()), in_single(vectors()), tmp_path, same, ckpt_path=path, max_epochs=2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "between"])
def test_hooks_come_off_when_the_fit_breaks_off(
    error: type[BaseException], where: str, tmp_path: Path
) -> None:
    class Breaking(Module):
        def loss(self, batch: Batch) -> Tensor:
            losses = super().loss(batch)
            if where == "forward":
                assert hooks(self) == 2
                raise error
            return losses

    module = Breaking(MLP())
    callbacks = [MaTSStatsCallback(), *([Crash(0, error)] if where == "between" else [])]
    with pytest.raises((error, SystemExit)):
        fit(module, in_single(vectors()), tmp_path, *callbacks)
    assert hooks(module) == 0


# -- training is what it was ---------------------------------------------------------------------


class Bert(nn.Module):
    """transformers' BERT, whose position ids have one row for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=11,
                hidden_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=10,
            )
        )
        self.head = nn.Linear(12, 3)

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        x = self.bert(batch["input_ids"], attention_mask=mask).last_hidden_state
        keep = mask.unsqueeze(-1).to(x.dtype)
        logits = self.head((x * keep).sum(1) / keep.sum(1))
        return F.cross_entropy(logits, batch["labels"], reduction="none")


class Adam(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    "make",
    [lambda: Transformer(dropout=0.2), lambda: Transformer("reentrant", dropout=0.2),
     lambda: Transformer("non-reentrant", dropout=0.2), Bert],
    ids=["transformer", "reentrant", "non-reentrant", "bert"],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical(
    make: Callable[[], nn.Module], precision: Any, tmp_path: Path
) -> None:
    modules = []
    for callbacks in ([], [MaTSStatsCallback(last_n_epochs=2)]):
        torch.manual_seed(0)
        module = Adam(make())
        options: dict[str, Any] = WAYS["both"] | {"gradient_clip_val": 0.5, "precision": precision}
        fit(module, texts(UNEVEN), tmp_path, *callbacks, max_epochs=3, **options)
        modules.append(module)
    without, with_ = modules
    assert with_.losses == without.losses and len(set(without.losses)) == 15
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_.state_dict()[name], tensor), name


def test_the_statistics_of_bert_are_exact(tmp_path: Path) -> None:
    module, callback = Module(Bert().eval()), MaTSStatsCallback()
    fit(module, texts(UNEVEN), tmp_path, callback, precision="64-true", **WAYS["both"])
    assert not module.model.bert.training  # type: ignore[union-attr]
    wanted = oracle(module.double(), texts(UNEVEN))
    assert_equals(callback.statistics, wanted, 1e-9, [])
    rows = load_statistics(next(tmp_path.rglob("*.ckpt"))).info["coverage"]
    unreached = {row["name"] for row in rows if row["reason"]}
    assert unreached == {"model.bert.pooler.dense.weight", "model.bert.pooler.dense.bias"}


# -- what is refused, and what is said -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last_n_epochs": 0}, "last_n_epochs=0; it must be 1 or more"),
        ({"max_factor_size": 0}, "max_factor_size=0; it must be 1 or more"),
        ({"statistics": ["gram", "hessian"]}, "no statistic is called 'hessian'; choose from"),
        ({"statistics": []}, "no statistic is chosen"),
        ({"statistics": "hessian"}, "no statistic is called 'hessian'"),
        ({"loss_reduction": "average"}, "loss_reduction='average'; choose from mean, sum"),
        ({"loss_scale": 0.0}, "loss_scale=0.0; it must be a positive number"),
        ({"loss_scale": float("nan")}, "loss_scale=nan; it must be a positive number"),
        ({"every_n_batches": 0}, "every_n_batches=0; it must be 1 or more"),
        ({"max_examples": 0}, "max_examples=0; it must be 1 or more"),
        ({"sidecar": "best"}, "sidecar='best'; choose from 'all', 'last'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        MaTSStatsCallback(**arguments)


def test_one_statistic_may_be_a_string(tmp_path: Path) -> None:
    callback = MaTSStatsCallback(statistics="gram")
    fit(Module(MLP()), in_single(vectors()), tmp_path, callback)
    assert set(callback.statistics.gram) == {"model.first", "model.second"}
    assert not callback.statistics.kfac


class ByClass(Module):
    """A mean by class weights, as a module of torch takes it."""

    def __init__(self) -> None:
        super().__init__(Logits())
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))

    def loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.criterion(self.model(batch), batch["labels"])
        return loss


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, batch: Batch) -> Tensor:
        logits: Tensor = self.head(batch["x"])
        return logits


def test_a_mean_by_class_weights_needs_its_divisor(tmp_path: Path) -> None:
    module, batches = ByClass().double(), vectors(UNEVEN)
    message = r"'criterion' is a CrossEntropyLoss with class weights: .* pass loss_reduction=lambda"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, batches, tmp_path, MaTSStatsCallback(), precision="64-true")
    with pytest.raises(ValueError, match=message):
        collect_statistics(module, batches, progress=False)
    weights = module.criterion.weight
    assert weights is not None

    def divisor(batch: Batch) -> float:
        return float(weights[batch["labels"]].sum())

    def losses(batch: Batch) -> Tensor:
        logits = module.model(batch)
        return F.cross_entropy(logits, batch["labels"], weight=weights, reduction="none")

    wanted = expected(losses, batches, root=module)
    callback = MaTSStatsCallback(loss_reduction=divisor)
    fit(module, batches, tmp_path, callback, precision="64-true")
    assert_equals(callback.statistics, wanted, 1e-9, [])
    found = collect_statistics(module, batches, loss_reduction=divisor, progress=False)
    assert_equals(found, wanted, 1e-9, [])


def test_factors_may_be_saved_in_bfloat16(tmp_path: Path) -> None:
    sizes = {}
    for dtype in (None, "bfloat16"):
        callback = MaTSStatsCallback(factor_dtype=dtype)
        fit(Module(MLP()), in_single(vectors()), tmp_path / str(dtype), callback)
        (path,) = (tmp_path / str(dtype)).rglob("*.safetensors")
        sizes[dtype] = {key: tensor.dtype for key, tensor in load_file(path).items()}
    packed = {k for k in sizes[None] if k.split("/")[0] in ("A", "G", "block_fisher")}
    assert packed and set(sizes[None].values()) == {torch.float32}
    halved = {key for key, dtype in sizes["bfloat16"].items() if dtype == torch.bfloat16}
    assert halved == packed
    with pytest.raises(MisconfigurationException, match=r"factor_dtype='int8'; choose from"):
        MaTSStatsCallback(factor_dtype="int8")  # type: ignore[arg-type]


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    callbacks = [MaTSStatsCallback(statistics=["gram"]), MaTSStatsCallback()]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `MaTSStats"):
        fit(Module(MLP()), in_single(vectors()), tmp_path, *callbacks)


def test_a_model_without_covered_layers_is_refused(tmp_path: Path) -> None:
    module = Module(nn.Sequential(nn.MultiheadAttention(2, 1)))
    message = r"no layer that it covers (.|\n)*nn.MultiheadAttention multiplies"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, in_single(vectors()), tmp_path, MaTSStatsCallback())


class Normalised(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(5)

    def forward(self, batch: Batch) -> Tensor:
        logits = self.second(self.batch_norm(self.first(batch["x"])))
        return F.cross_entropy(logits, batch["labels"], reduction="none")


def test_batch_normalisation_is_noted_where_it_trains(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="batch normalisation over a batch's own rows couples"):
        fit(Module(Normalised()), in_single(vectors()), tmp_path / "train", MaTSStatsCallback())
    (note,) = load_statistics(next((tmp_path / "train").rglob("*.ckpt"))).info["notes"]
    assert note.startswith("batch normalisation")
    fit(Module(Normalised().eval()), in_single(vectors()), tmp_path / "eval", MaTSStatsCallback())
    assert load_statistics(next((tmp_path / "eval").rglob("*.ckpt"))).info["notes"] == []
    without = Normalised().eval()
    without.batch_norm = nn.BatchNorm1d(5, track_running_stats=False).eval()
    with pytest.warns(UserWarning, match="batch normalisation over a batch's own rows couples"):
        fit(Module(without), in_single(vectors()), tmp_path / "none", MaTSStatsCallback())


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.1)]
)
def test_averaged_weights_are_noted(averaging: Callable[[], L.Callback], tmp_path: Path) -> None:
    callbacks = [averaging(), MaTSStatsCallback()]
    name = type(callbacks[0]).__name__
    module = Module(MLP(), lr=0.1)
    with pytest.warns(UserWarning, match=f"{name} saves averaged weights"):
        fit(module, in_single(vectors()), tmp_path, *callbacks, max_epochs=3)
    path = next(tmp_path.rglob("*.ckpt"))
    found = load_statistics(path)
    assert name in found.info["notes"][0]
    check_belongs(found, state_dict(path), "it")  # the weights that were saved


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize(
    "others",
    [
        list,
        lambda: [Unfreezing(1)],  # the callback begins anew, when max_epochs has been raised
        lambda: [EarlyStopping("val_loss", patience=9)],
    ],
)
def test_the_epoch_that_averaging_adds_for_batch_normalisation_is_not_captured(
    others: Callable[[], list[L.Callback]], kept: int, tmp_path: Path
) -> None:
    """In whatever order the callbacks are."""
    found: list[Statistics] = []
    for swa_first in (True, False):
        torch.manual_seed(0)
        callbacks = [StochasticWeightAveraging(0.1, 1), MaTSStatsCallback(last_n_epochs=kept)]
        callbacks = [*others(), *(callbacks if swa_first else callbacks[::-1])]
        options: dict[str, Any] = {"max_epochs": 3, "validate": in_single(vectors(seed=9))}
        trainer = fit(Module(Normalised()), in_single(vectors()), tmp_path, *callbacks, **options)
        assert trainer.current_epoch == 4
        path = tmp_path / f"{len(found)}.ckpt"
        trainer.save_checkpoint(path)
        found.append(load_statistics(path))
        assert found[-1].info["epochs"] == [1, 2][-kept:] and found[-1].examples == kept * 10
        assert [note.split()[0] for note in found[-1].info["notes"]] == [
            "StochasticWeightAveraging",
            "batch",
        ]
    assert_same(*found)


def test_what_is_covered_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Module(Transformer()), texts(), tmp_path, MaTSStatsCallback(), max_epochs=2)
    (said,) = [r.message for r in caplog.records if r.message.startswith("MaTSStatsCallback")]
    first, *lines = said.splitlines()
    assert first == "MaTSStatsCallback captures from epoch 1 on; at most 0 MB of sums:"
    assert [" ".join(line.split()) for line in lines][2:4] == [
        "2 model.blocks.*.norm1.weight 6 diagonal_fisher, block_fisher",
        "2 model.blocks.*.norm1.bias 6 diagonal_fisher, block_fisher",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "8 examples captured, in 2 of 4 batches; these took "),
        ({"last_n_epochs": 2}, "16 examples captured, in 4 of 4 batches; what it took cannot be"),
        ({"last_n_epochs": 2, "max_examples": 1}, "8 examples captured, in 2 of 4 batches; these"),
        (
            {"fisher": "sampled", "logits_fn": lambda module, batch: module.model.logits(batch)},
            "8 examples captured, in 2 of 4 batches; these took ",
        ),
        (
            {
                "fisher": "sampled",
                "logits_fn": lambda module, batch: module.model.logits(batch),
                "draws": 3,
            },
            "8 examples captured, in 2 of 4 batches; these took ",
        ),
    ],
)
def test_what_the_statistics_took_is_said_at_the_end(
    options: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        callback = MaTSStatsCallback(**options)
        fit(Module(MLP().double()), vectors((4, 4)), tmp_path, callback, max_epochs=2)
    (message,) = [r.message for r in caplog.records if r.message.startswith("statistics: ")]
    assert message.removeprefix("statistics: ").startswith(said)
