"""The step from merged weights: against dense linear algebra, and against Newton's method."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning import Statistics, collect_statistics
from mats_lightning.merging import mats, refresh_step

State = dict[str, Tensor]

TASKS = 3
EXAMPLES, POSITIONS = 8, 32  # powers of two: divided exactly
SHAPES: dict[str, tuple[int, ...]] = {
    "layer.weight": (3, 4),
    "turned.weight": (4, 2),  # stored as (d_in, d_out)
    "norm.weight": (5,),
    "free": (2, 3),  # no curvature
}
FEATURES = {"layer": (4, 3), "turned": (4, 2)}  # module -> d_in, d_out
EXACT: dict[str, Any] = {"iterations": 200, "tolerance": 1e-14}


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def positive(seed: int, d: int) -> Tensor:
    root = normal(seed, d, 3 * d)
    return root @ root.T / (3 * d)


def state(seed: int) -> State:
    return {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}


def factors(task: int) -> dict[str, Tensor]:
    """Means under the keys of a sidecar; the tasks' curvatures differ in scale."""
    seed, scale = 1000 * (task + 1), 5.0**task
    found = {"block_fisher/norm.weight": scale * positive(seed, 5)}
    for i, (module, (d_in, d_out)) in enumerate(FEATURES.items(), start=1):
        found[f"A/{module}"] = positive(seed + 10 * i, d_in)
        found[f"G/{module}"] = scale * positive(seed + 10 * i + 5, d_out)
    slopes = {f"gradient/{n}": normal(seed + 50 + i, *SHAPES[n]) for i, n in enumerate(SHAPES)}
    return found | slopes


def statistics(task: int) -> Statistics:
    sums = {
        key: tensor * (POSITIONS if key.startswith("A/") else EXAMPLES)
        for key, tensor in factors(task).items()
    }
    positions = dict.fromkeys(FEATURES, POSITIONS)
    info = {"transposed": ["turned"]}
    return Statistics(sums, EXAMPLES, positions, {m: m for m in FEATURES}, info)


ALL = [statistics(task) for task in range(TASKS)]
THETAS = [state(100 * (task + 1)) for task in range(TASKS)]
MERGED = state(7)


def dense(task: int, name: str, off_diagonal: float) -> np.ndarray[Any, Any]:
    """C_i of the flattened parameter."""

    def scaled(m: Tensor) -> np.ndarray[Any, Any]:
        return (off_diagonal * m + (1 - off_diagonal) * m.diagonal().diag()).numpy()

    known = factors(task)
    if name == "norm.weight":
        return scaled(known[f"block_fisher/{name}"])
    module = name.removesuffix(".weight")
    a, g = scaled(known[f"A/{module}"]), scaled(known[f"G/{module}"])
    return np.kron(a, g) if module == "turned" else np.kron(g, a)


def brute_force(
    name: str,
    *,
    mix: float,
    step: float = 1.0,
    damping: float = 0.0,
    normalize: bool = False,
    off_diagonal: float = 1.0,
    weights: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Tensor:
    d = MERGED[name].numel()
    left, right = np.zeros((d, d)), np.zeros(d)
    for task in range(TASKS):
        c = dense(task, name, off_diagonal)
        s = weights[task] / (np.trace(c) / d if normalize else 1.0)
        left += s * c
        right += (1 - mix) * s * c @ (THETAS[task][name] - MERGED[name]).flatten().numpy()
        right -= mix * s * factors(task)[f"gradient/{name}"].flatten().numpy()
    left += damping * np.trace(left) / d * np.eye(d)
    delta = torch.from_numpy(np.linalg.solve(left, right)).view(MERGED[name].shape)
    return MERGED[name] + step * delta


@pytest.mark.parametrize("preconditioner", ["kronecker", None])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "setting",
    [
        {"normalize": False},
        {"normalize": True},
        {"normalize": False, "weights": (2.0, 0.5, 1.0), "step": 0.25},
        {"normalize": True, "weights": (2.0, 0.5, 1.0), "damping": 0.3},
        {"normalize": False, "damping": 10.0, "off_diagonal": 0.5},
    ],
    ids=str,
)
def test_it_solves_the_equation(
    setting: dict[str, Any], mix: float, preconditioner: str | None
) -> None:
    found = refresh_step(
        MERGED, ALL, THETAS, mix=mix, preconditioner=preconditioner, **setting, **EXACT
    )
    for name in ("layer.weight", "turned.weight", "norm.weight"):
        wanted = brute_force(name, mix=mix, **setting)
        torch.testing.assert_close(found.state_dict[name], wanted, rtol=1e-8, atol=1e-8)
        assert found.blocks[name].residuals[-1] < 1e-9
    assert torch.equal(found.state_dict["free"], MERGED["free"])
    assert found.uncovered == ["free"]
    assert list(found.state_dict) == list(SHAPES)


