"""Merging weights that are no plain matrix: convolutions, Conv1D, embeddings, batch norms.

The products C x are held against autograd: G X A is the gradient, with respect to the weight X, of
1/2 s^T G s summed over the positions of the layer's outputs s, divided by the positions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    MLP,
    Batch,
    Convolutions,
    Norms,
    Transposed,
    Volumes,
    Windows,
    classified,
    images,
    texts,
    vectors,
)
from oracle import distance
from test_capture import capture_batch, captured
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mats_lightning import load_statistics
from mats_lightning.capture import Capture
from mats_lightning.merging import average, fisher, mats, regmean, task_arithmetic, ties
from mats_lightning.merging.curvatures import operator
from mats_lightning.merging.forms import matrix_form
from mats_lightning.sidecar import save_statistics
from mats_lightning.statistics import KINDS, Statistics, find_coverage

Make = Callable[[], nn.Module]
CASES: dict[str, tuple[Make, list[Batch]]] = {
    "convolutions": (Convolutions, images()),
    "volumes": (Volumes, images(shape=(2, 2, 3, 2))),
    "Conv1D": (Transposed, texts()),
    "texts": (Windows, texts()),
}


class Inputs:
    """What every layer was given, example by example where a mask hides positions."""

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        self.model = model
        self.seen: dict[str, list[Tensor]] = {}
        handles = [
            module.register_forward_hook(self._keep(name)) for name, module in model.named_modules()
        ]
        for batch in batches:
            model(batch)
        for handle in handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.seen.setdefault(name, []).append(args[0])

        return hook

    def product(self, module: str, x: Tensor, g: Tensor | None) -> Tensor:
        """C x of a layer, without a mask: G X A, or X A where there is no G."""
        layer: Any = self.model.get_submodule(module)
        x = x.clone().requires_grad_()
        total, positions = torch.zeros((), dtype=torch.float64), 0
        for a in self.seen[module]:
            s = torch.func.functional_call(layer, {"weight": x}, (a.detach(),))
            if getattr(layer, "bias", None) is not None:
                bias = layer.bias.detach()
                s = s - (bias.reshape(-1, *[1] * (s.ndim - 2)) if is_convolution(layer) else bias)
            if is_convolution(layer):
                s = s.flatten(2).mT
            s = s.reshape(-1, s.shape[-1])
            positions += len(s)
            if g is not None:
                g = g if g.ndim == 3 else g.unsqueeze(0)  # (groups, d, d)
                s = s.reshape(len(s), len(g), -1)
            weighted = s if g is None else torch.einsum("gij,pgj->pgi", g, s)
            total = total + (s * weighted).sum() / 2
        (gradient,) = torch.autograd.grad(total, x)
        return gradient / positions


def is_convolution(layer: nn.Module) -> bool:
    return hasattr(layer, "kernel_size")


def unmasked(batches: list[Batch]) -> list[Batch]:
    """Texts without padding."""
    return [
        {**b, "attention_mask": torch.ones_like(ids), "input_ids": ids.clamp(min=1)}
        if (ids := b.get("input_ids")) is not None
        else b
        for b in batches
    ]


def through_a_file(statistics: Statistics, folder: Path) -> Statistics:
    save_statistics(statistics, folder / "x.ckpt.mats.safetensors")
    return load_statistics(folder / "x.ckpt")


@pytest.mark.parametrize("kind", ["gram", "kfac"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_layer(name: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, batches = CASES[name]
    model, batches = make().double(), unmasked(batches)
    inputs = Inputs(model, batches)
    statistics = through_a_file(captured(model, batches)[0], tmp_path)
    layers = list(statistics.gram if kind == "gram" else statistics.kfac)
    assert layers
    for module in layers:
        parameter = f"{module}.weight"
        x = torch.randn_like(model.get_parameter(parameter))
        form = matrix_form(parameter, kind, statistics, x.shape)
        c = operator(parameter, kind, statistics, x)
        g = None if kind == "gram" else statistics.kfac[module][1]
        found = form.back(c.matvec(form.of(x)))
        assert distance(found, inputs.product(module, x, g)) < 1e-12, module


@pytest.mark.parametrize("method", ["regmean", "gram", "kfac", "kfac, plain"])
@pytest.mark.parametrize("name", CASES)
def test_merges_solve_the_equation(name: str, method: str, tmp_path: Path) -> None:
    """sum C_i theta = sum C_i theta_i, in every layer, for models of three starts."""
    make, batches = CASES[name]
    batches = unmasked(batches)
    models, statistics, inputs = [], [], []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(make().double())
        inputs.append(Inputs(models[-1], batches))
        (tmp_path / str(seed)).mkdir()
        found = captured(models[-1], batches)[0]
        statistics.append(through_a_file(found, tmp_path / str(seed)))
    thetas = [model.state_dict() for model in models]
    if method == "regmean":
        merged = regmean(thetas, statistics, off_diagonal=1.0, damping=1e-13)
    else:
        objective, _, plain = method.partition(", ")
        preconditioner = None if plain else "kronecker"
        options: dict[str, Any] = {"objective": objective, "preconditioner": preconditioner}
        options["radius"] = None  # of few rows there are directions almost without curvature
        merged = mats(
            thetas, statistics, normalize=False, iterations=2000, tolerance=1e-9, **options
        ).state_dict
    kfac = method.startswith("kfac")
    for module in statistics[0].kfac if kfac else statistics[0].gram:
        name = f"{module}.weight"
        residual, size = torch.zeros_like(merged[name]), torch.zeros_like(merged[name])
        for theta, record, given in zip(thetas, statistics, inputs, strict=True):
            g = record.kfac[module][1] if kfac else None
            residual += given.product(module, merged[name] - theta[name], g)
            size += given.product(module, theta[name], g)
        assert merged[name].shape == thetas[0][name].shape
        assert float(residual.norm()) < 1e-7 * float(size.norm()), module


class Wide(nn.Module):
    """Factors of 96, 64 and, in two groups, 64 x 48."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 64), Conv1D(96, 64)
        self.conv, self.head = nn.Conv1d(32, 96, 4, groups=2), nn.Linear(96, 3)

    def forward(self, batch: Batch) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(batch["x"]))))
        x = torch.tanh(self.conv(x.unflatten(1, (3, 32)).repeat(1, 2, 1).mT)).mean(2)
        return classified(self.head(x), batch)


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
@pytest.mark.parametrize("name", CASES)
def test_diagonal_fisher_has_the_closed_form_whatever_the_axes(
    name: str, preconditioner: str | None
) -> None:
    make, batches = CASES[name]
    thetas, statistics = [], []
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        model = make().double()
        statistics.append(captured(model, batches)[0])
        thetas.append({n: p.detach() for n, p in model.named_parameters()})
    merged = mats(
        thetas,
        statistics,
        objective="diagonal_fisher",
        preconditioner=preconditioner,
        iterations=2000,
        tolerance=1e-12,
        floor=1e-2,
        normalize=False,
    ).state_dict
    for parameter in statistics[0].diagonal_fisher:
        fishers = [s.diagonal_fisher[parameter].clamp(min=1e-2) for s in statistics]
        weighted = sum(f * t[parameter] for f, t in zip(fishers, thetas, strict=True))
        torch.testing.assert_close(merged[parameter], weighted / sum(fishers), rtol=1e-9, atol=1e-9)


