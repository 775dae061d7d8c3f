"""DARE, Iso-C and TSV-M: what their papers state, and brute force in NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mats_lightning.merging import (
    average,
    dare,
    drop_and_rescale,
    iso_c,
    regmean,
    rescale,
    task_arithmetic,
    ties,
    tsv_m,
)
from mats_lightning.statistics import Statistics

State = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.weight": (20, 6),
    "wide.weight": (5, 9),
    "wide.bias": (5,),
    "square.weight": (6, 6),
    "conv.weight": (4, 3, 2, 2),
    "scalar": (),
}
MATRICES = ("embeddings.weight", "wide.weight", "square.weight")


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


START = state(0)
THETAS = [state(seed) for seed in (1, 2, 3)]


def delta(merged: State, name: str) -> np.ndarray:
    return (merged[name] - START[name]).numpy()


def taus(name: str, w: Sequence[float] = (1, 1, 1)) -> list[np.ndarray]:
    return [wi * delta(theta, name) for wi, theta in zip(w, THETAS, strict=True)]


def assert_close(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def random_matrix(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    q: Tensor = torch.linalg.qr(random_matrix(seed, rows, columns)).Q
    return q


# -- what all three share ----------------------------------------------------------------------


@pytest.mark.parametrize("method", [iso_c, tsv_m])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_what_is_no_matrix_is_averaged(method: Any, weights: list[float] | None) -> None:
    merged = method(THETAS, START, 0.7, weights=weights)
    mean = average(THETAS, weights=weights)
    for name in SHAPES.keys() - MATRICES:
        assert_close(delta(merged, name), 0.7 * delta(mean, name))
    for name in MATRICES:
        assert not np.allclose(delta(merged, name), 0.7 * delta(mean, name))


@pytest.mark.parametrize("method", [iso_c, tsv_m])
@pytest.mark.parametrize("averaged", [["embed", r"^square\."], "embed"])
def test_matrices_may_be_averaged_by_name(method: Any, averaged: Any) -> None:
    merged, plain = method(THETAS, START, 0.7, averaged=averaged), method(THETAS, START, 0.7)
    mean = average(THETAS)
    chosen = {"embeddings.weight"} | ({"square.weight"} if len(averaged) == 2 else set())
    for name in SHAPES:
        if name in chosen:
            assert_close(delta(merged, name), 0.7 * delta(mean, name))
        else:
            assert torch.equal(merged[name], plain[name])


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_an_expression_that_no_parameter_has_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"averaged: no parameter has 'tokens' in its name"):
        method(THETAS, START, 0.7, averaged=["embed", "tokens"])


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_no_change_gives_no_change(method: Any) -> None:
    for name, tensor in method([START] * 3, START, 1.0).items():
        assert torch.equal(tensor, START[name])


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_a_task_that_changed_nothing_changes_nothing(method: Any) -> None:
    options: dict[str, Any] = {"rank_fraction": 1 / 3} if method is tsv_m else {}
    merged = method([THETAS[0], START, THETAS[1]], START, 1.0, **options)
    alone = method(THETAS[:2], START, 1.0, **options)
    for name in MATRICES:
        assert_close(merged[name], alone[name])


@pytest.mark.parametrize("method", [iso_c, tsv_m])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["square.weight", "wide.bias"])
def test_numbers_that_are_none_are_named(method: Any, value: float, name: str) -> None:
    broken = THETAS[1] | {name: torch.full(SHAPES[name], value).double()}
    with pytest.raises(ValueError, match=rf"'{name}' differs .* it has NaN or inf in model 1;"):
        method([THETAS[0], broken], START, 1.0)
    with pytest.raises(ValueError, match=rf"'{name}' has NaN or inf in the pretrained model"):
        method(THETAS[:1], broken, 1.0)


# -- Iso-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_iso_c_is_its_formula(weights: list[float] | None) -> None:
    merged = iso_c(THETAS, START, 0.6, weights=weights)
    for name in MATRICES:
        total = np.sum(taus(name, weights or (1, 1, 1)), axis=0)
        u, s, vt = np.linalg.svd(total, full_matrices=False)
        assert_close(delta(merged, name), 0.6 * s.mean() * u @ vt)


def test_iso_c_has_a_flat_spectrum_in_the_space_of_the_sum() -> None:
    merged = iso_c(THETAS, START, 1.0)
    for name in MATRICES:
        total, found = np.sum(taus(name), axis=0), delta(merged, name)
        s = np.linalg.svd(found, compute_uv=False)
        assert_close(s, np.full(len(s), np.linalg.svd(total, compute_uv=False).mean()))
        u, _, vt = np.linalg.svd(total, full_matrices=False)
        assert_close(u @ u.T @ found, found)
        assert_close(found @ vt.T @ vt, found)
        # every direction goes where it went, with equal strength: X^T total is symmetric, >= 0
        turned = found.T @ total
        assert_close(turned, turned.T)
        assert np.linalg.eigvalsh(turned).min() > -1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_iso_c_leaves_alone_what_no_task_changed(dtype: torch.dtype) -> None:
    """Rows that were never looked up, and the rounding of products of low rank."""
    left, right = random_matrix(5, 20, 2).to(dtype), random_matrix(6, 2, 6).to(dtype)
    left[7:] = 0
    total = left @ right
    merged = iso_c([{"w": total}], {"w": torch.zeros_like(total)}, 1.0)["w"]
    assert not merged[7:].any()
    s = torch.linalg.svdvals(merged.double())
    wanted = torch.linalg.svdvals(total.double())[:2].mean().expand(2)
    torch.testing.assert_close(s[:2], wanted, rtol=1e-5, atol=0.0)
    assert float(s[2]) < 1e-5 * float(s[0])


# -- TSV-M -------------------------------------------------------------------------------------


def whitened(x: np.ndarray) -> np.ndarray:
    """X (X^T X)^(-1/2) of independent columns, or (X X^T)^(-1/2) X of independent rows."""
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    values, vectors = np.linalg.eigh(gram)
    root = (vectors / np.sqrt(values)) @ vectors.T
    return x @ root if x.shape[1] <= x.shape[0] else root @ x


def tsv_of_the_paper(matrices: Sequence[np.ndarray], kept: int) -> np.ndarray:
    us, ss, vs = [], [], []
    for matrix in matrices:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        us.append(u[:, :kept])
        ss.append(s[:kept])
        vs.append(vt[:kept].T)
    u, v = whitened(np.hstack(us)), whitened(np.hstack(vs))
    return u @ np.diag(np.concatenate(ss)) @ v.T


@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
@pytest.mark.parametrize("fraction", [None, 0.2, 0.5, 1.0])
def test_tsv_m_is_its_algorithm(weights: list[float] | None, fraction: float | None) -> None:
    merged = tsv_m(THETAS, START, 0.8, rank_fraction=fraction, weights=weights)
    for name in MATRICES:
        full = min(SHAPES[name])
        kept = {None: full // 3, 0.2: 1, 0.5: full // 2, 1.0: full}[fraction]
        expected = tsv_of_the_paper(taus(name, weights or (1, 1, 1)), kept)
        assert_close(delta(merged, name), 0.8 * expected, 1e-9)


def test_tsv_m_whitens_the_singular_vectors() -> None:
    """With all singular values 1, the merged matrix is the product of two orthonormal factors."""
    parts = [orthonormal(i, 12, 3) @ orthonormal(9 + i, 10, 3).T for i in range(3)]
    found = tsv_m([{"w": p} for p in parts], {"w": torch.zeros(12, 10).double()}, 1.0)["w"]
    ones = torch.ones(9, dtype=torch.float64)
    s = torch.linalg.svdvals(found)
    torch.testing.assert_close(s[:9], ones)
    assert float(s[9]) < 1e-12
    assert float(torch.linalg.svdvals(torch.stack(parts).sum(0))[0]) > 1.2  # which interfere


def test_tsv_m_of_orthogonal_tasks_is_their_sum() -> None:
    u, v = orthonormal(0, 12, 6), orthonormal(1, 10, 6)
    parts = [
        (u[:, 2 * i : 2 * i + 2] * torch.tensor([3.0 + i, 0.1])) @ v[:, 2 * i : 2 * i + 2].T
        for i in range(3)
    ]
    start = {"w": random_matrix(7, 12, 10)}
    thetas = [{"w": start["w"] + part} for part in parts]
    merged = tsv_m(thetas, start, 1.0)
    torch.testing.assert_close(merged["w"], start["w"] + torch.stack(parts).sum(0))


def test_tsv_m_of_one_model_is_that_model() -> None:
    for weights in ([1.0], [0.0, 1.0, 0.0]):
        thetas = THETAS[:1] if len(weights) == 1 else [THETAS[1], THETAS[0], THETAS[2]]
        merged = tsv_m(thetas, START, 1.0, weights=weights)
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, THETAS[0][name], rtol=1e-12, atol=1e-12)


def test_tsv_m_of_equal_models_is_that_model_of_lower_rank() -> None:
    merged = tsv_m([THETAS[0]] * 3, START, 1.0)
    for name in MATRICES:
        u, s, vt = np.linalg.svd(taus(name)[0], full_matrices=False)
        kept = len(s) // 3
        assert_close(delta(merged, name), (u[:, :kept] * s[:kept]) @ vt[:kept])


def test_tsv_m_of_more_tasks_than_rows_keeps_one_component_of_each() -> None:
    matrices = [random_matrix(i, 2, 8) for i in range(5)]
    merged = tsv_m([{"w": m} for m in matrices], {"w": torch.zeros(2, 8).double()}, 1.0)
    assert_close(merged["w"], tsv_of_the_paper([m.numpy() for m in matrices], 1))


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.1, float("nan")])
def test_tsv_m_refuses_other_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"rank_fraction=.* lies in \(0, 1\]"):
        tsv_m(THETAS, START, 1.0, rank_fraction=fraction)


# -- DARE --------------------------------------------------------------------------------------

LARGE = {"a": (200, 100), "b": (300,), "scalar": ()}


def large(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).double() for n, s in LARGE.items()}


def test_each_number_is_dropped_or_rescaled() -> None:
    start, thetas = large(0), [large(1), large(2)]
    sparse = drop_and_rescale(thetas, start, 0.7, seed=4)
    kept = []
    for theta, found in zip(thetas, sparse, strict=True):
        quotient = (found["a"] - start["a"]) / (theta["a"] - start["a"])
        dropped, scaled = quotient.abs() < 1e-9, (quotient - 1 / 0.3).abs() < 1e-6
        assert bool((dropped ^ scaled).all())
        assert float(dropped.double().mean()) == pytest.approx(0.7, abs=0.02)  # 4 sigma: .013
        kept.append(scaled)
    both = (kept[0] & kept[1]).double().mean()
    assert float(both) == pytest.approx(0.3**2, abs=0.01)  # the models' drops are independent


def test_the_expected_model_is_the_model() -> None:
    start, theta = large(0), large(1)
    draws = 400
    total = torch.zeros_like(start["a"])
    for seed in range(draws):
        total += drop_and_rescale([theta], start, 0.5, seed=seed)[0]["a"]
    tau = theta["a"] - start["a"]
    error = (total / draws - theta["a"]) / tau  # standard deviation 1/sqrt(draws) each
    assert float(error.mean()) == pytest.approx(0.0, abs=5 / (draws * tau.numel()) ** 0.5)
    assert float(error.std()) == pytest.approx(draws**-0.5, rel=0.05)


def test_a_seed_is_a_draw() -> None:
    start, theta = large(0), large(1)

    def draw(seed: int, **changes: Any) -> Tensor:
        models = [{n: t.to(**changes) for n, t in m.items()} for m in (theta, start)]
        return drop_and_rescale(models[:1], models[1], 0.5, seed=seed)[0]["a"]

    before = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.get_rng_state(), before)
    # the same numbers are dropped in another dtype, and beside other parameters
    dropped = draw(3) == start["a"]
    same = theta["a"].bfloat16() == start["a"].bfloat16()  # nothing to drop
    narrow = draw(3, dtype=torch.bfloat16) == start["a"].bfloat16().float()
    assert torch.equal(narrow, dropped | same)
    assert torch.equal(drop_and_rescale([{"a": theta["a"]}], start, 0.5, seed=3)[0]["a"], draw(3))


@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_dare_is_task_arithmetic_or_ties_of_sparse_models(weights: list[float] | None) -> None:
    options: dict[str, Any] = {"weights": weights}
    sparse = drop_and_rescale(THETAS, START, 0.6, seed=2)
    expected = task_arithmetic(sparse, START, 0.3, **options)
    found = dare(THETAS, START, 0.6, 0.3, seed=2, **options)
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in expected.items()}
    w = weights or [1.0] * 3
    for name in SHAPES:
        total = sum(wi * (m[name] - START[name]) for wi, m in zip(w, sparse, strict=True))
        assert_close(found[name], START[name] + 0.3 * total)
    expected = ties(sparse, START, 0.4, 0.7, **options)
    found = dare(THETAS, START, 0.6, 0.7, seed=2, density=0.4, **options)
    for name in SHAPES:
        assert torch.equal(found[name], expected[name])


def test_nothing_dropped_is_task_arithmetic() -> None:
    found, expected = dare(THETAS, START, 0.0, 0.3, seed=0), task_arithmetic(THETAS, START, 0.3)
    for name in SHAPES:
        assert_close(found[name], expected[name])


def test_sparse_models_go_into_any_merge() -> None:
    gram = torch.eye(9, dtype=torch.float64)
    inputs = {"wide": "wide"}
    statistics = [Statistics({"A/wide": gram * i}, 1, {"wide": 1}, inputs) for i in (1, 2, 3)]
    sparse = drop_and_rescale(THETAS, START, 0.5, seed=2)
    merged = regmean(sparse, statistics, damping=0.0)["wide.weight"]
    assert_close(
        merged, sum(i * m["wide.weight"] for i, m in zip((1, 2, 3), sparse, strict=True)) / 6
    )


def test_buffers_are_not_dropped() -> None:
    buffers = {
        "norm.running_mean": torch.ones(50),
        "norm.running_var": torch.ones(50),
        "norm.num_batches_tracked": torch.tensor(3),
        "ids": torch.arange(5),
    }
    start = {name: torch.zeros_like(tensor) for name, tensor in buffers.items()}
    for name, tensor in drop_and_rescale([buffers], start, 0.5, seed=0)[0].items():
        assert torch.equal(tensor, buffers[name])


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_other_drop_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_rate=.* lies in \[0, 1\)"):
        dare(THETAS, START, rate, 0.3, seed=0)


def test_a_merge_is_made_longer() -> None:
    merged = average(THETAS)
    for scale in (0.0, 0.5, 1.0, 2.5):
        found = rescale(merged, START, scale)
        for name in SHAPES:
            start, theta = START[name].numpy(), merged[name].numpy()
            assert_close(found[name].numpy(), start + scale * (theta - start))
        summed = task_arithmetic(THETAS, START, scale / len(THETAS))
        for name in SHAPES:
            assert_close(found[name], summed[name])


def test_what_is_counted_keeps_its_value_and_a_dtype_stays() -> None:
    merged = {
        "norm.running_mean": torch.tensor([3.0]),
        "norm.running_var": torch.tensor([0.1]),
        "norm.num_batches_tracked": torch.tensor(7),
        "half.weight": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    }
    start = {name: torch.zeros_like(value) for name, value in merged.items()}
    start["norm.running_var"] += 9.0
    found = rescale(merged, {**start, "head.weight": torch.ones(2)}, 2.0)
    assert list(found) == list(merged)
    for name in list(merged)[:3]:
        assert torch.equal(found[name], merged[name])
    assert torch.equal(found["half.weight"], torch.tensor([2.0, 4.0], dtype=torch.bfloat16))


def test_a_length_that_is_no_number_and_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="scale=inf: a finite number"):
        rescale(THETAS[0], START, float("inf"))
    with pytest.raises(ValueError, match="the pretrained model"):
        rescale(THETAS[0], {"wide.bias": START["wide.bias"]}, 1.0)