def test_few_iterations_are_those_of_a_merge_that_starts_there() -> None:
    """mix = 0 is the equation of MaTS, so conjugate gradients take the same way to it."""
    setting: dict[str, Any] = {"iterations": 2, "normalize": True}
    found = refresh_step(MERGED, ALL, THETAS, mix=0.0, **setting)
    wanted = mats(THETAS, ALL, init=MERGED, **setting)
    for name in wanted.blocks:
        torch.testing.assert_close(found.state_dict[name], wanted.state_dict[name])
        assert found.blocks[name].iterations == wanted.blocks[name].iterations == 2
    assert not torch.equal(found.state_dict["free"], wanted.state_dict["free"])


def test_the_weights_of_the_tasks_are_not_read_with_mix_1() -> None:
    class Unread(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            raise AssertionError(name)

    with_them = refresh_step(MERGED, ALL, [Unread(state(1))] * TASKS, mix=1.0)
    without = refresh_step(MERGED, ALL, mix=1.0)
    assert all(torch.equal(with_them.state_dict[n], without.state_dict[n]) for n in SHAPES)


def test_what_is_kept_stays_and_is_not_called_uncovered() -> None:
    found = refresh_step(MERGED, ALL, THETAS, kept=["^layer"])
    assert torch.equal(found.state_dict["layer.weight"], MERGED["layer.weight"])
    assert not torch.equal(found.state_dict["norm.weight"], MERGED["norm.weight"])
    assert found.uncovered == ["free"]


def test_a_block_without_curvature_stays_where_it_is() -> None:
    """The average is no better guess here; a single task without it has no part in it."""

    def without(task: Statistics) -> Statistics:
        zero = torch.zeros(3, 3, dtype=torch.float64)
        return replace(task, tensors={**task.tensors, "G/layer": zero})

    none = refresh_step(MERGED, [without(task) for task in ALL], THETAS, mix=0.5)
    assert torch.equal(none.state_dict["layer.weight"], MERGED["layer.weight"])
    some = refresh_step(MERGED, [*ALL[:2], without(ALL[2])], THETAS, mix=0.5, **EXACT)
    two = refresh_step(MERGED, ALL[:2], THETAS[:2], mix=0.5, **EXACT)
    torch.testing.assert_close(some.state_dict["layer.weight"], two.state_dict["layer.weight"])


def test_buffers_stay_and_half_precision_is_kept() -> None:
    extra = {"norm.running_mean": torch.ones(2), "norm.running_var": torch.ones(2)}
    extra |= {"norm.num_batches_tracked": torch.tensor(3), "ids": torch.arange(4)}
    half = {name: tensor.bfloat16() for name, tensor in MERGED.items()}
    found = refresh_step(half | extra, ALL, mix=1.0)
    assert {n: t.dtype for n, t in found.state_dict.items() if n in SHAPES} == dict.fromkeys(
        SHAPES, torch.bfloat16
    )
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in extra.items())
    assert found.uncovered == ["free"]


# -- against Newton's method -------------------------------------------------------------------