def block_diagonal(factor: Tensor, blocks: int) -> Tensor:
    """What is left of a factor (d, d) that is cut into blocks."""
    size = len(factor) // blocks
    cut = [factor[i : i + size, i : i + size] for i in range(0, len(factor), size)]
    return torch.block_diag(*cut)


def test_large_factors_are_cut_into_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Wide().double(), images(shape=(96,))
    uncut, _ = captured(model, batches)
    coverage = find_coverage(model, KINDS, 40)
    cut = Statistics({})
    capture = Capture(coverage, cut)
    for batch in batches:
        capture_batch(capture, model, batch)
    assert sum(t.nbytes for t in cut.tensors.values()) == coverage.bytes()
    reasons = {name: row.reason for name, row in coverage.rows.items()}
    assert reasons["first.weight"] == "A is cut into 3 blocks, G is cut into 2 blocks"
    assert reasons["head.weight"] == "A is cut into 3 blocks"
    assert cut.info["blocks"] == {
        "first": [3, 2], "second": [2, 3], "conv": [2, 2], "head": [3, 1]
    }  # fmt: skip
    cut = through_a_file(cut, tmp_path)
    for module, (blocks_in, blocks_out) in cut.info["blocks"].items():
        weight = model.get_parameter(f"{module}.weight")
        x = torch.randn_like(weight)
        for kind in ("gram", "kfac"):
            c = operator(f"{module}.weight", kind, cut, x)
            form = matrix_form(f"{module}.weight", kind, cut, x.shape)
            assert torch.equal(form.back(form.of(x)), x)
            found = form.back(c.matvec(form.of(x)))
            a, g = uncut.kfac[module] if kind == "kfac" else (uncut.gram[module], None)
            factors_a = a if a.ndim == 3 else a[None]
            rows = x.T if module == "second" else x.flatten(1)
            wanted = []
            for group, part in enumerate(rows.chunk(len(factors_a))):
                product = part @ block_diagonal(factors_a[group], blocks_in)
                if g is not None:
                    g_group = (g if g.ndim == 3 else g[None])[group]
                    product = block_diagonal(g_group, blocks_out) @ product
                wanted.append(product)
            joined = torch.cat(wanted)
            joined = joined.T if module == "second" else joined.reshape(x.shape)
            torch.testing.assert_close(found, joined)
    thetas = [model.state_dict(), Wide().double().state_dict()]
    closed = regmean(thetas, [cut, cut], off_diagonal=1.0, damping=1e-3)
    solved = mats(thetas, [cut, cut], objective="gram", damping=1e-3, iterations=500, tolerance=0)
    for name in ("first.weight", "second.weight", "conv.weight"):
        torch.testing.assert_close(solved.state_dict[name], closed[name], rtol=1e-6, atol=1e-8)
    result = mats(thetas, [cut, cut], objective="kfac", damping=0.1, iterations=50)
    assert max(block.residuals[-1] for block in result.blocks.values()) < 1e-6


