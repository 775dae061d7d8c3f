"""Every statistic against brute force, for each thing that makes capturing hard."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from models import (
    MLP,
    Adapted,
    Adversarial,
    Batch,
    Beside,
    ByKeyword,
    Categories,
    Conditional,
    Convolutions,
    D,
    Flattened,
    Functional,
    GradientPenalty,
    Hooked,
    Norms,
    PartlyCheckpointed,
    Places,
    Reused,
    Scale,
    Sharing,
    Teacher,
    Tied,
    Transformer,
    Transposed,
    Twice,
    Volumes,
    Windows,
    adapted,
    classified,
    ia3,
    images,
    lora,
    texts,
    vectors,
    ways,
)
from oracle import Expected, assert_close, expected
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mats_lightning.batch_sums import Input
from mats_lightning.capture import Capture
from mats_lightning.statistics import KINDS, Coverage, Statistics, factors, find_coverage
from mats_lightning.statistics.factors import ROWS_OF_BLOCK, add_second_moment
from mats_lightning.verification import MORE_IN_IT

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass
class Case:
    model: Callable[[], nn.Module]
    batches: list[Batch]
    plain: Callable[[], nn.Module] | None = None  # what the oracle runs, where it differs
    without_factors: list[str] = field(default_factory=list)  # their weight is tied or frozen


SHARING = ["together", "k alone", "together", "v alone", "without v", "k drops out"]
MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "words + places": lambda words, places: words + places,
    "places + words": lambda words, places: places + words,
    "torch.add(alpha)": lambda words, places: torch.add(words, places, alpha=0.5),
    "words += places": lambda words, places: words.__iadd__(places),
    "two additions": lambda words, places: (words + places) * (places + 2 * words),
}
OTHER_MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropout": lambda words, places: words + F.dropout(places, 0.5),
    "repeat": lambda words, places: words + places.repeat(len(words), 1, 1),
    "squeeze": lambda words, places: words + places[0],
    "product": lambda words, places: words * places,
    "an addition and a product": lambda words, places: words * places + places,
    "concatenation": lambda words, places: words + torch.cat([places, places])[:1],
}
# their weights are frozen
BASES = [f"base_model.model.{name}" for name in ("layer.base_layer", "up.base_layer", "head")]
CASES = {
    "mlp": Case(MLP, vectors()),
    "transformer": Case(Transformer, texts()),
    "reused": Case(Reused, vectors()),
    "tied": Case(Tied, texts(), without_factors=["words", "output"]),
    "sharing": Case(Sharing, ways(*SHARING)),
    "sharing, other order": Case(Sharing, ways(*reversed(SHARING))),
    "conditional": Case(Conditional, ways("plain", "extra", "plain")),
    "keyword": Case(ByKeyword, vectors()),
    "teacher": Case(Teacher, vectors()),
    "twice": Case(Twice, vectors()),
    "hooked": Case(Hooked, vectors()),
    "adversarial": Case(Adversarial, vectors()),
    "convolutions": Case(Convolutions, images()),
    "convolution of volumes": Case(Volumes, images(shape=(2, 2, 3, 2))),
    "convolution of texts": Case(Windows, texts()),
    "Conv1D": Case(Transposed, texts()),
    "norms": Case(Norms, vectors()),
    "(IA)^3": Case(ia3, vectors(), without_factors=BASES),
    "LoRA": Case(lora, vectors(), without_factors=BASES),
    "categories": Case(Categories, vectors(), without_factors=["layer"]),
    **{f"places: {how}": Case(partial(Places, meet), texts()) for how, meet in MEETINGS.items()},
    **{
        f"{model.__name__}, {way}": Case(partial(model, way), data(), plain=model)
        for model, data in ((Transformer, texts), (Reused, vectors), (PartlyCheckpointed, vectors))
        for way in ("reentrant", "non-reentrant")
    },
    **{
        f"beside, {first} first": Case(
            partial(Beside, first, "reentrant"), vectors(), plain=partial(Beside, first)
        )
        for first in ("inner", "outer")
    },
}


def to(batch: Batch, dtype: torch.dtype) -> Batch:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.items()
    }


def capture_batch(
    capture: Capture, model: nn.Module, batch: Batch, scale: float = 1.0, defer: bool = False
) -> Tensor:
    """The mean loss of a batch, as the callback does it; `scale` is a loss scaler's."""
    examples = len(batch["labels"])
    with capture.batch(examples, examples / scale, batch.get("attention_mask"), defer):
        loss: Tensor = model(batch).mean()
        capture.start_backward()
        (loss * scale).backward()
        assert capture.finish()
    return loss.detach()