class Softmax(nn.Module):
    """Linear softmax classification without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False).double()
        nn.init.zeros_(self.layer.weight)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.layer(batch["x"]), batch["labels"])


def rows(task: int, count: int = 40) -> dict[str, Tensor]:
    x = normal(task, count, 4) + task
    return {"x": x, "labels": (x @ normal(50 + task, 4, 3) + normal(60 + task, 3)).argmax(-1)}


def every_label(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row with each label: where all are equally probable, the sampled Fisher exactly."""
    return [batch | {"labels": torch.full_like(batch["labels"], label)} for label in range(3)]


def collected(model: nn.Module, batches: list[dict[str, Tensor]], kinds: Any) -> Statistics:
    return collect_statistics(
        model, batches, statistics=kinds, loss_fn=lambda m, b: m(b), progress=False
    )


def test_kfac_gives_the_exact_newton_step_where_it_is_exact() -> None:
    """At weights of 0 all labels are equally probable, so the Hessian is one Kronecker product."""
    model = Softmax()
    given = []
    for task in range(TASKS):
        curvature = collected(model, every_label(rows(task)), ("kfac",))
        found = collected(model, [rows(task)], ("kfac", "gradient"))
        scale = curvature.examples / found.examples
        gradient = {"gradient/layer.weight": scale * found.tensors["gradient/layer.weight"]}
        given.append(replace(curvature, tensors={**curvature.tensors, **gradient}))

    batches = [rows(task) for task in range(TASKS)]

    def loss(weight: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(b["x"] @ weight.T, b["labels"]) for b in batches]).sum()

    weight = model.layer.weight.detach()
    hessian = torch.func.hessian(loss)(weight).reshape(12, 12)
    slope = torch.func.grad(loss)(weight).flatten()
    damped = hessian + 0.01 * hessian.trace() / 12 * torch.eye(12, dtype=torch.float64)
    wanted = -torch.linalg.solve(damped, slope).view(3, 4)
    step = refresh_step(model.state_dict(), given, mix=1.0, normalize=False, damping=0.01, **EXACT)
    torch.testing.assert_close(step.state_dict["layer.weight"], wanted, rtol=1e-8, atol=1e-10)


def logistic(task: int) -> Callable[[Tensor], Tensor]:
    """The mean loss of a task of logistic regression: two classes, one vector of weights."""
    x = normal(70 + task, 60, 5) * torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]) ** task
    chance = torch.sigmoid(x @ (3 * normal(80 + task, 5)) / 5)
    y = (torch.rand(60, generator=torch.Generator().manual_seed(task)) < chance).double()
    return lambda w: F.binary_cross_entropy_with_logits(x @ w, y)


def at(loss: Callable[[Tensor], Tensor], w: Tensor) -> Statistics:
    """The Hessian for the block Fisher, which it is of a model of this kind, and the gradient."""
    hessian, gradient = torch.func.hessian(loss)(w), torch.func.grad(loss)(w)
    return Statistics({"block_fisher/w": hessian, "gradient/w": gradient}, 1)


def minimum(loss: Callable[[Tensor], Tensor]) -> Tensor:
    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(50):
        w = w - torch.linalg.solve(torch.func.hessian(loss)(w), torch.func.grad(loss)(w))
    assert float(torch.func.grad(loss)(w).norm()) < 1e-12
    return w


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.2)])
def test_rounds_with_mix_1_find_the_optimum_of_all_tasks_and_mix_0_another_point(
    weights: tuple[float, ...],
) -> None:
    losses = [logistic(task) for task in range(TASKS)]
    thetas = [{"w": minimum(loss)} for loss in losses]

    def together(w: Tensor) -> Tensor:
        return torch.stack([s * loss(w) for s, loss in zip(weights, losses, strict=True)]).sum()

    optimum = minimum(together)
    rested = {}
    for mix in (0.0, 0.5, 1.0):
        merged = {"w": torch.zeros(5, dtype=torch.float64)}
        for _ in range(60):
            before, given = merged["w"], [at(loss, merged["w"]) for loss in losses]
            merged = refresh_step(
                merged, given, thetas, mix=mix, normalize=False, weights=weights, **EXACT
            ).state_dict
        torch.testing.assert_close(merged["w"], before, rtol=0, atol=1e-9)  # it has come to rest
        rested[mix] = merged["w"]
    torch.testing.assert_close(rested[1.0], optimum, rtol=0, atol=1e-9)
    best = float(together(optimum))
    assert float(together(rested[0.0])) > best + 1e-3
    assert best < float(together(rested[0.5])) < float(together(rested[0.0]))