def test_tasks_must_be_cut_in_the_same_way() -> None:
    model, batches = Wide().double(), images(shape=(96,))
    statistics = []
    for limit in (8192, 40):
        statistics.append(Statistics({}))
        capture = Capture(find_coverage(model, KINDS, limit), statistics[-1])
        capture_batch(capture, model, batches[0])
    message = r"the gram of 'first\.weight' is cut into other blocks in model 1 than in model 0"
    with pytest.raises(ValueError, match=message):
        regmean([model.state_dict()] * 2, statistics)


def test_a_size_that_does_not_fall_into_blocks_is_left_out_and_named() -> None:
    coverage = find_coverage(nn.Linear(101, 64), KINDS, 100)
    row = coverage.rows["weight"]
    assert row.statistics == ["diagonal_fisher"]
    assert "no gram or kfac: size 101 is above max_factor_size=100" in row.reason


@pytest.mark.parametrize("kind", ["gram", "kfac"])
def test_biases_folded_into_their_weights(kind: str) -> None:
    """[W b] minimises the outputs' summed distances, in the metric of G: by autograd."""
    models, statistics, batches = [], [], images(shape=(96,))
    for seed in range(3):
        torch.manual_seed(seed)
        model = Wide().double()
        nn.init.normal_(model.first.bias)
        models.append(model)
        statistics.append(captured(model, batches)[0])
    thetas = [model.state_dict() for model in models]
    options: dict[str, Any] = {"objective": kind, "normalize": False, "damping": 0.0}
    merged = mats(
        thetas, statistics, fold_bias=True, iterations=4000, tolerance=1e-10, **options
    ).state_dict
    inputs = [Inputs(model, batches) for model in models]
    for module in ("first", "second", "head"):
        w, b = (merged[f"{module}.{p}"].clone().requires_grad_() for p in ("weight", "bias"))
        loss = torch.zeros((), dtype=torch.float64)
        for model, record, given in zip(models, statistics, inputs, strict=True):
            layer = model.get_submodule(module)
            a = torch.cat(given.seen[module]).detach()
            difference = torch.func.functional_call(layer, {"weight": w, "bias": b}, (a,))
            difference = difference - layer(a).detach()
            g = record.kfac[module][1] if kind == "kfac" else torch.eye(difference.shape[1])
            loss = loss + torch.einsum("pi,ij,pj->", difference, g.double(), difference) / len(a)
        gradients = torch.autograd.grad(loss, (w, b))
        scale = max(float(loss.detach()), 1.0)
        assert max(float(g.abs().max()) for g in gradients) < 1e-5 * scale, module
    assert "first.bias" not in mats(thetas, statistics, fold_bias=True, **options).uncovered
    closed = regmean(thetas, statistics, 1.0, fold_bias=True, damping=1e-3)
    options = {"objective": "gram", "damping": 1e-3, "normalize": False, "tolerance": 0.0}
    solved = mats(thetas, statistics, fold_bias=True, iterations=500, **options).state_dict
    for name in ("first.weight", "first.bias", "second.bias"):
        torch.testing.assert_close(solved[name], closed[name], rtol=1e-6, atol=1e-8)
    apart = regmean(thetas, statistics, 1.0, damping=1e-3)
    assert distance(apart["second.bias"], closed["second.bias"]) > 0.01


