"""Products of LoRA factors made into factors again, of any rank, by a weighted SVD."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mats_lightning.lora import BASE, A, B, Lora
from mats_lightning.merging.curvatures import operator
from mats_lightning.merging.forms import matrix_form
from mats_lightning.merging.models import check_range, check_weights, counted
from mats_lightning.operators import Gram, KroneckerFactored
from mats_lightning.statistics import Statistics

MOST_DAMPING = 1e-2  # that is tried for singular factors


class NotPositiveDefinite(ValueError):
    """A matrix that a norm is to be made of."""


def refactor(
    deltas: Mapping[str, Tensor],
    rank: int,
    like: Lora,
    statistics: Sequence[Statistics] = (),
    *,
    weights: Sequence[float] | None = None,
    damping: float = 1e-6,
) -> tuple[Lora, dict[str, float]]:
    """Merged products D as scaling B A, B (d_out, rank) and A (rank, d_in), and what is lost.

    With statistics scaling B A is the D' of this rank that minimises the Frobenius norm
    |G^1/2 (D - D') C^1/2|, where C = sum w_i A_i / mean(A_i) + damping of the layer's K-FAC
    factors A_i, each divided by its mean eigenvalue, and G alike (the identity where there is a
    Gram matrix alone). It is exact (Eckart and Young for G^1/2 D C^1/2); the damping, times the
    mean eigenvalue, makes singular factors invertible, and is raised tenfold, to 1e-2 at most,
    where it does not. Without statistics it is the truncated SVD of D.

    `like` gives the configuration but for the rank (so with the rank of `like` the same modules
    load the result), and the head: see `Lora.with_head`. Layers with fewer dimensions than `rank`
    are filled up with zeros.

    Returns the adapter, and for each layer |D - D'| / |D| in that norm.

    Raises ValueError for a rank below 1, names that are not those of `lora_products`, statistics
    that do not fit or do not cover a layer, or factors that are not positive definite.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: an adapter has 1 at least")
    check_range("damping", damping)
    if odd := [name for name in deltas if not name.endswith(BASE)]:
        raise ValueError(f"'{odd[0]}' is no product of factors: expected '<layer>{BASE}'")
    odd = sorted(deltas.keys() - {layer + BASE for layer in like.layers})
    if odd and like.layers:
        raise ValueError(
            f"'{odd[0]}' is of no layer that `like` adapts ('{like.layers[0]}{BASE}' ...): nothing"
            " would load its factors; give an adapter on the same layers, with the same prefix"
        )
    if not deltas:
        raise ValueError("there is no product to make into factors")
    w = check_weights(weights, len(statistics)) if statistics else []
    statistics, w = counted(statistics, w), counted(w, w)
    kinds = {name: _kind(name, statistics) for name in deltas} if statistics else {}
    config = {
        **like.config,
        "r": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,  # others need what is not saved
        "eva_config": None,
    }
    alpha = float(config["lora_alpha"])
    root = math.sqrt(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    factors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    for name in deltas:
        layer, delta = name.removesuffix(BASE), deltas[name].detach()
        matrix = delta.double().T if like.transposed else delta.double()
        try:
            c, g = None, None
            if statistics:
                c, g = _norm(name, kinds[name], statistics, w, delta.double(), like.transposed)
            b, a, lost[layer] = _damped_low_rank(matrix, rank, c, g, damping)
        except ValueError as error:
            raise ValueError(f"refactoring '{layer}': {error}") from error
        factors |= {layer + A: (a / root).to(delta.dtype), layer + B: (b / root).to(delta.dtype)}
    return replace(like, config=config, weights=factors | like.head), lost


def low_rank(
    matrix: Tensor, rank: int, c: Tensor | None = None, g: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """B (m, rank), A (rank, n) that minimise |G^1/2 (D - B A) C^1/2|; that over |G^1/2 D C^1/2|.

    G (m, m) and C (n, n) positive definite, the identity where there is none. With their Cholesky
    factors L the norm is |L_G^T (D - B A) L_C|, whose minimum the truncated SVD is.
    """
    left, right = _cholesky(g), _cholesky(c)
    whitened = matrix if left is None else left.T @ matrix
    whitened = whitened if right is None else whitened @ right
    u, s, vt = torch.linalg.svd(whitened, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root.unsqueeze(1) * vt[:rank]
    if left is not None:
        b = torch.linalg.solve_triangular(left.T, b, upper=True)
    if right is not None:
        a = torch.linalg.solve_triangular(right, a, upper=False, left=False)
    missing = rank - len(root)
    if missing > 0:
        b, a = F.pad(b, (0, missing)), F.pad(a, (0, 0, 0, missing))
    total = float(s.norm())
    return b, a, float(s[rank:].norm()) / total if total else 0.0


def _damped_low_rank(
    matrix: Tensor, rank: int, c: Tensor | None, g: Tensor | None, damping: float
) -> tuple[Tensor, Tensor, float]:
    """With as much damping as makes the factors positive definite; none stays none."""
    while True:
        try:
            return low_rank(matrix, rank, _damped(c, damping), _damped(g, damping))
        except NotPositiveDefinite:
            if not 0 < damping < MOST_DAMPING:
                raise
            damping = min(10 * damping, MOST_DAMPING)


def _kind(name: str, statistics: Sequence[Statistics]) -> str:
    module = name.removesuffix(".weight")
    for kind in ("kfac", "gram"):
        if all(module in getattr(task, kind) for task in statistics):
            return kind
    raise ValueError(
        f"'{module}' has neither K-FAC factors nor a Gram matrix in the statistics of every model:"
        " take them with adapted_weights=True (or is a prefix missing?), or leave them out for a"
        " plain SVD"
    )


def _norm(
    name: str,
    kind: str,
    statistics: Sequence[Statistics],
    w: Sequence[float],
    weight: Tensor,
    transposed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """C (d_in, d_in) and G (d_out, d_out): sums over tasks, each of mean eigenvalue w_i."""
    sums: list[Tensor | None] = [None, None]
    for task, wi in zip(statistics, w, strict=True):
        form = matrix_form(name, kind, task, weight.shape)
        if form.transposed != transposed:
            raise ValueError(
                f"fan_in_fan_out={transposed} in the adapter, and the statistics are of a"
                f" layer whose weight is {'' if form.transposed else 'not '}transposed"
            )
        block = operator(name, kind, task, weight)
        assert isinstance(block, KroneckerFactored | Gram)
        factors = [block.a, block.g] if isinstance(block, KroneckerFactored) else [block.a]
        for i, factor in enumerate(factors):
            d = factor.shape[-1]
            whole = torch.block_diag(*factor.reshape(-1, d, d))  # one block, where it is not cut
            mean = whole.diagonal().mean()
            if mean > 0:
                total, whole = sums[i], wi / mean * whole
                sums[i] = whole if total is None else total + whole
    return sums[0], sums[1]


def _damped(matrix: Tensor | None, damping: float) -> Tensor | None:
    if matrix is None:
        return None
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix + damping * matrix.diagonal().mean() * eye


def _cholesky(matrix: Tensor | None) -> Tensor | None:
    if matrix is None:
        return None
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info):
        raise NotPositiveDefinite(
            f"a {tuple(matrix.shape)} factor is not positive definite: raise the damping"
        )
    return factor
