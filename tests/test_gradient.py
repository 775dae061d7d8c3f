"""The gradient among the statistics: against autograd, and against labels that a teacher draws."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import MLP, Batch, Flattened, Functional, Tied, Transformer, texts, vectors
from oracle import assert_close, rows_of
from test_capture import CASES
from torch import Tensor, nn

from mats_lightning import (
    MaTSStatsCallback,
    collect_statistics,
    load_statistics,
    save_statistics,
)
from mats_lightning.distillation import soft_targets
from mats_lightning.statistics import KINDS, Statistics, find_coverage

EXACT = 1e-9


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(batch).mean()
    return loss


def collected(model: nn.Module, batches: list[Batch], **options: Any) -> Statistics:
    defaults: dict[str, Any] = {
        "statistics": ("kfac", "block_fisher", "gradient"),
        "loss_fn": mean_loss,
        "progress": False,
    }
    return collect_statistics(model, batches, **(defaults | options))


def brute_force(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """1/N sum of the examples' own gradients, a row at a time."""
    model.eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = [row for batch in batches for row in rows_of(batch)]
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        found = torch.autograd.grad(model(row)[0], list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] += gradient.to_dense() / len(rows)
    return total


@pytest.mark.parametrize("name", [name for name in CASES if "reentrant" not in name])
def test_it_is_autograds(name: str) -> None:
    torch.manual_seed(1)
    model = CASES[name].model().double()
    found = collected(model, CASES[name].batches)
    assert_close(found.gradient, brute_force(model, CASES[name].batches), EXACT)


@pytest.mark.parametrize("model", [Flattened, Functional], ids=lambda model: model.__name__)
def test_it_is_there_where_single_examples_cannot_be_told_apart(model: type[nn.Module]) -> None:
    """And where the curvature cannot be had at all."""
    batches = vectors() if model is Flattened else texts()
    made = model().double()
    found = collected(made, batches)
    assert_close(found.gradient, brute_force(made, batches), EXACT)
    rows = {row["name"]: row["statistics"] for row in found.info["coverage"]}
    assert all("gradient" in kinds for kinds in rows.values())
    assert rows["middle.weight" if model is Flattened else "words.weight"][0] != "diagonal_fisher"


def test_it_is_of_the_weights_before_it_and_changes_nothing_else() -> None:
    model, batches = Transformer().double(), texts()
    found, without = collected(model, batches), collected(model, batches, statistics=KINDS)
    both = collected(model, batches, statistics=(*KINDS, "gradient"))
    assert not without.gradient
    shared = {k: t for k, t in both.tensors.items() if not k.startswith("gradient/")}
    assert_close(shared, without.tensors, 0.0)
    assert_close(both.gradient, dict(found.gradient), 0.0)
    assert all(p.grad is None for p in model.parameters())
    assert set(both.info["digest"]) == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("draws", [1, 3])
def test_with_sampled_labels_it_is_that_of_the_data(draws: int) -> None:
    model, batches = MLP().double(), vectors()
    options: dict[str, Any] = {
        "fisher": "sampled",
        "logits_fn": lambda model, batch: model.logits(batch),
        "draws": draws,
    }
    found = collected(model, batches, **options)
    assert found.examples == draws * sum(len(batch["labels"]) for batch in batches)
    assert_close(found.gradient, brute_force(model, batches), EXACT)
    alone = collect_statistics(
        model, batches, statistics=("kfac", "block_fisher"), progress=False, **options
    )
    curvature = {k: t for k, t in found.tensors.items() if not k.startswith("gradient/")}
    assert_close(curvature, alone.tensors, 0.0)


def test_parts_add_up_and_survive_the_sidecar(tmp_path: Path) -> None:
    model, batches = Tied().double(), texts()
    path = tmp_path / "x.mats.safetensors"
    save_statistics(collected(model, batches[:1]) + collected(model, batches[1:]), path)
    found = load_statistics(path)
    assert_close(found.gradient, brute_force(model, batches), EXACT)
    with pytest.raises(ValueError, match=r"'gradient/.*' is in one of the two only"):
        found + collected(model, batches, statistics=("kfac", "block_fisher"))


def test_bytes_are_counted() -> None:
    model = MLP()
    plain, more = (
        find_coverage(model, kinds, 8192).bytes() for kinds in (KINDS, (*KINDS, "gradient"))
    )
    assert more - plain == 4 * sum(p.numel() for p in model.parameters())


def test_where_it_makes_no_sense() -> None:
    with pytest.raises(MisconfigurationException, match="gradient is that of fixed weights"):
        MaTSStatsCallback(statistics=("kfac", "gradient"))
    with pytest.raises(ValueError, match="beside a curvature: add one of diagonal_fisher"):
        collected(MLP().double(), vectors(), statistics=("gradient",))


# -- a teacher ---------------------------------------------------------------------------------