FOLDING: dict[str, Callable[..., dict[str, Tensor]]] = {
    "mats": lambda thetas, statistics: mats(thetas, statistics, fold_bias=True).state_dict,
    "regmean": lambda thetas, statistics: regmean(thetas, statistics, fold_bias=True),
}


@pytest.mark.parametrize("method", FOLDING)
@pytest.mark.parametrize("half", [0, 1])
def test_a_folded_bias_of_two_dtypes_is_in_the_wider(method: str, half: int) -> None:
    models = [MLP().double() for _ in range(2)]
    statistics = [captured(model, vectors())[0] for model in models]
    mixed = [model.float().state_dict() for model in models]
    mixed[half] = models[half].half().state_dict()
    merged = FOLDING[method](mixed, statistics)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    wide = [{name: tensor.float() for name, tensor in theta.items()} for theta in mixed]
    expected = FOLDING[method](wide, statistics)
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name


def test_rows_of_an_embedding_are_weighted_by_how_often_they_were_read() -> None:
    models = [Windows().double() for _ in range(2)]
    halves = [texts((4, 4))[:1], texts((4, 4), seed=1)[1:]]
    statistics = [captured(m, half)[0] for m, half in zip(models, halves, strict=True)]
    merged = regmean([m.state_dict() for m in models], statistics, damping=0.1)["words.weight"]
    shares = []
    for half in halves:
        ids = half[0]["input_ids"][half[0]["attention_mask"].bool()]
        share = torch.bincount(ids, minlength=11).double() / len(ids)
        shares.append((share + 0.1 * share.mean()).unsqueeze(1))
    a, b = (model.words.weight.detach() for model in models)
    torch.testing.assert_close(merged, (shares[0] * a + shares[1] * b) / (shares[0] + shares[1]))
    with pytest.raises(ValueError, match=r"of 'words\.weight': rows that no task looked up"):
        regmean([m.state_dict() for m in models], statistics, damping=0.0)


def test_statistics_of_another_form_are_refused() -> None:
    model = Convolutions().double()
    statistics, _ = captured(model, images())
    with pytest.raises(ValueError, match=r"'grouped\.weight' has the statistic gram.*architecture"):
        operator("grouped.weight", "gram", statistics, torch.ones(9))
    with pytest.raises(ValueError, match=r"gram of 'grouped\.weight' has shape .*architecture"):
        operator("grouped.weight", "gram", statistics, torch.ones(9, 2, 3, 2))