def test_equal_minima_are_a_fixed_point_of_every_mix() -> None:
    loss = logistic(0)
    theta = {"w": minimum(loss)}
    for mix in (0.0, 0.5, 1.0):
        found = refresh_step(theta, [at(loss, theta["w"])] * 2, [theta, theta], mix=mix)
        torch.testing.assert_close(found.state_dict["w"], theta["w"], rtol=0, atol=1e-10)


# -- what is refused ---------------------------------------------------------------------------


def changed(**tensors: Tensor | None) -> Statistics:
    kept = {**ALL[0].tensors, **{k.replace("__", "/"): t for k, t in tensors.items()}}
    return replace(ALL[0], tensors={k: t for k, t in kept.items() if t is not None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thetas": None}, r"mix=0.0 needs the tasks' own weights: pass thetas=..., or mix=1"),
        ({"thetas": THETAS[:2]}, "3 statistics for 2 models"),
        ({"thetas": [{"other": torch.ones(1)}] * 3}, "no common parameter"),
        (
            {"thetas": [{n: t for n, t in x.items() if n != "free"} for x in THETAS]},
            "'free' is in the merged weights and not in those of the tasks",
        ),
        ({"mix": 1.5}, "mix=1.5: it lies between 0 and 1"),
        ({"step": -1.0}, "step=-1.0: it cannot be negative"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"iterations": -1}, "iterations=-1: it cannot be negative"),
        ({"preconditioner": "jacobi"}, "preconditioner='jacobi'; choose 'kronecker', 'exact' or"),
        ({"objective": "hessian"}, "objective='hessian'; choose from"),
        ({"objective": "gram", "mix": 0.1}, "objective gram of 'layer.weight': its scale is not"),
        ({"weights": [1.0]}, "1 weights for 3 models"),
        (
            {"statistics": [changed(**{"gradient__norm.weight": None}), *ALL[1:]], "mix": 0.1},
            "needs the gradient of 'norm.weight', which model 0 does not have",
        ),
        (
            {
                "statistics": [changed(**{"gradient__norm.weight": torch.ones(4)}), *ALL[1:]],
                "mix": 1.0,
            },
            r"refresh of 'norm.weight': its gradient has shape \(4,\), the parameter has \(5,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refresh_step(**{"merged": MERGED, "statistics": ALL, "thetas": THETAS, **arguments})


def test_a_parameter_that_one_task_lacks_a_statistic_of_stays(
    recwarn: pytest.WarningsRecorder,
) -> None:
    statistics = [changed(**{"G__layer": None}), *ALL[1:]]
    message = "'layer.weight' has the statistic kfac in model 1 but not in model 0: it stays as"
    with pytest.warns(UserWarning, match=message):
        found = refresh_step(MERGED, statistics, THETAS)
    assert torch.equal(found.state_dict["layer.weight"], MERGED["layer.weight"])
    assert "layer.weight" in found.uncovered
    recwarn.clear()
    assert "layer.weight" not in refresh_step(MERGED, statistics, THETAS, kept="layer").uncovered
    assert not recwarn


def test_without_a_radius_the_tasks_weights_are_read_no_second_time() -> None:
    reads: list[str] = []

    class Counting(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            reads.append(name)
            return super().__getitem__(name)

    for radius, times in ((None, 2), (10.0, 3)):  # one for the shape, one for the right-hand side
        reads.clear()
        refresh_step(MERGED, ALL, [Counting(theta) for theta in THETAS], radius=radius)
        assert reads.count("layer.weight") == times * TASKS