def captured(
    model: nn.Module, batches: list[Batch], kinds: tuple[str, ...] = KINDS, **options: Any
) -> tuple[Statistics, Coverage]:
    coverage, statistics = find_coverage(model, kinds, 8192, **options), Statistics({})
    capture = Capture(coverage, statistics)
    for batch in batches:
        capture_batch(capture, model, batch)
    return statistics, coverage


def assert_equals(
    found: Statistics, wanted: Expected, tolerance: float, without_factors: list[str]
) -> None:
    layers = [name for name in wanted.gram if name not in without_factors]
    assert found.examples == wanted.examples
    assert found.positions == {name: wanted.positions[name] for name in layers}
    assert_close(found.diagonal_fisher, wanted.diagonal_fisher, tolerance)
    assert_close(found.block_fisher, wanted.block_fisher, tolerance)
    assert_close(found.gram, {name: wanted.gram[name] for name in layers}, tolerance)
    matrices = [name for name in layers if name in wanted.output]  # and no embeddings
    a = {name: a for name, (a, _) in found.kfac.items()}
    g = {name: g for name, (_, g) in found.kfac.items()}
    assert_close(a, {name: found.gram[name] for name in matrices}, 0.0)
    assert_close(g, {name: wanted.output[name] for name in matrices}, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_brute_force(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    model = case.model().to(dtype)
    plain = (case.plain or case.model)().to(dtype)
    plain.load_state_dict(model.state_dict())
    batches = [to(batch, dtype) for batch in case.batches]
    wanted = expected(plain, batches)
    found, _ = captured(model, batches)
    assert_equals(found, wanted, TOLERANCE[dtype], case.without_factors)


@pytest.mark.parametrize("kinds", [KINDS, ("kfac",), ("diagonal_fisher",)], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if ", reentrant" not in n and "beside" not in n])
def test_few_gradients_reach_all_layers(name: str, kinds: tuple[str, ...]) -> None:
    case = CASES[name]
    model = case.model().double()
    if not find_coverage(model, kinds, 8192).modules:
        pytest.skip("no layer has it")
    batches = case.batches * 2
    wanted, _ = captured(model, batches, kinds)
    capture = Capture(find_coverage(model, kinds, 8192), Statistics({}))
    for batch in batches:
        examples = len(batch["labels"])
        with capture.batch(examples, examples, batch.get("attention_mask")):
            loss = model(batch).mean()
            capture.start_backward()
            torch.autograd.grad(loss, capture.needed, allow_unused=True)
            assert capture.finish()
    assert_close(capture.statistics.tensors, wanted.tensors, 1e-12)
    assert capture.statistics.positions == wanted.positions


@pytest.mark.parametrize("defer", [False, True])
def test_batches_may_be_cut_in_any_way(defer: bool) -> None:
    model = Transformer().double()
    whole = texts((10,))[0]
    parts = [
        {k: v[rows] for k, v in whole.items()} for rows in (slice(3), slice(3, 4), slice(4, 10))
    ]
    found, _ = captured(model, [whole])
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    for part in parts:
        capture_batch(capture, model, part, scale=2.0**10, defer=defer)
    assert sorted(capture.statistics.tensors) == sorted(found.tensors)
    assert_close(capture.statistics.tensors, found.tensors, 1e-12)
    assert capture.statistics.examples == found.examples == 10
    assert capture.statistics.group_positions == found.group_positions


def test_kfac_of_one_unshared_example_is_the_outer_product_of_its_gradient() -> None:
    model, batch = MLP().double(), vectors((1,))[0]
    found, _ = captured(model, [batch])
    for name, layer in (("first", model.first), ("second", model.second)):
        assert layer.weight.grad is not None
        gradient, (a, g) = layer.weight.grad.flatten(), found.kfac[name]
        torch.testing.assert_close(torch.kron(g, a), torch.outer(gradient, gradient))


def test_what_shares_an_input_is_stored_once() -> None:
    found, _ = captured(Transformer().double(), texts())
    assert found.inputs["blocks.1.k"] == found.inputs["blocks.1.v"] == "blocks.1.q"
    assert "A/blocks.1.q" in found.tensors and "A/blocks.1.k" not in found.tensors
    again, _ = captured(Transformer("non-reentrant").double(), texts())
    assert again.inputs == found.inputs


def test_groups_are_split_when_inputs_differ_and_only_then() -> None:
    model = Sharing().double()
    assert captured(model, ways("together", "together"))[0].inputs["v"] == "q"
    assert captured(model, ways("together", "k alone"))[0].inputs == {
        "q": "q", "k": "k", "v": "q", "head": "head"
    }  # fmt: skip


@pytest.mark.parametrize("kinds", [("diagonal_fisher",), ("gram",), ("kfac", "block_fisher")])
def test_a_subset_of_the_statistics(kinds: tuple[str, ...]) -> None:
    model = MLP().double()
    whole, _ = captured(model, vectors())
    found, _ = captured(model, vectors(), kinds)
    prefixes = {"gram": ("A/", "a/"), "kfac": ("A/", "a/", "G/")}
    wanted = tuple(p for kind in kinds for p in prefixes.get(kind, (f"{kind}/",)))
    assert_close(
        found.tensors, {k: t for k, t in whole.tensors.items() if k.startswith(wanted)}, 0.0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_rms_norm_without_an_eps_of_its_own_has_torchs(dtype: torch.dtype) -> None:
    """Inputs are so small that the eps of 16 bits would be most of their mean square, if it is."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.RMSNorm(D), nn.Linear(D, 3)

        def forward(self, batch: Batch) -> Tensor:
            return classified(self.head(self.norm(batch["x"])), batch)

    torch.manual_seed(0)
    model = Small().to(dtype)
    batches = [to(batch | {"x": batch["x"] * 0.02}, dtype) for batch in vectors()]
    found, _ = captured(model, batches)
    wide = model.float()
    if F.rms_norm(torch.full((1,), 1e-3, dtype=dtype), (1,)) < 0.5:  # torch 2.6: that of 16 bits
        wide.norm.eps = torch.finfo(dtype).eps
    wanted = expected(wide, [to(batch, torch.float32) for batch in batches])
    assert_close(found.diagonal_fisher, wanted.diagonal_fisher, 0.03)


def test_sums_are_not_taken_in_16_bits() -> None:
    """Not even where the backward pass runs under autocast as well."""
    model, batch = MLP(), to(vectors((64,))[0], torch.float32)
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    with torch.autocast("cpu", torch.bfloat16):
        capture_batch(capture, model, batch)
    assert_close(
        {"first": capture.statistics.tensors["A/first"]}, {"first": batch["x"].T @ batch["x"]}, 1e-6
    )


@pytest.mark.parametrize("name", ["transformer", "reused", "convolutions", "convolution of texts"])
def test_kfac_with_reduce(name: str) -> None:
    """Of each example's mean input and summed gradient; the Gram matrix stays as it is."""
    case = CASES[name]
    model = case.model().double()
    wanted = expected(model, case.batches, reduce=True)
    found, coverage = captured(model, case.batches, weight_sharing="reduce")
    assert_close({m: a for m, (a, _) in found.kfac.items()}, wanted.reduced, 1e-9)
    assert_close({m: g for m, (_, g) in found.kfac.items()}, wanted.output, 1e-9)
    assert_close(found.gram, wanted.gram, 1e-9)
    parts = [captured(model, [b], weight_sharing="reduce")[0] for b in case.batches]
    assert_close(sum(parts[1:], parts[0]).tensors, found.tensors, 1e-9)
    assert sum(t.nbytes for t in found.tensors.values()) <= coverage.bytes()


@pytest.mark.parametrize("name", ["transformer", "convolutions", "tied", "categories"])
def test_sums_may_be_kept_on_another_device(name: str) -> None:
    """Here one that holds no numbers, but refuses to be mixed with others."""
    case, home = CASES[name], torch.device("meta")
    model = case.model().double()
    wanted, _ = captured(model, case.batches, weight_sharing="reduce")
    found, _ = captured(model, case.batches, weight_sharing="reduce", device=home)
    assert {tensor.device for tensor in found.tensors.values()} == {home}
    shapes = {key: tensor.shape for key, tensor in wanted.tensors.items()}
    assert {key: tensor.shape for key, tensor in found.tensors.items()} == shapes


class Elsewhere(Tensor):
    """Says that it is on another device than it is."""

    device = property(lambda self: torch.device("meta"))


def test_what_is_added_arrives_on_the_other_device() -> None:
    x, before = torch.randn(5, 3), torch.randn(3, 3)
    tensors: dict[str, Tensor] = {"A/x": before.clone().as_subclass(Elsewhere)}
    add_second_moment(tensors, "A/x", x, torch.device("meta"))
    torch.testing.assert_close(tensors["A/x"].as_subclass(Tensor), before + x.T @ x)


@pytest.mark.parametrize("groups", [(), (3,)], ids=["whole", "groups"])
@pytest.mark.parametrize("d", [1, 7, ROWS_OF_BLOCK, ROWS_OF_BLOCK + 1, 2 * ROWS_OF_BLOCK + 7])
def test_a_product_in_blocks_is_the_whole_product(d: int, groups: tuple[int, ...]) -> None:
    parts = [torch.randn(rows, *groups, d, dtype=torch.float64) for rows in (5, 1, 0, 9)]
    tensors: dict[str, Tensor] = {}
    for x in parts:
        add_second_moment(tensors, "A/x", x, x.device)
    wanted = torch.einsum("p...i,p...j->...ij", torch.cat(parts), torch.cat(parts))
    torch.testing.assert_close(tensors["A/x"], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tensors["A/x"], tensors["A/x"].mT, rtol=1e-12, atol=1e-12)


def test_many_positions_of_groups_are_added_precisely() -> None:
    """A million of them in float32, as images give a depthwise convolution."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    wanted = torch.zeros(3, 4, 4, dtype=torch.float64)
    for _ in range(16):
        x = (
            torch.randn(65_536, 3, 4, generator=generator) * 0.3
            + torch.tensor([0.5, 3.0, 5.7])[:, None]
        )
        add_second_moment(tensors, "A/x", x, x.device)
        wanted += torch.einsum("pgi,pgj->gij", x.double(), x.double())
    error = (tensors["A/x"] - wanted).abs().amax((1, 2)) / wanted.amax((1, 2))
    assert float(error.max()) < 5e-6


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["transformer", "convolutions", "sharing", "reused"])
def test_statistics_in_smaller_blocks(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment they are whole: what was saved between two batches, too."""
    case, model = CASES[name], CASES[name].model().double()
    wanted = [captured(model, case.batches[:n])[0] for n in range(1, len(case.batches) + 1)]
    monkeypatch.setattr(factors, "ROWS_OF_BLOCK", size)
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    for batch, until_here in zip(case.batches, wanted, strict=True):
        capture_batch(capture, model, batch)
        assert_close(capture.statistics.tensors, until_here.tensors, 1e-12)


def test_curvature_of_the_weights_below_a_lora() -> None:
    """The same as that of the layer with the product of its factors added, trained in full."""
    model: Any = lora().double()
    found, coverage = captured(model, vectors(), adapted_weights=True)
    plain = Adapted().double()
    plain.load_state_dict(model.merge_and_unload().state_dict())
    wanted, _ = captured(plain, vectors())
    for name in ("layer", "up"):
        a, g = found.kfac[f"base_model.model.{name}.base_layer"]
        torch.testing.assert_close((a, g), wanted.kfac[name])
    row = coverage.rows["base_model.model.layer.base_layer.weight"]
    assert row.statistics == ["gram", "kfac"]
    assert "base_model.model.head.weight" not in coverage.rows


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_train_beside_a_lora_leave_the_weights_their_curvature(bias: Any) -> None:
    config = LoraConfig(r=2, target_modules=["layer", "up"], bias=bias)
    model: Any = adapted(config, -0.5, 0.5).double()
    wanted = expected(model, vectors())
    found, coverage = captured(model, vectors(), adapted_weights=True)
    assert_close(found.diagonal_fisher, wanted.diagonal_fisher, 1e-9)
    assert_close(found.block_fisher, wanted.block_fisher, 1e-9)
    plain = Adapted().double()
    plain.load_state_dict(model.merge_and_unload().state_dict())
    whole, _ = captured(plain, vectors())
    for name in ("layer", "up"):
        base = f"base_model.model.{name}.base_layer"
        torch.testing.assert_close(found.kfac[base], whole.kfac[name])
        assert coverage.rows[f"{base}.weight"].statistics == ["gram", "kfac"]
        assert coverage.rows[f"{base}.bias"].statistics == ["diagonal_fisher", "block_fisher"]


def test_a_weight_below_a_lora_that_trains_is_like_any_other() -> None:
    model: Any = lora().double().requires_grad_(True)
    wanted = expected(model, vectors())
    found, coverage = captured(model, vectors(), adapted_weights=True)
    assert coverage.uncovered == {}
    assert_equals(found, wanted, 1e-9, [])


class Quantized(type(lora().base_model.model.layer)):  # type: ignore[misc]
    """As peft has them of bitsandbytes' layers."""

    __module__ = "peft.tuners.lora.bnb"


def test_a_weight_below_another_lora_than_a_linear_one_is_named() -> None:
    model: Any = lora().double()
    model.base_model.model.layer.__class__ = Quantized
    coverage = find_coverage(model, KINDS, 8192, adapted_weights=True)
    below = "base_model.model.layer.base_layer.weight"
    reason = "no A and G are taken below LoRA's Quantized (peft.tuners.lora.bnb)"
    assert coverage.uncovered[below] == reason
    assert coverage.rows["base_model.model.up.base_layer.weight"].statistics == ["gram", "kfac"]
    assert below not in find_coverage(model, KINDS, 8192).rows
    found, _ = captured(model, vectors(), adapted_weights=True)
    assert "base_model.model.layer.base_layer" not in found.kfac
    wanted, _ = captured(lora().double(), vectors(), adapted_weights=True)
    assert found.diagonal_fisher.keys() == wanted.diagonal_fisher.keys()


def _zeroed(h: Tensor) -> Tensor:
    h[:, 0] = 0
    return h


def _scaled(h: Tensor) -> Tensor:
    h.view(-1, D).mul_(3)
    return h


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": nn.ReLU(inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "a part is set to 0": _zeroed,
    "a view is scaled": _scaled,
    "a chain": lambda h: h.mul_(2).add_(1).tanh_(),
    "nothing": lambda h: h,
}


@pytest.mark.parametrize("kinds", [KINDS, ("kfac",)], ids=str)
@pytest.mark.parametrize("change", IN_PLACE)
def test_what_changes_an_output_in_place_does_no_harm(change: str, kinds: tuple[str, ...]) -> None:
    """A linear layer gives (N, R, d) as a view of (N R, d)."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bare = nn.Linear(2, D), nn.Linear(D, D, bias=False)
            self.transposed, self.head = Conv1D(D, D), nn.Linear(D, 3)

        def forward(self, batch: Batch) -> Tensor:
            h = batch["x"].unflatten(1, (3, 2))
            for layer in (self.first, self.bare, self.transposed):
                h = IN_PLACE[change](layer(h))
            return classified(self.head(h).mean(1), batch)

    torch.manual_seed(0)
    model = Model().double()
    wanted = expected(model, vectors())
    found, coverage = captured(model, vectors(), kinds)
    weights = {name for name, row in coverage.rows.items() if "kfac" in row.statistics}
    assert weights == {f"{name}.weight" for name in ("first", "bare", "transposed", "head")}
    if kinds == KINDS:
        assert_equals(found, wanted, 1e-9, [])


# -- what cannot be exact is named -----------------------------------------------------------


def test_a_flattened_batch_axis_has_no_statistics_of_examples() -> None:
    model = Flattened().double()
    found, coverage = captured(model, vectors())
    wanted = expected(model, vectors())
    assert_close(found.gram, wanted.gram, 1e-9)
    assert_close({m: g for m, (_, g) in found.kfac.items()}, wanted.output, 1e-9)
    covered = {n: f for n, f in wanted.diagonal_fisher.items() if not n.startswith("middle.")}
    assert_close(found.diagonal_fisher, covered, 1e-9)
    assert coverage.rows["middle.weight"].statistics == ["gram", "kfac"]
    assert coverage.uncovered == {
        "middle.bias": "the output of middle has 12 rows for 4 examples, so an example's gradient"
        " cannot be told apart"
    }


@pytest.mark.parametrize("name", OTHER_MEETINGS)
def test_positions_that_meet_the_batch_in_another_way_are_left_as_they_are(name: str) -> None:
    model, batch = Places(OTHER_MEETINGS[name]).double(), texts()[0]
    torch.manual_seed(3)
    loss = model(batch).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    torch.manual_seed(3)
    assert torch.equal(capture_batch(capture, model, batch), loss)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert sorted(capture.statistics.diagonal_fisher) == [
        "head.bias",
        "head.weight",
        "words.weight",
    ]
    row = capture.coverage.rows["places.weight"]
    assert row.statistics == ["gram"] and "1 rows for 4 examples" in row.reason


def test_a_gradient_of_gradients_is_named() -> None:
    found, coverage = captured(GradientPenalty().double(), vectors())
    reason = "the loss has a gradient in it that was taken through first"
    assert coverage.uncovered["first.weight"] == reason
    assert not any("first" in key for key in found.tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_that_is_used_without_its_layer_is_named(dtype: torch.dtype) -> None:
    found, coverage = captured(Functional().to(dtype), texts())
    named = {"words.weight": MORE_IN_IT, "never_called.weight": MORE_IN_IT}
    assert coverage.uncovered == named
    assert sorted(found.diagonal_fisher) == ["layer.bias", "layer.weight", "never_called.bias"]
    assert list(found.kfac) == ["layer"]


@pytest.mark.parametrize("kinds", [("gram",), ("kfac",), ("diagonal_fisher",)])
def test_it_is_named_with_any_choice_of_statistics(kinds: tuple[str, ...]) -> None:
    found, coverage = captured(Functional().double(), texts(), kinds)
    assert coverage.uncovered["never_called.weight"] == MORE_IN_IT
    assert not any(key.endswith(("never_called.weight", "/never_called")) for key in found.tensors)


class Centred(nn.Module):
    """Its examples are not alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.weight


class Choosing(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1 if x.sum() > 0 else x


class Two(Scale):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x * self.lambda1 * factor


class Pair(Scale):
    def forward(self, x: Tensor) -> Any:
        return x * self.lambda1, x


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str]] = {
    "mixes examples": (Centred, lambda m, x: m(x), "the model uses it without"),
    "chooses by values": (Choosing, lambda m, x: m(x), "autograd of unknown for each example"),
    "takes more": (Two, lambda m, x: m(x, 2.0), "unknown is not called with one tensor"),
    "gives more": (Pair, lambda m, x: m(x)[0], "unknown is not called with one tensor"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_module_that_is_not_a_function_of_one_example_is_named(name: str) -> None:
    make, use, reason = UNKNOWN[name]

    class Model(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.unknown = make()

        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch | {"x": use(self.unknown, batch["x"])})

    model = Model().double()
    found, coverage = captured(model, vectors())
    (uncovered,) = coverage.uncovered.items()
    assert uncovered[0].startswith("unknown.") and reason in uncovered[1]
    assert sorted(found.kfac) == ["first", "second"]


def test_an_input_that_was_changed_in_place_is_named() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 3)
    model = nn.Sequential(first, second)
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    x = vectors()[0]["x"].float()
    with capture.batch(4, 4.0):
        with torch.autocast("cpu", torch.bfloat16):  # autograd keeps a copy in bfloat16
            h = first(x).float()
            y = second(h)
            h.mul_(2)
        capture.start_backward()
        y.float().square().sum(-1).mean().backward()
        assert capture.finish()
    assert "changed in place" in capture.coverage.uncovered["1.weight"]
    kept = {key for key in capture.statistics.tensors if key.startswith(("A", "a", "G"))}
    assert kept == {"A/0", "a/0", "G/0"}
    assert sorted(capture.statistics.diagonal_fisher) == ["0.bias", "0.weight", "1.bias"]
    assert sorted(capture.statistics.block_fisher) == ["0.bias", "1.bias"]


# -- batches that do not count, and what is left behind ----------------------------------------


def test_a_batch_that_overflows_is_left_out_and_counted() -> None:
    model = MLP()
    batches = [to(batch, torch.float32) for batch in vectors()]
    wanted, _ = captured(model, batches[1:])
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    for batch, scale in zip(batches, (float("inf"), 1.0, 1.0), strict=True):
        capture_batch(capture, model, batch, scale, defer=True)
    assert_close(capture.statistics.tensors, wanted.tensors, 1e-6)
    assert capture.statistics.examples == wanted.examples
    assert capture.statistics.info["skipped_batches"] == 1


def test_a_batch_without_a_gradient_is_not_counted() -> None:
    model = MLP().double()
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    with capture.batch(4, 4.0):
        capture.start_backward()
        assert not capture.finish()
    assert capture.statistics.examples == 0


def test_masks_of_integers_count_as_booleans() -> None:
    model, batch = Transformer().double(), texts()[0]
    assert batch["attention_mask"].dtype == torch.int64
    found, _ = captured(model, [batch])
    assert found.positions["blocks.0.q"] == int(batch["attention_mask"].sum())
    assert found.positions["head"] == len(batch["labels"])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_come_off_whatever_happens() -> None:
    model = MLP().double()
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    with pytest.raises(KeyboardInterrupt), capture.batch(4, 4.0):
        assert hooks(model) == 2
        raise KeyboardInterrupt
    assert hooks(model) == 0


@pytest.mark.parametrize("model", [Transformer, lambda: Sharing()])
def test_nothing_of_a_batch_stays_in_memory(model: Callable[[], nn.Module]) -> None:
    """Without the garbage collector's help: no cycle holds inputs and graph."""
    batches = texts() if model is Transformer else ways("together", "k drops out")
    gc.collect()
    gc.disable()
    try:
        captured(model().double(), batches)
        assert not [x for x in gc.get_objects() if type(x) is Input]
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [MLP, lambda: Sharing()], ids=["mlp", "sharing"])
def test_what_is_added_is_let_go(make: Callable[[], nn.Module]) -> None:
    """Not only when the batch ends: autograd lets its own copies go layer by layer."""
    left: list[int] = []

    def count(gradient: Tensor) -> None:
        left.append(sum(type(x) is Input for x in gc.get_objects()))

    model, batch = make(), to(ways("together")[0], torch.float32)
    batch["x"].requires_grad_().register_hook(count)
    gc.collect()
    captured(model, [batch])
    assert left == [0]