def test_running_statistics_are_those_of_all_batches_together() -> None:
    """Two norms that averaged over all that they saw (no momentum), against one that saw both."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(3, momentum=None).double() for _ in range(3)]
    for index, batches in enumerate((2, 6)):
        for _ in range(batches):
            x = torch.randn(50, 3, dtype=torch.float64) * (index + 1) + index
            norms[index](x)
    thetas = [norm.state_dict() for norm in norms[:2]]
    a, b = thetas
    mean = (2 * a["running_mean"] + 6 * b["running_mean"]) / 8
    square = sum(
        share * (t["running_var"] + t["running_mean"].square())
        for share, t in ((2 / 8, a), (6 / 8, b))
    )
    for merged in (average(thetas), task_arithmetic(thetas, norms[2].state_dict(), 0.3)):
        assert int(merged["num_batches_tracked"]) == 8
        torch.testing.assert_close(merged["running_mean"], mean)
        torch.testing.assert_close(merged["running_var"], square - mean.square())
    norms[2].load_state_dict(merged)
    fresh = [nn.BatchNorm1d(3).state_dict() for _ in range(2)]
    assert torch.equal(average(fresh)["running_var"], torch.ones(3))
    model = Norms().double()
    found, _ = captured(model, vectors())
    result = mats([model.state_dict()] * 2, [found] * 2, objective="kfac")
    assert not any("running" in name for name in result.uncovered)


def running(seed: int, batches: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "norm.running_mean": torch.randn(3, generator=draw),
        "norm.running_var": torch.rand(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(batches),
    }


def test_running_statistics_have_no_share_in_the_density_of_ties() -> None:
    start = {"w": torch.zeros(10)}
    thetas = [{"w": torch.arange(1.0, 11.0)}, {"w": torch.arange(2.0, 12.0)}]
    expected = ties(thetas, start, 0.3, 1.0)["w"]
    assert int((expected != 0).sum()) == 3
    far = [theta | {n: 1000 + t for n, t in running(0, 5).items()} for theta in thetas]
    found = ties(far, start | running(0, 1), 0.3, 1.0)
    assert torch.equal(found["w"], expected)
    only = [running(seed, 2) for seed in (0, 1)]
    assert ties(only, running(2, 1), 0.3, 1.0).keys() == only[0].keys()


OF_WEIGHTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "average": lambda thetas, w: average(thetas, weights=w),
    "task_arithmetic": lambda thetas, w: task_arithmetic(thetas, running(9, 1), 0.3, weights=w),
}


@pytest.mark.parametrize("method", OF_WEIGHTS)
@pytest.mark.parametrize(
    ("weights", "batches", "shares"),
    [
        ((1.0, 3.0), (2, 6), (0.1, 0.9)),
        ((9.0, 1.0), (1, 3), (0.75, 0.25)),
        ((1.0, 3.0), (0, 0), (0.25, 0.75)),
    ],
    ids=["both", "against each other", "no batches"],
)
def test_running_statistics_count_by_weight_times_batches(
    method: str, weights: Any, batches: Any, shares: Any
) -> None:
    a, b = thetas = [running(seed, count) for seed, count in enumerate(batches)]
    merged = OF_WEIGHTS[method](thetas, weights)
    mean = shares[0] * a["norm.running_mean"] + shares[1] * b["norm.running_mean"]
    torch.testing.assert_close(merged["norm.running_mean"], mean)
    square = sum(
        share * (t["norm.running_var"] + t["norm.running_mean"].square())
        for share, t in zip(shares, thetas, strict=True)
    )
    torch.testing.assert_close(merged["norm.running_var"], square - mean.square())


@pytest.mark.parametrize("method", OF_WEIGHTS)
@pytest.mark.parametrize("batches", [(2, 6), (2, 0)])
def test_running_statistics_of_a_model_of_weight_0_do_not_count(method: str, batches: Any) -> None:
    """Nor do those of one that has diverged, whatever each has seen."""
    thetas = [running(seed, count) for seed, count in enumerate(batches)]
    thetas[0] |= {"norm.running_mean": torch.full((3,), float("nan"))}
    merged = OF_WEIGHTS[method](thetas, (0.0, 2.0))
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(merged[name], thetas[1][name])


@pytest.mark.parametrize("method", ["mats", "fisher"])
def test_running_statistics_need_no_statistic(method: str) -> None:
    """Batch normalisation's own parameters do."""
    model = Norms().double()
    found, _ = captured(model, vectors())
    merge: Any = {"mats": mats, "fisher": fisher}[method]
    merge([model.state_dict()] * 2, [found] * 2, uncovered="error")
    kept = {key: t for key, t in found.tensors.items() if not key.endswith("/batch.bias")}
    part = Statistics(kept, found.examples, found.group_positions, found.inputs, found.info)
    with pytest.raises(ValueError, match=r"'batch\.bias' has no statistic"):
        merge([model.state_dict()] * 2, [part] * 2, uncovered="error")