def logits_of(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model.logits(batch)
    return logits


def made(seed: int) -> MLP:
    torch.manual_seed(seed)
    return MLP().double()


def test_soft_targets_are_the_expectation_over_drawn_labels() -> None:
    """Every label of every row, weighted by the probability that the teacher gives it."""
    model, teacher, batches = made(0), made(1), vectors()
    found = collected(model, batches, loss_fn=soft_targets(teacher, logits_of))
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for label in range(3):
        for batch in batches:
            p = logits_of(teacher, batch).softmax(-1)[:, label].detach()
            labels = torch.full_like(batch["labels"], label)
            loss = (p * model(batch | {"labels": labels})).sum() / found.examples
            for name, gradient in zip(
                wanted, torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                wanted[name] += gradient
    assert_close(found.gradient, wanted, EXACT)


def test_a_model_that_predicts_as_its_teacher_has_no_gradient() -> None:
    model = made(0)
    found = collected(model, vectors(), loss_fn=soft_targets(made(0), logits_of))
    assert all(float(gradient.abs().max()) < 1e-15 for gradient in found.gradient.values())


def test_a_lightning_module_may_be_its_own_teacher() -> None:
    class Logging(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = made(0)

    def logged(module: Any, batch: Batch) -> Tensor:
        module.log("seen", 1.0)  # without a trainer: dropped
        return logits_of(module.model, batch)

    module = Logging()
    found = collected(module, vectors(), loss_fn=soft_targets(module, logged))
    assert all(float(gradient.abs().max()) < 1e-15 for gradient in found.gradient.values())
    assert module.training and "log" not in vars(module)


def test_positions_that_are_masked_do_not_count() -> None:
    def made(scale: float) -> nn.Module:
        layer = nn.Linear(2, 3).double()
        nn.init.constant_(layer.weight, scale)
        return layer

    x = torch.randn(3, 4, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    model, teacher = made(0.1), made(0.7)
    loss = soft_targets(teacher, lambda model, batch: (model(batch["x"]), batch["mask"]))
    before = loss(model, {"x": x, "mask": mask})
    assert torch.equal(loss(model, {"x": x + ~mask[..., None] * 9.0, "mask": mask}), before)
    p, q = (layer(x[mask]).softmax(-1) for layer in (teacher, model))
    torch.testing.assert_close(before, -(p * q.log()).sum() / 3)
    # as labels are drawn: a Hugging Face batch's own mask, where logits_fn gives none
    bare = soft_targets(teacher, lambda model, batch: model(batch["x"]))
    torch.testing.assert_close(bare(model, {"x": x, "attention_mask": mask}), before)
    whole = bare(model, {"x": x, "attention_mask": torch.ones_like(mask)})
    torch.testing.assert_close(bare(model, {"x": x}), whole)
    with pytest.raises(ValueError, match=r"logits have shape \(3, 4, 3\) and the mask \(3, 2\)"):
        bare(model, {"x": x, "attention_mask": mask[:, :2]})


def test_the_teacher_has_no_dropout_and_keeps_its_mode() -> None:
    class Dropping(MLP):
        def logits(self, batch: Batch) -> Tensor:
            return nn.functional.dropout(super().logits(batch), 0.5, self.training)

    teacher = Dropping().double().train()
    teacher.first.eval()
    loss = soft_targets(teacher, logits_of)
    assert torch.equal(loss(made(0), vectors()[0]), loss(made(0), vectors()[0]))
    assert teacher.training and not teacher.first.training


@pytest.mark.parametrize(
    ("other", "runs"),
    [
        ({}, 1),
        ({"x": torch.ones(5, 4)}, 2),
        ({"note": "b"}, 2),
        ({"note": object()}, 2),
        ({"more": [1]}, 2),
    ],
)
def test_what_a_teacher_gave_is_kept_for_batches_of_equal_content(
    other: dict[str, Any], runs: int
) -> None:
    torch.manual_seed(0)
    teacher, model, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    came = []

    def logits(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        if module is teacher:
            came.append(batch)
        found: Tensor = module(batch["x"])
        return found

    kept: dict[bytes, Tensor] = {}
    first, second = {"x": x, "note": "a"}, {"x": x.clone(), "note": "a"} | other
    for batch in (first, second):
        loss = soft_targets(teacher, logits, kept)(model, batch)
        expected = -(teacher(batch["x"]).softmax(-1) * model(batch["x"]).log_softmax(-1)).sum(-1)
        torch.testing.assert_close(loss, expected.mean())
    assert len(came) == runs


def test_a_teacher_of_another_task_is_refused() -> None:
    teacher = made(0)
    teacher.second = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match=r"teacher gives logits \(4, 4\) and the model \(4, 3\)"):
        collected(made(0), vectors(), loss_fn=soft_targets(teacher, logits_of))


def test_a_class_that_cannot_occur_costs_nothing() -> None:
    def without(model: Any, batch: Batch) -> Tensor:
        return logits_of(model, batch)[:, [0, 2]]

    def impossible(model: Any, batch: Batch) -> Tensor:
        return logits_of(model, batch).index_fill(1, torch.tensor([1]), -torch.inf)

    model, teacher, (batch, *_) = made(0), made(1), vectors()
    losses = [soft_targets(teacher, how)(model, batch) for how in (impossible, without)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients)
    assert losses[0] > 0 and all(bool(gradient.any()) for gradient in gradients[0])