# -- another implementation --------------------------------------------------------------------


class Pooled(nn.Module):
    """(N, 3, 2) -> (N, 3): a layer at three positions, their mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).mean(1))


class PooledImage(nn.Module):
    """A convolution with stride, padding and dilation; a mean over its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1, dilation=(2, 1), bias=False)
        self.head = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.layer(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", [Pooled, PooledImage])
def test_kfac_equals_curvlinops(make: Callable[[], nn.Module], weight_sharing: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model: Any = make().double()
    if make is Pooled:
        data = [(batch["x"].unflatten(1, (3, 2)), batch["labels"]) for batch in vectors((6, 4))]
    else:
        data = [(batch["x"], batch["labels"]) for batch in images((6, 4), shape=(2, 5, 6))]
    theirs = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [model.layer.weight, model.head.weight],
        data,
        fisher_type="empirical",
        kfac_approx=weight_sharing,
        check_deterministic=False,
    )
    sizes = [model.layer.weight.numel(), model.head.weight.numel()]
    dense = theirs @ torch.eye(sum(sizes), dtype=torch.float64)
    coverage = find_coverage(model, ("kfac",), 8192, weight_sharing)
    capture = Capture(coverage, Statistics({}))
    for x, y in data:
        with capture.batch(len(x), len(x)):
            loss = F.cross_entropy(model(x), y)
            capture.start_backward()
            loss.backward()
            capture.finish()
    first = sizes[0]
    for name, block in (("layer", dense[:first, :first]), ("head", dense[first:, first:])):
        a, g = capture.statistics.kfac[name]
        torch.testing.assert_close(torch.kron(g, a), block)
